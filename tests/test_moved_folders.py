"""Folders given by relative paths, or moved since: backbones, frame features, text encoders, descriptions."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
import train_latent
from checkpoint import training_saves
from common import Ranks
from files import load_tensors, resolve_folder, save_tensors
from policy import Policy


def content(run):
    """Return the content of a run's config.json."""
    return json.loads((run / "config.json").read_text())


@pytest.fixture
def qwen(checkpoint, tmp_path, monkeypatch):
    """The name of a small Qwen3-VL in the current folder, which is `tmp_path`/work."""
    (tmp_path / "work").mkdir()
    shutil.copytree(checkpoint(torch.float32), tmp_path / "work/qwen")
    monkeypatch.chdir(tmp_path / "work")
    return "qwen"


OPTIONS = dict(variant="la_cond", lora_rank=4, text_length=24, lr_scheduler="constant", warmup_ratio=0.0)


def test_relative_backbone_is_found_from_elsewhere(qwen, train_config, tmp_path, monkeypatch):
    """It is stored by its full path, and the same command resumes the run from another folder."""
    run = train.main(train_config(tmp_path / "run", backbone=qwen, **OPTIONS))
    full = str(tmp_path / "work/qwen")
    assert content(run)["model"]["backbone"] == content(run)["train"]["backbone"] == full
    monkeypatch.chdir(tmp_path)
    Policy(run)
    train.main(train_config(run, backbone="work/qwen", resume=True, **OPTIONS))


def test_moved_backbone_is_named(qwen, train_config, tmp_path):
    """The error says how to name its place, where it is then found and checked; a resumed run stores that."""
    run = train.main(train_config(tmp_path / "run", backbone=qwen, **OPTIONS))
    moved = shutil.move(tmp_path / "work/qwen", tmp_path / "moved")
    with pytest.raises(ValueError, match="no folder .*work/qwen.* --backbone DIR, or Policy.run, backbone=DIR"):
        Policy(run)
    assert Policy(run, backbone=str(moved)).chunk == 8
    with pytest.raises(FileNotFoundError, match="there is no folder ./qwen; give one, or a name on the Hub"):
        train.main(train_config(run, backbone="./qwen", resume=True, **OPTIONS))
    longer = dict(backbone=str(moved), resume=True, max_steps=3)
    train.main(train_config(run, **longer | OPTIONS))
    assert content(run)["model"]["backbone"] == str(moved) and next(iter(training_saves(run))) == 3
    Policy(run)
    other = shutil.copytree(moved, tmp_path / "other")
    tensors, info = load_tensors(other / "model.safetensors")
    save_tensors(other / "model.safetensors", {name: tensor + 1 for name, tensor in tensors.items()}, **info)
    with pytest.raises(ValueError, match=f"trained with other settings: backbone {moved} .now {other}"):
        train.main(train_config(run, **longer | {"backbone": str(other)} | OPTIONS))


def test_evaluation_takes_the_place_of_a_moved_backbone(run, monkeypatch):
    """`eval.py RUN --backbone DIR`, and with --replay; a backbone that is made of random weights has no place."""
    asked = []

    def policy(*values, **options):
        asked.append(options["backbone"])
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "Policy", policy)
        for more in ({}, {"replay": Path("data/libero_tiny")}):
            with pytest.raises(InterruptedError):
                evaluation.main(evaluation.Config(str(run.folder), backbone="DIR", **more))
    assert asked == ["DIR", "DIR"]
    with pytest.raises(ValueError, match="backbone is DIR, but .* has 'tiny', which lies nowhere"):
        evaluation.main(evaluation.Config(str(run.folder), backbone="DIR"))


def test_features_and_text_encoder_are_stored_by_their_full_paths(dino, t5, rlds, cache, tmp_path, monkeypatch):
    """Of a latent action model."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("dino", dino), ("t5", t5)):
        shutil.copytree(folder, tmp_path / name)
    sizes = dict(stage=1, features="dino", text="t5", image_size=28, width=16, num_blocks=1, delta=4)
    config = train_latent.LamTraining(data=[rlds], out=tmp_path / "lam", cache=cache, max_steps=1, **sizes)
    train_latent.train(config, Ranks(0, 1, torch.device("cpu")))
    stored = content(tmp_path / "lam")["model"]["sizes"]
    assert (stored["features"], stored["text"]) == (str(tmp_path / "dino"), str(tmp_path / "t5"))


def test_names_that_are_no_folders(tmp_path, monkeypatch):
    """Names on the Hub and of random weights stay, though a folder may be called as the latter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve_folder("tiny", ["tiny"]) == "tiny" and resolve_folder("tiny") == str(tmp_path / "tiny")
    assert resolve_folder("Qwen/Qwen3-VL-2B-Instruct") == "Qwen/Qwen3-VL-2B-Instruct"
    for wrong in ("/no/such", "./no", "a/b/c", "../x"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            resolve_folder(wrong)


def test_description_may_be_named_in_another_way(train_config, tmp_path, monkeypatch):
    """A resumed run compares what it says."""
    monkeypatch.chdir(tmp_path)
    spec = {"embodiment": "mine", "cameras": {"image": "observation/image"}, "action": ["action"], "text": "go"}
    Path("mine.json").write_text(json.dumps(spec))
    run = train.main(train_config(tmp_path / "run", spec=("mine.json",)))
    train.main(train_config(run, spec=(str(tmp_path / "mine.json"),), resume=True))
    Path("mine.json").write_text(json.dumps(spec | {"text": "stop"}))
    with pytest.raises(ValueError, match="descriptions of the data"):
        train.main(train_config(run, spec=("mine.json",), resume=True))
