"""Make the README's table of results: train every variant with several seeds, evaluate, run the controls, print.

    python tests/table.py --out runs/table                # five variants, three seeds, all controls
    python tests/table.py --out runs/table --print-only   # the table of what is there so far

What is there already is not done again, and an interrupted training or evaluation goes on, so the same command can be
started as often as needed. Differences are paired by seed and start. What is missing is said in the table itself.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import VARIANTS
from results import markdown_table, mcnemar, paired_difference, read_trials, trial_key, wilson

ROOT = Path(__file__).resolve().parents[1]
CONTROLS = {  # column -> flags of eval.py
    "blind": ("--blind",),
    "main black": ("--black-camera", "image"),
    "wrist black": ("--black-camera", "wrist_image"),
    "swapped": ("--swap-cameras",),
    "mute": ("--mute",),
}


@dataclass
class Config:
    out: Path
    """folder of the runs, one for each variant and seed, and of table.md"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """variants, the one that the others are compared with first"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of training"""
    trials: int = 50
    """trials of each task"""
    control_seeds: tuple[int, ...] = (0,)
    """seeds whose runs are evaluated with the controls too"""
    control_trials: int = 10
    """trials of each task and control"""
    train: str = ""
    """more options of train.py, as one text"""
    jobs: int = 1
    """runs that are trained and evaluated side by side, each on its share of the cores"""
    print_only: bool = False
    """print the table of what is there"""


# ----------------------------------------------------------------------------------------------------------------------
# Doing what is missing


def run_folder(config, variant, seed):
    """Return the folder of a run."""
    return config.out / f"{variant}-{seed}"


def cores(config):
    """Return the number of cores of one run."""
    return max(1, len(os.sched_getaffinity(0)) // config.jobs)


def train(config, variant, seed):
    """Train one run on its cores, or go on with it; nothing if it is finished."""
    folder = run_folder(config, variant, seed)
    if (folder / "finished").exists():
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores(config))]
    options = ["--num-workers", "0"] if config.jobs > 1 else []
    options += ["--variant", variant, "--seed", str(seed), "--out", str(folder), "--resume", *shlex.split(config.train)]
    subprocess.run([*torchrun, "train.py", *options], cwd=ROOT, check=True)
    (folder / "finished").touch()


def result_file(folder, flags, trials):
    """Return the file of a run's trials with some flags of eval.py."""
    name = "-".join(flag.strip("-") for flag in flags) or "eval"
    return folder / f"table-{name}-{trials}.jsonl"


def evaluate(config, folder, flags, trials):
    """Play the trials of a run that are not in its result file, on its cores."""
    out = result_file(folder, flags, trials)
    if out.with_suffix(".json").exists():
        return
    command = [sys.executable, "eval.py", str(folder), "--trials", str(trials), "--out", str(out), *flags]
    subprocess.run([*command, "--envs", str(cores(config))], cwd=ROOT, check=True)


def make_run(config, variant, seed):
    """Train a run, evaluate it, and play the controls if its seed is one of theirs."""
    train(config, variant, seed)
    folder = run_folder(config, variant, seed)
    evaluate(config, folder, (), config.trials)
    if seed in config.control_seeds:
        for flags in CONTROLS.values():
            evaluate(config, folder, flags, config.control_trials)


# ----------------------------------------------------------------------------------------------------------------------
# The table


def outcomes(config, variant, flags=(), trials=0, seeds=()):
    """Return {(training seed, start): success} of all finished evaluations of a variant."""
    found = {}
    for seed in seeds or config.seeds:
        path = result_file(run_folder(config, variant, seed), flags, trials or config.trials)
        if path.with_suffix(".json").exists():
            played = [trial for trial in read_trials(path) if trial["success"] is not None]
            found |= {(seed, trial_key(trial)): trial["success"] for trial in played}
    return found


def format_row(config, variant, reference):
    """Return the cells of a variant: success by seed, all, interval, difference to the reference, each control."""
    found = outcomes(config, variant)
    cells = []
    for seed in config.seeds:
        own = [success for (trained, _), success in found.items() if trained == seed]
        cells.append(f"{sum(own)}/{len(own)}" if own else "missing")
    count, episodes = sum(found.values()), len(found)
    low, high = wilson(count, episodes)
    cells.append(f"{count}/{episodes} = {count / episodes:.1%}" if episodes else "missing")
    cells.append(f"{100 * low:.1f} to {100 * high:.1f} %" if episodes else "")
    cells.append(format_difference(reference, found))
    for flags in CONTROLS.values():
        control = outcomes(config, variant, flags, config.control_trials, config.control_seeds)
        cells.append(f"{sum(control.values())}/{len(control)}" if control else "missing")
    return cells


def format_difference(reference, found):
    """Return the difference of two variants' success in points, on what both played; "" for the reference itself."""
    shared = sorted(reference.keys() & found.keys())
    if reference is found or reference == found or not shared:
        return ""
    first, second = ([played[key] for key in shared] for played in (reference, found))
    difference, low, high = (100 * value for value in paired_difference(first, second))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f}), p = {mcnemar(first, second):.2g}"


def commits(config):
    """Return the commits at which the runs were trained, sorted."""
    files = [run_folder(config, variant, seed) / "config.json" for variant in config.variants for seed in config.seeds]
    return sorted({json.loads(file.read_text())["commit"] for file in files if file.exists()})


def format_table(config):
    """Return the table as Markdown, and whether anything is missing."""
    reference = outcomes(config, config.variants[0])
    heads = [f"seed {seed}" for seed in config.seeds]
    heads += ["all", "95 % interval", f"minus {config.variants[0]} (points)", *CONTROLS]
    rows = [[f"`{variant}`", *format_row(config, variant, reference)] for variant in config.variants]
    missing = sum(cell == "missing" for row in rows for cell in row)
    lines = [markdown_table(["", *heads], rows), ""]
    lines.append(f"Trained at {', '.join(commits(config)) or 'no commit yet'}, on {os.cpu_count()} cores.")
    if missing:
        lines.append(f"INCOMPLETE: {missing} cells are missing.")
    return "\n".join(lines) + "\n", missing


def main(config):
    """Do what is missing and write the table; return the number of cells that are missing."""
    config.out = config.out.resolve()
    if not config.print_only:
        todo = [(variant, seed) for seed in config.seeds for variant in config.variants]
        with ThreadPoolExecutor(config.jobs) as pool:
            for done in [pool.submit(make_run, config, *run) for run in todo]:
                done.result()
    table, missing = format_table(config)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.md").write_text(table)
    print(table)
    return missing


if __name__ == "__main__":
    raise SystemExit(int(main(tyro.cli(Config, description=__doc__)) > 0))
