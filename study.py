"""When do latent actions help? Train and evaluate a table of runs, and report on it.

    python study.py variants --out runs/variants            # the README's table: trains and plays what is missing
    python study.py variants --out runs/variants --dry-run  # the cells, what they cost, and their commands
    python study.py variants --out runs/variants --shard 1/8           # every eighth cell, as in a SLURM array
    python study.py variants --out runs/variants --jobs 4              # four cells side by side
    python study.py fewshot --out runs/fewshot --train="--labels FILE"  # made without actions: docs/study.md
    python study.py long --out runs/long --data libero_10 --train="--backbone Qwen/Qwen3-VL-2B-Instruct"

A cell is one policy: its data, how many demonstrations keep their actions, what becomes of the others, the variant, and
a training seed. Its commands are those of train.py and eval.py, and it lies in a folder of its own, so any scheduler
may run the cells in any order; the same command again does what is missing. All that is known of a finished cell is in
one small file in OUT/cells, so studies of several machines are put together by copying those. report.py analyses them.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from threading import Event
from typing import Literal

import tyro

from data import open_index
from files import at_least, locked, make_folder, option_names, read_json, read_metadata, saved_step, write_json
from presets import CONTROL_FLAGS, IMAGE, LATENT, OF_TWO_CAMERAS, PRESETS, training_demonstrations, variants_of
from report import Played, learning_curve, outcomes, write_report
from results import read_trials, shard

ROOT = Path(__file__).resolve().parent
TRAIN = str(ROOT / "train.py")  # relative paths among the options are those of the caller's folder, so no change of it
TRIES = 2  # of a cell that crashes, in one call
CONTROL_TRIALS = 10  # starts of each task and control
DATA = Path("data/libero_tiny")
INTERRUPTED = "interrupted"  # what becomes of a cell after Ctrl-C or SIGTERM


@dataclass
class Config:
    """Settings of `python study.py`."""

    preset: tyro.conf.Positional[Literal[*PRESETS]]
    """the question: see `PRESETS`"""
    out: Path
    """folder of the cells and of the report"""
    data: tuple[Path, ...] = (DATA,)
    """data sets of all cells"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds"""
    steps: int = 0
    """optimizer updates of a cell, of both stages together (default: the preset's)"""
    trials: int = 0
    """starts of each task (default: the preset's)"""
    variants: tuple[str, ...] = ()
    """only these variants"""
    reuse: tuple[Path, ...] = ()
    """folders of other studies: copy the cells that were made there by the same training and evaluation"""
    cells: tuple[str, ...] = ()
    """run only cells whose names match one of these, as "la_*-joint-5-*"; the report has all"""
    train: str = ""
    """more options of train.py for all cells, in one text: --train="--num-workers 4" """
    evaluate: str = ""
    """options of eval.py for all cells, as one text (default: the preset's)"""
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
    """names of the `CONTROL_FLAGS` that are played too"""

    @property
    def name(self):
        """The name of its folder."""
        return file_name([*map(str, self.group.values()), f"seed{self.seed}"])


def file_name(words):
    """Return words, such as options and their values, as the name of a file."""
    text = "-".join(word.lstrip("-") for word in words)
    return text.replace(", ", "_").replace(" ", "_").replace("/", "_")


def make_cells(config):
    """Return the cells that the config asks for, in the order in which they run: all groups of a seed, then the next.

    Raise ValueError for one of its `cells` that matches none.
    """
    preset = PRESETS[config.preset]
    one_camera = "--no-use-wrist-image" in shlex.split(config.train)
    controls = tuple(name for name in preset.controls if not (one_camera and name in OF_TWO_CAMERAS))
    cells = [
        Cell(
            group,
            seed,
            [[str(word) for word in [*stage, "--seed", seed]] for stage in stages],
            controls if seed == config.seeds[0] else (),
        )
        for seed in config.seeds
        for group, stages in preset.make(config, config.steps or preset.steps)
    ]
    if config.cells:
        for pattern in config.cells:
            if not any(fnmatch(cell.name, pattern) for cell in cells):
                raise ValueError(f"cells has {pattern}, which matches no name that --dry-run prints")
        cells = [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in config.cells)]
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


def cell_file(config, cell):
    """Return the file of all that is known of a cell once it has been played."""
    return config.out / "cells" / f"{cell.name}.json"


def result_file(config, cell, control=""):
    """Return the file of a cell's trials, or of those with a control; it is named by the options of eval.py."""
    return cell_folder(config, cell) / f"{file_name(['eval', *control.split(), *playing_options(config)])}.jsonl"


def playing_options(config):
    """Return the options of eval.py that all cells share, as a list of words."""
    return shlex.split(config.evaluate or PRESETS[config.preset].evaluate)


def trials_of(config):
    """Return how many starts of each task are played."""
    return config.trials or PRESETS[config.preset].trials


def first_stage(config, cell):
    """Return the folder of a cell's first stage, named by its options: all cells that begin with it share it."""
    return config.out / "first" / file_name(cell.stages[0])


def training_commands(config, cell):
    """Return the commands of train.py of a cell, for one stage or two, as lists of words."""
    runs = [first_stage(config, cell)] * (len(cell.stages) - 1) + [cell_folder(config, cell) / "run"]
    made = []
    for number, (stage, run) in enumerate(zip(cell.stages, runs)):
        before = ["--init-from", str(runs[0])] if number else []
        data = ["--data", *map(str, config.data), *shlex.split(config.train)]
        launch = shlex.split(config.launch) or [sys.executable]
        made.append([*launch, TRAIN, *stage, *data, "--out", str(run), "--resume", *before])
    return made


def playing_command(config, cell, control=""):
    """Return the command of eval.py of a cell, also with a control, as a list of words."""
    trials = CONTROL_TRIALS if control else trials_of(config)
    run = str(cell_folder(config, cell) / "run")
    words = [sys.executable, str(ROOT / "eval.py"), run, *playing_options(config), "--trials", str(trials)]
    return [*words, "--out", str(result_file(config, cell, control)), *CONTROL_FLAGS.get(control, ())]


def commands(config, cell):
    """Return all commands of a cell, in their order."""
    played = [playing_command(config, cell, control) for control in ("", *cell.controls)]
    return [*training_commands(config, cell), *played]


def made_of(config, cell):
    """Return what a cell's result depends on: another value means another result."""
    data = [path.name for path in config.data]
    words = shlex.split(config.train)
    if cell.group["variant"] not in IMAGE:
        words, _ = split_option(words, "--labels")  # which variants that do not learn from labels leave unread
    settings = {
        "train": shlex.join(words),
        "evaluate": shlex.join(playing_options(config)),
        "trials": trials_of(config),
    }
    return {"stages": cell.stages, "data": data} | settings


def split_option(words, option):
    """Return (the words of a command line without an option and its values, its values)."""
    kept, values, inside = [], [], False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            inside = name == option
        if not inside:
            kept.append(word)
        elif word.startswith("--"):
            values += [value] if equals else []
        else:
            values.append(word)
    return kept, values


def read_cell(config, cell):
    """Return the content of a cell's file; {} unless the cell has been trained and played as the config says."""
    path = cell_file(config, cell)
    content = read_json(path) if path.exists() else {}
    return content if content.get("made") == made_of(config, cell) else {}


def missing_controls(cell, content):
    """Return the controls that a cell's file lacks."""
    return [control for control in cell.controls if control not in content["played"]["controls"]]


def is_done(config, cell):
    """Return whether nothing is left to do for a cell."""
    content = read_cell(config, cell)
    return bool(content) and not missing_controls(cell, content)


def find_twin(config, cell, known):
    """Return the one of these contents of cell files that was made as the config says, controls included, or None."""
    made = made_of(config, cell)
    return next((one for one in known if one.get("made") == made and not missing_controls(cell, one)), None)


def reusable_cells(config, cells):
    """Return {name of a cell: content of its file} of what other studies made as this one would, controls included.

    Cells that are there are not among them. Raise ValueError for a study that has none, or of other data.
    """
    found = {}
    fingerprints = [open_index(path).fingerprint for path in config.data] if config.reuse else []
    for folder in config.reuse:
        known = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
        twins = {cell.name: twin | {"group": cell.group} for cell in cells if (twin := find_twin(config, cell, known))}
        if not twins:
            raise ValueError(
                f"reuse has {folder}, which has no cell with training, evaluation and controls of one here"
            )
        for name, twin in twins.items():
            if (data := twin["played"]["data"]) != fingerprints:
                raise ValueError(
                    f"reuse has {folder}, where {name} was trained on data {data}; that here is {fingerprints}"
                )
        found |= twins
    return {cell.name: found[cell.name] for cell in cells if cell.name in found and not is_done(config, cell)}


def describe_cell(config, cell):
    """Return the content of the file of a cell that has just been trained and played."""
    run = cell_folder(config, cell) / "run"
    setting = read_json(run / "config.json")
    trials = [trial for trial in read_trials(result_file(config, cell)) if trial["trial"] < trials_of(config)]
    played = {
        "trials": outcomes(trials),
        "controls": {},
        "losses": learning_curve(run),
        "commit": setting["commit"],
        "played_at": sorted({trial["commit"] for trial in trials}),
        "data": [entry["fingerprint"] for entry in setting["data"]],
        "labels": [target["fingerprint"] for target in setting["targets"]],
        "versions": trials[0]["versions"],
        "commands": [shlex.join(portable(config, word) for word in words) for words in commands(config, cell)],
    }
    return {"group": cell.group, "seed": cell.seed, "made": made_of(config, cell), "played": played}


def portable(config, word):
    """Return a word of a command without the places of this machine."""
    if word == sys.executable:
        return "python"
    for folder, name in ((config.out, "OUT"), (ROOT, "")):
        if Path(word).is_relative_to(folder):
            return str(name / Path(word).relative_to(folder))
    return word


def trained_whole(words):
    """Return whether a command of train.py left weights of its last update: one that was stopped ends well too."""
    weights = Path(words[words.index("--out") + 1]) / "model.safetensors"
    return saved_step(weights) == int(words[words.index("--max-steps") + 1])


class Runner:
    """Runs cells until all are done or `stop` is called."""

    def __init__(self, config, total):
        """total: number of cells that are to run."""
        self.config = config
        self.total = total
        self.began = time.time()
        self.done = 0
        self.failed = {}  # name of a cell -> what went wrong
        self.children = []
        self.stopping = Event()

    def stop(self):
        """End what runs, as a scheduler does: train.py saves first."""
        self.stopping.set()
        for child in list(self.children):
            child.terminate()

    def run_command(self, words, output, lock):
        """Run one command, which keeps the lock also when this process dies; return its exit status."""
        print(shlex.join(words), file=output, flush=True)
        options = {"stdout": output, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
        child = subprocess.Popen(words, start_new_session=True, **options)  # Ctrl-C comes by `stop` alone
        self.children.append(child)
        if self.stopping.is_set():
            child.terminate()
        status = child.wait()
        self.children.remove(child)
        return status

    def run_cell(self, cell, lock):
        """Train and play a cell, going on where it was interrupted; return "" or what went wrong."""
        config, folder = self.config, cell_folder(self.config, cell)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a") as output:
            content = read_cell(config, cell)
            lacking = ", ".join(missing_controls(cell, content)) if content else ""
            if lacking and not (folder / "run").exists():
                return f"{cell_file(config, cell)} lacks {lacking}, and its run is not here; delete it to make it anew"
            if not content:
                for words in (*training_commands(config, cell), playing_command(config, cell)):
                    status = self.run_command(words, output, lock)
                    if self.stopping.is_set():
                        return INTERRUPTED
                    if status or (TRAIN in words and not trained_whole(words)):
                        name = "train.py" if TRAIN in words else "eval.py"
                        return f"{name} ended with status {status}, unfinished; see {folder / 'output.txt'}"
                content = describe_cell(config, cell)
                write_json(cell_file(config, cell), content)
            for control in missing_controls(cell, content):
                status = self.run_command(playing_command(config, cell, control), output, lock)
                if self.stopping.is_set():
                    return INTERRUPTED
                if status:
                    return f"eval.py with {control} ended with status {status}; see {folder / 'output.txt'}"
                content["played"]["controls"][control] = outcomes(read_trials(result_file(config, cell, control)))
                write_json(cell_file(config, cell), content)
        return ""

    def run_chain(self, chain):
        """Run cells one after another; what went wrong with one is written down and printed."""
        shared = first_stage(self.config, chain[0]) if len(chain[0].stages) > 1 else None
        path = shared.with_name(f"{shared.name}.lock") if shared else cell_folder(self.config, chain[0]) / "lock"
        with locked(path) as lock:
            for cell in chain:
                fault = "another call of study.py, or what it started, is at this cell"
                for _ in range(TRIES if lock else 0):
                    if self.stopping.is_set():
                        return
                    try:
                        fault = self.run_cell(cell, lock)
                    except (OSError, ValueError) as error:
                        fault = f"{type(error).__name__}: {error}"
                    if not fault:
                        break
                    if fault != INTERRUPTED:
                        write_json(cell_folder(self.config, cell) / "fault.json", {"fault": fault})
                self.report_cell(cell, fault)

    def report_cell(self, cell, fault):
        """Print that a cell is done, or what went wrong, and the time that the others will take."""
        if fault:
            self.failed[cell.name] = fault
        else:
            (cell_folder(self.config, cell) / "fault.json").unlink(missing_ok=True)
        self.done += 1
        left = (time.time() - self.began) / self.done * (self.total - self.done)
        note = f"; about {left / 60:.0f} minutes left" if fault != INTERRUPTED else ""
        print(f"{self.done} of {self.total}: {cell.name}: {fault or 'done'}{note}", flush=True)


def check_made(config, cells):
    """Print which of these cells were made with other settings. Raise ValueError where their run is in the way."""
    for cell in cells:
        path = cell_file(config, cell)
        was, now = read_json(path).get("made", {}) if path.exists() else {}, made_of(config, cell)
        changed = [name for name in now if was and was.get(name) != now[name]]
        text = "; ".join(f"{name} was {was.get(name)}, is {now[name]}" for name in changed)
        if (cell_folder(config, cell) / "run").exists() and set(changed) & {"stages", "data", "train"}:
            raise ValueError(
                f"{cell.name} is there with other settings: {text}. Give another --out, or delete it there"
            )
        if changed:
            print(f"{cell.name} is made anew: {text}")


def run_cells(config, cells):
    """Run the cells that are missing, `jobs` at a time; return {name: what went wrong} of those that failed.

    Raise KeyboardInterrupt after Ctrl-C or SIGTERM, once what ran has ended.
    """
    todo = [cell for cell in cells if not is_done(config, cell)]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already")
    check_made(config, todo)
    runner = Runner(config, len(todo))
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[number :: config.jobs] or cores for number in range(config.jobs)]

    def use_share():
        """Give this thread, and what it starts, its share of the cores."""
        os.sched_setaffinity(0, shares.pop())

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(config.jobs, initializer=use_share) as pool:
            try:
                for chain in [pool.submit(runner.run_chain, chain) for chain in chains(todo)]:
                    chain.result()
            except KeyboardInterrupt:
                print("Stopping: what runs is saved first", flush=True)
                runner.stop()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return runner.failed


def read_played(config, cell):
    """Return what a cell has, a `report.Played`: without trials where it is not finished."""
    fault = cell_folder(config, cell) / "fault.json"
    played = Played(cell.group, cell.seed, **read_cell(config, cell).get("played", {}))
    played.controls = {control: played.controls[control] for control in cell.controls if control in played.controls}
    if fault.exists() and not is_done(config, cell):
        played.fault = read_json(fault)["fault"]
    return played


def print_plan(config, cells, reused):
    """Print the cells, which are there or `reused`, how many updates and episodes they cost, and their commands."""
    updates = {}  # of each training that is to do
    todo = trials = 0
    for cell in cells:
        there = cell.name in reused or is_done(config, cell)
        todo += not there
        print(f"{cell.name}:{' (there)' if there else ''}")
        for words in commands(config, cell):
            print(f"    {shlex.join(words)}")
            if TRAIN in words and not there:
                updates[shlex.join(words)] = int(words[words.index("--max-steps") + 1])
            elif not there:
                trials += int(words[words.index("--trials") + 1])
    total = sum(updates.values())
    print(
        f"{todo} of {len(cells)} cells to do: {total} updates, {trials} episodes of each task that a cell is trained on"
    )


def check_config(config):
    """Raise ValueError naming the setting and the value of what cannot work, or would make cells what they are not."""
    if unknown := set(config.variants) - {"baseline", *LATENT}:
        raise ValueError(f"variants has {', '.join(sorted(unknown))}; there are baseline, {', '.join(LATENT)}")
    if len(set(config.seeds)) < len(config.seeds) or not config.seeds:
        raise ValueError(f"seeds are {list(config.seeds)}; give some, each once")
    at_least(config, {"jobs": 1, "steps": 0, "trials": 0})
    if config.preset == "long" and config.data == (DATA,):
        raise ValueError(f"data is {DATA}, whose tasks are short; name demonstrations of long ones (docs/study.md)")
    keeps = PRESETS[config.preset].keeps
    if keeps:
        episodes, instructions = training_demonstrations(config)
        if round(episodes / instructions) <= keeps:
            raise ValueError(
                f"data has {episodes} training episodes of {instructions} instructions; {config.preset} keeps the "
                f"actions of {keeps} of each, so it takes more"
            )
    if keeps and variants_of(config, IMAGE):
        _, labels = split_option(shlex.split(config.train), "--labels")
        known = {path: read_metadata(path).get("saw_actions", "unknown") for path in labels}
        if not labels or set(known.values()) != {"no"}:
            given = "; ".join(f"of {path} the model saw actions: {known[path]}" for path in labels)
            raise ValueError(
                f"{config.preset} takes actions away, and labels of a latent model that learned from them give them "
                f"back ({given or 'no --labels are given'}). Name labels made without: "
                f'--train="--labels {DATA}/labels_wrist_without_actions.safetensors" for the embedded data; '
                "docs/latent_actions.md says how to make them for other data"
            )
    own = {"--epochs", "--val-fraction", "--out", "--data", "--resume", "--init-from"}
    for cell in make_cells(replace(config, train="", shard="", cells=())):
        own |= {word for stage in cell.stages for word in stage if word.startswith("--")}
    playing = {"--trials", "--out", "--shard", *(flags[0] for flags in CONTROL_FLAGS.values())}
    for name, taken in (("train", own), ("evaluate", playing)):
        if both := option_names(getattr(config, name)) & taken:
            raise ValueError(f"{name} has {', '.join(sorted(both))}, which the cells set themselves; see --help")


def describe(config):
    """Return in a line what all cells have in common."""
    steps = config.steps or PRESETS[config.preset].steps
    options = {"train": config.train, "evaluate": shlex.join(playing_options(config))}
    shared = [f"{name}: {value}" for name, value in options.items() if value]
    if config.variants:
        shared.insert(0, f"only {', '.join(config.variants)}, so p are corrected for fewer comparisons")
    names = ", ".join(path.name for path in config.data)
    seeds = ", ".join(map(str, config.seeds))
    return "; ".join([f"{names}; {steps} updates; {trials_of(config)} starts of each task; seeds {seeds}", *shared])


def main(config):
    """Run a study's missing cells and write its report; return the number of cells that failed."""
    check_config(config)
    config.out = config.out.resolve()
    config.data = tuple(path.resolve() if path.exists() else path for path in config.data)
    everything = make_cells(replace(config, shard="", cells=()))
    if not everything:
        raise ValueError(f"{config.preset} has no cells of {', '.join(config.variants)}")
    cells = make_cells(config)
    reused = reusable_cells(config, everything)
    if config.dry_run:
        print_plan(config, cells, reused)
        return 0
    make_folder(config.out / "cells", "--out")
    lock = config.out / "report.lock"  # shards may begin and end at the same moment
    with locked(lock, wait=True):
        for name, content in reused.items():
            write_json(config.out / "cells" / f"{name}.json", content)
        if reused:
            commits = sorted({content["played"]["commit"] for content in reused.values()})
            places = ", ".join(map(str, config.reuse))
            print(f"{len(reused)} cells come from {places}, trained at {', '.join(commits)}")
    failed = {} if config.report_only else run_cells(config, cells)
    with locked(lock, wait=True):
        played = [read_played(config, cell) for cell in everything]
        write_report(config.out, PRESETS[config.preset], played, describe(config))
    return len(failed)


if __name__ == "__main__":
    try:
        raise SystemExit(int(main(tyro.cli(Config, description=__doc__)) > 0))
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same command goes on.") from None
