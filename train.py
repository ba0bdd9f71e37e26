"""Trains one of the five variants on RLDS data.

    python train.py --variant la_align                                     # embedded data, tiny backbone, a laptop
    torchrun --standalone train.py --variant la_direct                     # the same through torchrun
    torchrun --standalone --nproc-per-node 8 train.py --variant la_cond --backbone Qwen/Qwen3-VL-2B-Instruct \\
        --data /data/libero_goal_no_noops --global-batch-size 128 --learning-rate 1e-4 --max-steps 80000 \\
        --lr-scheduler step --weight-decay 0.01 --warmup-ratio 0           # the paper's setting
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

A run is one folder: config.json, dataset_statistics.json, model.safetensors (trainable weights), log.jsonl (one object
per step) and training-<step>.safetensors (what --resume needs). The global batch of a step is a pure function of
(seed, step), so one process, n processes and any accumulation train alike, to rounding.
"""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from common import (
    Log,
    Meter,
    all_mean,
    all_sum,
    commit,
    data_workers,
    distribute,
    explained,
    learning_rate,
    note_sigterm,
    parameter_groups,
    plain,
    prepare_run,
    print0,
    restore_training,
    save_tensors,
    save_training,
    start_ranks,
    stop_ranks,
    to_device,
    trainable_tensors,
    write_json,
)
from data import (
    CACHE,
    Chunks,
    StepBatches,
    label_path,
    load_labels,
    open_indices,
    split_episodes,
    statistics,
    statistics_hash,
    steps_of,
)
from latent import load_tokenizer
from model import VARIANTS, VLA, Spec, base_hash, check_gpu, request_ids, text_tokenizer

# A resumed run may change where things lie (contents are compared by fingerprint) and what does not alter results.
FREE_TO_CHANGE = {"resume", "out", "data", "labels", "tokenizer", "cache", "num_workers", "save_every", "val_every"}
FREE_TO_CHANGE |= {"wandb_project", "per_device_batch_size", "gradient_checkpointing", "compile"}
FREE_TO_CHANGE |= {"keep", "max_skipped", "timeout"}
LOG_EVERY = 10  # steps, but at most 5 s, between writes of the log: losses, and SIGTERM, stay with each process so long


@dataclass
class Config:
    variant: Literal["baseline", "la_align", "la_direct", "la_cond", "la_tok"] = "la_align"
    """which of the paper's five models"""
    data: tuple[Path, ...] = (Path("data/libero_tiny"),)
    """RLDS data sets, one folder each"""
    data_weights: tuple[float, ...] = ()
    """how often each data set's samples occur in an epoch (default: once)"""
    out: str = ""
    """folder of the run (default: runs/<variant>-<time>)"""
    resume: bool = False
    """continue the run in --out from its last save; without one, start it (again). Also when torchrun restarts us"""
    cache: Path = CACHE
    """where indices and labels are kept"""
    labels: tuple[Path, ...] = ()
    """latent label file of each data set (default: beside the data, else in the cache)"""
    tokenizer: str = ""
    """folder of the action tokenizer for la_tok (default: tokenizer/ beside the data)"""
    delta: int = 0
    """frames between the two images of a latent action (default: what the label file says)"""
    align_target: Literal["continuous", "quantised"] = "continuous"
    """image latents that la_align and --continuous learn from: before,
    or (labels of the paper's release) after quantisation"""

    backbone: str = "tiny"
    """tiny, or a Qwen3-VL checkpoint directory or hub id"""
    tuning: Literal["", "lora", "full", "frozen"] = ""
    """what is trained of a pretrained backbone: low-rank updates, all weights, nothing
    (default: lora; the tiny backbone is always trained in full)"""
    lora_rank: int = 64
    """rank of LoRA"""
    lora_alpha: int = 16
    """scale of LoRA: alpha / rank"""
    lora_targets: tuple[str, ...] = ()
    """last names of the linear layers that get LoRA, as q_proj or qkv (default: all of vision and language)"""
    image_size: int = 0
    """side of the images that the backbone sees (default: as stored, rounded down to a multiple of 32)"""
    cameras: tuple[str, ...] = ()
    """image features to use, in this order (default: all)"""
    use_wrist_image: bool = True
    """with the default cameras: keep those with 'wrist' in their name"""
    use_proprio: bool = True
    """give the head the proprioceptive state"""
    chunk: int = 8
    """actions predicted at once"""
    text_length: int = 0
    """tokens reserved for an instruction (default: the longest of the data, rounded up to a multiple of 8)"""
    head_width: int = 0
    """width of the action head (default: the backbone's, at most 1024)"""

    loss: Literal["l1", "l2"] = "l1"
    """error of the actions"""
    latent_weight: float = -1.0
    """lambda, the weight of the latent loss (negative: the variant's own)"""
    continuous: bool = False
    """ablation: la_direct, la_cond and la_tok regress vectors instead of classifying codes"""
    align_layer: int = 0
    """ablation: the layer that la_align reads (default: 17 of 28, scaled)"""
    placeholders_per_step: int = 1
    """ablation: action placeholders per chunk step of the baseline"""

    global_batch_size: int = 16
    """samples per optimizer step, over all processes"""
    per_device_batch_size: int = 0
    """samples per forward pass of one process (default: all of its share)"""
    gradient_checkpointing: bool = False
    """keep only the inputs of the backbone's layers for the backward pass: less memory, about a third more work"""
    compile: bool = False
    """compile backbone and head: minutes at the start, faster steps"""
    learning_rate: float = 1e-3
    """peak learning rate (the paper: 1e-4 with a pretrained backbone)"""
    lr_scheduler: Literal["constant", "step", "cosine"] = "cosine"
    """constant, halved every --lr-decay-every steps (the paper), or cosine to 1 %"""
    lr_decay_every: int = 10_000
    """steps between halvings of the step schedule"""
    warmup_ratio: float = 0.01
    """share of the steps in which the learning rate rises from 0"""
    weight_decay: float = 1e-4
    """decay of matrices; norms, biases and queries are never decayed"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    max_steps: int = 6500
    """optimizer steps"""
    epochs: float = 0.0
    """passes over the data; replaces --max-steps when positive"""
    image_aug: bool = True
    """random crop, brightness, contrast, saturation and hue"""
    val_fraction: float = 0.05
    """share of the episodes held out; their action L1 is logged"""
    val_every: int = 1000
    """steps between evaluations on held-out episodes"""
    save_every: int = 1000
    """steps between saves"""
    keep: int = 2
    """saves that stay: should the newest be damaged, the one before it is taken"""
    max_skipped: int = 10
    """steps in a row that may be skipped because a loss or a gradient is not finite; then the run stops"""
    timeout: int = 600
    """seconds to wait for a data worker or another process before the run ends with an error"""
    seed: int = 0
    """of weights, order and augmentation"""
    num_workers: int = 2
    """processes per rank that decode images (0: the training process itself)"""
    wandb_project: str = ""
    """log to this wandb project too"""


def check(config, world):
    """Raises ValueError naming the field and the value of what cannot work, before anything is loaded."""
    shares = config.global_batch_size / world
    if shares != int(shares) or shares < 1:
        raise ValueError(
            f"global_batch_size is {config.global_batch_size}; it must be a multiple of the {world} processes"
        )
    if config.per_device_batch_size and shares % config.per_device_batch_size:
        raise ValueError(
            f"per_device_batch_size is {config.per_device_batch_size}; "
            f"it must divide the {int(shares)} samples of each process"
        )
    positive = "max_steps save_every val_every chunk placeholders_per_step lr_decay_every keep max_skipped timeout"
    for name in positive.split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("data_weights", "labels"):
        if getattr(config, name) and len(getattr(config, name)) != len(config.data):
            raise ValueError(f"{name} has {len(getattr(config, name))} entries for {len(config.data)} data sets")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"val_fraction is {config.val_fraction}; it must be at least 0 and below 1")
    if config.resume and not config.out:
        raise ValueError("resume is set but out is not: say which run to continue with --out")
    if not config.out and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError("torchrun may restart this run (--max-restarts), but out is not set: name a folder with --out")


def load_targets(config, indices, stats):
    """(labels per data set or None, action tokenizer or None): what the variant's latent loss compares with.

    Raises FileNotFoundError with the command that makes what is missing, ValueError when it does not fit the data.
    """
    target = VARIANTS[config.variant].target
    if target == "action":
        folder = Path(config.tokenizer or config.data[0] / "tokenizer")
        if not folder.exists():
            raise FileNotFoundError(
                f"variant {config.variant} needs an action tokenizer, and {folder} does not exist. Make it: "
                f"python latent.py tokenizer --data {config.data[0]} --out {folder}"
            )
        return None, _load_tokenizer(folder, config.chunk, indices, stats)
    if not target:
        return None, None
    labels = [_load_labels(config, number, index) for number, index in enumerate(indices)]
    kinds = {(found.delta, found.fingerprint, found.num_codes) for found in labels}
    if len(kinds) > 1:
        raise ValueError(
            f"the labels of these data sets come from different latent models (delta, fingerprint, codes): {kinds}"
        )
    return labels, None


def _load_tokenizer(folder, chunk, indices, stats):
    tokenizer = load_tokenizer(folder)
    expected = {"chunk": chunk, "action_size": indices[0].columns["action"].shape[1]}
    found = {name: tokenizer.config[name] for name in expected}
    if found != expected:
        raise ValueError(
            f"the action tokenizer in {folder} is for {found}, but this run has {expected}; make another one"
        )
    trained_on = json.loads((folder / "dataset_statistics.json").read_text())
    for index, own in zip(indices, stats):
        theirs = trained_on.get(index.name, {}).get("action")
        if not theirs or not all(np.allclose(theirs[row], own["action"][row], rtol=1e-5) for row in ("q01", "q99")):
            raise ValueError(
                f"the action tokenizer in {folder} was trained on {list(trained_on)}, not on {index.name} with these "
                f"statistics. Make one: python latent.py tokenizer --data {index.directory} --out DIR"
            )
    return tokenizer


def _load_labels(config, number, index):
    path = config.labels[number] if config.labels else label_path(index, config.data[number])
    labels = None if config.labels and not path.exists() else load_labels(index, path, config.delta)
    if labels is None:
        folder = config.data[number]
        raise FileNotFoundError(
            f"variant {config.variant} needs latent labels, and {path} does not exist. Make them: "
            f"python latent.py lam --data {folder} --out runs/lam && "
            f"python latent.py label --data {folder} --lam runs/lam --out {path}"
        )
    if (config.variant == "la_align" or config.continuous) and labels.quantised != (config.align_target == "quantised"):
        raise ValueError(
            f"the labels of {index.name} hold {'quantised' if labels.quantised else 'continuous'} vectors, "
            f"but align_target is '{config.align_target}'"
        )
    return labels


def make_spec(config, indices, cameras, labels, tokenizer):
    """Sizes from the data, the labels and the config."""
    target = tokenizer or (labels[0] if labels else None)
    stored = indices[0].image(cameras[0], 0).shape[0]
    texts, words = {text for index in indices for text in index.instructions}, text_tokenizer(config.backbone)
    longest = max(len(request_ids(words, text, config.chunk)) for text in texts)
    return Spec(
        variant=config.variant,
        backbone=config.backbone,
        cameras=len(cameras),
        image_size=config.image_size or stored // 32 * 32,
        text_length=config.text_length or (longest + 7) // 8 * 8,
        chunk=config.chunk,
        action_size=indices[0].columns["action"].shape[1],
        proprio_size=indices[0].columns["state"].shape[1] if config.use_proprio else 0,
        codes_per_step=labels[0].codes.shape[1] if labels else 1,
        num_codes=target.num_codes if target else 0,
        code_dim=target.dim if target else 0,
        action_loss=config.loss,
        continuous=config.continuous,
        align_layer=config.align_layer,
        placeholders_per_step=config.placeholders_per_step,
        latent_weight=config.latent_weight,
        tuning=config.tuning,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        head_width=config.head_width,
        gate=1.0 if config.backbone == "tiny" else 0.0,
    )


def describe(index, cameras, stats):
    """What evaluation must know of a data set: its statistics, how its images were stored, where its episodes start."""
    entry = {"name": index.name, "fingerprint": index.fingerprint, "statistics": statistics_hash(stats),
             "instructions": sorted(set(index.instructions)),
             "cameras": {camera: index.jpeg_options(camera) for camera in cameras}}  # fmt: skip
    if "suite" in index.metadata:  # made by demos.py
        suite, task, widen, seed = (index.metadata[name] for name in ("suite", "task", "widen", "seed"))
        entry |= {
            "suite": suite[0],
            "tasks": sorted(set(task)),
            "widen": round(widen[0], 6),
            "seeds": [min(seed), max(seed)],
        }
    note = index.directory.parent / "expert.json"
    if note.exists():
        entry["expert"] = json.loads(note.read_text()).get("evaluation", [])
    return entry


def choose_cameras(config, index):
    """The cameras in their order: as asked for, else the main one first and, unless switched off, the wrist's."""
    every = sorted(index.images, key=lambda name: ("wrist" in name, name))
    return list(config.cameras) or [name for name in every if config.use_wrist_image or "wrist" not in name]


@torch.no_grad()
def add_action_codes(batch, tokenizer):
    """la_tok's targets: the action tokenizer's codes i64 [B, H, 1] and vectors f32 [B, H, 1, d] of the true chunk."""
    codes, vectors = tokenizer.encode(batch["actions"], batch["valid"])
    return batch | {"codes": codes[:, :, None], "vectors": vectors[:, :, None]}


def ready(batch, tokenizer, image_aug, device):
    """A batch of the data as the model takes it: on its device, with la_tok's targets, and draws only to augment."""
    batch = to_device(batch, device)
    if tokenizer:
        batch = add_action_codes(batch, tokenizer)
    if not image_aug:
        del batch["draws"]
    return batch


@torch.no_grad()
def offenders(config, dataset, vla, tokenizer, step):
    """`names` of the samples of a step whose loss alone is not finite; of all when there is none."""
    rows, device = range(step * config.global_batch_size, (step + 1) * config.global_batch_size), vla.queries.device
    with torch.compiler.set_stance("force_eager"):
        alone = lambda row: vla(ready(default_collate([dataset[row]]), tokenizer, config.image_aug, device))["loss"]  # noqa: E731
        return dataset.names([row for row in rows if not alone(row).isfinite()] or rows)


def count_skipped(entries, skipped, config, dataset, vla, tokenizer):
    """How many steps in a row were skipped, `skipped` before these lines of the log.

    Raises FloatingPointError with the samples of the last one when they are `max_skipped`.
    """
    for entry in entries:
        skipped = skipped + 1 if entry["skipped"] else 0
        if skipped:
            print0(f"WARNING: step {entry['step']} skipped: its loss or gradient is not finite")
        if skipped == config.max_skipped:
            found = offenders(config, dataset, vla, tokenizer, entry["step"])
            raise FloatingPointError(
                f"loss or gradient not finite in {skipped} steps in a row (--max-skipped). Look at step "
                f"{entry['step']}: {found}. If nothing is wrong there, lower --learning-rate."
            )
    return skipped


@torch.no_grad()
def validate(vla, dataset, held_out, ranks, batch_size=32, samples=256):
    """Mean absolute error of the normalised actions on an even choice of held-out steps, over all processes.

    Never compiled: its batches have other sizes than those of training.
    """
    steps = [(number, int(step)) for number, chosen in enumerate(held_out) for step in chosen]
    steps = steps[:: max(1, len(steps) // samples)][ranks.rank :: ranks.world]
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    vla.eval()
    for at in range(0, len(steps), batch_size):
        batch = to_device(
            default_collate([dataset.sample(*place) for place in steps[at : at + batch_size]]), ranks.device
        )
        with torch.compiler.set_stance("force_eager"):
            actions, _ = vla.run(batch)
        error = (actions - batch["actions"]).abs() * batch["valid"][:, :, None]
        total += torch.stack([error.sum(), batch["valid"].sum() * error.shape[2]])
    vla.train()
    total = all_sum(total)
    return (total[0] / total[1]).item()


def write_log(log, pending, stop):
    """Averages the waiting steps' losses over all processes in one go and writes one line per step.

    Returns the lines, whether any process says `stop`, and the samples/s that all agree on.
    """
    names = list(pending[0]["totals"])
    values = torch.stack([torch.stack([entry["totals"][name].float() for name in names]) for entry in pending])
    own = values.new_tensor([float(stop), pending[-1]["samples_per_s"]]).expand(len(pending), 2)
    rows = all_mean(torch.cat([values, own], 1)).tolist()  # [steps, losses + 2]
    entries = [entry | dict(zip(names, row)) for entry, row in zip(pending, rows)]
    for entry in entries:
        del entry["totals"]
        log.write(**entry)
    pending.clear()
    return entries, rows[-1][-2] > 0, rows[-1][-1]


def setup(config, ranks):
    """Everything the loop needs: data, targets, model, optimizer, run folder."""
    check(config, ranks.world)
    indices = open_indices(config.data, config.cache)
    cameras = choose_cameras(config, indices[0])
    stats = [statistics(index) for index in indices]
    labels, tokenizer = load_targets(config, indices, stats)
    split = [split_episodes(index, config.val_fraction, config.seed) for index in indices]
    dataset = Chunks(
        indices, stats, cameras, config.chunk, config.seed, labels, config.data_weights, [kept for kept, _ in split]
    )
    held_out = [steps_of(index, held) for index, (_, held) in zip(indices, split)]
    torch.manual_seed(config.seed)
    vla = VLA(make_spec(config, indices, cameras, labels, tokenizer)).to(ranks.device)
    vla.backbone.tokenise([text for index in indices for text in set(index.instructions)])  # too long? before a folder
    description = {
        "train": plain(config),
        "model": asdict(vla.spec),
        "base_hash": base_hash(vla),
        "data": [describe(index, cameras, found) for index, found in zip(indices, stats)],
        "targets": [{"fingerprint": found.fingerprint, "delta": found.delta} for found in labels or []],
        "command": sys.argv,
        "commit": commit(),
        "torch": torch.__version__,
    }
    run = Path(config.out or f"runs/{config.variant}-{time.strftime('%Y%m%d-%H%M%S')}")
    resuming = prepare_run(run, config.resume, ranks.main, description, "train", FREE_TO_CHANGE)
    if ranks.main:
        write_json(run / "dataset_statistics.json", {index.name: s for index, s in zip(indices, stats)})
    return dataset, held_out, vla, tokenizer.to(ranks.device) if tokenizer else None, run, resuming, description


@explained
def main(config):
    """Trains one run; returns its folder."""
    ranks = start_ranks(config.timeout)
    if ranks.device.type == "cuda":
        check_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    dataset, held_out, vla, tokenizer, run, resuming, description = setup(config, ranks)
    optimizer = torch.optim.AdamW(parameter_groups(vla, config.weight_decay), lr=config.learning_rate, fused=True)
    first = restore_training(run, vla, optimizer) if resuming else 0
    vla.backbone.checkpointing = config.gradient_checkpointing
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph, also under checkpointing; LoRA's gradients are small
        vla.act = torch.compile(vla.act, fullgraph=True, dynamic=False)
    share = config.global_batch_size // ranks.world
    micro = config.per_device_batch_size or share
    accumulation = share // micro
    steps = config.max_steps
    if config.epochs > 0:
        steps = math.ceil(config.epochs * dataset.epoch_length / config.global_batch_size)
    if ranks.main and first == steps:  # killed between the two files of the last save
        save_tensors(run / "model.safetensors", trainable_tensors(vla), step=first)
    sampler = StepBatches(first, steps, config.global_batch_size, micro, ranks.rank, ranks.world)
    cuda = ranks.device.type == "cuda"
    workers = data_workers(config.num_workers, config.timeout)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, pin_memory=cuda, **workers))
    ddp = distribute(vla, ranks)
    log = Log(run, ranks.main, first, config.wandb_project, description)
    trained = sum(p.numel() for p in vla.parameters() if p.requires_grad)
    print0(
        f"{config.variant}: {trained:,} trained parameters, {dataset.epoch_length:,} samples an epoch, "
        f"{steps} steps of {config.global_batch_size} on {ranks.world} x {ranks.device.type}"
    )

    meter, pending, log_every, skipped, sigterm, stopping = Meter(), [], 1, 0, note_sigterm(), False
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not ranks.main, mininterval=1)
    for step in bar:
        lr = learning_rate(
            step, steps, config.learning_rate, config.lr_scheduler, config.warmup_ratio, config.lr_decay_every
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        totals = {}
        for part in range(accumulation):
            batch = ready(next(batches), tokenizer, config.image_aug, ranks.device)
            wait = nullcontext() if ranks.world == 1 or part == accumulation - 1 else ddp.no_sync()
            with wait:
                losses = ddp(batch)
                spread = 1 + 0 * losses["loss"].detach()  # NaN when the loss is not finite: so is every gradient then
                (losses["loss"] * spread / accumulation).backward()
            totals = {name: totals.get(name, 0) + value.detach() / accumulation for name, value in losses.items()}

        totals["grad_norm"] = nn.utils.clip_grad_norm_(vla.parameters(), config.max_grad_norm)
        totals["skipped"] = optimizer.found_inf = (~totals["grad_norm"].isfinite()).float()  # then step() does nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        pending.append(
            {"step": step, "lr": lr, "samples_per_s": meter.tick(config.global_batch_size), "totals": totals}
        )
        validating = any(map(len, held_out)) and (done % config.val_every == 0 or done == steps)
        if validating:
            pending[-1]["val_action_l1"] = validate(vla, dataset, held_out, ranks)
        saving = done % config.save_every == 0 or done == steps
        if validating or saving or len(pending) >= log_every:
            entries, stopping, rate = write_log(log, pending, sigterm.is_set())
            log_every = max(1, min(LOG_EVERY, int(5 * rate / config.global_batch_size)))
            shown = entries[-1]
            skipped = count_skipped(entries, skipped, config, dataset, vla, tokenizer)
            bar.set_postfix(loss=f"{shown['loss']:.3f}", lr=f"{lr:.1e}", samples_per_s=f"{shown['samples_per_s']:.0f}")
        if ranks.main and (saving or stopping):
            last = stopping or done == steps
            save_training(run, vla, optimizer, done, trainable_tensors(vla), log, config.keep, last)
        if stopping:
            break

    log.close()
    stop_ranks()
    if stopping:
        print0(f"SIGTERM: saved after {done} of {steps} steps. Go on: the same command with --out {run} --resume")
    else:
        print0(f"run: {run}\nnext: python eval.py {run}")
    return run


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
