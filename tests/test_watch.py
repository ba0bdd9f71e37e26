"""watch.py: evaluations in simulators beside a training."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, printed
from warm import descendants, is_running, wait_for

import common
import train
import watch
from checkpoint import training_saves
from common import Log
from curves import read_log
from files import load_tensors, save_tensors, write_json
from policy import Policy

FAKE = """
import json, pathlib, sys, time

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

out = pathlib.Path(value("--out"))
plan = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
outcome = plan[out.stem.removeprefix("eval-")]
if outcome == "sleep":
    time.sleep(600)
if outcome == "fail":
    sys.exit("no simulator today")
trials = int(value("--trials"))
out.write_text("")
out.with_suffix(".json").write_text(json.dumps({"suites": [{"successes": outcome, "episodes": trials}]}))
"""  # instead of eval.py: for each step successes, or what happens


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Function ({step: successes, "sleep" or "fail"}) that says how the evaluations of this test end."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(watch, "COMMAND", (sys.executable, str(script)))

    def make(outcomes):
        script.with_suffix(".json").write_text(json.dumps(outcomes))

    return make


def save(run, step):
    """Write a run folder whose weights say after how many updates they were saved."""
    run.mkdir(exist_ok=True)
    save_tensors(run / "model.safetensors", {}, step=step)
    for name in ("config.json", "dataset_statistics.json"):
        write_json(run / name, {})


def open_watch(run, first=0, **changes):
    """Return the `Watch` of a run and the process's event of SIGTERM."""
    settings = dict(eval_every=2, eval_trials=4, eval_flags="") | changes
    return watch.Watch(SimpleNamespace(**settings), run, first, Log(run, first_step=first), True)


def evaluate(watched, run, step, logged_at=None):
    """Save and evaluate weights of a step, and wait for the result."""
    save(run, step)
    watched.begin(step)
    watched.child.wait()
    watched.report(step if logged_at is None else logged_at)


def step_of(folder):
    """Return after how many updates the weights in a folder were saved."""
    return int(load_tensors(folder / "model.safetensors")[1]["step"])


def test_best_save_is_kept_by_success(plan, tmp_path):
    """Of equals the later; each success is in the log with its interval."""
    plan({2: 1, 4: 3, 6: 3, 8: 2})
    run = tmp_path / "run"
    save(run, 0)
    watched = open_watch(run)
    for step, best in ((2, 2), (4, 4), (6, 6), (8, 6)):
        evaluate(watched, run, step)
        assert (step_of(run / "best"), step_of(run / "watch")) == (best, step)
    entries = read_log(run)
    assert [entry["success_step"] for entry in entries] == [2, 4, 6, 8]
    assert [entry["success"] for entry in entries] == [0.25, 0.75, 0.75, 0.5]
    assert all(0 < entry["success_low"] < entry["success"] < entry["success_high"] < 1 for entry in entries)


def test_same_trials_each_time(plan, tmp_path, monkeypatch):
    """Their seeds are not those of `python eval.py`, flags may change them, and --out cannot be changed."""
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    run = tmp_path / "run"
    for step, flags in ((2, ""), (4, "--suite line --seed 7 --out x.jsonl")):
        save(run, step)
        open_watch(run, eval_flags=flags).begin(step)
    start = [*watch.COMMAND, str(os.getpid()), f"{run}/watch", "--seed", "1000"]
    end = ["--trials", "4", "--out"]
    assert commands[0] == [*start, *end, f"{run}/watch/eval-2.jsonl"]
    flags = ["--suite", "line", "--seed", "7", "--out", "x.jsonl"]
    assert commands[1] == [*start, *flags, *end, f"{run}/watch/eval-4.jsonl"]


def test_failing_evaluation_is_a_warning(plan, tmp_path, capsys):
    """It says why, and the next one is made."""
    plan({2: "fail", 4: 4})
    run = tmp_path / "run"
    save(run, 0)
    watched = open_watch(run)
    evaluate(watched, run, 2)
    text = capsys.readouterr().err
    assert "WARNING: the evaluation of step 2 failed: no simulator today" in text and "output.txt" in text
    assert read_log(run) == [] and not (run / "best").exists()
    evaluate(watched, run, 4)
    assert [entry["success"] for entry in read_log(run)] == [1.0]


def test_full_disk_is_a_warning(plan, tmp_path, capsys, monkeypatch):
    """Weights that cannot be copied are not evaluated."""

    def full(*_):
        raise OSError("no space left")

    run = tmp_path / "run"
    save(run, 2)
    watched = open_watch(run)
    monkeypatch.setattr(shutil, "copyfile", full)
    watched.begin(2)
    assert watched.child is None and "step 2 is not evaluated: no space left" in capsys.readouterr().err


def test_weights_that_were_not_saved_are_not_evaluated(plan, tmp_path, capsys):
    """A save that failed leaves those of an earlier update, whose success would count as that of this one."""
    run = tmp_path / "run"
    save(run, 2)
    watched = open_watch(run)
    watched.begin(4)
    assert watched.child is None
    assert "step 4 is not evaluated: its weights could not be saved, the last are of 2" in capsys.readouterr().err


def test_slow_evaluation_makes_the_next_be_skipped(plan, tmp_path, capsys):
    """It goes on, and the training with it; a training that stops ends it."""
    plan({2: "sleep"})
    run = tmp_path / "run"
    save(run, 2)
    watched = open_watch(run)
    watched.begin(2)
    child = watched.child
    watched.begin(4)
    watched.report(4)
    assert watched.child is child and child.poll() is None
    assert "step 4 is not evaluated: the evaluation of step 2 still runs" in capsys.readouterr().err
    watched.finish(8, True, threading.Event())
    assert child.returncode == -signal.SIGKILL


def test_last_weights_are_waited_for(plan, tmp_path):
    """Also when the evaluation before still runs, and when their number is no multiple of --eval-every."""
    plan({2: 1, 5: 3})
    run = tmp_path / "run"
    save(run, 2)
    watched = open_watch(run)
    watched.begin(2)
    save(run, 5)
    watched.begin(5)
    watched.finish(5, False, threading.Event())
    assert [(entry["step"], entry["success_step"]) for entry in read_log(run)] == [(4, 2), (4, 5)]
    assert step_of(run / "best") == 5


def test_sigterm_ends_the_last_evaluation(plan, tmp_path):
    """Waiting for it ends once SIGTERM comes; resumed, the run evaluates the weights again."""
    plan({6: "sleep"})
    run = tmp_path / "run"
    save(run, 6)
    watched = open_watch(run)
    sigterm = threading.Event()
    threading.Timer(0.5, sigterm.set).start()
    watched.finish(6, False, sigterm)
    assert watched.child.returncode == -signal.SIGKILL and read_log(run) == []
    plan({6: 2})
    watched = open_watch(run, 6)
    assert watched.child and watched.step == 6  # at once, not only at the end
    watched.finish(6, False, threading.Event())
    assert [(entry["success_step"], entry["success"]) for entry in read_log(run)] == [(6, 0.5)]


def test_resumed_run_knows_what_was_evaluated(plan, tmp_path):
    """Results that the log lost are logged again, those of later steps are forgotten, the best stays."""
    plan({2: 3, 4: 4})
    run = tmp_path / "run"
    save(run, 0)
    watched = open_watch(run)
    evaluate(watched, run, 2, logged_at=3)
    evaluate(watched, run, 4)
    watched.log.close()
    assert len(read_log(run)) == 2
    for name in ("eval-2.jsonl.tmp", "eval-4.json.tmp"):  # of an evaluation that was killed while it wrote
        (run / "watch" / name).touch()
    watched = open_watch(run, 2)
    assert watched.child is None  # what is in watch/ is of step 4
    assert [(entry["step"], entry["success_step"]) for entry in read_log(run)] == [(1, 2)]
    assert sorted(path.name for path in (run / "watch").glob("eval-*")) == ["eval-2.json", "eval-2.jsonl"]
    plan({4: 1})
    evaluate(watched, run, 4)
    assert [entry["success"] for entry in read_log(run)] == [0.75, 0.25] and step_of(run / "best") == 4


def test_settings_that_cannot_work_are_refused(train_config, tmp_path):
    """Before a folder is made."""
    for changes, text in (
        ({"eval_every": 1500}, "eval_every is 1500; it must be a multiple of save_every, 1000"),
        ({"eval_every": 1000, "eval_trials": 0}, "eval_trials is 0; it must be at least 1"),
        ({"eval_every": 1000, "eval_flags": "--simulator moon"}, "simulator is 'moon'; choose one of"),
        ({"eval_every": 1000, "eval_flags": "--trials 50 --out=a.jsonl"}, "eval_flags has --out, --trials, which"),
        ({"eval_flags": "--envs 2"}, "--eval-flags has no effect with --eval-every 0"),
    ):
        with pytest.raises(ValueError, match=text):
            train.main(train_config(tmp_path / "run", **changes))
    with pytest.raises(SystemExit):
        train.main(train_config(tmp_path / "run", eval_every=1000, eval_flags="--enws 2"))
    assert not (tmp_path / "run").exists()


def test_best_save_is_a_run_of_its_own(plan, train_config, tmp_path, monkeypatch):
    """After a training that was evaluated: its weights act, and it has a card."""
    plan({4: 4, 8: 3, 9: 2})
    begin = watch.Watch.begin

    def begin_and_wait(watched, step):
        begin(watched, step)
        if watched.child:
            watched.child.wait()

    monkeypatch.setattr(watch.Watch, "begin", begin_and_wait)
    run = tmp_path / "run"
    train.main(train_config(run, variant="baseline", max_steps=9, save_every=4, eval_every=4))
    assert step_of(run / "best") == 4 and Policy(run / "best").chunk == 8
    assert "| updates | 4 of 4 samples" in (run / "best" / "README.md").read_text()
    log = read_log(run)
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(9))
    evaluated = [entry for entry in log if "success" in entry]
    assert [entry["success_step"] for entry in evaluated] == [4, 8, 9]
    assert evaluated[0]["step"] < 8  # as soon as it is there


def test_sigterm_ends_evaluation_and_training(plan, train_config, tmp_path):
    """As a scheduler sends it: training saves and ends at once, the child too."""
    plan({2: "sleep"})
    run = tmp_path / "run"

    def stop():
        while not (run / "watch" / "output.txt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    train.main(train_config(run, variant="baseline", max_steps=10**6, save_every=2, eval_every=2, keep=1))
    commands = [Path(f"/proc/{child}/cmdline").read_text() for child in descendants(os.getpid())]
    assert len(training_saves(run)) == 1 and not any("fake.py" in command for command in commands)


# ----------------------------------------------------------------------------------------------------------------------
# The real evaluation, in a simulator of one point


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A copy of the code with the simulator of docs/fork.md."""
    folder = tmp_path_factory.mktemp("code")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (simulator,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/fork.md").read_text(), re.S)
    (folder / "line_sim.py").write_text(simulator)
    text = (folder / "eval.py").read_text()
    (folder / "eval.py").write_text(text.replace('"libero": "sim"', '"libero": "sim", "line": "line_sim"'))
    return folder


@pytest.fixture
def training(rlds, cache):
    """Function (flags) -> a command that trains with evaluations every two updates."""
    flags = ["--variant", "baseline", "--data", rlds, "--cache", cache, "--global-batch-size", 4, "--num-workers", 0]
    flags += ["--save-every", 2, "--eval-every", 2, "--eval-flags=--simulator line --suite line --envs 1"]

    def make(*more):
        return [str(word) for word in ("train.py", *flags, *more)]

    return make


def test_evaluations_beside_two_processes(code, training, tmp_path):
    """Under torchrun, the first process's child is none of its processes."""
    small = training("--max-steps", 2, "--eval-trials", 1, "--out", tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *small], cwd=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [entry["success_step"] for entry in read_log(tmp_path / "run") if "success" in entry]
    assert steps == [2], done.stderr
    summary = json.loads((tmp_path / "run/watch/eval-2.json").read_text())
    assert summary["suites"][0]["episodes"] == 2 and summary["command"][0].endswith("eval.py")


def test_printed_command_evaluates(plan, script_here, cache, tmp_path):
    """That of docs/training.md, on the embedded data; its curves show the success."""
    plan({1: 9})
    small = ["--max-steps", 1, "--eval-trials", 9, "--num-workers", 0, "--cache", cache, "--out", tmp_path / "run"]
    done = script_here(*printed("python train.py --variant la_align")[1:], *small)
    assert done.code == 0 and "step 1 in simulators:   9/9   100.0 %   70.1 to 100.0 %" in done.text, done.text
    assert step_of(tmp_path / "run/best") == 1 and (tmp_path / "run/curves.png").exists()


def test_evaluation_ends_with_its_training(code, training, tmp_path):
    """A training that is killed (kill -9) leaves neither eval.py nor a simulator behind."""
    long = training("--max-steps", 10**6, "--keep", 1, "--eval-trials", 2000, "--out", tmp_path / "run")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([sys.executable, *long], cwd=code, **quiet) as process:
        result = tmp_path / "run/watch/eval-2.jsonl"
        wait_for(lambda: process.poll() is not None or (result.exists() and result.read_text()))
        below = descendants(process.pid)
        assert len(below) == 2, below
        process.kill()
    wait_for(lambda: not any(map(is_running, below)))


def test_evaluation_of_an_ended_training_plays_nothing(script_here, monkeypatch, tmp_path):
    """It may have ended before the child could ask to end with it."""
    monkeypatch.setattr(common, "die_with_parent", lambda: None)
    done = script_here(watch.COMMAND[1], 1, tmp_path)
    assert done.code == 1 and done.text.endswith("the training has ended")
