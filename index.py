"""The one interface behind which every data format lies.

An `Index` knows the features of a data set by their paths ("observation/image", "action"), where each frame is stored,
and reads numbers and texts from files of the cache, only what is asked for: its memory does not grow with the data. It
does not know what the features mean: data.py reads it through a description (dataspec.py). A format is one file that
makes a subclass (rlds.py, lerobot_data.py, video.py).

Axes: S steps of a data set, E episodes.
"""

import functools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import locked, make_folder

CACHE = Path("~/.cache/latent-actions")  # where indices and labels are kept unless --cache says otherwise
COPY_AGAIN = "Copy it again from where it came."
INDEX_AGAIN = "Remove index.json in its folder, and the data is indexed again."
ROWS = 1 << 16  # steps read at once where all are read
LARGEST_ROW = 4096  # numbers of a step; larger tensors, as of depth in metres, would fill the cache
SMALL = 8 << 20  # bytes of a column that is kept in memory once it is read
VERSION = re.compile(r"\d+\.\d+\.\d+")  # folder of a version of an RLDS data set
INDEX_FORMAT = 6  # raise when the cached files change their meaning


class Feature(NamedTuple):
    """One value of every step."""

    kind: str  # "image", "number", "text", or "unread" for another
    dtype: str
    shape: tuple  # of one step; images: (height, width, channels), None where it is not known
    names: tuple = ()  # of the numbers of a step, where the metadata has them


class Column:
    """A row of numbers of every step, [S, ...], in a file of the cache or of labels.

    column[steps] reads the rows of an int, a slice, or a list or array of ints; np.asarray(column) reads all. A small
    file is read once and stays in memory, read-only. A larger one is not mapped into memory either, where every page
    that was read once would stay.
    """

    def __init__(self, path, dtype, shape, start=0):
        """shape: (S, ...) of the rows, which begin at byte `start` of the file."""
        self.path = path
        self.dtype = np.dtype(dtype)
        self.shape = tuple(shape)
        self.row = math.prod(self.shape[1:]) * self.dtype.itemsize  # bytes
        self.start = start
        self.file = open(path, "rb", buffering=0)
        self.rows = None  # all of them, of a small file

    def __len__(self):
        return self.shape[0]

    @property
    def ndim(self):
        """The number of axes, with that of the steps."""
        return len(self.shape)

    def __getitem__(self, steps):
        if len(self) * self.row <= SMALL:
            return self._small_rows(steps)
        if isinstance(steps, slice):
            start, stop, stride = steps.indices(len(self))
            return self._read(start, max(start, stop)) if stride == 1 else self[np.arange(start, stop, stride)]
        if isinstance(steps, (int, np.integer)):
            step = int(steps) + (len(self) if steps < 0 else 0)
            return self._read(step, step + 1)[0]
        steps = np.asarray(steps, np.int64)
        if not len(steps):
            return self._read(0, 0)
        bounds = steps.tolist() if len(steps) < 64 else [int(steps.min()), int(steps.max())]  # what is faster
        first, last = min(bounds), max(bounds)
        if last - first < 4 * len(steps):  # as of a chunk of actions
            return self._read(first, last + 1)[steps - first]
        return np.concatenate([self._read(step, step + 1) for step in map(int, steps)])

    def _small_rows(self, steps):
        if self.rows is None:
            self.rows = self._read(0, len(self))
            self.rows.flags.writeable = False
        if isinstance(steps, (slice, int, np.integer)):
            return self.rows[steps]
        steps = np.asarray(steps, np.int64)
        if len(steps) and steps.min() < 0:
            raise IndexError(f"step {steps.min()} in {self.path}")
        return self.rows[steps]

    def _read(self, start, stop):
        """Return the rows from `start` to before `stop`."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"steps {start} to {stop} of {len(self)} in {self.path}")
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        unread = rows.reshape(-1).view(np.uint8)
        while len(unread):
            count = os.preadv(self.file.fileno(), [unread], self.start + stop * self.row - len(unread))
            if not count:
                raise ValueError(f"{self.path} has become shorter since it was opened")
            unread = unread[count:]
        return rows

    def __array__(self, dtype=None, copy=None):
        return self[:] if dtype is None else self[:].astype(dtype)

    def __reduce__(self):
        return Column, (self.path, self.dtype, self.shape, self.start)  # an open file cannot be sent to another process

    def reshape(self, *shape):
        """Return the same numbers as rows of another shape. shape: (S, ...), as of an array."""
        column = Column.__new__(Column)
        row = math.prod(shape[1:]) * self.dtype.itemsize
        vars(column).update(vars(self) | {"shape": shape, "row": row, "rows": None})  # with the same open file
        return column


class Texts(NamedTuple):
    """A text of every step: few different ones, and which of them each step has."""

    unique: list
    numbers: Column  # i32 [S], or an array

    def __getitem__(self, step):
        return self.unique[self.numbers[step]]

    def used(self):
        """Return all texts that some step has, sorted."""
        used = np.zeros(len(self.unique), bool)
        for start in range(0, len(self.numbers), ROWS):
            used[self.numbers[start : start + ROWS]] = True
        return sorted(self.unique[number] for number in np.flatnonzero(used))


class OnDemand(Mapping):
    """A dictionary whose values are made when they are asked for first."""

    def __init__(self, makers):
        """makers: {name: function without arguments}."""
        self.makers = makers
        self.made = {}

    def __getitem__(self, name):
        if name not in self.made:
            self.made[name] = self.makers[name]()
        return self.made[name]

    def __iter__(self):
        return iter(self.makers)

    def __len__(self):
        return len(self.makers)


@dataclass
class Index:
    """What a data set holds, and where.

    starts: i64 [E + 1], episode e has the steps starts[e] to starts[e + 1] - 1; features: {path: Feature}; columns:
    {path: Column} (or arrays [S, ...]); texts: {path: Texts}; metadata: {name: [E values]}; fingerprint: hash of the
    contents, the same wherever the data lies. A subclass adds `read_image`, `file_of` and, where images are not PNG,
    `storage_options`.
    """

    name: str
    directory: Path
    cache: Path
    fingerprint: str
    starts: np.ndarray
    features: dict
    columns: dict = field(default_factory=dict)
    texts: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)

    def __len__(self):
        return int(self.starts[-1])

    @property
    def num_episodes(self):
        """E."""
        return len(self.starts) - 1

    @property
    def folders(self):
        """The folders in which a description, labels and a tokenizer of the data set are looked for, in order."""
        folder = named_folder(self.directory)
        return [folder.parent, folder] if VERSION.fullmatch(folder.name) else [folder]

    def find_shipped(self, name):
        """Return the file or folder `name` next to the data set: the first that exists, else where it would be."""
        places = [folder / name for folder in self.folders]
        return next((place for place in places if place.exists()), places[0])

    def paths(self, kind):
        """Return the paths of the features of a kind."""
        return [path for path, feature in self.features.items() if feature.kind == kind]

    def read_image(self, path, step):
        """Return an image as stored, u8 [height, width, 1 or 3]. Raise any error where it cannot be used."""
        raise NotImplementedError

    def file_of(self, step):
        """Return the file that a step is stored in, for messages."""
        raise NotImplementedError

    def storage_options(self, path):
        """Return Pillow's save options {"format": ..., ...} that store an image as this feature's images are stored.

        PNG unless a format knows better: how a video was compressed cannot be done to a single image.
        """
        return {"format": "PNG"}

    def image(self, path, step):
        """Return an image u8 [height, width, 3]; grey ones are repeated to three channels.

        Raise ValueError with file, feature, step and episode where it cannot be used.
        """
        try:
            pixels = self.read_image(path, step)
            shape, expected = pixels.shape, self.features[path].shape
            if any(size not in (found, None) for found, size in zip(shape, expected, strict=True)):
                raise ValueError(f"it is {shape}, but the metadata has {expected}")
        except Exception as error:  # whatever a decoder raises
            file, place = self.locate(step)
            raise ValueError(f"{file}: camera {path} at {place} cannot be used: {error}. {COPY_AGAIN}") from error
        return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, 2)

    def episode_of(self, step):
        """Return the number of the episode that a step belongs to."""
        return int(np.searchsorted(self.starts, step, "right")) - 1

    def locate(self, step):
        """Return (file, "step n of episode m") of a step, for messages."""
        episode = self.episode_of(step)
        return self.file_of(step), f"step {step - self.starts[episode]} of episode {episode}"


def named_folder(path):
    """Return a path of the same folder that ends in its name, which "." and ".." do not."""
    return path.resolve() if path.name in ("", "..") else path


def later_steps(index, steps, delta):
    """Return the steps, i64 like `steps`, that are `delta` after these; near an episode's end its last step."""
    return np.minimum(np.add(steps, delta), index.starts[np.searchsorted(index.starts, steps, "right")] - 1)


def episode_steps(index, episodes):
    """Return the steps i64 [n] of some episodes."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(index.starts[e], index.starts[e + 1]) for e in episodes)])


def split_episodes(index, val_fraction, seed):
    """Return (training, held-out) episode numbers, sorted; at least one is held out when val_fraction > 0."""
    order = np.random.default_rng([seed, 2]).permutation(index.num_episodes)
    held = min(max(1, round(val_fraction * index.num_episodes)), index.num_episodes - 1) if val_fraction > 0 else 0
    return np.sort(order[held:]), np.sort(order[:held])


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def raise_fault(fault, warning=False):
    """Raise a fault, unless it is only a warning: how data is opened for training.

    `--check` gives every reader a function that collects faults instead, and reading goes on behind them.
    """
    if not warning:
        raise fault


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def cache_folder(cache, name):
    """Return the folder `name` in the cache. Raise ValueError when that is in a home and there is none."""
    try:
        return Path(cache).expanduser() / name
    except RuntimeError as error:
        raise ValueError(f"the cache is {cache}, but there is no home: {error} Choose a folder with --cache") from error


def changed_cache(config):
    """Return the cache of a command line where it is not the default one, for commands that are printed; else None."""
    return None if config.cache == CACHE else config.cache


class IndexWriter:
    """Writes arrays that grow by an episode at a time, and what an `Index` needs next to them, in bounded memory.

    Everything goes to a temporary folder, which `finish` renames: a reader never sees half an index.
    """

    def __init__(self, folder):
        """folder: where the index will be. Raise PermissionError naming --cache when it cannot be written."""
        self.folder = folder
        make_folder(folder.parent, "--cache")
        self.temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".index-"))
        self.arrays = {}  # {(kind, path): (open file, dtype, shape of a row)}
        self.texts = {}  # {path: {text: number}}
        self.lengths = []

    def append(self, kind, path, rows):
        """Append rows [n, ...] to an array of a kind ("columns", or one of the format's own)."""
        rows = np.ascontiguousarray(rows)
        if (kind, path) not in self.arrays:
            file = open(self.temporary / f"{len(self.arrays)}.bin", "wb")
            self.arrays[kind, path] = file, rows.dtype.str, rows.shape[1:]
        file, dtype, shape = self.arrays[kind, path]
        if (rows.dtype.str, rows.shape[1:]) != (dtype, shape):
            raise ValueError(f"{path} has rows {rows.dtype.str} {rows.shape[1:]} after rows {dtype} {shape}")
        file.write(rows.data)

    def append_texts(self, path, texts):
        """Append a text of each step."""
        numbers = self.texts.setdefault(path, {})
        self.append("texts", path, np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int32))

    def end_episode(self, steps):
        """Note that an episode of so many steps has been appended."""
        self.lengths.append(steps)

    def finish(self, metadata=None, **info):
        """Write `metadata` {name: [E values]} and `info`, both JSON values, and rename the folder."""
        arrays = []
        for (kind, path), (file, dtype, shape) in self.arrays.items():
            file.close()
            arrays.append({"kind": kind, "path": path, "file": Path(file.name).name, "dtype": dtype, "shape": shape})
        np.save(self.temporary / "starts.npy", np.cumsum([0, *self.lengths]))
        info["arrays"] = arrays
        info["texts"] = self._write_lists("texts", {path: list(numbers) for path, numbers in self.texts.items()})
        info["metadata"] = self._write_lists("metadata", metadata or {})
        (self.temporary / "index.json").write_text(json.dumps(info))
        try:
            self.temporary.rename(self.folder)
        except OSError:  # it exists
            if not (self.folder / "index.json").exists():  # else another process was faster
                for path in sorted(self.temporary.iterdir(), key=_is_last):
                    path.replace(self.folder / path.name)
            self.discard()

    def _write_lists(self, kind, lists):
        """Write each list to a file of its own, so that only those that are used need be read; return {name: file}."""
        files = {}
        for name, values in lists.items():
            files[name] = f"{kind}-{len(files)}.json"
            (self.temporary / files[name]).write_text(json.dumps(values))
        return files

    def discard(self):
        """Remove what was written."""
        for file, *_ in self.arrays.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _is_last(path):
    return path.name == "index.json"  # whose presence says that the index is complete


def read_index(folder):
    """Return what an `IndexWriter` wrote: {"starts", "columns", "texts", "metadata", its kinds of arrays, its info}.

    Raise ValueError where a file of the folder has another size than when it was written.
    """
    info = json.loads((folder / "index.json").read_text())
    starts = np.load(folder / "starts.npy")
    contents = {"columns": {}, "texts": {}}
    for array in info.pop("arrays"):
        column = Column(folder / array["file"], array["dtype"], (int(starts[-1]), *array["shape"]))
        size = column.path.stat().st_size
        if size != len(column) * column.row:
            raise ValueError(f"{column.path} has {size} bytes, not {len(column) * column.row}. {INDEX_AGAIN}")
        contents.setdefault(array["kind"], {})[array["path"]] = column
    files = info.pop("texts")
    makers = {
        path: functools.partial(_read_texts, folder / files[path], numbers)
        for path, numbers in contents["texts"].items()
    }
    contents["texts"] = OnDemand(makers)
    makers = {name: functools.partial(_read_list, folder / file) for name, file in info.pop("metadata").items()}
    return contents | info | {"metadata": OnDemand(makers), "starts": starts}


def _read_texts(path, numbers):
    return Texts(_read_list(path), numbers)


def _read_list(path):
    return json.loads(path.read_text())


def cached_contents(folder, scan, on_fault=None):
    """Return `read_index` of a folder of the cache, made by scan(writer, on_fault) if it is not there yet.

    With `on_fault`, which is called with each fault instead of raising it, everything is read anew and nothing is kept.
    """
    if on_fault:
        with tempfile.TemporaryDirectory() as temporary:
            _scan_into(Path(temporary) / "index", scan, on_fault)
            contents = read_index(Path(temporary) / "index")
            for lists in (contents["texts"], contents["metadata"]):
                dict(lists)  # reads them while their files are there
            return contents
    if not (folder / "index.json").exists():
        make_folder(folder.parent, "--cache")
        lock = folder.with_name(f".{folder.name}.lock")
        with locked(lock, wait=True):  # of all processes of a run one reads the data
            if not (folder / "index.json").exists():
                _scan_into(folder, scan, raise_fault)
    return read_index(folder)


def _scan_into(folder, scan, on_fault):
    writer = IndexWriter(folder)
    try:
        scan(writer, on_fault)
    finally:
        writer.discard()
