"""checkpoint.py: files that are never half written, saves that cannot break, and a log that fits them."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

import checkpoint
import files
from common import Log


def make_training():
    """Return a linear layer and its optimizer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    return layer, torch.optim.AdamW(layer.parameters())


def save(folder, layer, optimizer, step, log, keep=2, last=False):
    """Save the training in `folder` after `step` updates."""
    checkpoint.save_training(folder, layer, optimizer, step, layer.state_dict(), log, keep, last)


def train_and_save(folder, steps, keep=2):
    """Return (linear layer, its optimizer) after `steps` updates, each saved in `folder` with a line of the log."""
    layer, optimizer = make_training()
    log = Log(folder)
    for step in range(steps):
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
        log.write(step=step)
        save(folder, layer, optimizer, step + 1, log, keep)
    log.close()
    return layer, optimizer


def flip_bit(path, at):
    """Change one bit of the byte `at` of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.fixture
def limit_file_size():
    """Return a function (bytes) after which no file may grow beyond that size, as if the disk were full.

    Without an argument it lifts the limit, as the end of the test does.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size=limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

    yield set_limit
    set_limit()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_text_is_replaced_whole(tmp_path):
    """An error on the way leaves the old text and no temporary file."""
    files.write_text(tmp_path / "x", "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "x", "new \ud800")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.uint8, torch.bool))
def test_tensors_come_back(dtype, tmp_path):
    """Of every type and shape, with their metadata, readable by all, and no other file."""
    tensors = {"b": torch.arange(6).reshape(2, 3).to(dtype).T, "a": torch.ones((), dtype=dtype), "c": torch.zeros(0, 2)}
    files.save_tensors(tmp_path / "x", tensors, step=3)
    loaded, info = files.load_tensors(tmp_path / "x")
    assert info == {"step": "3"} and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_equal_contents_are_equal_bytes(tmp_path):
    """The library writes metadata in random order; a text of any letters survives that it is sorted."""
    info = {"step": 3, "data": 'a "b" \\ é \n \x01 \x7f \u2028 🤖', "lam": "made", "delta": 32}
    for number in range(8):
        files.save_tensors(tmp_path / str(number), {"w": torch.ones(2, 3)}, **info)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1
    assert files.load_tensors(tmp_path / "7")[1] == {name: str(value) for name, value in info.items()}


@pytest.mark.parametrize(
    "old, new",
    (
        (b"F32", b"I32"),
        (b'"step":"3"', b'"step":"4"'),
        (b'"w"', b'"v"'),
        (b"[2,3]", b"[3,2]"),
        (b"\x00\x00\x80?", b"\x01\x00\x80?"),
    ),
)
def test_damage_is_found(old, new, tmp_path):
    """In a name, a type, a shape, the metadata or a value: both checksums and the file are named."""
    files.save_tensors(tmp_path / "x", {"w": torch.ones(2, 3)}, step=3)
    content = (tmp_path / "x").read_bytes()
    assert old in content
    (tmp_path / "x").write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"x is damaged: its checksum is [0-9a-f]{8}, but [0-9a-f]{8} when"):
        files.load_tensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(content[:-3])
    with pytest.raises(ValueError, match="x is damaged: .*"):
        files.load_tensors(tmp_path / "x")


# ----------------------------------------------------------------------------------------------------------------------
# Saves of a training


def test_saves_that_stay(tmp_path):
    """The newest `keep`, in the order of numbers; those after the saved step are removed: they were found damaged."""
    train_and_save(tmp_path, 11, keep=3)
    assert list(checkpoint.training_saves(tmp_path)) == [11, 10, 9]
    train_and_save(tmp_path, 2, keep=3)
    assert list(checkpoint.training_saves(tmp_path)) == [2, 1]


def test_damaged_save_is_passed_over(tmp_path, capsys):
    """The one before it is taken, with a warning that names the file; when all are damaged, an error names them."""
    train_and_save(tmp_path, 3)
    layer, optimizer = make_training()
    flip_bit(tmp_path / "training-3.safetensors", -1)
    assert checkpoint.restore_training(tmp_path, layer, optimizer) == 2
    expected, _ = files.load_tensors(tmp_path / "training-2.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.trainable_tensors(layer).items())
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], expected["optimizer.0.exp_avg"])
    warning = capsys.readouterr().err
    assert "training-3.safetensors is damaged: its checksum" in warning and "Trying the save before it" in warning
    flip_bit(tmp_path / "training-2.safetensors", 3)
    with pytest.raises(ValueError, match="every save is damaged: .*training-3.safetensors, .*training-2.safetensors"):
        checkpoint.restore_training(tmp_path, layer, optimizer)


@pytest.mark.parametrize("last", (False, True))
def test_save_that_fails(last, tmp_path, capsys, limit_file_size):
    """What there was stays, nothing half-written does, training goes on with a warning; the last save is an error."""
    train_and_save(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    layer, optimizer = make_training()
    log = Log(tmp_path, first_step=2)
    limit_file_size(200)
    if last:
        with pytest.raises(OSError, match="step 3 could not be saved.*last good save: .*training-2.safetensors"):
            save(tmp_path, layer, optimizer, 3, log, last=True)
    else:
        save(tmp_path, layer, optimizer, 3, log)
        assert "WARNING: step 3 could not be saved" in capsys.readouterr().err
    limit_file_size()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    log.close()


def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The log's lines, the file, its name: in this order, or a power cut could leave a name without a file."""
    log = Log(tmp_path)
    log.write(step=0)
    layer, optimizer = make_training()
    synced = []
    fsync = os.fsync

    def record_and_sync(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record_and_sync)
    save(tmp_path, layer, optimizer, 1, log)
    folder = tmp_path.name
    assert synced == ["log.jsonl", "training-1.safetensors.tmp", folder, "model.safetensors.tmp", folder]
    log.close()


def test_log_outlives_a_full_disk(tmp_path, capsys, limit_file_size):
    """Lines that do not fit wait, in order; a save does not get ahead of them."""
    log = Log(tmp_path)
    layer, optimizer = make_training()
    limit_file_size(25)
    for step in range(4):
        log.write(step=step)
    save(tmp_path, layer, optimizer, 4, log)
    limit_file_size()
    assert "lines wait in memory" in capsys.readouterr().err and not checkpoint.training_saves(tmp_path)
    log.write(step=4)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [0, 1, 2, 3, 4]
