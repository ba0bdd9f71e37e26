"""model.py: the action head, what each of the five variants learns from what, ablations, and saved runs."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from model_helpers import CHUNK, TEXTS, batch_for, build, images_for, small_config
from safetensors import safe_open

import model
import train
from batches import AUGMENTATIONS, prepare_images
from files import load_tensors, save_tensors
from lora import lora_layers, merge_lora
from model import ACTION_LOSSES, VARIANTS, VLA
from policy import Policy, load_vla

LATENT = ("la_align", "la_direct", "la_cond", "la_tok")  # the variants with a latent loss
CODES = ("la_direct", "la_cond", "la_tok")  # those that predict codes


# ----------------------------------------------------------------------------------------------------------------------
# Actions and their loss


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_within_a_chunk_differ(variant):
    """No two steps of a predicted chunk are alike, so the order of the target's steps matters."""
    vla = build(variant)
    batch = batch_for(vla, 1)
    (actions,), _ = vla.predict(batch)
    assert actions.shape == (CHUNK, 7)
    assert torch.pdist(actions).min() > 0.01
    reversed_loss = vla(batch | {"actions": batch["actions"].flip(1)})["action_loss"]
    assert (reversed_loss - vla(batch)["action_loss"]).abs() > 1e-4


@torch.no_grad()
def test_every_input_matters():
    """Either image, the instruction and proprio each change the actions; without use_proprio the last does not."""
    vla = build("baseline")
    batch = batch_for(vla)
    actions, _ = vla.predict(batch)
    first, second = batch["images"]
    changes = (
        {"images": [255 - first, second]},
        {"images": [first, 255 - second]},
        {"text": batch["text"][::-1]},
        {"proprio": -batch["proprio"]},
    )
    for change in changes:
        assert (vla.predict(batch | change)[0] - actions).abs().max() > 1e-3, change.keys()
    without_proprio = build("baseline", proprio_size=0)
    actions, _ = without_proprio.predict(batch)
    assert torch.equal(actions, without_proprio.predict(batch | {"proprio": -batch["proprio"]})[0])


@torch.no_grad()
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_backbone_sees_images_of_the_chosen_augmentation(augmentation):
    """With draws, as in training, and without, as in evaluation."""
    vla = build("baseline", augmentation=augmentation)
    seen = []
    vla.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = batch_for(vla)
    draws = torch.rand(4, 2, 6, generator=torch.Generator().manual_seed(0))
    vla.predict(batch | {"draws": draws})
    vla.predict(batch)
    for images, given in zip(seen, (draws, None), strict=True):
        assert torch.equal(images, prepare_images(batch["images"], 64, given, augmentation))


@torch.no_grad()
@pytest.mark.parametrize("loss", ("l1", "l2"))
def test_action_loss_by_hand(loss):
    """Sum of the errors at valid steps over the number of all entries."""
    vla = build("baseline", action_loss=loss)
    batch = batch_for(vla)
    error = (vla.predict(batch)[0] - batch["actions"]).abs().numpy() ** (1 if loss == "l1" else 2)
    total = sum(error[b, h].sum() for b in range(4) for h in range(CHUNK) if batch["valid"][b, h])
    assert vla(batch)["loss"].item() == pytest.approx(total / (4 * CHUNK * 7), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_past_the_end_reach_no_loss(variant):
    """Other targets at masked steps: the same losses in every bit; at valid steps: different ones."""
    vla = build(variant)
    batch = batch_for(vla)
    other = batch_for(vla, seed=9)
    before = vla(batch)
    for mask, same in ((~batch["valid"], True), (batch["valid"], False)):
        swapped = {}
        for name in ("actions", "codes", "vectors"):
            where = mask.view(*mask.shape, *[1] * (batch[name].ndim - 2))
            swapped[name] = torch.where(where, other[name], batch[name])
        after = vla(batch | swapped)
        for name in ("action_loss", "latent_loss"):
            if name in before:
                assert torch.equal(before[name], after[name]) == same, name
        if same:
            pairs = [(before[kind], after[kind]) for kind in ("samples", "sums")]
            assert all(torch.equal(old[name], new[name]) for old, new in pairs for name in old)


@torch.no_grad()
def test_image_gate_scales_the_keys_alone():
    """With the gate at 0 the head's image keys do nothing, its image values do; with the gate open the keys matter."""
    vla = build("baseline")
    batch = batch_for(vla)

    def effect(gate, rows):
        """Return how far the actions move when these rows of the head's image projection are changed."""
        for block in vla.head.blocks:
            block.gate.fill_(gate)
        before, _ = vla.predict(batch)
        weights = [block.image.weight for block in vla.head.blocks]
        originals = [weight.clone() for weight in weights]
        for weight in weights:
            weight[rows] *= -3
        after, _ = vla.predict(batch)
        for weight, original in zip(weights, originals):
            weight.copy_(original)
        return (after - before).abs().max()

    width = vla.backbone.width
    keys = slice(0, width)
    values = slice(width, 2 * width)
    assert effect(0.0, keys) == 0 and effect(0.0, values) > 1e-3 and effect(1.0, keys) > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# The five variants


def accuracy(losses):
    """Return the share of codes predicted right."""
    right, count = losses["sums"]["latent_accuracy"]
    return right / count


@pytest.mark.parametrize("field, names", (("variant", VARIANTS), ("loss", (*ACTION_LOSSES, "quantile"))))
def test_command_line_offers_every_variant_and_action_loss(field, names, capsys):
    """train.py takes each row of VARIANTS and of ACTION_LOSSES, nothing else, and lists them in its error."""
    assert get_args(get_type_hints(train.Config)[field]) == tuple(names)
    for name in names:
        config = tyro.cli(train.Config, args=[f"--{field}", name])
        assert getattr(config, field) == name
    with pytest.raises(SystemExit):
        tyro.cli(train.Config, args=[f"--{field}", "unknown"])
    message = capsys.readouterr().err
    assert all(name in message for name in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_fall_on_one_batch(variant):
    """20 updates on four samples more than halve the action loss, and the latent loss where there is one."""
    vla = build(variant)
    batch = batch_for(vla)
    optimizer = torch.optim.AdamW(vla.parameters(), 3e-3, fused=True)
    history = []
    for _ in range(20):
        history.append(vla(batch))
        optimizer.zero_grad()
        history[-1]["loss"].backward()
        optimizer.step()
    first, last = history[0], history[-1]
    assert last["action_loss"] < 0.5 * first["action_loss"]
    assert ("latent_loss" in last) == (variant != "baseline")
    if variant != "baseline":
        assert last["latent_loss"] < 0.5 * first["latent_loss"]
    assert ("latent_accuracy" in last["sums"]) == (variant in CODES)
    if variant in CODES:
        assert accuracy(first) < 0.5 and accuracy(last) > 0.8


@torch.no_grad()
def test_weights_of_the_latent_losses():
    """loss = action_loss + lambda latent_loss, lambda the paper's or the one asked for."""
    for variant, paper in {"baseline": 0, "la_align": 1.0, "la_direct": 0.1, "la_cond": 0.1, "la_tok": 0.1}.items():
        for option, weight in ((-1.0, paper), (0.7, 0.7 if paper else 0)):
            vla = build(variant, latent_weight=option)
            losses = vla(batch_for(vla))
            latent = losses["latent_loss"].item() if "latent_loss" in losses else 0.0
            expected = losses["action_loss"].item() + weight * latent
            assert losses["loss"].item() == pytest.approx(expected, rel=1e-6)


def reached(vla, loss):
    """Return the names of the parameters with a gradient of `loss` that is not zero."""
    vla.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in vla.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def layers_in(names):
    """Return the language model's layers among these parameters."""
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names if "language_model.layers." in name}


@pytest.mark.parametrize("variant", LATENT)
def test_latent_loss_reaches_the_right_tensors_only(variant):
    """Its own head, the latent placeholders, vision, the layers that it reads; never the action head."""
    vla = build(variant)
    names = reached(vla, vla(batch_for(vla))["latent_loss"])
    assert not any(name.startswith("head.") for name in names)
    assert {name for name in names if name.startswith("latent_head.")} == {"latent_head.weight", "latent_head.bias"}
    assert "queries" in names and any("visual.blocks.0." in name for name in names)
    assert layers_in(names) == ({0, 1} if variant == "la_align" else {0, 1, 2, 3})
    assert ("backbone.qwen.language_model.norm.weight" in names) == (variant != "la_align")
    placeholders = vla.queries.grad.abs().amax(1) > 0
    expected = {
        "la_align": [True] * CHUNK,
        "la_direct": [True] * 2 * CHUNK,
        "la_cond": [True] * 2 * CHUNK + [False] * CHUNK,
        "la_tok": [True] * CHUNK,
    }
    assert placeholders.tolist() == expected[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_action_loss_reaches_all_but_the_latent_head(variant):
    """Every placeholder, every layer, the whole action head; the baseline has no latent head at all."""
    vla = build(variant)
    losses = vla(batch_for(vla))
    names = reached(vla, losses["action_loss"])
    expected = {name for name, _ in vla.named_parameters() if not name.startswith("latent_head.")}
    assert names == expected
    assert (vla.queries.grad.abs().amax(1) > 0).all()
    assert (vla.latent_head is None) == (variant == "baseline") == ("latent_loss" not in losses)


@pytest.mark.parametrize(
    "variant, count",
    {"baseline": CHUNK, "la_align": CHUNK, "la_direct": 2 * CHUNK, "la_cond": 3 * CHUNK, "la_tok": CHUNK}.items(),
)
def test_head_reads_every_placeholder_at_every_used_layer(variant, count):
    """nu^(2), nu^(3), nu^(4) of 4 layers at all placeholders and image tokens: each has a gradient of the actions."""
    vla = build(variant)
    bb = vla.backbone
    batch = batch_for(vla)
    read = []
    vla.head.register_forward_pre_hook(lambda module, inputs: read.extend(inputs[0]))
    actions, _ = vla.predict(batch)
    states = bb(prepare_images(batch["images"], 64), *bb.tokenise(batch["text"]), vla.queries)
    for (placeholders, images), k in zip(read, (2, 3, 4), strict=True):
        assert torch.equal(placeholders, bb.placeholder_states(states[k]))
        assert torch.equal(images, bb.image_states(states[k]))
        assert placeholders.shape[1] == count and images.shape[1] == 2 * 4
    weight = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad((actions * weight).sum(), [part for pair in read for part in pair])
    assert all((grad.abs().amax(2) > 0).all() for grad in grads)


@torch.no_grad()
def test_la_cond_latents_never_see_actions():
    """Other action placeholders leave every latent state as it is; other latent ones move the action states."""
    vla = build("la_cond")
    bb = vla.backbone
    images = images_for(vla, 2)
    text = bb.tokenise(TEXTS[:2])
    before = bb(images, *text, vla.queries, range(1, 5))

    def moved(rows):
        """Return the change of the latent and of the action placeholders' states when these placeholders change."""
        queries = vla.queries.clone()
        queries[rows] += 0.1
        after = bb(images, *text, queries, range(1, 5))
        changes = [bb.placeholder_states(after[k]) - bb.placeholder_states(before[k]) for k in range(1, 5)]
        change = torch.stack(changes).abs().amax((1, 3))  # [N, Q]
        return change[:, : 2 * CHUNK].max(), change[:, 2 * CHUNK :].min()

    latents, _ = moved(slice(2 * CHUNK, None))
    assert latents == 0
    _, actions = moved(slice(0, 2 * CHUNK))
    assert actions > 1e-5


@torch.no_grad()
def test_latent_placeholders_are_ordered_time_first():
    """Placeholder h P + p is compared with code p of step h."""
    vla = build("la_direct")
    batch = batch_for(vla, 1)
    _, latents = vla.predict(batch)
    logits = vla.latent_head(latents)[0].log_softmax(-1)  # [H P, K]
    expected = -sum(logits[2 * h + p, batch["codes"][0, h, p]] for h in range(CHUNK) for p in range(2)) / (2 * CHUNK)
    assert vla(batch)["latent_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    best = logits.argmax(-1).view(1, CHUNK, 2)
    assert accuracy(vla(batch | {"codes": best})) == 1


@torch.no_grad()
@pytest.mark.parametrize("layer", (0, 1, 4))
def test_align_loss_by_hand(layer):
    """1 - cos of the projected nu^(k) at placeholder h and the mean over P of c_{t+h}; k = 2 of 4 by default."""
    vla = build("la_align", align_layer=layer)
    batch = batch_for(vla)
    bb = vla.backbone
    states = bb(prepare_images(batch["images"], 64), *bb.tokenise(batch["text"]), vla.queries)
    guess = vla.latent_head(bb.placeholder_states(states[layer or 2])).numpy()
    total = 0
    for b, h in zip(*np.nonzero(batch["valid"].numpy())):
        target = batch["vectors"][b, h].numpy().mean(0)
        total += 1 - guess[b, h] @ target / np.linalg.norm(guess[b, h]) / np.linalg.norm(target)
    assert vla(batch)["latent_loss"].item() == pytest.approx(total / (4 * CHUNK), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Ablations


@torch.no_grad()
@pytest.mark.parametrize("variant", CODES)
def test_continuous_targets_by_hand(variant):
    """A two-layer MLP on the same placeholders, squared error to the vectors, no accuracy."""
    vla = build(variant, continuous=True)
    batch = batch_for(vla)
    _, latents = vla.predict(batch)
    first, _, second = vla.latent_head
    guess = second(F.gelu(first(latents[:, : vla.num_latents]))).view(batch["vectors"].shape)
    expected = ((guess - batch["vectors"]).square().mean((2, 3)) * batch["valid"]).sum() / (4 * CHUNK)
    losses = vla(batch)
    assert losses["latent_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not losses["sums"]


def test_align_layer_moves_the_reach_of_the_loss():
    """Reading layer 3 trains layers 0 to 2."""
    vla = build("la_align", align_layer=3)
    assert layers_in(reached(vla, vla(batch_for(vla))["latent_loss"])) == {0, 1, 2}


def test_more_placeholders_for_the_baseline():
    """3 per step make 12 placeholders that all reach the head; the loss stays that of the actions."""
    vla = build("baseline", placeholders_per_step=3)
    losses = vla(batch_for(vla))
    assert vla.queries.shape == (3 * CHUNK, 64) and losses.keys() == {"loss", "action_loss", "samples", "sums"}
    losses["loss"].backward()
    assert (vla.queries.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    "variant, changes, message",
    (
        ("la_best", {}, "variant is 'la_best'; choose one of baseline, la_align"),
        ("baseline", {"action_loss": "l3"}, "action_loss is 'l3'"),
        ("la_align", {"placeholders_per_step": 2}, "only the baseline takes more than 1"),
        ("la_align", {"continuous": True}, "continuous targets are for la_direct"),
        ("la_align", {"align_layer": 5}, "align_layer is 5, but tiny has layers 1 to 4"),
        ("baseline", {"image_size": 72}, "image_size is 72; it must be a multiple of 32"),
        ("baseline", {"image_size": 0}, "image_size is 0; it must be a multiple of 32"),
        ("baseline", {"text_length": 9000}, "the prompt would take 9012 tokens"),
        ("baseline", {"tuning": "half"}, "tuning is 'half'; choose lora, full or frozen"),
        ("baseline", {"tuning": "lora"}, "tuning is 'lora', but the tiny backbone is always trained in full"),
        ("baseline", {"lora_targets": ("qkv",)}, "lora_targets is .'qkv',., but the tiny backbone is always"),
    ),
)
def test_what_cannot_work_is_refused(variant, changes, message):
    """The field, its value and what would work."""
    with pytest.raises(ValueError, match=message):
        build(variant, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# Saved runs on a pretrained backbone


@pytest.fixture(scope="module")
def lora_runs(checkpoint, train_config, tmp_path_factory):
    """Return a function (dtype) -> (base, run): a checkpoint of that type, and a run that trained it by LoRA."""
    runs = {}

    def make(dtype):
        if dtype not in runs:
            base = checkpoint(dtype)
            run = tmp_path_factory.mktemp("lora") / "run"
            options = dict(variant="la_cond", backbone=str(base), lora_rank=4, learning_rate=1e-2, text_length=24)
            train.main(train_config(run, **options))
            runs[dtype] = (base, run)
        return runs[dtype]

    return make


def base_tensors(base):
    """Return {name: f32 tensor} of a checkpoint's vision and language model."""
    with safe_open(base / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "lm_head" not in name]
        return {name.removeprefix("model."): file.get_tensor(name).float() for name in names}


def full_size_batch(vla):
    """Return a random batch with images of the data's size, 96 px."""
    rng = torch.Generator().manual_seed(5)
    images = [torch.randint(0, 256, (4, 96, 96, 3), generator=rng, dtype=torch.uint8) for _ in range(2)]
    return batch_for(vla) | {"images": images}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_run_on_a_pretrained_backbone_loads_again(dtype, lora_runs):
    """Load, train, save what was trained, load: bit-identical actions; the base is neither changed nor saved."""
    base, run = lora_runs(dtype)
    vla, _ = load_vla(run)
    again, _ = load_vla(run)
    batch = full_size_batch(vla)
    with torch.no_grad():
        assert torch.equal(vla.predict(batch)[0], again.predict(batch)[0])
    saved, _ = load_tensors(run / "model.safetensors")
    assert saved.keys() == {name for name, p in vla.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.split(".")[0] in ("queries", "head", "latent_head") for name in saved)
    for part in ("visual", "language_model"):
        updates = [tensor for name, tensor in saved.items() if part in name and "lora_B" in name]
        assert any(tensor.abs().max() > 0 for tensor in updates)
    stored = base_tensors(base)
    frozen = {
        name.removeprefix("backbone.qwen.").replace(".base_layer", ""): p.float()
        for name, p in vla.named_parameters()
        if not p.requires_grad
    }
    assert frozen.keys() == stored.keys() and all(torch.equal(p, stored[name]) for name, p in frozen.items())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merged_lora_gives_the_same_actions(dtype, lora_runs):
    """Merging adds the updates to the base's matrices, once, and leaves the names of the base; `Policy` does it."""
    base, run = lora_runs(dtype)
    vla, _ = load_vla(run)
    merged, _ = load_vla(run)
    merge_lora(merged)
    weights = {name: p.clone() for name, p in merged.backbone.named_parameters()}
    merge_lora(merged)  # finds nothing left to merge
    assert lora_layers(vla) and not lora_layers(merged) and not lora_layers(Policy(run).vla)
    stored = base_tensors(base)
    assert {name.removeprefix("qwen.") for name in weights} == stored.keys()
    assert all(torch.equal(p, weights[name]) for name, p in merged.backbone.named_parameters())
    name = "visual.blocks.0.attn.qkv.weight"
    assert (weights[f"qwen.{name}"] - stored[name]).abs().max() > 0
    batch = full_size_batch(vla)
    with torch.no_grad():
        assert torch.allclose(merged.predict(batch)[0], vla.predict(batch)[0], atol=2e-5)


def test_changed_base_is_refused(lora_runs):
    """A run on a base whose weights have changed since does not load."""
    base, run = lora_runs(torch.float32)
    before = json.loads((run / "config.json").read_text())["base_hash"]
    original = (base / "model.safetensors").read_bytes()
    tensors, info = load_tensors(base / "model.safetensors")
    tensors["model.language_model.layers.2.mlp.up_proj.weight"] += 0.01
    save_tensors(base / "model.safetensors", tensors, **info)
    try:
        with pytest.raises(ValueError, match=f"was trained on another .*the run's to {before}"):
            load_vla(run)
    finally:
        (base / "model.safetensors").write_bytes(original)


def test_folder_that_is_no_run_is_refused(tmp_path):
    """The missing file is named."""
    with pytest.raises(FileNotFoundError, match="has no config.json: it is not a run"):
        load_vla(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Several embodiments in one model

ARM = ("arm", 7, 8, 2)  # name, action size, proprio size, cameras
TWO_ARMS = ("two arms", 14, 14, 3)
MIXED = dict(embodiments=(ARM, TWO_ARMS), action_size=14, proprio_size=14, cameras=3)


def mixed_batch(vla, members):
    """Return a random batch with the embodiment number of each sample, padded as `ActionChunks` pads."""
    batch = batch_for(vla, len(members))
    sizes = torch.tensor([entry[1:] for entry in (ARM, TWO_ARMS)])[torch.tensor(members)]  # [B, 3]
    action, proprio, cameras = sizes.unbind(1)
    inside = torch.arange(14) < action[:, None]
    batch["actions"] = batch["actions"] * inside[:, None]
    batch["action_weight"] = inside * (14 / action[:, None])
    batch["proprio"] = torch.rand(len(members), 14) * (torch.arange(14) < proprio[:, None])
    for number, camera in enumerate(batch["images"]):
        camera *= (cameras > number)[:, None, None, None].to(torch.uint8)
    return batch | {"embodiment": torch.tensor(members), "num_cameras": cameras}


def alone(vla, number):
    """Return a model of one embodiment with the weights that `vla`, of several, uses for it."""
    name, action_size, proprio_size, cameras = vla.config.embodiments[number]
    sizes = dict(action_size=action_size, proprio_size=proprio_size, cameras=cameras)
    single = build(vla.config.variant, **sizes)
    state = {}
    for key, value in vla.state_dict().items():
        if not key.startswith(("head.proprio.", "head.out.")):
            state[key] = value
        elif f".layers.{number}." in key:
            state[key.replace(f".layers.{number}", "")] = value
    single.load_state_dict(state)
    return single


@pytest.mark.parametrize("variant", VARIANTS)
def test_embodiments_share_a_model_and_lose_what_they_lose_alone(variant):
    """Of a mixed batch each sample's losses are those of a model of its embodiment alone, without padding; the loss is
    their mean."""
    vla = build(variant, **MIXED)
    members = [0, 1, 1, 0]
    batch = mixed_batch(vla, members)
    together = vla(batch)
    for number, (_, action_size, proprio_size, cameras) in enumerate(vla.config.embodiments):
        rows = [row for row, member in enumerate(members) if member == number]
        part = {name: value[rows] for name, value in batch.items() if torch.is_tensor(value)}
        part["images"] = [camera[rows] for camera in batch["images"][:cameras]]
        part["text"] = [batch["text"][row] for row in rows]
        part["actions"] = part["actions"][:, :, :action_size]
        part["action_weight"] = torch.ones(len(rows), action_size)
        part["proprio"] = part["proprio"][:, :proprio_size]
        losses = alone(vla, number)(part)
        for kind, values in losses["samples"].items():
            assert torch.allclose(values, together["samples"][kind][rows], rtol=1e-4, atol=1e-6), kind
    assert together["action_loss"].item() == pytest.approx(together["samples"]["action_loss"].mean().item(), rel=1e-5)


def test_what_an_embodiment_lacks_reaches_nothing():
    """Pixels of a third camera, numbers of the padding: no output of the arm changes, that of the two arms does."""
    vla = build("la_cond", **MIXED)
    batch = mixed_batch(vla, [0, 1])
    other = dict(batch, images=[*batch["images"][:2], 255 - batch["images"][2]])
    other["proprio"] = batch["proprio"] + (torch.arange(14) >= 8)
    with torch.no_grad():
        (before, _), (after, _) = vla.predict(batch), vla.predict(other)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_each_embodiment_has_its_own_small_layers():
    """The loss of one reaches its projection of the state and its output layer, and not those of the other."""
    vla = build("baseline", **MIXED)
    vla(mixed_batch(vla, [0, 0]))["loss"].backward()
    for layer in (vla.head.proprio, vla.head.out):
        own, other = (each.weight.grad for each in layer.layers)
        assert own.abs().max() > 0 and other.abs().max() == 0


def test_video_alone_trains_the_latent_loss():
    """Without action weight or any action the action loss is 0 and reaches nothing; the latent loss trains."""
    for sizes in ({}, {"action_size": 0}):
        vla = build("la_direct", **sizes)
        batch = batch_for(vla)
        batch["action_weight"] = torch.zeros_like(batch["action_weight"])
        losses = vla(batch)
        losses["loss"].backward()
        assert losses["action_loss"] == 0 and losses["latent_loss"] > 0
        assert vla.head.queries.grad is None or vla.head.queries.grad.abs().max() == 0
        assert vla.latent_head.weight.grad.abs().max() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Quantiles


def test_quantile_loss_is_the_pinball_loss():
    """By hand: 0.1 x what a 10 % quantile is too low, 0.9 x what it is too high; its smallest mean is at the quantiles
    of the data, and the median's own is L1."""
    guesses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    losses = [0.1 * 2.5, 0.3 * 1.5, 0.5 * 0.5, 0.3 * 0.5, 0.1 * 1.5]
    error = model.action_errors(guesses[None, None, None], torch.tensor([[[3.5]]]), "quantile")
    assert error.shape == (1, 1, 1) and error.item() == pytest.approx(2 * np.mean(losses))
    data = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=(20_000, 1, 1)).astype(np.float32))
    quantiles = torch.tensor(np.quantile(data, model.QUANTILES)).float()
    best = model.action_errors(quantiles.expand(len(data), 1, 1, 5), data, "quantile").mean()
    for number in range(5):
        for shift in (-0.05, 0.05):
            moved = quantiles + shift * F.one_hot(torch.tensor(number), 5)
            assert model.action_errors(moved.expand(len(data), 1, 1, 5), data, "quantile").mean() > best


@pytest.mark.parametrize("several", (False, True))
def test_policy_acts_by_the_median(several):
    """Of five guesses of each number the middle one is the action; the loss has a gradient for all five."""
    sizes = (("a", 7, 8, 2), ("b", 5, 3, 2)) if several else ()
    vla = VLA(replace(small_config("baseline", cameras=2), action_loss="quantile", embodiments=sizes))
    batch = batch_for(vla)
    if several:
        batch["embodiment"] = torch.arange(len(batch["text"])) % 2
    guesses, _ = vla.predict_all(batch)
    actions, _ = vla.predict(batch)
    assert guesses.shape == (*actions.shape, 5) and torch.equal(guesses[..., 2], actions)
    vla(batch)["loss"].backward()
    layers = vla.head.out.layers if several else [vla.head.out]
    for layer, size in zip(layers, (7, 5)):
        assert len(layer.weight) == 5 * size and (layer.weight.grad.abs().sum(1) > 0).all()
