"""Kill a training run over and over and compare its losses with those of an undisturbed one; not run by pytest.

    python tests/soak.py --minutes 10 --kills 20 --seed 0

Both train the tiny model on two processes under torchrun. A rank that is killed (-9) is restarted by torchrun; a
launcher that is killed is started again with --resume. The moments are random: some while training, some while
starting. Once, after a launcher's death, bytes of the newest save are changed. Exit status 0 when every step of the log
has the losses of the undisturbed run, bit for bit, and the damaged save was refused.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import training_saves

ROOT = Path(__file__).resolve().parents[1]
VALUES = ("step", "loss", "action_loss", "latent_loss", "grad_norm", "lr")  # of the log, equal in both runs
END = 3600  # s that a run may take


@dataclass
class Config:
    """Settings of `python tests/soak.py`."""

    minutes: float = 10.0
    """about how long it takes, the undisturbed run included"""
    kills: int = 20
    """processes to kill"""
    seed: int = 0
    """of what is killed when"""


class Run:
    """A training run in a folder, under a launcher that can be started again."""

    def __init__(self, folder, steps):
        """folder: where the run and its output are kept; it is created. steps: updates."""
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1000".split()
        flags = "--global-batch-size 4 --image-size 32 --val-fraction 0 --save-every 7 --num-workers 1".split()
        flags += ["--max-steps", str(steps), "--out", str(folder / "run")]
        self.command = [sys.executable, *torchrun, "train.py", *flags]
        self.folder = folder / "run"
        self.output = folder / "output.txt"
        folder.mkdir()

    def start(self, *flags):
        """Start the launcher with more flags; what it prints is added to `output`."""
        with open(self.output, "a") as output:
            self.launcher = subprocess.Popen([*self.command, *flags], cwd=ROOT, stdout=output, stderr=output)

    def ranks(self):
        """Return the process ids of the launcher's children that train."""
        command = ["pgrep", "-P", str(self.launcher.pid), "-f", "train.py"]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]

    def logged(self):
        """Return how many lines the log has."""
        path = self.folder / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def losses(self):
        """Return `VALUES` of each line of the log."""
        with open(self.folder / "log.jsonl") as lines:
            return [[json.loads(line)[name] for name in VALUES] for line in lines]

    def check(self):
        """End this script when the launcher ended by itself without success."""
        if self.launcher.poll():
            sys.exit(f"FAILED: torchrun ended with {self.launcher.returncode}:\n{self.output.read_text()[-3000:]}")

    def wait(self, condition=None, seconds=END):
        """Wait until condition() is true (default: never) or the run has ended.

        End this script after `seconds`, or when the run failed.
        """
        latest = time.time() + seconds
        while self.launcher.poll() is None:
            if condition and condition():
                break
            if time.time() > latest:
                sys.exit(f"FAILED: nothing happened for {seconds} s:\n{self.output.read_text()[-3000:]}")
            time.sleep(0.02)
        self.check()

    def wait_for_step(self, step):
        """Wait until the log has `step` lines."""
        self.wait(lambda: self.logged() >= step, 300)

    def wait_for_ranks(self):
        """Wait until both ranks have been started."""
        self.wait(lambda: len(self.ranks()) == 2, 300)


def damage(run):
    """Change bytes of the newest save; return its path."""
    path = next(iter(training_saves(run.folder).values()))
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(64))
    return path


def end_ranks(run, ranks):
    """Wait until a killed launcher has ended, and end those of its `ranks` that it left behind."""
    run.launcher.wait()
    time.sleep(1)  # ranks that train die with it; those that have not joined yet wait for it
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def disturb(run, config, steps):
    """Kill ranks and launchers at `config.kills` moments; return ({kind: how many}, path of the damaged save or None).

    Each fourth kill comes while the processes start, up to 8 s after the one before.
    """
    rng = random.Random(config.seed)
    killed = {"rank": 0, "launcher": 0}
    damaged = None
    moments = sorted(rng.sample(range(20, int(0.95 * steps)), config.kills))  # in lines of the log
    for number, moment in enumerate(moments):
        if number % 4 == 3:
            time.sleep(rng.uniform(0, 8))
        else:
            run.wait_for_step(moment)
            time.sleep(rng.uniform(0, 0.5))
        run.wait_for_ranks()
        ranks = run.ranks()
        step = run.logged()
        kind = "launcher"  # at least once
        if number != config.kills // 2:
            kind = rng.choice(("rank", "rank", "launcher"))
        os.kill(rng.choice(ranks) if kind == "rank" else run.launcher.pid, signal.SIGKILL)
        killed[kind] += 1
        print(f"kill {number + 1} at step {step}: {kind}", flush=True)
        if kind == "launcher":
            end_ranks(run, ranks)
            if not damaged and len(training_saves(run.folder)) > 1:
                damaged = damage(run)
                print(f"damaged {damaged.name}", flush=True)
            run.start("--resume")
    run.wait()
    return killed, damaged


def main(config):
    """Train undisturbed, then disturbed, and compare; return the exit status."""
    steps = max(200, int(10 * (60 * config.minutes - 7 * config.kills)))
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Run(Path(folder) / "undisturbed", steps)
        run = Run(Path(folder) / "disturbed", steps)
        started = time.time()
        undisturbed.start()
        undisturbed.wait()
        print(f"undisturbed: {steps} steps in {time.time() - started:.0f} s", flush=True)
        run.start()
        killed, damaged = disturb(run, config, steps)
        output = run.output.read_text()
        refused = bool(damaged) and f"{damaged} is damaged" in output
        restarts = len(re.findall(r"failed .exitcode", output))
        print(
            f"{time.time() - started:.0f} s; killed: {killed['rank']} ranks, {killed['launcher']} launchers; restarts: "
            f"{restarts} by torchrun, {killed['launcher']} with --resume; damaged save "
            f"{damaged and damaged.name} {'refused' if refused else 'NOT REFUSED'}"
        )
        losses = run.losses()
        expected = undisturbed.losses()
    wrong = [step for step, (a, b) in enumerate(zip(losses, expected)) if a != b]
    print(f"{len(losses)} of {steps} steps logged; {len(wrong)} differ from the undisturbed run {wrong[:5]}")
    equal = not wrong and len(losses) == len(expected) == steps
    print("EQUAL, bit for bit" if equal and refused else "FAILED")
    return 0 if equal and refused and sum(killed.values()) >= config.kills else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
