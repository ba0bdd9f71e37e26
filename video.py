"""A folder of MP4 files as a data set: one episode each, without states or actions.

`captions.json` next to them may hold an instruction for each file: {"name.mp4": "text"}. Frames are decoded in place.
Features: "video" (image) and "caption" (text).
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files import read_json
from index import CACHE, COPY_AGAIN, INDEX_FORMAT, Feature, Index, cache_folder, cached_contents
from mp4 import read_frame, scan_video

FORMAT = "MP4 files (*.mp4, one episode each)"  # for messages
SAME_RATE = 1.1  # ratio of frame rates that still count as one
UNEVEN = 1.5  # ratio of a time between two frames to the usual one, from which on it is odd


def is_dataset(path):
    """Return whether the folder `path` holds MP4 files."""
    return bool(video_files(path))


def video_files(path):
    """Return the MP4 files in a folder, sorted."""
    return sorted(file for file in Path(path).iterdir() if file.suffix.lower() == ".mp4")


@dataclass
class VideoIndex(Index):
    """A folder of MP4 files.

    files: [paths]; frames: {"video": i64 [S, 3] of (number of the file, time of the frame, time of its key frame)}.
    """

    files: list = field(default_factory=list)
    frames: dict = field(default_factory=dict)

    def file_of(self, step):
        """Return the video file of a step."""
        return self.files[self.frames["video"][step][0]]

    def read_image(self, path, step):
        """Return the frame of a step, u8 [h, w, 3]."""
        file, time, key = self.frames[path][step]
        return read_frame(self.files[file], time, key)


def open_index(path, cache=CACHE, on_fault=None):
    """Return the `VideoIndex` of a folder, read from `cache` if no file has changed since it was indexed.

    on_fault: as of `data.open_index`. Raise ValueError for files that are no videos, or that differ in
    size or frame rate.
    """
    directory = Path(path)
    files = video_files(directory)
    captions = read_captions(directory, files)
    name = directory.resolve().name
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([INDEX_FORMAT, name, captions, stamps]).encode()).hexdigest()[:16]
    folder = cache_folder(cache, f"{name}-{key}")

    def scan(writer, on_fault):
        scan_files(directory, files, captions, writer, on_fault)

    contents = cached_contents(folder, scan, on_fault)
    features = {"video": Feature("image", "uint8", (*contents.pop("size"), 3)), "caption": Feature("text", "str", ())}
    return VideoIndex(name, directory, folder, features=features, files=files, **contents)


def scan_files(directory, files, captions, writer, on_fault):
    """Read every file once and write the index; one with a fault is left out when `on_fault` returns."""
    digest = hashlib.sha256()
    sizes = {}  # {(height, width): first file}
    rates = []  # of (frames a second, file)
    for number, file in enumerate(files):
        try:
            table = scan_video(file)
        except ValueError as fault:
            on_fault(ValueError(f"{file}: {fault}. {COPY_AGAIN}"))
            continue
        caption = captions.get(file.name, "")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest() + caption.encode())
        sizes.setdefault(table.size, file)
        if len(table.times) > 1:
            intervals = np.diff(table.times) * table.time_base
            rates.append((1 / np.median(intervals), file))
            if fault := uneven_frames(intervals):
                on_fault(ValueError(f"{file}: {fault}"), warning=True)
        numbers = np.full(len(table.times), number)
        writer.append("frames", "video", np.stack([numbers, table.times, table.keys], 1))
        writer.append_texts("caption", [caption] * len(numbers))
        writer.end_episode(len(numbers))
    if not sizes:
        raise ValueError(f"{directory}: no video can be read")
    if len(sizes) > 1:
        listed = "; ".join(f"{file} has {height} x {width}" for (height, width), file in sizes.items())
        on_fault(ValueError(f"{directory}: the videos have different sizes: {listed}. Make a folder of each"))
    if rates and max(rates)[0] > SAME_RATE * min(rates)[0]:
        listed = "; ".join(f"{file} has {rate:.4g} a second" for rate, file in (min(rates), max(rates)))
        on_fault(
            ValueError(
                f"{directory}: time is counted in frames, and the videos have different frame rates: {listed}. Give "
                "them one: ffmpeg -i VIDEO -r RATE SAME.mp4"
            )
        )
    size = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    writer.finish(fingerprint=digest.hexdigest()[:16], size=size)


def uneven_frames(intervals):
    """Return what is odd about the times f64 [n - 1] between the frames of a video, in s, as a text; "" if nothing."""
    usual = np.median(intervals)
    uneven = np.maximum(intervals / usual, usual / intervals)
    if uneven.max() <= UNEVEN:
        return ""
    return (
        f"the frames are not evenly spaced, and time is counted in frames: {(uneven > UNEVEN).sum()} of {len(uneven)} "
        f"follow after {UNEVEN} times the usual {usual:.4g} s or more, or as much less; frame {uneven.argmax() + 1} "
        f"after {intervals[uneven.argmax()]:.4g} s"
    )


def read_captions(directory, files):
    """Return {file name: instruction} of captions.json, {} without. Raise ValueError for what is not such a file."""
    path = directory / "captions.json"
    if not path.exists():
        return {}
    captions = read_json(path)
    expected = f'{path} must be {{"name.mp4": "text"}} of the files next to it'
    if unknown := sorted(captions.keys() - {file.name for file in files}):
        raise ValueError(f"{expected}; there is no file {', '.join(unknown[:5])}")
    for name, text in captions.items():
        if not isinstance(text, str):
            raise ValueError(f"{expected}; that of {name} is {text!r:.80}")
    return captions
