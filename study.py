"""When do latent actions help? Train and evaluate a table of runs, and report on it.

    python study.py variants --out runs/variants          # the README's table
    python study.py fewshot --out runs/fewshot            # what is missing is trained and played; then the report
    python study.py fewshot --out runs/fewshot --dry-run  # the cells, what they cost, and their plain commands
    python study.py fewshot --out runs/fewshot --shard 1/8            # every eighth cell, as in a SLURM array
    python study.py fewshot --out runs/fewshot --jobs 4               # four cells side by side
    python study.py fewshot --out runs/fewshot --data libero_goal --train="--backbone Qwen/Qwen3-VL-2B-Instruct"

A cell is one policy: its data, how many demonstrations keep their actions, what becomes of the others, the variant, and
a training seed. Its commands are those of train.py and eval.py, and it lies in a folder of its own, so any scheduler
may run the cells in any order; the same command again does what is missing. report.py analyses what is there.
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from data import open_dataset
from files import read_json, write_json
from index import split_episodes
from report import control_file, write_report
from results import shard
from tiny import SIZES

ROOT = Path(__file__).resolve().parent
LATENT = ("la_tok", "la_align", "la_direct", "la_cond")
TRIES = 2  # of a cell that crashes, in one call
CONTROLS = {  # what the policy is denied -> flags of eval.py
    "blind": ("--blind",),
    "main camera black": ("--black-camera", "image"),
    "wrist camera black": ("--black-camera", "wrist_image"),
    "cameras swapped": ("--swap-cameras",),
    "mute": ("--mute",),
}
CONTROL_TRIALS = 10  # starts of each task and control


@dataclass
class Config:
    """Settings of `python study.py`."""

    preset: tyro.conf.Positional[Literal["variants", "fewshot", "ablations", "joint", "long", "smoke"]]
    """the question: see `PRESETS`"""
    out: Path
    """folder of the cells and of the report"""
    data: tuple[Path, ...] = (Path("data/libero_tiny"),)
    """data sets of all cells"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds"""
    steps: int = 0
    """optimizer updates on actions (default: the preset's)"""
    trials: int = 0
    """starts of each task (default: the preset's)"""
    variants: tuple[str, ...] = ()
    """only these variants"""
    train: str = ""
    """more options of train.py for all cells, in one text: --train="--num-workers 4" """
    evaluate: str = ""
    """more options of eval.py for all cells, as one text"""
    launch: str = ""
    """what starts train.py (default: this Python; on GPUs --launch="torchrun --standalone --nproc-per-node 8")"""
    jobs: int = 1
    """cells side by side, each on its share of the cores"""
    shard: str = ""
    """i/n: only every n-th cell, beginning with the i-th (from 1)"""
    dry_run: bool = False
    """print the cells and their commands, and do nothing"""
    report_only: bool = False
    """write the report of what is there, and do nothing else"""


@dataclass
class Cell:
    """One policy of a study."""

    group: dict
    """what it belongs to, without the seed: {"variant", ...}; cells of one group differ by their training seed"""
    seed: int
    """of training"""
    stages: list = field(default_factory=list)
    """options of train.py for each stage; a later one starts from the weights of the one before"""
    controls: tuple = ()
    """names of the `CONTROLS` that are played too"""

    @property
    def name(self):
        """The name of its folder."""
        return "-".join([*map(str, self.group.values()), f"seed{self.seed}"]).replace(", ", "_").replace(" ", "_")


@dataclass
class Preset:
    """A question: which cells answer it, and what the report compares."""

    question: str
    steps: int
    trials: int
    make: object  # function (config, steps) -> cells
    x: str = ""  # the part of a group on the chart's horizontal axis
    panels: str = ""  # the part of a group that gets a chart of its own
    baseline: dict = field(default_factory=dict)  # the parts of a group that make it the one to compare with
    controls: tuple = ()  # what the runs of the first seed are denied


# ----------------------------------------------------------------------------------------------------------------------
# The questions


def variants_of(config, known):
    """Return those of `known` that the config asks for."""
    return [variant for variant in known if not config.variants or variant in config.variants]


def training_demonstrations(config, seed):
    """Return (number of training episodes, number of instructions) of the study's data."""
    counts = [0, 0]
    for dataset in map(open_dataset, config.data):
        counts[0] += len(split_episodes(dataset, 0.05, seed)[0])  # --val-fraction's default
        counts[1] += len(dataset.instructions())
    return counts


def fewshot_cells(config, steps):
    """Return cells with 2, 5 or all demonstrations of each instruction labelled, and the others dropped, used as video
    beside the actions (half of each batch), or as video first.

    Joint training takes twice the updates, so that the actions get as many as alone; video first takes as many again.
    So the baseline is also trained twice as long, which shows what updates alone are worth. la_tok learns from actions
    alone, so video teaches it nothing.
    """
    episodes, instructions = training_demonstrations(config, config.seeds[0])
    cells = []
    for labelled in ("all", 5, 2):
        for rest in ("dropped", "joint", "first"):
            for variant in variants_of(config, ("baseline", *LATENT)):
                if rest != "dropped" and (labelled == "all" or variant in ("baseline", "la_tok")):
                    continue
                chosen = [] if labelled == "all" else ["--episodes", labelled]
                actions = ["--variant", variant, *chosen, "--max-steps", steps]
                stages = [actions]
                if rest == "joint":
                    share = labelled * instructions / (episodes - labelled * instructions)
                    stages = [[*actions[:-1], 2 * steps, "--rest", "video", "--rest-weight", round(share, 4)]]
                elif rest == "first":
                    first = ["--variant", variant, "--data-fraction", 0, "--rest", "video", "--max-steps", steps]
                    stages = [first, actions]
                number = round(episodes / instructions) if labelled == "all" else labelled
                cells.append(({"variant": variant, "rest": rest, "labelled": number}, stages))
                if variant == "baseline" and labelled != "all":
                    twice = [[*actions[:-1], 2 * steps]]
                    cells.append(({"variant": "baseline, twice as long", "rest": rest, "labelled": number}, twice))
    return cells


def ablation_cells(config, steps):
    """Return cells that change one thing about a variant on all demonstrations."""
    changes = {
        "baseline": {"as is": [], "32 placeholders": ["--placeholders-per-step", 4]},
        "la_tok": {"as is": [], "continuous": ["--continuous"]},
        "la_align": {
            "as is": [],
            "layer 1": ["--align-layer", 1],
            "last layer": ["--align-layer", SIZES["tiny"][0]["num_hidden_layers"]],
            "lambda 0.1": ["--latent-weight", 0.1],
            "quantised": ["--align-target", "quantised"],
        },
        "la_direct": {"as is": [], "continuous": ["--continuous"], "lambda 1": ["--latent-weight", 1.0]},
        "la_cond": {"as is": [], "continuous": ["--continuous"], "lambda 1": ["--latent-weight", 1.0]},
    }
    if "--backbone" in config.train:
        del changes["la_align"]["last layer"]  # which is another number there
    return [
        ({"variant": variant, "change": change}, [["--variant", variant, "--max-steps", steps, *options]])
        for variant in variants_of(config, changes)
        for change, options in changes[variant].items()
    ]


def joint_cells(config, steps):
    """Return cells that train all instructions of the data together, and each alone with its share of the updates."""
    texts = sorted({text for path in config.data for text in open_dataset(path).instructions()})
    cells = []
    for variant in variants_of(config, ("baseline", *LATENT)):
        cells.append(({"variant": variant, "trained": "together"}, [["--variant", variant, "--max-steps", steps]]))
        for text in texts:
            alone = ["--variant", variant, "--max-steps", steps // len(texts), "--instructions", text]
            cells.append(({"variant": variant, "trained": f"{text} alone"}, [alone]))
    return cells


def variant_cells(config, steps):
    """Return cells that train each variant on the data as it is."""
    return [
        ({"variant": variant}, [["--variant", variant, "--max-steps", steps]])
        for variant in variants_of(config, ("baseline", *LATENT))
    ]


def smoke_cells(config, steps):
    """Return two cells that take a minute."""
    return [
        ({"variant": variant, "labelled": 2}, [["--variant", variant, "--episodes", 2, "--max-steps", steps]])
        for variant in variants_of(config, ("baseline", "la_direct"))
    ]


PRESETS = {
    "variants": Preset(
        "What does each variant reach when all demonstrations have actions?",
        6000,
        50,
        variant_cells,
        baseline={"variant": "baseline"},
        controls=tuple(CONTROLS),
    ),
    "fewshot": Preset(
        "Few demonstrations with actions, many without: do latent actions learn from the others?",
        6000,
        20,
        fewshot_cells,
        "labelled",
        "rest",
        {"variant": "baseline", "rest": "dropped"},
    ),
    "ablations": Preset(
        "Which parts of a variant matter?", 6000, 20, ablation_cells, "", "variant", {"change": "as is"}
    ),
    "joint": Preset(
        "Does a task lose by being trained with others, and with which variant not?",
        6000,
        20,
        joint_cells,
        panels="variant",
        baseline={"trained": "together"},
    ),
    "long": Preset("Do latent actions help in long tasks?", 9500, 20, variant_cells, baseline={"variant": "baseline"}),
    "smoke": Preset("Does study.py work?", 2, 1, smoke_cells, "labelled", baseline={"variant": "baseline"}),
}


def make_cells(config):
    """Return the cells of the config's shard, in the order in which they run: all groups of a seed, then the next."""
    preset = PRESETS[config.preset]
    cells = [
        Cell(
            group,
            seed,
            [[str(word) for word in [*stage, "--seed", seed]] for stage in stages],
            preset.controls if seed == config.seeds[0] else (),
        )
        for seed in config.seeds
        for group, stages in preset.make(config, config.steps or preset.steps)
    ]
    return [cell for chain in shard(chains(cells), config.shard) for cell in chain]


def chains(cells):
    """Return lists of cells that must run one after another: those that share their first stages, others alone."""
    found = {}
    for cell in cells:
        shared = str(cell.stages[:-1]) if len(cell.stages) > 1 else cell.name
        found.setdefault(shared, []).append(cell)
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------------------
# Running them


def cell_folder(config, cell):
    """Return the folder of a cell."""
    return config.out / cell.name


def commands(config, cell):
    """Return the commands of a cell, lists of words: train.py for each stage, then eval.py, also for each control.

    A first stage lies in a folder named by its options, which all cells that begin with it share.
    """
    folder = cell_folder(config, cell)
    trials = config.trials or PRESETS[config.preset].trials
    launch = shlex.split(config.launch) or [sys.executable]
    firsts = ["-".join(word.lstrip("-") for word in stage) for stage in cell.stages[:-1]]
    runs = [*(str(config.out / "first" / name) for name in firsts), str(folder / "run")]
    made = []
    for number, (stage, run) in enumerate(zip(cell.stages, runs)):
        before = ["--init-from", runs[number - 1]] if number else []
        data = ["--data", *map(str, config.data)]
        made.append([*launch, "train.py", *stage, *data, *shlex.split(config.train), "--out", run, "--resume", *before])
    play = [sys.executable, "eval.py", runs[-1], *shlex.split(config.evaluate)]
    made.append([*play, "--trials", str(trials), "--out", str(folder / "eval.jsonl")])
    for name in cell.controls:
        out = str(control_file(folder, name))
        made.append([*play, "--trials", str(CONTROL_TRIALS), "--out", out, *CONTROLS[name]])
    return made


def finished(config, cell):
    """Return whether a cell has been trained and played with as many trials as are wanted."""
    path = cell_folder(config, cell) / "cell.json"
    return path.exists() and read_json(path)["commands"] == plain(config, cell)


def plain(config, cell):
    """Return a cell's commands as text."""
    return [shlex.join(words) for words in commands(config, cell)]


def run_cell(config, cell):
    """Train and play a cell, going on where it was interrupted; return "" or what went wrong."""
    folder = cell_folder(config, cell)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with open(folder / "output.txt", "a") as output:
        for words in commands(config, cell):
            print(shlex.join(words), file=output, flush=True)
            done = subprocess.run(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                return f"{words[1]} ended with status {done.returncode}; see {folder / 'output.txt'}"
    record = {"group": cell.group, "seed": cell.seed, "commands": plain(config, cell), "seconds": time.time() - started}
    write_json(folder / "cell.json", record)
    return ""


def run_cells(config, cells):
    """Run the cells that are missing, `jobs` at a time; return {name: what went wrong} of those that failed."""
    todo = [cell for cell in cells if not finished(config, cell)]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already")
    failed = {}
    began, done = time.time(), 0

    def run(cell):
        nonlocal done
        for _ in range(TRIES):
            if not (fault := run_cell(config, cell)):
                break
        if fault:
            failed[cell.name] = fault
        done += 1
        left = (time.time() - began) / done * (len(todo) - done)
        print(f"{done} of {len(todo)}: {cell.name}: {fault or 'done'}; about {left / 60:.0f} minutes left", flush=True)

    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[number :: config.jobs] or cores for number in range(config.jobs)]
    with ThreadPoolExecutor(config.jobs, initializer=lambda: os.sched_setaffinity(0, shares.pop())) as pool:
        list(pool.map(lambda chain: [run(cell) for cell in chain], chains(todo)))  # on the thread's cores
    return failed


def print_plan(config, cells):
    """Print the cells, which are there, how many updates and episodes they cost, and their commands."""
    updates = {}  # of each training that is to do
    for cell in cells:
        there = finished(config, cell)
        print(f"{cell.name}:{' (there)' if there else ''}")
        for words in commands(config, cell):
            print(f"    {shlex.join(words)}")
            if "--max-steps" in words and not there:
                updates[shlex.join(words)] = int(words[words.index("--max-steps") + 1])
    todo = sum(not finished(config, cell) for cell in cells)
    trials = config.trials or PRESETS[config.preset].trials
    print(f"{todo} of {len(cells)} cells to do: {sum(updates.values())} updates, {todo * trials} episodes of each task")


def check_config(config):
    """Raise ValueError naming the setting and the value of what cannot work, or would make cells what they are not."""
    own = {"--max-steps", "--seed", "--seeds", "--out", "--variant", "--data", "--resume", "--init-from", "--trials"}
    for name in ("train", "evaluate"):
        words = {word.partition("=")[0] for word in shlex.split(getattr(config, name))}
        if taken := words & own:
            raise ValueError(f"{name} has {', '.join(sorted(taken))}, which the cells set themselves; see --help")
    if unknown := set(config.variants) - {"baseline", *LATENT}:
        raise ValueError(f"variants has {', '.join(sorted(unknown))}; there are baseline, {', '.join(LATENT)}")
    if len(set(config.seeds)) < len(config.seeds) or not config.seeds:
        raise ValueError(f"seeds are {list(config.seeds)}; give some, each once")
    if config.jobs < 1:
        raise ValueError(f"jobs is {config.jobs}; it must be at least 1")


def main(config):
    """Run a study's missing cells and write its report; return the number of cells that failed."""
    check_config(config)
    config.out = config.out.resolve()
    cells = make_cells(config)
    if config.dry_run:
        print_plan(config, cells)
        return 0
    failed = {} if config.report_only else run_cells(config, cells)
    everything = make_cells(replace(config, shard=""))
    cells = [(cell.group, cell.seed, cell_folder(config, cell), finished(config, cell)) for cell in everything]
    write_report(config.out, PRESETS[config.preset], cells, failed)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(int(main(tyro.cli(Config, description=__doc__)) > 0))
