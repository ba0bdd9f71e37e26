"""data.py: opening data sets of any format and reading them through their description."""

import json
import pickle
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import odd_pixels
from data_helpers import as_format, change_index, copy_rlds, made_index

import data
import files
from batches import ActionChunks
from dataspec import PRESETS, DataSpec, format_spec
from index import Column, IndexWriter, cached_contents, read_index

# ----------------------------------------------------------------------------------------------------------------------
# Opening


def test_missing_folder_and_unknown_format_are_named(tmp_path):
    """With the formats that there are."""
    with pytest.raises(FileNotFoundError, match="no such data directory: .*nowhere.*RLDS"):
        data.open_index(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty holds no data set of a known format. Give --data a folder with .*\)\.$"
    ):
        data.open_index(tmp_path / "empty", tmp_path)
    (tmp_path / "empty" / "mine" / "meta").mkdir(parents=True)
    (tmp_path / "empty" / "mine" / "meta" / "info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one episode each\)\. Here that is .*/mine\.$"):
        data.open_index(tmp_path / "empty", tmp_path)


def test_another_format_is_one_entry(rlds, cache, tmp_path, monkeypatch):
    """The module that recognises a folder opens it; a folder that two recognise is refused."""
    (tmp_path / "other").mkdir()
    other = SimpleNamespace(
        FORMAT="OTHER (*.other)",
        is_dataset=lambda path: path.name == "other" or (path / "both").exists(),
        open_index=lambda path, cache, on_fault: (path, cache, on_fault),
    )
    monkeypatch.setattr(data, "FORMATS", (*data.FORMATS, other))
    assert data.open_index(rlds, cache).name == "made"
    assert data.open_index(tmp_path / "other", cache) == (tmp_path / "other", cache, None)
    folder = copy_rlds(rlds, tmp_path)
    (folder / "both").mkdir()
    with pytest.raises(ValueError, match="made holds RLDS .* and OTHER .*; separate them"):
        data.open_index(folder, cache)


def test_two_data_sets_of_one_name_are_refused(rlds, cache, tmp_path):
    """With both folders, for statistics are kept by name."""
    folder = copy_rlds(rlds, tmp_path)
    with pytest.raises(ValueError, match=rf"one name, \['made', 'made'\], in {rlds}, {folder}; rename one"):
        data.open_datasets([rlds, folder], cache)


def test_each_data_set_has_its_description(rlds, rlds_latents, cache, tmp_path):
    """As many as there are data sets, "" for those that need none; spec.json in the folder or its version folder."""
    own = replace(PRESETS["libero"], latents={}, embodiment="own")
    (tmp_path / "own.json").write_text(format_spec(own))
    first, second = data.open_datasets([rlds, rlds_latents], cache, ["", tmp_path / "own.json"])
    assert (first.source, second.source) == ("libero", str(tmp_path / "own.json"))
    assert first.spec.embodiment == "libero" and second.spec == own
    folder = copy_rlds(rlds, tmp_path)
    for place in (folder / "1.0.0", folder):
        (place / "spec.json").write_text(format_spec(replace(own, embodiment=f"in {place.name}")))
        for path in (folder, folder / "1.0.0"):
            expected = "in 1.0.0" if path != folder else f"in {place.name}"
            assert data.open_dataset(path, cache).spec.embodiment == expected
    assert data.open_dataset(folder, cache, "libero").spec.embodiment == "libero"


def test_data_without_a_camera_is_refused(tmp_path, monkeypatch):
    """By a spec that says so; without a spec the proposal says it."""
    index = made_index(tmp_path, {"action": np.zeros((60, 7), np.float32)})
    monkeypatch.setattr(data, "FORMATS", (as_format(index),))
    with pytest.raises(
        ValueError, match="(?s)no preset fits.*there is no camera of 8 bits .* no policy can be trained"
    ):
        data.open_dataset(tmp_path)
    (tmp_path / "spec.json").write_text(format_spec(DataSpec("mine", action=["action"])))
    with pytest.raises(ValueError, match="made, as described by .*spec.json, has no camera. A policy needs one"):
        data.open_dataset(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# RLDS of other robots (`conftest.write_odd`)


def open_odd(folder, cache, **fields):
    """Return (the `Dataset` of `write_odd` with a description of these fields, n of each of its episodes)."""
    path = cache / "odd.json"
    path.write_text(format_spec(DataSpec("mine", **{"cameras": {"main": "observation/png"}} | fields)))
    dataset = data.open_dataset(folder, cache, path)
    return dataset, [int(name.removeprefix("id ")) for name in dataset.metadata["episode_id"]]


def places(dataset, numbers):
    """Yield (step, its number in its episode, n of the episode)."""
    for start, stop, n in zip(dataset.starts[:-1], dataset.starts[1:], numbers):
        for step in range(start, stop):
            yield step, step - start, n


def test_features_that_are_not_used_never_block(odd, cache):
    """ClassLabel, nested sequence, ragged and huge tensors, bytes, 16-bit depth, images of whole episodes."""
    dataset, _ = open_odd(odd, cache)
    features = dataset.index.features
    assert {"observation/nested", "observation/ragged", "observation/metres"}.isdisjoint(features)
    assert not any("picture" in path for path in features)
    assert features["observation/class"].kind == "number" and features["observation/depth"].dtype == "uint16"
    assert np.asarray(dataset.index.columns["observation/class"])[:5].tolist() == [0, 1, 2, 0, 1]
    assert dataset.instructions() == [""] and dataset.action_size == dataset.state_size == 0


CAMERAS = {"main": (48, 48, 3), "tensor": (40, 40, 3), "grey": (48, 48, 1)}


def test_images_of_every_encoding_are_read(odd, cache):
    """PNG, u8 tensors, and grey ones as three channels; each pixel as it was written."""
    cameras = {name: f"observation/{'png' if name == 'main' else name}" for name in CAMERAS}
    dataset, numbers = open_odd(odd, cache, cameras=cameras)
    for step, t, n in places(dataset, numbers):
        for camera, shape in CAMERAS.items():
            expected = np.broadcast_to(odd_pixels(t, n, shape), (*shape[:2], 3))
            assert np.array_equal(dataset.image(camera, step), expected)
    assert all(dataset.storage_options(camera)["format"] == "PNG" for camera in CAMERAS)


@pytest.mark.parametrize("path", ("observation/depth", "observation/metres"))
def test_depth_is_no_camera(path, odd, cache):
    """16 bits are refused with the reason; metres are numbers, and too many to be kept."""
    with pytest.raises(
        ValueError, match=f"camera depth (is image uint16 48 x 48 x 1; it must have 8 bits|reads '{path}')"
    ):
        open_odd(odd, cache, cameras={"depth": path})


def test_images_that_are_not_square_become_so(odd, cache):
    """24 x 40 pixels: refused without a choice, else 40 x 40 with black bars, 24 x 24, or squeezed later."""
    wide = {"wide": "observation/wide"}
    with pytest.raises(ValueError, match="odd: images of camera wide have 24 x 40 pixels. Say how they become square"):
        open_odd(odd, cache, cameras=wide)
    for fit, size in (("pad", (40, 40)), ("crop", (24, 24)), ("squeeze", (24, 40))):
        dataset, _ = open_odd(odd, cache, cameras=wide, image_fit=fit)
        assert dataset.image("wide", 3).shape[:2] == size
        assert ActionChunks([dataset], [["wide"]], 4)[0]["images"][0].shape == (*size, 3)


def test_images_of_several_sizes_are_resized_to_one(odd, cache):
    """Where the metadata states no size: all become as large as the first, so that they fit a batch."""
    dataset, numbers = open_odd(odd, cache, cameras={"any": "observation/any_size"})
    assert {dataset.image("any", start).shape[0] for start in dataset.starts[:-1]} == {40, 41, 42}
    chunks = ActionChunks([dataset], [["any"]], 4)
    shapes = {tuple(chunks.sample(0, step)["images"][0].shape) for step in range(len(dataset))}
    assert shapes == {(40 + numbers[0], 40 + numbers[0], 3)}


def test_dictionary_of_actions_and_columns_of_f64_are_joined(odd, cache):
    """Parts in the order of the description; a gripper's width; the state from f64 and from [3, 1]."""
    fields = {
        "action": ["action/move", "action/grip"],
        "grippers": [{"index": 3, "open": 0.08, "closed": 0}],
        "state": ["observation/column[1:3]", "observation/joints[0]"],
    }
    dataset, numbers = open_odd(odd, cache, **fields)
    for step, t, n in places(dataset, numbers):
        assert np.allclose(dataset.stored_action([step])[0], [t, -t, n, 0.08 * (t % 2)])
        assert np.allclose(dataset.action([step])[0], [t, -t, n, t % 2])
        assert np.array_equal(dataset.state([step])[0], [t, t, t + 10 * n])
    assert dataset.stats["action"]["max"] == [6, 0, 2, 1] and dataset.stats["proprio"]["max"] == [6, 6, 26]


@pytest.mark.parametrize("path", ("said", "episode_metadata/language_instruction", "episode_id"))
def test_instruction_is_found_under_any_name(path, odd, cache):
    """One of each step, one in the metadata of an episode, one beside the steps; or one constant text."""
    dataset, numbers = open_odd(odd, cache, instruction=path)
    texts = {
        "said": lambda t, n: f"step {t // 2} of {n}",
        "episode_metadata/language_instruction": lambda t, n: f"do {n}",
        "episode_id": lambda t, n: f"id {n}",
    }
    expected = [texts[path](t, n) for _, t, n in places(dataset, numbers)]
    assert [dataset.instruction(step) for step in range(len(dataset))] == expected
    assert dataset.instructions() == sorted(set(expected))
    chunks = ActionChunks([dataset], [["main"]], 4)
    assert chunks[3]["text"] == expected[chunks.place(3)[1]]
    constant, _ = open_odd(odd, cache, text="do it")
    assert constant.instruction(4) == "do it" and constant.instructions() == ["do it"]


def test_bytes_that_are_no_text_are_kept_but_marked(odd, cache):
    """A string tensor may hold anything; read as an instruction, what is no UTF-8 shows as U+FFFD."""
    dataset, _ = open_odd(odd, cache, instruction="observation/bytes")
    assert dataset.instruction(1) == "\ufffd\ufffd\x01"


def test_another_file_format_is_named(odd, tmp_path):
    """What tensorflow-datasets can write as well, and what to do."""
    folder = shutil.copytree(odd, tmp_path / "odd")
    path = folder / "1.0.0" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "array_record"}))
    with pytest.raises(ValueError, match="its file format is array_record; write the data as tfrecord"):
        data.open_index(folder, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def write_small(folder, steps=(3, 2)):
    """Write an index of numbers that count up and texts, an episode after the other; return it, read again."""
    writer = IndexWriter(folder)
    at = 0
    for number, length in enumerate(steps):
        writer.append("columns", "a", np.arange(at, at + length, dtype=np.float32))
        writer.append("columns", "b", np.arange(2 * at, 2 * (at + length)).reshape(length, 2, 1))
        writer.append_texts("t", [f"text {number}"] * length)
        writer.end_episode(length)
        at += length
    writer.finish({"seed": list(range(len(steps)))}, fingerprint="f")
    return read_index(folder)


def test_columns_read_what_arrays_read(tmp_path):
    """Numbers, slices, lists and arrays, in any order and from the end; pickled too; beyond the ends IndexError."""
    column = write_small(tmp_path / "index", (3, 400))["columns"]["b"]
    array = np.asarray(column)
    assert np.array_equal(array, np.arange(806).reshape(403, 2, 1)) and (column.ndim, len(column)) == (3, 403)
    rng = np.random.default_rng(0)
    choices = [0, 402, -1, np.int64(7), slice(None), slice(5, 9), slice(400, 900), slice(9, 5), slice(2, 300, 7), []]
    choices += [[3], [5, 4, 4, 6], [0, 402], rng.integers(0, 403, 100), np.arange(403), np.array([-0, 1])]
    for steps in choices:
        assert np.array_equal(column[steps], array[steps]) and column[steps].dtype == array.dtype
        assert np.array_equal(pickle.loads(pickle.dumps(column))[steps], array[steps])
    assert np.array_equal(column.reshape(403, 2)[7:9], array.reshape(403, 2)[7:9])
    for steps in (403, -404, [5, 403], [-1, 0], np.array([1000])):
        with pytest.raises(IndexError):
            column[steps]


def test_damaged_cache_is_named(tmp_path):
    """Files of another size, at opening and while they are read; with index.json gone all is written anew, and what
    else lies there, as labels, stays."""
    folder = tmp_path / "index"
    column = write_small(folder)["columns"]["a"]
    (folder / "labels.safetensors").write_text("dear")
    with open(column.path, "r+b") as file:
        file.truncate(4)
    with pytest.raises(ValueError, match=f"{column.path} has become shorter since it was opened"):
        column[:]
    with pytest.raises(ValueError, match=f"{column.path} has 4 bytes, not 20. Remove index.json in its folder"):
        read_index(folder)
    (folder / "index.json").unlink()
    assert np.array_equal(write_small(folder)["columns"]["a"], np.arange(5))
    assert (folder / "labels.safetensors").read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_rows_of_another_kind_are_refused(tmp_path):
    """A column of one type and shape: what a format appends must agree."""
    writer = IndexWriter(tmp_path / "index")
    writer.append("columns", "a", np.zeros((3, 2), np.float32))
    for rows in (np.zeros((3, 2)), np.zeros((3, 3), np.float32), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="a has rows .* after rows <f4"):
            writer.append("columns", "a", rows)
    writer.discard()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("locks", (True, False))
def test_processes_that_open_new_data(locks, tmp_path, monkeypatch):
    """One reads it, the others wait; where the file system knows no locks, all do, and the first that is done is kept
    whole. A failed scan leaves nothing."""
    folder = tmp_path / "index"
    barrier = threading.Barrier(1 if locks else 3)
    scans = []

    def refuse(*arguments):
        raise OSError("No locks available")

    if not locks:
        monkeypatch.setattr(files.fcntl, "flock", refuse)

    def scan(writer, on_fault):
        scans.append(writer)
        writer.append("columns", "a", np.arange(4.0))
        writer.end_episode(4)
        barrier.wait(20)
        time.sleep(0.1)  # meanwhile the others ask
        writer.finish({}, fingerprint="f")

    threads = [threading.Thread(target=cached_contents, args=(folder, scan)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(scans) == (1 if locks else 3)
    assert np.array_equal(read_index(folder)["columns"]["a"], np.arange(4.0))
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["index"]

    def fail(writer, on_fault):
        writer.append("columns", "a", np.zeros(3))
        raise ValueError("bad data")

    with pytest.raises(ValueError, match="bad data"):
        cached_contents(tmp_path / "other", fail)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["index"]


def test_texts_that_no_step_has_are_no_instructions(dataset):
    """As tasks of episodes that were removed."""
    texts = dataset.index.texts["language_instruction"]
    more = texts._replace(unique=[*texts.unique, "never said"])
    changed = change_index(dataset, texts={"language_instruction": more})
    assert changed.instructions() == dataset.instructions() == sorted(texts.unique)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def memory():
    """Return (MB of this process, of these not backed by files, the most so far since `reset_peak`)."""
    lines = open("/proc/self/status").read().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon", "VmHWM"))}
    return [int(sizes[name]) / 1024 for name in ("VmRSS", "RssAnon", "VmHWM")]


def test_memory_does_not_grow_with_the_data(dataset, tmp_path, monkeypatch):
    """A million steps in 88 MB, of which all are read for the statistics and 300 at random: the process keeps less than
    20 MB more than before, and takes less than 30 MB meanwhile. Samples hold what was written."""
    steps, length = 1_000_000, 1000
    writer = IndexWriter(tmp_path / "index")
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(length, 7)).astype(np.float32)
    for episode in range(steps // length):
        actions[:, 6] = np.where(rng.random(length) > 0.5, 1, -1)
        actions[:, 0] = episode
        writer.append("columns", "action", actions)
        writer.append("columns", "observation/state", rng.normal(size=(length, 8)).astype(np.float32))
        writer.append("images", "observation/image", np.zeros((length, 3), np.int64))
        writer.append_texts("language_instruction", [f"task {episode % 50}"] * length)
        writer.append_texts("episode_metadata/file_path", [f"a/rather/long/path/{episode:099d}"] * length)
        writer.end_episode(length)
    writer.finish({"file_path": [f"a/rather/long/path/{n:099d}" for n in range(steps // length)]}, fingerprint="f")
    assert sum(path.stat().st_size for path in (tmp_path / "index").iterdir()) > 80 * 2**20
    blank = np.zeros((96, 96, 3), np.uint8)
    monkeypatch.setattr(type(dataset.index), "read_image", lambda self, path, step: blank)
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from now on
    before = memory()
    contents = read_index(tmp_path / "index")
    assert isinstance(contents["columns"]["action"], Column)
    large = change_index(dataset, cache=tmp_path / "none", **contents)
    assert np.isclose(large.stats["action"]["mean"][0], (steps // length - 1) / 2)
    chunks = ActionChunks([large], [["image"]], 8)
    for position in range(300):
        number, step = chunks.place(position)
        assert chunks.sample(number, step)["text"] == f"task {step // length % 50}"
    after = memory()
    assert after[0] - before[0] < 20 and after[1] - before[1] < 20 and after[2] - before[0] < 30, (before, after)
