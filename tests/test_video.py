"""video.py: a folder of MP4 files as a data set, its captions, what is wrong with it, and training on it."""

import json
import re
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from data_helpers import run_check
from video_helpers import LONG, moving_square, read_in_order, write_video

import data
import train
from curves import read_log
from files import save_tensors

CAPTIONS = {"a.mp4": "move the square", "b.mp4": "stop the square"}
ROBOT = {  # of `rlds`, with the camera alone that the videos have too
    "embodiment": "arm",
    "cameras": {"image": "observation/image"},
    "state": ["observation/state"],
    "action": ["action"],
    "grippers": [{"index": 6, "open": -1.0, "closed": 1.0}],
    "instruction": "language_instruction",
}
FILM = {"embodiment": "arm", "cameras": {"image": "video"}, "instruction": "caption", "image_fit": "crop"}


def write_folder(folder, captions=None):
    """Write two videos of 10 and 12 frames, of 48 x 64 pixels, with a description; return their folder."""
    folder.mkdir()
    write_video(folder / "b.mp4", moving_square(12, seed=1), options=LONG)
    write_video(folder / "a.mp4", moving_square(10))
    if captions is not None:
        (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "spec.json").write_text(json.dumps(FILM))
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Folder of two videos with captions."""
    return write_folder(tmp_path_factory.mktemp("videos") / "film", CAPTIONS)


@pytest.fixture
def copy(film, tmp_path):
    """Folder of a copy that may be damaged."""
    return shutil.copytree(film, tmp_path / "film", copy_function=shutil.copyfile)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def test_every_file_is_an_episode(film, cache):
    """In the order of their names, with their frames, captions, times and sizes; neither actions nor states."""
    dataset = data.open_dataset(film, cache)
    assert dataset.starts.tolist() == [0, 10, 22] and (dataset.action_size, dataset.state_size) == (0, 0)
    frames = [*read_in_order(film / "a.mp4")[1], *read_in_order(film / "b.mp4")[1]]
    for step in np.random.default_rng(0).permutation(22):
        assert np.array_equal(dataset.index.image("video", step), frames[step])
        assert np.array_equal(dataset.image("image", step), frames[step][:, 8:56])
    assert dataset.instruction(9) == "move the square" and dataset.instruction(10) == "stop the square"
    assert dataset.locate(12) == (film / "b.mp4", "step 2 of episode 1")
    assert dataset.storage_options("image") == {"size": 48, "format": "PNG"}
    assert dataset.stats == {"num_transitions": 22, "num_trajectories": 2}
    assert dataset.index.features["video"].shape == (48, 64, 3)


def test_captions_may_be_missing(copy, cache, capsys):
    """All of them, or some: then there is an empty instruction, which --check says."""
    (copy / "captions.json").write_text(json.dumps({"b.mp4": "stop the square"}))
    assert data.open_dataset(copy, cache).instructions() == ["", "stop the square"]
    errors, lines = run_check(copy, capsys)
    assert errors == 0 and "warning: " in lines[0] and "instruction is empty in 1 episodes, the first is 0" in lines[0]
    (copy / "captions.json").unlink()
    assert data.open_dataset(copy, cache).instructions() == [""]


def test_fingerprint_does_not_depend_on_the_place(film, copy, cache):
    """Nor on a description; but on the frames and on which caption a file has."""
    first = data.open_index(film, cache)
    (copy / "spec.json").unlink()
    (copy / "captions.json").write_text(json.dumps(dict(reversed(CAPTIONS.items()))))
    assert data.open_index(copy, cache).fingerprint == first.fingerprint
    found = {first.fingerprint}
    (copy / "captions.json").write_text(json.dumps({"a.mp4": "stop the square", "b.mp4": "move the square"}))
    found.add(data.open_index(copy, cache).fingerprint)
    write_video(copy / "b.mp4", moving_square(12, seed=2), options=LONG)
    found.add(data.open_index(copy, cache).fingerprint)
    assert len(found) == 3


def test_second_opening_reads_the_cache(copy, tmp_path):
    """A description beside the videos changes nothing; other captions or a newer file are read again."""
    cache = tmp_path / "cache"
    first = data.open_index(copy, cache)
    (copy / "spec.json").unlink()
    second = data.open_index(copy, cache)
    assert second.cache == first.cache and second.features == first.features and second.files == first.files
    (copy / "captions.json").unlink()
    assert data.open_index(copy, cache).cache != first.cache


def test_frame_rates_that_differ_are_refused(copy, cache, tmp_path, capsys):
    """Time is counted in frames: 10 and 12 a second are two meanings of a delta; 9.99 and 10 are one. Both rates and
    their files are named, also by --check."""
    near = write_folder(tmp_path / "near")
    write_video(near / "a.mp4", moving_square(10), rate=Fraction(999, 100))
    data.open_dataset(near, cache)
    write_video(copy / "a.mp4", moving_square(10), rate=12)
    wrong = "frame rates: .*b.mp4 has 10 a second; .*a.mp4 has 12 a second. Give them one"
    with pytest.raises(ValueError, match=wrong):
        data.open_dataset(copy, cache)
    errors, lines = run_check(copy, capsys)
    assert errors == 1 and re.search(wrong, lines[0])


@pytest.mark.parametrize("moved, expected", ((1, "frame 6 after 0.2 s"), (-0.5, "frame 6 after 0.05 s"), (0, "")))
def test_uneven_frames_are_found(moved, expected, film, tmp_path, cache, capsys):
    """By --check: a lost frame (all from the seventh on come a tenth of a second later), or some that come too soon.
    Such a video can be used."""
    folder = write_folder(tmp_path / "uneven")
    with av.open(str(film / "a.mp4")) as source, av.open(str(folder / "a.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.pts is not None:
                packet.stream = stream
                packet.pts += round((packet.pts >= 6 * packet.duration) * moved * packet.duration)
                packet.dts = packet.pts
                target.mux(packet)
    data.open_dataset(folder, cache)
    errors, lines = run_check(folder, capsys)
    found = [line for line in lines if "evenly" in line]
    assert errors == 0 and bool(found) == bool(expected)
    assert not found or re.search(f"a.mp4: the frames are not .* 1 of 9 follow .* usual 0.1 s .* {expected}", found[0])


def test_proposed_description_opens(copy, cache):
    """What the error proposes, word for word; it says that there is no action."""
    (copy / "spec.json").unlink()
    with pytest.raises(ValueError, match="there is no action: the data can only train latent losses") as caught:
        data.open_dataset(copy, cache)
    proposal = str(caught.value).partition("A description that may fit:\n")[2].partition("It guesses")[0]
    (copy / "spec.json").write_text(proposal)
    dataset = data.open_dataset(copy, cache)
    assert dataset.cameras == ["video"] and dataset.image("video", 3).shape == (64, 64, 3)
    assert dataset.instruction(11) == "stop the square"


def test_file_names_in_capitals(copy, cache):
    """As cameras write them: a file called .MP4 is one too."""
    (copy / "b.mp4").rename(copy / "C.MP4")
    (copy / "captions.json").write_text(json.dumps({"C.MP4": "stop the square"}))
    dataset = data.open_dataset(copy, cache)
    assert [file.name for file in dataset.index.files] == ["C.MP4", "a.mp4"] and dataset.starts.tolist() == [0, 12, 22]


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong

WRONG_CAPTIONS = {
    "unknown files": (
        {"a.mp4": "x", "c.mp4": "y", "b": "z"},
        r'must be {"name.mp4": "text"} of the files next to it; there is no file b, c.mp4',
    ),
    "no text": ({"a.mp4": "x", "b.mp4": ["y"]}, r"must .* of the files next to it; that of b.mp4 is \['y'\]"),
    "a list": (["x", "y"], r"holds \['x', 'y'\], not an object"),
}


@pytest.mark.parametrize("name", WRONG_CAPTIONS)
def test_wrong_captions_are_refused(name, copy, cache, capsys):
    """With the file, and what is wrong in it, by training and by --check."""
    content, message = WRONG_CAPTIONS[name]
    (copy / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{copy}/captions.json {message}"):
        data.open_index(copy, cache)
    errors, lines = run_check(copy, capsys)
    assert errors == 1 and re.match(f"error: {copy}/captions.json {message}", lines[0])


def test_captions_that_are_no_json(copy, cache):
    """Cut in the middle."""
    (copy / "captions.json").write_text('{"a.mp4": "mo')
    with pytest.raises(ValueError, match=f"{copy}/captions.json is no JSON"):
        data.open_index(copy, cache)


def test_videos_of_different_sizes_are_refused(copy, cache, capsys):
    """With a file of each size, once."""
    write_video(copy / "c.mp4", moving_square(4, 64, 64))
    sizes = (
        f"{copy}: the videos have different sizes: {copy}/a.mp4 has 48 x 64; {copy}/c.mp4 has 64 x 64. Make a folder"
    )
    with pytest.raises(ValueError, match=sizes):
        data.open_index(copy, cache)
    errors, lines = run_check(copy, capsys)
    assert errors == 1 and lines[0].startswith(f"error: {sizes}")


def test_damaged_videos_are_named(copy, cache, capsys):
    """All of them by --check, which reads the others; the first by training. Nothing else is left: that is said too."""
    (copy / "b.mp4").write_bytes((copy / "b.mp4").read_bytes()[:300])
    (copy / "c.mp4").write_text("no video")
    (copy / "captions.json").unlink()
    with pytest.raises(ValueError, match=f"{copy}/b.mp4: it is no video, or a damaged one: .*Copy it again"):
        data.open_index(copy, cache)
    errors, lines = run_check(copy, capsys)
    assert errors == 2 and "in 1 episodes, 10 steps, 10 images" in lines[-1]
    assert [line[: len(f"error: {copy}/b.mp4: it is no video")] for line in lines[:2]] == [
        f"error: {copy}/b.mp4: it is no video",
        f"error: {copy}/c.mp4: it is no video",
    ]
    (copy / "a.mp4").write_bytes(b"")
    errors, lines = run_check(copy, capsys)
    assert errors == 4 and f"error: {copy}: no video can be read" in lines


def test_video_that_changed_after_it_was_indexed(copy, cache):
    """The file, the step and the episode."""
    dataset = data.open_dataset(copy, cache)
    (copy / "b.mp4").unlink()
    place = (
        f"{copy}/b.mp4: camera video at step 3 of episode 1 cannot be used: {copy}/b.mp4 cannot be decoded: .*No such"
    )
    with pytest.raises(ValueError, match=place):
        dataset.image("image", 13)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def mixture(film, rlds, cache, tmp_path_factory):
    """Settings of la_direct on `rlds` and on videos of the same robot, with random labels of one latent model."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "robot.json").write_text(json.dumps(ROBOT))
    (folder / "film.json").write_text(json.dumps(FILM))
    specs = folder / "robot.json", folder / "film.json"
    labels = []
    for number, (path, spec) in enumerate(zip((rlds, film), specs)):
        dataset = data.open_dataset(path, cache, spec)
        rng = np.random.default_rng(number)
        tensors = {
            "codes": torch.from_numpy(rng.integers(0, 16, (len(dataset), 4), dtype=np.uint8)),
            "vectors": torch.from_numpy(rng.normal(size=(len(dataset), 4, 16))).half(),
        }
        labels.append(folder / f"{number}.safetensors")
        save_tensors(labels[-1], tensors, data=dataset.fingerprint, lam="made", delta=5, num_codes=16)
    settings = dict(variant="la_direct", max_steps=2, global_batch_size=8, num_workers=0, val_fraction=0.25)
    return settings | dict(data=(rlds, film), spec=tuple(map(str, specs)), labels=tuple(labels), cache=cache)


@pytest.fixture(scope="module")
def trained(mixture, tmp_path_factory):
    """Folder of the run on one process. Every second sample is video."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train.main(train.Config(**mixture, data_weights=(0.1, 1.0), out=str(out)))


def test_video_and_actions_train_together(trained):
    """The losses of both are logged: video has a latent loss and no action loss."""
    config = json.loads((trained / "config.json").read_text())
    assert [entry["name"] for entry in config["data"]] == ["made", "film"] and not config["model"]["embodiments"]
    entries = read_log(trained)
    for name in ("latent_loss/made", "latent_loss/film (video)", "action_loss/made"):
        assert any(entry.get(name, 0) > 0 for entry in entries), (name, entries)
    assert not any("action_loss/film (video)" in entry for entry in entries)
    weight = 34 / 12  # of 34 samples an epoch 22 are video, which this makes up for in the loss of all, not in its own
    for entry in entries:
        made, film = entry.get("latent_loss/made"), entry.get("latent_loss/film (video)")
        if made and film:
            share = (entry["latent_loss"] - film) / (made - film)  # of the batch that has actions
            assert entry["action_loss"] == pytest.approx(weight * share * entry["action_loss/made"], rel=0.01)
    stats = json.loads((trained / "dataset_statistics.json").read_text())
    assert "action" in stats["made"] and "action" not in stats["film"]


def test_two_processes_train_alike(trained, mixture, script, tmp_path):
    """The same losses to rounding."""
    flags = []
    for name, value in (mixture | dict(data_weights=(0.1, 1.0), out=tmp_path / "run")).items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *values]
    done = script("train.py", *flags, ranks=2)
    assert done.code == 0, done.text
    for name in ("loss", "latent_loss", "action_loss", "grad_norm"):
        found, expected = ([entry[name] for entry in read_log(run)] for run in (tmp_path / "run", trained))
        assert np.allclose(found, expected, rtol=2e-4), name
