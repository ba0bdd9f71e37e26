"""Frames of video files at random: a table of each file's frames, and decoders that stay open.

A frame is decoded from the key frame before it, or from where the last one stopped when that is nearer. The pixels are
PyAV's (FFmpeg's) own in rgb24, bit for bit.
"""

import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

OPEN_FILES = 64  # decoders that stay open in a process, of 1 to 3 MB each for 480 x 640 pixels


class FrameTable(NamedTuple):
    """Where the frames of a video are."""

    times: np.ndarray
    """presentation time of each frame in units of `time_base`, i64 [n], rising"""
    keys: np.ndarray
    """of the key frame that decoding each frame begins with, i64 [n]"""
    time_base: float
    """seconds"""
    size: tuple
    """(height, width) in pixels"""


def scan_video(path):
    """Return the `FrameTable` of a video file, of which only the first frame is decoded.

    Raise ValueError, without its name, for one that is damaged, or that players rotate.
    """
    import av  # 25 MB of libraries, which data without videos does without

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = (packet for packet in container.demux(stream) if packet.pts is not None and packet.size)
            rows = sorted((p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in packets)
            time_base, size = float(stream.time_base), (stream.height, stream.width)
            container.seek(0)
            first = next(container.decode(stream), None)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"it is no video, or a damaged one: {error}") from error
    if any(is_corrupt for *_, is_corrupt in rows):
        raise ValueError(f"the video is damaged: it ends within frame {len(rows)}, or before")
    if first is not None and first.rotation:
        raise ValueError(
            f"its metadata says that players rotate it by {first.rotation} degrees; write it upright: "
            "ffmpeg -i VIDEO UPRIGHT.mp4"
        )
    times, is_key, is_discarded = np.array([row[:3] for row in rows], np.int64).reshape(-1, 3).T
    keys = np.where(is_key, times, np.iinfo(np.int64).min)
    keys = np.maximum.accumulate(keys)
    # what an edit list cuts off is decoded but not shown; what comes before all key frames cannot be decoded
    shown = (is_discarded == 0) & np.logical_or.accumulate(is_key)
    if not shown.any() or (np.diff(times) == 0).any():
        raise ValueError(f"the video is damaged: {len(times)} frames, of which {is_key.sum()} are key frames")
    return FrameTable(times[shown], keys[shown], time_base, size)


class Decoder:
    """An open video file."""

    def __init__(self, path):
        import av

        self.container = av.open(path)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # the processes are many already
        self.frames = iter(())
        self.last = None  # time of the last frame that was decoded

    def read(self, time, key):
        """Return the frame u8 [h, w, 3] at a time whose decoding begins with the frame at `key`."""
        if self.last is None or not key <= self.last < time:
            self.container.seek(key, stream=self.stream)
            self.frames = self.container.decode(self.stream)
        for frame in self.frames:
            self.last = frame.pts
            if frame.pts == time and not frame.is_corrupt:
                return frame.to_ndarray(format="rgb24", threads=1)  # starting others takes ten times as long
            if frame.pts >= time:
                break
        raise ValueError(f"no whole frame at {time * float(self.stream.time_base):.4f} s")


class Decoders:
    """The decoders of this process, the most recently used last.

    After a fork they begin anew: inherited ones share their place in the file with the parent, and closing them would
    wait for threads that the child does not have, so they are kept and not used.
    """

    def __init__(self):
        self.process = os.getpid()
        self.open = OrderedDict()
        self.inherited = []

    def get(self, path):
        """Return the decoder of a file, opened if it is not."""
        if self.process != os.getpid():
            self.inherited.append(self.open)
            self.process, self.open = os.getpid(), OrderedDict()
        if path not in self.open:
            self.open[path] = Decoder(path)
            if len(self.open) > OPEN_FILES:
                self.open.popitem(last=False)
        self.open.move_to_end(path)
        return self.open[path]

    def close(self, path):
        """Close the decoder of a file, if it is open: after an error its state is unknown."""
        self.open.pop(path, None)


DECODERS = Decoders()


def read_frame(path, time, key):
    """Return the frame u8 [h, w, 3] of a video file at a time of its `FrameTable`; key: of the same frame.

    Raise ValueError with the file where it cannot be read or has no such frame.
    """
    import av

    path = str(path)
    try:
        return DECODERS.get(path).read(int(time), int(key))
    except (av.FFmpegError, IndexError, ValueError) as error:
        DECODERS.close(path)
        raise ValueError(f"{path} cannot be decoded: {error}") from error
