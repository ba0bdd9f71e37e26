"""Play vla-eval's own LIBERO benchmark against serve.py, beside eval.py, on the same official starts.

    python tests/harness.py RUN --trials 10

The benchmark runs in this process with its own simulator, images, states and loop. It is played twice: with the
simulator seeded anew for each episode, as eval.py does, and seeded once for each task, as it does by itself. The seed
draws the places of the fixtures. Prints successes, and the starts whose outcomes differ.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark"


@dataclass
class Config:
    run: tyro.conf.Positional[str]
    """a trained run"""
    suite: str = "libero_goal"
    """suite of LIBERO"""
    tasks: tuple[int, ...] = (1, 4, 8)
    """tasks of it"""
    trials: int = 10
    """official starts of each task"""
    out: Path = Path("harness.json")
    """where the outcomes go"""


def seed_every_episode():
    """Let vla-eval's benchmark seed its simulator with the number of the episode, before each."""
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

    reset = LIBEROBenchmark.reset

    def seeded(self, task):
        self.env_seed = task.get("episode_idx", 0)
        if self._env is not None and self._current_task_id == task["task_id"]:
            self._env.seed(self.env_seed)
        return reset(self, task)

    LIBEROBenchmark.reset = seeded
    return lambda: setattr(LIBEROBenchmark, "reset", reset)


def play_harness(config, url):
    """Return {(task, start): (success, steps)} of vla-eval's benchmark."""
    from vla_eval.api import run
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

    names = [task["name"] for task in LIBEROBenchmark(config.suite).get_tasks()]
    entry = {"benchmark": BENCHMARK, "episodes_per_task": config.trials, "params": {"suite": config.suite, "seed": 0}}
    entry["tasks"] = [names[task] for task in config.tasks]
    (result,) = run({"benchmarks": [entry]}, server_url=url, no_save=True, docker=False)
    outcomes = {}
    for played in result["tasks"]:
        for start, episode in enumerate(played["episodes"]):
            place = names.index(played["task"]), start
            outcomes[place] = (bool(episode["metrics"]["success"]), episode["steps"])
    return outcomes


def play_eval(config, folder):
    """Return {(task, start): (success, steps)} of eval.py on official starts."""
    path = Path(folder) / "eval.jsonl"
    command = [sys.executable, "eval.py", config.run, "--suite", config.suite, "--trials", str(config.trials)]
    command += ["--widen", "0", "--task-ids", *map(str, config.tasks), "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    trials = map(json.loads, path.read_text().splitlines())
    return {(trial["task"], trial["seed"]): (trial["success"], trial["steps"]) for trial in trials}


def main(config):
    """Play all three and print the table."""
    command = [sys.executable, "serve.py", config.run, "--protocol", "vla-eval", "--port", "0"]
    command += ["--text-length", "1"]  # no more room than in training: more would change actions by rounding
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().split()[-1]
        once = play_harness(config, url)
        undo = seed_every_episode()
        each = play_harness(config, url)
        undo()
        server.terminate()
    with tempfile.TemporaryDirectory() as folder:
        ours = play_eval(config, folder)
    rows = {"eval.py": ours, "vla-eval, seeded for each episode": each, "vla-eval, seeded once a task": once}
    print("\n| | success | same outcome as eval.py | same outcome and number of steps |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        same = sum(row[place][0] == ours[place][0] for place in ours)
        equal = sum(row[place] == ours[place] for place in ours)
        print(f"| {name} | {sum(s for s, _ in row.values())}/{len(row)} | {same}/{len(ours)} | {equal}/{len(ours)} |")
    saved = {name: [[*place, *outcome] for place, outcome in row.items()] for name, row in rows.items()}
    config.out.write_text(json.dumps(saved))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
