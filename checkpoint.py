"""Saving and resuming a training; the files of a run are listed in train.py."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from common import broadcast_object
from files import check_new_folder, load_tensors, make_folder, read_json, save_tensors, write_json

# ----------------------------------------------------------------------------------------------------------------------
# What training changes


def trainable_tensors(module):
    """Return {name: tensor} of what training changes: trainable parameters and persistent buffers."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trainable(module, tensors, source):
    """Load what `trainable_tensors` returned. Raise ValueError naming `source` when it does not fit."""
    load_tensors_into(module, trainable_tensors(module), tensors, source)


def load_tensors_into(module, expected, tensors, source):
    """Load `tensors` into `module`; they must have the names and shapes of `expected`, a part of its state.

    Raise ValueError naming `source` and listing what is missing, unknown or of another shape.
    """
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"unknown {name}" for name in tensors.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(sorted(faults)[:8])}{more}")
    module.load_state_dict(tensors, strict=False)


def optimizer_tensors(optimizer):
    """Return {"optimizer.<parameter number>.<name>": tensor} of AdamW's moments and step counts."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{name}": tensor for number, entry in state.items() for name, tensor in entry.items()}


def load_optimizer(optimizer, tensors):
    """Load what `optimizer_tensors` returned."""
    state = {}
    for key, tensor in tensors.items():
        _, number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run


def is_restarted():
    """Return whether torchrun started this process again, which resumes a run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def prepare_run(run, resume, main, description, key, free):
    """Create the folder of a run with its config.json, or check that a run to be resumed had the same settings.

    resume: as the command line says; also assumed after torchrun restarted this process. main: whether this process
    writes. description: the content of config.json: the settings under `key`, of which those in `free` may differ, and
    lists "data" and "targets" of entries with a fingerprint. Return whether there is something to resume.
    Raise ValueError naming what differs.
    """
    run = Path(run)
    resume = resume or is_restarted()
    if resume and main:
        for unfinished in run.glob("*.tmp"):
            unfinished.unlink()
    if resume and broadcast_object(len(training_saves(run))):
        _check_same_settings(run, description, key, free)
        return True
    if main:
        config = run / "config.json"
        # a run that was killed before its first save may be started again in the same folder
        unfinished = resume and config.exists() and not (run / "model.safetensors").exists()
        if not (unfinished and key in read_json(config)):
            check_new_folder(run)
            make_folder(run, "--out")
        write_json(config, description)
    return False


def _check_same_settings(run, description, key, free):
    before = read_json(run / "config.json")
    changed = {
        name: (before[key].get(name), value)
        for name, value in description[key].items()
        if before[key].get(name) != value and name not in free
    }
    for name in ("data", "targets"):
        new, old = ([entry["fingerprint"] for entry in content[name]] for content in (description, before))
        if new != old:
            changed[f"contents of the {name}"] = (old, new)
    specs = [[entry.get("spec") for entry in content["data"]] for content in (before, description)]
    if specs[0] != specs[1] and None not in specs[0]:
        changed["descriptions of the data"] = tuple(specs)
    if changed:
        differences = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"{run} was trained with other settings: {differences}")


def training_saves(run):
    """Return {step: file} of what `save_training` wrote, the newest first."""
    files = {path.stem.removeprefix("training-"): path for path in Path(run).glob("training-*.safetensors")}
    return {int(step): files[step] for step in sorted(filter(str.isdigit, files), key=int, reverse=True)}


def save_training(run, module, optimizer, step, weights, log, keep, last, average=None):
    """Write training-<step>.safetensors (all that continuing after `step` updates needs; the `keep` newest stay), and
    `weights` as model.safetensors. average: a `MovingAverage` that training continues too.

    A write that fails leaves the older saves and prints a warning; after the `last` update it raises OSError.
    """
    try:
        log.sync()  # or a crash could leave a save that is ahead of its log
        tensors = trainable_tensors(module) | optimizer_tensors(optimizer)
        if average:
            tensors |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
        save_tensors(Path(run) / f"training-{step}.safetensors", tensors, step=step)
        save_tensors(Path(run) / "model.safetensors", weights, step=step)
        saves = training_saves(run)
        kept = [number for number in saves if number <= step][:keep]  # later ones were found damaged
        for number in saves.keys() - kept:
            saves[number].unlink()
    except OSError as error:
        good = next(iter(training_saves(run).values()), "none")
        message = f"step {step} could not be saved: {error}. The last good save: {good}. Make room on the disk"
        if last:
            raise OSError(f"{message}, then go on with --resume.") from error
        print(f"WARNING: {message}; training goes on.", file=sys.stderr, flush=True)


def newest_intact_save(saves):
    """Return (step, tensors) of the newest of `training_saves` that is not damaged. Raise ValueError when all are."""
    for step, path in saves.items():
        try:
            return step, load_tensors(path)[0]
        except ValueError as error:
            print(f"WARNING: {error}. Trying the save before it.", file=sys.stderr, flush=True)
    raise ValueError(f"every save is damaged: {', '.join(map(str, saves.values()))}. Train again, with another --out.")


def restore_training(run, module, optimizer, average=None):
    """Load weights, optimizer and moving average of the newest intact save; return how many updates it has seen.

    The first process chooses the save. Raise ValueError when all are damaged.
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    step, tensors = newest_intact_save(training_saves(run)) if main else (0, None)
    step = broadcast_object(step)
    path = Path(run) / f"training-{step}.safetensors"
    if not main:
        tensors, _ = load_tensors(path)
    moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    averages = {name: tensors.pop(name) for name in list(tensors) if name.startswith("average.")}
    load_trainable(module, tensors, path)
    load_optimizer(optimizer, moments)
    for name, tensor in averages.items():
        average.tensors[name.removeprefix("average.")].copy_(tensor)
    return step
