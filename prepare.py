"""From the command line of train.py to data, latent targets, model and run folder.

Which episodes keep their actions, which are video; what each embodiment's sizes are; what config.json says of a run.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from backbone import prompt_ids
from batches import ActionChunks, EpisodeSteps, Source
from checkpoint import is_restarted, prepare_run, training_saves
from common import most_sharing, print0
from data import check_embodiments, choose_chunk, open_datasets
from dataspec import to_dict
from files import at_least, check_new_folder, git_commit, read_json, resolve_folder, to_json, write_json
from index import split_episodes
from inspection import describe_reading
from lora import base_hash
from model import VARIANTS, VLA, ModelConfig, check_model_config
from normalise import rare_motions, statistics_hash
from pretrained import load_qwen, text_tokenizer
from targets import load_targets
from tiny import SIZES
from transfer import start_from
from watch import check_evaluation

LENGTH = {"max_steps", "epochs"}  # settings that a resumed run may change where `check_length` allows it


@dataclass
class Setup:
    """What the training loop needs."""

    dataset: ActionChunks
    held_out: list  # (number of the source, `EpisodeSteps`) of held-out episodes with actions
    vla: VLA
    tokenizer: nn.Module | None  # the action tokenizer, for la_tok
    run: Path
    resuming: bool
    description: dict  # the content of config.json
    steps: int  # updates of the whole run
    ema: float  # decay of the moving average of the weights


def prepare(config, ranks, free_to_change):
    """Open data and targets, build the model, create the run folder or find the run to resume; return `Setup`.

    config: of train.py, checked; free_to_change: the settings that a resumed run may change.
    """
    config = replace(config, backbone=resolve_folder(config.backbone, SIZES))
    run = Path(config.out or f"runs/{config.variant}-{time.strftime('%Y%m%d-%H%M%S')}")
    if ranks.main and not (config.resume or is_restarted()):
        check_new_folder(run)
    datasets = open_datasets(config.data, config.cache, config.spec)
    check_embodiments(datasets)
    for dataset in datasets:
        print_reading(dataset)
    cameras = [choose_cameras(config, dataset) for dataset in datasets]
    chunk = choose_chunk(config.chunk, datasets)
    shares = [config.val_fraction if dataset.action_size else 0 for dataset in datasets]  # video has no error to log
    splits = [split_episodes(dataset, share, config.seed) for dataset, share in zip(datasets, shares)]
    if config.instructions:
        splits = choose_instructions(config.instructions, datasets, splits)
    sources = make_sources(config, datasets, [training for training, _ in splits])
    labels, tokenizer = load_targets(VARIANTS[config.variant], config, datasets, chunk)
    warn_of_known_actions(config, datasets, labels, tokenizer)
    dataset = ActionChunks(datasets, cameras, chunk, config.seed, labels, sources)
    for source, name, count in zip(dataset.sources, dataset.source_names, dataset.counts):
        if source.weight and not count:
            raise ValueError(f"{name} has so small a weight, {source.weight:g}, that no step of it is in an epoch")
    held_out = held_out_steps(dataset, [held for _, held in splits])
    steps = count_steps(to_json(config), dataset)
    torch.manual_seed(config.seed)
    model_config = make_model_config(config, dataset, labels, tokenizer)
    vla = VLA(model_config, load_qwen(model_config, ranks.device)).to(ranks.device)
    for each in datasets:
        vla.backbone.tokenise(each.instructions())  # raises, before a folder is made, when one is too long
    before = settings_to_resume(run, config.resume, "train")
    targets = [{"fingerprint": part.fingerprint} for part in labels or [tokenizer] if part]
    description = {
        "train": to_json(config),
        "model": asdict(vla.config),
        "base_hash": base_hash(vla),
        "data": [
            describe_data(each, names, dataset.image_sides, config.instructions)
            for each, names in zip(datasets, cameras)
        ],
        "targets": targets,
        "command": sys.argv,
        "commit": git_commit(),
        "torch": torch.__version__,
    }
    if config.init_from and not before:
        print0(start_from(vla, config.init_from, description))
    if before:
        check_length(run, count_steps(before, dataset), steps, config.lr_scheduler, config.warmup_ratio)
        if config.backbone not in SIZES and read_json(run / "config.json").get("base_hash") == description["base_hash"]:
            free_to_change = free_to_change | {"backbone"}  # the same one lies elsewhere
    resuming = prepare_run(run, config.resume, ranks.main, description, "train", free_to_change | LENGTH)
    if ranks.main:
        if before:
            update_config(run, description, steps)
        write_json(run / "dataset_statistics.json", {each.name: each.stats for each in datasets})
    tokenizer = tokenizer.to(ranks.device) if tokenizer else None
    ema = config.ema if config.ema >= 0 else 0.998 * (config.backbone in SIZES)
    return Setup(dataset, held_out, vla, tokenizer, run, resuming, description, steps, ema)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def print_reading(dataset):
    """Print how a data set is read, and what is odd about its instructions and actions."""
    print0(describe_reading(dataset))
    if not all(text.strip() for text in dataset.instructions()):
        print0(f"WARNING: {dataset.name} has episodes whose instruction is empty")
    if not dataset.action_size:
        return
    actions = dataset.stats["action"]
    for number in rare_motions(actions):
        low, high, q01, q99 = (actions[name][number] for name in ("min", "max", "q01", "q99"))
        print0(
            f"WARNING: {dataset.name}: dimension {number} of the action is normalised by its smallest and largest "
            f"value, {low:g} and {high:g}, as 98 % of its values lie from {q01:g} to {q99:g}"
        )


def warn_of_known_actions(config, datasets, labels, tokenizer):
    """Print a warning where latent targets may give back the actions that a setting takes away."""
    if not config.episodes and config.data_fraction == 1:
        return
    if tokenizer:
        print0("WARNING: the action tokenizer may have learned from the episodes whose actions are not used here")
    for dataset, own in zip(datasets, labels or []):
        if dataset.action_size and own.saw_actions != "no":
            known = "learned" if own.saw_actions == "yes" else "may have learned"
            print0(
                f"WARNING: {dataset.name}: the latent model behind the labels {known} from actions, so they give back "
                "some of those that are not used here. Labels of a model of train_latent.py --action-fraction 0 do not"
            )


LEAST = dict.fromkeys("global_batch_size max_steps save_every val_every placeholders_per_step".split(), 1)
LEAST |= dict.fromkeys("lr_decay_every keep max_skipped timeout lora_rank lora_alpha eval_trials".split(), 1)
LEAST |= dict.fromkeys("chunk episodes rest_weight epochs seed delta image_size text_length eval_every".split(), 0)
LEAST |= dict.fromkeys("per_device_batch_size head_width align_layer weight_decay max_grad_norm".split(), 0)


def check_config(config, world):
    """Raise ValueError naming the field and the value of what cannot work, before anything is loaded."""
    at_least(config, LEAST)
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate is {config.learning_rate}; it must be positive")
    for name in ("data_fraction", "warmup_ratio"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be from 0 to 1")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"val_fraction is {config.val_fraction}; it must be at least 0 and below 1")
    if not config.ema < 1:
        raise ValueError(f"ema is {config.ema}; it must be below 1: the average would never move")
    share, rest = divmod(config.global_batch_size, world)
    if rest:
        most = most_sharing(config.global_batch_size, world)
        raise ValueError(
            f"global_batch_size is {config.global_batch_size}; it must be a multiple of the {world} processes. "
            f"Start {most} instead: torchrun --nproc-per-node {most}"
        )
    if config.per_device_batch_size and share % config.per_device_batch_size:
        raise ValueError(
            f"per_device_batch_size is {config.per_device_batch_size}; "
            f"it must divide the {share} samples of each process"
        )
    for name in ("data_weights", "labels", "spec"):
        if getattr(config, name) and len(getattr(config, name)) != len(config.data):
            raise ValueError(f"{name} has {len(getattr(config, name))} entries for {len(config.data)} data sets")
    if not min(config.data_weights, default=0) >= 0:
        raise ValueError(f"data_weights are {config.data_weights}; none may be negative")
    check_evaluation(config)
    if len(set(config.cameras)) < len(config.cameras):
        raise ValueError(f"cameras are {', '.join(config.cameras)}; name each once")
    if config.episodes and config.data_fraction < 1:
        raise ValueError(f"both episodes ({config.episodes}) and data_fraction ({config.data_fraction}) are given")
    if config.resume and not config.out:
        raise ValueError("resume is set but out is not: say which run to continue with --out")
    if not config.out and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError("torchrun may restart this run (--max-restarts), but out is not set: name a folder with --out")
    refuse_ignored(config, ignored_options(config))
    check_model_config(SimpleNamespace(**vars(config), action_loss=config.loss))


def refuse_ignored(config, ignored):
    """Raise ValueError for an option that was given, but that nothing reads.

    ignored: (options, whether nothing reads them, with which setting that is so). An option that has its default counts
    as not given.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for options, is_ignored, reason in ignored:
        for option in options.split():
            if is_ignored and getattr(config, option) != defaults[option]:
                flag = f"{'no-' * (defaults[option] is True)}{option.replace('_', '-')}"
                raise ValueError(f"--{flag} has no effect with {reason}; leave it out")


def ignored_options(config):
    """Return what `refuse_ignored` takes.

    Labels and tokenizer, and `delta` and `align_target`, which say what is in them, may be given to all variants, to
    compare them.
    """
    variant = VARIANTS[config.variant]
    name = f"--variant {config.variant}"
    return [
        ("latent_weight", not variant.loss, name),
        ("align_layer", variant.latents or not variant.loss, name),
        ("rest", not config.episodes and config.data_fraction == 1, "--data-fraction 1: all episodes keep actions"),
        ("rest_weight", config.rest != "video", f"--rest {config.rest}"),
        ("lr_decay_every", config.lr_scheduler != "step", f"--lr-scheduler {config.lr_scheduler}"),
        ("use_wrist_image", bool(config.cameras), "--cameras"),
        ("val_every", not config.val_fraction, "--val-fraction 0"),
        ("lora_rank lora_alpha", config.backbone in SIZES, f"--backbone {config.backbone}, which has no LoRA"),
        ("lora_rank lora_alpha", config.tuning in ("full", "frozen"), f"--tuning {config.tuning}, which has no LoRA"),
        ("eval_trials eval_flags", not config.eval_every, "--eval-every 0"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The length of a run


def count_steps(settings, dataset):
    """Return the updates of a run with these settings of train.py, {name: value}, on `ActionChunks`."""
    if settings.get("epochs", 0) > 0:
        return math.ceil(settings["epochs"] * dataset.epoch_length / settings["global_batch_size"])
    return settings["max_steps"]


def settings_to_resume(run, resume, key):
    """Return the settings, under `key` of config.json, of the run that is to be resumed; None where none is.

    resume: as the command line says.
    """
    if (resume or is_restarted()) and training_saves(run):
        return read_json(run / "config.json").get(key)
    return None


def check_length(run, before, steps, scheduler, warmup_ratio=0.0):
    """Raise ValueError unless a run of `before` updates may be resumed as one of `steps`: from where it stands, the
    learning rates are those of a run that had this length from the beginning.

    scheduler, warmup_ratio: as of train.py.
    """
    done = next(iter(training_saves(run)))
    if steps == before:
        return
    if scheduler == "cosine":
        raise ValueError(
            f"{run} is a run of {before} updates, now {steps}: the cosine schedule spreads over all of them, so its "
            f"learning rates would have been others. Resume it with the length it had, or start from its weights in a "
            "new run; the constant and the step schedule can be prolonged"
        )
    if steps < done:
        raise ValueError(f"{run} has {done} updates already, and {steps} are asked for; ask for more, or for {done}")
    warmup = round(warmup_ratio * max(before, steps))
    if warmup > done:
        raise ValueError(
            f"{run} has {done} updates, and --warmup-ratio {warmup_ratio} of {max(before, steps)} is a warm-up of "
            f"{warmup}: with {steps} instead of {before} its learning rates would have been others"
        )


def update_config(run, description, steps):
    """Let config.json of a resumed run of `steps` updates say how long it is now, where its backbone lies, and of which
    commits its code is."""
    content = read_json(run / "config.json")
    commits = content["commit"].split(", ")
    if next(iter(training_saves(run))) < steps and description["commit"] != commits[-1]:
        content["commit"] = ", ".join([*commits, description["commit"]])
    content["train"] |= {name: description["train"][name] for name in LENGTH | {"backbone"}}
    content["model"]["backbone"] = description["model"]["backbone"]
    write_json(run / "config.json", content)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def choose_cameras(config, dataset):
    """Return the camera names in order: as asked for, else those of the description, without the wrist's on request.

    Raise ValueError where the data set lacks one.
    """
    if missing := [name for name in config.cameras if name not in dataset.cameras]:
        raise ValueError(f"{dataset.name} has no camera {missing}; it has {dataset.cameras}. Choose with --cameras.")
    if config.cameras:
        return list(config.cameras)
    names = [name for name in dataset.cameras if config.use_wrist_image or "wrist" not in name]
    if not names:
        raise ValueError(
            f"{dataset.name} has only the cameras {dataset.cameras}, which --no-use-wrist-image leaves out"
        )
    return names


def choose_instructions(texts, datasets, splits):
    """Return the splits with only the episodes of these instructions. Raise ValueError for one that there is not."""
    known = sorted({text for dataset in datasets for text in dataset.instructions()})
    if unknown := [text for text in texts if text not in known]:
        raise ValueError(f"instructions: no episode has {unknown}; there are {known}")
    return [
        tuple(part[[dataset.instruction(dataset.starts[e]) in texts for e in part]] for part in split)
        for dataset, split in zip(datasets, splits)
    ]


def make_sources(config, datasets, episodes):
    """Return the `Source`s of a run: of each data set the episodes with actions, and those that are video.

    episodes: of each data set the training episodes. Raise ValueError when video is left for a variant that learns
    nothing from it.
    """
    sources = []
    for number, (dataset, training) in enumerate(zip(datasets, episodes)):
        weight = config.data_weights[number] if config.data_weights else 1.0
        labelled, rest = choose_labelled(config, dataset, training)
        if len(labelled):
            sources.append(Source(number, labelled, weight))
        if len(rest) and (config.rest == "video" or not dataset.action_size):
            rest_weight = config.rest_weight if dataset.action_size else 1.0
            sources.append(Source(number, rest, weight * rest_weight, labelled=False))
    if not sources or not sum(source.weight for source in sources):
        raise ValueError("no episode is left to train on; see --data-fraction, --episodes, --rest and the weights")
    video = [datasets[source.dataset].name for source in sources if not source.labelled]
    if video and VARIANTS[config.variant].target != "image":
        learners = [name for name, variant in VARIANTS.items() if variant.target == "image"]
        raise ValueError(
            f"variant {config.variant} learns nothing from episodes without actions ({', '.join(video)}); "
            f"use {', '.join(learners)}, or leave them out"
        )
    return sources


def choose_labelled(config, dataset, episodes):
    """Return (episodes that keep their actions, the others), numbers in order, chosen per instruction and seeded."""
    if not dataset.action_size:
        return episodes[:0], episodes
    if not config.episodes and config.data_fraction == 1:
        return episodes, episodes[:0]
    groups = {}
    for episode in np.random.default_rng([config.seed, 5]).permutation(episodes):
        groups.setdefault(dataset.instruction(dataset.starts[episode]), []).append(episode)
    labelled = []
    for group in groups.values():
        count = config.episodes or int(np.ceil(round(config.data_fraction * len(group), 9)))
        labelled += group[:count]
    return np.sort(np.array(labelled, np.int64)), np.setdiff1d(episodes, labelled)


def held_out_steps(dataset, episodes):
    """Return [(number of the source, `EpisodeSteps`)] of the held-out episodes of data that has labelled sources."""
    found = []
    for number, source in enumerate(dataset.sources):
        held = episodes[source.dataset]
        if source.labelled and len(held):
            found.append((number, EpisodeSteps(dataset.datasets[source.dataset].starts, held)))
    return found


def describe_data(dataset, cameras, sides, instructions=()):
    """Return what evaluation must know of a data set: description, statistics, how images are stored, its starts.

    instructions: those that are trained, if not all.
    """
    entry = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "embodiment": dataset.spec.embodiment,
        "spec": to_dict(dataset.spec),
        "statistics": statistics_hash(dataset.stats),
        "instructions": [text for text in dataset.instructions() if text in instructions or not instructions],
        "cameras": {camera: dataset.storage_options(camera) for camera in cameras},
        "image_sides": sides[: len(cameras)],  # to which images are resized before the model; 0: not at all
    }
    metadata = dataset.metadata
    if "suite" in metadata:  # made by demos.py
        entry["suite"] = metadata["suite"][0]
        recorded = zip(metadata["task"], dataset.starts)  # of each episode, the task and its first step
        entry["tasks"] = sorted({task for task, step in recorded if dataset.instruction(step) in entry["instructions"]})
        entry["widen"] = round(metadata["widen"][0], 6)
        entry["seeds"] = [min(metadata["seed"]), max(metadata["seed"])]
        if not entry["widen"]:  # they began from official starts, whose number, 10 or 50, divides 10 000
            entry["official_seeds"] = sorted({int(seed) % 10_000 for seed in metadata["seed"]})
    note = dataset.find_shipped("expert.json")
    if note.exists():
        entry["expert"] = json.loads(note.read_text()).get("evaluation", [])
    return entry


# ----------------------------------------------------------------------------------------------------------------------
# Model


def make_model_config(config, dataset, labels, tokenizer):
    """Return the `ModelConfig` of a run: sizes from the data and the latent targets, the rest from the command line."""
    target = tokenizer or (labels[0] if labels else None)
    words = text_tokenizer(config.backbone)
    texts = {text for each in dataset.datasets for text in each.instructions()}
    longest = max(len(prompt_ids(words, text, dataset.chunk)) for text in texts)
    return ModelConfig(
        variant=config.variant,
        backbone=config.backbone,
        cameras=dataset.num_cameras,
        image_size=config.image_size or default_image_size(dataset),
        text_length=config.text_length or (longest + 7) // 8 * 8,
        chunk=dataset.chunk,
        action_size=dataset.action_size,
        proprio_size=dataset.state_size if config.use_proprio else 0,
        codes_per_step=labels[0].codes.shape[1] if labels else 1,
        num_codes=target.num_codes if target else 0,
        code_dim=target.dim if target else 0,
        action_loss=config.loss,
        augmentation=config.augmentation,
        continuous=config.continuous,
        align_layer=config.align_layer,
        placeholders_per_step=config.placeholders_per_step,
        latent_weight=config.latent_weight,
        tuning=config.tuning,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        head_width=config.head_width,
        gate=float(config.backbone in SIZES),  # at 0 a random backbone learns slower: it sees an even mix of images
        embodiments=embodiment_sizes(config, dataset),
    )


def default_image_size(dataset):
    """Return the main camera's side in the first data set, rounded down to a multiple of 32; ValueError below 32."""
    first = dataset.datasets[0]
    side = min(first.image(dataset.cameras[0][0], 0).shape[:2])
    if side < 32:
        raise ValueError(
            f"images of {first.name} have {side} pixels, less than a patch of the backbone; --image-size 32"
        )
    return side // 32 * 32


def embodiment_sizes(config, dataset):
    """Return (name, action size, proprio size, cameras) of each embodiment; () when there is only one."""
    if len(dataset.names) == 1:
        return ()
    sizes = {}
    for each, cameras in zip(dataset.datasets, dataset.cameras):
        state = each.state_size if config.use_proprio else 0
        known = sizes.get(each.spec.embodiment, (0, 0, 0))
        sizes[each.spec.embodiment] = tuple(map(max, known, (each.action_size, state, len(cameras))))
    return tuple((name, *sizes[name]) for name in dataset.names)
