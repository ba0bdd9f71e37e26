"""lerobot_data.py against what the official package reads (fixtures/lerobot): index, samples, and training on it."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import equal_batches, replace_step
from lerobot_helpers import (
    EPISODES,
    FRONT,
    LENGTHS,
    SETS,
    SIDE,
    SPEC,
    TABLE,
    VIDEO,
    WRIST,
    change_json,
    change_table,
    copy_set,
    expected_of,
)
from torch.utils.data import DataLoader
from video_helpers import moving_square, write_video

import data
import lerobot_data
import mp4
import train
from batches import ActionChunks, StepBatchSampler, chunk_steps
from curves import read_log
from index import Feature
from policy import Policy


@pytest.fixture(scope="module")
def indices(cache):
    """{name: index} of all fixtures."""
    return {name: data.open_index(SETS / name, cache) for name in ("v21", "v30", "v30_multi", "v30_h264", "v30_odd")}


@pytest.fixture(scope="module")
def dataset(cache, tmp_path_factory):
    """The set whose episodes are spread over several files."""
    return data.open_dataset(copy_set("v30_multi", tmp_path_factory.mktemp("multi")), cache)


# ----------------------------------------------------------------------------------------------------------------------
# The official package's reading


@pytest.mark.parametrize("name", ("v21", "v30", "v30_multi", "v30_h264", "v30_odd"))
def test_every_value_and_frame_is_the_official_packages(name, indices):
    """Numbers with their types, texts, and frames in random order, bit for bit."""
    index = indices[name]
    expected = expected_of(name)
    compared = set()
    for path, feature in index.features.items():
        if feature.kind == "text":
            assert [index.texts[path][step] for step in range(len(index))] == expected[path].tolist()
        elif feature.kind == "number":
            stored = np.asarray(index.columns[path])
            assert stored.dtype == feature.dtype and stored.shape == (len(index), *feature.shape)
            # the package gives f64 as f32, and small integers as i64
            assert np.array_equal(stored.astype(expected[path].dtype), expected[path]), path
        elif feature.dtype == "uint8":
            for step in np.random.default_rng(0).permutation(len(index)):
                digest = hashlib.sha256(np.ascontiguousarray(index.image(path, step)).tobytes()).digest()
                assert digest == expected[f"sha256/{path}"][step].tobytes(), (path, step)
        compared |= {path, f"sha256/{path}"}
    assert {key for key in expected if not key.startswith("window")} <= compared
    if name != "v30_odd":
        assert np.diff(index.starts).tolist() == LENGTHS[: index.num_episodes]


@pytest.mark.parametrize("name", ("v21", "v30", "v30_multi", "v30_h264"))
def test_action_chunks_are_the_official_packages(name, indices):
    """Eight future actions, those past the end of the episode repeated and marked."""
    index = indices[name]
    expected = expected_of(name)
    for step in range(len(index)):
        steps, valid = chunk_steps(index.starts, step, 8)
        assert np.array_equal(index.columns["action"][steps], expected["window/action"][step])
        assert np.array_equal(~valid, expected["window/action_is_pad"][step])


def test_features_of_all_kinds(indices):
    """Shapes (1,) and (1, 6), matrices, integers, booleans, halves, texts, channels first; depth is not read."""
    index = indices["v30_odd"]
    for path, expected in {
        "observation.images.front": Feature("image", "uint8", (32, 48, 3)),
        "observation.images.first": Feature("image", "uint8", (32, 48, 3)),
        "observation.images.depth": Feature("image", "uint16", (32, 48, 1)),
        "observation.state": Feature("number", "float64", (4,)),
        "observation.row": Feature("number", "float32", (1, 6)),
        "observation.matrix": Feature("number", "float32", (2, 3)),
        "observation.cube": Feature("number", "int16", (2, 2, 2)),
        "observation.one": Feature("number", "int8", ()),
        "observation.half": Feature("number", "float16", (2,)),
        "observation.flags": Feature("number", "bool", (2,)),
        "note": Feature("text", "str", ()),
        "task": Feature("text", "str", ()),
    }.items():
        assert index.features[path] == expected
    assert "observation.images.depth" not in index.frames and not index.videos


def test_odd_features_as_parts(cache, tmp_path):
    """One row, one number and halves can be the state; matrices and depth are refused, and do not hinder the others."""
    spec = {
        "embodiment": "odd",
        "cameras": {"front": "observation.images.front", "first": "observation.images.first"},
        "state": ["observation.row", "observation.one", "observation.half", "observation.state[1:3]"],
        "action": ["action", "observation.flags"],
        "instruction": "note",
        "image_fit": "crop",
    }
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    dataset = data.open_dataset(SETS / "v30_odd", cache, path)
    expected = expected_of("v30_odd")
    parts = [expected[f"observation.{name}"].reshape(13, -1) for name in ("row", "one", "half", "state")]
    assert np.array_equal(dataset.state(slice(None)), np.concatenate([*parts[:3], parts[3][:, 1:3]], 1))
    assert dataset.action([3]).shape == (1, 5) and dataset.instruction(6) == "note 1 1"
    assert dataset.image("first", 3).shape == (32, 32, 3) and (dataset.image("first", 3) == 60).all()
    for part, message in (("observation.matrix", r"the shape \(2, 3\)"), ("observation.cube", r"shape \(2, 2, 2\)")):
        path.write_text(json.dumps(spec | {"state": [part]}))
        with pytest.raises(ValueError, match=message):
            data.open_dataset(SETS / "v30_odd", cache, path)
    path.write_text(json.dumps(spec | {"cameras": {"depth": "observation.images.depth"}}))
    with pytest.raises(ValueError, match="camera depth is image uint16 32 x 48 x 1; it must have 8 bits"):
        data.open_dataset(SETS / "v30_odd", cache, path)


# ----------------------------------------------------------------------------------------------------------------------
# The index


def test_fingerprint_is_of_the_contents(cache, indices, tmp_path):
    """The same elsewhere; another one for other pictures, in a video or in a table, and for other times of frames."""
    folder = copy_set("v30", tmp_path)
    assert data.open_index(folder, cache).fingerprint == indices["v30"].fingerprint
    assert len({index.fingerprint for index in indices.values()}) == 5
    start = "videos/observation__images__front/from_timestamp".replace("/", "_of_")
    change_table(folder, EPISODES, **{start: replace_step(1, 0.0)})
    fingerprints = {indices["v30"].fingerprint, data.open_index(folder, cache).fingerprint}
    shutil.copyfile(SETS / "v30" / EPISODES, folder / EPISODES)
    picture = pq.read_table(folder / TABLE)[SIDE][3].as_py()
    change_table(folder, TABLE, **{SIDE.replace(".", "__"): replace_step(0, picture)})
    fingerprints.add(data.open_index(folder, cache).fingerprint)
    shutil.copyfile(SETS / "v30" / TABLE, folder / TABLE)
    shutil.copyfile(folder / VIDEO.replace("wrist", "front"), tmp_path / "front.mp4")
    write_video(folder / VIDEO, moving_square(62, 48, 80))
    fingerprints.add(data.open_index(folder, cache).fingerprint)
    assert len(fingerprints) == 4


def test_second_opening_reads_the_cache(tmp_path):
    """Also when a description or labels were put beside the data; a newer file of the data is read again."""
    folder = copy_set("v30", tmp_path)
    cache = tmp_path / "cache"
    first = data.open_index(folder, cache)
    before = (folder / TABLE).stat()
    (folder / TABLE).write_bytes(bytes(before.st_size))
    os.utime(folder / TABLE, ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "spec.json").write_text(json.dumps(SPEC | {"chunk": 4}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.json").write_text("{}")
    second = data.open_index(folder, cache)
    assert second.cache == first.cache and len(list(cache.glob("[!.]*"))) == 1
    assert np.array_equal(second.columns["action"], first.columns["action"])
    assert np.array_equal(second.image(WRIST, 20), first.image(WRIST, 20))
    os.utime(folder / TABLE)
    with pytest.raises(ValueError, match=f"{folder}/{TABLE}: episode 0: "):
        data.open_index(folder, cache)


def test_relative_folder(dataset, cache, monkeypatch):
    """The name and the fingerprint are those of the folder that is meant."""
    monkeypatch.chdir(dataset.directory)
    assert data.open_index(".", cache).fingerprint == dataset.fingerprint
    assert data.open_index(".", cache).name == "v30_multi"


def test_file_of_a_step(dataset):
    """The Parquet file that holds its row."""
    files = [str(dataset.locate(start)[0].relative_to(dataset.directory)) for start in dataset.starts[:-1]]
    assert len(set(files)) == 3 and files == sorted(files) and files[0] == TABLE
    assert dataset.locate(8)[1] == "step 1 of episode 1"


def test_metadata_in_any_order(cache, indices, tmp_path):
    """Rows of episodes and tasks, the name of the tasks' column, times that are not exact, columns of other kinds."""
    folder = copy_set("v30", tmp_path)
    episodes = pq.read_table(folder / EPISODES)
    pq.write_table(episodes.take([3, 0, 4, 1, 2]), folder / EPISODES)
    start = "videos/observation__images__front/from_timestamp".replace("/", "_of_")
    change_table(folder, EPISODES, **{start: lambda times: [np.nextafter(time, -1) for time in times]})
    assert 1.8999999999999997 in pq.read_table(folder / EPISODES)[f"videos/{FRONT}/from_timestamp"].to_pylist()
    tasks = pq.read_table(folder / "meta/tasks.parquet").take([1, 0])
    change_table(
        folder,
        TABLE,
        observation__state=lambda rows: pa.array(rows, pa.list_(pa.float64())),
        action=lambda rows: pa.array(rows, pa.large_list(pa.float32())),
        next__done=lambda values: pa.array([[value] for value in values], pa.list_(pa.bool_(), 1)),
    )
    rows = pq.read_table(folder / TABLE)
    pq.write_table(rows.take(np.roll(np.arange(62), -19)), folder / TABLE, row_group_size=11)  # from episode 2 on
    for name in ("task", "__index_level_0__", "text"):
        pq.write_table(tasks.rename_columns(["task_index", name]), folder / "meta/tasks.parquet")
        index = data.open_index(folder, cache)
        texts = index.texts["task"]
        assert [texts[step] for step in range(62)] == [indices["v30"].texts["task"][step] for step in range(62)]
    for path, column in indices["v30"].columns.items():
        assert np.array_equal(index.columns[path], column), path
    for path in (FRONT, WRIST, SIDE):
        for step in (0, 7, 40, 61):
            assert np.array_equal(index.image(path, step), indices["v30"].image(path, step))
    assert np.array_equal(index.frames[FRONT], indices["v30"].frames[FRONT])


def test_version_20_in_several_chunks(cache, indices, tmp_path):
    """Two episodes a chunk, and a text with an end of a line that ends no JSON line: the same steps and frames."""
    folder = copy_set("v21", tmp_path)
    change_json(folder, lambda content: content | {"codebase_version": "v2.0", "chunks_size": 2})
    for file in sorted(folder.rglob("episode_*")):
        chunk = int(file.stem[-6:]) // 2
        moved = str(file).replace("chunk-000", f"chunk-{chunk:03d}")
        os.renames(file, moved)
    tasks = folder / "meta/tasks.jsonl"
    tasks.write_text(tasks.read_text().replace('"task": "', '"task": "\u2028'))
    index = data.open_index(folder, cache)
    assert [index.file_of(start).parent.name[-1] for start in index.starts[:-1]] == ["0", "0", "1", "1", "2"]
    for path, column in indices["v21"].columns.items():
        assert np.array_equal(index.columns[path], column), path
    for step in range(0, 62, 5):
        assert index.texts["task"][step] == "\u2028" + indices["v21"].texts["task"][step]
        assert np.array_equal(index.image(WRIST, step), indices["v21"].image(WRIST, step))


def test_half_precision_columns(cache, tmp_path):
    """What info.json says is what is kept, whatever the file holds."""
    folder = copy_set("v30", tmp_path)
    change_table(
        folder,
        TABLE,
        observation__state=lambda rows: pa.array(np.array(rows, np.float16).tolist(), pa.list_(pa.float16(), 6)),
        action=lambda rows: pa.array([[1, -2, 3, 0, 5]] * len(rows), pa.list_(pa.int8(), 5)),
    )
    index = data.open_index(folder, cache)
    state = np.asarray(index.columns["observation.state"])
    assert state.dtype == np.float32 and np.array_equal(state, state.astype(np.float16))
    assert index.columns["action"][4].tolist() == [1, -2, 3, 0, 5] and index.columns["action"].dtype == np.float32


def test_frames_of_a_video_of_hours():
    """The frame nearest to each time: f32 seconds from an episode's beginning, far behind that of the file."""
    times = np.arange(60 * 7 * 3600) * 256  # 7 hours of 60 frames a second
    table = mp4.FrameTable(times, times // 512 * 512, 1 / 15360, (48, 64))
    first = 60 * 6 * 3600 + 7
    timestamps = (np.arange(2000) / 60).astype(np.float32).astype(np.float64)
    located, distances = lerobot_data.nearest_frames(table, first / 60 + timestamps)
    assert np.array_equal(located[:, 0], times[first : first + 2000]) and distances.max() < 1e-4
    assert np.array_equal(located[:, 1], table.keys[first : first + 2000])
    located, distances = lerobot_data.nearest_frames(table, np.array([-0.5, 0.0, 0.4 / 60, 0.6 / 60, 25200.0]))
    assert located[:, 0].tolist() == [0, 0, 0, 256, times[-1]]
    assert distances == pytest.approx([0.5, 0, 0.4 / 60, 0.4 / 60, 1 / 60])
    single = mp4.FrameTable(times[:1], times[:1], 1 / 15360, (48, 64))
    assert lerobot_data.nearest_frames(single, np.array([0.0, 1.0]))[0].tolist() == [[0, 0], [0, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_forked_workers_read_the_same_batches(dataset, monkeypatch):
    """From videos and tables, after this process opened more of them than stay open."""
    monkeypatch.setattr(mp4, "OPEN_FILES", 2)
    chunks = ActionChunks([dataset], [dataset.cameras], 8, seed=3)
    alone = list(DataLoader(chunks, batch_sampler=StepBatchSampler(0, 8, 8, 8)))
    workers = DataLoader(chunks, batch_sampler=StepBatchSampler(0, 8, 8, 8), num_workers=2, timeout=30)
    assert all(map(equal_batches, alone, workers))
    assert [tuple(images.shape) for images in alone[0]["images"]] == [(8, 64, 64, 3), (8, 80, 80, 3), (8, 32, 32, 3)]
    assert not equal_batches(alone[0], alone[1])
    later = DataLoader(chunks, batch_sampler=StepBatchSampler(5, 8, 8, 8))
    assert all(map(equal_batches, alone[5:], later))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def losses_of(run):
    """Return {name: values at all updates} of the losses in a run's log."""
    log = read_log(run)
    return {name: [entry[name] for entry in log] for name in ("loss", "action_loss", "grad_norm", "lr")}


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    """Folder of a data set whose description is what the error proposes, but for the gripper's ends; a cache beside."""
    folder = copy_set("v30", tmp_path_factory.mktemp("proposed"))
    (folder / "spec.json").unlink()
    with pytest.raises(ValueError, match="no description says what its features mean") as caught:
        data.open_dataset(folder, folder.parent / "cache")
    text = str(caught.value)
    proposal = text.partition("A description that may fit:\n")[2].partition("It guesses; check each:")[0]
    assert f"Save it, corrected, as {folder}/spec.json" in text and "the main camera is front" in text
    low, high = re.search("dimension 4 of the action is a gripper, from (.*) to (.*): write which", text).groups()
    proposal = proposal.replace('"open": null', f'"open": {high}').replace('"closed": null', f'"closed": {low}')
    (folder / "spec.json").write_text(proposal)
    return folder


@pytest.fixture(scope="module")
def make_config(proposed):
    """Function (name of the run, **changes) -> train.Config of a run of seconds on `proposed`."""

    def make(name, **changes):
        settings = dict(variant="baseline", max_steps=2, global_batch_size=4, num_workers=0, val_fraction=0.2)
        settings |= dict(data=(proposed,), cache=proposed.parent / "cache", out=str(proposed.parent / name))
        return train.Config(**settings | changes)

    return make


def test_what_is_proposed_trains(proposed, make_config, script_here):
    """Four dimensions and a gripper, with their names, two video cameras of different sizes and one of pictures.

    A baseline; a latent model, labels, and la_align, whose policy acts in the units of the data.
    """
    train.main(make_config("baseline"))
    shared = ("--data", proposed, "--cache", proposed.parent / "cache")
    lam = proposed.parent / "lam"
    small = ("--max-steps", 2, "--global-batch-size", 4, "--delta", 3, "--width", 32, "--num-blocks", 1)
    done = script_here("train_latent.py", "lam", *shared, "--out", lam, *small)
    assert done.code == 0, done.text
    done = script_here("label.py", *shared, "--lam", lam)
    assert done.code == 0 and "62 steps" in done.text, done.text
    train.main(make_config("aligned", variant="la_align"))
    dataset = data.open_dataset(proposed, proposed.parent / "cache")
    policy = Policy(proposed.parent / "aligned")
    assert list(policy.data_entry["cameras"]) == dataset.cameras == ["front", "side", "wrist"]
    images = {camera: dataset.image(camera, 20) for camera in dataset.cameras}
    assert [image.shape[:2] for image in images.values()] == [(64, 64), (32, 32), (80, 80)]
    observation = {"images": images, "state": dataset.state([20])[0], "instruction": dataset.instruction(20)}
    actions = policy(observation)
    low, high = (np.array(dataset.stats["action"][bound]) for bound in ("low", "high"))
    assert actions.shape == (8, 5) and (actions[:, :4] >= low[:4] - 1e-6).all() and (actions <= high + 1e-6).all()
    assert dataset.spec.action_names == ["dx", "dy", "dz", "yaw", "grip"]
    for_robosuite = policy(observation, "robosuite")
    assert np.array_equal(actions[:, :4], for_robosuite[:, :4]) and set(for_robosuite[:, 4]) <= {-1, 0, 1}


def test_interrupted_run_resumes_bit_identically(make_config, proposed):
    """From its last save, with other workers: every loss of the run that was not interrupted."""
    out = train.main(make_config("whole", max_steps=4, save_every=2, keep=3))
    again = shutil.copytree(out, proposed.parent / "again")
    for name in ("training-4.safetensors", "model.safetensors"):
        (again / name).unlink()
    train.main(make_config("again", max_steps=4, save_every=2, keep=3, resume=True, num_workers=1))
    assert losses_of(again) == losses_of(out)
    other = train.main(make_config("other", max_steps=4, save_every=2, keep=3, seed=1))
    assert losses_of(other)["loss"] != losses_of(out)["loss"]
