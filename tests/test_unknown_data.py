"""Folders given as --data: what is found beside a data set, and what a folder is that holds none that can be read."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from data_helpers import copy_rlds

import data
import prepare
import targets
import train

# ----------------------------------------------------------------------------------------------------------------------
# What lies beside a data set


@pytest.mark.parametrize("given", ("made", "made/1.0.0", "made/1.0.0/.", ".", "..", "link"))
@pytest.mark.parametrize("where", ("made", "made/1.0.0"))
def test_version_folder_finds_what_lies_beside(given, where, rlds, labels, tokenizer, tmp_path, monkeypatch):
    """Labels, tokenizer, description and the expert's outcomes lie in the folder of the data set or of its version, and
    either is given, however it is written; its name stays the same."""
    copy_rlds(rlds, tmp_path)
    spec = {"embodiment": "mine", "cameras": {"image": "observation/image"}, "action": ["action"]}
    shutil.copy(labels, tmp_path / where / "labels.safetensors")
    shutil.copytree(tokenizer, tmp_path / where / "tokenizer")
    (tmp_path / where / "spec.json").write_text(json.dumps(spec))
    (tmp_path / where / "expert.json").write_text(json.dumps({"evaluation": [{"task": 8}]}))
    (tmp_path / "link").symlink_to(tmp_path / "made")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.0.0").symlink_to(tmp_path / "made" / "1.0.0")
    monkeypatch.chdir(tmp_path / {".": "made/1.0.0", "..": "made/1.0.0"}.get(given, ""))
    path = Path(given)
    assert data.open_index(tmp_path / "other", tmp_path / "cache").name == "other"
    dataset = data.open_dataset(path, tmp_path / "cache")
    assert dataset.name == "made" and dataset.spec.embodiment == "mine"
    assert targets.label_path(dataset, path).read_bytes() == labels.read_bytes()
    assert (dataset.find_shipped("tokenizer") / "config.json").exists()
    assert prepare.describe_data(dataset, ["image"], [0])["expert"] == [{"task": 8}]


def test_missing_tokenizer_is_made_beside_the_data(rlds, cache, train_config, tmp_path):
    """Not inside the folder of its version; and the expert of a neighbour is none of the data set's."""
    with pytest.raises(FileNotFoundError, match=re.escape(f"and {rlds}/tokenizer does not exist. Make it: ")):
        train.main(train_config(tmp_path / "run", variant="la_tok", tokenizer="", data=(rlds / "1.0.0",)))
    flat = shutil.copytree(rlds / "1.0.0", tmp_path / "flat")
    (tmp_path / "expert.json").write_text("{}")
    assert data.open_dataset(flat, cache).find_shipped("expert.json") == flat / "expert.json"


# ----------------------------------------------------------------------------------------------------------------------
# Folders that hold no data set


def make_files(folder, *names):
    """Make a folder with empty files of these names; return it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize("names, message", [
    (["a/put_the_bowl_demo.hdf5"], r"HDF5 \(a/put_the_bowl_demo.hdf5\).* openvla/modified_libero_rlds on the Hub"),
    (["x-train.tfrecord-00000-of-00002", "dataset_info.json"], "TFRecord shards .*without the features.json"),
    (["meta/episodes.jsonl", "data/chunk-000/a.parquet"], "a LeRobot data set without its meta/info.json. Copy all"),
    (["data/chunk-000/a.parquet"], r"Parquet files \(data/chunk-000/a.parquet\) without a LeRobot data set's meta"),
    (["replay.zarr/.zgroup"], r"zarr \(replay.zarr"),
    (["a.mcap"], r"recordings of ROS \(a.mcap\)"),
    (["a.AVI"], r"videos \(a.AVI\) that are not MP4. Convert each: ffmpeg"),
    (["traj0/000000.png"], r"single images \(traj0/000000.png\)"),
    (["all.tar.gz"], r"archives \(all.tar.gz\). Unpack them"),
    (["out.npy"], r"arrays \(out.npy\)"),
    (["config.json", "model.safetensors"], r"weights or labels \(model.safetensors\), so it may be a run"),
    (["notes.txt"], r"\. Give --data a folder with RLDS .*each\)\.$"),
])  # fmt: skip
def test_folder_that_is_no_data_set_says_what_it_is(names, message, tmp_path):
    """And what to do, with the formats that there are; so for the file itself."""
    folder = make_files(tmp_path / "given", *names)
    with pytest.raises(ValueError, match=f"given holds no data set of a known format.*{message}"):
        data.open_index(folder, tmp_path)
    if len(names) == 1 and "/" not in names[0]:
        with pytest.raises(FileNotFoundError, match=re.escape(names[0]) + " is a file, no data directory. "):
            data.open_index(folder / names[0], tmp_path)


def test_data_set_above_or_below_is_named(rlds, tmp_path):
    """Of a file or a folder in a data set the folder above, of the Hub's cache the one two below."""
    copy = copy_rlds(rlds, tmp_path)
    shard = next((copy / "1.0.0").glob("*.tfrecord*"))
    with pytest.raises(FileNotFoundError, match=f"is a file.*Here that is {copy}/1.0.0"):
        data.open_index(shard, tmp_path)
    snapshot = make_files(tmp_path / "hub/datasets--a--b", "snapshots/0123/meta/info.json")
    with pytest.raises(ValueError, match=f"Here that is {snapshot}/snapshots/0123"):
        data.open_index(snapshot, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"Here that is {snapshot}/snapshots/0123"):
        data.open_index(snapshot / "snapshots/0123/meta/info.json", tmp_path)


def test_name_on_the_hub_says_how_to_download(tmp_path, monkeypatch):
    """As "lerobot/pusht", which is no folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download lerobot/pusht --repo-type dataset --local-dir DIR"):
        data.open_index("lerobot/pusht", tmp_path)


def test_pointers_of_git_lfs_are_named(rlds, tmp_path):
    """As a clone without git-lfs leaves them, instead of a damaged shard; a Parquet file, too."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345678\n"
    copy = copy_rlds(rlds, tmp_path)
    shard = sorted((copy / "1.0.0").glob("*.tfrecord*"))[1]
    shard.write_text(pointer)
    with pytest.raises(ValueError, match=f"{shard} is a pointer of Git LFS, not the file: git lfs pull"):
        data.open_index(copy, tmp_path / "cache")
    folder = shutil.copytree(ROOT / "tests/fixtures/lerobot/v30", tmp_path / "v30")
    for file in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        (folder / file).write_text(pointer)
        with pytest.raises(ValueError, match="is a pointer of Git LFS"):
            data.open_index(folder, tmp_path / "cache")


def test_missing_file_of_metadata_is_named(tmp_path):
    """Of LeRobot 2.1, whose metadata are lines of text."""
    folder = shutil.copytree(ROOT / "tests/fixtures/lerobot/v21", tmp_path / "v21")
    (folder / "meta/tasks.jsonl").unlink()
    with pytest.raises(ValueError, match="damaged metadata: FileNotFoundError.*meta/tasks.jsonl"):
        data.open_index(folder, tmp_path / "cache")
