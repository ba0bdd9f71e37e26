"""Measure speed; not run by pytest. Every mode but ddp compares two ways with the same weights in the same run.

    python tests/bench.py eval runs/NAME          # eval.py against the field's loop: one simulator, drawing always
    python tests/bench.py label                   # label.py against one frame pair at a time
    python tests/bench.py label --full --steps 32 # the same at the paper's size, random weights
    python tests/bench.py data                    # the input pipeline against a Hugging Face processor for each sample
    python tests/bench.py video DIR --lerobot ENV/bin/python    # reading videos against LeRobot's own loader
    python tests/bench.py train --size wide --steps 1           # a training step against transformers' forward; 10 min
    python tests/bench.py train --size 2b --batch 32            # the same at the real size on a GPU
    python tests/bench.py numerics --size 2b      # losses of training steps in bf16 and in fp32
    python tests/bench.py memory --size 2b        # what fits on a GPU, by a formula, on any machine
    python tests/bench.py infer --size 2b         # a chunk of actions against transformers' own forward
    python tests/bench.py ddp --size 2b           # train.py's step on 1 to n processes
    python tests/bench.py versions ../other       # the default training run of a second checkout and of this one

Prints a table and writes it as JSON (--out). Times on a shared machine mean little; their ratios within one run do.
The modes label, data and video are in bench_data.py; train, numerics, memory, infer and ddp in bench_model.py; what
they compare with is in bench_helpers.py.
Nothing is downloaded: weights are random, tokens are the tiny backbone's.

Axes: H chunk steps, A action size.
"""

import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_data import DataConfig, LabelConfig, VideoConfig, bench_data, bench_label, bench_video
from bench_model import (
    DdpConfig,
    InferConfig,
    MemoryConfig,
    NumericsConfig,
    TrainConfig,
    bench_ddp,
    bench_infer,
    bench_memory,
    bench_numerics,
    bench_train,
)

from common import init_distributed

# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class EvalConfig:
    """Episodes per hour of eval.py against the field's loop: one simulator that draws both cameras at every step and
    resets in full, batch 1, one episode after another."""

    run: tyro.conf.Positional[Path]
    """a trained run"""
    episodes: int = 20
    """trials of the first task of the run's data"""
    envs: int = 2
    """simulator processes of eval.py"""
    policy_batch: int = 8
    """padded batch of eval.py"""
    out: Path = Path("bench-eval.json")
    """where the table goes"""


WATCHDOG = 300.0  # s of silence after which eval.py replaces a simulator
PARTS_OF_EVALUATION = ("open", "reset", "physics", "render", "policy", "wait")


class TimedPolicy:
    """A policy, and the seconds spent in it."""

    def __init__(self, policy):
        self.policy = policy
        self.seconds = 0.0

    def __call__(self, *inputs, **options):
        """Return the policy's actions."""
        started = time.perf_counter()
        actions = self.policy(*inputs, **options)
        self.seconds += time.perf_counter() - started
        return actions


def play_in_turn(episodes, policy):
    """Play the episodes in one simulator in this process, as the field evaluates.

    Return ({seed: success}, seconds, {part: seconds}).
    """
    from rollout import play
    from sim import Sim

    started = time.perf_counter()
    policy = TimedPolicy(policy)
    sim = Sim(episodes[0].suite, episodes[0].task)
    del sim.world._initialize_sim, sim.world._destroy_sim  # back to robosuite's own, which compile and upload each time
    step_as_used = sim.step
    sim.step = lambda action, render=False: step_as_used(action, render=True)  # as robosuite's, which draws every step
    spent = {"open": time.perf_counter() - started}
    outcomes = {}
    for episode in episodes:
        outcomes[episode.seed], _ = play(sim, episode, functools.partial(policy, gripper="robosuite"))
    sim.close()
    return outcomes, time.perf_counter() - started, spent | sim.spent | {"policy": policy.seconds}


def play_in_processes(episodes, policy, config):
    """Play the episodes as eval.py does; return as `play_in_turn`, with seconds summed over the processes."""
    from pool import play_all

    started = time.perf_counter()
    policy = TimedPolicy(policy)
    outcomes = {}
    spent = {}

    def finish(episode, result):
        outcomes[episode.seed] = result["success"]
        for name, seconds in result["spent"].items():
            spent[name] = spent.get(name, 0.0) + seconds

    play_all(episodes, functools.partial(policy, gripper="robosuite"), finish, config.envs, WATCHDOG)
    return outcomes, time.perf_counter() - started, spent | {"policy": policy.seconds}


def eval_row(outcomes, seconds, spent):
    """Return one row of the table from what `play_in_turn` returned. Raise RuntimeError when a simulator failed."""
    if None in outcomes.values():
        raise RuntimeError("a simulator failed three times; its messages are above")
    return {
        "episodes": len(outcomes),
        "successes": sum(outcomes.values()),
        "seconds": round(seconds, 1),
        "episodes_per_hour": round(3600 * len(outcomes) / seconds, 1),
        "spent": {part: round(value, 1) for part, value in spent.items()},
        "outcomes": outcomes,
    }


def bench_eval(config):
    """Play the same episodes both ways, the field's first; print episodes per hour and where the time went.

    "wait" is how long simulators waited for the policy, its own time included.
    """
    from eval import Config, plan_trials
    from policy import Policy

    alone, policy = Policy(config.run), Policy(config.run, batch=config.policy_batch)
    task = policy.data_entry["tasks"][0]
    episodes = plan_trials(Config(run=str(config.run), trials=config.episodes, task_ids=(task,)), policy)
    alone.warm_up()  # the first call is slower
    policy.warm_up()
    first = eval_row(*play_in_turn(episodes, alone))
    second = eval_row(*play_in_processes(episodes, policy, config))
    same = sum(first["outcomes"][seed] == second["outcomes"][seed] for seed in first["outcomes"])
    rows = {"field's loop": first, f"eval.py, {config.envs} envs": second}
    header = "  ".join(f"{part:>8}" for part in PARTS_OF_EVALUATION)
    print(f"{'':20} episodes/h  success  {header}  (s, summed over processes)")
    for name, row in rows.items():
        parts = "  ".join(f"{row['spent'].get(part, 0.0):8.1f}" for part in PARTS_OF_EVALUATION)
        print(f"{name:20} {row['episodes_per_hour']:10.1f}  {row['successes']:3d}/{row['episodes']:<3d}  {parts}")
    ratio = second["episodes_per_hour"] / first["episodes_per_hour"]
    print(f"ratio {ratio:.2f}; same outcome in {same} of {len(episodes)} trials")
    return {"rows": rows, "ratio": ratio, "same_outcomes": same}


# ----------------------------------------------------------------------------------------------------------------------
# Two versions of the code


@dataclass
class VersionsConfig:
    """CPU time of the same training run by a second checkout and by this one, in turns."""

    before: tyro.conf.Positional[Path]
    """folder of the second checkout"""
    pairs: int = 20
    """runs of each"""
    steps: int = 100
    """training steps of a run"""
    out: Path = Path("bench-versions.json")
    """where the table goes"""


def cpu_seconds(checkout, steps):
    """Return the user and system time of train.py in `checkout`, from the command to its end, data workers included.

    Raise RuntimeError with its messages when it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--max-steps", str(steps), "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_versions(config):
    """Print each pair, and the geometric mean of the ratios with its 95 % interval (bootstrap over pairs)."""
    root = Path(__file__).resolve().parents[1]
    rows = []
    for number in range(config.pairs):
        order = (config.before, root) if number % 2 else (root, config.before)
        seconds = {checkout: cpu_seconds(checkout, config.steps) for checkout in order}
        before, here = seconds[config.before], seconds[root]
        rows.append((before, here))
        print(f"{number + 1:3} {before:8.2f} s before, {here:8.2f} s here", flush=True)
    logs = np.log([here / before for before, here in rows])
    means = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, ratio, high = np.exp([np.quantile(means, 0.025), logs.mean(), np.quantile(means, 0.975)]).tolist()
    print(f"CPU time x {ratio:.3f} ({low:.3f} to {high:.3f}) in {config.pairs} pairs")
    return {"rows": rows, "ratio": ratio, "interval": [low, high]}


# ----------------------------------------------------------------------------------------------------------------------
# The command line

MODES = {
    "eval": (EvalConfig, bench_eval),
    "label": (LabelConfig, bench_label),
    "data": (DataConfig, bench_data),
    "video": (VideoConfig, bench_video),
    "train": (TrainConfig, bench_train),
    "numerics": (NumericsConfig, bench_numerics),
    "memory": (MemoryConfig, bench_memory),
    "infer": (InferConfig, bench_infer),
    "ddp": (DdpConfig, bench_ddp),
    "versions": (VersionsConfig, bench_versions),
}


def main():
    """Run one mode and write its table."""
    configs = {name: config_class for name, (config_class, _) in MODES.items()}
    config = tyro.extras.subcommand_cli_from_dict(configs, description=__doc__)
    bench = next(function for config_class, function in MODES.values() if config_class is type(config))
    init_distributed()  # for its number of threads, and TF32 on a GPU
    result = bench(config)
    config.out.write_text(json.dumps(result | {"command": sys.argv}, indent=1) + "\n")


if __name__ == "__main__":
    main()
