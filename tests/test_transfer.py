"""--init-from: a run starts from exactly the weights of another that it says it took."""

import json
import re
import shutil

import pytest
import torch

import prepare
import train
from checkpoint import trainable_tensors
from common import Ranks
from files import load_tensors, save_tensors

ONE = Ranks(0, 1, torch.device("cpu"))


def started(config):
    """Return the trained tensors of a run that has made no step."""
    return trainable_tensors(prepare.prepare(config, ONE, train.FREE_TO_CHANGE).vla)


@pytest.fixture(scope="module")
def first(train_config, tmp_path_factory):
    """A run of la_direct on video alone: no episode keeps its actions."""
    out = tmp_path_factory.mktemp("first") / "video"
    return train.main(train_config(out, variant="la_direct", data_fraction=0.0, rest="video", max_steps=3))


def test_same_variant_takes_everything(first, train_config, tmp_path, capsys):
    """All tensors are the first run's, and training goes on from there; without the flag those it trained differ."""
    weights, _ = load_tensors(first / "model.safetensors")
    config = train_config(tmp_path / "second", variant="la_direct", episodes=1, init_from=str(first), max_steps=1)
    begun = started(config)
    assert begun.keys() == weights.keys() and all(torch.equal(begun[name], weights[name]) for name in begun)
    said = (
        rf"weights of {first}: backbone (\d+) of \1, placeholders 1 of 1, head (\d+) of \2, latent head 2 of 2 tensors"
    )
    assert re.search(f"^{said}$", capsys.readouterr().out, re.MULTILINE)
    fresh = started(train_config(tmp_path / "fresh", variant="la_direct", episodes=1))
    moved = [name for name in fresh if not torch.equal(fresh[name], weights[name])]
    assert len(moved) > 50
    shutil.rmtree(tmp_path / "second")
    assert "init_from" in json.loads((train.main(config) / "config.json").read_text())["train"]


def test_other_variant_takes_what_fits_and_names_the_rest(first, train_config, tmp_path, capsys):
    """The baseline has 8 placeholders for 32, and no latent head: backbone and action head are taken, nothing else."""
    weights, _ = load_tensors(first / "model.safetensors")
    plain = started(train_config(tmp_path / "plain", variant="baseline"))
    capsys.readouterr()
    begun = started(train_config(tmp_path / "other", variant="baseline", init_from=str(first)))
    text = capsys.readouterr().out
    for name, tensor in begun.items():
        taken = name.startswith(("backbone.", "head."))
        assert torch.equal(tensor, weights[name] if taken else plain[name]), name
    assert f"weights of {first} (a la_direct): backbone" in text and "placeholders 0 of 1" in text
    assert "left as they were: queries [8, 64] (there: [32, 64])" in text


def test_backbone_must_fit_as_a_whole(first, train_config, tmp_path):
    """Another size, a folder that is no run, and another base model are refused before a folder is made."""
    broken = shutil.copytree(first, tmp_path / "broken")
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | {"base_hash": "0" * 16}))
    with pytest.raises(ValueError, match="was trained on a different backbone than tiny, or on other parts"):
        started(train_config(tmp_path / "run", variant="baseline", init_from=str(broken)))
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        started(train_config(tmp_path / "run", variant="baseline", init_from=str(tmp_path)))
    larger = train_config(tmp_path / "larger", variant="baseline", init_from=str(first))
    with pytest.MonkeyPatch.context() as patch:
        text, vision = prepare.SIZES["tiny"]
        patch.setitem(prepare.SIZES, "tiny", (text | {"intermediate_size": 96}, vision))
        with pytest.raises(ValueError, match="the backbone of .* does not fit: backbone.qwen.language_model"):
            started(larger)
    assert not (tmp_path / "run").exists() and not (tmp_path / "larger").exists()


def test_layers_of_another_robot_are_left_alone(first, train_config, tmp_path, capsys):
    """The state's layer and the output layer belong to an embodiment; the rest of the head is taken. A latent head that
    learned other codes is taken, too, and it is said."""
    other = shutil.copytree(first, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    content["data"][0]["embodiment"] = "bridge"
    content["targets"] = [{"fingerprint": "f00"}] * 2
    (other / "config.json").write_text(json.dumps(content))
    capsys.readouterr()
    started(train_config(tmp_path / "run", variant="la_direct", init_from=str(other)))
    text = capsys.readouterr().out
    left = re.search("left as they were: (.*)", text)[1]
    assert f"weights of {other} (trained on other latent targets): backbone" in text and "latent head 2 of 2" in text
    assert re.findall(r"[\w.]+(?= \[)", left) == [
        f"head.{n}" for n in ("proprio.weight", "proprio.bias", "out.weight", "out.bias")
    ]


def test_held_out_episodes_that_the_weights_know_are_named(first, train_config, tmp_path, capsys):
    """Another seed, or another share, of the same data holds out what the first run trained on; other data does not.
    Labels of one model for several data sets are no other targets."""
    known = "(trained on episodes that are held out here: its --val-fraction and --seed are others): backbone"
    settings = dict(variant="la_direct", init_from=str(first))
    for changes, is_named in (({}, False), ({"seed": 1}, True), ({"val_fraction": 0.4}, True)):
        started(train_config(tmp_path / str(changes), **settings, **changes))
        assert (known in capsys.readouterr().out) == is_named, changes
    other = shutil.copytree(first, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    content["data"][0]["fingerprint"] = "elsewhere"
    content["targets"] *= 2
    (other / "config.json").write_text(json.dumps(content))
    started(train_config(tmp_path / "run", variant="la_direct", init_from=str(other), seed=1))
    assert f"weights of {other}: backbone" in capsys.readouterr().out


def test_resumed_run_does_not_start_over(first, train_config, tmp_path):
    """--init-from counts at the start alone: interrupted and resumed, a run is the one that was not, and the other run
    may be gone."""
    given = shutil.copytree(first, tmp_path / "given")
    settings = dict(variant="la_cond", init_from=str(given), max_steps=4, save_every=2)
    whole = train.main(train_config(tmp_path / "whole", **settings))
    again = shutil.copytree(whole, tmp_path / "again")
    for name in ("training-4.safetensors", "model.safetensors"):
        (again / name).unlink()
    shutil.rmtree(given)
    train.main(train_config(again, **settings, resume=True))
    one, other = (load_tensors(run / "model.safetensors")[0] for run in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_low_rank_updates_keep_their_scale(checkpoint, train_config, tmp_path):
    """A run whose low-rank updates would count four times as much is refused."""
    settings = dict(variant="baseline", backbone=str(checkpoint(torch.float32)), lora_rank=2, image_size=64)
    first = train.main(train_config(tmp_path / "first", lora_alpha=4, max_steps=1, **settings))
    started(train_config(tmp_path / "same", lora_alpha=4, init_from=str(first), **settings))
    with pytest.raises(ValueError, match="first has lora_alpha 4, this run 16: its low-rank updates would be scaled"):
        started(train_config(tmp_path / "other", lora_alpha=16, init_from=str(first), **settings))


def test_resumed_run_keeps_its_tokenizer(train_config, tokenizer, tmp_path):
    """A tokenizer that lies elsewhere continues a run of la_tok; one with other codes is refused."""
    settings = dict(variant="la_tok", max_steps=4, save_every=2)
    moved = shutil.copytree(tokenizer, tmp_path / "moved")
    train.main(train_config(tmp_path / "run", **settings))
    train.main(train_config(tmp_path / "run", resume=True, **settings | {"tokenizer": str(moved)}))
    tensors, info = load_tensors(moved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("codebook"))
    save_tensors(moved / "model.safetensors", tensors | {name: tensors[name].flip(0)}, **info)
    with pytest.raises(ValueError, match="trained with other settings: contents of the targets"):
        train.main(train_config(tmp_path / "run", resume=True, **settings | {"tokenizer": str(moved)}))
