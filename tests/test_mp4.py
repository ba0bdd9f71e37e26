"""mp4.py: frames at random are those that PyAV decodes in order, in any process; damaged files are named."""

import struct

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from video_helpers import LONG, moving_square, read_in_order, write_video

import mp4

CODINGS = {
    "a key frame every two frames": ("libx264", {"g": "2", "bf": "0"}, ()),
    "one key frame, frames that depend on later ones": ("libx264", LONG, ()),
    "key frames among such frames": ("libx264", LONG | {"forced-idr": "1"}, (11, 12, 13, 14, 20)),
    "open groups": ("libx264", {"g": "8", "bf": "3", "x264-params": "scenecut=0:open-gop=1"}, ()),
    "HEVC": ("libx265", {"x265-params": "keyint=8:bframes=3:open-gop=1:log-level=none"}, ()),
    "AV1": ("libsvtav1", {"g": "5", "crf": "30", "preset": "12"}, ()),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Keep the AV1 encoder from printing its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVT_LOG", "1")
        yield


@pytest.fixture(autouse=True)
def decoders(monkeypatch):
    """Return the decoders of one test, at first none."""
    monkeypatch.setattr(mp4, "DECODERS", mp4.Decoders())
    return mp4.DECODERS


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """An H.264 file of 30 frames with one key frame, in which frames depend on later ones."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", moving_square(), options=LONG)


def read_number(path, table, number):
    """Return frame `number` of a video."""
    return mp4.read_frame(path, table.times[number], table.keys[number])


# ----------------------------------------------------------------------------------------------------------------------
# Frames at random


@pytest.mark.parametrize("coding", CODINGS)
def test_frames_at_random_are_those_in_order(coding, tmp_path):
    """Shuffled, backwards, the same ones again, and every third; times and size are PyAV's."""
    codec, options, forced = CODINGS[coding]
    path = write_video(tmp_path / "video.mp4", moving_square(), codec, options, forced=forced)
    times, frames = read_in_order(path)
    table = mp4.scan_video(path)
    assert table.times.tolist() == times and len(times) == 30 and table.size == (48, 64)
    assert table.times[1] * table.time_base == pytest.approx(0.1)
    shuffled = np.random.default_rng(0).permutation(30).tolist()
    for number in [*shuffled, *range(29, -1, -1), 7, 7, 7, 8, 7, 29, 29, 0, *range(0, 30, 3)]:
        assert np.array_equal(read_number(path, table, number), frames[number]), number


def test_video_that_players_rotate_is_refused(tmp_path):
    """A phone's video lies on its side in the file; the matrix that says so is in the track's header."""
    path = write_video(tmp_path / "phone.mp4", moving_square())
    upright, sideways = ((1 << 16, 0, 0, 0, 1 << 16), (0, 1 << 16, 0, -1 << 16, 0))
    content = path.read_bytes()
    header = content.index(b"tkhd")
    place = content.index(struct.pack(">5i", *upright), header)
    path.write_bytes(content[:place] + struct.pack(">5i", *sideways) + content[place + 20 :])
    with pytest.raises(ValueError, match="players rotate it by -?90 degrees; write it upright: ffmpeg"):
        mp4.scan_video(path)


def test_long_video_is_stored_in_another_order(long_video):
    """The test above means something: the order of decoding is not that of the times, and all begin with one key."""
    with av.open(str(long_video)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert times != sorted(times)
    assert set(mp4.scan_video(long_video).keys.tolist()) == {0}


def test_decoding_goes_on_where_it_stopped(long_video, decoders):
    """Frames in order are decoded once each, not again from the key frame."""
    table = mp4.scan_video(long_video)
    read_number(long_video, table, 0)
    decoder = decoders.get(str(long_video))
    before = decoder.frames
    for number in (1, 2, 9, 29):
        read_number(long_video, table, number)
        assert decoder.frames is before
    read_number(long_video, table, 28)
    assert decoder.frames is not before


def test_frames_of_another_key_frame_are_sought(tmp_path, decoders):
    """What lies between is not decoded: a later frame is found from its own key frame."""
    path = write_video(tmp_path / "video.mp4", moving_square())
    table = mp4.scan_video(path)
    read_number(path, table, 2)
    before = decoders.get(str(path)).frames
    read_number(path, table, 3)
    assert decoders.get(str(path)).frames is before
    read_number(path, table, 9)
    assert decoders.get(str(path)).frames is not before


def test_what_an_edit_list_cuts_off_is_no_frame(long_video, tmp_path):
    """A video that begins before the time 0 has the frames that are shown; those before help to decode them."""
    path = tmp_path / "cut.mp4"
    settings = {"avoid_negative_ts": "disabled"}
    with av.open(str(long_video)) as source, av.open(str(path), "w", options=settings) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 4 * packet.duration
                packet.dts -= 4 * packet.duration
                packet.stream = stream
                target.mux(packet)
    times, frames = read_in_order(path)
    table = mp4.scan_video(path)
    assert table.times.tolist() == times and len(times) == 26 and times[0] == 0 and table.keys[0] < 0
    for number in (25, 0, 13, 1):
        assert np.array_equal(read_number(path, table, number), frames[number])


# ----------------------------------------------------------------------------------------------------------------------
# Many files, many processes


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """[(file, its table, its frames)] of five videos of ten frames, too large to be read at once."""
    folder = tmp_path_factory.mktemp("many")
    pictures = [np.random.default_rng(n).integers(0, 255, (10, 96, 128, 3), np.uint8) for n in range(5)]
    paths = [write_video(folder / f"{n}.mp4", pictures[n], options=LONG | {"crf": "2"}) for n in range(5)]
    return [(path, mp4.scan_video(path), read_in_order(path)[1]) for path in paths]


class Frames(torch.utils.data.Dataset):
    """All frames of `many`, in turns from each file."""

    def __init__(self, many):
        self.many = many

    def __len__(self):
        return 50

    def __getitem__(self, number):
        path, table, _ = self.many[number % 5]
        return read_number(path, table, number * 7 // 5 % 10)


def test_only_so_many_files_stay_open(many, decoders, monkeypatch):
    """The one that was used least recently is closed, and opened again when it is needed."""
    monkeypatch.setattr(mp4, "OPEN_FILES", 2)
    for number in (0, 1, 2, 1, 0, 4, 3, 0):
        path, table, frames = many[number]
        assert np.array_equal(read_number(path, table, 9 - number), frames[9 - number])
        assert len(decoders.open) <= 2 and list(decoders.open)[-1] == str(path)


@pytest.mark.parametrize("open_files", (2, 64))
def test_forked_workers_read_what_their_parent_reads(open_files, many, decoders, monkeypatch):
    """Also after the parent opened more files than stay open; workers do not touch its decoders, nor wait for them."""
    monkeypatch.setattr(mp4, "OPEN_FILES", open_files)
    frames = Frames(many)
    expected = [frames[number] for number in range(50)]
    assert len(decoders.open) == min(open_files, 5)
    inherited = list(decoders.open.values())
    loader = DataLoader(frames, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=20)
    for _ in range(2):
        for found, frame in zip(loader, expected, strict=True):
            assert np.array_equal(found, frame)
    assert list(decoders.open.values()) == inherited and not decoders.inherited
    assert np.array_equal(frames[13], expected[13])


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


def test_files_that_are_no_videos_are_refused(long_video, tmp_path):
    """Empty, text, sound alone, the end missing, or cut off within a frame."""
    path = tmp_path / "video.mp4"
    for content in (b"", b"this is a text" * 99, long_video.read_bytes()[:-400], long_video.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="it is no video, or a damaged one: "):
            mp4.scan_video(path)
    content = write_video(path, moving_square(), start_first=True).read_bytes()
    for length in (len(content) - 10, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"the video is damaged: it ends within frame \d+, or before"):
            mp4.scan_video(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="it is no video"):
        mp4.scan_video(path)


def test_video_that_changed_after_it_was_scanned(many, decoders, tmp_path):
    """Gone, cut, shorter or damaged within: the file is named, its decoder closed, and once it is back it is read."""
    _, table, frames = many[0]
    content = many[0][0].read_bytes()
    path = tmp_path / "video.mp4"
    changed = bytearray(content)
    changed[48:] = bytes(len(content) - 48)
    for damaged in (None, b"", content[: len(content) // 2], bytes(changed)):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} cannot be decoded: "):
            read_number(path, table, 5)
        assert not decoders.open
    write_video(path, moving_square(4))
    with pytest.raises(ValueError, match=f"{path} cannot be decoded: no whole frame at 0.5000 s"):
        read_number(path, table, 5)
    path.write_bytes(content)
    assert np.array_equal(read_number(path, table, 5), frames[5])


@pytest.mark.parametrize("part", (2, 3, 4, 5))
def test_damage_within_a_frame_is_refused(part, tmp_path):
    """Zeros in its place: what the decoder makes up instead is never used, and the other frames are as before."""
    path = write_video(tmp_path / "video.mp4", moving_square())
    table = mp4.scan_video(path)
    _, frames = read_in_order(path)
    content = bytearray(path.read_bytes())
    place = len(content) // part
    content[place : place + 200] = bytes(200)
    path.write_bytes(content)
    refused = 0
    for number in range(30):
        try:
            assert np.array_equal(read_number(path, table, number), frames[number]), number
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 1 <= refused <= 3
