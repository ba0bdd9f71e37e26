"""backbone.py: the prompt, agreement with transformers, what makes a step fast, LoRA, and which checkpoints load."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_helpers import CHUNK, TEXTS, batch_for, build, images_for, losses_and_gradients, small_config
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, BertConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

import backbone
import lora
import tiny
from model import VARIANTS, VLA
from pretrained import check_bf16_support, load_qwen

# ----------------------------------------------------------------------------------------------------------------------
# Prompt


@pytest.mark.parametrize("cameras", (1, 2))
def test_prompt_layout(cameras):
    """[chat prefix, image tokens, text, padding, assistant header, placeholders]: the embeddings at each place."""
    vla = build("la_cond", cameras=cameras)
    bb = vla.backbone
    images = images_for(vla, 2)
    ids, counts = bb.tokenise(TEXTS[:2])

    def tokens(text):
        return bb.tokenizer(text, add_special_tokens=False)["input_ids"]

    token_id = bb.tokenizer.convert_tokens_to_ids
    pad_id = token_id("<|image_pad|>")
    first = tokens("<|im_start|>user\n")
    camera = [token_id("<|vision_start|>")] + [pad_id] * 4 + [token_id("<|vision_end|>")]
    last = tokens("<|im_end|>\n<|im_start|>assistant\n")
    nu0 = bb(images, ids, counts, vla.queries)[0]
    image_tokens, _ = bb.vision(images)
    assert counts[0] != counts[1]
    for row, text in enumerate(TEXTS[:2]):
        request = tokens(f"{text}\nPlease predict the next 4 robot actions:")
        whole = torch.tensor([*first, *camera * cameras, *request, *[0] * (24 - len(request)), *last])
        is_image = whole == pad_id
        assert nu0.shape[1] == len(whole) + 3 * CHUNK
        embedded = bb.qwen.language_model.embed_tokens(whole[~is_image])
        assert torch.equal(nu0[row, : len(whole)][~is_image], embedded)
        assert torch.equal(nu0[row, : len(whole)][is_image], image_tokens[row].flatten(0, 1))
        assert torch.equal(nu0[row, len(whole) :], vla.queries)
        assert bb.tokenizer.decode(request) == f"{text}\nPlease predict the next 4 robot actions:"
    assert torch.equal(bb.image_states(nu0), image_tokens.flatten(1, 2))
    assert torch.equal(bb.placeholder_states(nu0)[0], vla.queries)


def test_positions_by_hand():
    """One camera of 2 x 2 tokens: an image is one step in time, the text follows its side, the padding is skipped."""
    bb = build("baseline", cameras=1).backbone
    _, counts = bb.tokenise(TEXTS[:1])
    places, _ = bb.positions_and_mask(counts)
    positions = bb.positions[:, 0, places[0]]  # [3, L]
    p = bb.first_image
    n = int(counts[0])
    assert positions[:, : p + 1].tolist() == [list(range(p + 1))] * 3
    assert positions[:, p + 1 : p + 5].tolist() == [
        [p + 1] * 4,
        [p + 1, p + 1, p + 2, p + 2],
        [p + 1, p + 2, p + 1, p + 2],
    ]
    assert positions[:, p + 5 : p + 6 + n].tolist() == [list(range(p + 3, p + 4 + n))] * 3  # end token and text
    rest = bb.length - bb.header_start
    assert positions[:, bb.header_start :].tolist() == [list(range(p + 4 + n, p + 4 + n + rest))] * 3


@torch.no_grad()
def test_padding_changes_nothing():
    """Room for 24 or 40 tokens, other ids in the padding: the same actions."""
    vla = build("la_align")
    wider = build("la_align", text_length=40)
    wider.load_state_dict(vla.state_dict())
    batch = batch_for(vla)
    actions, _ = vla.predict(batch)
    assert torch.allclose(wider.predict(batch)[0], actions, atol=1e-5)
    bb = vla.backbone
    images = images_for(vla, 4)
    ids, counts = bb.tokenise(batch["text"])
    changed_ids = torch.where(torch.arange(24) < counts[:, None], ids, 99)
    assert not torch.equal(ids, changed_ids)
    padded = bb(images, ids, counts, vla.queries, range(1, 5))
    changed = bb(images, changed_ids, counts, vla.queries, range(1, 5))
    for x, y in zip(padded.values(), changed.values(), strict=True):
        assert torch.allclose(bb.placeholder_states(x), bb.placeholder_states(y), atol=1e-6)


def test_instruction_too_long_is_refused():
    """The error says how long it is and which flag to raise."""
    vla = build("baseline")
    with pytest.raises(ValueError, match="takes .* tokens .* text_length is 24.*--text-length"):
        vla.backbone.tokenise(["put the zebra beside the xylophone"])


# ----------------------------------------------------------------------------------------------------------------------
# Agreement with transformers


def transformers_inputs(bb, images, ids, counts, queries):
    """Return the arguments of Qwen3VLModel.forward for the same prompt.

    The placeholders become the last entries of its vocabulary.
    """
    batch = len(ids)
    n = bb.grid
    p = bb.patch
    embeddings = bb.qwen.language_model.embed_tokens.weight
    with torch.no_grad():
        embeddings[-bb.num_placeholders :] = queries
    placeholders = torch.arange(len(embeddings) - bb.num_placeholders, len(embeddings))
    sequence = torch.cat([bb.fixed_ids.repeat(batch, 1), placeholders.repeat(batch, 1)], 1)
    sequence[:, bb.text_start : bb.header_start] = ids
    real = torch.ones_like(sequence)
    for row, count in enumerate(counts):
        real[row, bb.text_start + count : bb.header_start] = 0
    x = images.flatten(0, 1).view(-1, 3, n // 2, 2, p, n // 2, 2, p)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B C, n/2, n/2, 2, 2, 3, p, p]
    pixels = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * p * p)
    grid = torch.tensor([[1, n, n]] * batch * images.shape[1])
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
    bb = vla.backbone
    images = images_for(vla, 2)
    ids, counts = bb.tokenise(TEXTS[:2])
    inputs = transformers_inputs(bb, images, ids, counts, vla.queries)
    real = inputs["attention_mask"].bool()
    places, _ = bb.positions_and_mask(counts)
    assert torch.equal(inputs["position_ids"][:, real], bb.positions[:, 0, places][:, real])
    recorded = []

    def record(layer, args, kwargs):
        recorded.append(args[0] if args else kwargs["hidden_states"])

    for layer in bb.qwen.language_model.layers:
        layer.register_forward_pre_hook(record, with_kwargs=True)
    last = bb.qwen(**inputs).last_hidden_state
    expected = [*recorded, last]
    states = bb(images, ids, counts, vla.queries)
    assert list(states) == [0, 1, 2, 3, 4]
    for k, (a, b) in enumerate(zip(states.values(), expected, strict=True)):
        assert (a - b)[real].abs().max() < 1e-5 * b[real].abs().max(), k


def test_patches_equal_the_image_processors():
    """Of the same u8 pictures of 256 px, in every bit: transformers' Pillow variant, either temporal half."""
    bb = build("baseline", image_size=256).backbone
    pictures = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    sizes = dict(patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 16777216})
    processor = Qwen2VLImageProcessorPil(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    stored = torch.from_numpy(pictures).float()
    for options, pixels, tolerance in (
        ({"do_rescale": False, "do_normalize": False}, stored, 0),
        ({}, stored / 255 * 2 - 1, 2e-7),
    ):
        expected = processor(list(pictures), return_tensors="pt", **options)
        assert expected["image_grid_thw"].tolist() == [[1, 16, 16]] * 4
        patches = bb.patches(pixels.permute(0, 3, 1, 2).unflatten(0, (2, 2))).unflatten(2, (3, 256))  # [4, 256, 3, p p]
        for half in expected["pixel_values"].view(4, 256, 3, 2, 256).unbind(3):
            assert (patches - half).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_is_transformers(dtype):
    """Output and gradients: the same bits in f32, to rounding in bf16, of which autocast must not make f32."""
    qwen = build("la_align").backbone.qwen
    assert len(backbone.rms_norms(qwen)) == 4 * 4 + 1  # two of each layer, two of its heads, the last
    norm = backbone.rms_norms(qwen)[-1].to(dtype)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = norm(x)
        expected = type(norm).forward(norm, x)
    assert out.dtype == dtype
    gradients, expected_gradients = (torch.autograd.grad(y.square().sum(), (x, norm.weight)) for y in (out, expected))
    for a, b in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        if dtype == torch.float32:
            assert torch.equal(a, b)
        else:
            assert torch.allclose(a, b, rtol=0.05, atol=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# What makes a step fast


class Waits(TorchDispatchMode):
    """A list of every operation for which a GPU's host would wait.

    These are a value read, a size that depends on values, a copy of host data and a matrix inverse.
    """

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "linalg_inv_ex")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name == "index" else []
        has_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if name in self.waiting or has_mask:
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_never_waits_for_the_device(variant):
    """Forward and backward of known instructions, augmented; what would wait is noticed."""
    vla = build(variant)
    batch = batch_for(vla) | {"draws": torch.rand(4, 2, 6)}
    vla(batch)  # from here on the instructions are known
    with Waits() as waits:
        vla(batch)["loss"].backward()
    assert waits.seen == []
    with Waits() as waits:
        batch["codes"][batch["valid"]].sum().item()
        torch.tensor([1])
    assert waits.seen == ["index", "_local_scalar_dense", "lift_fresh"]


@pytest.mark.parametrize("with_lora", (False, True))
def test_gradient_checkpointing_changes_nothing(with_lora):
    """The same losses and gradients; every block of vision and language runs twice."""
    vla = build("la_cond")
    qwen = vla.backbone.qwen
    if with_lora:
        lora.add_lora(qwen, 2, 4)
    batch = batch_for(vla)
    expected = losses_and_gradients(vla, batch)
    calls = []
    blocks = [*qwen.language_model.layers, *qwen.visual.blocks]
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    vla.backbone.checkpointing = True
    checkpointed = losses_and_gradients(vla, batch)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(checkpointed, expected, strict=True))
    assert len(checkpointed) > len(blocks) and all(calls.count(block.mlp) == 2 for block in blocks)


@pytest.mark.parametrize("with_lora", (False, True))
def test_one_graph_for_all_batches(with_lora):
    """Backbone and head compile without a break, and other instructions, lengths and pixels need no second graph."""
    vla = build("la_align")
    if with_lora:
        lora.add_lora(vla.backbone.qwen, 2, 4)
        vla.backbone.checkpointing = True
    batches = [batch_for(vla, seed=seed) | {"text": TEXTS[seed:] + TEXTS[:seed]} for seed in (0, 1, 2)]
    eager = [vla(batch)["loss"] for batch in batches]
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        vla.forward_pass = torch.compile(vla.forward_pass, fullgraph=True, dynamic=False, backend="eager")
        for batch, expected in zip(batches, eager, strict=True):
            loss = vla(batch)["loss"]
            loss.backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "variant, changes, expected",
    (("baseline", {}, {2, 3, 4}), ("la_align", {"align_layer": 1}, {1, 2, 3, 4}), ("la_cond", {}, {2, 3, 4})),
)
def test_only_the_states_that_are_read_are_kept(variant, changes, expected):
    """The head's second half of the layers, and la_align's; the others are not returned."""
    vla = build(variant, **changes)
    returned = []
    vla.backbone.register_forward_hook(lambda module, inputs, states: returned.append(states))
    vla.predict(batch_for(vla))
    assert returned[0].keys() == expected


# ----------------------------------------------------------------------------------------------------------------------
# What is trained: all weights, low-rank updates, or nothing


def trained(module):
    """Return the names of the trainable parameters."""
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_lora_is_trained_in_full_precision():
    """On a bf16 base the low-rank updates are f32: in bf16, small steps of the optimizer would round to nothing."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4)).bfloat16()
    lora.add_lora(base, 2, 4)
    assert {(p.requires_grad, p.dtype) for p in base.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("bias", (True, False))
def test_low_rank_update_is_pefts(bias):
    """Output and gradients of the fused product equal those of peft's own forward, with a bias and without."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias))
    lora.add_lora(layers, rank=2, alpha=3)
    layer = layers[0]
    x = torch.randn(2, 4, 6, requires_grad=True)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    out = layers(x)
    expected = type(layer).forward(layer, x)
    assert torch.allclose(out, expected, atol=1e-6) and not torch.allclose(out, layer.base_layer(x), atol=1e-2)
    gradients, expected_gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(gradients, expected_gradients, strict=True))


@torch.no_grad()
def test_updates_merge_into_a_base_in_half_precision():
    """Actions, which the updates move by about 16 %, move by less than 2 % of their size, and no LoRA layer is left."""
    vla = build("la_align")
    for p in vla.backbone.qwen.parameters():
        p.data = p.data.bfloat16()
    torch.manual_seed(3)
    lora.add_lora(vla.backbone.qwen, 2, 4)
    for _, layer in lora.lora_layers(vla.backbone.qwen):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    before, _ = vla.predict(batch_for(vla))
    lora.merge_lora(vla)
    after, _ = vla.predict(batch_for(vla))
    assert (after - before).abs().mean() < 0.02 * before.abs().mean()
    assert not lora.lora_layers(vla)


def test_lora_on_some_layers():
    """Layers by their last name, in vision and language; a name that is not there is refused with those that are."""
    qwen = build("baseline").backbone.qwen
    message = "lora_targets are qkv, query; the linear layers here are down_proj, gate_proj"
    with pytest.raises(ValueError, match=message):
        lora.add_lora(qwen, 2, 4, ("qkv", "query"))
    lora.add_lora(qwen, 2, 4, ("qkv", "q_proj"))
    vision = {f"visual.blocks.{n}.attn.qkv" for n in range(3)}
    language = {f"language_model.layers.{n}.self_attn.q_proj" for n in range(4)}
    assert {name.split(".lora_")[0] for name in trained(qwen)} == vision | language


def test_what_is_tuned(checkpoint):
    """All linear layers' updates by default, all weights, or nothing of the backbone; head and queries always."""
    base = str(checkpoint(torch.float32))
    for tuning in ("", "lora", "full", "frozen"):
        vla = VLA(replace(small_config("la_align"), backbone=base, tuning=tuning))
        qwen = vla.backbone.qwen
        every = {name for name, _ in qwen.named_parameters()}
        if tuning == "full":
            assert trained(qwen) == every
        elif tuning == "frozen":
            assert trained(qwen) == set()
        else:
            linear = {name for name, module in qwen.named_modules() if isinstance(module, torch.nn.Linear)}
            bases = {name for name in linear if "lora_" not in name}
            assert bases == {f"{name}.base_layer" for name, _ in lora.lora_layers(qwen)}
            assert trained(qwen) == {name for name in every if ".lora_A." in name or ".lora_B." in name}
        assert {"queries", "head.queries", "latent_head.weight"} <= trained(vla)
        assert all(p.dtype == torch.float32 for p in vla.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="lora_targets are qkv, but tuning is 'full': no LoRA"):
        VLA(replace(small_config("baseline"), backbone=base, tuning="full", lora_targets=("qkv",)))


# ----------------------------------------------------------------------------------------------------------------------
# Where a base comes from


def test_base_is_bf16_only_where_it_is_frozen_and_goes_to_a_gpu(checkpoint):
    """Whether there is a GPU does not matter: on a CPU beside it the base is f32."""
    config = replace(small_config("baseline"), backbone=str(checkpoint(torch.bfloat16)))
    for device, tuning, dtype in (
        ("cuda", "lora", torch.bfloat16),
        (torch.device("cuda", 1), "frozen", torch.bfloat16),
        ("cuda", "full", torch.float32),
        ("cpu", "lora", torch.float32),
    ):
        qwen, _ = load_qwen(replace(config, tuning=tuning), device)
        assert {p.dtype for p in qwen.parameters()} == {dtype}


def test_gpu_without_bf16_is_refused():
    """By its compute capability: Turing is refused, Ampere and newer pass."""
    with pytest.raises(ValueError, match="the GPU Tesla T4 has compute capability 7.5, and bf16 needs 8.0"):
        check_bf16_support("Tesla T4", (7, 5))
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        check_bf16_support("newer", capability)


def test_model_on_a_base_that_the_caller_made():
    """Random weights of any config, under a name that nothing is read from: these weights, frozen, with LoRA."""
    torch.manual_seed(0)
    tokenizer = tiny.tiny_tokenizer()
    config = tiny.tiny_config(tokenizer)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 32
    config.text_config.num_hidden_layers = 3
    qwen = Qwen3VLModel._from_config(config, attn_implementation="sdpa")
    before = {name: p.clone() for name, p in qwen.named_parameters()}
    vla = VLA(replace(small_config("la_direct"), backbone="made-here", lora_rank=2), base=(qwen, tokenizer))
    assert vla.backbone.qwen is qwen and vla.backbone.tokenizer is tokenizer
    assert (vla.backbone.width, vla.backbone.layers, len(vla.head.blocks)) == (32, 3, 2)
    vla(batch_for(vla))["loss"].backward()
    with_gradient = {name for name, p in qwen.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora_" in name for name in with_gradient)
    frozen = {name.replace(".base_layer", ""): p for name, p in qwen.named_parameters() if not p.requires_grad}
    assert frozen.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in frozen.items())


def test_checkpoint_of_a_different_architecture_is_refused(tmp_path):
    """A model_type that is not qwen3_vl is named."""
    BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bert' checkpoint.*qwen3_vl"):
        VLA(replace(small_config("baseline"), backbone=str(tmp_path)))


def rename_weights(base, change):
    """Let change(weights) change the weights of a checkpoint, {name: tensor}, or return what takes their place."""
    path = base / "model.safetensors"
    weights = load_file(path)
    save_file(change(weights) or weights, path, metadata={"format": "pt"})


DAMAGES = {  # what is done to a checkpoint -> what the error says
    "a peft prefix": (
        lambda w: {f"base_model.model.{name}": tensor for name, tensor in w.items()},
        r"missing language_model.embed_tokens.weight; .*and \d+ more",
    ),
    "a missing layer": (
        lambda w: {name: tensor for name, tensor in w.items() if ".layers.2." not in name},
        "missing language_model.layers.2.input_layernorm.weight; missing language_model.layers.2.mlp",
    ),
    "no vision tower": (
        lambda w: {name: tensor for name, tensor in w.items() if "visual" not in name},
        "missing visual.blocks.0.attn.proj.bias",
    ),
    "one weight too many": (
        lambda w: w | {"model.visual.extra.weight": torch.ones(2)},
        "unknown .*visual.extra.weight",
    ),
    "another shape": (
        lambda w: {
            n: tensor[:8].clone() if n.endswith("layers.0.self_attn.q_proj.weight") else tensor
            for n, tensor in w.items()
        },
        r"q_proj.weight is \(8, 64\), the model's is \(64, 64\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(damage, checkpoint):
    """A model with random numbers in their place would train and could never be loaded again."""
    base = checkpoint(torch.float32)
    change, message = DAMAGES[damage]
    rename_weights(base, change)
    with pytest.raises(ValueError, match=f"weights of backbone {base} are not those of its config.json: .*{message}"):
        VLA(replace(small_config("baseline"), backbone=str(base)))


def test_head_of_the_language_model_may_be_there(checkpoint):
    """Larger releases store it; it is not part of the model."""
    base = checkpoint(torch.float32)
    rename_weights(base, lambda w: w | {"lm_head.weight": w["model.language_model.embed_tokens.weight"].clone()})
    VLA(replace(small_config("baseline"), backbone=str(base)))


@pytest.mark.parametrize("place", ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
def test_chat_template_of_any_release_is_found(place, checkpoint):
    """In a file of its own, as text or as JSON, or in the tokenizer's settings: the same prompt."""
    base = checkpoint(torch.float32)
    expected = VLA(replace(small_config("baseline"), backbone=str(base))).backbone.fixed_ids
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    settings = base / "tokenizer_config.json"
    if place == "tokenizer_config.json":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    else:
        content = json.dumps({"chat_template": template}) if place.endswith("json") else template
        (base / place).write_text(content)
    assert torch.equal(VLA(replace(small_config("baseline"), backbone=str(base))).backbone.fixed_ids, expected)


def test_tokenizer_without_the_images_tokens_is_refused(checkpoint):
    """The token is named by its number and its name in the config; so is a missing chat template."""
    base = checkpoint(torch.float32)
    tokenizer = tiny.tiny_tokenizer()
    config = AutoConfig.from_pretrained(base)
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="has no chat template; add"):
        VLA(replace(small_config("baseline"), backbone=str(base)))
    config.vision_end_token_id = 7
    config.save_pretrained(base)
    with pytest.raises(ValueError, match="has no special token 7, the vision_end_token_id of its config"):
        VLA(replace(small_config("baseline"), backbone=str(base)))
