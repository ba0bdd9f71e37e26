"""What a study can see: how often simulated studies like `fewshot` find a true difference (docs/study.md).

    python tests/power.py

Outcomes are drawn for 60 starts and each training seed, of a baseline and of 11 other groups, of which three are
better, with the scatter of the committed cells with 5 labelled demonstrations; then the report's own analysis is
applied.

Axes: G groups, S training seeds, N starts.
"""

import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import read_json  # noqa: E402
from report import difference_interval, holm, mean_squares, pool_scatter  # noqa: E402

STUDIES, BETTER = 300, 3


class Scatter(NamedTuple):
    """Standard deviations of success, beyond that of single outcomes."""

    own_seeds: float
    """of one group"""
    shared_seeds: float
    """of all groups alike: the same demonstrations keep their actions"""
    own_starts: float
    """of one group"""
    shared_starts: float
    """of all groups alike: some starts are hard"""


def find_scatter(tables):
    """Return the `Scatter` of outcomes f64 [G, S, N], by moments; 0 where the estimate is negative.

    What all groups have alike cancels in differences between two of them.
    """
    whole = np.mean([_variances(table) for table in tables], 0)
    own = np.mean([_variances(first - second) / 2 for first, second in combinations(tables, 2)], 0)
    variances = np.column_stack([own, whole - own]).ravel()
    return Scatter(*np.sqrt(np.maximum(variances, 0)))


def _variances(table):
    """Return the variances [2] of seeds and of starts of a table f64 [S, N]."""
    of_seeds, of_starts, rest = mean_squares(table)
    return np.array([(of_seeds - rest) / table.shape[1], (of_starts - rest) / table.shape[0]])


def simulate(scatter, shape, baseline, gain, rng):
    """Return the shares of true differences with p < 0.05 before and after Holm's correction, and that of studies in
    which it leaves a false one.

    shape: G, the baseline included, S and N; baseline: its success; gain: what BETTER of the others have more.
    """
    groups, seeds, starts = shape
    found, corrected, false = [], [], []
    for _ in range(STUDIES):
        chances = baseline + gain * (np.arange(groups) >= groups - BETTER)[:, None, None]
        for deviation, size in zip(scatter, ((groups, seeds, 1), (1, seeds, 1), (groups, 1, starts), (1, 1, starts))):
            chances = chances + deviation * rng.normal(size=size)
        reference, *others = (rng.uniform(size=shape) < chances).astype(float)  # each [S, N]
        pooled = pool_scatter([each - reference for each in others], ["baseline"] * len(others))
        values = [difference_interval(reference, each, pooled)[3] for each in others]
        after = holm(values, len(others))
        found += [p < 0.05 for p in values[-BETTER:]]
        corrected += [p < 0.05 for p in after[-BETTER:]]
        false.append(any(p < 0.05 for p in after[:-BETTER]))
    return np.mean(found), np.mean(corrected), np.mean(false)


def main():
    """Print the scatter that was found, and the table."""
    cells = {}
    for path in sorted((ROOT / "docs/studies/fewshot/cells").glob("*-5-seed*.json")):
        cell = read_json(path)
        outcomes = [success for _, success in sorted(cell["played"]["trials"].items())]
        cells.setdefault(tuple(cell["group"].values()), []).append(outcomes)
    tables = np.array(list(cells.values()), float)
    scatter = find_scatter(tables)
    baseline = np.mean(cells["baseline", "dropped", 5])
    shown = ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in scatter._asdict().items())
    print(f"{len(tables)} groups, {tables.shape[1]} seeds; baseline {100 * baseline:.0f} %; points: {shown}\n")
    print("| seeds | difference | p < 0.05 | after Holm's correction | any false one after it |")
    print("| --- | --- | --- | --- | --- |")
    rng = np.random.default_rng(0)
    for seeds in (3, 5, 10):
        for gain in (0.1, 0.2, 0.3):
            shape = len(tables), seeds, tables.shape[2]
            shares = " | ".join(f"{100 * share:.0f} %" for share in simulate(scatter, shape, baseline, gain, rng))
            print(f"| {seeds} | {100 * gain:.0f} points | {shares} |", flush=True)


if __name__ == "__main__":
    main()
