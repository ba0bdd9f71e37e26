"""Data sets, whatever their format and robot: an index read through a description of what its features mean.

    python data.py data/libero_tiny          # the description in force, counts, ranges, grippers, a contact sheet
    python data.py data/libero_tiny --check  # all faults of the data and its labels in one go; exit status 1 if any

Everything else opens data through `open_datasets`. A format is a module with its `FORMAT` (a text for messages),
`is_dataset(path)` and `open_index(path, cache, on_fault)`, and one entry in `FORMATS`. What the features mean says a
`DataSpec` (dataspec.py).
Left out: conversion between formats.

Axes: S steps of a data set, n some of them, A action size, N proprio size.
"""

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tyro

import lerobot_data
import rlds
import video
from dataspec import GRIPPER_SLACK, find_spec, fit_image, format_spec, gripper_faults, part_size, read_parts
from files import check_writable, read_json, write_json
from index import CACHE, ROWS, SMALL, raise_fault
from inspection import check_dataset, contact_sheet, describe_unknown, find_lfs_pointer, print_summary
from normalise import Normaliser, column_statistics, standardise

FORMATS = (rlds, lerobot_data, video)


# ----------------------------------------------------------------------------------------------------------------------
# A data set as training, labelling, evaluation and probing see it


class Dataset:
    """An `Index` read through its `DataSpec`: actions, states, instructions and images in the project's conventions."""

    def __init__(self, index, spec, source=""):
        """source: where the spec comes from, for messages. Use `open_dataset` unless the spec is known to fit."""
        self.index = index
        self.spec = spec
        self.source = source
        self.name, self.directory, self.cache = index.name, index.directory, index.cache
        self.fingerprint, self.metadata = index.fingerprint, index.metadata
        self.starts, self.num_episodes = index.starts, index.num_episodes
        self.episode_of, self.locate, self.find_shipped = index.episode_of, index.locate, index.find_shipped
        self.cameras = list(spec.cameras)
        self.action_size = part_size(index, spec.action)  # A; 0: video without actions
        self.state_size = part_size(index, spec.state)  # N; 0: there is no state

    def __len__(self):
        return len(self.index)

    def stored_action(self, steps):
        """Return the actions of some steps as they are in the data, f32 [n, A]. steps: i64 [n] or a slice."""
        return read_parts(self.index, self.spec.action, steps)

    def action(self, steps):
        """Return standardised actions f32 [n, A]: grippers 1 open and 0 closed."""
        return standardise(self.stored_action(steps), self.spec.grippers)

    def state(self, steps):
        """Return states f32 [n, N] in physical units."""
        return read_parts(self.index, self.spec.state, steps)

    def instruction(self, step):
        """Return the instruction of a step."""
        if self.spec.instruction:
            return self.index.texts[self.spec.instruction][step]
        return self.spec.text

    def instructions(self):
        """Return all different instructions, sorted."""
        if self.spec.instruction:
            return self.index.texts[self.spec.instruction].used()
        return [self.spec.text]

    def image(self, camera, step):
        """Return a camera's image u8 [h, w, 3], square unless the description says squeeze (later, at resizing).

        Raise ValueError where it cannot be used, or is not square and the description does not say how it becomes so.
        """
        pixels = self.index.image(self.spec.cameras[camera], step)
        height, width = pixels.shape[:2]
        if height != width and not self.spec.image_fit:
            raise ValueError(
                f"{self.name}: images of camera {camera} have {height} x {width} pixels. Say how they become square: "
                f'add "image_fit": "pad" (with black), "crop" (the centre) or "squeeze" to the description, and save '
                f"it as {self.directory}/spec.json:\n{format_spec(self.spec)}"
            )
        return fit_image(pixels, self.spec.image_fit)

    def storage_options(self, camera):
        """Return how a camera's images are stored, {"size", "format", ...}, so that evaluation stores its own alike."""
        size = list(self.image(camera, 0).shape[:2])
        options = self.index.storage_options(self.spec.cameras[camera])
        return {"size": size[0] if size[0] == size[1] else size} | options

    @cached_property
    def stats(self):
        """The statistics over all steps: {"action", "proprio" (`column_statistics`), "num_transitions", ...}

        They are kept in the cache. Video without actions or states lacks these entries. Raise ValueError where an
        action or a state is not finite, or a gripper is not as described.
        """
        key = hashlib.sha256(format_spec(self.spec).encode()).hexdigest()[:16]
        path = self.cache / f"statistics-{key}.json"
        if path.exists():
            return read_json(path)
        for fault in self.value_faults():
            raise ValueError(fault)
        stats = {}
        spec = self.spec
        if self.action_size:
            unchanged = {gripper.index for gripper in spec.grippers} | set(spec.unchanged)
            stats["action"] = column_statistics(self.action, len(self), self.action_size, spec.normalisation, unchanged)
        if self.state_size:
            stats["proprio"] = column_statistics(self.state, len(self), self.state_size, spec.normalisation)
        stats |= {"num_transitions": len(self), "num_trajectories": self.num_episodes}
        if self.cache.is_dir():
            own = path.with_name(f"{path.name}-{os.getpid()}")  # each process of a run writes the same
            with contextlib.suppress(OSError):  # the cache may be another user's, or full
                write_json(own, stats)
                own.replace(path)
        return stats

    def value_faults(self):
        """Yield a text for all that is wrong with the numbers: not finite, or no gripper as described."""
        faults = [*nonfinite_faults(self, "action", self.stored_action), *nonfinite_faults(self, "state", self.state)]
        yield from faults
        if self.spec.grippers and not faults:
            yield from gripper_faults(self.spec, *self.action_range(), self.gripper_shares()[2], self.source, self.name)

    def action_range(self):
        """Return the smallest and the largest stored value of each dimension of the action, f32 [A] each."""
        smallest = np.full(self.action_size, np.inf, np.float32)
        largest = -smallest
        for start in range(0, len(self), ROWS):
            part = self.stored_action(slice(start, start + ROWS))
            smallest = np.minimum(smallest, part.min(0))
            largest = np.maximum(largest, part.max(0))
        return smallest, largest

    def gripper_shares(self):
        """Return the shares of all steps in which each gripper is open, closed, and between, f64 [3, grippers]."""
        numbers = [gripper.index for gripper in self.spec.grippers]
        counts = np.zeros((2, len(numbers)))
        for start in range(0, len(self), ROWS):
            opening = self.action(slice(start, start + ROWS))[:, numbers]
            counts += (opening >= 1 - GRIPPER_SLACK).sum(0), (opening <= GRIPPER_SLACK).sum(0)
        shares = counts / len(self)
        return np.array([*shares, 1 - shares.sum(0)])

    @cached_property
    def action_normaliser(self):
        """The `Normaliser` of the actions. Raise as `stats`."""
        return Normaliser(self.stats["action"])

    @cached_property
    def state_normaliser(self):
        """The `Normaliser` of the states. Raise as `stats`."""
        return Normaliser(self.stats["proprio"])

    @cached_property
    def _small_actions(self):
        return self.action_normaliser.normalise(self.action(slice(None)))  # [S, A]

    @cached_property
    def _small_states(self):
        return self.state_normaliser.normalise(self.state(slice(None)))  # [S, N]

    def normalised_action(self, steps):
        """Return actions as a model is trained on them, f32 [n, A]. Those of a small data set are kept in memory."""
        if len(self) * self.action_size * 4 <= SMALL:
            return self._small_actions[steps]
        return self.action_normaliser.normalise(self.action(steps))

    def normalised_state(self, steps):
        """Return states as a model sees them, f32 [n, N]. Those of a small data set are kept in memory."""
        if not self.state_size:
            return self.state(steps)
        if len(self) * self.state_size * 4 <= SMALL:
            return self._small_states[steps]
        return self.state_normaliser.normalise(self.state(steps))


def nonfinite_faults(dataset, name, read):
    """Yield a text for each episode in which a column holds a number that is not finite. read(steps) -> [n, size]."""
    episodes = set()
    for start in range(0, len(dataset), ROWS):
        finite = np.isfinite(read(slice(start, start + ROWS))).all(1)
        episodes |= {dataset.episode_of(start + step) for step in np.flatnonzero(~finite)}
    for episode in sorted(episodes):
        start, stop = dataset.starts[episode : episode + 2]
        values = read(slice(start, stop))
        places = np.argwhere(~np.isfinite(values))
        step, dimension = places[0]
        file, place = dataset.locate(start + step)
        yield (
            f"{file}: {name} of {dataset.name} is {values[step, dimension]} at {place}, dimension {dimension} "
            f"({len(places)} such values in the episode). Repair or remove this episode."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_index(path, cache=CACHE, on_fault=None):
    """Return the `Index` of the data set at `path`, read from `cache` if it was indexed before and has not changed.

    on_fault: function(fault, warning=False), called with each fault instead of raising it; then everything is read and
    nothing is written. Raise FileNotFoundError (no data) and ValueError (unknown format, or damaged data with file and
    place).
    """
    path = Path(path)
    matching = [module for module in FORMATS if path.is_dir() and module.is_dataset(path)]
    if len(matching) > 1:
        raise ValueError(f"{path} holds {' and '.join(module.FORMAT for module in matching)}; separate them.")
    if not matching:
        raise_unknown(path)
    try:
        return matching[0].open_index(path, cache, on_fault)
    except (ValueError, FileNotFoundError) as error:
        if pointer := find_lfs_pointer(path):
            raise ValueError(f"{pointer} is a pointer of Git LFS, not the file: git lfs pull, in {path}") from error
        raise


def raise_unknown(path):
    """Raise FileNotFoundError for a path that is no folder, or ValueError for a folder of no known format.

    The text says what is there instead, and which folder, above or below, is a data set.
    """
    give = f"Give --data a folder with {' or '.join(module.FORMAT for module in FORMATS)}"
    around = [parent for parent in path.resolve().parents[:2] if is_marked(parent)]
    around += [folder for folder in subfolders(path) if any(module.is_dataset(folder) for module in FORMATS)]
    if around:
        give += f". Here that is {' or '.join(map(str, around[:8]))}"
    if path.is_dir():
        raise ValueError(f"{path} holds no data set of a known format. {describe_unknown(path)}{give}.")
    if path.exists():
        raise FileNotFoundError(f"{path} is a file, no data directory. {describe_unknown(path)}{give}.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        give += f". If it is a name on the Hub: hf download {path} --repo-type dataset --local-dir DIR"
    raise FileNotFoundError(f"no such data directory: {path}. {give}.")


def is_marked(folder):
    """Return whether a folder is itself that of an RLDS or LeRobot data set."""
    return (folder / "features.json").exists() or lerobot_data.is_dataset(folder)


def subfolders(path):
    """Return the folders in a folder and in these, sorted; at most a hundred."""
    children = [child for child in sorted(path.glob("*")) if child.is_dir()]
    grandchildren = [each for child in children[:50] for each in sorted(child.glob("*")) if each.is_dir()]
    return [*children, *grandchildren][:100]


def open_dataset(path, cache=CACHE, spec="", on_fault=None):
    """Return the `Dataset` at `path`, read through its description.

    spec: a JSON file or a preset's name, "" to find it; on_fault: as of `open_index`. Raise as `open_index`, and
    ValueError where no description fits; then the text proposes one.
    """
    index = open_index(path, cache, on_fault)
    found, source = find_spec(index, spec, (path, *index.folders))
    if not found.cameras:
        raise ValueError(
            f"{index.name}, as described by {source}, has no camera. A policy needs one; name it in the spec."
        )
    dataset = Dataset(index, found, source)
    for camera in dataset.cameras:
        try:
            dataset.image(camera, 0)
        except ValueError as fault:
            (on_fault or raise_fault)(fault)
    return dataset


def open_datasets(paths, cache=CACHE, specs=()):
    """Return the `Dataset` of each path. specs: none, or one for each. Raise ValueError where two have one name."""
    datasets = [open_dataset(path, cache, spec) for path, spec in zip(paths, specs or [""] * len(paths), strict=True)]
    names = [dataset.name for dataset in datasets]
    for dataset in datasets:
        _ = dataset.stats  # faults of the numbers are found now, before a model is built
    if len(set(names)) < len(names):
        folders = ", ".join(map(str, paths))
        raise ValueError(
            f"data holds two data sets of one name, {names}, in {folders}; rename one: statistics are kept by name"
        )
    return datasets


def check_embodiments(datasets):
    """Raise ValueError unless data sets of one embodiment have the same cameras, action, state and conventions.

    Video of a robot has no action and no state to compare.
    """
    first, first_alike = {}, {}  # {embodiment: data set}, {(embodiment, with actions or not): data set}
    for dataset in datasets:
        spec = dataset.spec
        known = first.setdefault(spec.embodiment, dataset)
        other = first_alike.setdefault((spec.embodiment, bool(dataset.action_size)), dataset)
        pairs = {
            "cameras": (known, list(spec.cameras), list(known.spec.cameras)),
            "action sizes": (other, dataset.action_size, other.action_size),
            "state sizes": (other, dataset.state_size, other.state_size),
            "absolute dimensions": (other, spec.absolute, other.spec.absolute),
            "normalisations": (other, spec.normalisation, other.spec.normalisation),
            "unchanged dimensions": (other, spec.unchanged, other.spec.unchanged),
            "grippers": (other, [each.index for each in spec.grippers], [each.index for each in other.spec.grippers]),
        }
        for name, (compared, own, expected) in pairs.items():
            if own != expected:
                raise ValueError(
                    f"{dataset.name} and {compared.name} are both described as '{spec.embodiment}', but their {name} "
                    f"are {own} and {expected}; give one of them another embodiment, or the same names of cameras"
                )


def choose_chunk(chunk, datasets):
    """Return the actions per chunk: `chunk`, or for 0 what the descriptions say; ValueError if they differ."""
    stated = {dataset.name: dataset.spec.chunk for dataset in datasets if dataset.action_size}
    if not chunk and len(set(stated.values())) > 1:
        raise ValueError(f"the descriptions of the data say different chunks, {stated}; choose one with --chunk")
    return chunk or next(iter(stated.values()), datasets[0].spec.chunk)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Config:
    """Settings of `python data.py`."""

    data: tyro.conf.Positional[Path]
    """folder of a data set"""
    spec: str = ""
    """description of the data: a JSON file or the name of a preset (default: spec.json next to it, or what fits)"""
    cache: Path = CACHE
    """where indices are kept"""
    check: bool = False
    """only list all that is wrong with the data and its labels; exit status 1 when there is something"""


def main():
    """Print what is in a data set and write a contact sheet, or check it."""
    config = tyro.cli(Config, description=__doc__)
    if config.check:
        raise SystemExit(int(check_dataset(config, open_dataset) > 0))
    try:
        dataset = open_dataset(config.data, config.cache, config.spec)
        print_summary(dataset)
        path = dataset.cache / "contact_sheet.png"
        check_writable(path, "--cache")
    except (ValueError, OSError) as error:  # its text is the answer; a traceback would bury it
        raise SystemExit(f"error: {error}") from None
    contact_sheet(dataset).save(path)
    print(f"contact sheet: {path}")


if __name__ == "__main__":
    main()
