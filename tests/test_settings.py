"""Settings that contradict each other, the data or the run that is resumed: refused, with the reason, before the work."""

import json

import pytest
import torch

import train
import train_latent
from common import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))

LOSSES = ("loss", "lr", "grad_norm")


def log_of(folder):
    """Return [(loss, learning rate, norm)] of a run's updates."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [tuple(entry[name] for name in LOSSES) for entry in entries]


# ----------------------------------------------------------------------------------------------------------------------
# The length of a resumed run


@pytest.mark.parametrize("scheduler", ("constant", "step"))
def test_resumed_run_may_get_more_steps(scheduler, train_config, tmp_path):
    """With these schedules it is, in every bit, the run that had them from the start; config.json says its length."""
    options = {"lr_scheduler": scheduler, "warmup_ratio": 0.17, "save_every": 4}  # one update, of 4 as of 6
    options |= {"lr_decay_every": 3} if scheduler == "step" else {}
    whole = train.main(train_config(tmp_path / "whole", max_steps=6, **options))
    short = train.main(train_config(tmp_path / "short", max_steps=4, **options))
    train.main(train_config(short, max_steps=6, resume=True, **options))
    assert log_of(short) == log_of(whole) and len(log_of(short)) == 6
    assert json.loads((short / "config.json").read_text())["train"]["max_steps"] == 6


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
