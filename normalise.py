"""Standardised actions, the statistics of a data set, and normalisation to [-1, 1].

Implements OpenVLA's conventions for LIBERO (arXiv 2406.09246, `bounds_q99`): actions get a gripper in [0, 1] with
1 = open, statistics are taken over all steps of one data set, and the 1 % and 99 % quantiles map to -1 and 1.
Left out: normalisation by mean and standard deviation, and statistics over several data sets.

Axes: S steps of a data set, A action size, n size of an action or of the proprio.
"""

import hashlib
import json
import math

import numpy as np


def standardise(action):
    """Return stored actions [..., A] (gripper -1 open, +1 close) as f32 [..., A] with the gripper in [0, 1], 1 = open.

    OpenVLA does the same for LIBERO.
    """
    gripper = 1.0 - np.clip(action[..., -1:], 0.0, 1.0)
    return np.concatenate([action[..., :-1], gripper], axis=-1).astype(np.float32)


def to_robosuite(action):
    """Return standardised actions [..., A] as the simulator's f32 [..., A] (gripper -1 open, +1 close)."""
    gripper = -np.sign(2.0 * action[..., -1:] - 1.0)
    return np.concatenate([action[..., :-1], gripper], axis=-1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def statistics(index):
    """Return {"action": {...}, "proprio": {...}, "num_transitions", "num_trajectories"} over all steps.

    The layout is OpenVLA's: "action" and "proprio" hold mean, std, min, max, q01 and q99, lists of n numbers, and
    "action" a mask, False for the gripper, which is not normalised. Video without actions or states lacks these
    entries. Raises ValueError where an action or a state is not finite.
    """
    stats = {}
    if "action" in index.columns:
        _check_finite(index, "action")
        mask = [True] * (index.columns["action"].shape[1] - 1) + [False]
        stats["action"] = _column_statistics(standardise(index.columns["action"])) | {"mask": mask}
    if "state" in index.columns:
        _check_finite(index, "state")
        stats["proprio"] = _column_statistics(index.columns["state"])
    return stats | {"num_transitions": len(index), "num_trajectories": index.num_episodes}


def _column_statistics(x):
    x = np.asarray(x, np.float64)
    stats = {
        "mean": x.mean(0),
        "std": x.std(0),
        "min": x.min(0),
        "max": x.max(0),
        "q01": np.quantile(x, 0.01, 0),
        "q99": np.quantile(x, 0.99, 0),
    }
    return {name: values.tolist() for name, values in stats.items()}


def _check_finite(index, name):
    for fault in nonfinite_faults(index, name):
        raise ValueError(fault)


def nonfinite_faults(index, name):
    """Yield an error text for each episode in which column `name` holds a number that is not finite."""
    column = index.columns[name]
    flat = column.reshape(len(column), math.prod(column.shape[1:]))
    nonfinite = np.argwhere(~np.isfinite(flat))  # [n, 2] of (step, dimension)
    episodes = np.searchsorted(index.starts, nonfinite[:, 0], "right")
    for episode in np.unique(episodes):
        in_episode = nonfinite[episodes == episode]
        step, dimension = in_episode[0]
        file, place = index.locate(step)
        yield (
            f"{file}: {name} of {index.name} is {flat[step, dimension]} at {place}, dimension {dimension} "
            f"({len(in_episode)} such values in the episode). Repair or remove this episode."
        )


def statistics_hash(stats):
    """Return 16 hex digits of one data set's statistics, by which a run recognises its own."""
    return hashlib.sha256(json.dumps(stats, sort_keys=True).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation


def normalise(x, stats):
    """Return x [..., n] in physical units as f32 [..., n]: clip(2 (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1).

    stats: the "action" or the "proprio" entry of `statistics`. A constant dimension becomes 0; one that the mask leaves
    out stays as it is.
    """
    low, high, mask = _bounds(stats)
    scaled = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)
    scaled = np.where(np.equal(stats["min"], stats["max"]), 0.0, scaled)
    return np.where(mask, scaled, x).astype(np.float32)


def unnormalise(x, stats):
    """Return normalised x [..., n] as f32 [..., n] in physical units, the inverse of `normalise` inside its bounds."""
    low, high, mask = _bounds(stats)
    return np.where(mask, (x + 1) / 2 * (high - low + 1e-8) + low, x).astype(np.float32)


def _bounds(stats):
    """Return (q01, q99, mask), each [n]."""
    low = np.asarray(stats["q01"])
    high = np.asarray(stats["q99"])
    mask = np.asarray(stats.get("mask", np.ones(len(low), bool)))
    return low, high, mask
