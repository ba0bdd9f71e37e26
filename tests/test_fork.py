"""docs/fork.md: its lines are applied to a copy of the code, and its commands run there."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, printed

from curves import read_log

PAGE = (ROOT / "docs" / "fork.md").read_text()


def apply_diff(folder, diff):
    """Apply a block of the page: its unchanged and removed lines stand together in the file, exactly once."""
    name, *lines = diff.strip("\n").splitlines()
    path = folder / name.removeprefix("--- ")
    old = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "-"))
    new = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "+"))
    assert path.read_text().count(old) == 1, f"{path.name} does not hold once:\n{old}"
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the code with every recipe of the page applied."""
    folder = tmp_path_factory.mktemp("fork")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "data").symlink_to(ROOT / "data")
    for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.S):
        apply_diff(folder, diff)
    (simulator,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "line_sim.py").write_text(simulator)
    return folder


def run(folder, command, *small, **replaced):
    """Run one of the page's commands in the copy, made small by further flags; return what it prints."""
    command = [sys.executable, *(replaced.get(word, word) for word in command[1:]), *map(str, small)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(fork):
    """A run of the sixth variant, with the other loss and the other backbone."""
    small = ["--max-steps", 2, "--num-workers", 0, "--val-fraction", 0, "--out", "run"]
    options = printed("python train.py --loss log_cosh")[2:] + printed("python train.py --backbone wide")[2:]
    run(fork, printed("python train.py --variant la_huber"), *options, *small)
    return fork / "run"


def test_a_sixth_variant_another_loss_and_another_backbone_train(trained):
    """One run has all three: the losses are finite, the saved model is what was asked for."""
    settings = json.loads((trained / "config.json").read_text())["model"]
    assert (settings["variant"], settings["action_loss"], settings["backbone"]) == ("la_huber", "log_cosh", "wide")
    log = read_log(trained)
    assert len(log) == 2 and all(0 < entry["latent_loss"] < 1e3 for entry in log)
    assert all(entry["loss"] == pytest.approx(entry["action_loss"] + entry["latent_loss"]) for entry in log)


def test_another_quantiser_trains(fork):
    """Its codebook is saved as the grid of 16 points."""
    command = printed("python train_latent.py lam --codebook grid")
    text = run(fork, command, "--max-steps", 2, "--global-batch-size", 4, **{"runs/lam_grid": "lam"})
    assert "lam is ready" in text
    assert json.loads((fork / "lam" / "config.json").read_text())["model"]["sizes"]["codebook"] == "grid"


def test_another_simulator_evaluates(fork, trained):
    """The run of above plays both tasks of the line."""
    command = printed("python eval.py RUN --simulator line")
    text = run(fork, command, "--trials", 1, "--envs", 1, RUN="run")
    assert re.search(r"push the point to the left +[01]/1", text) and "all tasks" in text
