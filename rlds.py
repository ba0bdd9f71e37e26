"""The data format RLDS, read without TensorFlow.

An RLDS data set (arXiv 2111.02767) is a folder of TFRecord shards with one `tf.train.Example` per episode, as
tensorflow-datasets writes it. One pass over the shards verifies every checksum and notes where each image lies (shard,
offset, length); numbers and texts go to the cache. Training then reads the images in place: a global shuffle and random
access without a copy of the data. Features of a kind that is not read (nested sequences, ragged or very large tensors,
audio) are left alone.
Left out: splits other than `train`.

Axes: S steps of a data set, T steps of an episode, E episodes.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from files import read_json
from images import decode_image
from index import (
    CACHE,
    COPY_AGAIN,
    INDEX_FORMAT,
    LARGEST_ROW,
    VERSION,
    Feature,
    Index,
    cache_folder,
    cached_contents,
    named_folder,
    raise_fault,
)

FORMAT = "RLDS (features.json and *.tfrecord-* files)"  # for messages


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
    int64_list. Raise ValueError where the bytes are not such a message.
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
    return _varints(np.frombuffer(buffer[start:end], np.uint8), start)


def _varints(raw, start):
    """Return the integers i64 [n] of packed varints, bytes u8 [m] from byte `start` of a record on."""
    if not len(raw):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(raw < 0x80)
    firsts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - firsts + 1
    # ten bytes hold 70 bits, of which the last six must be 0
    if not len(ends) or ends[-1] + 1 != len(raw) or lengths.max() > 10 or (raw[ends[lengths == 10]] > 1).any():
        raise ValueError(f"protobuf numbers at byte {start} have more than 64 bits or reach past their message")
    numbers = np.zeros(len(ends), np.uint64)
    for place in range(lengths.max()):
        longer = lengths > place
        part = raw[firsts[longer] + place].astype(np.uint64) & np.uint64(0x7F)
        numbers[longer] |= part << np.uint64(7 * place)
    return numbers.view(np.int64)


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
    """Return (number, byte behind it) of the varint at `start`. Raise ValueError past `end` and beyond 64 bits."""
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

    Raise ValueError where it does not hold exactly one data set.
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
    """Return features.json as {name in the records: Feature}, without the kinds that are not read.

    Names that do not begin with "steps/" belong to whole episodes; of these, numbers and texts are read. Raise
    ValueError where it is no JSON object.
    """
    features = {}
    for key, node in read_json(directory / "features.json")["featuresDict"]["features"].items():
        features |= _leaf_features(node, key)
    return {name: feature for name, feature in features.items() if _of_steps(name) or feature.kind != "image"}


def _of_steps(name):
    return name.startswith("steps/")


def _leaf_features(node, name):
    """Yield (name, Feature) of every feature that is read below a node of features.json called `name`."""
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from _leaf_features(child, f"{name}/{key}")
    elif "sequence" in node and name == "steps":
        yield from _leaf_features(node["sequence"]["feature"], name)
    elif "text" in node:
        yield name, Feature("text", "str", ())
    elif "classLabel" in node:
        yield name, Feature("number", "int64", ())
    elif "image" in node and len(_shape(node["image"])) == 3:
        yield name, Feature("image", node["image"].get("dtype", "uint8"), _shape(node["image"]))
    elif "tensor" in node:
        yield from _tensor_feature(node["tensor"], name)


def _tensor_feature(tensor, name):
    dtype = tensor.get("dtype", "float32")
    shape = _shape(tensor)
    if dtype in ("string", "object"):
        if shape == ():
            yield name, Feature("text", "bytes", ())  # which may be no text
    elif tensor.get("encoding", "none").lower() not in ("none", "bytes"):
        return  # compressed
    elif dtype == "uint8" and len(shape) == 3 and shape[2] in (1, 3) and None not in shape:
        yield name, Feature("image", dtype, shape)
    elif re.fullmatch(r"bool|float(16|32|64)|u?int(8|16|32|64)", dtype):
        if not _of_steps(name) or None not in shape and math.prod(shape) <= LARGEST_ROW:
            yield name, Feature("number", dtype, shape)


def _shape(node):
    sizes = node.get("shape", {}).get("dimensions", [])
    return tuple(int(size) if int(size) > 0 else None for size in sizes)


def step_path(name):
    """Return the path of a step's feature: "observation/state" of the record's "steps/observation/state"."""
    return name.removeprefix("steps/")


def shard_paths(directory, on_fault=raise_fault):
    """Return {path: number of records} of the shards of the split `train`, in the order of dataset_info.json.

    Calls `on_fault` with a FileNotFoundError where shards are missing. Raise ValueError where there is no such split.
    """
    info = read_json(directory / "dataset_info.json")
    split = next((s for s in info["splits"] if s["name"] == "train"), None)
    if split is None:
        raise ValueError(f"{directory}: no split called 'train', only {[s['name'] for s in info['splits']]}")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(f"{directory}: its file format is {file_format}; write the data as tfrecord")
    lengths = split["shardLengths"]
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    names = {"DATASET": info["name"], "SPLIT": "train", "FILEFORMAT": file_format}
    shards = [f"{number:05d}-of-{len(lengths):05d}" for number in range(len(lengths))]
    paths = [directory / template.format(SHARD_X_OF_Y=shard, **names) for shard in shards]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        fault = f"{directory}: {len(missing)} of {len(paths)} shards are missing: {missing[:3]}. {COPY_AGAIN}"
        on_fault(FileNotFoundError(fault))
    return {path: int(length) for path, length in zip(paths, lengths) if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# The index of one data set


@dataclass
class RldsIndex(Index):
    """An RLDS data set. `open_index` builds it once and reads it from the cache later.

    shards: [files]; images: {path: i64 [S, 3] of (number of the shard, byte offset, length)} of encoded images; pixels:
    {path: u8 [S, height, width, channels]} of images that are stored as tensors.
    """

    shards: list = field(default_factory=list)
    images: dict = field(default_factory=dict)
    pixels: dict = field(default_factory=dict)

    def file_of(self, step):
        """Return the shard that a step is stored in; without encoded images, the folder of the data set."""
        if not self.images:
            return self.directory
        locations = next(iter(self.images.values()))
        return self.shards[locations[step][0]]

    def stored_bytes(self, path, step):
        """Return the stored bytes of one image. Raise ValueError where the file has become too short."""
        shard, offset, length = (int(n) for n in self.images[path][step])
        with open(self.shards[shard], "rb") as file:
            stored = os.pread(file.fileno(), length, offset)
        if len(stored) < length:
            raise ValueError(f"the file ends before byte {offset + length}; it was cut after it was indexed")
        return stored

    def read_image(self, path, step):
        """Return an image u8 [height, width, 1 or 3] of an 8-bit feature. Raise where it cannot be decoded."""
        if path in self.pixels:
            return np.array(self.pixels[path][step])
        return decode_image(self.stored_bytes(path, step), self.features[path].shape[2])

    def storage_options(self, path):
        """Return {"format": "JPEG", "qtables": ..., "subsampling": ...} of the first image, or {"format": "PNG"}."""
        if path in self.pixels:
            return {"format": "PNG"}
        image = Image.open(io.BytesIO(self.stored_bytes(path, 0)))
        if image.format != "JPEG":
            return {"format": "PNG"}
        tables = [list(table) for _, table in sorted(image.quantization.items())]
        return {"format": "JPEG", "qtables": tables, "subsampling": JpegImagePlugin.get_sampling(image)}


def open_index(path, cache=CACHE, on_fault=None):
    """Return the `RldsIndex` of the data set at `path`, read from `cache` if no shard has changed since it was indexed.

    on_fault: function(fault, warning=False), called with each fault instead of raising it, and with what is only odd;
    then every shard is read and nothing is written. Raise FileNotFoundError (missing shards) and ValueError with file
    and byte (corrupt, truncated or inconsistent data).
    """
    directory = find_version_folder(path)
    try:
        shards = shard_paths(directory, on_fault or raise_fault)
        features = read_features(directory)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{directory}: damaged features.json or dataset_info.json: {error!r}. {COPY_AGAIN}") from error
    named = named_folder(directory)
    is_version = VERSION.fullmatch(named.name)
    name = (named.parent if is_version else named).resolve().name  # dataset_info.json's can be odd: liber_o10
    salt = (directory / "features.json").read_bytes()
    folder = _cache_folder(cache, name, salt, shards)

    def scan(writer, on_fault):
        scan_shards(shards, features, salt, writer, on_fault)

    contents = cached_contents(folder, scan, on_fault)
    of_steps = {step_path(name): feature for name, feature in features.items() if _of_steps(name)}
    texts_of_episodes = {path: Feature("text", "str", ()) for path in contents["texts"]}
    return RldsIndex(name, directory, folder, features=of_steps | texts_of_episodes, shards=list(shards), **contents)


def _cache_folder(cache, name, salt, shards):
    """Return the folder of an index; its name depends on features.json and on size and time of each shard."""
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    key = hashlib.sha256(salt + json.dumps([INDEX_FORMAT, name, stamps]).encode()).hexdigest()[:16]
    return cache_folder(cache, f"{name}-{key}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading every record once


def scan_shards(shards, features, salt, writer, on_fault=raise_fault):
    """Read every record once and write the index; episodes of no step are left out.

    shards: {path: number of records}; features: those of `read_features`; salt: bytes that the fingerprint depends on
    too. Calls `on_fault` with a ValueError for each fault; a record with an error is left out.
    """
    digest = hashlib.sha256(salt)
    metadata = {}
    for shard, (path, expected) in enumerate(shards.items()):
        num_records = 0
        for offset, payload, crc in read_records(path, on_fault):
            num_records += 1
            digest.update(struct.pack("<QI", len(payload), crc))
            place = f"{path}: record at byte {offset - 12}"
            number = f"(episode {len(writer.lengths)})"
            try:
                episode = read_episode(payload, features, shard, offset)
            except ValueError as error:
                on_fault(ValueError(f"{place}: {error} {number}. Repair or remove this episode."))
                continue
            if episode.num_steps < 2:
                left_out = " and is left out" if episode.num_steps == 0 else ""
                oddity = f"the episode has {episode.num_steps} steps{left_out}"
                on_fault(ValueError(f"{place}: {oddity} {number}. Is it meant to be so?"), warning=True)
            if episode.num_steps:
                _append_episode(writer, episode, metadata)
        if num_records != expected:
            on_fault(ValueError(f"{path}: {num_records} whole records, {expected} in dataset_info.json. {COPY_AGAIN}"))
    if not writer.lengths:
        on_fault(ValueError(f"no episode in the shards {', '.join(map(str, shards))}. {COPY_AGAIN}"))
    writer.finish(metadata=metadata, fingerprint=digest.hexdigest()[:16])


@dataclass
class Episode:
    """The contents of one record: arrays {(kind, path): [T, ...]}, texts {path: [T]}, metadata {name: value}."""

    num_steps: int
    arrays: dict = field(default_factory=dict)
    texts: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)


def _append_episode(writer, episode, metadata):
    for (kind, path), rows in episode.arrays.items():
        writer.append(kind, path, rows)
    for path, texts in episode.texts.items():
        writer.append_texts(path, texts)
    for name, value in episode.metadata.items():
        metadata.setdefault(name, []).append(value)
    writer.end_episode(episode.num_steps)


def read_episode(payload, features, shard, offset):
    """Return the `Episode` in a record's payload, which lies at byte `offset` of shard number `shard`.

    Texts of the metadata are also texts of every step. Raise ValueError naming the feature that is not as in
    features.json.
    """
    example = parse_example(payload)
    missing = sorted(features.keys() - example.keys())
    if missing:
        raise ValueError(f"no feature {', '.join(missing)}; there is {', '.join(sorted(example))}")
    episode = Episode(_count_steps(example, features))
    for name, feature in features.items():
        value = example[name]
        if _of_steps(name):
            _read_step_feature(episode, name, feature, value, payload, (shard, offset))
        else:
            found = _metadata_value(name, value, payload, feature)
            episode.metadata[name.removeprefix("episode_metadata/")] = found
            if feature.kind == "text":
                episode.texts[name] = [found] * episode.num_steps
    return episode


def _read_step_feature(episode, name, feature, value, payload, place):
    """Add a feature of every step to an episode. place: (number of the shard, byte of the payload in it)."""
    path = step_path(name)
    stored_as_bytes = isinstance(value, list)
    if feature.kind == "text":
        _check_values(name, value, "bytes", episode.num_steps)
        episode.texts[path] = [
            _decode_text(f"{name} at step {step}", payload[start : start + length], feature)
            for step, (start, length) in enumerate(value)
        ]
    elif feature.kind == "image" and stored_as_bytes:
        _check_values(name, value, "bytes", episode.num_steps)
        shard, offset = place
        locations = [(shard, offset + start, length) for start, length in value]
        episode.arrays["images", path] = np.array(locations, np.int64).reshape(-1, 3)
    else:
        if stored_as_bytes and len(value) == episode.num_steps:
            parts = [np.frombuffer(payload[start : start + length], feature.dtype) for start, length in value]
            value = np.concatenate([np.zeros(0, feature.dtype), *parts])
        _check_values(name, value, _number_type(feature.dtype), episode.num_steps * math.prod(feature.shape))
        kind = "pixels" if feature.kind == "image" else "columns"
        rows = value.reshape(episode.num_steps, *feature.shape).astype(feature.dtype)
        episode.arrays[kind, path] = rows


def _count_steps(example, features):
    """Return the number of steps of an episode, from a feature that has one entry per step, else from its numbers."""
    numbers = None
    for name in features:
        if not _of_steps(name):
            continue
        if isinstance(example[name], list):
            return len(example[name])
        numbers = name
    if numbers is None:
        raise ValueError("a step has no feature that is read, so the number of steps is unknown")
    return len(example[numbers]) // math.prod(features[numbers].shape)


def _decode_text(name, raw, feature):
    try:
        return raw.decode(errors="replace" if feature.dtype == "bytes" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"feature {name} is no UTF-8 text: {raw[:80]}, {error.reason}") from error


def _metadata_value(name, value, payload, feature):
    """Return one episode's value as JSON holds it; tensors may be stored as packed numbers or as raw bytes."""
    if feature.kind == "text" or isinstance(value, list):
        _check_values(name, value, "bytes", 1)
        start, length = value[0]
        raw = payload[start : start + length]
        if feature.kind == "text":
            return _decode_text(name, raw, feature)
        value = np.frombuffer(raw, feature.dtype)
    _check_values(name, value, _number_type(feature.dtype), 1 if feature.shape == () else len(value))
    return value[0].item() if feature.shape == () else value.tolist()


def _check_values(name, value, expected, count):
    """Raise ValueError unless a feature has `count` values of the type that features.json states."""
    stored = "bytes" if isinstance(value, list) else _number_type(value.dtype.name)
    if (len(value), stored) != (count, expected):
        raise ValueError(f"feature {name} has {len(value)} values ({stored}), features.json wants {count} ({expected})")


def _number_type(dtype):
    return "floats" if "float" in dtype else "integers"
