"""What a study can see: how often simulated studies like `fewshot` find a true difference (docs/study.md).

    python tests/power.py

Outcomes are drawn for 60 starts and each training seed, of a baseline and of 11 other groups, of which three are
better; then the report's own analysis is applied.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import difference_interval, holm, pool_scatter  # noqa: E402

STUDIES, STARTS, OTHERS, BETTER = 300, 60, 11, 3
BASELINE = 0.45  # success
SEED_SCATTER, START_SCATTER = 0.11, 0.2  # standard deviations of success, as in docs/studies/fewshot


def simulate(seeds, gain, rng):
    """Return the shares of true differences with p < 0.05 before and after Holm's correction, and that of studies in
    which it leaves a false one."""
    found, corrected, false = [], [], []
    for _ in range(STUDIES):
        rates = BASELINE + gain * (np.arange(1 + OTHERS) >= 1 + OTHERS - BETTER)
        chances = rates[:, None, None] + SEED_SCATTER * rng.normal(size=(1 + OTHERS, seeds, 1))
        chances = chances + START_SCATTER * rng.normal(size=STARTS)
        baseline, *others = (rng.uniform(size=chances.shape) < chances).astype(float)  # each [seeds, STARTS]
        scatter = pool_scatter([each - baseline for each in others], [0] * OTHERS)
        values = [difference_interval(baseline, each, scatter)[3] for each in others]
        after = holm(values, OTHERS)
        found += [p < 0.05 for p in values[-BETTER:]]
        corrected += [p < 0.05 for p in after[-BETTER:]]
        false.append(any(p < 0.05 for p in after[:-BETTER]))
    return np.mean(found), np.mean(corrected), np.mean(false)


def main():
    """Print the table."""
    rng = np.random.default_rng(0)
    print("| seeds | difference | p < 0.05 | after Holm's correction | any false one after it |")
    print("| --- | --- | --- | --- | --- |")
    for seeds in (3, 5, 10):
        for gain in (0.1, 0.2, 0.3):
            shares = " | ".join(f"{100 * share:.0f} %" for share in simulate(seeds, gain, rng))
            print(f"| {seeds} | {100 * gain:.0f} points | {shares} |", flush=True)


if __name__ == "__main__":
    main()
