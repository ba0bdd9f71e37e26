"""Kills a training run over and over and compares its losses with those of an undisturbed one; not run by pytest.

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
from common import checkpoints

ROOT = Path(__file__).resolve().parents[1]
VALUES = ("step", "loss", "action_loss", "latent_loss", "grad_norm", "lr")


@dataclass
class Config:
    minutes: float = 10.0
    """about how long it takes, the undisturbed run included"""
    kills: int = 20
    """processes to kill"""
    seed: int = 0
    """of what is killed when"""


class Run:
    """A training run in a folder, under a launcher that can be started again."""

    def __init__(self, folder, steps):
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1000".split()
        small = "--global-batch-size 4 --image-size 32 --val-fraction 0 --save-every 7 --num-workers 1".split()
        words = ["train.py", "--max-steps", str(steps), *small, "--out", str(folder / "run")]
        self.words = [sys.executable, *torchrun, *words]
        self.folder, self.output = folder / "run", folder / "output.txt"
        folder.mkdir()

    def start(self, *more):
        """Starts the launcher; what it prints is added to `output`."""
        with open(self.output, "a") as output:
            self.launcher = subprocess.Popen([*self.words, *more], cwd=ROOT, stdout=output, stderr=output)

    def ranks(self):
        """Process numbers of the launcher's children that train."""
        words = ["pgrep", "-P", str(self.launcher.pid), "-f", "train.py"]
        return [int(word) for word in subprocess.run(words, capture_output=True, text=True).stdout.split()]

    def step(self):
        """How many lines the log has."""
        path = self.folder / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def log(self):
        """What must be equal of every step."""
        return [[json.loads(line)[name] for name in VALUES] for line in open(self.folder / "log.jsonl")]

    def check(self):
        """Ends the driver when the launcher ended by itself without success."""
        if self.launcher.poll():
            sys.exit(f"FAILED: torchrun ended with {self.launcher.returncode}:\n{self.output.read_text()[-3000:]}")


def wait(condition, run, seconds=300):
    """Until it holds, or the run has ended. Gives up with an error."""
    end = time.time() + seconds
    while not condition() and run.launcher.poll() is None:
        if time.time() > end:
            sys.exit(f"FAILED: nothing happened for {seconds} s:\n{run.output.read_text()[-3000:]}")
        time.sleep(0.02)
    run.check()


def damage(run):
    """Changes bytes of the newest save; returns its path."""
    path = next(iter(checkpoints(run.folder).values()))
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(64))
    return path


def disturb(run, config, steps):
    """Kills ranks and launchers until there were enough. Returns (killed ranks, killed launchers, damaged save)."""
    rng, damaged, killed = random.Random(config.seed), None, {"rank": 0, "launcher": 0}
    moments = sorted(rng.sample(range(20, int(0.95 * steps)), config.kills))  # in steps of the log
    for number, moment in enumerate(moments):
        if number % 4 == 3:  # while starting, a moment after the last kill
            time.sleep(rng.uniform(0, 8))
        else:
            wait(lambda: run.step() >= moment, run)  # noqa: B023
            time.sleep(rng.uniform(0, 0.5))
        wait(lambda: len(run.ranks()) == 2, run)
        run.check()
        ranks, now = run.ranks(), run.step()
        victim = rng.choice(("rank", "rank", "launcher")) if number != config.kills // 2 else "launcher"
        os.kill(rng.choice(ranks) if victim == "rank" else run.launcher.pid, signal.SIGKILL)
        killed[victim] += 1
        print(f"kill {number + 1} at step {now}: {victim}", flush=True)
        if victim == "launcher":
            run.launcher.wait()
            time.sleep(1)  # ranks that train die with it; those that have not joined yet wait for it, so they go too
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            if not damaged and len(checkpoints(run.folder)) > 1:
                damaged = damage(run)
                print(f"damaged {damaged.name}", flush=True)
            run.start("--resume")
    wait(lambda: False, run, 3600)
    return killed, damaged


def main(config):
    """Trains undisturbed, then disturbed, and compares; returns the exit status."""
    steps = max(200, int(10 * (60 * config.minutes - 7 * config.kills)))
    with tempfile.TemporaryDirectory() as folder:
        quiet, run = Run(Path(folder) / "quiet", steps), Run(Path(folder) / "disturbed", steps)
        started = time.time()
        quiet.start()
        wait(lambda: False, quiet, 3600)
        print(f"undisturbed: {steps} steps in {time.time() - started:.0f} s", flush=True)
        run.start()
        killed, damaged = disturb(run, config, steps)
        text, ours, theirs = run.output.read_text(), run.log(), quiet.log()
        refused = bool(damaged) and f"{damaged} is damaged" in text
        restarts = len(re.findall(r"failed .exitcode", text))
        wrong = [step for step, (a, b) in enumerate(zip(ours, theirs)) if a != b]
        print(
            f"{time.time() - started:.0f} s; killed: {killed['rank']} ranks, {killed['launcher']} launchers; restarts: "
            f"{restarts} by torchrun, {killed['launcher']} with --resume; damaged save "
            f"{damaged and damaged.name} {'refused' if refused else 'NOT REFUSED'}"
        )
        equal = not wrong and len(ours) == len(theirs) == steps
        print(f"{len(ours)} of {steps} steps logged; {len(wrong)} differ from the undisturbed run {wrong[:5]}")
        print("EQUAL, bit for bit" if equal and refused else "FAILED")
        return 0 if equal and refused and sum(killed.values()) >= config.kills else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
