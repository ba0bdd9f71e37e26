"""Helpers of the tests of videos: MP4 files that PyAV writes, and what it reads from one end to the other."""

import av
import numpy as np

LONG = {"g": "250", "bf": "3", "x264-params": "scenecut=0:b-adapt=0"}  # one key frame, frames that depend on later ones


def moving_square(frames=30, height=48, width=64, seed=0):
    """Return u8 [frames, height, width, 3]: noise on a colour that changes, and a white square that moves."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((frames, height, width, 3), np.uint8)
    for number, picture in enumerate(pictures):
        picture[:] = (20 + 5 * number % 200, 100, 90 + 3 * number % 150) + rng.integers(-9, 10, picture.shape)
        top, left = 3 * number % (height - 8), 5 * number % (width - 8)
        picture[top : top + 8, left : left + 8] = 255
    return pictures


def write_video(path, pictures, codec="libx264", options=None, rate=10, forced=(), start_first=False):
    """Write u8 [frames, h, w, 3] as an MP4 file and return its path.

    options: of the encoder; forced: numbers of frames that must be key frames; start_first: the table of the file lies
    before its frames.
    """
    settings = {"movflags": "faststart"} if start_first else {}
    with av.open(str(path), "w", format="mp4", options=settings) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"g": "2", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            if number in forced:
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_in_order(path):
    """Return ([times], [frames u8 [h, w, 3]]) of a video as PyAV decodes it from its first frame to its last."""
    with av.open(str(path)) as container:
        frames = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [time for time, _ in frames], [picture for _, picture in frames]
