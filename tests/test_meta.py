"""Nothing waits for a GPU or mixes devices: on torch's `meta` device, which has shapes and no numbers, both are errors.

A tensor that stayed on the CPU, `.item()`, `.tolist()`, an `if` on a number, a mask that selects rows: each raises.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from model_helpers import batch_for, small_config

import common
import targets
import train
from batches import ActionChunks, EpisodeSteps
from latent import ActionTokenizer, LamSizes, LatentActionModel
from model import VARIANTS, VLA
from policy import Policy

META = torch.device("meta")
SETTINGS = [(variant, continuous) for variant in VARIANTS for continuous in (False, True)]
SETTINGS = [each for each in SETTINGS if not each[1] or VARIANTS[each[0]].loss == "codes"]


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Autocast has no meta device; all that it would change is in which type matrices multiply."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def on_meta(batch):
    """Return a batch on the meta device."""
    return common.to_device(batch, META)


def check_step(module, batch):
    """Run a training step on the meta device: forward, backward, norm of the gradient, update."""
    module.train()
    optimizer = torch.optim.AdamW(common.parameter_groups(module, 1e-4))
    average = common.MovingAverage(module, 0.99)
    result = module(on_meta(batch))
    result["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    average.update(0)
    assert result["loss"].device == norm.device == META
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained and all(p.device == META for p in trained)


def augmented(vla, **more):
    """Return a random batch with draws for augmentation."""
    return batch_for(vla) | {"draws": torch.rand(4, vla.config.cameras, 6)} | more


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("variant, continuous", SETTINGS)
def test_step_of_every_variant(variant, continuous, checkpointing):
    """With codes and with vectors, with and without gradient checkpointing."""
    vla = VLA(small_config(variant, continuous=continuous)).to(META)
    vla.backbone.checkpointing = checkpointing
    check_step(vla, augmented(vla))


@pytest.mark.parametrize("variant", ("baseline", "la_cond"))
@pytest.mark.parametrize("tuning", ("lora", "full", "frozen"))
def test_step_on_a_pretrained_backbone(tuning, variant, checkpoint):
    """Low-rank updates, all weights, none; the weights in bf16 where they stay frozen."""
    dtype = torch.float32 if tuning == "full" else torch.bfloat16
    config = replace(small_config(variant), backbone=str(checkpoint(dtype)), tuning=tuning, lora_rank=2)
    vla = VLA(config)
    if tuning != "full":
        vla.backbone.qwen.to(dtype)
    check_step(vla.to(META), augmented(vla))


def test_more_room_for_text_on_a_device():
    """A server makes room for longer instructions when the policy is on its device already."""
    vla = VLA(small_config("la_cond")).to(META)
    vla.backbone.reserve_text(64)
    assert all(buffer.device == META for buffer in vla.buffers())
    batch = on_meta(batch_for(vla))
    assert vla.predict(batch)[0].device == META


def test_step_of_several_robots_by_quantiles():
    """Embodiments of different sizes and numbers of cameras in one batch."""
    sizes = (("a", 7, 8, 2), ("b", 5, 3, 1))
    vla = VLA(small_config("la_cond", embodiments=sizes, action_loss="quantile")).to(META)
    more = {"embodiment": torch.tensor([0, 1, 1, 0]), "num_cameras": torch.tensor([2, 1, 1, 2])}
    check_step(vla, augmented(vla, **more))


def test_losses_that_are_logged():
    """What the loop keeps of a micro-batch, with the losses of each of two sources."""
    vla = VLA(small_config("la_direct")).to(META)
    totals = {"means": {}, "sums": {}}
    sources = [SimpleNamespace(labelled=True), SimpleNamespace(labelled=False)]
    data = SimpleNamespace(source_names=["a", "b (video)"], sources=sources, labelled_share=0.5)
    train.add_losses(totals, vla(on_meta(batch_for(vla))), torch.tensor([0, 1, 1, 0]).to(META), data, 1)
    kept = [*totals["means"].values(), *totals["sums"].values()]
    assert len(totals["sums"]) == 4 and all(value.device == META for value in kept)


def test_action_tokenizer():
    """A training step, of one robot and of two; the targets of la_tok."""
    for embodiments in (None, {"a": 7, "b": 5}):
        tokenizer = ActionTokenizer(4, 7, 16, 8, embodiments=embodiments).to(META)
        batch = {
            "actions": torch.rand(4, 4, 7),
            "valid": torch.ones(4, 4, dtype=torch.bool),
            "masked": torch.ones(4, 4, dtype=torch.bool),
            "embodiment": torch.tensor([0, 1, 1, 0]),
        }
        check_step(tokenizer, batch)
        with_codes = targets.add_action_codes(on_meta(batch), tokenizer)
        assert with_codes["codes"].shape == (4, 4, 1) and with_codes["vectors"].device == META


@pytest.mark.parametrize("codebook", ("ema", "loss"))
@pytest.mark.parametrize("stage", (0, 1, 2))
def test_latent_action_model(stage, codebook):
    """A training step of each stage; then the encoding of labels."""
    sizes = LamSizes(
        stage=stage, width=32, num_blocks=1, heads=2, image_size=24, patch_size=6, code_dim=8, codebook=codebook
    )
    text_size = 12 if stage == 1 else 0
    lam = LatentActionModel(sizes, text_size, 4, [7] if stage != 1 else []).to(META)
    batch = {"frames": torch.zeros(4, 2, 24, 24, 3, dtype=torch.uint8)}
    if stage == 1:
        batch |= {"text": torch.rand(4, 5, 12), "text_mask": torch.ones(4, 5, dtype=torch.bool)}
    else:
        batch |= {"actions": torch.rand(4, 4, 7), "valid": torch.ones(4, 4, dtype=torch.bool), "weight": torch.ones(4)}
    check_step(lam, batch)
    text = [batch["text"].to(META), batch["text_mask"].to(META)] if stage == 1 else []
    features = lam.features(batch["frames"].to(META).flatten(0, 1)).unflatten(0, (-1, 2))
    codes, vectors = lam.eval().encode(features[:, 0], features[:, 1], *text)
    assert codes.device == vectors.device == META


def test_policy_and_validation_leave_the_device_at_the_end_alone(run, dataset, monkeypatch):
    """Only the finished actions of a policy, and the sum of a validation's errors, are read on the CPU."""
    policy = Policy(run.folder, device="meta")
    images = [dataset.image(camera, 3)[None] for camera in dataset.cameras]
    batch = policy._batch(images, [dataset.instruction(3)], dataset.state([3]))
    actions, _ = policy.vla.predict(batch)
    assert actions.shape == (1, 8, 7) and actions.device == META
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        policy.predict(images, [dataset.instruction(3)], dataset.state([3]))
    chunks = ActionChunks([dataset], [dataset.cameras], 8)
    read = []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read.append(tensor) or 0.5)
    ranks = SimpleNamespace(rank=0, world=1, device=META)
    held_out = [(0, EpisodeSteps(dataset.starts, [0]))]
    assert train.validate(policy.vla, chunks, held_out, ranks) == 0.5 and len(read) == 1
