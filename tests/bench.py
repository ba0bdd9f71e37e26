"""Speed, measured; not run by pytest. Every mode but ddp compares two ways with the same weights in the same run.

    python tests/bench.py eval runs/NAME          # eval.py against the field's loop: one simulator, drawing always
    python tests/bench.py label                   # latent.py label against one frame pair at a time
    python tests/bench.py label --full --steps 32 # the same at the paper's size, random weights
    python tests/bench.py data                    # the input pipeline against a Hugging Face processor for each sample
    python tests/bench.py train --size wide --steps 1           # a training step against transformers' forward; 10 min
    python tests/bench.py train --size 2b --batch 32            # the same at the real size on a GPU
    python tests/bench.py numerics --size 2b      # losses of training steps in bf16 and in fp32
    python tests/bench.py memory --size 2b        # what fits on a GPU, by a formula, on any machine
    python tests/bench.py infer --size 2b         # a chunk of actions against transformers' own forward
    python tests/bench.py ddp --size 2b           # train.py's step on 1 to n processes
    python tests/bench.py versions ../other       # the default training run of another checkout and of this one

Sizes need no download: weights are random, tokens are the tiny backbone's. The plain way of train and infer is `Plain`,
what their FLOP are is `FORMULA`. Prints a table and writes it as JSON (--out). Times on a shared machine mean little;
their ratios within one run do.
"""

import functools
import io
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils.data import default_collate
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import distribute, parameter_groups, start_ranks, stop_ranks, to_device
from data import Chunks, Index, action_chunk, prepare_images, statistics
from model import (
    PROMPT,
    TINY_TEXT,
    TINY_VISION,
    VARIANTS,
    VLA,
    Spec,
    lora_layers,
    merge_lora,
    norms,
    request_ids,
    tiny_config,
    tiny_tokenizer,
)

CHUNK = 8  # actions predicted at once
TEXTS = ["put the bowl on the stove", "put the bowl on top of the cabinet", "open the middle drawer of the cabinet"]


@dataclass
class Eval:
    """Episodes per hour of eval.py against the field's loop: one simulator that draws both cameras at every step and
    resets in full, batch 1, one episode after another."""

    run: tyro.conf.Positional[Path]
    """a trained run"""
    episodes: int = 20
    """trials of the first task of the run's data"""
    envs: int = 2
    """simulator processes of eval.py"""
    policy_batch: int = 8
    """padded batch of eval.py"""
    out: Path = Path("bench-eval.json")
    """where the table goes"""


class Timed:
    """A policy, and the seconds spent in it."""

    def __init__(self, policy):
        self.policy, self.seconds = policy, 0.0

    def __call__(self, *given):
        started = time.perf_counter()
        actions = self.policy(*given)
        self.seconds += time.perf_counter() - started
        return actions


def fields_loop(episodes, policy):
    """(outcomes, seconds by part) of one simulator in this process, as the field evaluates."""
    from data import to_robosuite
    from sim import Sim, play

    clock, policy = time.perf_counter(), Timed(policy)
    sim = Sim(episodes[0].suite, episodes[0].task)
    del sim.world._initialize_sim, sim.world._destroy_sim  # back to robosuite's own, which compile and upload each time
    spent = {"open": time.perf_counter() - clock}
    outcomes = {}
    for episode in episodes:
        ask = lambda views, proprio: to_robosuite(policy([v[None] for v in views], [episode.told], proprio[None])[0])  # noqa: E731, B023
        outcomes[episode.seed] = play(sim, episode, ask, every_step=True)[0]
    sim.close()
    return outcomes, time.perf_counter() - clock, spent | sim.spent | {"policy": policy.seconds}


def side_by_side(episodes, policy, config):
    """(outcomes, seconds by part) of eval.py's way; the parts are summed over its processes."""
    from eval import batched, play_all

    clock, policy, outcomes, spent = time.perf_counter(), Timed(policy), {}, {}

    def finish(episode, result):
        outcomes[episode.seed] = result["success"]
        for name, seconds in result["spent"].items():
            spent[name] = spent.get(name, 0.0) + seconds

    play_all(episodes, batched(policy, config.policy_batch), finish, config.envs, 300.0)
    return outcomes, time.perf_counter() - clock, spent | {"policy": policy.seconds}


def bench_eval(config):
    """Both ways on the same episodes, the field's first; prints episodes per hour and where the time went.

    "wait" is what simulators waited for the policy, its own time included.
    """
    from eval import Config, plan
    from model import Policy

    policy = Policy(config.run)
    task = policy.entry["tasks"][0]
    episodes = plan(Config(run=str(config.run), trials=config.episodes, task_ids=(task,)), policy)
    zeros = [np.zeros((1, c["size"], c["size"], 3), np.uint8) for c in policy.entry["cameras"].values()]
    policy(zeros, [episodes[0].told], np.zeros((1, 8), np.float32))  # warm
    rows = {}
    ways = {"field's loop": lambda: fields_loop(episodes, policy)}
    ways[f"eval.py, {config.envs} envs"] = lambda: side_by_side(episodes, policy, config)
    for name, way in ways.items():
        outcomes, seconds, spent = way()
        if None in outcomes.values():
            raise RuntimeError("a simulator failed three times; its messages are above")
        rows[name] = {"episodes": len(outcomes), "successes": sum(outcomes.values()), "seconds": round(seconds, 1)}
        rows[name] |= {"episodes_per_hour": round(3600 * len(outcomes) / seconds, 1)}
        rows[name] |= {"spent": {part: round(s, 1) for part, s in spent.items()}, "outcomes": outcomes}
    first, second = rows.values()
    same = sum(first["outcomes"][seed] == second["outcomes"][seed] for seed in first["outcomes"])
    parts = ("open", "reset", "physics", "render", "policy", "wait")
    print(f"{'':20} episodes/h  success  " + "  ".join(f"{part:>8}" for part in parts) + "  (s, summed over processes)")
    for name, row in rows.items():
        found = "  ".join(f"{row['spent'].get(part, 0.0):8.1f}" for part in parts)
        print(f"{name:20} {row['episodes_per_hour']:10.1f}  {row['successes']:3d}/{row['episodes']:<3d}  {found}")
    ratio = second["episodes_per_hour"] / first["episodes_per_hour"]
    print(f"ratio {ratio:.2f}; same outcome in {same} of {len(episodes)} trials")
    return {"rows": rows, "ratio": ratio, "same_outcomes": same}


@dataclass
class Label:
    """Labelled steps per second of latent.py label against one frame pair at a time, both frames read and encoded."""

    data: Path = Path("data/libero_tiny")
    """folder of an RLDS data set"""
    full: bool = False
    """the paper's size: DINOv2 ViT-B/14 at 224 px, 12 + 12 blocks of width 768; random weights either way"""
    steps: int = 512
    """labelled steps"""
    batch_size: int = 64
    """frames, and pairs, encoded at once by latent.py"""
    out: Path = Path("bench-label.json")
    """where the table goes"""


VIT_B = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518)
PAPER = dict(features="dinov2", image_size=224, width=768, num_blocks=12, heads=12, code_dim=128)


@torch.no_grad()
def one_pair_at_a_time(index, model, device):
    """codes [n, P] of every step of one episode, in the published way: each frame is read and encoded for each pair."""
    found = []
    for step in range(len(index)):
        places = step, min(step + model.sizes.delta, len(index) - 1)
        frames = [torch.from_numpy(model.features.read(index.image("image", place)).copy())[None] for place in places]
        codes, _ = model.encode(*(model.features(frame.to(device)) for frame in frames))
        found.append(codes.cpu())
    return torch.cat(found)


def bench_label(config, device):
    """Both ways on the same steps, as one long episode, after a warm-up; prints steps per second and equal codes."""
    from data import open_index
    from latent import LamSizes, LatentActionModel, label_episodes

    torch.manual_seed(0)
    whole = open_index(config.data)
    index, warm = (replace(whole, starts=np.array([0, min(n, len(whole))])) for n in (config.steps, 8))
    sizes, vit = (LamSizes(**PAPER), VIT_B) if config.full else (LamSizes(), None)
    model = LatentActionModel(sizes, features_config=vit).to(device).eval()
    model.codes.quantiser.start_at(0.1 * torch.randn(sizes.num_codes, sizes.code_dim))
    ways = {
        "one pair at a time": lambda index: one_pair_at_a_time(index, model, device),
        "latent.py label": lambda index: next(label_episodes(index, model, [0], config.batch_size))[0],
    }
    rows, codes = {}, []
    for name, way in ways.items():
        way(warm)
        clock = time.perf_counter()
        codes.append(way(index))
        rows[name] = {"steps_per_s": len(index) / (time.perf_counter() - clock)}
        print(f"{name:20} {rows[name]['steps_per_s']:10.2f} steps/s")
    first, second = (row["steps_per_s"] for row in rows.values())
    same = (codes[0] == codes[1]).float().mean().item()
    print(
        f"ratio {second / first:.2f}; {100 * same:.1f} % of the codes are the same; {torch.get_num_threads()} thread(s)"
    )
    return {"rows": rows, "ratio": second / first, "same_codes": same}


# ----------------------------------------------------------------------------------------------------------------------
# Models of any size on random weights


@dataclass
class Sized:
    """What the modes with a model share."""

    variant: Literal["baseline", "la_align", "la_direct", "la_cond", "la_tok"] = "la_direct"
    """which of the five models"""
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


def like_qwen(width, mlp, layers, heads, groups, head, vision):
    """(language model, vision) as in a config.json; groups: heads of keys and values, head: their width."""
    sections = [head // 2 - 2 * (head * 5 // 32), head * 5 // 32, head * 5 // 32]  # of the rotation: time, row, column
    text = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(num_key_value_heads=groups, head_dim=head, rope_parameters=ROPE | {"mrope_section": sections})
    return text | VOCABULARY, vision | PATCHES | dict(out_hidden_size=width)


SIZES = {
    "tiny": (TINY_TEXT, TINY_VISION),
    "wide": like_qwen(512, 1536, 12, 8, 4, 64, SMALL),
    "2b": like_qwen(2048, 6144, 28, 16, 8, 128, VISION),
    "4b": like_qwen(2560, 9728, 36, 32, 8, 128, VISION),
    "8b": like_qwen(4096, 12288, 36, 32, 8, 128, LARGE),
}


def qwen_config(size):
    """The Qwen3VLConfig of a `--size`, with the special tokens of the tiny tokenizer. Raises ValueError."""
    if size not in SIZES and not Path(size).is_file():
        raise ValueError(f"size is '{size}'; give {', '.join(SIZES)} or the path of a Qwen3-VL config.json")
    if size in SIZES:
        text, vision = SIZES[size]
    else:
        found = json.loads(Path(size).read_text())
        if found.get("model_type") != "qwen3_vl":
            raise ValueError(f"{size} is the config of a '{found.get('model_type')}', not of a Qwen3-VL (qwen3_vl)")
        text, vision = found["text_config"], found["vision_config"]
    special = tiny_config(tiny_tokenizer())
    ids = {name: getattr(special, name) for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    tied = size in SIZES or found.get("tie_word_embeddings", False)
    return Qwen3VLConfig(text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=tied, **ids)


def random_vla(config, empty=False):
    """A seeded VLA of `config`'s size on its device, as train.py would make it for an 8-step chunk of 7 numbers.

    empty: the base's weights are not even initialised, so that they take no memory: for counting.
    """
    torch.manual_seed(0)
    tuning = "" if config.size == "tiny" else config.tuning
    half = config.precision == "bf16" and tuning in ("lora", "frozen")  # what is trained stays f32
    tokenizer, dtype = tiny_tokenizer(), torch.bfloat16 if half else torch.float32
    with torch.device("meta" if empty else config.device):  # where random numbers are quick
        qwen = Qwen3VLModel._from_config(qwen_config(config.size), dtype=dtype, attn_implementation="sdpa")
    qwen = qwen.to_empty(device="cpu") if empty else qwen.cpu()  # a VLA is put together on the CPU
    longest = max(len(request_ids(tokenizer, text, CHUNK)) for text in TEXTS)
    action = VARIANTS[config.variant].target == "action"
    spec = Spec(
        variant=config.variant,
        backbone=config.size,
        cameras=config.images,
        image_size=config.image_size,
        text_length=(longest + 7) // 8 * 8,
        chunk=CHUNK,
        action_size=7,
        proprio_size=8,
        codes_per_step=1 if action else 4,
        num_codes=256 if action else 16,
        tuning=tuning,
    )
    return VLA(spec, base=(qwen, tokenizer)).to(config.device)


def random_batch(vla, size, draws=True, seed=1):
    """A batch as `VLA.forward` takes it, on the model's device; without `draws` there is no augmentation."""
    rng, s, camera = torch.Generator().manual_seed(seed), vla.spec, (size, vla.spec.image_size, vla.spec.image_size, 3)
    batch = {
        "images": [torch.randint(0, 256, camera, generator=rng, dtype=torch.uint8) for _ in range(s.cameras)],
        "text": (TEXTS * size)[:size],
        "proprio": torch.rand(size, s.proprio_size, generator=rng) * 2 - 1,
        "actions": torch.rand(size, s.chunk, s.action_size, generator=rng) * 2 - 1,
        "valid": torch.ones(size, s.chunk, dtype=torch.bool),
        "codes": torch.randint(0, s.num_codes, (size, s.chunk, s.codes_per_step), generator=rng),
        "vectors": torch.randn(size, s.chunk, s.codes_per_step, s.code_dim, generator=rng),
    }
    batch |= {"draws": torch.rand(size, s.cameras, 6, generator=rng)} if draws else {}
    return to_device(batch, vla.queries.device)


def compute_in(config):
    """Lets the project compute in `--precision` on a GPU too, where it would choose bf16 itself."""
    half = config.precision == "bf16"
    torch.set_float32_matmul_precision("high" if half else "highest")
    model.autocast = lambda device, _=False: torch.autocast(device.type, torch.bfloat16, enabled=half)


def synchronise(device):
    """Waits for the GPU, so that a clock read now is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class Laps:
    """Seconds by part of something repeated: `lap(name)` adds what has passed since the last one to `name`.

    On one CPU thread these are CPU time, which a busy machine does not change; else, and with `wall`, the clock's.
    """

    def __init__(self, device="cpu", wall=False):
        alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1 and not wall
        self.device, self.clock, self.seconds = device, time.process_time if alone else time.perf_counter, {}
        self.start()

    def start(self):
        synchronise(self.device)
        self.at = self.clock()

    def lap(self, name):
        before = self.at
        self.start()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.at - before


class Plain:
    """The field's way over the same modules and weights: transformers' own Qwen3VLForConditionalGeneration.forward with
    every layer's hidden states and the logits of every token, then our action head.

    The placeholders are the last words of the vocabulary, whose embeddings are set to the trained queries. Patches are
    laid out before the clock starts (the field does it on the CPU, ours is inside its time). Positions, masks and the
    placing of image features are left to transformers, as is the loss on `labels`. transformers hooks its modules, so
    a VLA that is to be compiled must be another one.
    """

    def __init__(self, vla):
        self.vla, qwen = vla, vla.backbone.qwen
        with torch.device("meta"):
            self.whole = Qwen3VLForConditionalGeneration._from_config(qwen.config, attn_implementation="sdpa")
        words = qwen.language_model.embed_tokens.weight
        self.whole.model = qwen
        if qwen.config.tie_word_embeddings:
            self.whole.lm_head.weight = words
        else:
            self.whole.lm_head.weight = torch.nn.Parameter(0.02 * torch.randn_like(words), requires_grad=False)
        for module in [layer for _, layer in lora_layers(qwen)] + norms(qwen):
            vars(module).pop("forward", None)  # back to peft's own and transformers'
        with torch.no_grad():
            words[-vla.backbone.queries_count :] = vla.queries

    def inputs(self, batch):
        """What a processor would hand over for `batch`, and labels at the placeholders."""
        bb, size = self.vla.backbone, len(batch["text"])
        ids, counts = bb.tokenise(batch["text"])
        vocabulary, device = len(self.whole.lm_head.weight), ids.device
        codes = torch.arange(vocabulary - bb.queries_count, vocabulary, device=device).repeat(size, 1)
        sequence = torch.cat([bb.fixed_ids.repeat(size, 1), codes], 1)  # [B, L]
        sequence[:, bb.text_start : bb.header_start] = ids
        real, labels = torch.ones_like(sequence), torch.full_like(sequence, -100)
        real[:, bb.text_start : bb.header_start] = torch.arange(bb.text_length, device=device) < counts[:, None]
        labels[:, -bb.queries_count :] = codes
        pixels = prepare_images(batch["images"], self.vla.spec.image_size, batch.get("draws"))
        return {
            "input_ids": sequence,
            "attention_mask": real,
            "mm_token_type_ids": (sequence == self.whole.config.image_token_id).int(),
            "pixel_values": twice(bb.patches(pixels)).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, bb.grid, bb.grid]] * size * bb.cameras, device=device),
            "labels": labels,
        }

    def run(self, inputs, proprio):
        """(actions f32 [B, H, A], transformers' loss, None without labels)"""
        bb, vla = self.vla.backbone, self.vla
        with model.autocast(proprio.device):
            out = self.whole(**inputs, output_hidden_states=True, use_cache=False)
        states = out.hidden_states[-len(vla.head.blocks) :]
        return vla.head([(bb.placeholder_states(x), bb.image_states(x)) for x in states], proprio), out.loss

    def losses(self, inputs, batch):
        """The loss of a training step: L1 of the actions and lambda x cross-entropy over the vocabulary."""
        actions, loss = self.run(inputs, batch["proprio"])
        return {"loss": (actions - batch["actions"]).abs().mean() + 0.1 * loss}


def twice(patches):
    """[..., 3 p p] -> [..., 3 x 2 x p p]: a still image fills both temporal halves, as in the processor's layout."""
    return patches.unflatten(-1, (3, 1, -1)).expand(*patches.shape[:-1], 3, 2, -1).flatten(-3)


@torch.no_grad()
def disagreement(vla, plain, batch):
    """Largest difference of the two ways' actions, relative to the largest action.

    More than rounding where the head reads layers that deepstack adds to, as in tiny: transformers records them before.
    """
    ours, theirs = vla.run(batch)[0], plain.run(plain.inputs(batch), batch["proprio"])[0]
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# FLOP of a training step

FORMULA = """model FLOP: 2 x rows x in x out for each linear layer and the patch embedding; 4 x queries x keys x width
  for each attention (causal: half the pairs). Backward: as much for the gradient of each layer's input, if what comes
  before it is trained (attention: twice as much), and as much for the gradient of each weight, if it is trained. Not
  counted: norms, activations, pixels, embeddings, losses, optimizer, anything computed a second time."""


def count_flops(vla, size):
    """{part: f64 [3] FLOP of (forward, gradient of inputs, of weights)} of a training step of `size` samples.

    One sample runs with a hook on every linear layer, which sees how many rows pass and what needs a gradient: so it
    counts by `FORMULA` what the model does, whatever is frozen, adapted or left out.
    """
    flops, bb, handles = {}, vla.backbone, []

    def count(part, forward, inputs, weights):
        flops[part] = flops.get(part, 0) + np.array([forward, inputs * forward, weights * forward], float)

    def linear(part):
        return lambda module, given, _: count(
            part, 2 * given[0].numel() * module.out_features, given[0].requires_grad, module.weight.requires_grad
        )

    def attention(part, pairs):
        """Hooks the projection behind an attention; pairs: how many (query, key) pairs a query token has."""
        return lambda module, given, _: count(part, 4 * given[0].numel() * pairs, 2 * given[0].requires_grad, 0)

    for name, module in vla.named_modules():
        part = next(p for key, p in PARTS.items() if key in name or not key)
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_hook(linear(part)))
        if hasattr(module, "lora_B"):  # the second product of an update is no module's
            product = lambda module, _, out: count("LoRA", 2 * out.numel() * module.r["default"], 1, 1)  # noqa: E731
            handles.append(module.register_forward_hook(product))
        if name.endswith("attn.proj"):
            handles.append(module.register_forward_hook(attention("attention", bb.grid**2)))
        if name.endswith("self_attn.o_proj"):
            handles.append(module.register_forward_hook(attention("attention", (bb.length + 1) / 2)))
    for block in vla.head.blocks:
        keys = vla.spec.chunk + bb.queries_count + bool(vla.spec.proprio_size) + bb.cameras * bb.slots
        handles.append(block.out.register_forward_hook(attention("attention", keys)))
    vla(random_batch(vla, 1))
    for handle in handles:
        handle.remove()
    embedding = bb.qwen.visual.patch_embed.proj.weight
    rows, pixels = bb.cameras * bb.grid**2, 3 * bb.patch**2  # a still image fills both temporal halves: add them
    count("vision", 2 * rows * pixels * len(embedding), 0, embedding.requires_grad)
    return {part: size * found for part, found in flops.items()}


PARTS = {"lora_": "LoRA", "qwen.visual": "vision", "qwen.language_model": "language", "": "head"}


def print_flops(flops, size):
    """The formula and its terms for one step of `size` samples; returns the sum."""
    total = sum(found.sum() for found in flops.values())
    print(FORMULA)
    print(f"  {'GFLOP of one step':20} {'forward':>10} {'inputs':>10} {'weights':>10}")
    for part, found in flops.items():
        print(f"  {part:20} " + " ".join(f"{value / 1e9:10.2f}" for value in found))
    print(f"  in all {total / 1e9:.2f} GFLOP, {total / size / 1e9:.3f} a sample")
    return total


# ----------------------------------------------------------------------------------------------------------------------
# A training step


@dataclass
class Train(Sized):
    """A training step against the plain way with the same weights: time by part, samples/s, model FLOP/s, memory."""

    batch: int = 8
    """samples of a step"""
    steps: int = 5
    """steps timed in a row"""
    rounds: int = 3
    """how often both ways take turns; the median counts"""
    checkpointing: bool = False
    """ours with gradient checkpointing, as train.py --gradient-checkpointing"""
    compile: bool = False
    """ours compiled, as train.py --compile"""
    peak_flops: float = 0.0
    """FLOP/s that MFU relates to (default: 989e12 for bf16 on an H100; elsewhere no MFU unless given)"""
    profile: bool = False
    """print what one of our steps spends its time on"""
    out: Path = Path("bench-train.json")
    """where the table goes"""


PARTS_OF_STEP = ("forward", "backward", "optimizer")


def train_step(losses, vla, optimizer, lap=lambda name: None):
    """train.py's step on one micro-batch; losses: function () -> what VLA.forward returns."""
    loss = losses()["loss"]
    lap("forward")
    (loss * (1 + 0 * loss.detach())).backward()
    lap("backward")
    optimizer.found_inf = (~torch.nn.utils.clip_grad_norm_(vla.parameters(), 1.0).isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lap("optimizer")


def make_optimizer(vla):
    """train.py's, at the paper's setting."""
    return torch.optim.AdamW(parameter_groups(vla, 0.01), lr=1e-4, fused=True)


def make_way(config, name):
    """(VLA, function () -> what VLA.forward returns, on one batch) of the "plain" way or of "ours", weights alike."""
    vla = random_vla(config)
    batch = random_batch(vla, config.batch)
    if name == "ours":
        return vla, lambda: vla(batch)
    plain = Plain(vla)
    inputs = plain.inputs(batch)
    return vla, lambda: plain.losses(inputs, batch)


def hasten(vla, config):
    """What train.py does to the model for --gradient-checkpointing and --compile."""
    vla.backbone.checkpointing = config.checkpointing
    if config.compile:
        vla.act = torch.compile(vla.act, fullgraph=True, dynamic=False)


def peak_memory_of(config, way):
    """Peak memory in bytes of two steps of one way: what CUDA allocated, on a CPU by how much this process grew."""
    before, _ = resident()
    compute_in(config)
    vla, losses = make_way(config, way)
    hasten(vla, config)
    optimizer, cuda = make_optimizer(vla), config.device.startswith("cuda")
    for _ in range(2):
        train_step(losses, vla, optimizer)
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resident()[1] - before


def resident():
    """(bytes of memory that this process has, the most it ever had), as Linux counts them."""
    found = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(found[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def peak_memory(config, way):
    """`peak_memory_of` in a fresh process with as many threads as this one.

    There glibc gives freed memory back at once, or the holes in its heap would count, which differ from run to run.
    """
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, start, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(peak_memory_of, config, way).result()


def taking_turns(ways, config, wall=False):
    """{name: [seconds of one call in each round]}: `steps` calls of one way, then of the other, `rounds` times.

    Each is called once before, to warm up. wall: as for `Laps`.
    """
    seconds = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(config.rounds):
        for name, way in ways.items():
            laps = Laps(config.device, wall)
            for _ in range(config.steps):
                way()
            laps.lap("all")
            seconds[name].append(laps.seconds["all"] / config.steps)
    return seconds


def peak_flops(config):
    """FLOP/s of the device, 0 when nobody said: dense bf16 of an H100 or H200 by its data sheet."""
    hopper = config.device.startswith("cuda") and any(n in torch.cuda.get_device_name() for n in ("H100", "H200"))
    return config.peak_flops or (989e12 if hopper and config.precision == "bf16" else 0.0)


def bench_train(config):
    """Prints the FLOP count and one row per way. The model FLOP are those of our step in both rows: what the plain way
    computes beyond them is no use to the model. Memory is taken in a process of its own for each way."""
    memory = {name: peak_memory(config, name) for name in ("plain", "ours")}
    compute_in(config)
    ways = {name: make_way(config, name) for name in ("plain", "ours")}
    vla, steps = ways["ours"][0], {}
    flops = print_flops(count_flops(vla, config.batch), config.batch)
    apart = disagreement(vla, Plain(ways["plain"][0]), random_batch(vla, 1, draws=False))
    hasten(vla, config)
    for name, (trained, losses) in ways.items():
        steps[name] = functools.partial(train_step, losses, trained, make_optimizer(trained))
    seconds = taking_turns(steps, config)
    rows, peak = {}, peak_flops(config)
    print(f"{config.variant} {config.size}: batch {config.batch}, {config.images} images of {config.image_size} px, "
          f"{vla.backbone.length} tokens, {config.precision}, {device_name(config.device)}")  # fmt: skip
    print(f"{'':8} {'samples/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'peak GB':>8}   ms: " + "  ".join(PARTS_OF_STEP))
    for name in ways:
        laps = Laps(config.device)
        steps[name](laps.lap)
        took = float(np.median(seconds[name]))
        rows[name] = {"samples_per_s": config.batch / took, "flop_per_s": flops / took, "peak_bytes": memory[name]}
        rows[name] |= {"mfu": flops / took / peak if peak else None, "ms": milliseconds(laps.seconds)}
        rows[name] |= {"step_seconds": seconds[name]}
        mfu = f"{100 * rows[name]['mfu']:5.1f}%" if peak else "     -"
        print(f"{name:8} {rows[name]['samples_per_s']:10.3f} {flops / took / 1e12:8.3f} {mfu} {memory[name] / 1e9:8.2f}"
              "       " + "  ".join(f"{rows[name]['ms'][part]:{len(part)}.0f}" for part in PARTS_OF_STEP))  # fmt: skip
    ratio = rows["ours"]["samples_per_s"] / rows["plain"]["samples_per_s"]
    share = memory["ours"] / memory["plain"]
    print(f"samples/s x {ratio:.2f}, memory x {share:.2f}; the actions of the two ways differ by {apart:.1e}")
    if config.profile:
        print_profile(steps["ours"], config.device)
    return {"rows": rows, "ratio": ratio, "memory_ratio": share, "flop": flops, "disagreement": apart}


def milliseconds(seconds):
    return {name: 1000 * value for name, value in seconds.items()}


def device_name(device):
    """The GPU's name, or how many CPU threads there are."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU thread(s)"


def print_profile(step, device):
    """The operations that one step spends most time in and, on a GPU, how often it makes the host wait."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        step()
        synchronise(device)
    found = trace.key_averages()
    print(found.table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=15))
    if cuda:
        waits = {e.key: e.count for e in found if e.key.startswith("cuda") and e.key.endswith("Synchronize")}
        print(f"host waits in one step: {waits or 'none'} (one cudaDeviceSynchronize is the profile's own)")


@dataclass
class Numerics(Sized):
    """Losses of the same training steps in bf16 and in fp32."""

    batch: int = 8
    """samples of a step"""
    steps: int = 20
    """steps"""
    out: Path = Path("bench-numerics.json")
    """where the table goes"""


def losses_of(config):
    """The loss of each of `steps` training steps, each on a batch of its own, in the precision that `config` says."""
    compute_in(config)
    vla, found = random_vla(config), []
    optimizer = make_optimizer(vla)
    for step in range(config.steps):
        losses = vla(random_batch(vla, config.batch, seed=step))
        found.append(losses["loss"].item())
        train_step(lambda: losses, vla, optimizer)  # noqa: B023
    return found


def bench_numerics(config):
    """Prints the losses of both precisions, from the same weights on the same batches, and by how much they differ."""
    rows = {precision: losses_of(replace(config, precision=precision)) for precision in ("fp32", "bf16")}
    apart = [abs(half / full - 1) for full, half in zip(rows["fp32"], rows["bf16"])]
    print(f"{'step':>4} {'fp32':>10} {'bf16':>10} {'apart':>8}")
    for step, (full, half) in enumerate(zip(rows["fp32"], rows["bf16"])):
        print(f"{step:4} {full:10.5f} {half:10.5f} {100 * apart[step]:7.3f}%")
    print(f"at most {100 * max(apart):.3f} % apart in {config.steps} steps, on average {100 * np.mean(apart):.3f} %")
    return {"rows": rows, "largest": max(apart)}


# ----------------------------------------------------------------------------------------------------------------------
# Memory


MEMORY = """bytes of a step: 2 a frozen weight (4 in fp32); 16 a trained one (value, gradient, AdamW's two moments),
  18 with its bf16 copy; a sample: what its backward pass keeps. With gradient checkpointing a sample keeps what enters
  each layer, what is kept outside the layers, and one layer's. 10 % of the GPU stay free for kernels and fragments."""


@dataclass
class Memory(Sized):
    """Samples of a step that fit a GPU, by a formula: counted on tensors without contents, any size on any machine."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """of the frozen weights, and of what is computed with them; trained weights are fp32"""
    gigabytes: tuple[int, ...] = (24, 48, 80)
    """sizes of GPUs"""
    out: Path = Path("bench-memory.json")
    """where the table goes"""


def kept_bytes(backbone, run):
    """Bytes kept for the backward pass of `run`, which goes through `backbone`: (plain, with checkpointing); nothing is
    computed."""
    seen, kept, entered, place = {}, [0], [], 0

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that no other one gets its address
            kept[place] += storage.nbytes()
        return tensor

    def through(function, *inputs, **named):
        nonlocal place
        kept.append(0)
        entered.append(inputs[-1].nbytes)
        place = len(kept) - 1
        out = function(*inputs, **named)
        place = 0
        return out

    backbone._through = through
    noting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), noting:
        run()
    return np.array([sum(kept), kept[0] + sum(entered) + max(kept[1:])])


def bench_memory(config):
    """Prints the formula, its terms and the samples that fit."""
    compute_in(config)
    vla = random_vla(replace(config, device="cpu"), empty=True)
    sizes = {True: 0, False: 0}
    for parameter in vla.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    half = config.precision == "bf16"
    fixed = sizes[False] * (2 if half else 4) + sizes[True] * (18 if half else 16)
    three, two = (kept_bytes(vla.backbone, lambda: vla(random_batch(vla, size))) for size in (3, 2))  # noqa: B023
    sample = three - two  # what does not grow with the batch cancels
    print(f"{MEMORY}\n{config.variant} {config.size}: {sizes[False] / 1e6:.0f} M frozen and {sizes[True] / 1e6:.0f} M "
          f"trained weights, {fixed / 1e9:.1f} GB; {config.images} images of {config.image_size} px, "
          f"{vla.backbone.length} tokens, {config.precision}")  # fmt: skip
    print(f"{'':24} {'GB a sample':>12}" + "".join(f"{f'{size} GB':>8}" for size in config.gigabytes) + "  (samples)")
    rows = {}
    for name, each in zip(("plain steps", "gradient checkpointing"), sample):
        fit = {size: max(0, int((0.9 * size * 1e9 - fixed) / each)) for size in config.gigabytes}
        rows[name] = {"bytes_a_sample": int(each), "samples": fit}
        print(f"{name:24} {each / 1e9:12.3f}" + "".join(f"{found:8}" for found in fit.values()))
    return {"rows": rows, "fixed_bytes": fixed, "frozen": sizes[False], "trained": sizes[True]}


# ----------------------------------------------------------------------------------------------------------------------
# Inference


@dataclass
class Infer(Sized):
    """One chunk of actions: latency at batch 1, throughput at larger ones, against the plain forward."""

    batches: tuple[int, ...] = (1, 16)
    """observations predicted at once"""
    steps: int = 10
    """calls timed in a row"""
    rounds: int = 3
    """how often both ways take turns; the median counts"""
    out: Path = Path("bench-infer.json")
    """where the table goes"""


@torch.inference_mode()
def bench_infer(config):
    """What `Policy` runs, from images on the device to actions on the host (on a GPU as CUDA graphs), against the plain
    forward without labels on patches that were laid out before; LoRA is merged in both. Prints ms a call, chunks/s."""
    compute_in(config)
    (vla, other), rows = (random_vla(config).eval() for _ in range(2)), {}
    merge_lora(vla)
    merge_lora(other)
    plain = Plain(other)
    apart = disagreement(vla, plain, random_batch(vla, 1, draws=False))
    if config.device.startswith("cuda"):
        vla.act = torch.compile(vla.act, fullgraph=True, dynamic=False, mode="reduce-overhead")
    print(f"{config.variant} {config.size}: {config.images} images of {config.image_size} px, "
          f"{vla.backbone.length} tokens, {config.precision}, {device_name(config.device)}")  # fmt: skip
    print(f"{'':8} {'batch':>6} {'ms a call':>10} {'chunks/s':>10}")
    for size in config.batches:
        batch = random_batch(vla, size, draws=False)
        inputs = {name: value for name, value in plain.inputs(batch).items() if name != "labels"}
        ways = {
            "plain": lambda: plain.run(inputs, batch["proprio"])[0].cpu(),  # noqa: B023
            "ours": lambda: vla.run(batch)[0].cpu(),  # noqa: B023
        }
        for name, seconds in taking_turns(ways, config).items():
            took = float(np.median(seconds))
            rows[f"{name} {size}"] = {"ms": 1000 * took, "chunks_per_s": size / took, "call_seconds": seconds}
            print(f"{name:8} {size:6} {1000 * took:10.2f} {size / took:10.2f}")
        ratio = rows[f"ours {size}"]["chunks_per_s"] / rows[f"plain {size}"]["chunks_per_s"]
        print(f"x {ratio:.2f} at batch {size}")
    print(f"the actions of the two ways differ by {apart:.1e}")
    return {"rows": rows, "disagreement": apart}


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@dataclass
class Ddp(Sized):
    """Samples/s of train.py's step on 1 to n processes of this machine, each with a batch of its own."""

    processes: tuple[int, ...] = ()
    """how many processes (default: 1, 2, 4, ... up to the GPUs; on a CPU 1 and 2)"""
    batch: int = 8
    """samples of a step in each process"""
    steps: int = 5
    """steps timed in a row"""
    rounds: int = 3
    """how often; the median counts"""
    out: Path = Path("bench-ddp.json")
    """where the table goes"""


def ddp_rank(rank, world, port, config, results):
    """One process of `world`; the first puts the seconds of a step in each round into `results`."""
    places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in places.items()})
    ranks = start_ranks()
    config = replace(config, device=str(ranks.device))
    compute_in(config)
    vla = random_vla(config)
    optimizer, batch = make_optimizer(vla), random_batch(vla, config.batch)
    wrapped = distribute(vla, ranks)
    seconds = taking_turns({"ours": lambda: train_step(lambda: wrapped(batch), vla, optimizer)}, config, True)["ours"]
    if ranks.main:
        results.put(seconds)
    stop_ranks()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def bench_ddp(config):
    """The same step in 1 to n processes; prints samples/s and what share of n times one process's that is."""
    gpus = torch.cuda.device_count() if config.device.startswith("cuda") else 0
    counts = config.processes or tuple(2**k for k in range(max(gpus, 2).bit_length()) if 2**k <= max(gpus, 2))
    if gpus and max(counts) > gpus:
        raise ValueError(f"processes is {counts}, but there are {gpus} GPUs: one for each process")
    rows, results = {}, multiprocessing.get_context("spawn").SimpleQueue()
    print(f"{config.variant} {config.size}: batch {config.batch} in each process, {config.precision}")
    print(f"{'processes':>9} {'samples/s':>10} {'of linear':>10}")
    for count in counts:
        torch.multiprocessing.spawn(ddp_rank, (count, free_port(), config, results), nprocs=count)
        seconds = results.get()
        rows[count] = {"samples_per_s": count * config.batch / float(np.median(seconds)), "step_seconds": seconds}
        each = rows[counts[0]]["samples_per_s"] / counts[0]
        rows[count] |= {"of_linear": rows[count]["samples_per_s"] / count / each}
        print(f"{count:9} {rows[count]['samples_per_s']:10.2f} {100 * rows[count]['of_linear']:9.1f}%")
    return {"rows": rows}


# ----------------------------------------------------------------------------------------------------------------------
# The input pipeline


@dataclass
class Data:
    """Samples/s of one core and its ms by stage in the input pipeline, against a processor call for each sample."""

    samples: int = 128
    """of two 256 px images each, in batches of 16"""
    rounds: int = 3
    """how often the ways take turns; the median counts"""
    out: Path = Path("bench-data.json")
    """where the table goes"""


BATCH = 16  # samples that are cropped, jittered and laid out at once


def picture(rng):
    """JPEG bytes of 256 px that look like a simulator's to the decoder: smooth areas with some grain, about 20 KB."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((256, 256), Image.BICUBIC)
    grain = np.asarray(coarse, np.float32) + rng.normal(0, 3, (256, 256, 3))
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def made_index(folder, steps):
    """An `Index` of random episodes with two cameras of 256 px, its one shard in `folder`."""
    rng, shard, at, images = np.random.default_rng(0), folder / "images", 0, {"image": [], "wrist_image": []}
    with open(shard, "wb") as file:
        for camera in list(images) * steps:
            jpeg = picture(rng)
            images[camera].append((0, at, len(jpeg)))
            at += file.write(jpeg)
    starts = np.append(np.arange(0, steps, 32), steps)
    columns = {"action": rng.uniform(-1, 1, (steps, 7)).astype(np.float32)}
    columns["state"] = rng.uniform(-1, 1, (steps, 8)).astype(np.float32)
    texts = [TEXTS[episode % len(TEXTS)] for episode in range(len(starts) - 1)]
    return Index("made", folder, folder, "made", [shard], starts, {k: np.array(v) for k, v in images.items()},
                 columns, texts, {})  # fmt: skip


class TimedIndex(Index):
    """An index whose images are a lap of their own."""

    laps = None

    def image(self, camera, step):
        self.laps.lap("assemble")
        found = super().image(camera, step)
        self.laps.lap("read and decode")
        return found


def our_pipeline(dataset, backbone, laps, augment=True, crop=True):
    """Every sample once, in batches: what train.py's workers, `VLA.run` and `Backbone` do before the first layer.

    Without `crop` the pixels are normalised alone, as the processor does.
    """
    size = backbone.grid * backbone.patch
    for at in range(0, len(dataset.indices[0]), BATCH):
        batch = default_collate([dataset[at + n] for n in range(BATCH)])
        laps.lap("assemble")
        if crop:
            pixels = prepare_images(batch["images"], size, batch["draws"] if augment else None)
            laps.lap("augment" if augment else "crop")
        else:
            pixels = torch.stack(batch["images"], 1).permute(0, 1, 4, 2, 3).float().div_(127.5).sub_(1)
            laps.lap("normalise")
        backbone.patches(pixels)
        laps.lap("patches")
        backbone.tokenise(batch["text"])
        laps.lap("tokenise")


def processor_pipeline(dataset, backbone, processor, laps):
    """Every sample once, each by itself: Pillow, Hugging Face's image processor, chat template, tokens; batches."""
    tokenizer, index = backbone.tokenizer, dataset.indices[0]
    pad = tokenizer.convert_ids_to_tokens(backbone.qwen.config.image_token_id)
    for at in range(0, len(index), BATCH):
        rows = []
        for step in range(at, at + BATCH):
            views = [Image.open(io.BytesIO(index.jpeg(camera, step))).convert("RGB") for camera in dataset.cameras]
            laps.lap("read and decode")
            found = processor(images=views, return_tensors="pt")
            laps.lap("image processor")
            instruction = index.instructions[int(np.searchsorted(index.starts, step, "right")) - 1]
            text = {"type": "text", "text": PROMPT.format(instruction=instruction, chunk=CHUNK)}
            message = {"role": "user", "content": [{"type": "image"}] * len(views) + [text]}
            chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(chat.replace(pad, pad * backbone.slots), return_tensors="pt")["input_ids"][0]
            laps.lap("tokenise")
            actions, valid, _ = action_chunk(dataset.actions[0], index.starts, step, CHUNK)
            rows.append((found["pixel_values"], ids, actions, valid, dataset.proprio[0][step]))
        torch.cat([row[0] for row in rows])
        torch.nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True)
        default_collate([row[2:] for row in rows])
        laps.lap("assemble")


def bench_data(config):
    """Ways in turns over the same samples in this one process; prints ms of CPU time by stage, samples/s and ratios.

    "processor" neither crops nor augments. "same pixels" is our pipeline when it makes exactly what the processor does;
    "host" is what a core is left with when pixels are a GPU's task, as in training on one; "evaluation" also crops the
    centre on this core, "augmented" makes all of a training batch on it.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    samples = config.samples // BATCH * BATCH
    with tempfile.TemporaryDirectory() as folder:
        laps = Laps()
        index = TimedIndex(**vars(made_index(Path(folder), samples)))
        index.laps = laps
        dataset = Chunks([index], [statistics(index)], list(index.images), CHUNK)
        backbone = random_vla(Sized(device="cpu", precision="fp32")).backbone
        processor = Qwen2VLImageProcessorPil(patch_size=backbone.patch, merge_size=backbone.merge,
                                             image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                             size={"shortest_edge": 2**16, "longest_edge": 2**24})  # fmt: skip
        check_same_pixels(index, backbone, processor)
        ways = {
            "processor": lambda: processor_pipeline(dataset, backbone, processor, laps),
            "same pixels": lambda: our_pipeline(dataset, backbone, laps, crop=False),
            "evaluation": lambda: our_pipeline(dataset, backbone, laps, augment=False),
            "augmented": lambda: our_pipeline(dataset, backbone, laps),
        }
        found = {name: [] for name in ways}
        for _ in range(config.rounds):
            for name, way in ways.items():
                index.laps = laps = Laps()
                way()
                found[name].append({stage: 1000 * s / samples for stage, s in laps.seconds.items()})
    rows = {name: {s: float(np.median([one[s] for one in each])) for s in each[0]} for name, each in found.items()}
    rows["host"] = {stage: rows["augmented"][stage] for stage in ("read and decode", "assemble", "tokenise")}
    size = index.images["image"][:, 2].mean() / 1024
    print(f"{samples} samples of 2 images of 256 px ({size:.0f} KiB), one process, {torch.get_num_threads()} thread(s)")
    return print_stages(rows, ["processor", "same pixels", "host", "evaluation", "augmented"])


def check_same_pixels(index, backbone, processor):
    """Raises RuntimeError unless our patches of an image are the processor's to rounding: both do the same work."""
    frame = np.array(index.image("image", 0))
    theirs = processor(images=[Image.fromarray(frame)], return_tensors="pt")["pixel_values"]
    pixels = torch.tensor(frame).permute(2, 0, 1)[None, None].float() / 127.5 - 1
    ours = twice(backbone.patches(pixels))[0]
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 1e-6:
        raise RuntimeError(f"patches {tuple(ours.shape)} differ from the processor's {tuple(theirs.shape)}")


STAGES = ("read and decode", "assemble", "normalise", "crop", "augment", "patches", "image processor", "tokenise")


def print_stages(rows, names):
    """One column per way of {stage: ms a sample}; returns {"rows", "ratios"} with samples/s."""
    print(f"{'CPU ms a sample':20}" + "".join(f"{name:>13}" for name in names))
    for stage in STAGES:
        print(f"{stage:20}" + "".join(f"{rows[n][stage]:13.2f}" if stage in rows[n] else " " * 13 for n in names))
    rate = {name: 1000 / sum(rows[name].values()) for name in names}
    ratios = {name: rate[name] / rate["processor"] for name in names}
    print(f"{'samples/s per core':20}" + "".join(f"{rate[name]:13.1f}" for name in names))
    print(f"{'x processor':20}" + "".join(f"{ratios[name]:13.2f}" for name in names))
    return {"rows": {name: {"ms": rows[name], "samples_per_s": rate[name]} for name in names}, "ratios": ratios}


# ----------------------------------------------------------------------------------------------------------------------
# Two versions of the code


@dataclass
class Versions:
    """CPU time of the same training run by another checkout and by this one, in turns."""

    before: tyro.conf.Positional[Path]
    """folder of the other checkout"""
    pairs: int = 20
    """runs of each"""
    steps: int = 100
    """training steps of a run"""
    out: Path = Path("bench-versions.json")
    """where the table goes"""


def cpu_seconds(checkout, steps):
    """User and system time of train.py in `checkout`, from the command to its end, data workers and all."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "train.py", "--max-steps", str(steps), "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_versions(config):
    """Prints each pair, and the geometric mean of the ratios with its 95 % interval (bootstrap over pairs)."""
    here, rows = Path(__file__).resolve().parents[1], []
    for number in range(config.pairs):
        order = (config.before, here) if number % 2 else (here, config.before)
        found = {checkout: cpu_seconds(checkout, config.steps) for checkout in order}
        rows.append((found[config.before], found[here]))
        print(f"{number + 1:3} {found[config.before]:8.2f} s before, {found[here]:8.2f} s here", flush=True)
    logs = np.log([after / before for before, after in rows])
    means = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, ratio, high = (float(np.exp(x)) for x in (np.quantile(means, 0.025), logs.mean(), np.quantile(means, 0.975)))
    print(f"CPU time x {ratio:.3f} ({low:.3f} to {high:.3f}) in {config.pairs} pairs")
    return {"rows": rows, "ratio": ratio, "interval": [low, high]}


MODES = {
    "eval": (Eval, bench_eval),
    "label": (Label, bench_label),
    "data": (Data, bench_data),
    "train": (Train, bench_train),
    "numerics": (Numerics, bench_numerics),
    "memory": (Memory, bench_memory),
    "infer": (Infer, bench_infer),
    "ddp": (Ddp, bench_ddp),
    "versions": (Versions, bench_versions),
}


def main():
    configs = {name: config for name, (config, _) in MODES.items()}
    config = tyro.extras.subcommand_cli_from_dict(configs, description=__doc__)
    device = start_ranks().device
    bench = next(run for kind, run in MODES.values() if type(config) is kind)
    result = bench(config, device) if isinstance(config, Label) else bench(config)
    config.out.write_text(json.dumps(result | {"command": sys.argv}, indent=1) + "\n")


if __name__ == "__main__":
    main()
