"""data.py: opening data sets of any format, the check, and what the command prints."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import change_episode, copy_rlds, replace_number, replace_step
from PIL import Image

import data
from normalise import standardise

# ----------------------------------------------------------------------------------------------------------------------
# Opening


def test_missing_folder_and_unknown_format_are_named(tmp_path):
    """With the formats that there are."""
    with pytest.raises(FileNotFoundError, match="no such data directory: .*nowhere.*RLDS"):
        data.open_index(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds data of 0 known formats.*RLDS"):
        data.open_index(tmp_path / "empty", tmp_path)


def test_second_format_is_one_entry(rlds, cache, tmp_path, monkeypatch):
    """The module that recognises a folder opens it; a folder that two recognise is refused."""
    (tmp_path / "other").mkdir()
    other = SimpleNamespace(
        FORMAT="OTHER (*.other)",
        is_dataset=lambda path: path.name == "other" or (path / "both").exists(),
        open_index=lambda path, cache, on_fault: (path, cache, on_fault),
    )
    monkeypatch.setattr(data, "FORMATS", (*data.FORMATS, other))
    assert data.open_index(rlds, cache).name == "made"
    assert data.open_index(tmp_path / "other", cache) == (tmp_path / "other", cache, None)
    folder = copy_rlds(rlds, tmp_path)
    (folder / "both").mkdir()
    with pytest.raises(ValueError, match="made holds data of 2 known formats.*RLDS.* or OTHER"):
        data.open_index(folder, cache)


def test_two_data_sets_of_one_name_are_refused(rlds, cache, tmp_path):
    """With both folders, for statistics are kept by name."""
    folder = copy_rlds(rlds, tmp_path)
    with pytest.raises(ValueError, match=rf"one name, \['made', 'made'\], in {rlds}, {folder}; rename one"):
        data.open_indices([rlds, folder], cache)


# ----------------------------------------------------------------------------------------------------------------------
# The check


def test_check_finds_nothing_in_good_data(rlds_latents, video, script_here, tmp_path):
    """Exit status 0 and how much was read; nothing is written."""
    for folder in (rlds_latents, video):  # an action that never changes, an episode of one step: one warning each
        done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
        warning, count = done.text.splitlines()
        assert done.code == 0 and warning.startswith("warning: ")
        assert re.search(r": 1 found in \d+ episodes, \d+ steps", count)
    assert not (tmp_path / "cache").exists()


def test_check_lists_everything_in_one_go(rlds, labels, script_here, tmp_path):
    """Faults of records, images, numbers, texts and labels in both shards, each on its own line; exit status 1."""
    changes = {
        "/image": replace_step(3, b"no image"),
        "/action": replace_number(0, np.nan),
        "/language_instruction": lambda v: [b""] * len(v),
    }
    folder, path = change_episode(rlds, tmp_path, changes)
    shutil.copy(labels, folder / "labels.safetensors")
    check = ("data.py", folder, "--check", "--cache", tmp_path / "cache")
    done = script_here(*check)
    expected = [
        f"{path.name}: camera image at step 3 of episode 1",
        f"{path.name}: action of made is nan at step 0 of episode 1",
        "labels.safetensors labels the data set with",
        "instruction is empty",
    ]
    assert done.code == 1 and all(text in line for text, line in zip(expected, done.text.splitlines()))
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # of the first record: what comes after it is read all the same, as episodes 0 to 2
    path.write_bytes(content)
    other = path.with_name(path.name.replace("00000-of", "00001-of"))
    other.write_bytes(other.read_bytes()[:-1])
    done = script_here(*check)
    expected = [
        f"{path.name}: wrong checksum of the record",
        f"{path.name}: 3 whole records, 4 in",
        f"{other.name}: the record at",
        f"{other.name}: 3 whole records, 4 in",
        f"{path.name}: camera image at step 3 of episode 0",
        f"{path.name}: action of made is nan at step 0 of episode 0",
    ]
    assert done.code == 1 and all(text in line for text, line in zip(expected, done.text.splitlines()))
    assert "found in 6 episodes" in done.text and not (tmp_path / "cache").exists()
    other.unlink()
    done = script_here(*check)
    assert done.code == 1 and "1 of 2 shards are missing" in done.text and "found in 3 episodes" in done.text


# ----------------------------------------------------------------------------------------------------------------------
# What is in a data set


def test_command_prints_what_is_in_the_data(rlds, index, cache, script_here):
    """Counts, instructions, shapes and statistics as they are, and a picture with a column per episode."""
    done = script_here("data.py", rlds, "--cache", cache)
    assert done.code == 0, done.text
    lengths = np.diff(index.starts)
    assert f"made: 8 episodes, {len(index)} steps ({lengths.min()} to {lengths.max()} an episode)" in done.text
    assert f"fingerprint {index.fingerprint}" in done.text
    assert "4 episodes: put the bowl on the stove" in done.text and "4 episodes: put the bowl on the plate" in done.text
    assert "camera image: (96, 96, 3)" in done.text and "camera wrist_image: (96, 96, 3)" in done.text
    assert "column action: float32 (7,)" in done.text
    (printed,) = (line.split() for line in done.text.splitlines() if line.split()[:2] == ["action", "mean"])
    mean = [float(number) for number in printed[2:]]
    assert np.allclose(mean, standardise(index.columns["action"]).mean(0), atol=1e-4)
    with Image.open(done.text.split("contact sheet: ")[1].strip()) as sheet:
        assert sheet.size == (8 * 160, 4 * 160)
        last = np.asarray(Image.fromarray(index.image("image", int(index.starts[1]) - 1)).resize((160, 160)), int)
        assert np.abs(np.asarray(sheet, int)[160 + 20 : 320, 0:160] - last[20:]).max() == 0  # below its caption
