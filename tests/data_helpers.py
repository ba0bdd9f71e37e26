"""Helpers of the data tests: changed copies of RLDS data sets, what `data.py --check` prints, samples and batches."""

import shutil

import fuzz
import numpy as np
import torch

import batches
import data
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
    """Return a function that returns the same list or array with a new value at one step."""
    return lambda values: [*values[:step], value, *values[step + 1 :]]


def replace_number(place, value):
    """Return a function that returns the same array with a new number at one place."""
    return lambda values: np.where(np.arange(len(values)) == place, np.float32(value), values)


def run_check(folder, capsys):
    """Return (number of errors, printed lines) of `data.check_dataset`, which must neither change nor write a file."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cache = folder.parent / "unwritten"
    errors = data.check_dataset(folder, cache)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not cache.exists()
    return errors, capsys.readouterr().out.splitlines()


def make_chunks(index, stats, cameras=("image",), chunk=8, **options):
    """Return `ActionChunks` over one index, by default with its main camera and 8 steps."""
    return batches.ActionChunks([index], [stats], cameras, chunk, **options)


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
