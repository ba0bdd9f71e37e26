"""data.py against tensorflow-datasets, numpy and examples worked by hand."""

import io
import json
import os
import pickle
import re
import shutil
from collections import Counter
from dataclasses import replace

import fuzz
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torch.utils.data import DataLoader

import common
import data
import model

LEVER = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # augmentation draws of one camera


@pytest.fixture(scope="module")
def stats(index):
    return data.statistics(index)


@pytest.fixture
def chunks(index, stats):
    """Function (**changes) -> Chunks over `index` with its primary camera and 8 steps."""
    return lambda **changes: data.Chunks(**dict(indices=[index], stats=[stats], cameras=["image"], chunk=8) | changes)


def copied(rlds, folder):
    """A copy of a data set, the same in every byte but newer."""
    return shutil.copytree(rlds, folder / rlds.name, copy_function=shutil.copyfile)


# ----------------------------------------------------------------------------------------------------------------------
# Index


def test_index_equals_what_tensorflow_datasets_reads(as_tfds_reads, index):
    """Every image byte, action, state, instruction and metadata value of every step."""
    at = 0
    for number, (about, steps) in enumerate(as_tfds_reads):
        assert (index.starts[number], index.starts[number + 1]) == (at, at + len(steps))
        for step in steps:
            for camera in ("image", "wrist_image"):
                assert index.jpeg(camera, at) == step["observation"][camera]
            for name in ("state", "joint_state"):
                assert np.array_equal(index.columns[name][at], step["observation"][name])
            for name in ("action", "reward", "is_first", "is_last"):
                assert np.array_equal(index.columns[name][at], step[name]), name
            assert index.instructions[number] == step["language_instruction"].decode()
            at += 1
        found = {name: values[number] for name, values in index.metadata.items()}
        expected = {name: value.decode() if isinstance(value, bytes) else value for name, value in about.items()}
        assert found == expected | {"state": about["state"].tolist()}
    assert len(index) == at and len(index.instructions) == 8


def test_image_is_the_decoded_jpeg_and_options_reproduce_it(index):
    """Frames decode to what was drawn; storing one again with the found options gives the stored bytes back."""
    frame, column = index.image("image", 3), 40 if index.instructions[0].endswith("plate") else 20
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8
    assert (
        np.abs(frame[10:22, column + 4 : column + 16].astype(int) - (220, 200, 40)).max() < 50
    )  # the square, at row 2 t = 6
    for camera, quality in (("image", 85), ("wrist_image", 70)):
        options, buffer, written = index.jpeg_options(camera), io.BytesIO(), picture(90, (30, 30), quality)
        assert options.pop("size") == 96
        pixels = np.full((96, 96, 3), 90, np.uint8)
        pixels[30:50, 30:50] = (220, 200, 40)
        Image.fromarray(pixels).save(buffer, "JPEG", **options)
        assert buffer.getvalue() == written


def test_second_opening_reads_the_cache(rlds, tmp_path):
    """A shard whose size and time are as before is not read again, so damage to it goes unnoticed."""
    folder = copied(rlds, tmp_path)
    first = data.open_index(folder, tmp_path / "cache")
    path = first.shards[0]
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = data.open_index(folder, tmp_path / "cache")
    assert np.array_equal(second.columns["action"], first.columns["action"]) and second.fingerprint == first.fingerprint
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.cache.name]


def test_changed_shard_is_indexed_anew(rlds, index, tmp_path):
    """Equal bytes elsewhere have an equal fingerprint; other bytes under the same name another one and a new index."""
    folder = copied(rlds, tmp_path)
    first = data.open_index(folder, tmp_path / "cache")
    assert first.fingerprint == index.fingerprint
    shards = [p.read_bytes() for p in first.shards]
    for path, content in zip(first.shards, reversed(shards)):
        path.write_bytes(content)
    second = data.open_index(folder, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint and second.cache != first.cache
    episodes = np.split(index.columns["action"], index.starts[1:-1])
    moved = np.split(second.columns["action"], second.starts[1:-1])
    assert np.array_equal(moved[0], episodes[-len(episodes) // 2]) and len(moved) == len(episodes)


def test_truncated_shard_names_file_and_offset(rlds, tmp_path):
    """A shard cut inside its last record, inside a header, or at a record's start."""
    folder = copied(rlds, tmp_path)
    path = data.open_index(folder, tmp_path / "cache").shards[1]
    content = path.read_bytes()
    last = [offset - 12 for offset, _, _ in data.read_records(path)][-1]
    for length, at in ((len(content) - 100, last), (len(content) - 1, last), (last + 5, last)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path.name}: .*byte {at} is cut short"):
            data.open_index(folder, tmp_path / "cache")


def test_flipped_bit_names_file_and_offset(rlds, tmp_path):
    """One bit anywhere in a record: in its length, in its payload, in its checksum."""
    folder = copied(rlds, tmp_path)
    path = data.open_index(folder, tmp_path / "cache").shards[0]
    content = path.read_bytes()
    second = [offset - 12 for offset, _, _ in data.read_records(path)][1]
    for place, at in ((second, second), (second + 9, second), (second + 5000, second), (100, 0), (second - 1, 0)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name}: wrong checksum .*byte {at}"):
            data.open_index(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing of the damaged ones was kept


def test_record_that_does_not_fit_its_features_is_named(rlds, tmp_path):
    """An episode whose actions do not have the size that features.json gives: file, offset and feature."""
    folder = copied(rlds, tmp_path)
    path = folder / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace('"7"', '"6"'))
    with pytest.raises(
        ValueError, match="made-train.tfrecord-00000-of-00002: record at byte 0: feature steps/.* has .* values"
    ):
        data.open_index(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ("features.json", "dataset_info.json"))
def test_damaged_metadata_is_named(name, rlds, tmp_path):
    """Cut, or JSON of something else: the file or its folder, and what to do."""
    folder = copied(rlds, tmp_path)
    (path,) = folder.glob(f"*/{name}")
    content = path.read_text()
    damaged = f"{path.parent}: damaged features.json or dataset_info.json: .* Copy it again"
    for wrong, message in ((content[:-5], f"{path} is no JSON"), ("[]", f"{path} holds .*no"), ("{}", damaged)):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            data.open_index(folder, tmp_path)


def test_missing_and_empty_folders_are_explained(rlds, tmp_path):
    """No folder, an empty one, one without a shard that its metadata names."""
    with pytest.raises(FileNotFoundError, match="no such data directory: .*nowhere"):
        data.open_index(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds 0 RLDS data sets"):
        data.open_index(tmp_path / "empty", tmp_path)
    folder = copied(rlds, tmp_path)
    next(folder.glob("*/*.tfrecord-00001*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards are missing.*00001-of-00002"):
        data.open_index(folder, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Data that lies


def changed(rlds, folder, changes):
    """A copy of a data set, the second episode of its first shard (episode 1) changed; returns folder and shard.

    changes: {end of a feature's name: function of its value, a list of bytes or an array; None removes it}.
    """
    folder = copied(rlds, folder)
    path = next(folder.glob("*/*.tfrecord-00000-*"))
    payloads = [payload for _, payload, _ in data.read_records(path)]
    found = data.parse_example(payloads[1])
    features = {n: [payloads[1][a : a + k] for a, k in v] if isinstance(v, list) else v for n, v in found.items()}
    for name, value in features.items():
        for end, change in changes.items():
            features[name] = change(value) if name.endswith(end) else features[name]
    payloads[1] = fuzz.example({name: value for name, value in features.items() if value is not None})
    path.write_bytes(b"".join(map(fuzz.record, payloads)))
    return folder, path


def put(step, value):
    """Function: the same list or array with another value at a step."""
    return lambda values: [*values[:step], value, *values[step + 1 :]]


def set_number(place, value):
    """Function: the same array with another number at a place."""
    return lambda values: np.where(np.arange(len(values)) == place, np.float32(value), values)


def checked(folder, capsys):
    """(number of faults, the lines) of `data.py --check`; the folder is as it was and no index is written."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    faults = data.check(folder, folder.parent / "unwritten")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not (folder.parent / "unwritten").exists()
    return faults, capsys.readouterr().out.splitlines()


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
        {"/language_instruction": put(2, b"put \xff")},
        r"language_instruction at step 2 is no UTF-8 text: b'put",
    ),
}


@pytest.mark.parametrize("fault", WRONG_RECORDS)
def test_wrong_record_is_named_at_opening(fault, rlds, tmp_path, capsys):
    """File, byte, feature and episode; nothing of it is kept; the check says the same and goes on."""
    changes, message = WRONG_RECORDS[fault]
    folder, path = changed(rlds, tmp_path, changes)
    expected = rf"{path.name}: record at byte [1-9]\d*: .*{message}.* \(episode 1\). Repair or remove this episode"
    with pytest.raises(ValueError, match=expected):
        data.open_index(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    faults, lines = checked(folder, capsys)
    assert faults == 1 and re.search(expected, lines[0]) and "found in 7 episodes" in lines[-1]


def test_shard_cut_between_records_is_noticed(rlds, tmp_path, capsys):
    """Whole records that are too few: the metadata knows their number."""
    folder, path = changed(rlds, tmp_path, {})
    last = [offset - 12 for offset, _, _ in data.read_records(path)][-1]
    path.write_bytes(path.read_bytes()[:last])
    with pytest.raises(ValueError, match=f"{path.name}: 3 whole records, 4 in dataset_info.json. Copy it again"):
        data.open_index(folder, tmp_path / "cache")
    assert checked(folder, capsys)[0] == 1


def png():
    """A picture of the right size in another format."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(90, (0, 0), 80))).save(buffer, "PNG")
    return buffer.getvalue()


def small():
    """A JPEG of another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 96)).save(buffer, "JPEG")
    return buffer.getvalue()


WRONG_IMAGES = {
    "no image": b"no image",
    "empty": b"",
    "truncated": picture(90, (0, 0), 80)[:-300],
    "PNG": png(),
    "another size": small(),
}


@pytest.mark.parametrize("fault", WRONG_IMAGES)
def test_undecodable_jpeg_is_named(fault, rlds, chunks, tmp_path, capsys):
    """When it is used, in this process or another: shard, camera, step and episode. The check finds it."""
    folder, path = changed(rlds, tmp_path, {"/image": put(5, WRONG_IMAGES[fault])})
    index = data.open_index(folder, tmp_path / "cache")
    samples, step = chunks(indices=[index]), int(index.starts[1]) + 5
    message = f"{path.name}: camera image at step 5 of episode 1 cannot be used: .* Copy it again"
    position = places(samples, len(index)).index((0, step))
    for workers in (0, 1) if fault == "PNG" else (0,):  # torch takes 5 s to leave a worker that failed
        with pytest.raises(ValueError, match=message):
            list(DataLoader(samples, sampler=[position], num_workers=workers))
    assert len(samples.sample(0, step + 1)["images"]) == 1
    faults, lines = checked(folder, capsys)
    assert faults == 1 and re.search(message, lines[0])


@pytest.mark.parametrize("fault, message", (("cut", "the file ends before byte"), ("gone", "No such file")))
def test_shard_that_becomes_unreadable_is_named(fault, message, rlds, tmp_path):
    """Cut or removed after it was indexed: the shard, camera, step and episode."""
    index = data.open_index(copied(rlds, tmp_path), tmp_path / "cache")
    path, last = index.shards[1], len(index) - 1
    if fault == "cut":
        path.write_bytes(path.read_bytes()[: int(index.images["image"][last, 1]) + 10])
    else:
        path.unlink()
    expected = rf"{path.name}: camera image at step \d+ of episode 7 cannot be used: .*{message}.* Copy it again"
    with pytest.raises(ValueError, match=expected):
        index.image("image", last)
    assert index.image("image", 0).shape == (96, 96, 3)


@pytest.mark.parametrize(
    "column, value", (("action", np.nan), ("state", np.inf), ("state", -np.inf), ("reward", np.nan))
)
def test_number_that_is_not_finite_is_named(column, value, rlds, tmp_path, capsys):
    """Before training, if of an action or of the proprio: shard, step, episode, dimension. The check finds all."""
    feature, width = {"action": ("/action", 7), "state": ("observation/state", 8), "reward": ("/reward", 1)}[column]
    folder, path = changed(rlds, tmp_path, {feature: set_number(4 * width + width - 1, value)})
    index = data.open_index(folder, tmp_path / "cache")
    message = f"{path.name}: {column} of made is {value} at step 4 of episode 1, dimension {width - 1} .1 such.* Repair"
    if column == "reward":
        assert data.statistics(index)
    else:
        with pytest.raises(ValueError, match=message):
            data.statistics(index)
    faults, lines = checked(folder, capsys)
    assert faults == 1 and re.search(message, lines[0])


def shortened(steps):
    """Changes that leave the first steps of an episode of actions of 7 and states of 8 and 7 numbers."""
    widths = {"/action": 7, "observation/state": 8, "joint_state": 7}
    single = ("image", "language_instruction", "is_first", "is_last", "is_terminal", "reward", "discount")
    return {name: lambda v, n=n * steps: v[:n] for name, n in (widths | dict.fromkeys(single, 1)).items()}


def test_episode_of_no_step_is_left_out(rlds, index, chunks, tmp_path, capsys):
    """What remains is as if it were not there, to the sample; the check mentions it and is content."""
    folder, path = changed(rlds, tmp_path, shortened(0))
    found = data.open_index(folder, tmp_path / "cache")
    rest = np.delete(np.diff(index.starts), 1)
    assert np.array_equal(np.diff(found.starts), rest) and len(found.instructions) == len(found.metadata["seed"]) == 7
    assert found.instructions == index.instructions[:1] + index.instructions[2:]
    for shift, step in ((0, int(index.starts[1]) - 1), (int(index.starts[2] - index.starts[1]), int(index.starts[2]))):
        ours, theirs = chunks(indices=[found]).sample(0, step - shift), chunks().sample(0, step)
        assert same({**ours, "text": [ours["text"]]}, {**theirs, "text": [theirs["text"]]})
    faults, lines = checked(folder, capsys)
    message = (
        rf"odd, but it trains: .*{path.name}: record at byte \d+: the episode has 0 steps and is left out \(episode 1"
    )
    assert faults == 0 and re.search(message, lines[0])


def test_odd_episodes_train_and_are_mentioned(rlds, chunks, tmp_path, capsys):
    """One step; no instruction; actions that never change, in an episode or in a dimension of the whole data set."""
    still = {"/action": lambda v: np.tile(v[:7], len(v) // 7), "/language_instruction": lambda v: [b" "] * len(v)}
    for name, changes, oddities in (("one", shortened(1), ["has 1 steps"]),
                                    ("still", still, ["instruction is empty", "action never changes"])):  # fmt: skip
        folder, path = changed(rlds, tmp_path / name, changes)
        index = data.open_index(folder, tmp_path / "cache")
        first = int(index.starts[1])
        sample = chunks(indices=[index], stats=[data.statistics(index)]).sample(0, first)
        assert sample["valid"].tolist() == [True] + [name != "one"] * 7 and (sample["actions"][:, 3] == 0).all()
        faults, lines = checked(folder, capsys)
        assert faults == 0 and len(lines) == len(oddities) + 2
        for line, oddity in zip(lines, oddities):
            assert re.search(
                rf"odd, but it trains: .*{path.name}: record at byte \d+: .*{oddity}.* \(episode 1\)", line
            )
        assert re.search(r"odd, but it trains: .*: dimension 3 of action is 0.0 at all steps", lines[-2])


def test_two_data_sets_of_one_name_are_refused(rlds, cache, tmp_path):
    """With both folders, for statistics are kept by name."""
    folder = copied(rlds, tmp_path)
    with pytest.raises(ValueError, match=rf"one name, \['made', 'made'\], in {rlds}, {folder}; rename one"):
        data.open_indices([rlds, folder], cache)


def test_check_finds_nothing_in_good_data(rlds_latents, video, script_here, tmp_path):
    """Exit status 0 and how much was looked at; nothing is written."""
    for folder, oddities in ((rlds_latents, 1), (video, 1)):  # an action that never moves, an episode of one step
        done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
        lines = done.text.splitlines()
        assert (
            done.code == 0
            and len(lines) == oddities + 1
            and re.search(r": 1 found in \d+ episodes, \d+ steps", lines[-1])
        )
    assert not (tmp_path / "cache").exists()


def test_check_lists_everything_in_one_go(rlds, labels, script_here, tmp_path):
    """Faults of records, images, numbers, texts and labels in both shards, each on its own line; exit status 1."""
    changes = {
        "/image": put(3, b"no image"),
        "/action": set_number(0, np.nan),
        "/language_instruction": lambda v: [b""] * len(v),
    }
    folder, path = changed(rlds, tmp_path, changes)
    shutil.copy(labels, folder / "labels.safetensors")
    done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
    found = [f"{path.name}: camera image at step 3 of episode 1",
             f"{path.name}: action of made is nan at step 0 of episode 1",
             "labels.safetensors labels the data set with", "instruction is empty"]  # fmt: skip
    assert done.code == 1 and all(text in line for text, line in zip(found, done.text.splitlines()))
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # of the first record: what comes after it is read all the same, as episodes 0 to 2
    path.write_bytes(content)
    other = path.with_name(path.name.replace("00000-of", "00001-of"))
    other.write_bytes(other.read_bytes()[:-1])
    done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
    found = [f"{path.name}: wrong checksum of the record", f"{path.name}: 3 whole records, 4 in",
             f"{other.name}: the record at", f"{other.name}: 3 whole records, 4 in",
             *(text.replace("episode 1", "episode 0") for text in found[:2])]  # fmt: skip
    assert done.code == 1 and all(text in line for text, line in zip(found, done.text.splitlines()))
    assert "found in 6 episodes" in done.text and not (tmp_path / "cache").exists()
    other.unlink()
    done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
    assert done.code == 1 and "1 of 2 shards are missing" in done.text and "found in 3 episodes" in done.text


def test_damaged_labels_are_refused(index, labels, tmp_path):
    """No such file's format, no metadata, too few rows: file and remedy."""
    tensors, info = common.load_tensors(labels)
    path = tmp_path / "labels.safetensors"
    for content, about in (({"codes": tensors["codes"]}, info), (tensors, {}),
                           ({n: t[:-1].clone() for n, t in tensors.items()}, info)):  # fmt: skip
        common.save_tensors(path, content, **about)
        with pytest.raises(ValueError, match=f"{path}.* Make (it|them) again: .*latent.py label"):
            data.load_labels(index, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path} holds no labels: .* Make them again"):
        data.load_labels(index, path)


# ----------------------------------------------------------------------------------------------------------------------
# Run directories that lie


def test_pickle_in_a_run_is_not_executed(tmp_path):
    """Weights that are a pickle: refused, and what it would have run has not run."""
    fuzz.write_run(tmp_path)
    model.Policy(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for write in (pickle.dump, torch.save):
        with open(tmp_path / "model.safetensors", "wb") as file:
            write(Evil(), file)
        with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors is damaged"):
            model.Policy(tmp_path)
    assert not (tmp_path / "executed").exists()


ABSURD = (("chunk", 10**6), ("action_size", 10**6), ("proprio_size", 10**6), ("codes_per_step", 10**6),
          ("num_codes", 10**6), ("code_dim", 10**6), ("head_width", 10**4), ("text_length", 10**4), ("cameras", 10**4),
          ("image_size", 32 * 10**4))  # fmt: skip


@pytest.mark.parametrize("name, size", ABSURD)
def test_absurd_size_is_refused(name, size, tmp_path):
    """Before anything of that size is built."""
    fuzz.write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"][name] = size
    common.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=f"config.json asks for more than the .*{name}={size}|the prompt would take"):
        model.load_vla(tmp_path)


WRONG_CONFIGS = {
    "not JSON": (lambda c: "{", "config.json is no JSON: "),
    "not an object": (lambda c: [c], "config.json holds .*, not an object"),
    "too deep": (lambda c: json.loads("[" * 900 + "]" * 900), "config.json .*not an object"),
    "no model": (lambda c: {n: v for n, v in c.items() if n != "model"}, "cannot be loaded: KeyError..model"),
    "unknown": (lambda c: {**c, "model": {**c["model"], "depth": 3}}, "cannot be loaded: TypeError.*depth"),
    "type": (lambda c: {**c, "model": {**c["model"], "chunk": "2"}}, "chunk is '2' in config.json"),
    "negative": (lambda c: {**c, "model": {**c["model"], "chunk": -2}}, "chunk is -2 in config.json"),
    "no backbone": (lambda c: {**c, "model": {**c["model"], "backbone": "no such"}}, "cannot be loaded: .*no such"),
    "no hash": (lambda c: {n: v for n, v in c.items() if n != "base_hash"}, "cannot be loaded: KeyError..base_hash"),
    "no data": (lambda c: {**c, "data": []}, "config.json says nothing of 'made'"),
}


@pytest.mark.parametrize("fault", WRONG_CONFIGS)
def test_wrong_config_is_refused(fault, tmp_path):
    """The folder, what is wrong, and what to do."""
    fuzz.write_run(tmp_path)
    change, message = WRONG_CONFIGS[fault]
    config = change(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        model.Policy(tmp_path)
    assert re.search("[Pp]ut .* back", str(error.value))


def test_statistics_from_elsewhere_are_refused(tmp_path):
    """The file, the data set, and what to do."""
    fuzz.write_run(tmp_path)
    every = json.loads((tmp_path / "dataset_statistics.json").read_text())
    every["made"]["action"]["q99"][0] += 0.1
    common.write_json(tmp_path / "dataset_statistics.json", every)
    with pytest.raises(ValueError, match="dataset_statistics.json holds other statistics of 'made' .* own file back"):
        model.Policy(tmp_path)


def test_few_hundred_inputs_of_the_fuzzer(monkeypatch):
    """Damaged shards and run directories: nothing but the errors that are documented, in bounds of time and memory."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fuzz.fuzz_shards(range(300), 1) == [] and fuzz.fuzz_runs(range(30), 1) == []


# ----------------------------------------------------------------------------------------------------------------------
# Standardisation, statistics, normalisation


def test_statistics_equal_numpy_over_all_steps(index, stats):
    """Mean, standard deviation, bounds and quantiles of the standardised actions and of the state."""
    action = np.array(index.columns["action"], np.float64)
    action[:, 6] = np.where(action[:, 6] > 0, 0.0, 1.0)  # closed 0, open 1
    for rows, x in ((stats["action"], action), (stats["proprio"], np.float64(index.columns["state"]))):
        ordered, n = np.sort(x, 0), len(x)
        assert np.allclose(rows["mean"], x.sum(0) / n) and np.allclose(
            rows["std"], np.sqrt(((x - x.sum(0) / n) ** 2).sum(0) / n)
        )
        assert np.allclose(rows["min"], ordered[0]) and np.allclose(rows["max"], ordered[-1])
        for name, share in (("q01", 0.01), ("q99", 0.99)):  # linear between the order statistics
            place = share * (n - 1)
            low, part = int(place), place - int(place)
            assert np.allclose(rows[name], ordered[low] * (1 - part) + ordered[low + 1] * part)
    assert stats["action"]["mask"] == [True] * 6 + [False] and "mask" not in stats["proprio"]
    assert stats["num_transitions"] == len(index) and stats["num_trajectories"] == 8


def test_normalise_by_hand():
    """Bounds go to -1 and 1 and clip; a constant dimension becomes 0; an unmasked one passes."""
    rows = {
        "q01": [-2.0, 3.0, 0.0],
        "q99": [2.0, 3.0, 1.0],
        "min": [-9.0, 3.0, 0.0],
        "max": [9.0, 3.0, 1.0],
        "mask": [True, True, False],
    }
    x = np.array([[-2.0, 3.0, 0.0], [1.0, 3.0, 1.0], [7.0, 3.0, 0.25]])
    expected = [[-1.0, 0.0, 0.0], [0.5, 0.0, 1.0], [1.0, 0.0, 0.25]]
    assert np.allclose(data.normalise(x, rows), expected, atol=1e-6)
    assert np.allclose(
        data.unnormalise(np.array(expected), rows), [[-2.0, 3.0, 0.0], [1.0, 3.0, 1.0], [2.0, 3.0, 0.25]], atol=1e-6
    )


def test_normalise_round_trip_on_the_data(index, stats):
    """Inside the bounds un-normalising gives the physical values back, constant dimension and gripper included."""
    action = data.standardise(index.columns["action"])
    rows = stats["action"]
    inside = np.clip(action, rows["q01"], rows["q99"])
    again = data.unnormalise(data.normalise(action, rows), rows)
    assert np.allclose(again, inside, atol=1e-6) and np.array_equal(again[:, 6], action[:, 6])
    assert (data.normalise(action, rows)[:, 3] == 0).all()


def test_gripper_keeps_its_sign_through_the_whole_chain(index, stats, chunks):
    """Stored +1 (close) is +1 for the simulator after standardise, normalise, sample, un-normalise and to_robosuite."""
    stored = index.columns["action"][:, 6]
    assert set(stored) == {-1.0, 1.0}
    for step in (0, int(index.starts[1]) - 1, len(index) - 1):
        actions = chunks(chunk=1).sample(0, step)["actions"].numpy()
        assert actions[0, 6] == (1.0 if stored[step] < 0 else 0.0)  # 1 = open
        assert data.to_robosuite(data.unnormalise(actions, stats["action"]))[0, 6] == stored[step]
    assert np.array_equal(data.to_robosuite(data.standardise(index.columns["action"]))[:, 6], stored)


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_chunk_stops_at_the_end_of_the_episode(index, stats, chunks):
    """Three steps before an end: three valid steps, then no motion and a held gripper, nothing of the next episode."""
    whole = data.normalise(data.standardise(index.columns["action"]), stats["action"])
    end = int(index.starts[2])
    item = chunks().sample(0, end - 3)
    assert item["valid"].tolist() == [True] * 3 + [False] * 5
    assert np.array_equal(item["actions"][:3], whole[end - 3 : end])
    assert (item["actions"][3:, :6] == 0).all() and (item["actions"][3:, 6] == float(whole[end - 1, 6])).all()
    assert item["text"] == index.instructions[1] and chunks().sample(0, end)["text"] == index.instructions[2]
    middle = chunks().sample(0, end)
    assert middle["valid"].all() and np.array_equal(middle["actions"], whole[end : end + 8])


def test_sample_holds_the_observation_of_its_step(index, stats, chunks):
    """Cameras in the order asked for, proprio normalised."""
    item = chunks(cameras=["wrist_image", "image"]).sample(0, 20)
    assert np.array_equal(item["images"][0], index.image("wrist_image", 20)) and np.array_equal(
        item["images"][1], index.image("image", 20)
    )
    assert np.array_equal(item["proprio"], data.normalise(index.columns["state"][20], stats["proprio"]))


def places(chunks, count):
    """(data set, step) of the first samples."""
    return [tuple(chunks._order(p // chunks.epoch_length)[p % chunks.epoch_length]) for p in range(count)]


def test_epoch_sees_each_sample_once_in_a_new_order(index, chunks):
    """Two epochs: every step once in each, in different orders; another seed orders differently; same seed alike."""
    made, n = chunks(seed=3), len(index)
    found = places(made, 2 * n)
    assert made.epoch_length == n and sorted(found[:n]) == sorted(found[n:]) == [(0, step) for step in range(n)]
    assert found[:n] != found[n:] and found == places(chunks(seed=3), 2 * n) and found != places(chunks(seed=4), 2 * n)
    assert [made[p]["actions"].tolist() for p in (0, n)] == [made.sample(*found[p])["actions"].tolist() for p in (0, n)]


def test_shuffle_is_global(index, chunks):
    """A batch of 32 spans most episodes of both shards, whatever the order on disk."""
    for batch in range(3):
        steps = [step for _, step in places(chunks(), 96)[32 * batch : 32 * batch + 32]]
        assert len(set(np.searchsorted(index.starts, steps, "right"))) >= 6


def test_weights_scale_how_often_a_data_set_occurs(index, stats, chunks):
    """Per epoch: weight 2 gives each step twice, weight 0.5 half of the steps once."""
    n = len(index)
    made = chunks(indices=[index, index], stats=[stats] * 2, weights=[2.0, 0.5])
    count = Counter(places(made, made.epoch_length))
    assert made.epoch_length == 2 * n + round(n / 2)
    assert all(count[0, step] == 2 for step in range(n))
    assert sorted(count[1, step] for step in range(n)) == [0] * (n - round(n / 2)) + [1] * round(n / 2)


def test_held_out_episodes_stay_out(index, chunks):
    """Splits are disjoint, complete and seeded; a training epoch never reads a held-out step."""
    kept, held = data.split_episodes(index, 0.25, seed=0)
    assert len(held) == 2 and sorted([*kept, *held]) == list(range(8))
    assert any(data.split_episodes(index, 0.25, seed)[1].tolist() != held.tolist() for seed in (1, 2, 3))
    assert len(data.split_episodes(index, 0.01, 0)[1]) == 1 and len(data.split_episodes(index, 0.0, 0)[1]) == 0
    made = chunks(episodes=[kept])
    assert sorted(step for _, step in places(made, made.epoch_length)) == sorted(
        set(range(len(index))) - set(data.steps_of(index, held))
    )


def test_sizes_and_cameras_must_agree(index, stats, chunks):
    """A camera that does not exist and data sets of different action sizes are named."""
    with pytest.raises(ValueError, match=r"made has no camera \['front'\]; it has \['image', 'wrist_image'\]"):
        chunks(cameras=["front"])
    other = replace(index, name="other", columns=dict(index.columns, action=index.columns["action"][:, :5]))
    with pytest.raises(ValueError, match=r"action has shape \(5,\) in other but \(7,\) in made"):
        chunks(indices=[index, other], stats=[stats, stats])


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_ranks_cover_the_global_batch_exactly_once():
    """Rank r of n reads the rows r::n of each step, in micro-batches, for any n and any micro-batch."""
    whole = list(data.StepBatches(0, 3, 12, 12))
    assert whole == [list(range(12)), list(range(12, 24)), list(range(24, 36))]
    for world, micro in ((1, 4), (2, 6), (3, 2), (4, 3)):
        parts = [list(data.StepBatches(0, 3, 12, micro, rank, world)) for rank in range(world)]
        per_step = 12 // world // micro
        for step in range(3):
            rows = [sum(part[step * per_step : (step + 1) * per_step], []) for part in parts]
            assert rows == [list(range(12 * step + rank, 12 * step + 12, world)) for rank in range(world)]
        assert all(len(data.StepBatches(0, 3, 12, micro, rank, world)) == len(part) for rank, part in enumerate(parts))


def test_later_start_equals_the_tail():
    """A sampler from step k on gives what the whole one gives from there: nothing to skip, nothing to remember."""
    assert list(data.StepBatches(5, 9, 8, 2, 1, 2)) == list(data.StepBatches(0, 9, 8, 2, 1, 2))[5 * 2 :]


def same(a, b):
    """Whether two batches are equal in every bit."""
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if torch.is_tensor(x) else (all(map(torch.equal, x, y)) if k == "images" else x == y)
        for (k, x), y in zip(a.items(), b.values())
    )


def test_any_number_of_workers_gives_the_same_batches(chunks):
    """0 and 2 workers: images, actions, texts and augmentation draws; and a later start gives the same later batch."""
    made = chunks(cameras=["image", "wrist_image"], seed=5)

    def read(workers, first=0):
        """All batches from step `first` on."""
        return list(DataLoader(made, batch_sampler=data.StepBatches(first, 4, 6, 3), num_workers=workers))

    alone, shared = read(0), read(2)
    assert len(alone) == len(shared) == 8 and all(map(same, alone, shared))
    assert all(map(same, alone[4:], read(0, first=2))) and not same(alone[0], alone[1])


def test_draws_are_keyed_by_seed_sample_and_camera(chunks):
    """Uniform numbers that no two (seed, sample, camera) share."""
    made = [chunks(cameras=["image", "wrist_image"], seed=seed)[p]["draws"] for seed in (0, 1) for p in (0, 1, 200)]
    drawn = torch.stack(made)  # [6, 2, 6]
    assert (
        drawn.shape == (6, 2, 6)
        and len(drawn.flatten().unique()) == drawn.numel()
        and drawn.min() >= 0
        and drawn.max() < 1
    )


# ----------------------------------------------------------------------------------------------------------------------
# Latent labels


def test_labels_follow_their_steps(index, labels, chunks):
    """A chunk's labels are those of its steps; past the end the last one is repeated (and masked)."""
    found = data.load_labels(index, labels)
    assert (found.delta, found.num_codes, found.dim, found.quantised, found.fingerprint) == (32, 16, 16, False, "made")
    end = int(index.starts[1])
    item = chunks(labels=[found]).sample(0, end - 2)
    rows = [end - 2, end - 1] + [end - 1] * 6
    assert item["codes"].dtype == torch.int64 and np.array_equal(item["codes"], found.codes[rows])
    assert np.array_equal(item["vectors"], found.vectors[rows].astype(np.float32))


def test_labels_of_other_data_or_delta_are_refused(index, labels):
    """The error names both fingerprints and the remedy."""
    with pytest.raises(ValueError, match=f"fingerprint {index.fingerprint}, but .* has 0000.*latent.py label"):
        data.load_labels(replace(index, fingerprint="0000"), labels)
    with pytest.raises(ValueError, match="made with delta 32, but --delta is 11"):
        data.load_labels(index, labels, delta=11)


def test_gripper_that_is_not_liberos_is_refused(index):
    """A last action outside [-1, 1] is no gripper; inverting it silently would spoil every action."""
    actions = np.array(index.columns["action"])
    actions[3, -1] = 1.7
    wrong = replace(index, columns={**index.columns, "action": actions})
    with pytest.raises(ValueError, match="must be the gripper, -1 open, 1 close"):
        data.Chunks([wrong], [data.statistics(index)], ["image"], 8)


def test_data_set_is_named_after_its_folder(rlds, cache, tmp_path):
    """Statistics are kept by name, and the metadata's own name can be another than users know."""
    renamed = tmp_path / "libero_10_no_noops"
    shutil.copytree(rlds, renamed)
    assert data.open_index(renamed, cache).name == "libero_10_no_noops"


def test_labels_in_the_data_itself_are_used(rlds_latents, cache, tmp_path):
    """`latent_idx` (floats) and `latent_z` of the paper's release, marked as quantised; a label file comes first."""
    index = data.open_index(rlds_latents, cache)
    found = data.load_labels(index, data.label_path(index, rlds_latents), delta=11)
    assert found.quantised and (found.num_codes, found.dim, found.delta) == (16, 128, 11)
    made = data.Chunks([index], [data.statistics(index)], ["image"], 4, labels=[found])
    item = made.sample(0, 5)
    assert (
        np.array_equal(item["codes"], index.columns["latent_idx"][5:9].astype(int))
        and item["codes"].dtype == torch.int64
    )
    assert np.array_equal(item["vectors"].reshape(4, 512), index.columns["latent_z"][5:9])


def test_data_without_labels_has_none(index, rlds):
    """Nothing beside the data, nothing in the cache, no field in the records."""
    assert data.load_labels(index, data.label_path(index, rlds)) is None


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("mode, subsampling", (("RGB", 0), ("RGB", 2), ("L", 0)))
def test_decoded_pixels_are_pillows(mode, subsampling):
    """With simplejpeg or without: full and halved chroma, grey, sides that are no multiple of a block."""
    buffer, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (37, 51, len(mode)), dtype=np.uint8)
    options = {} if mode == "L" else {"subsampling": subsampling}
    Image.fromarray(noise.squeeze()).save(buffer, "JPEG", quality=90, **options)
    found = data.decode_jpeg(buffer.getvalue())
    assert found.shape == (37, 51, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(Image.open(buffer).convert("RGB")))


def test_augmentation_on_average():
    """Of grey images: brightness moves all pixels by -0.2 to 0.2, 0 on average, and nothing gives them colour; of
    a ramp: the crop's place is central on average, anywhere in the free room."""
    u = torch.rand(4000, 1, 6, generator=torch.Generator().manual_seed(0))
    grey = torch.full((1, 4, 4, 3), 128, dtype=torch.uint8).expand(4000, -1, -1, -1)
    level = data.prepare_images([grey], 4, u)[:, 0] / 2 + 0.5 - 128 / 255  # [4000, 3, 4, 4]
    assert (level - level.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-3
    assert level.abs().max() < 0.2 + 1e-4 and level.max() > 0.195 and level.min() < -0.195 and level.mean().abs() < 0.01
    u[..., 2:] = 0.5  # colours as they are
    pixels = (data.prepare_images([ramp().expand(4000, -1, -1, -1)], 20, u)[:, 0] + 1) / 2 * 255
    for channel in (0, 1):
        place = pixels[:, channel].mean((1, 2)) / 5 - 19.5  # of the crop's centre, in input pixels from the image's
        room = 20 * (1 - 0.9**0.5)
        assert place.abs().max() < room + 1e-3 and place.abs().max() > 0.97 * room and place.mean().abs() < 0.03


def ramp(size=40):
    """u8 [1, size, size, 3]: red grows by 5 a column, green by 5 a row, blue is constant."""
    row = torch.arange(size, dtype=torch.uint8) * 5
    return torch.stack(
        [row.expand(size, size), row[:, None].expand(size, size), torch.full((size, size), 77, dtype=torch.uint8)], -1
    )[None]


def test_centre_crop_by_hand():
    """sqrt(0.9) of each edge about the centre: output pixel j shows the ramp at side (j + 1/2 - 10) 2 + 20 - 1/2."""
    pixels = (data.prepare_images([ramp()], 20)[0, 0] + 1) / 2 * 255  # [3, 20, 20]
    where = 0.9**0.5 * (torch.arange(20) + 0.5 - 10) * 2 + 20 - 0.5  # in input pixels
    assert torch.allclose(pixels[0], (5 * where).expand(20, 20), atol=1e-3)
    assert torch.allclose(pixels[1], (5 * where)[:, None].expand(20, 20), atol=1e-3)
    assert torch.allclose(pixels[2], torch.tensor(77.0), atol=1e-3)


def test_middle_draws_are_the_evaluation_view():
    """With all draws 0.5 training sees the centre crop in its own colours."""
    images = [torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)] * 2
    assert torch.allclose(
        data.prepare_images(images, 32, torch.full((3, 2, 6), 0.5)), data.prepare_images(images, 32), atol=1e-4
    )


def test_augmentation_is_a_function_of_its_draws():
    """The same draws give the same pixels whatever else is in the batch; each draw matters; cameras have their own."""
    image = torch.randint(40, 200, (1, 32, 32, 3), dtype=torch.uint8)
    u = torch.from_numpy(LEVER).float().expand(1, 1, 6).clone()
    alone = data.prepare_images([image], 32, u)
    both = data.prepare_images([image.expand(4, -1, -1, -1)], 32, torch.cat([u, torch.rand(3, 1, 6)]))
    assert torch.allclose(both[:1], alone, atol=1e-6)
    for number in range(6):
        other = u.clone()
        other[..., number] += 0.3
        assert (data.prepare_images([image], 32, other) - alone).abs().max() > 0.01, number
    two = data.prepare_images([image, image], 32, torch.cat([u, 1 - u], 1))
    assert torch.equal(two[:, 0], alone[:, 0]) and not torch.allclose(two[:, 1], alone[:, 0], atol=0.01)


def test_random_crop_moves_within_the_image():
    """Draws 0 and 1 put the crop at the edges: rows and columns 0 to sqrt(0.9) and the rest, never outside."""
    for draw, low in ((0.0, 0.0), (1.0, 40 * (1 - 0.9**0.5))):
        u = torch.full((1, 1, 6), 0.5)
        u[..., :2] = draw
        pixels = (data.prepare_images([ramp()], 20, u)[0, 0] + 1) / 2 * 255
        where = low + 0.9**0.5 * (torch.arange(20) + 0.5) * 2 - 0.5
        assert torch.allclose(pixels[0, 10], 5 * where, atol=0.01) and torch.allclose(
            pixels[1, :, 10], 5 * where, atol=0.01
        )
    u = torch.tensor([[[1.0, 0.0, 0.5, 0.5, 0.5, 0.5]]])
    pixels = data.prepare_images([ramp()], 20, u)[0, 0]
    assert pixels[0].mean() > pixels[1].mean() + 0.01  # the first draw moves along columns, the second along rows


def by_hand(pixels, brightness, contrast, saturation, turns):
    """Brightness, contrast about each channel's mean, then chroma scaled and turned in YIQ, one after another."""
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    x = pixels + brightness
    x = (x - x.mean((0, 1))) * contrast + x.mean((0, 1))
    y, i, q = np.moveaxis(x @ yiq.T, -1, 0)
    chroma = (i + 1j * q) * saturation * np.exp(2j * np.pi * turns)
    return np.clip(np.stack([y, chroma.real, chroma.imag], -1) @ np.linalg.inv(yiq).T, 0, 1)


EXTREMES = [[0.5] * i + [end] + [0.5] * (3 - i) for i in range(4) for end in (0.0, 1.0)]  # each draw at its ends


@pytest.mark.parametrize("u", (*EXTREMES, [0.1, 0.8, 0.3, 0.9]))
def test_colours_equal_the_four_operations_one_after_another(u):
    """+-0.2 brightness, 0.8 to 1.2 contrast and saturation, +-0.05 of a turn of hue, on a picture with a cast."""
    pixels = np.random.default_rng(0).uniform(0, 0.6, (8, 8, 3)) * (1.0, 0.5, 0.3) + 0.2
    expected = by_hand(pixels, 0.4 * u[0] - 0.2, 0.8 + 0.4 * u[1], 0.8 + 0.4 * u[2], 0.1 * u[3] - 0.05)
    found = data.jitter(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), torch.tensor([u], dtype=torch.float32))
    assert np.allclose(found[0].permute(1, 2, 0), expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_command_prints_what_is_in_the_data(rlds, index, cache, script_here):
    """Counts, instructions, shapes and statistics as they are, and a picture with a column per episode."""
    done = script_here("data.py", rlds, "--cache", cache)
    assert done.code == 0, done.text
    lengths = np.diff(index.starts)
    assert f"made: 8 episodes, {len(index)} steps ({lengths.min()} to {lengths.max()} an episode)" in done.text
    assert f"fingerprint {index.fingerprint}" in done.text
    assert "4 episodes: put the bowl on the stove" in done.text and "4 episodes: put the bowl on the plate" in done.text
    assert "camera image: (96, 96, 3)" in done.text and "camera wrist_image: (96, 96, 3)" in done.text
    assert "column action: float32 (7,)" in done.text
    mean = [
        float(word)
        for word in next(line for line in done.text.splitlines() if line.split()[:2] == ["action", "mean"]).split()[2:]
    ]
    assert np.allclose(mean, data.standardise(index.columns["action"]).mean(0), atol=1e-4)
    with Image.open(done.text.split("contact sheet: ")[1].strip()) as sheet:
        assert sheet.size == (8 * 160, 4 * 160)
        last = np.asarray(Image.fromarray(index.image("image", int(index.starts[1]) - 1)).resize((160, 160)), int)
        assert np.abs(np.asarray(sheet, int)[160 + 20 : 320, 0:160] - last[20:]).max() == 0  # below its caption
