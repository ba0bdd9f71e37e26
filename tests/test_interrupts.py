"""Ctrl-C, and what wandb does to a run: neither costs more than a warning."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from warm import wait_for

import checkpoint
import common
import tracking
from curves import read_log


def log_of(folder):
    """Return the objects in a run's log; none before it is there."""
    return read_log(folder) if (folder / "log.jsonl").exists() else []


def start_long(run, out, *more):
    """Start a long training in a process group of its own, as a shell does; return it once updates are logged."""
    flags = (*run.flags, "--out", out, "--max-steps", 100_000, "--save-every", 100_000, *more)
    command = [sys.executable, *map(str, flags)]
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    training = subprocess.Popen(command, **how)
    wait_for(lambda: training.poll() is not None or log_of(out))
    assert training.poll() is None
    return training


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_saves_and_ends(run, tmp_path):
    """Sent to the training and its data workers, as a terminal does: it saves and ends with status 0, and it says how
    to go on, in a form that a shell takes."""
    out = tmp_path / "a run"
    with start_long(run, out, "--num-workers", 2) as training:
        os.killpg(training.pid, signal.SIGINT)
        text = training.communicate(timeout=60)[0]
    (step,) = checkpoint.training_saves(out)
    assert training.returncode == 0 and "Stopping: a save comes first." in text, text
    assert f"saved after {step} of 100000 steps. Continue: the same command with --out '{out}' --resume" in text
    assert [entry["step"] for entry in log_of(out)] == list(range(step))


def test_second_ctrl_c_ends_at_once(monkeypatch, capfd):
    """The first one only sets the event, the second one raises; afterwards the handlers are Python's own."""

    def train(config):
        event = common.catch_signals()
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setenv("RANK", "1")
        common.catch_signals()
        os.kill(os.getpid(), signal.SIGINT)

    common.report_worker_failures(train)(None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err.count("Stopping") == 1  # on the first of several processes


# ----------------------------------------------------------------------------------------------------------------------
# wandb


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, step):
        self.step = step
        self.sent = []
        self.dead = False

    def log(self, entry, step):
        if self.dead:
            raise ConnectionError("the service is gone")
        self.sent.append(step)

    def finish(self):
        self.sent.append("finish")


@pytest.fixture
def wandb(monkeypatch):
    """A wandb whose `init` notes its arguments in `calls`, fails as often as `failures` says, and returns `run`.

    As in the real one, an id whose start failed is in use until the teardown.
    """
    fake = SimpleNamespace(calls=[], failures=0, used=set(), run=FakeRun(0))
    fake.teardown = fake.used.clear

    def init(**options):
        fake.calls.append(options)
        if options["id"] in fake.used:
            raise RuntimeError("run ID is in use")
        if len(fake.calls) <= fake.failures:
            fake.used.add(options["id"])
            raise RuntimeError("no network")
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_resumed_run_continues_its_wandb_run(wandb, tmp_path):
    """With the id of the first start, and without the steps that wandb has already."""
    log = common.Log(tmp_path, wandb_project="p", config={"a": 1})
    log.write(step=0)
    log.close()
    wandb.run.step = 5
    log = common.Log(tmp_path, first_step=4, wandb_project="p")
    for step in (4, 5, 6):
        log.write(step=step)
    log.close()
    first, second = wandb.calls
    assert (
        first["id"] == second["id"] and first["resume"] == second["resume"] == "allow" and first["config"] == {"a": 1}
    )
    assert wandb.run.sent == [0, "finish", 5, 6, "finish"] and [e["step"] for e in log_of(tmp_path)] == [0, 4, 5, 6]


@pytest.mark.parametrize("failures, modes", [(1, [None, "offline"]), (2, [None, "offline"])])
def test_wandb_that_does_not_start_is_a_warning(wandb, failures, modes, tmp_path, capsys):
    """Without login or network the run is recorded offline; without even that only the log is written."""
    wandb.failures = failures
    log = common.Log(tmp_path, wandb_project="p")
    log.write(step=0)
    log.close()
    assert [call.get("mode") for call in wandb.calls] == modes
    assert "WARNING: wandb did not start (no network)" in capsys.readouterr().err
    assert len(log_of(tmp_path)) == 1 and wandb.run.sent == [0, "finish"][: 2 * (failures == 1)]


def test_wandb_that_dies_is_a_warning(wandb, tmp_path, capsys):
    """Once; the log goes on."""
    log = common.Log(tmp_path, wandb_project="p")
    wandb.run.dead = True
    for step in range(3):
        log.write(step=step)
    log.close()
    assert capsys.readouterr().err.count("wandb failed") == 1 and len(log_of(tmp_path)) == 3


def test_a_process_that_does_not_write_has_no_wandb(wandb, tmp_path):
    """Nor has a run without a project; a sweep's id is taken."""
    common.Log(tmp_path, main=False, wandb_project="p")
    common.Log(tmp_path).close()
    assert not wandb.calls and not (tmp_path / "wandb-id").exists()


def test_id_of_a_sweep_is_used(wandb, tmp_path, monkeypatch):
    """As `wandb agent` sets it."""
    monkeypatch.setenv("WANDB_RUN_ID", "swept")
    tracking.Tracker(tmp_path, "p", {})
    assert wandb.calls[0]["id"] == "swept"


@pytest.mark.parametrize("key", ("", "a" * 40))
def test_no_login_and_no_network_are_no_lost_start(key, run, script, tmp_path, monkeypatch):
    """The real wandb, without a login and a terminal to ask on, or without its server: the run trains and ends well."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "HOME": tmp_path,
        "WANDB_DIR": tmp_path,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": 2,
    }
    for name, value in (settings | ({"WANDB_API_KEY": key} if key else {})).items():
        monkeypatch.setenv(name, str(value))
    flags = [*run.flags, "--out", tmp_path / "run", "--max-steps", 2, "--wandb-project", "p"]
    done = script(*flags)
    assert done.code == 0 and "WARNING: wandb did not start" in done.text, done.text
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
