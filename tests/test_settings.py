"""Settings that contradict each other or the run that is resumed: refused, with the reason, before the work."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from data_helpers import make_chunks

import data
import demos
import eval as evaluation
import inspection
import label
import latent
import prepare
import presets
import probe
import probe_policy
import serve
import study
import targets
import train
import train_latent
import watch
from common import Ranks
from curves import read_log
from files import read_json, write_json
from model import VARIANTS

ONE = Ranks(0, 1, torch.device("cpu"))

LOSSES = ("loss", "lr", "grad_norm")


def losses_of(folder):
    """Return [(loss, learning rate, norm)] of a run's updates."""
    return [tuple(entry[name] for name in LOSSES) for entry in read_log(folder)]


# ----------------------------------------------------------------------------------------------------------------------
# The length of a resumed run


@pytest.mark.parametrize("scheduler", ("constant", "step"))
def test_resumed_run_may_get_more_steps(scheduler, train_config, tmp_path):
    """With these schedules it is, in every bit, the run that had them from the start; config.json says its length, and
    the commits of the code that trained it, where there are several."""
    options = {"lr_scheduler": scheduler, "warmup_ratio": 0.17, "save_every": 4}  # one update, of 4 as of 6
    options |= {"lr_decay_every": 3} if scheduler == "step" else {}
    whole = train.main(train_config(tmp_path / "whole", max_steps=6, **options))
    short = train.main(train_config(tmp_path / "short", max_steps=4, **options))
    started = read_json(short / "config.json")
    write_json(short / "config.json", started | {"commit": "before"})  # as if other code had begun
    for _ in range(2):
        train.main(train_config(short, max_steps=6, resume=True, **options))
    assert losses_of(short) == losses_of(whole) and len(losses_of(short)) == 6
    config = read_json(short / "config.json")
    assert config["train"]["max_steps"] == 6 and config["commit"] == f"before, {started['commit']}"
    write_json(short / "config.json", config | {"commit": "before"})
    train.main(train_config(short, max_steps=6, resume=True, **options))  # nothing is left to train
    assert read_json(short / "config.json")["commit"] == "before"


def test_length_that_would_change_the_schedule(train_config, tmp_path):
    """Cosine, or a warm-up that is not over, or fewer updates than there are; nothing of the run changes."""
    cosine = train.main(train_config(tmp_path / "cosine", max_steps=2))
    constant = train.main(train_config(tmp_path / "constant", max_steps=2, lr_scheduler="constant", warmup_ratio=0.5))
    before = (constant / "config.json").read_bytes()
    for run, steps, reason in [
        (cosine, 3, "is a run of 2 updates, now 3: the cosine schedule spreads over all"),
        (constant, 1, "has 2 updates already, and 1 are asked for"),
        (constant, 6, "has 2 updates, and --warmup-ratio 0.5 of 6 is a warm-up of 3"),
    ]:
        options = {} if run == cosine else {"lr_scheduler": "constant", "warmup_ratio": 0.5}
        with pytest.raises(ValueError, match=reason):
            train.main(train_config(run, max_steps=steps, resume=True, **options))
    assert (constant / "config.json").read_bytes() == before


def test_latent_training_keeps_its_length(rlds, cache, tmp_path):
    """Its schedule is always the cosine."""
    options = dict(data=[rlds], cache=cache, out=tmp_path / "run", global_batch_size=8, num_codes=16, code_dim=16)
    train_latent.train(train_latent.TokenizerTraining(max_steps=2, **options), ONE)
    with pytest.raises(ValueError, match="a run of 2 updates, now 4: the cosine schedule"):
        train_latent.train(train_latent.TokenizerTraining(max_steps=4, resume=True, **options), ONE)


# ----------------------------------------------------------------------------------------------------------------------
# Options without an effect, and numbers out of range

IGNORED = [
    ({"variant": "baseline", "latent_weight": 0.5}, "--latent-weight has no effect with --variant baseline"),
    ({"variant": "la_cond", "align_layer": 2}, "--align-layer has no effect with --variant la_cond"),
    (
        {"variant": "la_align", "continuous": True},
        "for la_direct, la_cond, la_tok, not for la_",
    ),
    ({"variant": "la_tok", "placeholders_per_step": 2}, "only the baseline takes more than 1"),
    ({"rest": "video"}, "--rest has no effect with --data-fraction 1: all episodes keep actions"),
    ({"episodes": 1, "rest_weight": 2.0}, "--rest-weight has no effect with --rest drop"),
    ({"lr_decay_every": 5}, "--lr-decay-every has no effect with --lr-scheduler cosine"),
    ({"cameras": ("image",), "use_wrist_image": False}, "--no-use-wrist-image has no effect with --cameras"),
    ({"val_fraction": 0.0, "val_every": 5}, "--val-every has no effect with --val-fraction 0"),
    ({"lora_rank": 8}, "--lora-rank has no effect with --backbone tiny, which has no LoRA"),
    ({"backbone": "DIR", "tuning": "full", "lora_alpha": 8}, "--lora-alpha has no effect with --tuning full"),
    ({"backbone": "DIR", "tuning": "frozen", "lora_targets": ("qkv",)}, "but tuning is 'frozen': no LoRA"),
    ({"tuning": "full"}, "tuning is 'full', but the tiny backbone is always trained in full"),
]
OUT_OF_RANGE = [
    ({"epochs": -1.0}, "epochs is -1.0; it must be at least 0"),
    ({"epochs": float("nan")}, "epochs is nan"),
    ({"warmup_ratio": 5.0}, "warmup_ratio is 5.0; it must be from 0 to 1"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; it must be at least 0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
    ({"ema": 1.0}, "ema is 1.0; it must be below 1"),
    ({"global_batch_size": 0}, "global_batch_size is 0; it must be at least 1"),
    ({"per_device_batch_size": -2}, "per_device_batch_size is -2; it must be at least 0"),
    ({"image_size": -32}, "image_size is -32; it must be at least 0"),
    ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
    ({"seed": -1}, "seed is -1; it must be at least 0"),
    ({"delta": -4}, "delta is -4; it must be at least 0"),
]


@pytest.mark.parametrize("changes, message", IGNORED + OUT_OF_RANGE)
def test_setting_that_would_be_ignored_or_cannot_be(changes, message, train_config, tmp_path):
    """It is refused by its name, before any data is opened."""
    with pytest.raises(ValueError, match=message):
        prepare.check_config(train_config(tmp_path, **changes), 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_with_an_effect_pass(variant, train_config, tmp_path):
    """The defaults of every variant, with labels and tokenizer and what describes them; what each ablation is for."""
    useful = {
        "baseline": {"placeholders_per_step": 4, "max_grad_norm": 0.0, "ema": 0.0, "delta": 4},
        "la_align": {"align_layer": 2, "align_target": "quantised", "latent_weight": 0.0, "delta": 4},
        "la_direct": {
            "continuous": True,
            "align_target": "quantised",
            "episodes": 1,
            "rest": "video",
            "rest_weight": 2.0,
        },
        "la_cond": {"backbone": "DIR", "tuning": "lora", "lora_rank": 8, "lora_targets": ("qkv",)},
        "la_tok": {"lr_scheduler": "step", "lr_decay_every": 5, "continuous": True, "align_target": "quantised"},
    }
    prepare.check_config(train_config(tmp_path, variant=variant), 1)
    prepare.check_config(train_config(tmp_path, variant=variant, **useful[variant]), 1)


def test_settings_of_the_model_reach_it(train_config, dataset, tmp_path):
    """Those that a model has under the same name, and the loss."""
    changes = {"augmentation": "shift", "continuous": True, "align_layer": 2, "placeholders_per_step": 3}
    changes |= {"latent_weight": 0.5, "tuning": "full", "lora_rank": 8, "lora_alpha": 4, "lora_targets": ("qkv",)}
    changes |= {"head_width": 32, "variant": "la_cond", "image_size": 64, "text_length": 40}
    config = train_config(tmp_path, loss="l2", **changes)
    made = prepare.make_model_config(config, make_chunks(dataset), None, None)
    assert {name: getattr(made, name) for name in changes} == changes and made.action_loss == "l2"


def test_gradients_that_are_not_clipped(train_config, tmp_path):
    """--max-grad-norm 0 trains as a norm that is never reached; the norm is logged all the same."""
    first, second = (train.main(train_config(tmp_path / f"{n}", max_grad_norm=n)) for n in (0.0, 1e9))
    assert losses_of(first) == losses_of(second) and all(norm > 0 for *_, norm in losses_of(first))


def test_other_commands_refuse_what_they_would_ignore(tmp_path):
    """train_latent.py, label.py, probe.py, demos.py, eval.py."""

    def lam(**changes):
        train_latent.check(train_latent.LamTraining(data=[tmp_path], out=tmp_path / "lam", **changes), 1)

    def refuses(match, call, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            call(*arguments, **options)

    lam(stage=1, text="T5")
    lam(stage=0, action_fraction=0.0, patch_size=4)
    refuses("--text has no effect with --stage 0; leave it out", lam, text="T5")
    refuses("--action-fraction has no effect with --stage 1", lam, stage=1, action_fraction=0.5)
    refuses("--chunk has no effect with --stage 1 and without actions", lam, stage=1, chunk=4)
    refuses("--chunk has no effect with --stage 0 and without actions", lam, action_fraction=0.0, chunk=4)
    refuses("--patch-size has no effect with --features DINO", lam, features="DINO", patch_size=4)
    refuses("learning_rate is -0.1; it must be positive", lam, learning_rate=-0.1)
    refuses("num_workers is -1; it must be at least 0", lam, num_workers=-1)
    config = label.Config(data=tmp_path, lam=tmp_path, batch_size=0)
    refuses("batch_size is 0; it must be at least 1", label.main, config, ONE)
    config = probe.Config(data=tmp_path, tokenizer=tmp_path, position=2)
    refuses("position is 2, but there are code positions only with --lam", probe.main, config)
    refuses("out, seed cannot be used with dry_run", demos.check, demos.Config(dry_run=True, out=tmp_path, seed=20_000))
    for options, match in [
        ({"run": "r", "blind": True, "black_camera": "image"}, "blind makes all images black"),
        ({"run": "r", "cache": tmp_path}, "cache cannot be used with a run"),
        ({"replay": tmp_path, "data": "made"}, "data cannot be used with replay without a run"),
        ({"compare": (tmp_path,), "trials": 3}, "trials cannot be used with compare"),
    ]:
        refuses(match, evaluation.check, evaluation.Config(**options))


# ----------------------------------------------------------------------------------------------------------------------
# Options that nothing reads

READ_BY = {  # the settings of each command: the modules that read them
    train.Config: (train, targets, prepare, watch),
    evaluation.Config: (evaluation,),
    demos.Config: (demos,),
    data.Config: (data, inspection),
    label.Config: (label,),
    probe.Config: (probe,),
    probe_policy.Config: (probe_policy,),
    serve.Config: (serve,),
    study.Config: (study, presets),
    train_latent.LamTraining: (latent, train_latent),
    train_latent.TokenizerTraining: (train_latent,),
}


@pytest.mark.parametrize("settings", READ_BY, ids=lambda settings: f"{settings.__module__}.{settings.__name__}")
def test_every_setting_is_read(settings):
    """No field of a command is there for nothing: each is read as `config.<field>` or `sizes.<field>`."""
    read = set(prepare.LENGTH) if settings is train.Config else set()  # read by name
    for module in READ_BY[settings]:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                if owner in ("config", "sizes"):
                    read.add(node.attr)
    assert {field.name for field in fields(settings)} <= read
