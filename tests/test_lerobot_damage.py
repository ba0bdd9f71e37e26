"""lerobot_data.py: what is wrong with a LeRobot data set is named, and what is only unusual is read."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import replace_step, run_check
from lerobot_helpers import (
    EPISODES,
    FRONT,
    SETS,
    SIDE,
    TABLE,
    VIDEO,
    WRIST,
    change_json,
    change_table,
    copy_set,
)
from PIL import Image
from torch.utils.data import DataLoader
from video_helpers import moving_square, write_video

import data
import lerobot_data
import mp4
from batches import ActionChunks, StepBatchSampler
from index import Feature


@pytest.fixture(scope="module")
def sound(cache):
    """The index of the set that is damaged."""
    return data.open_index(SETS / "v30", cache)


def cut(file, part=0.5):
    """Return a function that keeps only a part of a file of a data set."""

    def damage(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(part * len(content))])

    return damage


def write(file, content):
    """Return a function that replaces a file of a data set."""
    return lambda folder: (folder / file).write_text(content)


def remove(file):
    """Return a function that removes a file of a data set."""
    return lambda folder: (folder / file).unlink()


def info(**changes):
    """Return a function that changes entries of info.json."""
    return lambda folder: change_json(folder, lambda content: content | changes)


def feature(path, **changes):
    """Return a function that changes a feature in info.json."""
    return lambda folder: change_json(folder, lambda content: content["features"][path].update(changes))


def table(file=TABLE, **columns):
    """Return a function that changes columns of a Parquet file, as `change_table`."""
    return lambda folder: change_table(folder, file, **columns)


def video(frames=62, height=48, width=80, rate=10):
    """Return a function that replaces the wrist's video."""
    return lambda folder: write_video(folder / VIDEO, moving_square(frames, height, width), rate=rate)


def ragged(rows):
    """Return rows of which one has a number too many and one lacks it."""
    return pa.array([rows[0][:4], [*rows[1], 0.0], *rows[2:]], pa.list_(pa.float32()))


def rename(folder, old, new):
    """Rename a column of the Parquet file, and leave the old one out of info.json."""
    table = pq.read_table(folder / TABLE)
    pq.write_table(table.rename_columns([new if name == old else name for name in table.column_names]), folder / TABLE)
    change_json(folder, lambda content: content["features"].pop(old) and None)


OF_WRIST = f"{VIDEO}: camera {WRIST}, episode 0: "
OF_TABLE = f"{TABLE}: episode 0: "
AT_STEP_1 = "timestamp is {} s at step 1, but by its number and fps 0.1000 s. They find different frames of its videos"
DAMAGE = {
    "video cut": (cut(VIDEO), OF_WRIST + "the video is damaged: it ends within frame 26, or before"),
    "video cut in its table": (cut(VIDEO, 0.1), OF_WRIST + "it is no video, or a damaged one: "),
    "video empty": (write(VIDEO, ""), OF_WRIST + "it is no video, or a damaged one: "),
    "video of text": (write(VIDEO, "no video " * 99), OF_WRIST + "it is no video, or a damaged one: "),
    "video missing": (remove(VIDEO), OF_WRIST + "the file is missing. Copy it again"),
    "too few frames": (
        video(55),
        f"{VIDEO}: camera {WRIST}, episode 4: there is no frame for step 8 at 5.5000 s, the nearest is 0.1000 s away",
    ),
    "another frame rate": (
        video(rate=30),
        f"{VIDEO}: camera {WRIST}, episode 2: there is no frame for step 2 at 2.1000 s, the nearest is 0.0667 s",
    ),
    "another size": (
        video(height=80, width=48),
        OF_WRIST + "the video has 80 x 48 pixels, but info.json says 48 x 80. If it is the right video, correct its",
    ),
    "table missing": (remove(TABLE), OF_TABLE + "the file is missing. Copy it again"),
    "table cut": (cut(TABLE), OF_TABLE + "Parquet magic bytes not found"),
    "table empty": (write(TABLE, ""), OF_TABLE + "Parquet file size is 0 bytes"),
    "columns missing": (
        table(action=None, observation__images__side=None, timestamp=None),
        OF_TABLE + "there is no column timestamp, action, observation.images.side",
    ),
    "a row missing": (
        lambda folder: pq.write_table(pq.read_table(folder / TABLE).slice(0, 61), folder / TABLE),
        f"{TABLE}: episode 4: there are 14 rows, but its length in the metadata is 15",
    ),
    "another length": (
        table(EPISODES, length=replace_step(1, 11)),
        f"{TABLE}: episode 1: there are 12 rows, but its length in the metadata is 11",
    ),
    "episode of no step": (
        table(EPISODES, length=replace_step(1, 0)),
        f"{TABLE}: episode 1: there are 12 rows, but its length in the metadata is 0",
    ),
    "frames counted from 1": (
        table(frame_index=lambda values: [value + 1 for value in values]),
        OF_TABLE + "frame_index is 1 at step 0; it must count from 0 to 6",
    ),
    "a frame twice": (
        table(frame_index=replace_step(12, 4)),
        f"{TABLE}: episode 1: frame_index is 4 at step 5; it must count from 0 to 11",
    ),
    "no times": (table(timestamp=lambda times: [0.0] * len(times)), OF_TABLE + AT_STEP_1.format("0.0000")),
    "times of twice the frame rate": (
        table(timestamp=lambda times: [time / 2 for time in times]),
        OF_TABLE + "timestamp is 0.1000 s at step 2, but by its number and fps 0.2000 s. They find different frames",
    ),
    "times that drift": (
        table(timestamp=lambda times: [0.96 * time for time in times]),
        f"{TABLE}: episode 2: timestamp is 1.2480 s at step 13, but by its number and fps 1.3000 s. They find",
    ),
    "times that begin late": (
        table(timestamp=lambda times: [time + 0.1 * (7 <= row < 19) for row, time in enumerate(times)]),
        f"{TABLE}: episode 1: timestamp is 0.1000 s at step 0, but by its number and fps 0.0000 s. They find different",
    ),
    "unknown task": (
        table(task_index=replace_step(22, 7)),
        f"{TABLE}: episode 2: task_index is 7 at step 3, but the tasks are [0, 1]",
    ),
    "empty values": (
        table(observation__state=replace_step(9, None), next__reward=replace_step(61, None)),
        OF_TABLE + "column observation.state has no value in row 9; column next.reward has no value in row 61",
    ),
    "empty number": (
        table(action=replace_step(9, [0.0, 0.0, None, 0.0, 0.0])),
        OF_TABLE + "column action has no value in row 9",
    ),
    "several texts": (
        lambda folder: [
            change_json(folder, lambda content: content["features"].update(note={"dtype": "string", "shape": [1]})),
            table(next__reward=lambda rows: pa.array([["one", "two"]] * len(rows)))(folder),
            rename(folder, "next.reward", "note"),
        ],
        OF_TABLE + "column note has rows of shape (2,), but info.json says ()",
    ),
    "ragged rows": (table(action=ragged), OF_TABLE + "column action has from 4 to 6 numbers in a row"),
    "another number of dimensions": (
        table(action=lambda rows: pa.array([row[:4] for row in rows], pa.list_(pa.float32()))),
        OF_TABLE + "column action has rows of shape (4,), but info.json says (5,)",
    ),
    "texts for numbers": (
        table(action=lambda rows: pa.array([[str(number) for number in row] for row in rows])),
        OF_TABLE + "column action holds string, but info.json says float32",
    ),
    "numbers too large": (
        lambda folder: [feature("frame_index", dtype="int8")(folder), table(frame_index=lambda v: [300] * 62)(folder)],
        OF_TABLE + "column frame_index holds int64 that do not fit int8 of info.json",
    ),
    "action not finite": (
        table(action=replace_step(9, [0.0, 0.0, 0.0, float("nan"), 0.0])),
        f"{TABLE}: action of v30 is nan at step 2 of episode 1, dimension 3",
    ),
    "picture without bytes": (
        table(observation__images__side=replace_step(0, {"bytes": None, "path": "frame-0.png"})),
        f"{TABLE}: camera {SIDE} at step 0 of episode 0 cannot be used: its bytes are not in ",
    ),
    "picture damaged": (
        table(observation__images__side=replace_step(0, {"bytes": b"\x89PNG" * 9, "path": "frame-0.png"})),
        f"{TABLE}: camera {SIDE} at step 0 of episode 0 cannot be used: cannot identify image file",
    ),
    "info.json cut": (cut("meta/info.json"), "meta/info.json is no JSON: "),
    "info.json a list": (write("meta/info.json", "[1]"), "meta/info.json holds [1], not an object"),
    "info.json empty": (write("meta/info.json", "{}"), "meta/info.json: the data set has version None; v2.0, v2.1"),
    "version 1.6": (
        info(codebase_version="v1.6"),
        "meta/info.json: the data set has version v1.6; v2.0, v2.1, v3.0 can be read. Convert it with a ",
    ),
    "no frame rate": (info(fps=0), "meta/info.json: fps is 0.0; it must be positive"),
    "no pattern": (info(video_path=None), "meta: damaged metadata: AttributeError("),
    "features a list": (info(features=[]), "meta: damaged metadata: AttributeError("),
    "feature without shape": (
        lambda folder: change_json(folder, lambda content: content["features"]["action"].pop("shape") and None),
        "meta/info.json: feature action is {'dtype': 'float32', 'names': ['dx', ",
    ),
    "episodes missing": (info(total_episodes=6), "meta: 5 episodes are listed, but total_episodes in info.json is 6"),
    "episode twice": (table(EPISODES, episode_index=replace_step(3, 1)), "meta: episode 1 is listed twice"),
    "episodes cut": (cut(EPISODES), "meta: damaged metadata: ArrowInvalid("),
    "episodes without a column": (
        table(EPISODES, **{"data_of_file_index": None}),
        "meta: damaged metadata: ArrowInvalid('No match for FieldRef.Name(data/file_index)",
    ),
    "no text for a task": (
        table("meta/tasks.parquet", task=lambda texts: pa.array([texts[0], None], pa.string())),
        "meta: the task 1 is None, no text",
    ),
    "tasks missing": (remove("meta/tasks.parquet"), "meta: damaged metadata: FileNotFoundError("),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, cache, tmp_path, capsys):
    """With the file, and camera, step and episode where there is one, by training and by --check, which goes on."""
    damage, message = DAMAGE[name]
    folder = copy_set("v30", tmp_path)
    damage(folder)
    message = re.escape(f"{folder}/{message}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.open_dataset(folder, cache).stats  # noqa: B018
    errors, lines = run_check(folder, capsys)
    assert errors and any(re.match(f"error: {message}", line) for line in lines), lines
    assert not any("Traceback" in line for line in lines)


def test_check_lists_all_faults_in_one_go(tmp_path, capsys):
    """With a file for each episode: every damaged file once, then pictures and numbers of the sound episodes."""
    folder = copy_set("v21", tmp_path)
    where = "videos/chunk-000/observation.images.{}/episode_{:06d}.mp4"
    first_wrist, first_front, second = where.format("wrist", 0), where.format("front", 0), where.format("front", 1)
    cut(first_wrist)(folder)
    remove(first_front)(folder)
    shutil.copyfile(folder / first_wrist.replace("0000.", "0003."), folder / second)
    last = "data/chunk-000/episode_000004.parquet"
    change_table(folder, last, action=replace_step(3, [0.0, float("inf"), 0.0, 0.0, 0.0]))
    change_table(folder, last, observation__images__side=replace_step(7, {"bytes": None, "path": "x.png"}))
    remove(last.replace("0004", "0002"))(folder)
    errors, lines = run_check(folder, capsys)
    expected = [
        f"{folder}/{first_wrist}: camera {WRIST}, episode 0: it is no video",
        f"{folder}/{first_front}: camera {FRONT}, episode 0: the file is missing",
        f"{folder}/{second}: camera {FRONT}, episode 1: the video has 48 x 80 pixels, but info.json says 64 x 64",
        f"{folder}/data/chunk-000/episode_000002.parquet: episode 2: the file is missing",
        f"{folder}/{last}: camera {SIDE} at step 7 of episode 1 cannot be used: its bytes are not in {folder}/{last}",
        f"{folder}/{last}: action of v21 is inf at step 3 of episode 1, dimension 1",
    ]
    for line in expected:
        assert sum(found.startswith(f"error: {line}") for found in lines) == 1, lines
    assert errors == len(expected) and "6 found in 2 episodes, 24 steps, 72 images" in lines[-1]


def test_check_of_a_sound_set(tmp_path, capsys):
    """Nothing is found; rows that the metadata does not list are odd, for they are left out."""
    folder = copy_set("v30_multi", tmp_path)
    assert run_check(folder, capsys) == (0, ["v30_multi: nothing found in 5 episodes, 62 steps, 186 images"])
    shutil.copyfile(SETS / "v30" / TABLE, folder / TABLE)
    errors, lines = run_check(folder, capsys)
    assert errors == 0 and f"warning: {folder}/{TABLE}: episode 0: the file also holds episodes [" in lines[0]


def test_nothing_that_can_be_read(cache, tmp_path, capsys):
    """All tables gone: each is named, and that no episode is left."""
    folder = copy_set("v21", tmp_path)
    shutil.rmtree(folder / "data")
    with pytest.raises(FileNotFoundError, match="episode_000000.parquet: episode 0: the file is missing"):
        data.open_index(folder, cache)
    errors, lines = run_check(folder, capsys)
    assert errors == 6 and f"error: {folder}: no episode can be read" in lines


def test_damaged_lines_of_version_21(cache, tmp_path):
    """With the file and the line."""
    for file, line in (("meta/episodes.jsonl", 3), ("meta/tasks.jsonl", 2)):
        folder = copy_set("v21", tmp_path)
        lines = (folder / file).read_text().splitlines()
        lines[line - 1] = lines[line - 1][:-4]
        (folder / file).write_text("\n".join(lines))
        with pytest.raises(ValueError, match=f"{folder}/{file}: line {line} is no JSON"):
            data.open_index(folder, cache)
        shutil.rmtree(folder)


def test_width_before_height(cache, sound, tmp_path):
    """A shape whose names say so is of the same images."""
    folder = copy_set("v30", tmp_path)
    feature(WRIST, shape=[80, 48, 3], names=["width", "height", "channels"])(folder)
    index = data.open_index(folder, cache)
    assert index.features == sound.features and np.array_equal(index.frames[WRIST], sound.frames[WRIST])


@pytest.mark.parametrize("names", (None, [], ["channels", "height", "width"], ["c", "h", "w"], {"channels": 0}))
def test_channels_first_shapes(names, cache, tmp_path):
    """With names of the axes or without: the size tells them, and frames are as before."""
    folder = copy_set("v30", tmp_path)
    for path, size in ((FRONT, (64, 64)), (WRIST, (48, 80)), (SIDE, (32, 32))):
        feature(path, shape=[3, *size], names=names)(folder)
    index = data.open_index(folder, cache)
    assert index.features[WRIST] == Feature("image", "uint8", (48, 80, 3))
    assert index.image(WRIST, 5).shape == (48, 80, 3) and index.image(SIDE, 5).shape == (32, 32, 3)


def test_axes_that_sizes_do_not_tell():
    """Then the names do: an image of three rows."""
    for names, shape in ((["channels", "height", "width"], (5, 3, 3)), (["height", "width", "channels"], (3, 5, 3))):
        entry = {"dtype": "image", "shape": [3, 5, 3], "names": names}
        assert lerobot_data.read_feature("x", entry, "info.json") == Feature("image", "uint8", shape)


def test_features_that_do_not_hinder(cache, sound, tmp_path):
    """Depth as video or picture, four channels, two axes and unknown kinds: listed or left out, never read."""
    folder = copy_set("v30", tmp_path)
    depth = {"info": {"video.is_depth_map": True}}

    def change(content):
        content["features"] |= {
            "depth": {"dtype": "video", "shape": [480, 640, 1], "names": None} | depth,
            "depth_picture": {"dtype": "image", "shape": [1, 480, 640], "names": None, "info": {"is_depth_map": True}},
            "grey_video": {"dtype": "video", "shape": [480, 640, 1], "names": None},
            "flat": {"dtype": "image", "shape": [480, 640], "names": None, "info": {"is_depth_map": True}},
            "with_alpha": {"dtype": "image", "shape": [480, 640, 4], "names": None},
            "speech": {"dtype": "audio", "shape": [1], "names": None},
            "language_events": {"dtype": "language", "shape": [1], "names": None},
            "cloud": {"dtype": "image", "shape": [7], "names": None},
            "history": {"dtype": "video", "shape": [4, 480, 640, 3], "names": None},
            "depth_tensor": {"dtype": "uint16", "shape": [480, 640], "names": None},
            "texts": {"dtype": "string", "shape": [3], "names": None},
        }

    change_json(folder, change)
    index = data.open_index(folder, cache)
    listed = {path: feature.dtype for path, feature in index.features.items() if path not in sound.features}
    assert listed == {
        "depth": "uint16",
        "depth_picture": "uint16",
        "grey_video": "uint16",
        "flat": "uint16",
        "with_alpha": "unknown",
        "speech": "audio",
        "language_events": "language",
        "cloud": "image",
        "history": "video",
        "depth_tensor": "uint16",
        "texts": "string",
    }
    unread = [path for path, feature in index.features.items() if feature.kind == "unread"]
    assert unread == ["speech", "language_events", "cloud", "history", "depth_tensor", "texts"]
    assert len(index) == 62 and index.videos == sound.videos
    with pytest.raises(ValueError, match="no description says") as caught:
        (folder / "spec.json").unlink()
        data.open_dataset(folder, cache)
    assert '"cameras": {\n    "front": "observation.images.front",\n    "side"' in str(caught.value)
    assert '"depth' not in str(caught.value) and "depth: image uint16 480 x 640 x 1" in str(caught.value)


def test_grey_pictures(cache, tmp_path):
    """Of 8 bits they are repeated to three channels; of 16 bits they are refused when they are read."""
    folder = copy_set("v30", tmp_path)
    feature(SIDE, shape=[32, 32, 1])(folder)
    pictures = {}
    for name, picture in (
        ("grey", Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8))),
        ("deep", Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32))),
    ):
        picture.save(tmp_path / "picture.png")
        pictures[name] = {"bytes": (tmp_path / "picture.png").read_bytes(), "path": "x.png"}
    change_table(folder, TABLE, observation__images__side=lambda rows: [pictures["grey"]] * 61 + [pictures["deep"]])
    index = data.open_index(folder, cache)
    assert index.image(SIDE, 5)[1, :3].tolist() == [[32] * 3, [33] * 3, [34] * 3]
    with pytest.raises(ValueError, match=f"camera {SIDE} at step 14 of episode 4 .* more than 8 bits .*mode I;16"):
        index.image(SIDE, 61)


def test_files_that_change_during_training(cache, tmp_path):
    """A file that is gone, cut or replaced is named, with camera, step and episode; once it is back, it is read."""
    folder = copy_set("v30", tmp_path)
    dataset = data.open_dataset(folder, cache)
    frame = dataset.image("wrist", 61).copy()
    content = (folder / VIDEO).read_bytes()
    for damage in (remove(VIDEO), write(VIDEO, ""), cut(VIDEO), video(5)):
        mp4.DECODERS.close(str(folder / VIDEO))
        damage(folder)
        place = f"{folder}/{TABLE}: camera {WRIST} at step 14 of episode 4 cannot be used: {folder}/{VIDEO} cannot be"
        with pytest.raises(ValueError, match=re.escape(place)):
            dataset.image("wrist", 61)
        (folder / VIDEO).write_bytes(content)
        assert np.array_equal(dataset.image("wrist", 61), frame)
    cut(TABLE)(folder)
    lerobot_data.read_row_group.cache_clear()
    with pytest.raises(ValueError, match=f"{TABLE}: camera {SIDE} at step 1 of episode 2 cannot be used: Parquet"):
        dataset.image("side", 20)


def test_video_that_goes_during_training(cache, tmp_path):
    """The error of the data worker names the file, camera, step and episode."""
    folder = copy_set("v30", tmp_path)
    dataset = data.open_dataset(folder, cache)
    chunks = ActionChunks([dataset], [dataset.cameras], 8)
    (folder / VIDEO).unlink()
    mp4.DECODERS.close(str(folder / VIDEO))
    _, step = chunks.place(0)
    place = (
        f"camera {WRIST} at {dataset.locate(step)[1]} cannot be used: {folder}/{VIDEO} cannot be decoded: .* No such"
    )
    with pytest.raises(ValueError, match=place):
        next(iter(DataLoader(chunks, batch_sampler=StepBatchSampler(0, 8, 8, 8), num_workers=1, timeout=30)))
