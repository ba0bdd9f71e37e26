"""model.py: the prompt, agreement with transformers, and what each of the five variants learns from what."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model
from common import load_tensors, save_tensors
from model import VARIANTS, VLA, Spec

TEXTS = [
    "put the bowl on the stove",
    "put the bowl on top of the cabinet now",
    "open the drawer",
    "put the bowl on the plate",
]
CHUNK = 4


def spec(variant, **changes):
    """A small model: two cameras of 64 px (4 slots each), chunks of 4, 2 of 8 codes per step (la_tok: 1)."""
    sizes = dict(
        cameras=2,
        image_size=64,
        text_length=24,
        chunk=CHUNK,
        action_size=7,
        proprio_size=8,
        num_codes=8,
        code_dim=16,
        gate=1.0,
    )
    return Spec(variant, "tiny", **sizes | {"codes_per_step": 1 if variant == "la_tok" else 2} | changes)


def build(variant, **changes):
    """A model with seeded weights."""
    torch.manual_seed(0)
    return VLA(spec(variant, **changes))


def batch_for(vla, size=4, seed=1):
    """A random batch; the last steps of the second sample lie past the end of its episode."""
    rng, s = torch.Generator().manual_seed(seed), vla.spec
    valid = torch.ones(size, s.chunk, dtype=torch.bool)
    valid[1:2, -2:] = False
    return {
        "images": [
            torch.randint(0, 256, (size, 64, 64, 3), generator=rng, dtype=torch.uint8) for _ in range(s.cameras)
        ],
        "text": (TEXTS * size)[:size],
        "proprio": torch.rand(size, 8, generator=rng) * 2 - 1,
        "actions": torch.rand(size, s.chunk, s.action_size, generator=rng) * 2 - 1,
        "valid": valid,
        "codes": torch.randint(0, 8, (size, s.chunk, s.codes_per_step), generator=rng),
        "vectors": torch.randn(size, s.chunk, s.codes_per_step, 16, generator=rng),
    }


def images_for(vla, size, seed=2):
    """Random images as the backbone takes them."""
    s = vla.spec
    return (
        torch.rand(size, s.cameras, 3, s.image_size, s.image_size, generator=torch.Generator().manual_seed(seed)) * 2
        - 1
    )


# ----------------------------------------------------------------------------------------------------------------------
# Prompt


@pytest.mark.parametrize("cameras", (1, 2))
def test_prompt_layout(cameras):
    """[chat prefix, image slots, text, padding, assistant header, placeholders]: the embeddings at each place."""
    vla = build("la_cond", cameras=cameras)
    bb, images = vla.backbone, images_for(vla, 2)
    ids, counts = bb.tokenise(TEXTS[:2])
    word = bb.tokenizer.convert_tokens_to_ids
    first = bb.tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    camera = [word("<|vision_start|>")] + [word("<|image_pad|>")] * 4 + [word("<|vision_end|>")]
    last = bb.tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    nu0 = bb(images, ids, counts, vla.queries)[0]
    slots, _ = bb.vision(images)
    assert counts[0] != counts[1]
    for row, text in enumerate(TEXTS[:2]):
        request = bb.tokenizer(f"{text}\nPlease predict the next 4 robot actions:", add_special_tokens=False)[
            "input_ids"
        ]
        whole = torch.tensor([*first, *camera * cameras, *request, *[0] * (24 - len(request)), *last])
        pad = whole == word("<|image_pad|>")
        assert nu0.shape[1] == len(whole) + 3 * CHUNK
        assert torch.equal(nu0[row, : len(whole)][~pad], bb.qwen.language_model.embed_tokens(whole[~pad]))
        assert torch.equal(nu0[row, : len(whole)][pad], slots[row].flatten(0, 1))
        assert torch.equal(nu0[row, len(whole) :], vla.queries)
        assert bb.tokenizer.decode(request) == f"{text}\nPlease predict the next 4 robot actions:"
    assert torch.equal(bb.image_states(nu0), slots.flatten(1, 2)) and torch.equal(
        bb.placeholder_states(nu0)[0], vla.queries
    )


def test_positions_by_hand():
    """One camera of 2 x 2 slots: an image is one step in time, the text follows its side, the padding is skipped."""
    bb = build("baseline", cameras=1).backbone
    _, counts = bb.tokenise(TEXTS[:1])
    positions = bb.positions[:, bb.places_and_mask(counts)[0][0]]  # [3, L]
    p, n = bb.first_image, int(counts[0])
    assert positions[:, : p + 1].tolist() == [list(range(p + 1))] * 3
    assert positions[:, p + 1 : p + 5].tolist() == [
        [p + 1] * 4,
        [p + 1, p + 1, p + 2, p + 2],
        [p + 1, p + 2, p + 1, p + 2],
    ]
    assert positions[:, p + 5 : p + 6 + n].tolist() == [list(range(p + 3, p + 4 + n))] * 3  # end token and text
    rest = bb.length - bb.header_start
    assert positions[:, bb.header_start :].tolist() == [list(range(p + 4 + n, p + 4 + n + rest))] * 3


# ----------------------------------------------------------------------------------------------------------------------
# Agreement with transformers


def transformers_inputs(bb, images, ids, counts, queries):
    """Arguments of Qwen3VLModel.forward for the same prompt; the placeholders become its last vocabulary rows."""
    count, vocabulary = bb.queries_count, len(bb.qwen.language_model.embed_tokens.weight)
    with torch.no_grad():
        bb.qwen.language_model.embed_tokens.weight[-count:] = queries
    sequence = torch.cat(
        [bb.fixed_ids.repeat(len(ids), 1), torch.arange(vocabulary - count, vocabulary).repeat(len(ids), 1)], 1
    )
    sequence[:, bb.text_start : bb.header_start] = ids
    real = torch.ones_like(sequence)
    for row, n in enumerate(counts):
        real[row, bb.text_start + n : bb.header_start] = 0
    n, p = bb.grid, bb.patch
    x = (
        images.flatten(0, 1).view(-1, 3, n // 2, 2, p, n // 2, 2, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    )  # [B C, n/2, n/2, 2, 2, 3, p, p]
    pixels = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * p * p)
    grid = torch.tensor([[1, n, n]] * len(images) * images.shape[1])
    kinds = (sequence == bb.qwen.config.image_token_id).int()
    positions, _ = bb.qwen.get_rope_index(sequence, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=real)
    return dict(
        input_ids=sequence, attention_mask=real, position_ids=positions, pixel_values=pixels, image_grid_thw=grid
    )


@torch.no_grad()
@pytest.mark.parametrize("cameras, image_size", ((1, 96), (2, 96), (2, 128)))
def test_states_equal_transformers_own_forward(cameras, image_size):
    """nu^(0)..nu^(N), seen by forward pre-hooks on the layers, and the M-RoPE positions, on every real token.

    At 128 px the table of 6 x 6 learned positions is resampled to 8 x 8.
    """
    vla = build("la_cond", cameras=cameras, image_size=image_size)
    bb, images = vla.backbone, images_for(vla, 2)
    ids, counts = bb.tokenise(TEXTS[:2])
    inputs, theirs = transformers_inputs(bb, images, ids, counts, vla.queries), []
    real = inputs["attention_mask"].bool()
    assert torch.equal(inputs["position_ids"][:, real], bb.positions[:, bb.places_and_mask(counts)[0]][:, real])
    for layer in bb.qwen.language_model.layers:
        layer.register_forward_pre_hook(
            lambda _, a, k: theirs.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    last = bb.qwen(**inputs).last_hidden_state
    ours = bb(images, ids, counts, vla.queries)
    theirs = [*theirs[: bb.layers], last]
    assert list(ours) == [0, 1, 2, 3, 4]
    for k, (a, b) in enumerate(zip(ours.values(), theirs, strict=True)):
        assert (a - b)[real].abs().max() < 1e-5 * b[real].abs().max(), k


def test_patches_equal_the_image_processors():
    """Of the same u8 pictures of 256 px, in every bit: transformers' Pillow variant, either temporal half."""
    bb = build("baseline", image_size=256).backbone
    pictures = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    sizes = dict(patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 16777216})
    processor = Qwen2VLImageProcessorPil(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for options, pixels, tolerance in (
        ({"do_rescale": False, "do_normalize": False}, torch.from_numpy(pictures).float(), 0),
        ({}, torch.from_numpy(pictures).float() / 255 * 2 - 1, 2e-7),
    ):
        theirs = processor(list(pictures), return_tensors="pt", **options)
        assert theirs["image_grid_thw"].tolist() == [[1, 16, 16]] * 4
        ours = bb.patches(pixels.permute(0, 3, 1, 2).unflatten(0, (2, 2))).unflatten(2, (3, 256))  # [4, 256, 3, p p]
        for half in theirs["pixel_values"].view(4, 256, 3, 2, 256).unbind(3):
            assert (ours - half).abs().max() <= tolerance


# ----------------------------------------------------------------------------------------------------------------------
# What makes a step fast


class Waits(TorchDispatchMode):
    """Notes every operation for which a GPU's host would wait: a value read, a size that depends on values, a copy of
    host data, a matrix inverse."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "linalg_inv_ex")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        self.found += [name] * (name in self.names or bool(masks))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_never_waits_for_the_device(variant):
    """Forward and backward of known instructions, augmented; what would wait is noticed."""
    vla = build(variant)
    batch = batch_for(vla) | {"draws": torch.rand(4, 2, 6)}
    vla(batch)  # from here on the instructions are known
    with Waits() as waits:
        vla(batch)["loss"].backward()
    assert waits.found == []
    with Waits() as waits:
        batch["codes"][batch["valid"]].sum().item()
        torch.tensor([1])
    assert waits.found == ["index", "_local_scalar_dense", "lift_fresh"]


def losses_and_gradients(vla, batch):
    """The losses, and the gradients of all that is trained."""
    vla.zero_grad(set_to_none=True)
    losses = vla(batch)
    losses["loss"].backward()
    return [*losses.values(), *(p.grad for p in vla.parameters() if p.requires_grad)]


@pytest.mark.parametrize("lora", (False, True))
def test_gradient_checkpointing_changes_nothing(lora):
    """The same losses and gradients; every block of vision and language runs twice."""
    vla, calls = build("la_cond"), []
    if lora:
        model.add_lora(vla.backbone.qwen, 2, 4)
    batch, qwen = batch_for(vla), vla.backbone.qwen
    expected = losses_and_gradients(vla, batch)
    blocks = [*qwen.language_model.layers, *qwen.visual.blocks]
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    vla.backbone.checkpointing = True
    found = losses_and_gradients(vla, batch)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found, expected, strict=True))
    assert len(found) > len(blocks) and all(calls.count(block.mlp) == 2 for block in blocks)


@pytest.mark.parametrize("lora", (False, True))
def test_one_graph_for_all_batches(lora):
    """Backbone and head compile without a break, and other instructions, lengths and pixels need no second graph."""
    vla, eager = build("la_align"), []
    if lora:
        model.add_lora(vla.backbone.qwen, 2, 4)
        vla.backbone.checkpointing = True
    batches = [batch_for(vla, seed=seed) | {"text": TEXTS[seed:] + TEXTS[:seed]} for seed in (0, 1, 2)]
    eager = [vla(batch)["loss"] for batch in batches]
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        vla.act = torch.compile(vla.act, fullgraph=True, dynamic=False, backend="eager")
        for batch, expected in zip(batches, eager, strict=True):
            loss = vla(batch)["loss"]
            loss.backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_the_states_that_are_read_are_kept():
    """The head's second half of the layers, and la_align's; the others are not returned."""
    for variant, changes, expected in (
        ("baseline", {}, {2, 3, 4}),
        ("la_align", {"align_layer": 1}, {1, 2, 3, 4}),
        ("la_cond", {}, {2, 3, 4}),
    ):
        vla, seen = build(variant, **changes), []
        vla.backbone.register_forward_hook(lambda _, inputs, states: seen.append(states))  # noqa: B023
        vla.run(batch_for(vla))
        assert seen[0].keys() == expected, variant


# ----------------------------------------------------------------------------------------------------------------------
# Padding


@torch.no_grad()
def test_padding_changes_nothing():
    """Room for 24 or 40 tokens, other ids in the padding: the same actions."""
    vla, wider = build("la_align"), build("la_align", text_length=40)
    wider.load_state_dict(vla.state_dict())
    batch = batch_for(vla)
    actions, _ = vla.run(batch)
    assert torch.allclose(wider.run(batch)[0], actions, atol=1e-5)
    bb, images = vla.backbone, images_for(vla, 4)
    ids, counts = bb.tokenise(batch["text"])
    other = torch.where(torch.arange(24) < counts[:, None], ids, 99)
    assert not torch.equal(ids, other)
    padded, changed = (bb(images, text, counts, vla.queries, range(1, 5)) for text in (ids, other))
    for x, y in zip(padded.values(), changed.values(), strict=True):
        assert torch.allclose(bb.placeholder_states(x), bb.placeholder_states(y), atol=1e-6)


def test_instruction_too_long_is_refused():
    """The error says how long it is and which flag to raise."""
    vla = build("baseline")
    with pytest.raises(ValueError, match="takes .* tokens .* text_length is 24.*--text-length"):
        vla.backbone.tokenise(["put the zebra beside the xylophone"])


# ----------------------------------------------------------------------------------------------------------------------
# Actions and their loss


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_within_a_chunk_differ(variant):
    """No two steps of a predicted chunk are alike, so the order of the target's steps matters."""
    vla = build(variant)
    batch = batch_for(vla, 1)
    (actions,), _ = vla.run(batch)
    assert actions.shape == (CHUNK, 7)
    assert torch.pdist(actions).min() > 0.01
    turned = vla(batch | {"actions": batch["actions"].flip(1)})["action_loss"]
    assert (turned - vla(batch)["action_loss"]).abs() > 1e-4


@torch.no_grad()
def test_every_input_matters():
    """Either image, the instruction and proprio each change the actions; without use_proprio the last does not."""
    vla = build("baseline")
    batch = batch_for(vla)
    actions, _ = vla.run(batch)
    first, second = batch["images"]
    changes = (
        {"images": [255 - first, second]},
        {"images": [first, 255 - second]},
        {"text": batch["text"][::-1]},
        {"proprio": -batch["proprio"]},
    )
    for change in changes:
        assert (vla.run(batch | change)[0] - actions).abs().max() > 1e-3, change.keys()
    blind = build("baseline", proprio_size=0)
    assert torch.equal(blind.run(batch)[0], blind.run(batch | {"proprio": -batch["proprio"]})[0])


@torch.no_grad()
@pytest.mark.parametrize("loss", ("l1", "l2"))
def test_action_loss_by_hand(loss):
    """Sum of the errors at valid steps over the number of all entries."""
    vla = build("baseline", action_loss=loss)
    batch = batch_for(vla)
    error = (vla.run(batch)[0] - batch["actions"]).abs().numpy() ** (1 if loss == "l1" else 2)
    total = sum(error[b, h].sum() for b in range(4) for h in range(CHUNK) if batch["valid"][b, h])
    assert vla(batch)["loss"].item() == pytest.approx(total / (4 * CHUNK * 7), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_past_the_end_reach_no_loss(variant):
    """Other targets at masked steps: the same losses in every bit; at a valid step: another one."""
    vla = build(variant)
    batch = batch_for(vla)
    before = vla(batch)
    past, other = ~batch["valid"], batch_for(vla, seed=9)
    for where, same in ((past, True), (batch["valid"], False)):
        swapped = {}
        for name in ("actions", "codes", "vectors"):
            shape = where.view(*where.shape, *[1] * (batch[name].ndim - 2))
            swapped[name] = torch.where(shape, other[name], batch[name])
        after = vla(batch | swapped)
        for name in ("action_loss", "latent_loss"):
            if name in before:
                assert torch.equal(before[name], after[name]) == same, name
        assert not same or all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_image_gate_scales_the_keys_alone():
    """With the gate at 0 the head's image keys do nothing, its image values do; with the gate open the keys matter."""
    vla = build("baseline")
    batch = batch_for(vla)

    def effect(gate, rows):
        """How far the actions move when these rows of the head's image projection are changed."""
        for block in vla.head.blocks:
            block.gate.fill_(gate)
        before, _ = vla.run(batch)
        weights = [block.image.weight for block in vla.head.blocks]
        kept = [w.clone() for w in weights]
        for w in weights:
            w[rows] *= -3
        after, _ = vla.run(batch)
        for w, old in zip(weights, kept):
            w.copy_(old)
        return (after - before).abs().max()

    width = vla.backbone.width
    keys, values = slice(0, width), slice(width, 2 * width)
    assert effect(0.0, keys) == 0 and effect(0.0, values) > 1e-3 and effect(1.0, keys) > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# The five variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_fall_on_one_batch(variant):
    """30 steps on four samples more than halve the action loss, and the latent loss where there is one."""
    vla = build(variant)
    batch, optimizer = batch_for(vla), torch.optim.AdamW(vla.parameters(), 3e-3)
    history = []
    for _ in range(30):
        history.append(vla(batch))
        optimizer.zero_grad()
        history[-1]["loss"].backward()
        optimizer.step()
    first, last = history[0], history[-1]
    assert last["action_loss"] < 0.5 * first["action_loss"]
    assert ("latent_loss" in last) == (variant != "baseline")
    if variant != "baseline":
        assert last["latent_loss"] < 0.5 * first["latent_loss"]
    assert ("latent_accuracy" in last) == (variant in ("la_direct", "la_cond", "la_tok"))
    if "latent_accuracy" in last:
        assert first["latent_accuracy"] < 0.5 and last["latent_accuracy"] > 0.8


@torch.no_grad()
def test_weights_of_the_latent_losses():
    """loss = action_loss + lambda latent_loss, lambda the paper's or the one asked for."""
    for variant, expected in {"baseline": 0, "la_align": 1.0, "la_direct": 0.1, "la_cond": 0.1, "la_tok": 0.1}.items():
        for option, weight in ((-1.0, expected), (0.7, 0.7 if expected else 0)):
            vla = build(variant, latent_weight=option)
            losses = vla(batch_for(vla))
            assert losses["loss"].item() == pytest.approx(
                losses["action_loss"].item() + weight * losses.get("latent_loss", torch.zeros(())).item(), rel=1e-6
            )


def reached(vla, loss):
    """Names of the parameters with a gradient of `loss` that is not zero."""
    vla.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in vla.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def layers_in(names):
    """The language model's layers among these parameters."""
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names if "language_model.layers." in name}


LATENT = ("la_align", "la_direct", "la_cond", "la_tok")


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
    latents = vla.queries.grad.abs().amax(1) > 0
    expected = {
        "la_align": [True] * CHUNK,
        "la_direct": [True] * 2 * CHUNK,
        "la_cond": [True] * 2 * CHUNK + [False] * CHUNK,
        "la_tok": [True] * CHUNK,
    }
    assert latents.tolist() == expected[variant]


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
    vla, seen = build(variant), []
    vla.head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    batch, bb = batch_for(vla), vla.backbone
    actions, _ = vla.run(batch)
    states = bb(model.prepare_images(batch["images"], 64), *bb.tokenise(batch["text"]), vla.queries)
    for (placeholders, images), k in zip(seen, (2, 3, 4), strict=True):
        assert torch.equal(placeholders, bb.placeholder_states(states[k]))
        assert torch.equal(images, bb.image_states(states[k]))
    for placeholders, images in seen:
        assert placeholders.shape[1] == count and images.shape[1] == 2 * 4
    weight = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad((actions * weight).sum(), [part for pair in seen for part in pair])
    assert all((grad.abs().amax(2) > 0).all() for grad in grads)


@torch.no_grad()
def test_la_cond_latents_never_see_actions():
    """Other action placeholders leave every latent state as it is; other latent ones move the action states."""
    vla = build("la_cond")
    bb, images = vla.backbone, images_for(vla, 2)
    text = bb.tokenise(TEXTS[:2])

    def moved(rows):
        """Change of the latent and of the action placeholders' states when these placeholders change."""
        queries = vla.queries.clone()
        queries[rows] += 0.1
        before, after = (bb(images, *text, rows, range(1, 5)).values() for rows in (vla.queries, queries))
        pairs = zip(before, after, strict=True)
        change = torch.stack(
            [(bb.placeholder_states(a) - bb.placeholder_states(b)).abs().amax((0, 2)) for a, b in pairs]
        )  # [N, Q]
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
    _, latents = vla.run(batch)
    logits = vla.latent_head(latents)[0].log_softmax(-1)  # [H P, K]
    expected = -sum(logits[2 * h + p, batch["codes"][0, h, p]] for h in range(CHUNK) for p in range(2)) / (2 * CHUNK)
    assert vla(batch)["latent_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    best = logits.argmax(-1).view(1, CHUNK, 2)
    assert vla(batch | {"codes": best})["latent_accuracy"] == 1


@torch.no_grad()
@pytest.mark.parametrize("layer", (0, 1, 4))
def test_align_loss_by_hand(layer):
    """1 - cos of the projected nu^(k) at placeholder h and the mean over P of c_{t+h}; k = 2 of 4 by default."""
    vla = build("la_align", align_layer=layer)
    batch = batch_for(vla)
    bb = vla.backbone
    states = bb(model.prepare_images(batch["images"], 64), *bb.tokenise(batch["text"]), vla.queries)
    guess = vla.latent_head(bb.placeholder_states(states[layer or 2])).numpy()
    total = 0
    for b, h in zip(*np.nonzero(batch["valid"].numpy())):
        target = batch["vectors"][b, h].numpy().mean(0)
        total += 1 - guess[b, h] @ target / np.linalg.norm(guess[b, h]) / np.linalg.norm(target)
    assert vla(batch)["latent_loss"].item() == pytest.approx(total / (4 * CHUNK), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Ablations


@torch.no_grad()
@pytest.mark.parametrize("variant", ("la_direct", "la_cond", "la_tok"))
def test_continuous_targets_by_hand(variant):
    """A two-layer MLP on the same placeholders, squared error to the vectors, no accuracy."""
    vla = build(variant, continuous=True)
    batch = batch_for(vla)
    _, latents = vla.run(batch)
    first, _, second = vla.latent_head
    guess = second(F.gelu(first(latents[:, : vla.latent_count]))).view(batch["vectors"].shape)
    expected = ((guess - batch["vectors"]).square().mean((2, 3)) * batch["valid"]).sum() / (4 * CHUNK)
    losses = vla(batch)
    assert losses["latent_loss"].item() == pytest.approx(expected.item(), rel=1e-5) and "latent_accuracy" not in losses


def test_align_layer_moves_the_reach_of_the_loss():
    """Reading layer 3 trains layers 0 to 2."""
    vla = build("la_align", align_layer=3)
    assert layers_in(reached(vla, vla(batch_for(vla))["latent_loss"])) == {0, 1, 2}


def test_more_placeholders_for_the_baseline():
    """3 per step make 12 placeholders that all reach the head; the loss stays that of the actions."""
    vla = build("baseline", placeholders_per_step=3)
    losses = vla(batch_for(vla))
    assert vla.queries.shape == (3 * CHUNK, 64) and losses.keys() == {"loss", "action_loss"}
    losses["loss"].backward()
    assert (vla.queries.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("variant, changes, message", (
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
))  # fmt: skip
def test_what_cannot_work_is_refused(variant, changes, message):
    """The field, its value and what would work."""
    with pytest.raises(ValueError, match=message):
        build(variant, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# A pretrained checkpoint


def test_model_on_a_base_that_the_caller_made():
    """Random weights of any config, under a name that nothing is read from: these weights, frozen, with LoRA."""
    tokenizer = model.tiny_tokenizer()
    config = model.tiny_config(tokenizer)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 32
    config.text_config.num_hidden_layers = 3
    qwen = model.Qwen3VLModel._from_config(config, attn_implementation="sdpa")
    before = {name: p.clone() for name, p in qwen.named_parameters()}
    vla = VLA(replace(spec("la_direct"), backbone="made-here", lora_rank=2), base=(qwen, tokenizer))
    assert vla.backbone.qwen is qwen and vla.backbone.tokenizer is tokenizer
    assert (vla.backbone.width, vla.backbone.layers, len(vla.head.blocks)) == (32, 3, 2)
    vla(batch_for(vla))["loss"].backward()
    trained = {name for name, p in qwen.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    frozen = {name.replace(".base_layer", ""): p for name, p in qwen.named_parameters() if not p.requires_grad}
    assert frozen.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in frozen.items())


def test_lora_is_trained_in_full_precision():
    """On a bf16 base the low-rank updates are f32: in bf16, small steps of the optimizer would round to nothing."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4)).bfloat16()
    model.add_lora(base, 2, 4)
    assert {(p.requires_grad, p.dtype) for p in base.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_is_transformers(dtype):
    """Output and gradients: the same bits in f32, to rounding in bf16, of which autocast must not make f32."""
    qwen = build("la_align").backbone.qwen
    assert len(model.norms(qwen)) == 4 * 4 + 1  # two of each layer, two of its heads, the last
    norm, x = model.norms(qwen)[-1].to(dtype), torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = norm(x), type(norm).forward(norm, x)
    assert ours.dtype == dtype
    pairs = [(ours, theirs), *zip(*(torch.autograd.grad(y.square().sum(), (x, norm.weight)) for y in (ours, theirs)))]
    close = torch.equal if dtype == torch.float32 else lambda a, b: torch.allclose(a, b, rtol=0.05, atol=0.1)
    assert all(close(a, b) for a, b in pairs)


def test_low_rank_update_is_pefts():
    """Output and gradients of the fused product equal those of peft's own forward, with a bias and without."""
    torch.manual_seed(0)
    for bias in (True, False):
        layers = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias))
        model.add_lora(layers, rank=2, alpha=3)
        layer, x = layers[0], torch.randn(2, 4, 6, requires_grad=True)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        trained = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        ours, pefts = layers(x), type(layer).forward(layer, x)
        assert torch.allclose(ours, pefts, atol=1e-6) and not torch.allclose(ours, layer.base_layer(x), atol=1e-2)
        pairs = zip(*(torch.autograd.grad(out.square().sum(), trained) for out in (ours, pefts)), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def test_base_in_half_precision():
    """Frozen weights in bf16 with updates in f32 give the f32 losses and gradients to 2 %, and merge without loss."""
    vla, half = build("la_align"), build("la_align")
    for p in half.backbone.qwen.parameters():
        p.data = p.data.bfloat16()
    found = []
    for each in (vla, half):
        torch.manual_seed(3)
        model.add_lora(each.backbone.qwen, 2, 4)
        for _, layer in model.lora_layers(each.backbone.qwen):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        found.append(losses_and_gradients(each, batch_for(each)))
    for a, b in zip(*found, strict=True):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.1 * a.norm() + 1e-4
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=0.02)
    before = half.run(batch_for(half))[0]
    model.merge_lora(half)
    assert (half.run(batch_for(half))[0] - before).abs().mean() < 0.02 * before.abs().mean()


def trained(module):
    """Names of the trainable parameters."""
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_lora_on_some_layers():
    """Layers by their last name, in vision and language; a name that is not there is refused with those that are."""
    qwen = build("baseline").backbone.qwen
    with pytest.raises(
        ValueError, match="lora_targets are qkv, query; the linear layers here are down_proj, gate_proj"
    ):
        model.add_lora(qwen, 2, 4, ("qkv", "query"))
    model.add_lora(qwen, 2, 4, ("qkv", "q_proj"))
    vision = {f"visual.blocks.{n}.attn.qkv" for n in range(3)}
    language = {f"language_model.layers.{n}.self_attn.q_proj" for n in range(4)}
    assert {name.split(".lora_")[0] for name in trained(qwen)} == vision | language


def test_what_is_tuned(checkpoint):
    """All linear layers' updates by default, all weights, or nothing of the backbone; head and queries always."""
    base = str(checkpoint(torch.float32))
    for tuning in ("", "lora", "full", "frozen"):
        vla = VLA(replace(spec("la_align"), backbone=base, tuning=tuning))
        qwen, every = vla.backbone.qwen, {name for name, _ in vla.backbone.qwen.named_parameters()}
        if tuning == "full":
            assert trained(qwen) == every
        elif tuning == "frozen":
            assert trained(qwen) == set()
        else:
            linear = {
                name for name, m in qwen.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name
            }
            assert linear == {f"{name}.base_layer" for name, _ in model.lora_layers(qwen)}
            assert trained(qwen) == {name for name in every if ".lora_A." in name or ".lora_B." in name}
        assert {"queries", "head.queries", "latent_head.weight"} <= trained(vla)
        assert all(p.dtype == torch.float32 for p in vla.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="lora_targets are qkv, but tuning is 'full': no LoRA"):
        VLA(replace(spec("baseline"), backbone=base, tuning="full", lora_targets=("qkv",)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_pretrained_checkpoint_trains_by_lora_and_loads_again(dtype, checkpoint, train_config, tmp_path):
    """Load, train, save what was trained, load: bit-identical actions; the base is neither changed nor saved."""
    import train

    base, run = checkpoint(dtype), tmp_path / "run"
    train.main(
        train_config(run, variant="la_cond", backbone=str(base), lora_rank=4, learning_rate=1e-2, text_length=24)
    )
    vla, config = model.load_vla(run)
    again, _ = model.load_vla(run)
    batch = batch_for(vla) | {"images": [torch.randint(0, 256, (4, 96, 96, 3), dtype=torch.uint8) for _ in range(2)]}
    with torch.no_grad():
        assert torch.equal(vla.run(batch)[0], again.run(batch)[0])
    saved, _ = load_tensors(run / "model.safetensors")
    assert saved.keys() == {name for name, p in vla.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.split(".")[0] in ("queries", "head", "latent_head") for name in saved)
    assert any("visual" in name and "lora_B" in name and saved[name].abs().max() > 0 for name in saved)
    assert any("language_model" in name and "lora_B" in name and saved[name].abs().max() > 0 for name in saved)
    with safe_open(base / "model.safetensors", "pt") as file:
        stored = {
            name.removeprefix("model."): file.get_tensor(name).float() for name in file.keys() if "lm_head" not in name
        }
    frozen = {
        name.removeprefix("backbone.qwen.").replace(".base_layer", ""): p.float()
        for name, p in vla.named_parameters()
        if not p.requires_grad
    }
    assert frozen.keys() == stored.keys() and all(torch.equal(p, stored[name]) for name, p in frozen.items())
    model.merge_lora(again)
    merged = {name: p.clone() for name, p in again.backbone.named_parameters()}
    model.merge_lora(again)  # finds nothing left to merge
    assert model.lora_layers(vla) and not model.lora_layers(again) and not model.lora_layers(model.Policy(run).vla)
    assert {name.removeprefix("qwen.") for name in merged} == stored.keys()
    assert all(torch.equal(p, merged[name]) for name, p in again.backbone.named_parameters())
    assert (merged["qwen.visual.blocks.0.attn.qkv.weight"] - stored["visual.blocks.0.attn.qkv.weight"]).abs().max() > 0
    with torch.no_grad():
        assert torch.allclose(again.run(batch)[0], vla.run(batch)[0], atol=2e-5)


def test_another_base_is_refused(checkpoint, train_config, tmp_path):
    """A run on a base whose weights have changed since does not load."""
    import train

    base, run = checkpoint(torch.float32), tmp_path / "run"
    train.main(train_config(run, variant="baseline", backbone=str(base), lora_rank=4, max_steps=1))
    before = json.loads((run / "config.json").read_text())["base_hash"]
    tensors, info = load_tensors(base / "model.safetensors")
    tensors["model.language_model.layers.2.mlp.up_proj.weight"] += 0.01
    save_tensors(base / "model.safetensors", tensors, **info)
    with pytest.raises(ValueError, match=f"was trained on another .*the run's to {before}"):
        model.load_vla(run)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    """A model_type that is not qwen3_vl is named."""
    from transformers import BertConfig

    BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    model.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bert' checkpoint.*qwen3_vl"):
        VLA(replace(spec("baseline"), backbone=str(tmp_path)))


def test_tokenizer_without_the_images_tokens_is_refused(checkpoint):
    """The token is named by its number and its name in the config; so is a missing chat template."""
    from transformers import AutoConfig

    base = checkpoint(torch.float32)
    tokenizer, config = model.tiny_tokenizer(), AutoConfig.from_pretrained(base)
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="has no chat template; add"):
        VLA(replace(spec("baseline"), backbone=str(base)))
    config.vision_end_token_id = 7
    config.save_pretrained(base)
    with pytest.raises(ValueError, match="has no special token 7, the vision_end_token_id of its config"):
        VLA(replace(spec("baseline"), backbone=str(base)))


def test_gpu_without_bf16_is_refused():
    """By its compute capability: Turing is refused, Ampere and newer pass."""
    with pytest.raises(ValueError, match="the GPU Tesla T4 has compute capability 7.5, and bf16 needs 8.0"):
        model.check_gpu("Tesla T4", (7, 5))
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        model.check_gpu("newer", capability)


def test_folder_that_is_no_run_is_refused(tmp_path):
    """The missing file is named."""
    with pytest.raises(FileNotFoundError, match="has no config.json: it is not a run"):
        model.load_vla(tmp_path)
