"""The data format RLDS, read without TensorFlow.

An RLDS data set (arXiv 2111.02767) is a folder of TFRecord shards with one `tf.train.Example` per episode, as
tensorflow-datasets writes it. One pass over the shards verifies every checksum and notes where each JPEG lies (shard,
offset, length); the small columns (actions, states, ...) go to .npy files in the cache. Training then reads the JPEGs
in place: a global shuffle and random access without a copy of the data.
Left out: other image encodings, nested sequences, splits other than `train`.

Axes: S steps of a data set, T steps of an episode, E episodes.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from checkpoint import read_json
from index import CACHE, COPY_AGAIN, Index

try:
    import simplejpeg  # optional: the same pixels, decoded faster
except ImportError:
    simplejpeg = None

FORMAT = "RLDS (features.json and *.tfrecord-* files)"  # for messages
INDEX_FORMAT = 2  # raise when the cached files change their meaning


def raise_fault(fault, warning=False):
    """Raise `fault`, an exception, unless it is only a warning: what opening does with a fault by default."""
    if not warning:
        raise fault


# ----------------------------------------------------------------------------------------------------------------------
# TFRecord framing and the protobuf wire format of tf.train.Example


def read_records(path, on_fault=raise_fault):
    """Yield (offset of the payload in bytes, payload, masked CRC-32C of the payload) of each TFRecord in `path`.

    Framing: u64 length, u32 masked CRC-32C of it, payload, u32 masked CRC-32C of the payload, all little-endian.
    Calls `on_fault` with a ValueError naming file and byte for a record that is cut short or has a wrong checksum. If
    that returns, reading goes on after a damaged payload, and ends where the length of a record is unknown.
    """
    size = path.stat().st_size
    start = 0
    with open(path, "rb") as file:
        while start < size:
            header = file.read(12)
            length = 0
            if len(header) == 12:
                length, length_crc = struct.unpack("<QI", header)
                if masked_crc(header[:8]) != length_crc:
                    on_fault(ValueError(f"{path}: wrong checksum of the record length at byte {start}. {COPY_AGAIN}"))
                    return
            if start + 16 + length > size:
                on_fault(ValueError(f"{path}: the record at byte {start} is cut short at byte {size}. {COPY_AGAIN}"))
                return
            payload = file.read(length)
            (crc,) = struct.unpack("<I", file.read(4))
            if masked_crc(payload) == crc:
                yield start + 12, payload, crc
            else:
                on_fault(ValueError(f"{path}: wrong checksum of the record at byte {start}. {COPY_AGAIN}"))
            start += 16 + length


def masked_crc(buffer):
    """Return TFRecord's masked CRC-32C of some bytes, an int."""
    import google_crc32c  # only indexing needs it, so a machine that only trains on a cached index does without

    crc = google_crc32c.value(buffer)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(buffer):
    """Return the features of one serialized tf.train.Example as {name: value}.

    A value is a list of (start, length) within `buffer` for a bytes_list, f32 [n] for a float_list, i64 [n] for an
    int64_list. Raises ValueError where the bytes are not such a message.
    """
    values = {}
    for _, features, features_end in _fields(buffer, 0, len(buffer)):
        for _, entry, entry_end in _fields(buffer, features, features_end):
            parts = {number: (start, end) for number, start, end in _fields(buffer, entry, entry_end)}
            if parts.keys() != {1, 2}:
                raise ValueError(f"protobuf entry at byte {entry} is not a feature's name and its values")
            name = buffer[slice(*parts[1])]
            for kind, start, end in _fields(buffer, *parts[2]):
                values[name.decode()] = _feature_values(buffer, kind, start, end)
    return values


def _feature_values(buffer, kind, start, end):
    """Return the values in buffer[start:end]; kind: 1 for a bytes_list, 2 for a float_list, 3 for an int64_list."""
    if kind == 1:
        return [(first, last - first) for _, first, last in _fields(buffer, start, end)]
    if start == end:
        return np.zeros(0, np.float32 if kind == 2 else np.int64)
    _, start, last = next(_fields(buffer, start, end))
    if last != end or kind not in (2, 3):
        raise ValueError(f"protobuf field at byte {start} is no packed list of floats or integers")
    if kind == 2:
        return np.frombuffer(buffer[start:end], "<f4")
    numbers = []
    while start < end:
        number, start = _varint(buffer, start, end)
        numbers.append(number - (1 << 64) if number >> 63 else number)
    return np.array(numbers, np.int64)


def _fields(buffer, start, end):
    """Yield (field number, start, end) of each length-delimited field of the protobuf message in buffer[start:end]."""
    while start < end:
        tag, start = _varint(buffer, start, end)
        if tag & 7 != 2:
            raise ValueError(f"protobuf wire type {tag & 7} at byte {start}, where a tf.train.Example has only type 2")
        length, start = _varint(buffer, start, end)
        if start + length > end:
            raise ValueError(f"protobuf field at byte {start} reaches {start + length - end} bytes past its message")
        yield tag >> 3, start, start + length
        start += length


def _varint(buffer, start, end):
    """Return (number, byte behind it) of the varint at `start`. Raises ValueError past `end` and beyond 64 bits."""
    value = 0
    for shift, byte in enumerate(buffer[start : min(start + 10, end)]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80 and value < 1 << 64:
            return value, start + shift + 1
    raise ValueError(f"protobuf number at byte {start} has more than 64 bits or reaches past its message")


# ----------------------------------------------------------------------------------------------------------------------
# The metadata of tensorflow-datasets


def is_dataset(path):
    """Return whether the folder `path`, or a version folder in it, holds an RLDS data set."""
    return bool(_version_folders(Path(path)))


def find_version_folder(path):
    """Return the folder with `features.json`: `path` itself or its only version folder.

    Raises ValueError where it does not hold exactly one data set.
    """
    folders = _version_folders(Path(path))
    if len(folders) != 1:
        names = ", ".join(folder.name for folder in folders) or "no features.json"
        raise ValueError(f"{path} holds {len(folders)} RLDS data sets ({names}); give --data the folder of one.")
    return folders[0]


def _version_folders(path):
    if (path / "features.json").exists():
        return [path]
    return sorted(file.parent for file in path.glob("*/features.json"))


def read_features(directory):
    """Return features.json as {name in the records: ("image" | "text" | "tensor", dtype, shape)}.

    Raises ValueError where it is no JSON object or two features of a step share their last name.
    """
    features = dict(_leaf_features(read_json(directory / "features.json"), ""))
    names = [_last_name(name) for name in features if name.startswith("steps/")]
    if len(set(names)) < len(names):
        raise ValueError(f"{directory}: two features of a step share a name: {sorted(names)}")
    return features


def _leaf_features(node, name):
    """Yield (name, (kind, dtype, shape)) of every feature below a node of features.json called `name`."""
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from _leaf_features(child, f"{name}/{key}" if name else key)
    elif "sequence" in node:
        yield from _leaf_features(node["sequence"]["feature"], name)
    elif "text" in node:
        yield name, ("text", "str", ())
    else:
        kind = "image" if "image" in node else "tensor"
        shape = tuple(int(size) for size in node[kind].get("shape", {}).get("dimensions", []))
        yield name, (kind, node[kind].get("dtype", "float32"), shape)


def _last_name(name):
    """Return the last part of a feature's name: "state" of "steps/observation/state"."""
    return name.rsplit("/", 1)[-1]


def shard_paths(directory, on_fault=raise_fault):
    """Return {path: number of records} of the shards of the split `train`, in the order of dataset_info.json.

    Calls `on_fault` with a FileNotFoundError where shards are missing. Raises ValueError where there is no such split.
    """
    info = read_json(directory / "dataset_info.json")
    split = next((s for s in info["splits"] if s["name"] == "train"), None)
    if split is None:
        raise ValueError(f"{directory}: no split called 'train', only {[s['name'] for s in info['splits']]}")
    lengths = split["shardLengths"]
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    names = {"DATASET": info["name"], "SPLIT": "train", "FILEFORMAT": info.get("fileFormat", "tfrecord")}
    shards = [f"{number:05d}-of-{len(lengths):05d}" for number in range(len(lengths))]
    paths = [directory / template.format(SHARD_X_OF_Y=shard, **names) for shard in shards]
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        fault = f"{directory}: {len(missing)} of {len(paths)} shards are missing: {missing[:3]}. {COPY_AGAIN}"
        on_fault(FileNotFoundError(fault))
    return {path: int(length) for path, length in zip(paths, lengths) if path.exists()}


# ----------------------------------------------------------------------------------------------------------------------
# The index of one data set


@dataclass
class RldsIndex(Index):
    """An RLDS data set. `open_index` builds it once and reads it from the cache later.

    shards: [files]; images: {camera: i64 [S, 3] of (number of the shard, byte offset, length)};
    sizes: {camera: (height, width)} where features.json states it.
    """

    shards: list = field(default_factory=list)
    images: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)

    @property
    def cameras(self):
        """The names of the cameras, a list."""
        return list(self.images)

    def mean_frame_bytes(self, camera):
        """Return the mean size of a stored JPEG in bytes."""
        return self.images[camera][:, 2].mean()

    def file_of(self, step):
        """Return the shard that a step is stored in; without cameras, the folder of the data set."""
        if not self.images:
            return self.directory
        locations = next(iter(self.images.values()))
        return self.shards[locations[step][0]]

    def stored_bytes(self, camera, step):
        """Return the stored bytes of one image. Raises ValueError where the file has become too short."""
        shard, offset, length = (int(n) for n in self.images[camera][step])
        with open(self.shards[shard], "rb") as file:
            stored = os.pread(file.fileno(), length, offset)
        if len(stored) < length:
            raise ValueError(f"the file ends before byte {offset + length}; it was cut after it was indexed")
        return stored

    def read_image(self, camera, step):
        """Return an image, u8 [height, width, 3]. Raises ValueError for a size that features.json does not state."""
        pixels = decode_jpeg(self.stored_bytes(camera, step))
        if pixels.shape[:2] != self.sizes.get(camera, pixels.shape[:2]):
            raise ValueError(f"it is {pixels.shape[:2]}, but features.json has {self.sizes[camera]}")
        return pixels

    def storage_options(self, camera):
        """Return {"size": height, "qtables": ..., "subsampling": ...} of the camera's first JPEG, for Pillow."""
        image = Image.open(io.BytesIO(self.stored_bytes(camera, 0)))
        tables = [list(table) for _, table in sorted(image.quantization.items())]
        return {"size": image.height, "qtables": tables, "subsampling": JpegImagePlugin.get_sampling(image)}


def decode_jpeg(stored):
    """Return JPEG bytes as u8 [height, width, 3], decoded by simplejpeg where it is installed."""
    if simplejpeg:
        return simplejpeg.decode_jpeg(stored, "RGB", fastdct=False, fastupsample=False)
    return np.asarray(Image.open(io.BytesIO(stored), formats=["JPEG"]).convert("RGB"))


def open_index(path, cache=CACHE, on_fault=None):
    """Return the `RldsIndex` of the data set at `path`, read from `cache` if no shard has changed since it was indexed.

    on_fault: function(fault, warning=False), called with each fault instead of raising it, and with what is only odd;
    then every shard is read and nothing is written. Raises FileNotFoundError (missing shards) and ValueError with file
    and byte (corrupt, truncated or inconsistent data).
    """
    directory = find_version_folder(path)
    try:
        shards = shard_paths(directory, on_fault or raise_fault)
        features = read_features(directory)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: damaged features.json or dataset_info.json: {error!r}. {COPY_AGAIN}") from error
    is_version = re.fullmatch(r"\d+\.\d+\.\d+", directory.name)
    name = (directory.parent if is_version else directory).resolve().name  # dataset_info.json's can be odd: liber_o10
    salt = (directory / "features.json").read_bytes()
    folder = _cache_folder(cache, name, salt, shards)
    sizes = {
        _last_name(feature): shape[:2]
        for feature, (kind, _, shape) in features.items()
        if kind == "image" and min(shape, default=0) > 0
    }
    if on_fault:
        contents = scan_shards(shards, features, salt, on_fault)
    else:
        if not (folder / "index.json").exists():
            _write_contents(folder, **scan_shards(shards, features, salt))
        contents = _read_contents(folder)
    return RldsIndex(name, directory, folder, shards=list(shards), sizes=sizes, **contents)


def _cache_folder(cache, name, salt, shards):
    """Return the folder of an index; its name depends on features.json and on size and time of each shard."""
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    key = hashlib.sha256(salt + json.dumps([INDEX_FORMAT, name, stamps]).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / f"{name}-{key}"


def _read_contents(folder):
    """Return what `_write_contents` wrote, with memory-mapped images and columns."""
    contents = json.loads((folder / "index.json").read_text())
    for kind in ("images", "columns"):
        contents[kind] = {name: np.load(folder / f"{kind}.{name}.npy", mmap_mode="r") for name in contents[kind]}
    return contents | {"starts": np.load(folder / "starts.npy")}


def _write_contents(folder, starts, **contents):
    """Write to a temporary folder and rename it, so that a reader never sees half an index."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".index-"))
    for kind in ("images", "columns"):
        for name, array in contents[kind].items():
            np.save(temporary / f"{kind}.{name}.npy", array)
        contents[kind] = list(contents[kind])
    np.save(temporary / "starts.npy", starts)
    (temporary / "index.json").write_text(json.dumps(contents))
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        for path in temporary.iterdir():
            path.unlink()
        temporary.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Reading every record once


@dataclass
class _Episode:
    """The contents of one record: images {camera: i64 [T, 3]}, columns {name: [T, ...]}, metadata {name: value}."""

    num_steps: int
    images: dict
    columns: dict
    metadata: dict
    instructions: list  # [T] texts


def scan_shards(shards, features, salt, on_fault=raise_fault):
    """Read every record once. Return the fields of an `RldsIndex` that depend on them, without episodes of no step.

    shards: {path: number of records}; features: those of `read_features`; salt: bytes that the fingerprint depends on
    too. Calls `on_fault` with a ValueError for each fault; a record with an error is left out.
    """
    digest = hashlib.sha256(salt)
    episodes = []
    for shard, (path, expected) in enumerate(shards.items()):
        num_records = 0
        for offset, payload, crc in read_records(path, on_fault):
            num_records += 1
            digest.update(struct.pack("<QI", len(payload), crc))
            place = f"{path}: record at byte {offset - 12}"
            number = f"(episode {len(episodes)})"
            try:
                episode = _read_episode(payload, features, shard, offset)
            except ValueError as error:
                on_fault(ValueError(f"{place}: {error} {number}. Repair or remove this episode."))
                continue
            for oddity in _oddities(episode):
                on_fault(ValueError(f"{place}: {oddity} {number}. Is it meant to be so?"), warning=True)
            if episode.num_steps:
                episode.instructions = episode.instructions[:1]  # the others need not stay in memory
                episodes.append(episode)
        if num_records != expected:
            on_fault(ValueError(f"{path}: {num_records} whole records, {expected} in dataset_info.json. {COPY_AGAIN}"))
    if not episodes:
        on_fault(ValueError(f"no episode in the shards {', '.join(map(str, shards))}. {COPY_AGAIN}"))
    return _join_episodes(episodes) | {"fingerprint": digest.hexdigest()[:16]}


def _join_episodes(episodes):
    """Return starts, images, columns, instructions and metadata of all episodes, as the fields of an `RldsIndex`."""
    first = episodes[0] if episodes else _Episode(0, {}, {}, {}, [])
    return {
        "starts": np.cumsum([0, *(episode.num_steps for episode in episodes)]),
        "images": {name: np.concatenate([episode.images[name] for episode in episodes]) for name in first.images},
        "columns": {name: np.concatenate([episode.columns[name] for episode in episodes]) for name in first.columns},
        "instructions": [episode.instructions[0] if episode.instructions else "" for episode in episodes],
        "metadata": {name: [episode.metadata[name] for episode in episodes] for name in first.metadata},
    }


def _read_episode(payload, features, shard, offset):
    """Return the `_Episode` in a record's payload, which lies at byte `offset` of shard number `shard`.

    Raises ValueError naming the feature that is not as in features.json.
    """
    example = parse_example(payload)
    missing = sorted(features.keys() - example.keys())
    if missing:
        raise ValueError(f"no feature {', '.join(missing)}; there is {', '.join(sorted(example))}")
    num_steps = _count_steps(example, features)
    episode = _Episode(num_steps, {}, {}, {}, [])
    for name, (kind, dtype, shape) in features.items():
        value = example[name]
        if name.startswith("episode_metadata/"):
            episode.metadata[_last_name(name)] = _metadata_value(name, value, payload, kind, dtype, shape)
            continue
        _check_values(name, value, kind, dtype, num_steps * math.prod(shape if kind == "tensor" else ()))
        if kind == "image":
            locations = [(shard, offset + start, length) for start, length in value]
            episode.images[_last_name(name)] = np.array(locations, np.int64)
        elif kind == "tensor":
            episode.columns[_last_name(name)] = value.reshape(num_steps, *shape).astype(dtype)
        elif name == "steps/language_instruction":
            for step, (start, length) in enumerate(value):
                episode.instructions.append(_decode_text(f"{name} at step {step}", payload[start : start + length]))
    return episode


def _count_steps(example, features):
    """Return the number of steps of an episode, from its first text or image: these have one entry per step."""
    for name, (kind, _, _) in features.items():
        if kind != "tensor" and name.startswith("steps/"):
            return len(example[name])
    raise ValueError("a step has neither image nor text, so its number is unknown")


def _oddities(episode):
    """Yield a text for all that is odd about an episode although one can train with it."""
    if episode.num_steps == 0:
        yield "the episode has 0 steps and is left out"
    if episode.num_steps == 1:
        yield "the episode has 1 steps"
    if any(not text.strip() for text in episode.instructions):
        yield "the instruction is empty"
    actions = episode.columns.get("action")
    if actions is not None and episode.num_steps > 1 and (actions == actions[0]).all():
        yield f"the action never changes in {episode.num_steps} steps"


def _decode_text(name, raw):
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"feature {name} is no UTF-8 text: {raw[:80]}, {error.reason}") from error


def _metadata_value(name, value, payload, kind, dtype, shape):
    """Return one episode's value as JSON holds it; tensors may be stored as packed numbers or as raw bytes."""
    if isinstance(value, list):
        _check_values(name, value, "text", dtype, 1)
        start, length = value[0]
        raw = payload[start : start + length]
        if kind == "text":
            return _decode_text(name, raw)
        value = np.frombuffer(raw, dtype)
    _check_values(name, value, kind, dtype, 1 if shape == () else len(value))
    return value[0].item() if shape == () else value.tolist()


def _check_values(name, value, kind, dtype, count):
    """Raise ValueError unless a feature has `count` values of the type that features.json states."""
    if isinstance(value, list):
        stored = "bytes"
    else:
        stored = _number_type(value.dtype.name)
    expected = _number_type(dtype) if kind == "tensor" else "bytes"
    if (len(value), stored) != (count, expected):
        raise ValueError(f"feature {name} has {len(value)} values ({stored}), features.json wants {count} ({expected})")


def _number_type(dtype):
    return "floats" if "float" in dtype else "integers"
