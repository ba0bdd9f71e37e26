"""common.py: saves that cannot break, a log that fits them, one trainer per folder."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

import common


def small_run(folder, steps, keep=2, last=False):
    """(linear layer, its optimizer) after `steps` steps, each saved in `folder` with a line of the log."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer, log = torch.optim.AdamW(layer.parameters()), common.Log(folder)
    for step in range(steps):
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
        log.write(step=step)
        common.save_training(folder, layer, optimizer, step + 1, layer.state_dict(), log, keep, last)
    log.close()
    return layer, optimizer


def flip(path, at):
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.uint8, torch.bool))
def test_tensors_come_back(dtype, tmp_path):
    """Of every type and shape, with their metadata, readable by all, and no other file."""
    tensors = {"b": torch.arange(6).reshape(2, 3).to(dtype).T, "a": torch.ones((), dtype=dtype), "c": torch.zeros(0, 2)}
    common.save_tensors(tmp_path / "x", tensors, step=3)
    found, info = common.load_tensors(tmp_path / "x")
    assert info == {"step": "3"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("old, new", ((b"F32", b"I32"), (b'"step":"3"', b'"step":"4"'), (b'"w"', b'"v"'),
                                      (b"[2,3]", b"[3,2]"), (b"\x00\x00\x80?", b"\x01\x00\x80?")))  # fmt: skip
def test_damage_is_found(old, new, tmp_path):
    """In a name, a type, a shape, the metadata or a value: both checksums and the file are named."""
    common.save_tensors(tmp_path / "x", {"w": torch.ones(2, 3)}, step=3)
    content = (tmp_path / "x").read_bytes()
    assert old in content
    (tmp_path / "x").write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"x is damaged: its checksum is [0-9a-f]{8}, but [0-9a-f]{8} when"):
        common.load_tensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(content[:-3])
    with pytest.raises(ValueError, match="x is damaged: .*"):
        common.load_tensors(tmp_path / "x")


def test_saves_that_stay(tmp_path):
    """The newest `keep`, in the order of numbers; what lies after the step that was saved had been found damaged."""
    small_run(tmp_path, 11, keep=3)
    assert list(common.checkpoints(tmp_path)) == [11, 10, 9]
    small_run(tmp_path, 2, keep=3)
    assert list(common.checkpoints(tmp_path)) == [2, 1]


def test_damaged_save_is_passed_over(tmp_path, capsys):
    """The one before it is taken, with a warning that names the file; when all are damaged, an error names them."""
    small_run(tmp_path, 3)
    layer, optimizer = small_run(tmp_path, 0)
    flip(tmp_path / "training-3.safetensors", -1)
    assert common.restore_training(tmp_path, layer, optimizer) == 2
    expected, _ = common.load_tensors(tmp_path / "training-2.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in common.trainable_tensors(layer).items())
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], expected["optimizer.0.exp_avg"])
    warning = capsys.readouterr().err
    assert "training-3.safetensors is damaged: its checksum" in warning and "Trying the save before it" in warning
    flip(tmp_path / "training-2.safetensors", 3)
    with pytest.raises(ValueError, match="every save is damaged: .*training-3.safetensors, .*training-2.safetensors"):
        common.restore_training(tmp_path, layer, optimizer)


@pytest.mark.parametrize("last", (False, True))
def test_save_that_fails(last, tmp_path, capsys):
    """What there was stays, nothing half-written does, training goes on with a warning; the last save is an error."""
    small_run(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # bytes of a file: as if the disk were full
    layer, optimizer = torch.nn.Linear(3, 2), None
    try:
        log = common.Log(tmp_path, first_step=2)
        optimizer = torch.optim.AdamW(layer.parameters())
        save = lambda: common.save_training(tmp_path, layer, optimizer, 3, layer.state_dict(), log, 2, last)  # noqa: E731
        if last:
            with pytest.raises(OSError, match="step 3 could not be saved.*last good save: .*training-2.safetensors"):
                save()
        else:
            save()
            assert "WARNING: step 3 could not be saved" in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    log.close()


def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The log's lines, the file, its name: in this order, or a power cut could leave a name without a file."""
    log, calls, fsync = common.Log(tmp_path), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append(Path(os.readlink(f"/proc/self/fd/{n}")).name), fsync(n)))
    log.write(step=0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    common.save_training(tmp_path, layer, optimizer, 1, layer.state_dict(), log, 2, False)
    folder = tmp_path.name
    assert calls == ["log.jsonl", "training-1.safetensors.tmp", folder, "model.safetensors.tmp", folder]
    log.close()


def test_log_outlives_a_full_disk(tmp_path, capsys):
    """Lines that do not fit wait, in order; a save does not get ahead of them."""
    log, limits = common.Log(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, limits[1]))
    try:
        for step in range(4):
            log.write(step=step)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        common.save_training(tmp_path, layer, optimizer, 4, layer.state_dict(), log, 2, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "lines wait in memory" in capsys.readouterr().err and not common.checkpoints(tmp_path)
    log.write(step=4)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("end", ('{"step": 3}\n{"step": 4, "lo', '{"step": 2}', "\0\0\0\n", "5\n", "{}\n", ""))
def test_log_is_cut_back(end, tmp_path):
    """To the step of the save, also when its last line is half-written."""
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n' + end)
    log = common.Log(tmp_path, first_step=3)
    log.write(step=3)
    log.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == [0, 1, 3]


def test_text_is_replaced_whole(tmp_path):
    """An error on the way leaves the old text and no temporary file."""
    common.write_text(tmp_path / "x", "old")
    with pytest.raises(UnicodeEncodeError):
        common.write_text(tmp_path / "x", "new \ud800")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]
