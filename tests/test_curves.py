"""curves.py: the picture of a run's log."""

import json
import sys

import numpy as np
import pytest
from conftest import printed
from PIL import Image

import curves
import train
from model import VARIANTS


@pytest.fixture
def panels(monkeypatch):
    """The panels that are drawn: [(name, its entries)]."""
    drawn = []
    draw = curves.draw_panel

    def record(axes, name, entries):
        drawn.append((name, entries))
        draw(axes, name, entries)

    monkeypatch.setattr(curves, "draw_panel", record)
    return drawn


def write_log(folder, entries):
    """Write the log and the config of a run."""
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = {"variant": "la_cond", "data": ["/data/made"], "global_batch_size": 4}
    (folder / "config.json").write_text(json.dumps({"train": settings}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_ends_with_its_curves(variant, train_config, tmp_path, panels):
    """Of every variant, also after two updates: what it logs has a panel each."""
    train.main(train_config(tmp_path / "run", variant=variant))
    expected = {"action_loss", "val_action_l1", "lr"}
    if variant != "baseline":
        expected.add("latent_loss")
    if VARIANTS[variant].loss == "codes":
        expected.add("latent_accuracy")
    assert {name for name, _ in panels} == expected
    width, height = Image.open(tmp_path / "run" / "curves.png").size
    assert 500 < width < 2000 and 300 < height < 2000


def test_interrupted_run_is_drawn_by_the_command(run, script_here, tmp_path):
    """The line that was being written when it was killed is left out."""
    for name in ("config.json", "log.jsonl"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    done = script_here(*[str(tmp_path) if word == "RUN" else word for word in printed("python curves.py RUN")[1:]])
    assert done.code == 0 and f"curves: {tmp_path}/curves.png" in done.text, done.text
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    (tmp_path / "log.jsonl").write_text("no JSON\n")
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        curves.draw_curves(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="log.jsonl has no entry yet"):
        curves.draw_curves(tmp_path)


def test_success_has_a_panel(tmp_path, panels):
    """Its entries lie between those of the updates; an update that was skipped has no loss."""
    rng = np.random.default_rng(0)
    entries = [{"step": step, "lr": 1e-3, "action_loss": float(value)} for step, value in enumerate(rng.random(300))]
    entries[7]["action_loss"] = float("nan")
    entries.insert(250, {"step": 249, "success_step": 200, "success": 0.5, "success_low": 0.1, "success_high": 0.9})
    write_log(tmp_path, entries)
    curves.draw_curves(tmp_path)
    assert {name: len(drawn) for name, drawn in panels} == {"action_loss": 300, "success": 1, "lr": 300}


def test_smoothing_by_hand():
    """The mean of the finite values around each one, fewer at both ends."""
    values = np.array([1, 2, 6, np.nan, 4])
    assert np.allclose(curves.smooth(values, 3), [1.5, 3, 4, 5, 4])
    assert np.array_equal(curves.smooth(values, 1), values, equal_nan=True)


def test_missing_matplotlib_is_a_warning(train_config, tmp_path, monkeypatch, capsys):
    """The run has everything else."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.main(train_config(tmp_path / "run", variant="baseline"))
    assert "draw_curves failed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "run" / "README.md").read_text()
