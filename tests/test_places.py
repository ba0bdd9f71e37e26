"""Places that cannot be written: the error comes before the work, and names the option that chooses another."""

import os
from pathlib import Path

import pytest

import data
import demos
import eval as evaluation
import files
import label
import probe
import results
import train
import train_latent
from common import Ranks
from index import CACHE, cache_folder

ONE = Ranks(0, 1, "cpu")


@pytest.fixture
def file(tmp_path):
    """A file, below which nothing can be made; not even by the superuser, whom the tests may run as."""
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A folder that the system calls read-only."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: folder not in (path, *path.parents) and access(path, mode))
    return folder


def test_places_that_can_be_written(tmp_path):
    """Folders and files that are there, or whose folders can be made."""
    for path in (tmp_path, tmp_path / "a" / "b", Path("runs/made/by/a/test")):
        files.check_writable(path, "--out")


def test_home_that_cannot_be_written(rlds, file, read_only, script_here):
    """The error names --cache, also where the system says that it could be; `data.py` prints it without a traceback."""
    for home in (file, read_only, Path("/proc/nobody")):
        with pytest.raises(PermissionError, match=f"{home}.* Choose another place with --cache"):
            data.open_dataset(rlds, home / ".cache" / "latent-actions")
    done = script_here("data.py", rlds, "--cache", file / "cache")
    assert done.code == 1 and "error: " in done.text and "--cache" in done.text and "Traceback" not in done.text


def test_no_home_at_all(monkeypatch):
    """As in a container with a user that /etc/passwd does not know."""

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ValueError, match="no home: Could not determine home directory. Choose a folder with --cache"):
        cache_folder(CACHE, "made")


def test_cache_of_another_user_is_read(rlds, cache, read_only, monkeypatch):
    """An index that is there is used, and statistics that cannot be kept are computed."""
    dataset = data.open_dataset(rlds, cache)

    def refuse(path, content):
        raise PermissionError(path)

    monkeypatch.setattr(data, "write_json", refuse)
    monkeypatch.setattr(Path, "exists", lambda path: "statistics" not in path.name and os.path.exists(path))
    assert dataset.stats["num_trajectories"] == 8


@pytest.mark.parametrize("script", ("train", "train_latent"))
def test_run_folder_that_cannot_be_used(script, train_config, read_only, file, tmp_path, monkeypatch):
    """The error names --out, and comes before the data is opened; so for a folder that is not empty, or is a file."""
    monkeypatch.setattr("prepare.open_datasets", None)
    monkeypatch.setattr(train_latent, "open_datasets", None)

    def start(out):
        if script == "train":
            train.main(train_config(out))
        else:
            train_latent.train(train_latent.TokenizerTraining(data=[Path("data")], out=out), ONE)

    for out in (read_only / "run", file / "run"):
        with pytest.raises(PermissionError, match=f"{out}.* Choose another place with --out"):
            start(out)
    for out in (tmp_path, file):
        with pytest.raises(FileExistsError, match="Choose another --out, or continue it with --resume"):
            start(out)
    with pytest.raises(TypeError):  # it wants to open the data
        start(tmp_path / "new")


def test_read_only_run_is_evaluated_elsewhere(read_only, tmp_path, monkeypatch):
    """The error names --out, and comes before the policy is loaded; so where the result file is somebody else's."""
    monkeypatch.setattr(evaluation, "Policy", None)
    with pytest.raises(PermissionError, match=f"{read_only}.* Choose another place with --out"):
        evaluation.main(evaluation.Config(str(read_only)))
    with pytest.raises(TypeError):  # there is no policy: it got that far
        evaluation.main(evaluation.Config(str(read_only), out=tmp_path / "elsewhere.jsonl"))
    with pytest.raises(PermissionError, match="--out"):
        results.Results(read_only / "eval.jsonl", {}, {})


def test_labels_probe_and_demonstrations(read_only, rlds, cache, monkeypatch):
    """Of the other commands, too."""
    with pytest.raises(PermissionError, match="Choose another place with --out"):
        demos.check(demos.Config(out=read_only / "demos"))
    monkeypatch.setattr(label, "load_lam", None)
    with pytest.raises(PermissionError, match="Choose another place with --out"):
        label.main(label.Config(data=rlds, lam=Path("lam"), cache=cache, out=read_only / "labels.safetensors"), ONE)
    monkeypatch.setattr(probe, "open_dataset", None)
    with pytest.raises(PermissionError, match="Choose another place with --out"):
        probe.main(probe.Config(rlds, lam=read_only))
