"""Draw the curves of a run: losses, latent codes, held-out error, success in simulators, learning rate.

    python curves.py runs/NAME       # of a finished run, one that still trains, or one that was interrupted

The picture is RUN/curves.png; train.py ends with it. Everything is read from log.jsonl and config.json.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from files import read_json

PANELS = {  # what the log calls it -> title
    "action_loss": "loss of the actions",
    "latent_loss": "loss of the latent actions",
    "latent_accuracy": "latent codes predicted right, %",
    "val_action_l1": "error of normalised actions on held-out episodes",
    "success": "success in simulators, %, with 95 % interval",
    "lr": "learning rate",
}
PERCENT = ("latent_accuracy", "success")
LOSSES = ("action_loss", "latent_loss")
SHARE = 50  # a smoothed value is the mean over one SHARE-th of the updates


@dataclass
class Config:
    """Settings of `python curves.py`."""

    run: tyro.conf.Positional[Path]
    """folder of a run of train.py"""


def read_log(run):
    """Return the entries of a run's log.jsonl, without an unfinished last line. Raise ValueError for other faults."""
    path = Path(run) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # of a run that was interrupted, or still trains
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def smooth(values, window):
    """Return the mean of the finite ones of `window` values around each; NaN where there are none. values: [T]."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    with np.errstate(invalid="ignore"):
        return np.convolve(np.where(finite, values, 0), ones, "same") / np.convolve(finite, ones, "same")


def draw_curves(run):
    """Draw RUN/curves.png and return its path. Raise ValueError when the log has no entry yet."""
    from matplotlib.figure import Figure  # slow to import

    entries = read_log(run)
    if not entries:
        raise ValueError(f"{run}/log.jsonl has no entry yet")
    updates = 1 + max(entry["step"] for entry in entries)
    names = [name for name in PANELS if any(name in entry for entry in entries)]
    columns = 2 if len(names) in (1, 2, 4) else 3
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(cells, names):
        draw_panel(axes, name, [entry for entry in entries if name in entry])
        axes.set_xlim(0, updates)
    for axes in cells[len(names) :]:
        axes.remove()
    figure.suptitle(describe(read_json(Path(run) / "config.json")["train"], updates))
    path = Path(run) / "curves.png"
    figure.savefig(path, dpi=100)
    return path


def draw_panel(axes, name, entries):
    """Draw one quantity over the updates; what is logged at each one faint and smoothed, what is measured as points.

    entries: those of the log that have it.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    factor = 100 if name in PERCENT else 1
    values = factor * np.array([entry[name] for entry in entries], float)
    steps = 1 + np.array([entry["step"] for entry in entries])
    if name == "success":
        steps = [entry["success_step"] for entry in entries]
        low, high = (factor * np.array([entry[f"success_{end}"] for entry in entries]) for end in ("low", "high"))
        errors = np.clip([values - low, high - values], 0, None)
        axes.errorbar(steps, values, errors, fmt="o-", capsize=3, clip_on=False)
    elif name == "val_action_l1":
        axes.plot(steps, values, "o-", clip_on=False)
    elif name == "lr":
        axes.plot(steps, values)
    elif len(values) < 2 * SHARE:
        axes.plot(steps, values, ".-")
    else:
        window = len(values) // SHARE
        axes.plot(steps, values, linewidth=0.5, alpha=0.3, label="each update")
        axes.plot(steps, smooth(values, window), color="C0", label=f"mean of {window}")
        axes.legend(fontsize=8, frameon=False)
    if name in LOSSES and values.max() > 4 * values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 100 if name in PERCENT else None)
    axes.set_title(PANELS[name], fontsize=10)
    axes.set_xlabel("updates", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.3, which="both")


def describe(settings, updates):
    """Return the title of a picture. settings: of train.py, as config.json has them."""
    data = ", ".join(Path(path).name for path in settings["data"])
    return f"{settings['variant']} on {data}, {updates} updates of {settings['global_batch_size']} samples"


if __name__ == "__main__":
    print(f"curves: {draw_curves(tyro.cli(Config, description=__doc__).run)}")
