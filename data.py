"""RLDS in, batches out, without TensorFlow.

An RLDS data set is a folder of TFRecord shards with one `tf.train.Example` per episode, as tensorflow-datasets writes
it. One pass over the shards verifies every checksum and notes where each JPEG lies (shard, offset, length); the small
columns (actions, states, ...) go to .npy files. Training then reads the JPEGs in place: a true global shuffle and
random access, no copy of the data, no TensorFlow.
Left out: other image encodings, nested sequences, splits but `train`.

    python data.py data/libero_tiny          # what is in a data set: counts, shapes, statistics, a contact sheet
    python data.py data/libero_tiny --check  # all that is wrong with it, in one go; exit status 1 if anything

Axes: S steps of a data set, E episodes, H chunk steps, A action size, B batch, C cameras, P codes per step.
"""

import functools
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
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, JpegImagePlugin

from common import load_tensors, read_json

try:
    import simplejpeg  # optional: the same pixels, decoded faster
except ImportError:
    simplejpeg = None

CACHE = Path("~/.cache/latent-actions")  # where indices and labels live unless --cache says otherwise
CROP_AREA = 0.9  # share of the area that a training crop, and the centre crop at evaluation, keeps
INDEX_FORMAT = 2  # raise when the cached files change their meaning
COPY_AGAIN = "Copy it again from where it came."
RLDS_CODES = 16  # codebook size behind `latent_idx` in the RLDS release of the paper


# ----------------------------------------------------------------------------------------------------------------------
# TFRecord framing and the protobuf wire format of tf.train.Example


def stop(fault, trains=False):
    """What opening does about a fault, an exception: raises it, unless one can train with it."""
    if not trains:
        raise fault


def read_records(path, tell=stop):
    """Yields (offset of the payload, payload, checksum word) of each TFRecord in `path`.

    Framing: u64 length, u32 masked CRC-32C of it, payload, u32 masked CRC-32C of the payload, all little-endian.
    Tells of a ValueError naming the file and the offset when a record is cut short or a checksum does not match. Should
    that not raise, reading goes on behind a wrong payload, and ends where the length of a record is unknown.
    """
    at, size = 0, path.stat().st_size
    with open(path, "rb") as file:
        while at < size:
            header = file.read(12)
            length, length_crc = struct.unpack("<QI", header) if len(header) == 12 else (0, None)
            if length_crc is not None and masked_crc(header[:8]) != length_crc:
                return tell(ValueError(f"{path}: wrong checksum of the record length at byte {at}. {COPY_AGAIN}"))
            if at + 16 + length > size:
                return tell(ValueError(f"{path}: the record at byte {at} is cut short at byte {size}. {COPY_AGAIN}"))
            payload, (word,) = file.read(length), struct.unpack("<I", file.read(4))
            if masked_crc(payload) == word:
                yield at + 12, payload, word
            else:
                tell(ValueError(f"{path}: wrong checksum of the record at byte {at}. {COPY_AGAIN}"))
            at += 16 + length


def masked_crc(buffer):
    """TFRecord's masked CRC-32C of some bytes, as int."""
    import google_crc32c  # only indexing needs it, so a machine that only trains on a cached index does without

    crc = google_crc32c.value(buffer)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(buf, at, end):
    """(number, where it ends) of the varint at `at`; ValueError unless it has at most 64 bits and ends by `end`."""
    value = 0
    for shift, byte in enumerate(buf[at : min(at + 10, end)]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80 and value < 1 << 64:
            return value, at + shift + 1
    raise ValueError(f"protobuf number at byte {at} has more than 64 bits or reaches past its message")


def _fields(buf, at, end):
    """Yields (field number, start, end) of each length-delimited field of a protobuf message in buf[at:end]."""
    while at < end:
        tag, at = _varint(buf, at, end)
        if tag & 7 != 2:
            raise ValueError(f"protobuf wire type {tag & 7} at byte {at}, where a tf.train.Example has only type 2")
        length, at = _varint(buf, at, end)
        if at + length > end:
            raise ValueError(f"protobuf field at byte {at} reaches {at + length - end} bytes past its message")
        yield tag >> 3, at, at + length
        at += length


def parse_example(buf):
    """Reads one serialized tf.train.Example.

    Returns {feature name: value}: a list of (start, length) within `buf` for a bytes_list, f32 [n] for a float_list,
    i64 [n] for an int64_list. Raises ValueError when the bytes are not such a message.
    """
    values = {}
    for _, features, features_end in _fields(buf, 0, len(buf)):
        for _, entry, entry_end in _fields(buf, features, features_end):
            parts = {number: span for number, *span in _fields(buf, entry, entry_end)}
            if parts.keys() != {1, 2}:
                raise ValueError(f"protobuf entry at byte {entry} is not a feature's name and its values")
            for kind, start, end in _fields(buf, *parts[2]):
                values[buf[slice(*parts[1])].decode()] = _feature_list(buf, kind, start, end)
    return values


def _feature_list(buf, kind, start, end):
    if kind == 1:
        return [(a, b - a) for _, a, b in _fields(buf, start, end)]
    if start == end:
        return np.zeros(0, np.float32 if kind == 2 else np.int64)
    _, start, last = next(_fields(buf, start, end))
    if last != end or kind not in (2, 3):
        raise ValueError(f"protobuf field at byte {start} is no packed list of floats or integers")
    if kind == 2:
        return np.frombuffer(buf[start:end], "<f4")
    numbers = []
    while start < end:
        number, start = _varint(buf, start, end)
        numbers.append(number - (1 << 64) if number >> 63 else number)
    return np.array(numbers, np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# The index of one data set


def version_dir(path):
    """The folder with `features.json`: `path` itself or its only version folder.

    Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no such data directory: {path}. Give --data a folder with an RLDS data set (features.json, *.tfrecord-*)."
        )
    found = [path] if (path / "features.json").exists() else sorted(p.parent for p in path.glob("*/features.json"))
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found)} RLDS data sets ({', '.join(p.name for p in found) or 'no features.json'}); "
            "give --data the folder of one."
        )
    return found[0]


def read_features(directory):
    """tensorflow-datasets' features.json as {name in the records: ("image" | "text" | "tensor", dtype, shape)}."""
    found = {}

    def walk(node, name):
        if "featuresDict" in node:
            for key, child in node["featuresDict"]["features"].items():
                walk(child, f"{name}/{key}" if name else key)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], name)
        elif "text" in node:
            found[name] = ("text", "str", ())
        else:
            kind = "image" if "image" in node else "tensor"
            shape = tuple(int(n) for n in node[kind].get("shape", {}).get("dimensions", []))
            found[name] = (kind, node[kind].get("dtype", "float32"), shape)

    walk(read_json(directory / "features.json"), "")
    short = [name.rsplit("/", 1)[-1] for name in found if name.startswith("steps/")]
    if len(set(short)) < len(short):
        raise ValueError(f"{directory}: two features of a step share a name: {sorted(short)}")
    return found


def shard_paths(directory, tell=stop):
    """{path: number of records} of the train split's shards in order, by tensorflow-datasets' own metadata.

    Raises if there is none; tells of missing ones.
    """
    info = read_json(directory / "dataset_info.json")
    split = next((s for s in info["splits"] if s["name"] == "train"), None)
    if split is None:
        raise ValueError(f"{directory}: no split called 'train', only {[s['name'] for s in info['splits']]}")
    n = len(split["shardLengths"])
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    words = {"DATASET": info["name"], "SPLIT": "train", "FILEFORMAT": info.get("fileFormat", "tfrecord")}
    paths = [directory / template.format(SHARD_X_OF_Y=f"{i:05d}-of-{n:05d}", **words) for i in range(n)]
    missing = [str(p) for p in paths if not p.exists()]
    if missing or not paths:
        fault = f"{directory}: {len(missing)} of {n} shards are missing: {missing[:3]}. Copy the data set again."
        tell(FileNotFoundError(fault))
    return {path: int(length) for path, length in zip(paths, split["shardLengths"]) if path.exists()}


@dataclass
class Index:
    """Where everything in one RLDS data set lies. Built once by `open_index`, then read from the cache.

    images: {camera: i64 [S, 3] of (shard, byte offset, length)}; columns: {name: [S, ...]}, memory-mapped;
    starts: i64 [E + 1], episode e has the steps starts[e]..starts[e + 1]; instructions: [E] texts;
    metadata: {name: [E]}; fingerprint: hash of features and record checksums, the same wherever the data lies;
    sizes: {camera: (height, width)} where features.json says so.
    """

    name: str
    directory: Path
    cache: Path
    fingerprint: str
    shards: list
    starts: np.ndarray
    images: dict
    columns: dict
    instructions: list
    metadata: dict
    sizes: dict = field(default_factory=dict)

    def __len__(self):
        return int(self.starts[-1])

    def where(self, step):
        """(file, "step n of episode m") of a step, for messages."""
        episode = int(np.searchsorted(self.starts, step, "right")) - 1
        file = self.shards[next(iter(self.images.values()))[step][0]] if self.images else self.directory
        return file, f"step {step - self.starts[episode]} of episode {episode}"

    def jpeg(self, camera, step):
        """The stored bytes of one image; ValueError when the file has become too short."""
        shard, offset, length = (int(n) for n in self.images[camera][step])
        with open(self.shards[shard], "rb") as file:
            found = os.pread(file.fileno(), length, offset)
        if len(found) < length:
            raise ValueError(f"the file ends before byte {offset + length}; it was cut after it was indexed")
        return found

    def image(self, camera, step):
        """u8 [height, width, 3]. Raises ValueError with shard, episode, step and camera where there is no such JPEG."""
        try:
            pixels = decode_jpeg(self.jpeg(camera, step))
            if pixels.shape[:2] != self.sizes.get(camera, pixels.shape[:2]):
                raise ValueError(f"it is {pixels.shape[:2]}, but features.json has {self.sizes[camera]}")
        except Exception as error:  # whatever a decoder raises
            file, place = self.where(step)
            raise ValueError(f"{file}: camera {camera} at {place} cannot be used: {error}. {COPY_AGAIN}") from error
        return pixels

    def jpeg_options(self, camera):
        """How the images were stored: {"size", "qtables", "subsampling"}, so evaluation can store its own alike."""
        image = Image.open(io.BytesIO(self.jpeg(camera, 0)))
        tables = [list(table) for _, table in sorted(image.quantization.items())]
        return {"size": image.height, "qtables": tables, "subsampling": JpegImagePlugin.get_sampling(image)}


def decode_jpeg(stored):
    """u8 [height, width, 3] of JPEG bytes, by simplejpeg where it is installed."""
    if simplejpeg:
        return simplejpeg.decode_jpeg(stored, "RGB", fastdct=False, fastupsample=False)
    return np.asarray(Image.open(io.BytesIO(stored), formats=["JPEG"]).convert("RGB"))


def open_index(path, cache=CACHE, tell=None):
    """The `Index` of the RLDS data set at `path`, from `cache` if it was indexed before and no shard has changed since.

    Raises FileNotFoundError (no data), ValueError (corrupt, truncated or inconsistent data: file and byte offset).
    tell: called with each fault instead of raising it; then every shard is read and nothing is written.
    """
    directory = version_dir(path)
    try:
        shards, features = shard_paths(directory, tell or stop), read_features(directory)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: damaged features.json or dataset_info.json: {error!r}. {COPY_AGAIN}") from error
    versioned = re.fullmatch(r"\d+\.\d+\.\d+", directory.name)
    name = (directory.parent if versioned else directory).resolve().name  # the metadata's own can be odd: liber_o10
    stored = (directory / "features.json").read_bytes()
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    key = hashlib.sha256(stored + json.dumps([INDEX_FORMAT, name, stamps]).encode()).hexdigest()[:16]
    folder = Path(cache).expanduser() / f"{name}-{key}"
    shapes = {n.rsplit("/", 1)[-1]: shape for n, (kind, _, shape) in features.items() if kind == "image"}
    sizes = {camera: shape[:2] for camera, shape in shapes.items() if min(shape, default=0) > 0}
    make = functools.partial(Index, name, directory, folder, shards=list(shards), sizes=sizes)
    if tell:
        return make(**_scan(shards, features, stored, tell))
    if not (folder / "index.json").exists():
        _write_index(folder, **_scan(shards, features, stored, stop))
    info = json.loads((folder / "index.json").read_text())
    for kind in ("images", "columns"):
        info[kind] = {name: np.load(folder / f"{kind}.{name}.npy", mmap_mode="r") for name in info[kind]}
    return make(starts=np.load(folder / "starts.npy"), **info)


def open_indices(paths, cache=CACHE):
    """`open_index` of each path. Raises ValueError when two have one name: statistics are kept by name."""
    indices = [open_index(path, cache) for path in paths]
    names = [index.name for index in indices]
    if len(set(names)) < len(names):
        where = f"{names}, in {', '.join(map(str, paths))}"
        raise ValueError(f"data holds two data sets of one name, {where}; rename one: statistics are kept by name")
    return indices


def _scan(shards, features, salt, tell):
    """Reads every record once. Returns the contents of an `Index`, without episodes of no step.

    Tells of what is wrong with a record; should that not raise, it is left out too.
    """
    digest, lengths = hashlib.sha256(salt), []
    images, columns, instructions, metadata = {}, {}, [], {}
    for number, (path, expected) in enumerate(shards.items()):
        records = 0
        for records, (offset, payload, word) in enumerate(read_records(path, tell), 1):
            digest.update(struct.pack("<QI", len(payload), word))
            place, episode = f"{path}: record at byte {offset - 12}", f"(episode {len(lengths)})"
            try:
                steps, *found, texts = _read_episode(parse_example(payload), features, payload, number, offset)
            except ValueError as error:
                tell(ValueError(f"{place}: {error} {episode}. Repair or remove this episode."))
                continue
            for remark in _remarks(steps, found[1], texts):
                tell(ValueError(f"{place}: {remark} {episode}. Is it meant to be so?"), trains=True)
            if steps:
                lengths.append(steps)
                instructions.append(texts[0] if texts else "")
                for lists, values in zip((images, columns, metadata), found):
                    for name, value in values.items():
                        lists.setdefault(name, []).append(value)
        if records != expected:
            tell(ValueError(f"{path}: {records} whole records, {expected} in dataset_info.json. {COPY_AGAIN}"))
    if not lengths:
        tell(ValueError(f"no episode in the shards {', '.join(map(str, shards))}. {COPY_AGAIN}"))
    arrays = [{name: np.concatenate(parts) for name, parts in lists.items()} for lists in (images, columns)]
    contents = dict(zip(("images", "columns"), arrays), starts=np.cumsum([0, *lengths]))
    return contents | dict(fingerprint=digest.hexdigest()[:16], instructions=instructions, metadata=metadata)


def _read_episode(example, features, payload, shard, offset):
    """(number of steps, image locations, columns, metadata, instruction of each step) of one parsed episode.

    Raises ValueError naming the feature that is not as in features.json.
    """
    missing = sorted(features.keys() - example.keys())
    if missing:
        raise ValueError(f"no feature {', '.join(missing)}; there is {', '.join(sorted(example))}")
    listed = (name for name, (kind, *_) in features.items() if kind != "tensor" and name.startswith("steps/"))
    counted = next(listed, None)  # texts and images are one entry a step
    if counted is None:
        raise ValueError("a step has neither image nor text, so its number is unknown")
    steps = len(example[counted])
    images, columns, metadata, texts = {}, {}, {}, []
    for name, (kind, dtype, shape) in features.items():
        value, short = example[name], name.rsplit("/", 1)[-1]
        if name.startswith("episode_metadata/"):
            metadata[short] = _metadata(name, value, payload, kind, dtype, shape)
            continue
        _check_values(name, value, kind, dtype, steps * math.prod(shape if kind == "tensor" else ()))
        if kind == "image":
            images[short] = np.array([(shard, offset + start, length) for start, length in value], np.int64)
        elif kind == "tensor":
            columns[short] = value.reshape(steps, *shape).astype(dtype)
        elif name == "steps/language_instruction":
            texts = [_text(f"{name} at step {n}", payload[a : a + size]) for n, (a, size) in enumerate(value)]
    return steps, images, columns, metadata, texts


def _remarks(steps, columns, texts):
    """Yields what is odd about an episode that one can train with."""
    if steps < 2:
        yield f"the episode has {steps} steps" + ("" if steps else " and is left out")
    if "" in map(str.strip, texts):
        yield "the instruction is empty"
    if steps > 1 and "action" in columns and (columns["action"] == columns["action"][0]).all():
        yield f"the action never changes in {steps} steps"


def _text(name, raw):
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"feature {name} is no UTF-8 text: {raw[:80]}, {error.reason}") from error


def _metadata(name, value, payload, kind, dtype, shape):
    """One episode's value as JSON holds it; tensors may be stored as packed numbers or as raw bytes."""
    if isinstance(value, list):
        _check_values(name, value, "text", dtype, 1)
        start, length = value[0]
        raw = payload[start : start + length]
        if kind == "text":
            return _text(name, raw)
        value = np.frombuffer(raw, dtype)
    _check_values(name, value, kind, dtype, 1 if shape == () else len(value))
    return value[0].item() if shape == () else value.tolist()


def _check_values(name, value, kind, dtype, count):
    found = "bytes" if isinstance(value, list) else "floats" if value.dtype.kind == "f" else "integers"
    expected = "bytes" if kind != "tensor" else "floats" if "float" in dtype else "integers"
    if (len(value), found) != (count, expected):
        raise ValueError(f"feature {name} has {len(value)} values ({found}), features.json wants {count} ({expected})")


def _write_index(folder, starts, **info):
    """Writes to a temporary folder and renames it, so that a reader never sees half an index."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".index-"))
    for kind in ("images", "columns"):
        for name, array in info[kind].items():
            np.save(temporary / f"{kind}.{name}.npy", array)
        info[kind] = list(info[kind])
    np.save(temporary / "starts.npy", starts)
    (temporary / "index.json").write_text(json.dumps(info))
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        for path in temporary.iterdir():
            path.unlink()
        temporary.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Standardisation, statistics, normalisation


def standardise(action):
    """[..., A] as stored (gripper -1 open, +1 close) -> gripper in [0, 1] with 1 = open, as OpenVLA does for LIBERO."""
    return np.concatenate([action[..., :-1], 1.0 - np.clip(action[..., -1:], 0.0, 1.0)], axis=-1).astype(np.float32)


def to_robosuite(action):
    """[..., A] standardised (gripper in [0, 1], 1 = open) -> the simulator's sign (-1 open, +1 close)."""
    return np.concatenate([action[..., :-1], -np.sign(2.0 * action[..., -1:] - 1.0)], axis=-1).astype(np.float32)


def statistics(index):
    """{"action": {...}, "proprio": {...}, "num_transitions", "num_trajectories"} over all steps in OpenVLA's layout.

    Video without actions or states lacks these entries. Raises ValueError where one of them is not a finite number.
    """
    columns = {ours: name for ours, name in (("action", "action"), ("proprio", "state")) if name in index.columns}
    result = {}
    for name, column in columns.items():
        for fault in _not_finite(index, column):
            raise ValueError(fault)
        values = index.columns[column]
        result[name] = _moments(standardise(values) if name == "action" else values)
    if "action" in result:  # the gripper passes through unchanged
        result["action"]["mask"] = [True] * (index.columns["action"].shape[1] - 1) + [False]
    return result | {"num_transitions": len(index), "num_trajectories": len(index.starts) - 1}


def _not_finite(index, name):
    """Yields a text for each episode in which column `name` holds a number that is not finite."""
    column = index.columns[name]
    wrong = np.argwhere(~np.isfinite(column.reshape(len(column), math.prod(column.shape[1:]))))  # (step, dimension)
    episodes = np.searchsorted(index.starts, wrong[:, 0], "right")
    for episode in np.unique(episodes):
        (step, dimension), count = wrong[episodes == episode][0], (episodes == episode).sum()
        file, place = index.where(step)
        yield (
            f"{file}: {name} of {index.name} is {column[step].flat[dimension]} at {place}, "
            f"dimension {dimension} ({count} such values in the episode). Repair or remove this episode."
        )


def statistics_hash(stats):
    """16 hex digits of one data set's statistics, so that a run can tell its own from another's."""
    return hashlib.sha256(json.dumps(stats, sort_keys=True).encode()).hexdigest()[:16]


def _moments(x):
    x = np.asarray(x, np.float64)
    rows = {
        "mean": x.mean(0),
        "std": x.std(0),
        "min": x.min(0),
        "max": x.max(0),
        "q01": np.quantile(x, 0.01, 0),
        "q99": np.quantile(x, 0.99, 0),
    }
    return {name: row.tolist() for name, row in rows.items()}


def normalise(x, stats):
    """bounds_q99: clip(2 (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1); unmasked dimensions pass, constant ones become 0.

    x: [..., n] in physical units; stats: one of the two dictionaries that `statistics` makes. Returns f32 [..., n].
    """
    low, high, mask = _bounds(stats)
    scaled = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)
    scaled = np.where(np.equal(stats["min"], stats["max"]), 0.0, scaled)
    return np.where(mask, scaled, x).astype(np.float32)


def unnormalise(x, stats):
    """The inverse of `normalise` inside its bounds. x: [..., n]. Returns f32 [..., n] in physical units."""
    low, high, mask = _bounds(stats)
    return np.where(mask, (x + 1) / 2 * (high - low + 1e-8) + low, x).astype(np.float32)


def _bounds(stats):
    low, high = np.asarray(stats["q01"]), np.asarray(stats["q99"])
    return low, high, np.asarray(stats.get("mask", np.ones(len(low), bool)))


# ----------------------------------------------------------------------------------------------------------------------
# Latent labels


@dataclass
class Labels:
    """Image-based latent actions of every step: codes int [S, P]; vectors f16 [S, P, d]; delta frames apart."""

    codes: np.ndarray
    vectors: np.ndarray
    delta: int
    num_codes: int
    quantised: bool  # vectors are codebook rows, not the encoder's continuous output
    fingerprint: str  # of the latent action model

    @property
    def dim(self):
        return self.vectors.shape[2]


def label_path(index, data):
    """Where labels of `index` are looked for: shipped beside the data, else beside the cached index."""
    shipped = Path(data) / "labels.safetensors"
    return shipped if shipped.exists() else index.cache / "labels.safetensors"


def load_labels(index, path, delta=0):
    """Labels from the file `path` (made by `latent.py label`), else from the data's own `latent_idx` / `latent_z`.

    delta: the horizon that is expected, 0: any. Data that carries its own labels does not say theirs, so there it must
    be stated. Returns None when there are no labels. Raises ValueError when they were made from other data or with
    another delta.
    """
    path = Path(path)
    if path.exists():
        try:
            tensors, info = load_tensors(path)
            codes, vectors = tensors["codes"].numpy(), tensors["vectors"].numpy()
            labels = Labels(codes, vectors, int(info["delta"]), int(info["num_codes"]), False, info["lam"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} holds no labels: {error}. Make them again: python latent.py label") from error
        if info["data"] != index.fingerprint:
            raise ValueError(
                f"{path} labels the data set with fingerprint {info['data']}, but {index.directory} has "
                f"{index.fingerprint}. Make them again: python latent.py label"
            )
        if not len(codes) == len(vectors) == len(index):
            raise ValueError(f"{path} labels {len(codes)} steps, not {len(index)}. Make it again: latent.py label")
    elif "latent_idx" in index.columns:
        codes = index.columns["latent_idx"]
        vectors = index.columns["latent_z"].reshape(*codes.shape, -1)
        if not delta:
            raise ValueError(
                f"{index.name} carries latent_idx but not its horizon; state it (paper's release: --delta 11)"
            )
        labels = Labels(codes, vectors, delta, RLDS_CODES, True, "rlds")
    else:
        return None
    if delta and labels.delta != delta:
        raise ValueError(f"{path} was made with delta {labels.delta}, but --delta is {delta}")
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# Samples and batches


class Steps(torch.utils.data.Dataset):
    """An endless, globally shuffled stream of the steps of one or more data sets.

    Draw number p is a pure function of (seed, p): epoch p // epoch_length is a fresh permutation. A weight w lets a
    data set occur w times per epoch (a fraction: a random part of it).
    """

    def __init__(self, indices, seed=0, weights=None, episodes=None):
        """episodes: per index the episodes to use (default: all)."""
        self.indices, self.seed, self.weights = indices, seed, weights or [1.0] * len(indices)
        self.steps = [steps_of(index, chosen) for index, chosen in zip(indices, episodes or [None] * len(indices))]
        self.epoch_length = sum(round(w * len(s)) for w, s in zip(self.weights, self.steps))
        self._order = functools.lru_cache(2)(self._order)

    def _order(self, epoch):
        """i64 [epoch_length, 2] of (data set, step): the order of one epoch."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        rows = []
        for number, (steps, weight) in enumerate(zip(self.steps, self.weights)):
            count = round(weight * len(steps))
            picked = np.concatenate([rng.permutation(steps) for _ in range(count // len(steps) + 1)])[:count]
            rows.append(np.stack([np.full(count, number), picked], 1))
        return rng.permutation(np.concatenate(rows))

    def names(self, positions):
        """Which samples these are, for messages: file, step and episode of each."""
        found = (self._order(position // self.epoch_length)[position % self.epoch_length] for position in positions)
        return "; ".join("{}: {}".format(*self.indices[number].where(step)) for number, step in found)

    def __len__(self):
        return 2**62  # endless: the loop decides when to stop

    def __getitem__(self, position):
        epoch, row = divmod(position, self.epoch_length)
        return self.sample(*(int(n) for n in self._order(epoch)[row]))


class Chunks(Steps):
    """The training samples of a policy. Each item holds

    images      list of u8 [h, w, 3], one per camera      proprio  f32 [N] normalised
    actions     f32 [H, A] normalised                      valid    bool [H], False past the end of the episode
    text        str, the instruction                       draws    f32 [C, 6] in [0, 1): what augmentation uses
    codes       i64 [H, P] and vectors f32 [H, P, d], when labels are given
    """

    def __init__(self, indices, stats, cameras, chunk, seed=0, labels=None, weights=None, episodes=None):
        """stats: one `statistics` per index; labels: None, or one `Labels` per index; the rest as for `Steps`."""
        super().__init__(indices, seed, weights, episodes)
        self.stats, self.labels, self.cameras, self.chunk = stats, labels, cameras, chunk
        _check_same_sizes(indices, cameras)
        self.actions = [normalise(standardise(i.columns["action"]), s["action"]) for i, s in zip(indices, stats)]
        self.proprio = [normalise(i.columns["state"], s["proprio"]) for i, s in zip(indices, stats)]

    def __getitem__(self, position):
        draws = np.random.default_rng([self.seed, 1, position]).random((len(self.cameras), 6), np.float32)
        return super().__getitem__(position) | {"draws": torch.from_numpy(draws)}

    def sample(self, number, step):
        """The sample at `step` of data set `number`, without augmentation draws."""
        index = self.indices[number]
        actions, valid, rows = action_chunk(self.actions[number], index.starts, step, self.chunk)
        item = {
            "images": [torch.from_numpy(index.image(camera, step).copy()) for camera in self.cameras],
            "proprio": torch.from_numpy(self.proprio[number][step]),
            "actions": torch.from_numpy(actions),
            "valid": torch.from_numpy(valid),
            "text": index.instructions[int(np.searchsorted(index.starts, step, "right")) - 1],
        }
        if self.labels is not None:
            labels = self.labels[number]
            item["codes"] = torch.from_numpy(labels.codes[rows].astype(np.int64))  # [H, P]
            item["vectors"] = torch.from_numpy(labels.vectors[rows].astype(np.float32))  # [H, P, d]
        return item


def action_chunk(actions, starts, step, chunk):
    """The chunk that begins at `step`, of actions f32 [S, A]: actions f32 [H, A], valid bool [H], rows i64 [H].

    Steps past the end of the episode are not valid: no motion, the gripper as it was last; rows stay on the last step.
    """
    end, steps = int(starts[np.searchsorted(starts, step, "right")]), np.arange(step, step + chunk)
    rows, valid = np.minimum(steps, end - 1), steps < end
    found = actions[rows]
    found[~valid, :-1] = 0.0
    return found, valid, rows


def later(index, steps, delta):
    """The steps, i64 like `steps`, `delta` after these; near the end of an episode its last one."""
    return np.minimum(np.add(steps, delta), index.starts[np.searchsorted(index.starts, steps, "right")] - 1)


def steps_of(index, episodes):
    """i64 [n]: the steps of some episodes (None: of all)."""
    if episodes is None:
        return np.arange(len(index))
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(index.starts[e], index.starts[e + 1]) for e in episodes)])


def _check_same_sizes(indices, cameras):
    """All data sets must have the cameras and agree on the sizes of action and state. Raises ValueError."""
    for index in indices:
        missing = [c for c in cameras if c not in index.images]
        if missing:
            raise ValueError(
                f"{index.name} has no camera {missing}; it has {list(index.images)}. Choose with --cameras."
            )
        for name in ("action", "state"):
            if name not in index.columns:
                raise ValueError(f"{index.name} has no steps feature '{name}'; it has {list(index.columns)}")
            if index.columns[name].shape[1:] != indices[0].columns[name].shape[1:]:
                raise ValueError(
                    f"{name} has shape {index.columns[name].shape[1:]} in {index.name} but "
                    f"{indices[0].columns[name].shape[1:]} in {indices[0].name}; they cannot be mixed."
                )
        sizes = [(index.image(camera, 0).shape, indices[0].image(camera, 0).shape) for camera in cameras]
        if any(ours != first for ours, first in sizes):
            raise ValueError(f"{index.name} stores images of other sizes than {indices[0].name}: {sizes}")
        if np.abs(index.columns["action"][:, -1]).max() > 1:
            raise ValueError(
                f"the last action of {index.name} leaves [-1, 1]; it must be the gripper, -1 open, 1 close"
            )


def split_episodes(index, val_fraction, seed):
    """(training, held-out) episode numbers; at least one is held out when val_fraction > 0."""
    episodes = len(index.starts) - 1
    order = np.random.default_rng([seed, 2]).permutation(episodes)
    held = min(max(1, round(val_fraction * episodes)), episodes - 1) if val_fraction > 0 else 0
    return np.sort(order[held:]), np.sort(order[:held])


class StepBatches(torch.utils.data.Sampler):
    """Sample positions of this rank's micro-batches: of the global batch of step s, rows rank::world, cut in order."""

    def __init__(self, first_step, last_step, global_batch, micro_batch, rank=0, world=1):
        self.steps, self.global_batch, self.micro_batch, self.rank, self.world = (
            range(first_step, last_step),
            global_batch,
            micro_batch,
            rank,
            world,
        )

    def __iter__(self):
        for step in self.steps:
            rows = range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world)
            for at in range(0, len(rows), self.micro_batch):
                yield list(rows[at : at + self.micro_batch])

    def __len__(self):
        return len(self.steps) * (self.global_batch // self.world // self.micro_batch)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels: crop, resize and colour on the batch


def prepare_images(images, size, draws=None):
    """u8 images -> f32 [B, C, 3, size, size] in [-1, 1], on the images' device.

    images: list of C tensors u8 [B, h, w, 3]; draws: f32 [B, C, 6] in [0, 1) for training, None for evaluation.
    With draws, OpenVLA-OFT's augmentation: random crop of 90 % of the area, brightness +-0.2, contrast and saturation
    0.8 to 1.2, hue +-0.05. Without, the centre crop of the same area.
    """
    frames = []
    for number, batch in enumerate(images):
        pixels = batch.permute(0, 3, 1, 2).float() / 255  # [B, 3, h, w]
        u = None if draws is None else draws[:, number]
        pixels = _crop(pixels, size, u)
        frames.append(pixels if u is None else jitter(pixels, u[:, 2:]))
    return torch.stack(frames, 1) * 2 - 1


def _crop(pixels, size, u):
    """Crops CROP_AREA of the image, at u[:, :2] of the free room or the centre, and resizes bilinearly."""
    side = CROP_AREA**0.5
    room = 1 - side
    centre = torch.zeros(len(pixels), 2, device=pixels.device) if u is None else (2 * u[:, :2] - 1) * room
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta.diagonal(0, 1, 2).fill_(side)
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, (len(pixels), 3, size, size), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


@functools.cache
def _yiq(device):
    """RGB to YIQ and back, f32 [3, 3] each, made on the device once: a copy or an inverse there would wait for it."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)


def jitter(pixels, u):
    """Brightness, contrast, saturation and hue, drawn from u f32 [B, 4] in [0, 1). pixels: f32 [B, 3, h, w] in [0, 1].

    Saturation and hue are a scaling and a rotation of the chroma plane of YIQ, so that all is one affine map per image.
    """
    brightness, contrast, saturation = 0.4 * u[:, 0] - 0.2, 0.8 + 0.4 * u[:, 1], 0.8 + 0.4 * u[:, 2]
    hue = (0.1 * u[:, 3] - 0.05) * 2 * torch.pi  # rad
    to_yiq, from_yiq = _yiq(pixels.device)
    chroma = torch.zeros(len(pixels), 3, 3, device=pixels.device)
    chroma[:, 0, 0].fill_(1)
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * hue.cos()
    chroma[:, 2, 1] = saturation * hue.sin()
    chroma[:, 1, 2] = -chroma[:, 2, 1]
    colour = from_yiq @ chroma @ to_yiq  # [B, 3, 3]
    matrix = colour * contrast[:, None, None]
    mean = pixels.mean((2, 3))[:, :, None]  # [B, 3, 1], what contrast leaves in place
    offset = colour @ (mean + brightness[:, None, None]) - matrix @ mean  # [B, 3, 1]
    flat = torch.baddbmm(offset, matrix, pixels.flatten(2))  # [B, 3, h * w]
    return flat.clamp_(0, 1).view_as(pixels)


# ----------------------------------------------------------------------------------------------------------------------
# What is in a data set


@dataclass
class Config:
    data: tyro.conf.Positional[Path]
    """folder of an RLDS data set"""
    cache: Path = CACHE
    """where indices are kept"""
    check: bool = False
    """only list all that is wrong with the data and its labels; exit status 1 when there is something"""


def check(path, cache=CACHE):
    """Prints all that is wrong with the data set at `path` and what is odd but trains. Returns the number of faults.

    Reads every record, image, number and text, and the labels if there are any; writes nothing. Raises only where there
    is no telling what belongs to the data set.
    """
    found = {False: [], True: []}

    def tell(fault, trains=False):
        found[trains].append(f"{'odd, but it trains' if trains else 'wrong'}: {fault}")

    def attempt(function, *given):
        try:
            function(*given)
        except ValueError as fault:
            tell(fault)

    index = open_index(path, cache, tell)
    labels = None if found[False] else label_path(index, path)  # records that are lost would not match them
    for camera in index.images:
        for step in range(len(index)):
            attempt(index.image, camera, step)
    for name in index.columns:
        for fault in _not_finite(index, name):
            tell(fault)
    if {"action", "state"} <= index.columns.keys():
        attempt(_check_same_sizes, [index], [])
        actions = index.columns["action"]
        for number in np.flatnonzero((actions == actions[0]).all(0)):
            tell(f"{index.directory}: dimension {number} of action is {actions[0, number]} at all steps", trains=True)
    if labels and labels.exists():
        attempt(load_labels, index, labels)
    counts = f"{len(index.starts) - 1} episodes, {len(index)} steps, {len(index) * len(index.images)} images"
    lines = found[False] + found[True]
    print(*lines, f"{index.name}: {len(lines) or 'nothing'} found in {counts}", sep="\n")
    return len(found[False])


def contact_sheet(index, episodes=8):
    """PIL image: one column per episode, for each camera its first and its last frame."""
    chosen = np.unique(np.linspace(0, len(index.starts) - 2, episodes).astype(int))
    rows = [(camera, which) for camera in index.images for which in ("first", "last")]
    size = 160
    sheet = Image.new("RGB", (len(chosen) * size, len(rows) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for x, episode in enumerate(chosen):
        for y, (camera, which) in enumerate(rows):
            step = index.starts[episode] if which == "first" else index.starts[episode + 1] - 1
            sheet.paste(Image.fromarray(index.image(camera, step)).resize((size, size)), (x * size, y * size))
            draw.text(
                (x * size + 4, y * size + 4),
                f"episode {episode}, {camera}, {which}",
                fill="white",
                stroke_width=1,
                stroke_fill="black",
            )
    return sheet


def main():
    """Prints episodes, steps, instructions, shapes and statistics of a data set; writes a contact sheet."""
    config = tyro.cli(Config, description=__doc__)
    if config.check:
        raise SystemExit(int(check(config.data, config.cache) > 0))
    index = open_index(config.data, config.cache)
    lengths = np.diff(index.starts)
    print(
        f"{index.name}: {len(lengths)} episodes, {len(index)} steps ({lengths.min()} to {lengths.max()} an episode), "
        f"fingerprint {index.fingerprint}"
    )
    for text in sorted(set(index.instructions)):
        print(f"  {index.instructions.count(text):5d} episodes: {text}")
    for camera in index.images:
        print(
            f"  camera {camera}: {index.image(camera, 0).shape}, "
            f"{index.images[camera][:, 2].mean() / 1024:.1f} KiB a frame"
        )
    for name, column in index.columns.items():
        print(f"  column {name}: {column.dtype} {column.shape[1:]}")
    for name, rows in statistics(index).items():
        if isinstance(rows, dict):
            for row in ("q01", "mean", "q99"):
                print(f"  {name:7s} {row:4s} " + " ".join(f"{value:8.4f}" for value in rows[row]))
    sheet = index.cache / "contact_sheet.png"
    contact_sheet(index).save(sheet)
    print(f"contact sheet: {sheet}")


if __name__ == "__main__":
    main()
