"""What the benchmarks share: policies of any size on random weights, a reference forward pass, FLOP, clocks.

The reference is transformers' own `Qwen3VLForConditionalGeneration.forward` over the same modules and weights, as most
published policies call it. Sizes need no download: weights are random and the tokenizer is the tiny backbone's.
Left out: what only one mode needs (bench.py, bench_model.py).

Axes: B batch, C cameras, H chunk steps, A action size, P codes per step, d width of a code, L tokens, Q placeholders,
p side of a patch in pixels.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import tiny
from backbone import prompt_ids, rms_norms
from batches import prepare_images
from common import to_device
from lora import lora_layers
from model import VARIANTS, VLA, ModelConfig

CHUNK = 8  # actions predicted at once
TEXTS = ["put the bowl on the stove", "put the bowl on top of the cabinet", "open the middle drawer of the cabinet"]


# ----------------------------------------------------------------------------------------------------------------------
# Models of any size on random weights


@dataclass
class VlaConfig:
    """The settings that all modes with a policy share."""

    variant: Literal[*VARIANTS] = "la_direct"
    """which of the paper's five models"""
    size: str = "tiny"
    """tiny, wide (hidden 512, 12 layers, vision 6 x 384, real vocabulary), 2b, 4b, 8b, or the path of a config.json"""
    tuning: Literal["lora", "full", "frozen"] = "lora"
    """what is trained of the backbone, as train.py --tuning; tiny is always trained in full"""
    images: int = 2
    """cameras"""
    image_size: int = 256
    """side of the images"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """of the frozen weights, and of what is computed with them on a GPU; trained weights are fp32"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where to run"""


ROPE = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True)
VOCABULARY = dict(vocab_size=151_936, max_position_embeddings=262_144)
PATCHES = dict(patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=2304)
VISION = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_visual_indexes=[5, 11, 17])
LARGE = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, deepstack_visual_indexes=[8, 16, 24])
SMALL = dict(depth=6, hidden_size=384, intermediate_size=1536, num_heads=6, deepstack_visual_indexes=[1, 3, 5])


def qwen_settings(width, mlp, layers, heads, kv_heads, head_width, vision):
    """Return the (text, vision) settings of a Qwen3VLConfig. width: of the residual stream; mlp: of the MLPs inside."""
    side = head_width * 5 // 32
    sections = [head_width // 2 - 2 * side, side, side]  # pairs that are rotated by time, by row and by column
    text = dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_width,
        rope_parameters=ROPE | {"mrope_section": sections},
    )
    return text | VOCABULARY, vision | PATCHES | dict(out_hidden_size=width)


SIZES = tiny.SIZES | {  # name -> (text, vision) settings of Qwen3VLConfig
    "wide": qwen_settings(512, 1536, 12, 8, 4, 64, SMALL),
    "2b": qwen_settings(2048, 6144, 28, 16, 8, 128, VISION),
    "4b": qwen_settings(2560, 9728, 36, 32, 8, 128, VISION),
    "8b": qwen_settings(4096, 12288, 36, 32, 8, 128, LARGE),
}


def qwen_config(size):
    """Return the Qwen3VLConfig of a `--size`, with the special tokens of the tiny tokenizer.

    Raise ValueError when `size` is neither in `SIZES` nor the config.json of a Qwen3-VL.
    """
    tied = True
    if size in SIZES:
        text, vision = SIZES[size]
    elif Path(size).is_file():
        settings = json.loads(Path(size).read_text())
        kind = settings.get("model_type")
        if kind != "qwen3_vl":
            raise ValueError(f"{size} is the config of a '{kind}', not of a Qwen3-VL (qwen3_vl)")
        text, vision = settings["text_config"], settings["vision_config"]
        tied = settings.get("tie_word_embeddings", False)
    else:
        raise ValueError(f"size is '{size}'; give {', '.join(SIZES)} or the path of a Qwen3-VL config.json")
    special = tiny.tiny_config(tiny.tiny_tokenizer())
    ids = {name: getattr(special, name) for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    return Qwen3VLConfig(text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=tied, **ids)


def random_vla(config, empty=False):
    """Return a seeded VLA of `config`'s size on its device, as train.py makes it for an 8-step chunk of 7 numbers.

    empty: do not even initialise the backbone's weights, so that they take no memory.
    """
    torch.manual_seed(0)
    tuning = "" if config.size in tiny.SIZES else config.tuning
    half = config.precision == "bf16" and tuning in ("lora", "frozen")  # what is trained stays f32
    dtype = torch.bfloat16 if half else torch.float32
    with torch.device("meta" if empty else config.device):  # a GPU draws random numbers faster
        qwen = Qwen3VLModel._from_config(qwen_config(config.size), dtype=dtype, attn_implementation="sdpa")
    qwen = qwen.to_empty(device="cpu") if empty else qwen.cpu()  # a VLA is put together on the CPU
    tokenizer = tiny.tiny_tokenizer()
    longest = max(len(prompt_ids(tokenizer, text, CHUNK)) for text in TEXTS)
    action_codes = VARIANTS[config.variant].target == "action"
    model_config = ModelConfig(
        variant=config.variant,
        backbone=config.size,
        cameras=config.images,
        image_size=config.image_size,
        text_length=(longest + 7) // 8 * 8,
        chunk=CHUNK,
        action_size=7,
        proprio_size=8,
        codes_per_step=1 if action_codes else 4,
        num_codes=256 if action_codes else 16,
        tuning=tuning,
    )
    return VLA(model_config, base=(qwen, tokenizer)).to(config.device)


def random_batch(vla, size, draws=True, seed=1):
    """Return a batch of `size` samples as `VLA.forward` takes it, on the model's device.

    draws: whether its images are augmented.
    """
    sizes = vla.config
    rng = torch.Generator().manual_seed(seed)
    frames = (size, sizes.image_size, sizes.image_size, 3)
    codes = (size, sizes.chunk, sizes.codes_per_step)
    batch = {
        "images": [torch.randint(0, 256, frames, generator=rng, dtype=torch.uint8) for _ in range(sizes.cameras)],
        "text": (TEXTS * size)[:size],
        "proprio": torch.rand(size, sizes.proprio_size, generator=rng) * 2 - 1,
        "actions": torch.rand(size, sizes.chunk, sizes.action_size, generator=rng) * 2 - 1,
        "valid": torch.ones(size, sizes.chunk, dtype=torch.bool),
        "action_weight": torch.ones(size, sizes.action_size),
        "codes": torch.randint(0, sizes.num_codes, codes, generator=rng),
        "vectors": torch.randn(*codes, sizes.code_dim, generator=rng),
    }
    if draws:
        batch["draws"] = torch.rand(size, sizes.cameras, 6, generator=rng)
    return to_device(batch, vla.queries.device)


def set_precision(config):
    """Compute in `config.precision` on a GPU too, where model.py would choose bf16 itself."""
    bf16 = config.precision == "bf16"

    def autocast(device, half=False):
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    model.autocast = autocast


# ----------------------------------------------------------------------------------------------------------------------
# The reference: transformers' own forward


class TransformersForward:
    """transformers' forward over the modules and weights of a VLA, with all hidden states and logits; then its head.

    The placeholders are the last entries of the vocabulary, whose embeddings are set to the trained queries. Patches
    are laid out by `inputs`, before a clock starts. Positions, masks and the insertion of image features are left to
    transformers, as is the loss on `labels`. transformers hooks its modules, so a VLA that is to be compiled must not
    share them.
    """

    def __init__(self, vla):
        """Undo the faster forwards of the VLA's LoRA layers and RMS norms, and put its queries into the vocabulary."""
        self.vla = vla
        qwen = vla.backbone.qwen
        with torch.device("meta"):
            self.whole = Qwen3VLForConditionalGeneration._from_config(qwen.config, attn_implementation="sdpa")
        self.whole.model = qwen
        embeddings = qwen.language_model.embed_tokens.weight
        if qwen.config.tie_word_embeddings:
            self.whole.lm_head.weight = embeddings
        else:
            self.whole.lm_head.weight = torch.nn.Parameter(0.02 * torch.randn_like(embeddings), requires_grad=False)
        for module in [layer for _, layer in lora_layers(qwen)] + rms_norms(qwen):
            vars(module).pop("forward", None)  # back to peft's own and transformers'
        with torch.no_grad():
            embeddings[-vla.backbone.num_placeholders :] = vla.queries

    def inputs(self, batch):
        """Return what a processor would make of `batch`, with labels at the placeholders."""
        bb = self.vla.backbone
        size = len(batch["text"])
        ids, counts = bb.tokenise(batch["text"])
        device = ids.device
        vocabulary = len(self.whole.lm_head.weight)
        placeholders = torch.arange(vocabulary - bb.num_placeholders, vocabulary, device=device).repeat(size, 1)
        sequence = torch.cat([bb.fixed_ids.repeat(size, 1), placeholders], 1)  # [B, L]
        sequence[:, bb.text_start : bb.header_start] = ids
        real = torch.ones_like(sequence)
        real[:, bb.text_start : bb.header_start] = torch.arange(bb.text_length, device=device) < counts[:, None]
        labels = torch.full_like(sequence, -100)
        labels[:, -bb.num_placeholders :] = placeholders
        config = self.vla.config
        pixels = prepare_images(batch["images"], config.image_size, batch.get("draws"), config.augmentation)
        return {
            "input_ids": sequence,
            "attention_mask": real,
            "mm_token_type_ids": (sequence == self.whole.config.image_token_id).int(),
            "pixel_values": repeat_in_time(bb.patches(pixels)).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, bb.grid, bb.grid]] * size * bb.cameras, device=device),
            "labels": labels,
        }

    def predict(self, inputs, proprio):
        """Return actions f32 [B, H, A] and transformers' loss, None without labels."""
        bb = self.vla.backbone
        head = self.vla.head
        with model.autocast(proprio.device):
            out = self.whole(**inputs, output_hidden_states=True, use_cache=False)
        states = out.hidden_states[-len(head.blocks) :]
        guesses = head([(bb.placeholder_states(x), bb.image_states(x)) for x in states], proprio)
        return guesses[..., 0], out.loss

    def losses(self, inputs, batch):
        """Return {"loss"} of a training step: L1 of the actions and lambda x cross-entropy over the vocabulary."""
        actions, loss = self.predict(inputs, batch["proprio"])
        return {"loss": (actions - batch["actions"]).abs().mean() + 0.1 * loss}


def repeat_in_time(patches):
    """Map patches [..., 3 p p] to [..., 3 x 2 x p p], the processor's layout: an image fills both temporal halves."""
    return patches.unflatten(-1, (3, 1, -1)).expand(*patches.shape[:-1], 3, 2, -1).flatten(-3)


@torch.no_grad()
def relative_difference(vla, reference, batch):
    """Return the largest difference between the actions of `vla` and of a `TransformersForward`, over the largest.

    More than rounding where the head reads layers that deepstack adds to, as in tiny: transformers records them before.
    """
    actions, _ = vla.predict(batch)
    expected, _ = reference.predict(reference.inputs(batch), batch["proprio"])
    return ((actions - expected).abs().max() / actions.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# FLOP of a training step

FLOP_FORMULA = """\
model FLOP: 2 x rows x in x out for each linear layer and the patch embedding; 4 x queries x keys x width
  for each attention (causal: half the pairs). Backward: as much for the gradient of each layer's input, if what comes
  before it is trained (attention: twice as much), and as much for the gradient of each weight, if it is trained. Not
  counted: norms, activations, pixels, embeddings, losses, optimizer, anything computed a second time."""
PARTS = {"lora_": "LoRA", "qwen.visual": "vision", "qwen.language_model": "language", "": "head"}  # by name of a module


class FlopCounter:
    """FLOP by part, each f64 [3] of (forward, gradient of the inputs, gradient of the weights), filled by hooks."""

    def __init__(self):
        self.flops = {}

    def add(self, part, forward, inputs, weights):
        """Add `forward` FLOP, and `inputs` and `weights` times as many in the backward pass."""
        counted = np.array([forward, inputs * forward, weights * forward], float)
        self.flops[part] = self.flops.get(part, 0) + counted

    def linear(self, part):
        """Return a hook for a linear layer."""

        def hook(module, inputs, output):
            x = inputs[0]
            self.add(part, 2 * x.numel() * module.out_features, x.requires_grad, module.weight.requires_grad)

        return hook

    def lora(self):
        """Return a hook for a linear layer with a low-rank update, whose second product is no module's."""

        def hook(module, inputs, output):
            self.add("LoRA", 2 * output.numel() * module.r["default"], 1, 1)

        return hook

    def attention(self, keys):
        """Return a hook for the projection behind an attention. keys: how many a query sees, on average."""

        def hook(module, inputs, output):
            x = inputs[0]
            self.add("attention", 4 * x.numel() * keys, 2 * x.requires_grad, 0)

        return hook


def count_flops(vla, size):
    """Return {part: f64 [3] FLOP of (forward, gradient of inputs, of weights)} of a training step of `size` samples.

    One sample runs with a hook on every linear layer, which sees how many rows pass and what needs a gradient: so it
    counts by `FLOP_FORMULA` what the model does, whatever is frozen, adapted or left out.
    """
    counter = FlopCounter()
    bb = vla.backbone
    handles = []
    for name, module in vla.named_modules():
        hooks = []
        if isinstance(module, torch.nn.Linear):
            hooks.append(counter.linear(next(part for key, part in PARTS.items() if key in name)))
        if hasattr(module, "lora_B"):
            hooks.append(counter.lora())
        if name.endswith("attn.proj"):
            hooks.append(counter.attention(bb.grid**2))
        if name.endswith("self_attn.o_proj"):
            hooks.append(counter.attention((bb.length + 1) / 2))
        handles += [module.register_forward_hook(hook) for hook in hooks]
    keys = vla.config.chunk + bb.num_placeholders + bool(vla.config.proprio_size) + bb.cameras * bb.tokens_per_image
    handles += [block.out.register_forward_hook(counter.attention(keys)) for block in vla.head.blocks]
    vla(random_batch(vla, 1))
    for handle in handles:
        handle.remove()
    embedding = bb.qwen.visual.patch_embed.proj.weight
    rows = bb.cameras * bb.grid**2
    pixels = 3 * bb.patch**2  # `Backbone.vision` adds the two temporal halves of the weight, as the image fills both
    counter.add("vision", 2 * rows * pixels * len(embedding), 0, embedding.requires_grad)
    return {part: size * flops for part, flops in counter.flops.items()}


def print_flops(flops, size):
    """Print the formula and its terms for one step of `size` samples; return the sum."""
    total = sum(counted.sum() for counted in flops.values())
    print(FLOP_FORMULA)
    print(f"  {'GFLOP of one step':20} {'forward':>10} {'inputs':>10} {'weights':>10}")
    for part, counted in flops.items():
        print(f"  {part:20} " + " ".join(f"{value / 1e9:10.2f}" for value in counted))
    print(f"  in all {total / 1e9:.2f} GFLOP, {total / size / 1e9:.3f} a sample")
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Clocks


def synchronise(device):
    """Wait for the GPU, so that a clock read now is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds by part of something repeated.

    On one CPU thread these are CPU time, which a busy machine does not change; else, and with `wall`, the clock's.
    """

    def __init__(self, device="cpu", wall=False):
        one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
        self.device = device
        self.clock = time.process_time if one_thread and not wall else time.perf_counter
        self.seconds = {}
        self.start()

    def start(self):
        """Begin a lap."""
        synchronise(self.device)
        self.started = self.clock()

    def lap(self, name):
        """Add the seconds since the last lap to `name`, and begin the next."""
        before = self.started
        self.start()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.started - before


def time_in_turns(functions, config, wall=False):
    """Return {name: [seconds of one call in each round]} of the functions {name: function ()}, after one call of each.

    In each of `config.rounds` rounds, each function is called `config.steps` times in a row. wall: as for `Stopwatch`.
    """
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(config.rounds):
        for name, function in functions.items():
            watch = Stopwatch(config.device, wall)
            for _ in range(config.steps):
                function()
            watch.lap("all")
            seconds[name].append(watch.seconds["all"] / config.steps)
    return seconds


def device_name(device):
    """Return the GPU's name, or how many CPU threads there are."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU thread(s)"
