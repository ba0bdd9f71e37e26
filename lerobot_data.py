"""LeRobot data sets, versions 2.0, 2.1 and 3.0, read in place without the package.

`meta/info.json` lists the features and where files lie. Numbers are in Parquet files, images in the same files or in
MP4 files, of which several episodes may share one (3.0) or each has its own (2.0, 2.1). Numbers go to the cache; images
and frames are read where they are. The instruction of a step is its task, feature "task".
Left out: statistics of the data set (they are computed), depth and what else has more than 8 bits, very large tensors,
several texts a step, writing, other versions.

Axes: S steps of a data set, E episodes, T steps of an episode.
"""

import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:  # everything but this format works without it
    pa = None

from files import read_json
from images import decode_image
from index import CACHE, COPY_AGAIN, INDEX_FORMAT, LARGEST_ROW, Feature, Index, cache_folder, cached_contents
from mp4 import read_frame, scan_video

FORMAT = "LeRobot (meta/info.json)"  # for messages
VERSIONS = ("v2.0", "v2.1", "v3.0")
ONE_TIME = (
    "They find different frames of its videos. LeRobot's timestamps are frame_index / fps: correct the column if the "
    "videos have fps frames a second, else fps"
)
COUNTERS = ("episode_index", "frame_index", "task_index", "timestamp")  # columns that every data set has


def is_dataset(path):
    """Return whether the folder `path` holds a LeRobot data set."""
    return (Path(path) / "meta" / "info.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The index of one data set


@dataclass
class LeRobotIndex(Index):
    """A LeRobot data set.

    videos: [MP4 files] and tables: [Parquet files], in `directory`; frames: {path: i64 [S, 3] of (number of the video,
    time of the frame, time of its key frame)}; images: {path: i64 [S, 3] of (number of the table, row group, row in
    it)}. metadata has "table", the number of the table that each episode is in.
    """

    videos: list = field(default_factory=list)
    tables: list = field(default_factory=list)
    frames: dict = field(default_factory=dict)
    images: dict = field(default_factory=dict)

    def file_of(self, step):
        """Return the Parquet file that a step is stored in; errors of its images name their file too."""
        if not len(self):
            return self.directory
        return self.directory / self.tables[self.metadata["table"][self.episode_of(step)]]

    def read_image(self, path, step):
        """Return an image u8 [h, w, 1 or 3]. Raise ValueError where it cannot be decoded."""
        if path in self.frames:
            video, time, key = self.frames[path][step]
            return read_frame(self.directory / self.videos[video], time, key)
        table, group, row = (int(n) for n in self.images[path][step])
        file = self.directory / self.tables[table]
        stored = read_row_group(str(file), group, path, os.getpid())[row].as_py()
        if not stored or stored["bytes"] is None:
            raise ValueError(f"its bytes are not in {file}, only the name {(stored or {}).get('path')}")
        return decode_image(stored["bytes"], self.features[path].shape[2], formats=None)


@functools.lru_cache(maxsize=4)
def read_row_group(file, group, column, process):
    """Return a column of a Parquet file's row group; the last few stay in memory, of this process."""
    return pq.ParquetFile(file).read_row_group(group, [column], use_threads=False)[column]


def open_index(path, cache=CACHE, on_fault=None):
    """Return the `LeRobotIndex` of the data set at `path`, from `cache` if no file has changed since it was indexed.

    on_fault: as of `data.open_index`. Raise ValueError with the file, and what is wrong in it; ImportError without
    pyarrow.
    """
    if pa is None:
        raise ImportError(f"{path} is a LeRobot data set, whose tables pyarrow reads: pip install pyarrow")
    directory = Path(path)
    try:
        meta = read_metadata(directory)
    except (KeyError, TypeError, AttributeError, pa.ArrowException, OSError) as error:
        reason = f"{type(error).__name__}({str(error)!r})" if isinstance(error, OSError) else repr(error)
        raise ValueError(f"{directory}/meta: damaged metadata: {reason}. {COPY_AGAIN}") from error
    name = directory.resolve().name
    stamps = [(file, *_stamp(directory / file)) for file in meta.files()]
    key = hashlib.sha256(json.dumps(["LeRobot", INDEX_FORMAT, name, stamps]).encode()).hexdigest()[:16]
    folder = cache_folder(cache, f"{name}-{key}")

    def scan(writer, on_fault):
        Scan(directory, meta, writer, on_fault).run()

    contents = cached_contents(folder, scan, on_fault)
    return LeRobotIndex(name, directory, folder, features=meta.features, **contents)


def _stamp(path):
    """Return size and time of a file, by which a change is noticed."""
    if not path.exists():
        return 0, 0
    return path.stat().st_size, path.stat().st_mtime_ns


# ----------------------------------------------------------------------------------------------------------------------
# Metadata


class Episode(NamedTuple):
    """What the metadata says of an episode."""

    number: int
    length: int  # T
    table: str  # Parquet file
    videos: tuple  # of (MP4 file, time in it at which the episode begins, in seconds), one for each camera


@dataclass
class Metadata:
    """What meta/ says. Files are relative to the folder of the data set."""

    fps: float
    features: dict  # {path: Feature}, with "task"
    episodes: list  # [Episode], by number
    tasks: dict  # {task_index: text}
    cameras: list  # paths of the features that are videos
    own_files: list  # those in meta/

    def files(self):
        """Return all files, those that the episodes are in too, sorted."""
        files = set(self.own_files)
        for episode in self.episodes:
            files.add(episode.table)
            files.update(file for file, _ in episode.videos)
        return sorted(files)


def read_metadata(directory):
    """Return the `Metadata` of a data set. Raise ValueError for another version, or what is damaged."""
    info_file = directory / "meta" / "info.json"
    info = read_json(info_file)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{info_file}: the data set has version {version}; {', '.join(VERSIONS)} can be read. Convert it with a "
            "convert_dataset script of the lerobot package"
        )
    fps = float(info["fps"])
    if not 0 < fps < float("inf"):
        raise ValueError(f"{info_file}: fps is {fps}; it must be positive. {COPY_AGAIN}")
    features = {path: read_feature(path, entry, info_file) for path, entry in info["features"].items()}
    cameras = [
        path for path, entry in info["features"].items() if entry["dtype"] == "video" and is_read(features[path])
    ]
    if version == "v3.0":
        episodes = _episodes_v30(directory, info, cameras)
        tasks = _tasks_v30(directory / "meta" / "tasks.parquet")
    else:
        episodes = _episodes_v21(directory, info, cameras)
        tasks = {entry["task_index"]: entry["task"] for entry in read_lines(directory / "meta" / "tasks.jsonl")}
    if wrong := {number: text for number, text in tasks.items() if not isinstance(text, str)}:
        raise ValueError(f"{directory}/meta: the task {next(iter(wrong))} is {next(iter(wrong.values()))!r}, no text")
    episodes.sort()
    _check_numbers([episode.number for episode in episodes], info.get("total_episodes", 0), directory)
    own_files = [str(file.relative_to(directory)) for file in (directory / "meta").rglob("*") if file.is_file()]
    return Metadata(fps, features | {"task": Feature("text", "str", ())}, episodes, tasks, cameras, own_files)


def _check_numbers(numbers, total, directory):
    """Raise ValueError where an episode is listed twice, or fewer are than the `total` of info.json."""
    if len(set(numbers)) < len(numbers):
        twice = next(first for first, second in zip(numbers, numbers[1:]) if first == second)
        raise ValueError(f"{directory}/meta: episode {twice} is listed twice. {COPY_AGAIN}")
    if len(numbers) < total:
        raise ValueError(
            f"{directory}/meta: {len(numbers)} episodes are listed, but total_episodes in info.json is {total}. "
            f"{COPY_AGAIN}"
        )


def read_feature(path, entry, source):
    """Return the `Feature` of an entry of info.json. Raise ValueError for one without dtype or shape."""
    if not isinstance(entry, dict) or not {"dtype", "shape"} <= entry.keys():
        raise ValueError(f"{source}: feature {path} is {entry!r:.80}; it must have dtype and shape. {COPY_AGAIN}")
    dtype, shape = entry["dtype"], tuple(entry["shape"] or ())
    if dtype in ("video", "image"):
        return _image_feature(entry, shape)
    if dtype == "string" and math.prod(shape) == 1:
        return Feature("text", "str", ())
    if re.fullmatch(r"bool|float(16|32|64)|u?int(8|16|32|64)", dtype) and math.prod(shape) <= LARGEST_ROW:
        return Feature("number", dtype, () if shape == (1,) else shape, _number_names(entry.get("names")))
    return Feature("unread", dtype, shape)


def _number_names(names):
    """Return the names of a feature's numbers, stored as a list or as {"motors": list}; () without."""
    if isinstance(names, dict) and len(names) == 1:
        (names,) = names.values()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _image_feature(entry, shape):
    """Return the `Feature` of a camera, whose shape has the channels last or first; dtype is uint8 if it is read."""
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3:
        return Feature("unread", entry["dtype"], shape)
    ends = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    axes = [str(name)[:1].lower() for name in entry.get("names") or ()]  # of height, width, channels
    if ends == (True, False) or (ends == (True, True) and axes[:1] == ["c"]):
        shape = (shape[1], shape[2], shape[0])
    if {"h", "w"} <= set(axes) and axes.index("w") < axes.index("h"):
        shape = (shape[1], shape[0], shape[2])
    settings = (entry.get("info") or {}) | (entry.get("video_info") or {})
    is_depth = settings.get("is_depth_map") or settings.get("video.is_depth_map")
    if is_depth or (shape[2] == 1 and entry["dtype"] == "video"):
        return Feature("image", "uint16", shape)
    return Feature("image", "uint8" if shape[2] in (1, 3) else "unknown", shape)


def is_read(feature):
    """Return whether a feature's values are read: of images only those that can be a camera."""
    return feature.dtype == "uint8" if feature.kind == "image" else feature.kind != "unread"


def read_lines(file):
    """Yield the objects in a file of one JSON object a line. Raise ValueError with file and line."""
    for number, line in enumerate(file.read_text().split("\n"), 1):  # texts may hold other ends of lines
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}: line {number} is no JSON: {error}. {COPY_AGAIN}") from error


def _episodes_v21(directory, info, cameras):
    """Return the `Episode`s of versions 2.0 and 2.1: each has its own Parquet file and its own video of each camera."""
    episodes = []
    for entry in read_lines(directory / "meta" / "episodes.jsonl"):
        number = int(entry["episode_index"])
        place = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
        videos = tuple((info["video_path"].format(video_key=camera, **place), 0.0) for camera in cameras)
        episodes.append(Episode(number, int(entry["length"]), info["data_path"].format(**place), videos))
    return episodes


def _episodes_v30(directory, info, cameras):
    """Return the `Episode`s of version 3.0: many share a Parquet file, and a video of each camera."""
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for camera in cameras:
        columns += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    file_name = functools.lru_cache(_file_name)  # one text for all episodes of a file
    episodes = []
    for file in sorted((directory / "meta" / "episodes").rglob("*.parquet")):
        for row in pq.read_table(file, columns=columns, use_threads=False).to_pylist():
            number, length, chunk, place, *rest = (row[column] for column in columns)
            videos = []
            for camera, *where, start in zip(cameras, rest[::3], rest[1::3], rest[2::3], strict=True):
                videos.append((file_name(info["video_path"], *where, camera), start))
            episodes.append(Episode(number, length, file_name(info["data_path"], chunk, place), tuple(videos)))
    return episodes


def _file_name(pattern, chunk, file, camera=""):
    return pattern.format(video_key=camera, chunk_index=chunk, file_index=file)


def _tasks_v30(file):
    """Return {task_index: text}. The texts are the index of a pandas table, whose column has no fixed name."""
    table = pq.read_table(file, use_threads=False)
    others = [name for name in table.column_names if name != "task_index"]
    text = next((name for name in ("task", "__index_level_0__") if name in others), others[0])
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))


# ----------------------------------------------------------------------------------------------------------------------
# Reading every file once


class Table(NamedTuple):
    """The values in a Parquet file, of R rows."""

    number: int
    columns: dict  # {name: array [R, ...], or list of R texts}
    order: np.ndarray  # i64 [R], rows in the order of their episodes
    episodes: np.ndarray  # i64 [R], episode of each row in that order
    places: np.ndarray  # i64 [R, 2], row group of each row, and row in it

    def rows(self, episode):
        """Return the rows of an episode, i64 [T]."""
        first, last = np.searchsorted(self.episodes, [episode, episode + 1])
        return self.order[first:last]


class Scan:
    """One pass over a data set: writes its index, and reports what does not fit together."""

    def __init__(self, directory, meta, writer, on_fault):
        self.directory = directory
        self.meta = meta
        self.writer = writer
        self.on_fault = on_fault
        read = {path: feature for path, feature in meta.features.items() if is_read(feature) and path != "task"}
        self.columns = {path: feature for path, feature in read.items() if feature.kind != "image"}
        self.images = [path for path in read if path not in self.columns and path not in meta.cameras]
        self.digest = hashlib.sha256()
        self.tables = {}  # {Parquet file: its number}
        self.videos = {}  # {MP4 file: its number}
        self.unusable = set()  # files with a fault, which is reported once
        self.table = None, None  # the last (file, `Table`)
        self.frame_tables = {}  # {camera: the last (file, `FrameTable`)}

    def run(self):
        """Read every episode; one with a fault is left out when `on_fault` returns."""
        for path, feature in sorted(self.meta.features.items()):
            if feature.kind != "unread":
                self.digest.update(f"{path} {feature} ".encode())
        numbers = []
        for episode in self.meta.episodes:
            contents = self.read_episode(episode)
            if contents is None:
                continue
            arrays, texts = contents
            for (kind, path), rows in arrays.items():
                self.writer.append(kind, path, rows)
                self.digest.update(np.ascontiguousarray(rows).data)
            for path, lines in texts.items():
                self.writer.append_texts(path, lines)
                self.digest.update("\n".join(lines).encode())
            self.writer.end_episode(episode.length)
            numbers.append(self.tables[episode.table])
        if not self.writer.lengths:
            raise ValueError(f"{self.directory}: no episode can be read")
        files = {"videos": list(self.videos), "tables": list(self.tables)}
        self.writer.finish({"table": numbers}, fingerprint=self.digest.hexdigest()[:16], **files)

    def report(self, file, episode, fault, camera="", warning=False, advice=COPY_AGAIN):
        """Report what is wrong with a file, of several episodes with the first that needs it."""
        kind = FileNotFoundError if isinstance(fault, FileNotFoundError) else ValueError
        place = f"camera {camera}, episode {episode.number}" if camera else f"episode {episode.number}"
        self.on_fault(kind(f"{self.directory / file}: {place}: {fault}. {advice}"), warning=warning)

    def read_episode(self, episode):
        """Return ({(kind, path): rows}, {path: texts}) of an episode; None after a fault, which is reported."""
        table = self.open_table(episode)
        frame_tables = [self.open_video(episode, number) for number in range(len(self.meta.cameras))]
        if table is None or None in frame_tables:
            return None
        rows = table.rows(episode.number)
        if fault := self.row_fault(table.columns, rows, episode.length):
            self.report(episode.table, episode, fault)
            return None
        arrays = {}
        texts = {"task": [self.meta.tasks[number] for number in table.columns["task_index"][rows].tolist()]}
        for path, feature in self.columns.items():
            if feature.kind == "text":
                texts[path] = [table.columns[path][row] for row in rows]
            else:
                arrays["columns", path] = table.columns[path][rows]
        for path in self.images:
            arrays["images", path] = np.column_stack([np.full(len(rows), table.number), table.places[rows]])
        complete = True
        timestamps = table.columns["timestamp"][rows].astype(np.float64)  # f32 is too coarse in long videos
        counted = np.arange(episode.length) / self.meta.fps
        odd = np.flatnonzero(np.abs(timestamps - counted) > 0.5 / self.meta.fps)
        if self.meta.cameras and len(odd):
            step = odd[0]
            fault = (
                f"timestamp is {timestamps[step]:.4f} s at step {step}, but by its number and fps {counted[step]:.4f} s"
            )
            self.report(episode.table, episode, fault, advice=ONE_TIME)
            return None
        for camera, (file, start), frames in zip(self.meta.cameras, episode.videos, frame_tables, strict=True):
            located, distances = nearest_frames(frames, start + timestamps)
            missing = np.flatnonzero(distances > 0.5 / self.meta.fps)
            if len(missing):
                step = missing[0]
                wanted = f"there is no frame for step {step} at {start + timestamps[step]:.4f} s"
                self.report(file, episode, f"{wanted}, the nearest is {distances[step]:.4f} s away", camera)
                complete = False
            arrays["frames", camera] = np.column_stack([np.full(len(rows), self.videos[file]), located])
        return (arrays, texts) if complete else None

    def row_fault(self, columns, rows, length):
        """Return what is wrong with the rows of an episode, as a text; "" when nothing is."""
        if len(rows) != length or not length:
            return f"there are {len(rows)} rows, but its length in the metadata is {length}"
        counted = columns["frame_index"][rows]
        wrong = np.flatnonzero(counted != np.arange(length))
        if len(wrong):
            return f"frame_index is {counted[wrong[0]]} at step {wrong[0]}; it must count from 0 to {length - 1}"
        for step, number in enumerate(columns["task_index"][rows].tolist()):
            if number not in self.meta.tasks:
                return f"task_index is {number} at step {step}, but the tasks are {sorted(self.meta.tasks)[:10]}"
        return ""

    def open_table(self, episode):
        """Return the `Table` that an episode is in; None when it cannot be used, which is reported once."""
        file = episode.table
        if file in self.unusable:
            return None
        if file == self.table[0]:
            return self.table[1]
        try:
            columns, groups = self.read_columns(self.directory / file)
        except (ValueError, pa.ArrowException, OSError) as fault:
            self.unusable.add(file)
            self.report(file, episode, fault)
            return None
        if file not in self.tables:
            self.tables[file] = len(self.tables)
            if self.images:
                self.add_to_digest(file)
            known = {each.number for each in self.meta.episodes if each.table == file}
            if unknown := sorted(set(columns["episode_index"].tolist()) - known):
                text = f"the file also holds episodes {unknown[:5]}, which the metadata does not list for it"
                self.report(file, episode, text, warning=True)
        order = np.argsort(columns["episode_index"], kind="stable")
        places = [np.column_stack([np.full(n, group), np.arange(n)]) for group, n in enumerate(groups)]
        table = Table(self.tables[file], columns, order, columns["episode_index"][order], np.concatenate(places))
        self.table = file, table
        return table

    def read_columns(self, path):
        """Return ({name: values of all rows}, [rows of each row group]) of a Parquet file.

        Raise FileNotFoundError, pyarrow's errors, or ValueError listing what is wrong with its columns.
        """
        if not path.exists():
            raise FileNotFoundError("the file is missing")
        parquet = pq.ParquetFile(path)
        counters = {name: Feature("number", "float64" if name == "timestamp" else "int64", ()) for name in COUNTERS}
        features = counters | self.columns
        missing = [name for name in [*features, *self.images] if name not in parquet.schema_arrow.names]
        if missing:
            raise ValueError(f"there is no column {', '.join(missing)}")
        table = parquet.read(columns=list(features), use_threads=False)
        columns = {}
        faults = []
        for name, feature in features.items():
            try:
                columns[name] = read_column(table[name], feature)
            except (ValueError, pa.ArrowException) as fault:
                faults.append(f"column {name} {fault}")
        if faults:
            raise ValueError("; ".join(faults))
        return columns, [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]

    def open_video(self, episode, number):
        """Return the `FrameTable` of an episode's video of camera `number`; None after a fault, reported once."""
        camera = self.meta.cameras[number]
        file, _ = episode.videos[number]
        if file in self.unusable:
            return None
        known, table = self.frame_tables.get(camera, (None, None))
        if known == file:
            return table
        try:
            table = self.read_video(file)
        except (ValueError, OSError) as fault:
            self.unusable.add(file)
            self.report(file, episode, fault, camera)
            return None
        size = self.meta.features[camera].shape[:2]
        if table.size != size:
            self.unusable.add(file)
            sizes = [" x ".join(map(str, each)) for each in (table.size, size)]
            fault = f"the video has {sizes[0]} pixels, but info.json says {sizes[1]}"
            self.report(file, episode, fault, camera, advice="If it is the right video, correct its shape in info.json")
            return None
        if file not in self.videos:
            self.videos[file] = len(self.videos)
            self.add_to_digest(file)
        self.frame_tables[camera] = file, table  # of the one before nothing stays in memory
        return table

    def read_video(self, file):
        """Return the `FrameTable` of a video. Raise FileNotFoundError, and ValueError for a damaged one."""
        if not (self.directory / file).exists():
            raise FileNotFoundError("the file is missing")
        return scan_video(self.directory / file)

    def add_to_digest(self, file):
        """Let the fingerprint depend on the bytes of a file."""
        with open(self.directory / file, "rb") as stream:
            self.digest.update(hashlib.file_digest(stream, "sha256").digest())


def read_column(column, feature):
    """Return the values of a column: an array with dtype and shape of the feature, [R, ...], or a list of R texts.

    Raise ValueError, with the row, where a value is empty, and where values are not as the feature says.
    """
    count = len(column)
    column = column.combine_chunks()
    sizes = []
    while True:
        if column.null_count:
            raise ValueError(f"has no value in row {np.argmax(column.is_null()) // max(1, math.prod(sizes))}")
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if not isinstance(column, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
            break
        lengths = pc.list_value_length(column)
        shortest, longest = pc.min_max(lengths).as_py().values()
        if shortest != longest:
            raise ValueError(f"has from {shortest} to {longest} numbers in a row")
        sizes.append(longest or 0)
        column = column.flatten()
    if count and math.prod(sizes) != math.prod(feature.shape):
        raise ValueError(f"has rows of shape {tuple(sizes)}, but info.json says {feature.shape}")
    if feature.kind == "text":
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise ValueError(f"holds {column.type}, but info.json says string")
        return column.to_pylist()
    stored = column.to_numpy(zero_copy_only=False)
    if stored.dtype.kind not in "iufb":
        raise ValueError(f"holds {column.type}, but info.json says {feature.dtype}")
    values = stored.astype(feature.dtype)
    if values.dtype.kind in "iub" and not np.array_equal(values, stored):
        raise ValueError(f"holds {column.type} that do not fit {feature.dtype} of info.json")
    return values.reshape(count, *feature.shape)


def nearest_frames(table, seconds):
    """Return (i64 [T, 2], f64 [T]): time and key of the frame nearest to each of f64 [T], and how far it is, in s.

    table: a `FrameTable`.
    """
    wanted = seconds / table.time_base
    after = np.searchsorted(table.times, wanted).clip(max=len(table.times) - 1)
    before = (after - 1).clip(0)
    is_before = np.abs(table.times[before] - wanted) <= np.abs(table.times[after] - wanted)
    nearest = np.where(is_before, before, after)
    distances = np.abs(table.times[nearest] - wanted) * table.time_base
    return np.column_stack([table.times[nearest], table.keys[nearest]]), distances
