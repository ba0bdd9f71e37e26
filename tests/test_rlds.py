"""rlds.py against tensorflow-datasets and Pillow, and what it reports about damaged data."""

import gc
import io
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import picture
from data_helpers import change_episode, copy_rlds, equal_batches, make_chunks, replace_number, replace_step, run_check
from PIL import Image
from torch.utils.data import DataLoader

from data import open_dataset
from rlds import decode_image, is_dataset, open_index, read_records

# ----------------------------------------------------------------------------------------------------------------------
# Index


def test_index_equals_what_tensorflow_datasets_reads(as_tfds_reads, index):
    """Every image byte, action, state, instruction and metadata value of every step."""
    at = 0
    for number, (metadata, steps) in enumerate(as_tfds_reads):
        assert (index.starts[number], index.starts[number + 1]) == (at, at + len(steps))
        for step in steps:
            for camera in ("image", "wrist_image"):
                assert index.stored_bytes(f"observation/{camera}", at) == step["observation"][camera]
            for name in ("state", "joint_state"):
                assert np.array_equal(index.columns[f"observation/{name}"][at], step["observation"][name])
            for name in ("action", "reward", "is_first", "is_last"):
                assert np.array_equal(index.columns[name][at], step[name]), name
            assert index.texts["language_instruction"][at] == step["language_instruction"].decode()
            assert index.texts["episode_metadata/file_path"][at] == metadata["file_path"].decode()
            at += 1
        stored = {name: values[number] for name, values in index.metadata.items()}
        expected = {name: value.decode() if isinstance(value, bytes) else value for name, value in metadata.items()}
        assert stored == expected | {"state": metadata["state"].tolist()}
    assert len(index) == at and index.num_episodes == 8


def test_image_is_the_decoded_jpeg_and_options_reproduce_it(dataset):
    """Frames decode to what was drawn; storing one again with the data's options gives the stored bytes back."""
    frame = dataset.image("image", 3)
    column = 40 if dataset.instruction(0).endswith("plate") else 20
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8
    square = frame[10:22, column + 4 : column + 16].astype(int)  # it begins at row 2 t = 6
    assert np.abs(square - (220, 200, 40)).max() < 50
    pixels = np.full((96, 96, 3), 90, np.uint8)
    pixels[30:50, 30:50] = (220, 200, 40)
    for camera, quality in (("image", 85), ("wrist_image", 70)):
        options = dataset.storage_options(camera)
        assert options.pop("size") == 96
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **options)
        assert buffer.getvalue() == picture(90, (30, 30), quality)


def test_second_opening_reads_the_cache(rlds, tmp_path):
    """A shard whose size and time are as before is not read again, so damage to it goes unnoticed."""
    folder = copy_rlds(rlds, tmp_path)
    first = open_index(folder, tmp_path / "cache")
    path = first.shards[0]
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = open_index(folder, tmp_path / "cache")
    assert np.array_equal(second.columns["action"], first.columns["action"]) and second.fingerprint == first.fingerprint
    assert dict(second.metadata) == dict(first.metadata) and dict(second.texts).keys() == first.texts.keys()
    assert [p.name for p in (tmp_path / "cache").glob("[!.]*")] == [first.cache.name]


def test_changed_shard_is_indexed_anew(rlds, index, tmp_path):
    """Equal bytes elsewhere have an equal fingerprint; other bytes under the same name a new one and a new index."""
    folder = copy_rlds(rlds, tmp_path)
    first = open_index(folder, tmp_path / "cache")
    assert first.fingerprint == index.fingerprint
    shards = [p.read_bytes() for p in first.shards]
    for path, content in zip(first.shards, reversed(shards)):
        path.write_bytes(content)
    second = open_index(folder, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint and second.cache != first.cache
    episodes = np.split(np.asarray(index.columns["action"]), index.starts[1:-1])
    moved = np.split(np.asarray(second.columns["action"]), second.starts[1:-1])
    assert np.array_equal(moved[0], episodes[-len(episodes) // 2]) and len(moved) == len(episodes)


def test_data_set_is_named_after_its_folder(rlds, cache, tmp_path):
    """Statistics are kept by name, and the metadata's own name can differ from the one that users know."""
    renamed = tmp_path / "libero_10_no_noops"
    shutil.copytree(rlds, renamed)
    assert open_index(renamed, cache).name == "libero_10_no_noops"


@pytest.mark.parametrize("mode, subsampling", (("RGB", 0), ("RGB", 2), ("L", 0)))
def test_decoded_pixels_are_pillows(mode, subsampling):
    """With simplejpeg or without: full and halved chroma, grey, sides that are no multiple of a block."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, len(mode)), dtype=np.uint8)
    options = {} if mode == "L" else {"subsampling": subsampling}
    Image.fromarray(noise.squeeze()).save(buffer, "JPEG", quality=90, **options)
    decoded = decode_image(buffer.getvalue())
    assert decoded.shape == (37, 51, 3) and decoded.dtype == np.uint8
    assert np.array_equal(decoded, np.asarray(Image.open(buffer).convert("RGB")))


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


def test_truncated_shard_names_file_and_offset(rlds, tmp_path):
    """A shard cut inside its last record, inside a header, or at a record's start."""
    folder = copy_rlds(rlds, tmp_path)
    path = open_index(folder, tmp_path / "cache").shards[1]
    content = path.read_bytes()
    last = [offset - 12 for offset, _, _ in read_records(path)][-1]
    for length, at in ((len(content) - 100, last), (len(content) - 1, last), (last + 5, last)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path.name}: .*byte {at} is cut short"):
            open_index(folder, tmp_path / "cache")


def test_flipped_bit_names_file_and_offset(rlds, tmp_path):
    """One bit anywhere in a record: in its length, in its payload, in its checksum."""
    folder = copy_rlds(rlds, tmp_path)
    path = open_index(folder, tmp_path / "cache").shards[0]
    content = path.read_bytes()
    second = [offset - 12 for offset, _, _ in read_records(path)][1]
    for place, at in ((second, second), (second + 9, second), (second + 5000, second), (100, 0), (second - 1, 0)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name}: wrong checksum .*byte {at}"):
            open_index(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1  # no index of a damaged shard was kept


@pytest.mark.parametrize("name", ("features.json", "dataset_info.json"))
def test_damaged_metadata_is_named(name, rlds, tmp_path):
    """Cut, or JSON of something else: the file or its folder, and what to do."""
    folder = copy_rlds(rlds, tmp_path)
    (path,) = folder.glob(f"*/{name}")
    content = path.read_text()
    damaged = f"{path.parent}: damaged features.json or dataset_info.json: .* Copy it again"
    for wrong, message in ((content[:-5], f"{path} is no JSON"), ("[]", f"{path} holds .*no"), ("{}", damaged)):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            open_index(folder, tmp_path)


def test_missing_and_empty_folders_are_explained(rlds, tmp_path):
    """An empty folder, one with two data sets, one without a shard that its metadata names."""
    (tmp_path / "empty").mkdir()
    assert is_dataset(rlds) and not is_dataset(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty holds 0 RLDS data sets"):
        open_index(tmp_path / "empty", tmp_path)
    folder = copy_rlds(rlds, tmp_path)
    shutil.copytree(folder / "1.0.0", folder / "1.0.1")
    with pytest.raises(
        ValueError, match=r"made holds 2 RLDS data sets \(1.0.0, 1.0.1\); give --data the folder of one"
    ):
        open_index(folder, tmp_path)
    assert open_index(folder / "1.0.1", tmp_path).name == "made"
    shutil.rmtree(folder / "1.0.1")
    next(folder.glob("*/*.tfrecord-00001*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards are missing.*00001-of-00002"):
        open_index(folder, tmp_path)


def test_shard_cut_between_records_is_noticed(rlds, tmp_path, capsys):
    """Whole records that are too few: the metadata knows their number."""
    folder, path = change_episode(rlds, tmp_path, {})
    last = [offset - 12 for offset, _, _ in read_records(path)][-1]
    path.write_bytes(path.read_bytes()[:last])
    with pytest.raises(ValueError, match=f"{path.name}: 3 whole records, 4 in dataset_info.json. Copy it again"):
        open_index(folder, tmp_path / "cache")
    assert run_check(folder, capsys)[0] == 1


@pytest.mark.parametrize("fault, message", (("cut", "the file ends before byte"), ("gone", "No such file")))
def test_shard_that_becomes_unreadable_is_named(fault, message, rlds, tmp_path):
    """Cut or removed after it was indexed: the shard, camera, step and episode."""
    index = open_index(copy_rlds(rlds, tmp_path), tmp_path / "cache")
    path = index.shards[1]
    last = len(index) - 1
    if fault == "cut":
        path.write_bytes(path.read_bytes()[: int(index.images["observation/image"][last][1]) + 10])
    else:
        path.unlink()
    expected = rf"{path.name}: camera observation/image at step \d+ of episode 7 cannot be used: .*{message}.* Copy it"
    with pytest.raises(ValueError, match=expected):
        index.image("observation/image", last)
    assert index.image("observation/image", 0).shape == (96, 96, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Whole records with wrong contents


def test_record_that_does_not_fit_its_features_is_named(rlds, tmp_path):
    """An episode whose actions do not have the size that features.json gives: file, offset and feature."""
    folder = copy_rlds(rlds, tmp_path)
    path = folder / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace('"7"', '"6"'))
    expected = "made-train.tfrecord-00000-of-00002: record at byte 0: feature steps/.* has .* values"
    with pytest.raises(ValueError, match=expected):
        open_index(folder, tmp_path / "cache")


WRONG_RECORDS = {
    "wrong type": ({"/action": lambda v: v.astype(int)}, r"steps/action has \d+ values \(integers\), .* \(floats\)"),
    "bytes for floats": (
        {"observation/state": lambda v: [v.tobytes()]},
        r"observation/state has 1 values \(bytes\), .* \(floats\)",
    ),
    "floats for text": ({"/suite": lambda v: np.ones(1, np.float32)}, r"suite has 1 values \(floats\), .* 1 \(bytes\)"),
    "wrong shape": ({"/action": lambda v: v[:-1]}, r"steps/action has \d+ values"),
    "missing image": ({"/wrist_image": lambda v: v[:-1]}, r"steps/observation/wrist_image has \d+ values"),
    "missing camera": ({"/image": lambda v: None}, "no feature steps/observation/image; there is .*wrist_image"),
    "empty metadata": ({"/seed": lambda v: v[:0]}, r"episode_metadata/seed has 0 values \(integers\)"),
    "no UTF-8": (
        {"/language_instruction": replace_step(2, b"put \xff")},
        r"language_instruction at step 2 is no UTF-8 text: b'put",
    ),
}


@pytest.mark.parametrize("fault", WRONG_RECORDS)
def test_wrong_record_is_named_at_opening(fault, rlds, tmp_path, capsys):
    """File, byte, feature and episode; nothing of it is kept; the check prints the same and goes on."""
    changes, message = WRONG_RECORDS[fault]
    folder, path = change_episode(rlds, tmp_path, changes)
    expected = rf"{path.name}: record at byte [1-9]\d*: .*{message}.* \(episode 1\). Repair or remove this episode"
    with pytest.raises(ValueError, match=expected):
        open_index(folder, tmp_path / "cache")
    assert not any((tmp_path / "cache").glob("[!.]*"))
    errors, lines = run_check(folder, capsys)
    assert errors == 1 and re.search(expected, lines[0]) and "found in 7 episodes" in lines[-1]


def encode(pixels, kind):
    """Return pixels [h, w] or [h, w, 3] as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


WRONG_IMAGES = {
    "no image": b"no image",
    "empty": b"",
    "truncated": picture(90, (0, 0), 80)[:-300],
    "GIF": encode(np.full((96, 96, 3), 90, np.uint8), "GIF"),
    "16 bits": encode(np.full((96, 96), 9000, np.uint16), "PNG"),
    "another size": encode(np.zeros((96, 64, 3), np.uint8), "JPEG"),
}


@pytest.mark.parametrize("fault", WRONG_IMAGES)
def test_unusable_image_is_named(fault, rlds, tmp_path, capsys, monkeypatch):
    """When it is used, in this process or a data worker: shard, camera, step and episode. The check finds it."""
    folder, path = change_episode(rlds, tmp_path, {"/image": replace_step(5, WRONG_IMAGES[fault])})
    dataset = open_dataset(folder, tmp_path / "cache")
    samples = make_chunks(dataset)
    step = int(dataset.starts[1]) + 5
    message = f"{path.name}: camera observation/image at step 5 of episode 1 cannot be used: .* Copy it again"
    (position,) = (p for p in range(len(dataset)) if samples.place(p) == (0, step))
    with pytest.raises(ValueError, match=message):
        list(DataLoader(samples, sampler=[position]))
    if fault == "GIF":
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # s, to leave a failed worker
        with pytest.raises(ValueError, match=message):
            list(DataLoader(samples, sampler=[position], num_workers=1))
        gc.collect()  # ends the worker while it need not be waited for
    assert len(samples.sample(0, step + 1)["images"]) == 1
    errors, lines = run_check(folder, capsys)
    assert errors == 1 and re.search(message, lines[0])


def test_png_between_jpegs_is_read(rlds, tmp_path):
    """An image is decoded as what it is, whatever the metadata says of its encoding."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    folder, _ = change_episode(rlds, tmp_path, {"/image": replace_step(5, encode(pixels, "PNG"))})
    dataset = open_dataset(folder, tmp_path / "cache")
    assert np.array_equal(dataset.image("image", int(dataset.starts[1]) + 5), pixels)


NONFINITE = (("action", np.nan), ("state", np.inf), ("state", -np.inf), ("reward", np.nan))


@pytest.mark.parametrize("column, value", NONFINITE)
def test_number_that_is_not_finite_is_named(column, value, rlds, tmp_path, capsys):
    """Before training, if of an action or of the state: shard, step, episode, dimension. The check finds it."""
    feature, width = {"action": ("/action", 7), "state": ("observation/state", 8), "reward": ("/reward", 1)}[column]
    folder, path = change_episode(rlds, tmp_path, {feature: replace_number(4 * width + width - 1, value)})
    dataset = open_dataset(folder, tmp_path / "cache")
    message = f"{path.name}: {column} of made is {value} at step 4 of episode 1, dimension {width - 1} .1 such.* Repair"
    errors, lines = run_check(folder, capsys)
    if column == "reward":  # which nothing uses
        assert dataset.stats and errors == 0
    else:
        with pytest.raises(ValueError, match=message):
            dataset.stats  # noqa: B018
        assert errors == 1 and re.search(message, lines[0])


# ----------------------------------------------------------------------------------------------------------------------
# Odd episodes, which train


def first_steps(count):
    """Return changes that leave the first steps of an episode of actions of 7 and states of 8 and 7 numbers."""
    widths = {"/action": 7, "observation/state": 8, "joint_state": 7}
    single = ("image", "language_instruction", "is_first", "is_last", "is_terminal", "reward", "discount")
    return {name: lambda v, n=n * count: v[:n] for name, n in (widths | dict.fromkeys(single, 1)).items()}


def test_episode_of_no_step_is_left_out(rlds, dataset, tmp_path, capsys):
    """What remains is as if it were not there, to the sample; the check warns and finds no error."""
    folder, path = change_episode(rlds, tmp_path, first_steps(0))
    shorter = open_dataset(folder, tmp_path / "cache")
    lengths = np.delete(np.diff(dataset.starts), 1)
    assert np.array_equal(np.diff(shorter.starts), lengths)
    assert shorter.num_episodes == len(shorter.metadata["seed"]) == 7
    instructions = [dataset.instruction(start) for start in dataset.starts[:-1]]
    assert [shorter.instruction(start) for start in shorter.starts[:-1]] == instructions[:1] + instructions[2:]
    shorter.stats = dataset.stats  # or what the missing steps change in them would show
    before, after = int(dataset.starts[1]) - 1, int(dataset.starts[2])  # the steps around the missing episode
    for shift, step in ((0, before), (after - int(dataset.starts[1]), after)):
        sample = make_chunks(shorter).sample(0, step - shift)
        assert equal_batches(sample, make_chunks(dataset).sample(0, step))
    errors, lines = run_check(folder, capsys)
    message = rf"warning: .*{path.name}: record at byte \d+: the episode has 0 steps and is left out \(episode 1"
    assert errors == 0 and re.search(message, lines[0])


def never_change(actions):
    """Return the first action, of 7 numbers, at all steps."""
    return np.tile(actions[:7], len(actions) // 7)


def blank(texts):
    """Return a blank text at all steps."""
    return [b" "] * len(texts)


ODD_EPISODES = {
    "one step": (first_steps(1), 1, [r"{path}: record at byte \d+: the episode has 1 steps \(episode 1\)"]),
    "no motion": (
        {"/action": never_change, "/language_instruction": blank},
        8,
        [
            "made/1.0.0: the instruction is empty in 1 episodes, the first is 1",
            r"{path}: the action never changes in the \d+ steps of episode 1",
        ],
    ),
}


@pytest.mark.parametrize("oddity", ODD_EPISODES)
def test_odd_episodes_train_and_are_mentioned(oddity, rlds, tmp_path, capsys):
    """One step; no instruction; actions that never change, in an episode or in a dimension of the whole data set."""
    changes, num_valid, warnings = ODD_EPISODES[oddity]
    folder, path = change_episode(rlds, tmp_path, changes)
    dataset = open_dataset(folder, tmp_path / "cache")
    sample = make_chunks(dataset).sample(0, int(dataset.starts[1]))
    assert sample["valid"].tolist() == [True] * num_valid + [False] * (8 - num_valid)
    assert (sample["actions"][:, 3] == 0).all()
    errors, lines = run_check(folder, capsys)
    assert errors == 0 and len(lines) == len(warnings) + 2
    for warning in [*warnings, "made/1.0.0: dimension 3 of the action is 0 at all steps"]:
        assert sum(bool(re.match(f"warning: .*{warning}".format(path=path.name), line)) for line in lines) == 1
