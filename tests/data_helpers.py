"""Helpers of the data tests: changed copies of RLDS data sets, what `data.py --check` prints, samples and batches."""

import shutil
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import fuzz
import numpy as np
import torch

import batches
import data
from dataspec import split_part
from index import Feature, Index, Texts
from inspection import check_dataset
from rlds import parse_example, read_records


def copy_rlds(folder, target):
    """Copy a data set into the folder `target`, the same in every byte but newer; return the copy's folder."""
    return shutil.copytree(folder, target / folder.name, copy_function=shutil.copyfile)


def change_episode(folder, target, changes):
    """Copy a data set and change the second episode of its first shard (episode 1); return the folder and the shard.

    changes: {end of a feature's name: function of its value, a list of bytes or an array; None removes it}.
    """
    folder = copy_rlds(folder, target)
    path = next(folder.glob("*/*.tfrecord-00000-*"))
    payloads = [payload for _, payload, _ in read_records(path)]
    features = {}
    for name, value in parse_example(payloads[1]).items():
        if isinstance(value, list):
            value = [payloads[1][start : start + length] for start, length in value]
        for end, change in changes.items():
            if name.endswith(end):
                value = change(value)
        if value is not None:
            features[name] = value
    payloads[1] = fuzz.example(features)
    path.write_bytes(b"".join(map(fuzz.record, payloads)))
    return folder, path


def replace_step(step, value):
    """Return a function that returns the same list or array with a new value at one step, or another row."""
    return lambda values: [*values[:step], value, *values[step + 1 :]]


def replace_number(place, value):
    """Return a function that returns the same array with a new number at one place."""
    return lambda values: np.where(np.arange(len(values)) == place, np.float32(value), values)


def run_check(folder, capsys):
    """Return (number of errors, printed lines) of `check_dataset`, which must neither change nor write a file."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cache = folder.parent / "unwritten"
    errors = check_dataset(data.Config(folder, cache=cache), data.open_dataset)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not cache.exists()
    return errors, capsys.readouterr().out.splitlines()


def make_chunks(dataset, cameras=("image",), chunk=8, **options):
    """Return `ActionChunks` over one data set, by default with its main camera and 8 steps."""
    return batches.ActionChunks([dataset], [cameras], chunk, **options)


def change_index(dataset, **changes):
    """Return a `Dataset` over a copy of the index, with the same description, in which some fields are exchanged."""
    return data.Dataset(replace(dataset.index, **changes), dataset.spec, dataset.source)


def change_spec(dataset, **changes):
    """Return a `Dataset` over the same index with some fields of the description exchanged."""
    return data.Dataset(dataset.index, replace(dataset.spec, **changes), "a test")


def equal_batches(a, b):
    """Return whether two batches are equal in every bit."""
    if a.keys() != b.keys():
        return False
    for name in a:
        if name == "images":
            equal = len(a[name]) == len(b[name]) and all(map(torch.equal, a[name], b[name]))
        elif torch.is_tensor(a[name]):
            equal = torch.equal(a[name], b[name])
        else:
            equal = a[name] == b[name]
        if not equal:
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Data sets that lie in memory


@dataclass
class MadeIndex(Index):
    """An index without files: each feature of `pictures` {path: [height, width, channels]} is the same at all steps."""

    pictures: dict = field(default_factory=dict)

    def read_image(self, path, step):
        """Return the feature's picture."""
        return self.pictures[path]

    def file_of(self, step):
        """Return the folder."""
        return self.directory


def made_index(folder, columns=(), texts=(), pictures=(), lengths=(30, 30), **more_features):
    """Return a `MadeIndex` of columns {path: [S, ...]}, texts {path: one or a list of S} and pictures {path: array}."""
    steps = sum(lengths)
    columns, texts, pictures = dict(columns), dict(texts), dict(pictures)
    features = {path: Feature("number", array.dtype.name, array.shape[1:]) for path, array in columns.items()}
    features |= {path: Feature("image", array.dtype.name, array.shape) for path, array in pictures.items()}
    features |= {path: Feature("text", "str", ()) for path in texts} | more_features
    made_texts = {}
    for path, text in texts.items():
        listed = [text] * steps if isinstance(text, str) else text
        unique = sorted(set(listed))
        made_texts[path] = Texts(unique, np.array([unique.index(each) for each in listed], np.int32))
    starts = np.cumsum([0, *lengths])
    return MadeIndex("made", folder, folder / "none", "0", starts, features, columns, made_texts, {}, pictures)


def fitting_index(folder, spec, steps=60, seed=0):
    """Return a `MadeIndex` with all features of a spec: uniform numbers, grippers open or closed, grey pictures."""
    rng = np.random.default_rng(seed)
    sizes = {}
    for part in spec.state + spec.action:
        path, cut = split_part(part)
        sizes[path] = max(sizes.get(path, 0), cut.stop)
    columns = {path: rng.uniform(-0.5, 2, (steps, size)).astype(np.float32) for path, size in sizes.items()}
    for gripper in spec.grippers:
        path, number = action_place(spec, gripper.index)
        columns[path][:, number] = rng.choice([gripper.open, gripper.closed], steps)
    pictures = {path: np.full((64, 64, 3), 90, np.uint8) for path in spec.cameras.values()}
    lengths = (steps // 2, steps - steps // 2)
    return made_index(folder, columns, {spec.instruction: "put the bowl on the plate"}, pictures, lengths)


def action_place(spec, dimension):
    """Return (feature path, number in it) of a dimension of the action, whose parts have the form path[a:b]."""
    for part in spec.action:
        path, cut = split_part(part)
        if dimension < cut.stop - cut.start:
            return path, cut.start + dimension
        dimension -= cut.stop - cut.start
    raise IndexError(dimension)


def as_format(index):
    """Return a format, as in `data.FORMATS`, whose only data set is this index."""
    return SimpleNamespace(
        FORMAT="made in memory", is_dataset=lambda path: True, open_index=lambda path, cache, on_fault: index
    )
