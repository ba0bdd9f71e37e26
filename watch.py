"""Evaluate a run in simulators while it trains: train.py --eval-every.

Each time the saved weights are copied to RUN/watch, a run folder of its own, and eval.py plays a few trials of each
task with them, the same ones each time, in a process that ends with the training. Success becomes a line of log.jsonl,
and the weights that succeeded most often (of equals the last) are kept in RUN/best, a run folder too. While one
evaluation runs no other begins: it is skipped, but for that of the last weights, for which training waits. One that
fails is a warning.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tyro
from tqdm import tqdm

import eval as evaluation
from common import die_with_parent
from curves import read_log
from files import atomic_file, option_names, read_json, read_metadata, saved_step
from results import format_rate, wilson

FIRST_SEED = 1000  # of the trials; `python eval.py RUN` plays others, for which no weights were chosen
COMMAND = (sys.executable, __file__)  # followed by the process id of the training and the arguments of eval.py
FILES = ("config.json", "dataset_statistics.json", "model.safetensors")  # that make a run folder


def command_line(config, run, path):
    """Return the arguments of eval.py for one evaluation. config: of train.py; path: the result file."""
    flags = shlex.split(config.eval_flags)
    return [str(run), "--seed", str(FIRST_SEED), *flags, "--trials", str(config.eval_trials), "--out", str(path)]


def check_evaluation(config):
    """Raise ValueError when the evaluations that the settings of train.py ask for cannot work."""
    if config.eval_every % config.save_every:
        raise ValueError(
            f"eval_every is {config.eval_every}; it must be a multiple of save_every, {config.save_every}, for what is "
            "evaluated is what was saved"
        )
    if taken := option_names(config.eval_flags) & {"--trials", "--out", "--shard"}:
        raise ValueError(f"eval_flags has {', '.join(sorted(taken))}, which train.py sets itself: see --eval-trials")
    if config.eval_every:
        evaluation.check(tyro.cli(evaluation.Config, args=command_line(config, "RUN", "eval.jsonl")))


class Watch:
    """The evaluations of one run. Without --eval-every, and on all processes but the first, its methods do nothing."""

    def __init__(self, config, run, first, log, main):
        """Go on with the evaluations of a run that has seen `first` updates. config: of train.py; log: the run's."""
        self.every = config.eval_every if main else 0
        self.config = config
        self.run = run
        self.folder = run / "watch"
        self.log = log
        self.child = None  # the process that evaluates
        self.step = None  # how many updates the weights had seen that it evaluates, or did last
        self.logged = set()  # the same, of all evaluations in the log
        if self.every:
            self._resume(first)

    def _resume(self, first):
        """Forget what is later than `first` updates, log what the log lacks, and complete the last evaluation."""
        for path in self.folder.glob("eval-*.json*"):
            if path.suffix == ".tmp" or _step_of(path) > first:
                path.unlink()
        self.logged = {entry["success_step"] for entry in read_log(self.run) if "success_step" in entry}
        self._log_results(first - 1)
        weights = self.folder / "model.safetensors"
        if weights.exists():
            step = int(read_metadata(weights)["step"])
            if step in self.logged:  # it had ended when training was killed, perhaps before its weights were kept
                self._keep_if_best(step, self._results())
            elif step <= first:
                self._start(step)

    def begin(self, step):
        """Evaluate the weights that were just saved, after `step` updates, if it is time to."""
        if not self.every or step % self.every:
            return
        if self.child:
            say(f"step {step} is not evaluated: the evaluation of step {self.step} still runs")
        else:
            self._begin(step)

    def _begin(self, step):
        try:
            for path in self.folder.glob(f"eval-{step}.json*"):
                path.unlink()
            copy_run(self.run, self.folder)
            if (saved := saved_step(self.folder / "model.safetensors")) != step:
                say(f"WARNING: step {step} is not evaluated: its weights could not be saved, the last are of {saved}")
                return
            self._start(step)
        except OSError as error:
            say(f"WARNING: step {step} is not evaluated: {error}")

    def _start(self, step):
        """Start eval.py for the weights in the folder."""
        self.step = step
        arguments = command_line(self.config, self.folder, self.folder / f"eval-{step}.jsonl")
        command = [*COMMAND, str(os.getpid()), *arguments]
        alone = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # not one of torchrun's processes
        with open(self.folder / "output.txt", "w") as output:
            self.child = subprocess.Popen(command, stdout=output, stderr=output, env=alone)

    def report(self, step):
        """After update `step`: log the evaluation that has ended, if any, and keep its weights if they are the best."""
        if not self.child or self.child.poll() is None:
            return
        self.child = None
        results = self._results()
        if self.step not in results:
            output = self.folder / "output.txt"
            reason = output.read_text().strip().rpartition("\n")[2]
            say(f"WARNING: the evaluation of step {self.step} failed: {reason} (all of it: {output})")
            return
        self._keep_if_best(self.step, results)
        self._log_results(step)

    def _keep_if_best(self, step, results):
        """Copy the weights in the folder, those of `step`, to RUN/best if none of the results is better."""
        if step not in results or step != max(results, key=lambda number: (results[number]["success_rate"], number)):
            return
        try:
            copy_run(self.folder, self.run / "best")
        except OSError as error:
            say(f"WARNING: {self.run / 'best'} is not written: {error}")

    def _results(self):
        """Return {step: {"successes", "episodes", "success_rate", "ci95"}} of all that have a result, in order."""
        results = {}
        for path in sorted(self.folder.glob("eval-*.json"), key=_step_of):
            suites = read_json(path)["suites"]
            successes, episodes = (sum(suite[name] for suite in suites) for name in ("successes", "episodes"))
            if episodes:  # not all ended in errors
                counts = {"successes": successes, "episodes": episodes, "success_rate": successes / episodes}
                results[_step_of(path)] = counts | {"ci95": wilson(successes, episodes)}
        return results

    def _log_results(self, step):
        """Log, after update `step`, the results that the log lacks."""
        for number, counts in self._results().items():
            if number not in self.logged:
                low, high = counts["ci95"]
                rate = {"success": counts["success_rate"], "success_low": low, "success_high": high}
                self.log.write(step=step, success_step=number, **rate)
                self.logged.add(number)
                say(f"step {number} in simulators: {format_rate(counts)}")

    def finish(self, steps, stopping, sigterm):
        """Wait for the evaluation that runs, and for that of the last weights, after `steps` updates.

        When training is `stopping`, or once the event `sigterm` is set, end it instead.
        """
        if not self.every:
            return
        if not stopping:
            self._wait(steps, sigterm)
            if self.step != steps and steps not in self.logged and not sigterm.is_set():
                self._begin(steps)
                self._wait(steps, sigterm)
        if self.child:
            self.child.kill()
            self.child.wait()

    def _wait(self, steps, sigterm):
        if self.child:
            say(f"waiting for the evaluation of step {self.step}")
        while self.child and not sigterm.is_set():
            time.sleep(0.2)
            self.report(steps - 1)


def copy_run(source, target):
    """Copy what makes a run folder; each file is replaced at once."""
    target.mkdir(exist_ok=True)
    for name in FILES:
        with atomic_file(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def _step_of(path):
    return int(path.stem.removeprefix("eval-"))


def say(text):
    """Print a line above the progress bar."""
    tqdm.write(text, file=sys.stderr)


if __name__ == "__main__":
    training = int(sys.argv.pop(1))
    die_with_parent()
    if os.getppid() != training:
        sys.exit("the training has ended")
    sys.argv[0] = str(Path(__file__).with_name("eval.py"))
    runpy.run_path(sys.argv[0], run_name="__main__")
