"""Standardised actions, the statistics of a data set, and normalisation to [-1, 1].

Standardised means: grippers from 0 (closed) to 1 (open), everything else as stored. Statistics are taken over all steps
of one data set, in OpenVLA's layout (arXiv 2406.09246), and decide how actions and states are normalised.

Axes: S steps of a data set, A action size, n size of an action or of the proprio.
"""

import hashlib
import json

import numpy as np

from index import ROWS


def standardise(action, grippers):
    """Return stored actions [..., A] as f32 [..., A] with each gripper in [0, 1], 1 = open."""
    action = np.array(action, np.float32)
    for gripper in grippers:
        opening = (action[..., gripper.index] - gripper.closed) / (gripper.open - gripper.closed)
        action[..., gripper.index] = np.clip(opening, 0, 1) + 0.0  # not -0.0
    return action


def unstandardise(action, grippers):
    """Return standardised actions [..., A] in the convention of the data, f32 [..., A]."""
    action = np.array(action, np.float32)
    for gripper in grippers:
        action[..., gripper.index] = gripper.closed + action[..., gripper.index] * (gripper.open - gripper.closed)
    return action


def to_robosuite(action, grippers):
    """Return standardised actions [..., A] with robosuite's gripper command, f32 [..., A]: -1 open, 1 closed."""
    action = np.array(action, np.float32)
    for gripper in grippers:
        action[..., gripper.index] = np.where(action[..., gripper.index] > 0.5, -1, 1)
    return action


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def column_statistics(read, num_steps, size, normalisation="bounds_q99", unchanged=()):
    """Return {"mean", "std", "min", "max", "q01", "q99", "low", "high", "clip", "mask"} of a column f32 [S, n].

    read(slice of steps) -> [steps, n]; it is read in parts, so that memory does not grow with the data by more than one
    dimension. low and high are what normalisation maps to -1 and 1, and clip whether values beyond them are cut; mask
    is False for the dimensions of `unchanged`. bounds_q99 falls back to min and max for a dimension that moves although
    its quantiles (nearly) coincide: else a rare motion could never be output, and noise would become -1 or 1.
    """
    quantities = [_dimension_statistics(read, num_steps, dimension) for dimension in range(size)]
    names = ("mean", "std", "min", "max", "q01", "q99")
    stats = {name: [quantity[name] for quantity in quantities] for name in names}
    for quantity in quantities:
        quantity["low"], quantity["high"] = _bounds(quantity, normalisation)
    stats |= {name: [quantity[name] for quantity in quantities] for name in ("low", "high")}
    mask = [dimension not in unchanged for dimension in range(size)]
    return stats | {"clip": normalisation != "mean_std", "mask": mask}


def _dimension_statistics(read, num_steps, dimension):
    values = np.empty(num_steps, np.float32)
    for start in range(0, num_steps, ROWS):
        stop = min(start + ROWS, num_steps)
        values[start:stop] = read(slice(start, stop))[:, dimension]
    mean = float(values.mean(dtype=np.float64))
    parts = np.array_split(values, 1 + num_steps // ROWS)
    spread = sum(float(np.square(np.subtract(part, mean, dtype=np.float64)).sum()) for part in parts)
    low, high = _quantiles(values, (0.01, 0.99))
    extremes = {"min": float(values.min()), "max": float(values.max())}
    return {"mean": mean, "std": (spread / num_steps) ** 0.5, "q01": low, "q99": high} | extremes


def _quantiles(values, shares):
    """Return numpy's linearly interpolated quantiles of f32 [S] in f64, from a partition of f32."""
    found = []
    for share in shares:
        place = share * (len(values) - 1)
        below = int(place)
        pair = [below, min(below + 1, len(values) - 1)]
        values.partition(pair)
        first, second = values[pair].astype(np.float64)
        weight = place - below
        # as numpy computes it, from the nearer end
        found.append(
            float(second - (second - first) * (1 - weight) if weight >= 0.5 else first + (second - first) * weight)
        )
    return found


def _bounds(quantity, normalisation):
    """Return what a dimension's normalisation maps to -1 and to 1."""
    if normalisation == "mean_std":
        return quantity["mean"] - quantity["std"], quantity["mean"] + quantity["std"]
    low, high = quantity["q01"], quantity["q99"]
    if normalisation == "bounds" or _nearly_equal(low, high, quantity["min"], quantity["max"]):
        return quantity["min"], quantity["max"]
    return low, high


def _nearly_equal(q01, q99, smallest, largest):
    return q99 - q01 <= 1e-3 * (largest - smallest)


def rare_motions(stats):
    """Return the dimensions that move, but so rarely that bounds_q99 normalises them by min and max."""
    columns = zip(*(stats[name] for name in ("q01", "q99", "min", "max", "mask")))
    return [
        number
        for number, (q01, q99, smallest, largest, normalised) in enumerate(columns)
        if normalised and stats["clip"] and smallest < largest and _nearly_equal(q01, q99, smallest, largest)
    ]


def statistics_hash(stats):
    """Return 16 hex digits of one data set's statistics, by which a run recognises its own.

    Raise ValueError where these are no statistics at all.
    """
    if not isinstance(stats, dict):
        raise ValueError(f"{stats!r:.80} are no statistics of a data set. Put the run's own file back.")
    return hashlib.sha256(json.dumps(stats, sort_keys=True).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation


class Normaliser:
    """Maps numbers in physical units to what a model sees and back, by the statistics of one column.

    x -> 2 (x - low) / (high - low + 1e-8) - 1, clipped to [-1, 1] unless the statistics say otherwise. A dimension that
    is constant in the data becomes 0; one that the mask leaves out stays as it is.
    """

    def __init__(self, stats):
        """stats: the "action" or the "proprio" entry of a data set's statistics. Raise ValueError for other things."""
        try:
            self.low = np.array(stats["low"] if "low" in stats else stats["q01"], np.float64)
            self.range = np.array(stats["high"] if "high" in stats else stats["q99"], np.float64) - self.low + 1e-8
            self.mask = np.array(stats.get("mask", np.ones(len(self.low), bool)), bool)
            self.constant = np.equal(stats["min"], stats["max"], dtype=bool)
            self.clip = bool(stats.get("clip", True))
            low, high = self.low, self.low + self.range
            if not self.clip:
                low, high = (np.array(stats[name], np.float64) for name in ("min", "max"))
            # what training sees at least and at most, in physical units
            self.limits = np.where(self.mask, low, stats["min"]), np.where(self.mask, high, stats["max"])
            shapes = {array.shape for array in (self.low, self.range, self.mask, self.constant)}
            if self.low.ndim != 1 or len(shapes) > 1:
                raise ValueError("their sizes differ")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"these are no statistics of numbers: {error!r}. Put the run's own file back.") from error

    def normalise(self, x):
        """Return x [..., n] in physical units as f32 [..., n]."""
        scaled = 2 * (x - self.low) / self.range - 1
        if self.clip:
            scaled = np.clip(scaled, -1, 1)
        scaled = np.where(self.constant, 0.0, scaled)
        return np.where(self.mask, scaled, x).astype(np.float32)

    def unnormalise(self, x):
        """Return normalised x [..., n] as f32 [..., n] in physical units, the inverse inside the bounds."""
        return np.where(self.mask, (x + 1) / 2 * self.range + self.low, x).astype(np.float32)
