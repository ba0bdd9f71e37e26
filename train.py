"""Train one of the five variants.

    python train.py --variant la_align                                     # embedded data, tiny backbone, a laptop
    torchrun --standalone --nproc-per-node auto train.py --variant la_direct     # one process on each core, or GPU
    torchrun --standalone --nproc-per-node 8 train.py --variant la_cond --backbone Qwen/Qwen3-VL-2B-Instruct \\
        --data /data/libero_goal_no_noops --global-batch-size 128 --learning-rate 1e-4 --max-steps 80000 \\
        --lr-scheduler step --weight-decay 0.01 --warmup-ratio 0 --image-size 256    # the paper's setting
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

A run is one folder: config.json, dataset_statistics.json, model.safetensors (trainable weights), log.jsonl (one object
per update) and training-<step>.safetensors (what --resume needs). The global batch of an update is a pure function
of (seed, update), so one process, n processes and any accumulation train alike, to rounding.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from batches import AUGMENTATIONS, StepBatchSampler
from card import finish_run
from checkpoint import restore_training, save_training, trainable_tensors
from common import (
    Log,
    Meter,
    MovingAverage,
    all_mean,
    all_sum,
    catch_signals,
    choose_workers,
    distribute,
    init_distributed,
    learning_rate,
    parameter_groups,
    print0,
    report_worker_failures,
    shutdown_distributed,
    to_device,
    worker_options,
)
from files import save_tensors, saved_step
from index import CACHE
from model import ACTION_LOSSES, VARIANTS
from prepare import check_config, prepare
from pretrained import check_bf16_support
from targets import add_action_codes
from watch import Watch

# A resumed run may change where things lie (contents are compared by fingerprint) and what does not alter results.
FREE_TO_CHANGE = set(
    "resume out data spec labels tokenizer cache init_from num_workers save_every val_every wandb_project keep timeout "
    "per_device_batch_size gradient_checkpointing compile max_skipped eval_every eval_trials eval_flags".split()
)
LOG_EVERY = 10  # updates, but at most 5 s, between exchanges of losses (and of signals) among the processes


@dataclass
class Config:
    variant: Literal[*VARIANTS] = "la_align"
    """which of the paper's five models"""
    data: tuple[Path, ...] = (Path("data/libero_tiny"),)
    """data sets, one folder each: RLDS, LeRobot, or MP4 files"""
    spec: tuple[str, ...] = ()
    """description of each data set: a JSON file or a preset's name (default: spec.json next to it, or what fits)"""
    data_weights: tuple[float, ...] = ()
    """how often each data set's samples occur in an epoch (default: once)"""
    instructions: tuple[str, ...] = ()
    """train only on the episodes with these instructions (default: all)"""
    data_fraction: float = 1.0
    """share of each instruction's training episodes that keep their actions, at least one unless 0"""
    episodes: int = 0
    """instead, the number of each instruction's training episodes that keep their actions (default: all)"""
    rest: Literal["drop", "video"] = "drop"
    """the other episodes: left out, or used as video without actions, which trains the latent losses alone"""
    rest_weight: float = 1.0
    """how often each step of that video occurs in an epoch"""
    out: str = ""
    """folder of the run (default: runs/<variant>-<time>)"""
    resume: bool = False
    """continue the run in --out from its last save; without one, start it (again). Also when torchrun restarts us"""
    init_from: str = ""
    """start from the weights of this run, where they fit"""
    cache: Path = CACHE
    """where indices and labels are kept"""
    labels: tuple[Path, ...] = ()
    """latent label file of each data set (default: next to the data, else in the cache)"""
    tokenizer: str = ""
    """folder of the action tokenizer for la_tok (default: tokenizer/ next to the data)"""
    delta: int = 0
    """frames between the two images of a latent action (default: what the label file says)"""
    align_target: Literal["continuous", "quantised"] = "continuous"
    """image latents that la_align and --continuous learn from: before,
    or (labels of the paper's release) after quantisation"""

    backbone: str = "tiny"
    """tiny (random weights), or a Qwen3-VL checkpoint folder or hub id"""
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
    """cameras to use, in this order, by their names in the description (default: all)"""
    use_wrist_image: bool = True
    """with the default cameras: keep those with 'wrist' in their name"""
    use_proprio: bool = True
    """give the head the proprioceptive state"""
    chunk: int = 0
    """actions predicted at once (default: what the description of the data says, else 8)"""
    text_length: int = 0
    """tokens reserved for an instruction (default: the longest of the data, rounded up to a multiple of 8)"""
    head_width: int = 0
    """width of the action head (default: the backbone's, at most 1024)"""

    loss: Literal[*ACTION_LOSSES, "quantile"] = "l1"
    """error of the actions; quantile: several quantiles of each number are learnt, the median acts"""
    latent_weight: float = -1.0
    """lambda, the weight of the latent loss (negative: the variant's own)"""
    continuous: bool = False
    """ablation: la_direct, la_cond and la_tok regress vectors instead of classifying codes"""
    align_layer: int = 0
    """ablation: the layer that la_align reads (default: 17 of 28, scaled)"""
    placeholders_per_step: int = 1
    """ablation: action placeholders per chunk step of the baseline"""

    global_batch_size: int = 16
    """samples per update, over all processes"""
    per_device_batch_size: int = 0
    """samples per forward pass of one process (default: all of its share)"""
    gradient_checkpointing: bool = False
    """keep only the inputs of the backbone's layers for the backward pass: less memory, about a third more work"""
    compile: bool = False
    """compile backbone and head: minutes at the start, faster updates"""
    learning_rate: float = 1e-3
    """peak learning rate (the paper: 1e-4 with a pretrained backbone)"""
    lr_scheduler: Literal["constant", "step", "cosine"] = "cosine"
    """constant, halved every --lr-decay-every updates (the paper), or cosine to 1 %"""
    lr_decay_every: int = 10_000
    """updates between halvings of the step schedule"""
    warmup_ratio: float = 0.01
    """share of the updates in which the learning rate rises from 0"""
    ema: float = -1.0
    """decay of the moving average of the weights, which is what is evaluated (0: none, the last weights;
    default: 0.998 for backbones that start from random weights, none for pretrained ones)"""
    weight_decay: float = 1e-4
    """decay of matrices; norms, biases and queries are never decayed"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm (0: never)"""
    max_steps: int = 6000
    """optimizer updates; a resumed run of the constant or the step schedule may get more"""
    epochs: float = 0.0
    """passes over the data; replaces --max-steps when positive"""
    image_aug: bool = True
    """random place, brightness, contrast, saturation and hue"""
    augmentation: Literal[*AUGMENTATIONS] = "crop"
    """place: a crop of 90 % of the area, resized (evaluation, or without image_aug: the centre crop), or a shift by up
    to 1/24 of the side (there: the whole image)"""
    val_fraction: float = 0.05
    """share of the episodes with actions held out; their action L1 is logged"""
    val_every: int = 1000
    """updates between evaluations on held-out episodes"""
    save_every: int = 1000
    """updates between saves"""
    eval_every: int = 0
    """updates between evaluations of saves in simulators, while training goes on (default: none)"""
    eval_trials: int = 5
    """trials of each task in each of these"""
    eval_flags: str = ""
    """more options of eval.py for them, as --eval-flags='--suite libero_goal --envs 4'"""
    keep: int = 2
    """saves that stay: should the newest be damaged, the one before it is taken"""
    max_skipped: int = 10
    """updates in a row that may be skipped because a loss or a gradient is not finite; then the run ends"""
    timeout: int = 600
    """seconds to wait for a data worker or another process before the run ends with an error"""
    seed: int = 0
    """of weights, order and augmentation"""
    num_workers: int = -1
    """processes per rank that decode images (0: the training process itself;
    default: 2, or 0 on a CPU whose cores all train)"""
    wandb_project: str = ""
    """log to this wandb project too"""


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the loop


def prepare_batch(batch, tokenizer, image_aug, device):
    """Return a batch as the model takes it: on its device, with la_tok's targets, with draws only to augment."""
    batch = to_device(batch, device)
    if tokenizer:
        batch = add_action_codes(batch, tokenizer)
    if not image_aug:
        del batch["draws"]
    return batch


@torch.no_grad()
def validate(vla, dataset, held_out, ranks, batch_size=32, samples=256):
    """Return the mean absolute error of normalised actions on an even choice of held-out steps, over all processes.

    held_out: list of (number of the source, `EpisodeSteps`). Never compiled: its batches have other sizes than those of
    training.
    """
    stride = max(1, sum(len(steps) for _, steps in held_out) // samples)
    places, before = [], 0  # before: steps of the sources before
    for number, steps in held_out:
        places += [(number, steps[k]) for k in range(-before % stride, len(steps), stride)]
        before += len(steps)
    places = places[ranks.rank :: ranks.world]
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # error, number of values
    vla.eval()
    for at in range(0, len(places), batch_size):
        batch = default_collate([dataset.sample(*place) for place in places[at : at + batch_size]])
        batch = to_device(batch, ranks.device)
        with torch.compiler.set_stance("force_eager"):
            actions, _ = vla.predict(batch)
        counted = batch["valid"][:, :, None] * (batch["action_weight"] > 0)[:, None]  # [B, H, A]
        error = (actions - batch["actions"]).abs() * counted
        total += torch.stack([error.sum(), counted.sum()])
    vla.train()
    total = all_sum(total)
    return (total[0] / total[1]).item()


def add_losses(totals, losses, sources, dataset, accumulation):
    """Add the losses of a micro-batch to `totals`, {"means": {name: tensor}, "sums": {name: [numerator, denominator]}}.

    losses: of `VLA.forward`; sources: i64 [B], of several. With several, each one's losses are averaged over its own
    samples, without the weight that makes up for those that have no actions.
    """
    sums = losses.pop("sums")
    samples = losses.pop("samples")
    if len(names := dataset.source_names) > 1:
        chosen = torch.nn.functional.one_hot(sources, len(names)).float()  # [B, sources]
        for kind, values in samples.items():
            values = values * dataset.labelled_share if kind == "action_loss" else values
            parts = torch.stack([values @ chosen, chosen.sum(0)])  # [2, sources]
            kept = [source.labelled or kind != "action_loss" for source in dataset.sources]
            sums |= {f"{kind}/{name}": part for name, part, known in zip(names, parts.T, kept) if known}
    for name, value in losses.items():
        totals["means"][name] = totals["means"].get(name, 0) + value.detach() / accumulation
    for name, value in sums.items():
        totals["sums"][name] = totals["sums"].get(name, 0) + value.detach()


def write_log(log, pending, stop):
    """Average the waiting updates' losses over all processes in one exchange and write one line per update.

    Return the lines, whether any process wants to `stop`, and the samples/s that all agree on. Empties `pending`.
    """
    means = list(pending[0]["totals"]["means"])
    sums = list(pending[0]["totals"]["sums"])
    rows = []
    for entry in pending:
        totals = entry["totals"]
        parts = [totals["means"][name].float()[None] for name in means] + [totals["sums"][name] for name in sums]
        rows.append(torch.cat(parts))
    values = torch.stack(rows)  # [updates, means + 2 sums]
    shared = values.new_tensor([float(stop), pending[-1]["samples_per_s"]]).expand(len(pending), 2)
    values = all_mean(torch.cat([values, shared], 1)).tolist()
    entries = []
    for entry, row in zip(pending, values):
        losses = dict(zip(means, row))
        pairs = zip(row[len(means) : -2 : 2], row[len(means) + 1 : -2 : 2])
        losses |= {name: above / below for name, (above, below) in zip(sums, pairs) if below}
        entries.append({name: value for name, value in entry.items() if name != "totals"} | losses)
        log.write(**entries[-1])
    pending.clear()
    return entries, values[-1][-2] > 0, values[-1][-1]


def count_skipped(entries, skipped, config, setup):
    """Return the number of updates skipped in a row, `skipped` before these lines of the log.

    Raise FloatingPointError naming the samples of the last one when they are `max_skipped`.
    """
    for entry in entries:
        skipped = skipped + 1 if entry["skipped"] else 0
        if skipped:
            print0(f"WARNING: update {entry['step']} skipped: its loss or gradient is not finite")
        if skipped == config.max_skipped:
            samples = nonfinite_samples(config, setup, entry["step"])
            raise FloatingPointError(
                f"loss or gradient not finite in {skipped} updates in a row (--max-skipped). Look at update "
                f"{entry['step']}: {samples}. If nothing is wrong there, lower --learning-rate."
            )
    return skipped


@torch.no_grad()
def nonfinite_samples(config, setup, step):
    """Return where the samples of an update lie whose own loss is not finite; all of them when there is none."""
    positions = range(step * config.global_batch_size, (step + 1) * config.global_batch_size)
    faulty = []
    for position in positions:
        sample = default_collate([setup.dataset[position]])
        batch = prepare_batch(sample, setup.tokenizer, config.image_aug, setup.vla.queries.device)
        with torch.compiler.set_stance("force_eager"):
            if not setup.vla(batch)["loss"].isfinite():
                faulty.append(position)
    return setup.dataset.describe_samples(faulty or positions)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@report_worker_failures
def main(config):
    """Train one run and return its folder."""
    ranks = init_distributed(config.timeout, config.global_batch_size)
    cuda = ranks.device.type == "cuda"
    if cuda:
        check_bf16_support(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    check_config(config, ranks.world)
    setup = prepare(config, ranks, FREE_TO_CHANGE)
    vla, dataset, run, steps = setup.vla, setup.dataset, setup.run, setup.steps
    optimizer = torch.optim.AdamW(parameter_groups(vla, config.weight_decay), lr=config.learning_rate, fused=True)
    average = MovingAverage(vla, setup.ema)
    first = restore_training(run, vla, optimizer, average) if setup.resuming else 0
    vla.backbone.checkpointing = config.gradient_checkpointing
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph, also under checkpointing; LoRA's gradients are small
        vla.forward_pass = torch.compile(vla.forward_pass, fullgraph=True, dynamic=False)
    ddp = distribute(vla, ranks)

    share = config.global_batch_size // ranks.world
    micro_batch = config.per_device_batch_size or share
    accumulation = share // micro_batch
    if ranks.main and first == steps > saved_step(run / "model.safetensors"):  # killed amid the last save
        save_tensors(run / "model.safetensors", trainable_tensors(vla) | average.tensors, step=first)
    sampler = StepBatchSampler(first, steps, config.global_batch_size, micro_batch, ranks.rank, ranks.world)
    workers = worker_options(choose_workers(config.num_workers, cuda), config.timeout)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, pin_memory=cuda, **workers))
    log = Log(run, ranks.main, first, config.wandb_project, setup.description)
    watch = Watch(config, run, first, log, ranks.main)
    trained = sum(parameter.numel() for parameter in vla.parameters() if parameter.requires_grad)
    print0(
        f"{config.variant}: {trained:,} trained parameters, {dataset.epoch_length:,} samples an epoch, "
        f"{steps} updates of {config.global_batch_size} on {ranks.world} x {ranks.device.type}"
    )

    meter = Meter()
    signals = catch_signals()
    pending = []  # log entries whose losses were not exchanged yet
    done, log_every, skipped, stopping = first, 1, 0, False
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not ranks.main, mininterval=1)
    for step in bar:
        schedule = config.lr_scheduler, config.warmup_ratio, config.lr_decay_every
        lr = learning_rate(step, steps, config.learning_rate, *schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        totals = {"means": {}, "sums": {}}
        for part in range(accumulation):
            batch = prepare_batch(next(batches), setup.tokenizer, config.image_aug, ranks.device)
            last_part = part == accumulation - 1
            with nullcontext() if ranks.world == 1 or last_part else ddp.no_sync():
                losses = ddp(batch)
                factor = 1 + 0 * losses["loss"].detach()  # NaN when the loss is not finite: so is every gradient then
                (losses["loss"] * factor / accumulation).backward()
            add_losses(totals, losses, batch.get("source"), dataset, accumulation)

        means = totals["means"]
        means["grad_norm"] = torch.nn.utils.clip_grad_norm_(vla.parameters(), config.max_grad_norm or torch.inf)
        means["skipped"] = (~means["grad_norm"].isfinite()).float()
        optimizer.found_inf = means["skipped"]  # a tensor on the device, as the fused AdamW asks; 1: nothing changes
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)

        done = step + 1
        speed = meter.tick(config.global_batch_size)
        pending.append({"step": step, "lr": lr, "samples_per_s": speed, "totals": totals})
        validating = bool(setup.held_out) and (done % config.val_every == 0 or done == steps)
        if validating:
            with average.in_place():
                pending[-1]["val_action_l1"] = validate(vla, dataset, setup.held_out, ranks)
        saving = done % config.save_every == 0 or done == steps
        if validating or saving or len(pending) >= log_every:
            entries, stopping, speed = write_log(log, pending, signals.is_set())
            log_every = max(1, min(LOG_EVERY, int(5 * speed / config.global_batch_size)))
            skipped = count_skipped(entries, skipped, config, setup)
            watch.report(step)
            shown = entries[-1]
            bar.set_postfix(loss=f"{shown['loss']:.3f}", lr=f"{lr:.1e}", samples_per_s=f"{shown['samples_per_s']:.0f}")
        if ranks.main and (saving or stopping):
            last = stopping or done == steps
            weights = trainable_tensors(vla) | average.tensors
            save_training(run, vla, optimizer, done, weights, log, config.keep, last, average)
            watch.begin(done)
        if stopping:
            break

    shutdown_distributed()
    watch.finish(steps, stopping, signals)
    log.close()
    finish_run(setup, done, ranks.main)
    return run


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
