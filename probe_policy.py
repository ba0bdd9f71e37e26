"""Measure what trained policies know: errors on their own and on other demonstrations, linear probes of their states.

    python probe_policy.py runs/fewshot/*-5-seed0/run     # a table with a row for each run
    python probe_policy.py RUN --labels data/libero_tiny/labels.safetensors     # and of what its labels say

    L1               mean absolute error of the predicted chunk, in normalised actions: on the episodes whose actions
                     the run was trained on, and on all other episodes of its data.
    R2 of actions    how well ridge regression predicts the mean of the next chunk's actions, as of probe.py, from the
                     mean over the placeholders of the states that the latent loss reads (the baseline: of the last
                     layer). It is fitted on the episodes with actions and measured on the others.
    R2 of the way    the same for the sum of the actions until the gripper next changes: where the object lies that will
                     be grasped, or the place where it is put. Steps after the last change are left out.

Numbers are means over the first three dimensions, x, y and z of an arm that is moved by differences. The seed of the
run decides which episodes had actions, so only runs of one seed and one number of labels are measured on the same. Of a
run that had all actions, the others are its held-out episodes. Leaves out runs on several data sets.

Axes: n steps, B batch, Q placeholders, D width of a state, A action size, d inputs of a regression.
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
from files import read_json
from index import CACHE, episode_steps, split_episodes
from policy import load_vla
from prepare import choose_labelled
from probe import episodes_of, mean_actions, probe
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
    """label file, whose vectors and codes are probed on the first run's episodes"""
    cache: Path = CACHE
    """where indices are kept"""


def split_of_run(settings, dataset):
    """Return (episodes whose actions a run was trained on, all others). settings: "train" of its config.json"""
    training, _ = split_episodes(dataset, settings["val_fraction"], settings["seed"])
    if settings["instructions"]:
        training = training[[dataset.instruction(dataset.starts[e]) in settings["instructions"] for e in training]]
    labelled, _ = choose_labelled(SimpleNamespace(**settings), dataset, training)
    return labelled, np.setdiff1d(np.arange(dataset.num_episodes), labelled)


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


@torch.no_grad()
def run_policy(vla, samples, steps):
    """Return (absolute errors of the chunks and the numbers of their values f64 [n, 2], states f64 [n, D]) at `steps`.

    The states are means over the placeholders. samples: `ActionChunks` of one source.
    """
    device = vla.queries.device
    errors, states = [], []
    for start in range(0, len(steps), BATCH):
        batch = default_collate([samples.sample(0, step) for step in steps[start : start + BATCH]])
        batch = to_device(batch, device)
        actions, placeholders = vla.predict(batch)
        counted = batch["valid"][:, :, None].expand_as(actions).double()  # [B, H, A]
        error = (actions - batch["actions"]).abs() * counted
        errors.append(torch.stack([error.sum((1, 2)), counted.sum((1, 2))], 1).cpu())
        states.append(placeholders.double().mean(1).cpu())
    return torch.cat(errors).numpy(), torch.cat(states).numpy()


def probe_states(states, targets, split):
    """Return the mean R2 of each target over its first dimensions.

    states: [S, d], of all steps; targets: {name: (values f64 [S, A], whether a step has one bool [S], episodes i64
    [S])}; split: (episodes to fit on, episodes to measure on).
    """
    found = {}
    for name, (values, known, episodes) in targets.items():
        found[name] = float(np.mean(probe(states[known], values[known, :MOVED], episodes[known], *split)))
    return found


def probe_targets(dataset, chunk):
    """Return the targets of `probe_states` of a data set with actions and grippers; ValueError for another."""
    if not dataset.spec.grippers:
        raise ValueError(f"{dataset.name}, as described by {dataset.source}, has no gripper, whose changes are probed")
    steps = np.arange(len(dataset))
    episodes = episodes_of(dataset, steps)
    way, changes = way_to_change(dataset)
    return {
        "R2 of actions": (mean_actions(dataset, steps, chunk), np.ones(len(steps), bool), episodes),
        "R2 of the way": (way, changes, episodes),
    }


def probe_run(run, dataset):
    """Return a row of the table, {head: text}, of a run on its data set. Raise ValueError when it had other data."""
    vla, content = load_vla(run)
    entry = content["data"][0]
    if len(content["data"]) > 1 or entry["fingerprint"] != dataset.fingerprint:
        names = ", ".join(part["name"] for part in content["data"])
        raise ValueError(f"{run} was trained on {names}, not on {dataset.directory} alone; name its data with --data")
    vla = vla.to(init_distributed().device)
    samples = ActionChunks([dataset], [list(entry["cameras"])], content["model"]["chunk"])
    split = split_of_run(content["train"], dataset)
    errors, states = run_policy(vla, samples, np.arange(len(dataset)))
    sums = [errors[episode_steps(dataset, part)].sum(0) for part in split]
    own, others = (total / count for total, count in sums)
    row = {"run": str(run), "variant": content["model"]["variant"], "episodes with actions": str(len(split[0]))}
    row |= {"L1 on them": f"{own:.4f}", "on others": f"{others:.4f}"}
    found = probe_states(states, probe_targets(dataset, content["model"]["chunk"]), split)
    return row | {name: f"{r2:.2f}" for name, r2 in found.items()}


def probe_labels(path, run, dataset):
    """Return rows of the table for the vectors and the codes of a label file, on the episodes of a run."""
    content = read_json(run / "config.json")
    labels = load_labels(dataset, path)
    if labels is None:
        raise ValueError(f"there is no label file {path}")
    steps = np.arange(len(dataset))
    codes = labels.codes[steps].astype(np.int64)  # [S, P]
    inputs = {
        "vectors": labels.vectors[steps].astype(np.float64).reshape(len(steps), -1),
        "codes": np.eye(labels.num_codes)[codes].reshape(len(steps), -1),
    }
    targets = probe_targets(dataset, content["model"]["chunk"])
    split = split_of_run(content["train"], dataset)
    return [
        {"run": f"{name} of {path}"} | {key: f"{r2:.2f}" for key, r2 in probe_states(x, targets, split).items()}
        for name, x in inputs.items()
    ]


def main(config):
    """Print the table, and return its rows."""
    if not config.runs:
        raise ValueError("name at least one run")
    rows = []
    for run in config.runs:
        content = read_json(run / "config.json")
        dataset = open_dataset(config.data or Path(content["train"]["data"][0]), config.cache)
        rows.append(probe_run(run, dataset))
        if config.labels and run == config.runs[0]:
            rows += probe_labels(config.labels, run, dataset)
    heads = list(rows[0])
    print(markdown_table(heads, [[row.get(head, "") for head in heads] for row in rows]))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
