"""Kill a study over and over and compare its report with that of an undisturbed one; not run by pytest.

    python tests/soak_study.py --kills 5 --seed 0

Both are `python study.py smoke` with one training seed: two policies are trained and played in the simulator. The
study and all that it started are killed (-9) at random moments, then the same command goes on. Exit status 0 when the
weights, the outcome of every trial and the results are those of the undisturbed study.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from files import load_tensors

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 60  # s until the next kill


@dataclass
class Config:
    """Settings of `python tests/soak_study.py`."""

    kills: int = 5
    """how often the study is killed"""
    seed: int = 0
    """of when it is killed"""


def start(out):
    """Start a study, or go on with it; what it prints is added to a file beside `out`."""
    command = [sys.executable, "study.py", "smoke", "--out", str(out), "--seeds", "0"]
    with open(out.with_suffix(".txt"), "a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def kill_tree(pid):
    """Kill a process and all that it started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in found.stdout.split():
        kill_tree(int(child))


def made(out):
    """Return what a study made: {file: its weights, or its results without times}."""
    found = {}
    for path in out.rglob("run/model.safetensors"):
        tensors, info = load_tensors(path)
        found[path.relative_to(out)] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | info
    for path in out.glob("*/eval*.jsonl"):
        trials = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.relative_to(out)] = sorted((t["task"], t["seed"], t["success"], t["steps"]) for t in trials)
    for path in [out / "results.json", *out.glob("cells/*.json")]:
        found[path.relative_to(out)] = json.loads(path.read_text())
    return found


def main(config):
    """Run a study undisturbed, then disturbed, and compare; return the exit status."""
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder) / "undisturbed", Path(folder) / "disturbed"
        began = time.time()
        status = start(undisturbed).wait()
        print(f"undisturbed: status {status}, {time.time() - began:.0f} s", flush=True)
        for number in range(config.kills):
            study = start(disturbed)
            with contextlib.suppress(subprocess.TimeoutExpired):
                study.wait(rng.uniform(0, LONGEST))
            there = sorted(path.name for path in disturbed.glob("*/*") if path.name != "lock")
            print(
                f"kill {number + 1}: {'too late' if study.poll() == 0 else 'with ' + (', '.join(there) or 'nothing')}"
            )
            if study.poll() is None:
                kill_tree(study.pid)
                study.wait()
        status = start(disturbed).wait()
        print(f"disturbed, then gone on with: status {status}", flush=True)
        whole, other = made(undisturbed), made(disturbed)
    differing = sorted(str(name) for name in whole.keys() | other.keys() if whole.get(name) != other.get(name))
    print(f"EQUAL: {', '.join(map(str, whole))}" if not differing else f"FAILED: {', '.join(differing)}")
    return 1 if differing or status else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
