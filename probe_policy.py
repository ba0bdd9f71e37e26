"""Measure what trained policies know: errors on their own and on other demonstrations, linear probes of their states.

    python probe_policy.py runs/fewshot/*-5-seed0/run     # a table with a row for each run
    python probe_policy.py RUN --labels data/libero_tiny/labels.safetensors     # and of what these labels say

    L1             mean absolute error of the predicted chunk, in normalised actions: on the training episodes whose
                   actions the run had, on those whose actions it had not, and on the held-out ones.
    R2 of actions  what the placeholders' states know of the next actions, the mean over the chunk.
    R2 of the way  what they know of the way that is left until the gripper next closes or opens, the sum of the actions
                   until then; steps after the last time are left out.

R2 is that of a ridge regression, as of probe.py, fitted on the episodes with actions and measured on all others; that
of labels is the mean of a five-fold cross-validation over all episodes. Much of both is known without the
images, because the episodes of a task are alike. So a first regression predicts it from the instruction, the gripper's
command and the number of the step (and its square), and R2 is the share of what that leaves which the states predict:
where things lie. The states are those of the last layer, averaged over all placeholders.

Numbers are means over the first three dimensions, x, y and z of an arm that is moved by differences. The seed of a run
decides which episodes had actions, so only runs of one seed and one number of labels are measured on the same. Episodes
without actions were seen where they were trained on as video. What a run started from (--init-from) is not asked.
Leaves out runs on several data sets.

Axes: S steps of a data set, n steps, Q placeholders, D width of a state, A action size, d inputs of a regression.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from torch.utils.data import default_collate

from batches import ActionChunks
from common import init_distributed, to_device
from data import open_dataset
from files import saved_step
from index import CACHE, episode_steps, split_episodes
from normalise import statistics_hash
from policy import load_vla
from prepare import choose_instructions, choose_labelled
from probe import FOLDS, best_strengths, episodes_of, mean_actions, probe, ridge
from results import markdown_table
from targets import load_labels

BATCH = 64
MOVED = 3  # first dimensions of an action, which are probed: x, y, z


@dataclass
class Config:
    """Settings of `python probe_policy.py`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of train.py"""
    data: Path | None = None
    """their data set (default: where each run's was)"""
    labels: Path | None = None
    """label file of the first run's data, whose vectors and codes are probed"""
    cache: Path = CACHE
    """where indices are kept"""


# ----------------------------------------------------------------------------------------------------------------------
# A run and its data


@dataclass
class Run:
    """A trained policy and its data."""

    folder: Path
    vla: torch.nn.Module
    content: dict  # of config.json
    dataset: object
    own: np.ndarray  # training episodes whose actions it had
    rest: np.ndarray  # training episodes whose actions it had not
    held_out: np.ndarray  # episodes of its instructions that it never saw


def open_run(folder, config):
    """Return the `Run` in a folder. Raise FileNotFoundError or ValueError for one that cannot be probed."""
    vla, content = load_vla(folder)
    if len(content["data"]) > 1:
        names = ", ".join(entry["name"] for entry in content["data"])
        raise ValueError(f"{folder} was trained on {names}; only runs on one data set can be probed")
    settings, (entry,) = content["train"], content["data"]
    path = config.data or Path(settings["data"][0])
    dataset = open_dataset(path, config.cache, *settings["spec"])
    if dataset.fingerprint != entry["fingerprint"]:
        raise ValueError(f"{folder} was trained on a different {entry['name']} than {path}; name its data with --data")
    if not dataset.action_size or not dataset.spec.grippers or set(range(MOVED)) & set(dataset.spec.absolute):
        raise ValueError(f"{path}, as described by {dataset.source}, is no arm that is moved by differences to grasp")
    if statistics_hash(dataset.stats) != entry["statistics"]:
        raise ValueError(f"{folder} was trained with a different description of {path} than {dataset.source}")
    split = split_episodes(dataset, settings["val_fraction"], settings["seed"])
    if settings["instructions"]:
        (split,) = choose_instructions(settings["instructions"], [dataset], [split])
    training, held_out = split
    own, rest = choose_labelled(SimpleNamespace(**settings), dataset, training)
    if len(own) < 2 or not len(rest) + len(held_out):
        raise ValueError(
            f"{folder} had the actions of {len(own)} episodes of {dataset.num_episodes}; it takes 2 to fit on, and 1 "
            "to measure on"
        )
    return Run(folder, vla.to(init_distributed().device), content, dataset, own, rest, held_out)


@torch.no_grad()
def run_policy(run, steps):
    """Return (absolute errors of the chunks and the numbers of their values f64 [n, 2], states f64 [n, D]) at `steps`.

    The states are the last layer's, averaged over the placeholders.
    """
    run.vla.latent_layer = run.vla.backbone.layers  # whose states `predict` returns
    cameras = list(run.content["data"][0]["cameras"])
    samples = ActionChunks([run.dataset], [cameras], run.content["model"]["chunk"])
    errors, states = [], []
    for start in range(0, len(steps), BATCH):
        batch = default_collate([samples.sample(0, step) for step in steps[start : start + BATCH]])
        batch = to_device(batch, run.vla.queries.device)
        actions, placeholders = run.vla.predict(batch)
        counted = batch["valid"][:, :, None].expand_as(actions).double()  # [B, H, A]
        error = (actions - batch["actions"]).abs() * counted
        errors.append(torch.stack([error.sum((1, 2)), counted.sum((1, 2))], 1).cpu())
        states.append(placeholders.double().mean(1).cpu())
    return torch.cat(errors).numpy(), torch.cat(states).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Probes


def way_to_change(dataset):
    """Return (sum of the actions f64 [S, A] from each step until a gripper next changes, whether one does bool [S])."""
    actions = dataset.stored_action(slice(0, len(dataset))).astype(np.float64)
    opening = dataset.action(slice(0, len(dataset)))[:, [gripper.index for gripper in dataset.spec.grippers]] > 0.5
    last = set((dataset.starts[1:] - 1).tolist())  # steps of the episodes
    way = np.zeros_like(actions)
    changes = np.zeros(len(actions), bool)
    for step in reversed(range(len(actions))):
        if step in last:
            continue
        if (opening[step] != opening[step + 1]).any():
            changes[step], way[step] = True, actions[step]
        elif changes[step + 1]:
            changes[step], way[step] = True, way[step + 1] + actions[step]
    return way, changes


def known_without_images(dataset):
    """Return f64 [S, d]: instruction, the grippers' commands, step number and its square, and their products."""
    steps = np.arange(len(dataset))
    number = steps - dataset.starts[episodes_of(dataset, steps)]
    texts = list(dataset.instructions())
    words = np.eye(len(texts))[[texts.index(dataset.instruction(step)) for step in steps]]  # [S, instructions]
    opening = dataset.action(steps)[:, [gripper.index for gripper in dataset.spec.grippers]]
    parts = np.stack([np.ones(len(steps)), number, number**2], 1)
    parts = (parts[:, :, None] * np.concatenate([np.ones((len(steps), 1)), opening], 1)[:, None]).reshape(
        len(steps), -1
    )
    return (words[:, :, None] * parts[:, None]).reshape(len(steps), -1)


def residuals(x, y, episodes, fitted):
    """Return y f64 [n, A] minus what a ridge regression from x [n, d], fitted on the episodes `fitted`, says of it."""
    fit = np.isin(episodes, fitted)
    chosen = best_strengths(x[fit], y[fit], episodes[fit])
    return y - ridge(x[fit], y[fit])(x)[chosen, :, np.arange(y.shape[1])].T


def probe_targets(dataset, chunk):
    """Return {head: (what is to be known f64 [n, 3], `known_without_images` f64 [n, d], at which steps i64 [n])}."""
    steps = np.arange(len(dataset))
    way, changes = way_to_change(dataset)
    found = {
        "R2 of actions": (mean_actions(dataset, steps, chunk), steps),
        "R2 of the way": (way[changes], steps[changes]),
    }
    known = known_without_images(dataset)
    return {head: (values[:, :MOVED], known[at], at) for head, (values, at) in found.items()}


def probe_states(dataset, targets, states, fitted, measured):
    """Return {head: R2, the mean over the dimensions} of what is left of `probe_targets` from states [S, d].

    fitted, measured: episodes to fit on and to measure on.
    """
    found = {}
    for head, (values, known, at) in targets.items():
        episodes = episodes_of(dataset, at)
        left = residuals(known, values, episodes, fitted)
        found[head] = float(np.nanmean(probe(states[at], left, episodes, fitted, measured)))
    return found


def probe_run(run):
    """Return a row of the table, {head: text}."""
    errors, states = run_policy(run, np.arange(len(run.dataset)))
    row = {"run": str(run.folder), "variant": run.content["model"]["variant"]}
    row |= {"updates": str(saved_step(run.folder / "model.safetensors"))}
    for head, part in (("own", run.own), ("rest", run.rest), ("held out", run.held_out)):
        total, count = errors[episode_steps(run.dataset, part)].sum(0)
        row[f"L1 {head}"] = f"{total / count:.4f} ({len(part)})" if len(part) else ""
    others = np.concatenate([run.rest, run.held_out])
    targets = probe_targets(run.dataset, run.content["model"]["chunk"])
    found = probe_states(run.dataset, targets, states, run.own, others)
    return row | {head: f"{r2:.2f}" for head, r2 in found.items()}


def probe_labels(path, dataset, chunk):
    """Return rows of the table for the vectors and the codes of a label file, by cross-validation over all episodes."""
    if not path.exists():
        raise FileNotFoundError(f"there is no label file {path}")
    labels = load_labels(dataset, path)
    steps = np.arange(len(dataset))
    codes = labels.codes[steps].astype(np.int64)  # [S, P]
    inputs = {
        "vectors": labels.vectors[steps].astype(np.float64).reshape(len(steps), -1),
        "codes": np.eye(labels.num_codes)[codes].reshape(len(steps), -1),
    }
    episodes = np.arange(dataset.num_episodes)
    targets = probe_targets(dataset, chunk)
    rows = []
    for name, x in inputs.items():
        folds = [
            probe_states(dataset, targets, x, episodes[episodes % FOLDS != fold], episodes[episodes % FOLDS == fold])
            for fold in range(FOLDS)
        ]
        means = {head: f"{np.mean([found[head] for found in folds]):.2f}" for head in folds[0]}
        rows.append({"run": f"{name} of {path}"} | means)
    return rows


def main(config):
    """Print the table, and return its rows."""
    if not config.runs:
        raise ValueError("name at least one run")
    rows, of_labels = [], []
    for folder in config.runs:  # one in memory at a time
        run = open_run(folder, config)
        rows.append(probe_run(run))
        if config.labels and not of_labels:
            of_labels = probe_labels(config.labels, run.dataset, run.content["model"]["chunk"])
    rows += of_labels
    heads = list(rows[0])
    print(markdown_table(heads, [[row.get(head, "") for head in heads] for row in rows]))
    print("\nL1: mean absolute error, in brackets the number of episodes")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
