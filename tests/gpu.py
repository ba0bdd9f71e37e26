"""Run every check that needs a GPU, go on after failures, and write one JSON and one table. See gpu.sh.

    bash tests/gpu.sh OUT                    # on a GPU: 8 minutes
    bash tests/gpu.sh OUT --tiny             # on a CPU, at small sizes: does the script itself work?
    bash tests/gpu.sh OUT --only step infer  # some of the checks

The exit status is the number of checks that failed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
TEST_FILES = "backbone model quantiser meta precision common checkpoint".split()  # of what runs on the device


@dataclass
class Config:
    out: tyro.conf.Positional[Path]
    """folder for the results, made if it does not exist"""
    tiny: bool = False
    """small sizes, on whatever device there is"""
    only: tuple[str, ...] = ()
    """names of checks (default: all)"""
    seconds: int = 480
    """time for all of them; those that do not fit are reported as not run"""


@dataclass
class Check:
    """One command, how long it may take, and how its result is read."""

    name: str
    command: list  # of arguments to Python, or a function (folder) -> text that raises where the check fails
    seconds: int
    read: object = None  # function (text that it printed) -> a short result; default: its last line


def checks(config):
    """Return all checks, the most important first."""
    out = config.out
    bench = ["tests/bench.py"]
    size = "tiny" if config.tiny else "2b"
    batch, steps = (2, 1) if config.tiny else (32, 5)
    small = ["--rounds", 1, "--steps", steps]

    def table(name):
        return ["--out", out / f"{name}.json"]

    step = [*bench, "train", "--size", size, "--batch", batch, *small, *table("step")]
    if not config.tiny:
        step += ["--profile"]
    pytest = "-m pytest -q -p no:cacheprovider -o addopts= --no-tensorflow".split()  # without pytest-xdist, too
    label = ["--steps", 16] if config.tiny else ["--full", "--steps", 256]
    infer = ["--batches", 1, 2] if config.tiny else ["--batches", 1, 16]
    numerics = ["--batch", batch, "--steps", 2 if config.tiny else 20]
    return [
        Check("devices", compare_devices, 60),
        Check("variants", lambda folder: train_variants(folder, 3 if config.tiny else 50), 90),
        Check("nccl", one_process_group, 30),
        Check("policy", compare_policy, 60),
        Check("resume", resume_after_kill, 90),
        Check("step", step, 120, find(r"samples/s x .*")),
        Check("infer", [*bench, "infer", "--size", size, *infer, *small, *table("infer")], 90, last_lines(2)),
        Check("numerics", [*bench, "numerics", "--size", size, *numerics, *table("numerics")], 90, find("at most .*")),
        Check("label", [*bench, "label", *label, *table("label")], 60, find("ratio .*")),
        Check("tests", [*pytest, *test_paths(config)], 180),
        Check("step, compiled", [*step, "--compile"], 180, find(r"samples/s x .*")),
    ]


def test_paths(config):
    """Return the files of tests that need no simulator, and data only in a few tests, which are left out."""
    names = TEST_FILES[2:3] if config.tiny else TEST_FILES
    return [f"tests/test_{name}.py" for name in names]


def find(pattern):
    """Return a function that finds the last match of a pattern in a text."""

    def read(text):
        return (re.findall(pattern, text) or ["not found in its output"])[-1]

    return read


def last_lines(count):
    """Return a function that joins the last lines of a text."""

    def read(text):
        return "; ".join(" ".join(line.split()) for line in text.strip().splitlines()[-count:])

    return read


# ----------------------------------------------------------------------------------------------------------------------
# Checks that are not a command


def device_name():
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compare_devices(folder):
    """Losses and gradients of all models in fp32 on the device are those on the CPU, to rounding."""
    from model_helpers import batch_for, small_config

    import common
    from model import VARIANTS, VLA

    torch.set_float32_matmul_precision("highest")
    off = []
    for variant in VARIANTS:
        for quantile in (False, True):
            results = []
            for device in ("cpu", device_name()):
                torch.manual_seed(0)
                vla = VLA(small_config(variant, action_loss="quantile" if quantile else "l1")).to(device)
                batch = batch_for(vla) | {"draws": torch.full((4, 2, 6), 0.3)}
                with without_autocast():
                    loss = vla(common.to_device(batch, torch.device(device)))["loss"]
                loss.backward()
                gradients = torch.cat([p.grad.flatten().cpu() for p in vla.parameters() if p.grad is not None])
                results.append((loss.item(), gradients))
            (expected, by_cpu), (loss, gradients) = results
            off.append(max(abs(loss / expected - 1), ((gradients - by_cpu).norm() / by_cpu.norm()).item()))
    if max(off) > 1e-3:
        raise AssertionError(f"the device differs from the CPU by {max(off):.1e}, relatively")
    return f"{len(off)} models: at most {max(off):.1e} from the CPU, relatively"


def without_autocast():
    """Return a context in which a GPU computes in fp32 too."""
    from unittest import mock

    import model

    return mock.patch.object(model, "autocast", lambda device, half=False: torch.autocast(device.type, enabled=False))


def run(command, seconds, **options):
    """Run Python with these arguments in the project's folder; return what it printed, or raise RuntimeError."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, **options)
    text = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {text.strip()[-1500:]}")
    return text


def train_command(folder, variant, steps, *more):
    """Return the arguments of a training run on the embedded data."""
    shared = ["--cache", folder / "cache", "--max-steps", steps, "--val-fraction", 0]
    return ["train.py", "--variant", variant, "--out", folder / variant, *shared, *more]


def train_variants(folder, steps):
    """All five variants train on the embedded data, and their losses fall."""
    from curves import read_log
    from model import VARIANTS

    parts = []
    for variant in VARIANTS:
        run(train_command(folder, variant, steps), 60)
        log = read_log(folder / variant)
        if steps > 20 and log[-1]["loss"] > log[0]["loss"]:
            raise AssertionError(f"{variant}: the loss rose from {log[0]['loss']:.3f} to {log[-1]['loss']:.3f}")
        parts.append(f"{variant} {log[0]['loss']:.3f} to {log[-1]['loss']:.3f}")
    return f"{steps} steps: {', '.join(parts)}"


def one_process_group(folder):
    """A process group of one over NCCL (on a CPU gloo): DDP's step and the collectives that training uses."""
    code = """
import torch, torch.distributed as dist, common
cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
device = torch.device("cuda" if cuda else "cpu")
module = common.distribute(torch.nn.Linear(8, 8).to(device), common.Ranks(0, 2, device))
module(torch.ones(4, 8, device=device)).sum().backward()
assert module.module.weight.grad.device.type == device.type
print(common.all_sum(torch.ones(3, device=device)).tolist(), common.broadcast_object({"a": 1}), dist.get_backend())
common.shutdown_distributed()
"""
    return run(["-c", code], 30, env=os.environ | {"PYTHONPATH": str(ROOT)}).strip().splitlines()[-1]


def compare_policy(folder):
    """A policy on the device, compiled with CUDA graphs on a GPU, acts as on the CPU; a longer instruction, too."""
    import numpy as np

    from data import open_dataset
    from policy import Policy

    if not (folder / "la_align").exists():
        run(train_command(folder, "la_align", 2), 60)
    dataset = open_dataset(ROOT / "data/libero_tiny", folder / "cache")
    observations = [
        {
            "images": {camera: dataset.image(camera, step) for camera in dataset.cameras},
            "state": dataset.state([step])[0],
            "instruction": dataset.instruction(step),
        }
        for step in range(2)
    ]
    longer = observations[0] | {"instruction": 3 * "put the bowl on the plate and then "}
    actions = {}
    for device in ("cpu", device_name()):
        policy = Policy(folder / "la_align", device=device)
        batches = [observations[:1], observations, [longer], observations[:1]]
        actions[device] = np.concatenate([policy(batch) for batch in batches])
    difference = np.abs(actions["cpu"] - actions[device]).max()
    if difference > 0.05:
        raise AssertionError(f"actions differ from the CPU's by {difference:.3f}")
    return f"actions differ from the CPU's by at most {difference:.1e} (bf16 on a GPU)"


def resume_after_kill(folder):
    """A run that is killed after a save goes on as if nothing had happened."""
    from curves import read_log

    steps = 30
    options = ["--save-every", 5, "--seed", 3]
    run(train_command(folder / "whole", "la_direct", steps, *options), 60)
    command = [sys.executable, *map(str, train_command(folder / "killed", "la_direct", steps, *options))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(folder.glob("killed/la_direct/training-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    run(train_command(folder / "killed", "la_direct", steps, *options, "--resume"), 60)
    whole, killed = (read_log(folder / name / "la_direct") for name in ("whole", "killed"))
    off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(whole, killed, strict=True))
    if off > (0.03 if torch.cuda.is_available() else 1e-3):  # some backward passes of a GPU add in any order
        raise AssertionError(f"losses differ by {off:.1e} after a resume")
    return f"{steps} losses, at most {off:.1e} apart, relatively"


# ----------------------------------------------------------------------------------------------------------------------
# Running them


def run_check(check, folder, seconds):
    """Return (whether it passed, a short result, seconds that it took, what it printed)."""
    started = time.perf_counter()
    try:
        if callable(check.command):
            text = check.command(folder)
            result = text
        else:
            text = run(check.command, seconds)
            result = (check.read or last_lines(1))(text)
        passed = True
    except Exception as error:  # whatever fails, the others are run
        passed, text = False, f"{type(error).__name__}: {error}"
        result = " ".join(text.split())[-300:]
    return passed, result, time.perf_counter() - started, text


def describe_machine():
    """Return one line that says what ran."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    )


def main(config):
    """Run the checks; return the number of those that failed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    config.out = config.out.resolve()
    folder = config.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [check for check in checks(config) if not config.only or check.name in config.only]
    if unknown := set(config.only) - {check.name for check in chosen}:
        raise SystemExit(f"error: there is no check {', '.join(sorted(unknown))}")
    machine = describe_machine()
    print(machine, flush=True)
    rows = []
    started = time.perf_counter()
    for check in chosen:
        left = config.seconds - (time.perf_counter() - started)
        if left < 5:
            rows.append({"check": check.name, "passed": False, "result": "not run: no time left", "seconds": 0.0})
        else:
            passed, result, seconds, text = run_check(check, folder, min(check.seconds, left))
            row = {"check": check.name, "passed": passed, "result": result, "seconds": round(seconds, 1)}
            rows.append(row | {"output": text[-20_000:]})
        print(f"{'passed' if rows[-1]['passed'] else 'FAILED'} {check.name}: {rows[-1]['result']}", flush=True)
        write_results(config.out, machine, rows)  # after each: the machine may go
    return sum(not row["passed"] for row in rows)


def write_results(out, machine, rows):
    """Write gpu.json, and gpu.md with a line for each check."""
    (out / "gpu.json").write_text(json.dumps({"machine": machine, "checks": rows}, indent=1) + "\n")
    lines = [f"{machine}\n", "| check | | result | s |", "| --- | --- | --- | --- |"]
    for row in rows:
        result = row["result"].replace("|", "/")
        lines.append(f"| {row['check']} | {'passed' if row['passed'] else 'FAILED'} | {result} | {row['seconds']} |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
