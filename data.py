"""Opens data sets, whatever their format, and prints what is in one.

    python data.py data/libero_tiny          # counts, shapes, statistics, a contact sheet
    python data.py data/libero_tiny --check  # all faults of the data and its labels in one go; exit status 1 if any

Everything else opens data through `open_index` and `open_indices`. A format is a module with its `FORMAT` (a text for
messages), `is_dataset(path)` and `open_index(path, cache, on_fault)`, and one entry in `FORMATS`.
Left out: conversion between formats.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

import rlds
from batches import check_same_sizes
from index import CACHE
from normalise import nonfinite_faults, statistics
from targets import label_path, load_labels

FORMATS = (rlds,)
THUMBNAIL = 160  # pixels, the side of a frame in the contact sheet


@dataclass
class Config:
    data: tyro.conf.Positional[Path]
    """folder of a data set"""
    cache: Path = CACHE
    """where indices are kept"""
    check: bool = False
    """only list all that is wrong with the data and its labels; exit status 1 when there is something"""


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_index(path, cache=CACHE, on_fault=None):
    """Return the `Index` of the data set at `path`, read from `cache` if it was indexed before and has not changed.

    on_fault: function(fault, warning=False), called with each fault instead of raising it; then everything is read and
    nothing is written. Raises FileNotFoundError (no data) and ValueError (unknown format, or damaged data with file and
    place).
    """
    path = Path(path)
    known = " or ".join(module.FORMAT for module in FORMATS)
    if not path.is_dir():
        raise FileNotFoundError(f"no such data directory: {path}. Give --data a folder with {known}.")
    matching = [module for module in FORMATS if module.is_dataset(path)]
    if len(matching) != 1:
        raise ValueError(f"{path} holds data of {len(matching)} known formats. Give --data a folder with {known}.")
    return matching[0].open_index(path, cache, on_fault)


def open_indices(paths, cache=CACHE):
    """Return the `Index` of each path. Raises ValueError where two have one name: statistics are kept by name."""
    indices = [open_index(path, cache) for path in paths]
    names = [index.name for index in indices]
    if len(set(names)) < len(names):
        folders = ", ".join(map(str, paths))
        raise ValueError(
            f"data holds two data sets of one name, {names}, in {folders}; rename one: statistics are kept by name"
        )
    return indices


# ----------------------------------------------------------------------------------------------------------------------
# Checking


def check_dataset(path, cache=CACHE):
    """Print all faults of the data set at `path`: errors, then warnings (odd, but usable). Return the number of errors.

    Reads every record, image, number and text, and the labels if there are any; writes nothing. Raises as `open_index`
    where not even the files of the data set can be listed.
    """
    errors = []
    warnings = []

    def on_fault(fault, warning=False):
        if warning:
            warnings.append(fault)
        else:
            errors.append(fault)

    index = open_index(path, cache, on_fault)
    labels = label_path(index, path)
    checks_labels = labels.exists() and not errors  # they would not fit an index without the damaged records
    for camera in index.cameras:
        for step in range(len(index)):
            errors += _raised(index.image, camera, step)
    for name in index.columns:
        errors += nonfinite_faults(index, name)
    if {"action", "state"} <= index.columns.keys():
        errors += _raised(check_same_sizes, [index], [])
        warnings += _constant_actions(index)
    if checks_labels:
        errors += _raised(load_labels, index, labels)
    for fault in errors:
        print(f"error: {fault}")
    for fault in warnings:
        print(f"warning: {fault}")
    count = str(len(errors) + len(warnings)) if errors or warnings else "nothing"
    images = len(index) * len(index.cameras)
    print(f"{index.name}: {count} found in {index.num_episodes} episodes, {len(index)} steps, {images} images")
    return len(errors)


def _raised(function, *arguments):
    """Return the ValueError that a call raises, in a list; an empty list if it raises none."""
    try:
        function(*arguments)
    except ValueError as error:
        return [error]
    return []


def _constant_actions(index):
    """Yield a text for each dimension of the action that never changes."""
    actions = index.columns["action"]
    for dimension in np.flatnonzero((actions == actions[0]).all(0)):
        yield f"{index.directory}: dimension {dimension} of action is {actions[0, dimension]} at all steps"


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def print_summary(index):
    """Print episodes, steps, instructions, cameras, columns and statistics of a data set."""
    lengths = np.diff(index.starts)
    print(
        f"{index.name}: {len(lengths)} episodes, {len(index)} steps ({lengths.min()} to {lengths.max()} an episode), "
        f"fingerprint {index.fingerprint}"
    )
    for text in sorted(set(index.instructions)):
        print(f"  {index.instructions.count(text):5d} episodes: {text}")
    for camera in index.cameras:
        size = index.mean_frame_bytes(camera) / 1024
        print(f"  camera {camera}: {index.image(camera, 0).shape}, {size:.1f} KiB a frame")
    for name, column in index.columns.items():
        print(f"  column {name}: {column.dtype} {column.shape[1:]}")
    stats = statistics(index)
    for name in ("action", "proprio"):
        for kind in ("q01", "mean", "q99"):
            if name in stats:
                print(f"  {name:7s} {kind:4s} " + " ".join(f"{value:8.4f}" for value in stats[name][kind]))


def contact_sheet(index, episodes=8):
    """Return a PIL image with one column per episode and, for each camera, its first and its last frame.

    episodes: how many are shown, at most, evenly spread over the data set.
    """
    shown = np.unique(np.linspace(0, index.num_episodes - 1, episodes).astype(int))
    rows = [(camera, place) for camera in index.cameras for place in ("first", "last")]
    sheet = Image.new("RGB", (len(shown) * THUMBNAIL, len(rows) * THUMBNAIL), "white")
    draw = ImageDraw.Draw(sheet)
    for column, episode in enumerate(shown):
        for row, (camera, place) in enumerate(rows):
            step = index.starts[episode] if place == "first" else index.starts[episode + 1] - 1
            frame = Image.fromarray(index.image(camera, step)).resize((THUMBNAIL, THUMBNAIL))
            x = column * THUMBNAIL
            y = row * THUMBNAIL
            sheet.paste(frame, (x, y))
            caption = f"episode {episode}, {camera}, {place}"
            draw.text((x + 4, y + 4), caption, fill="white", stroke_width=1, stroke_fill="black")
    return sheet


def main():
    """Print what is in a data set and write a contact sheet, or check it."""
    config = tyro.cli(Config, description=__doc__)
    if config.check:
        raise SystemExit(int(check_dataset(config.data, config.cache) > 0))
    index = open_index(config.data, config.cache)
    print_summary(index)
    path = index.cache / "contact_sheet.png"
    contact_sheet(index).save(path)
    print(f"contact sheet: {path}")


if __name__ == "__main__":
    main()
