"""Helpers of the evaluation tests: short episodes, records and files of results."""

import json

import results
from rollout import Episode

TASK = "put the bowl on the plate"  # libero_goal task 8


def episode(**changes):
    """Return a short episode of the session's task."""
    values = {"simulator": "sim", "suite": "libero_goal", "task": 8, "seed": 0, "trial": 0, "instruction": TASK}
    return Episode(**values | {"prompt": TASK, "max_steps": 20} | changes)


def record(seed, success, **changes):
    """Return one line of a result file."""
    values = {
        "suite": "libero_goal",
        "task": 1,
        "instruction": "put it there",
        "prompt": "",
        "trial": seed,
        "seed": seed,
    }
    values |= {"widen": 0.06, "success": success, "steps": 9, "reason": "", "seconds": 1.0, "spent": {}}
    return values | {"settings": {"model": "m"}, "versions": {"mujoco": "3.3.2"}, "commit": "c"} | changes


def write(path, trials):
    """Write a result file; return its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    return path


def open_results(path, settings=None):
    """Return the result file that an evaluation with MuJoCo 3.3.2 would open."""
    return results.Results(path, settings or {"model": "m"}, {"mujoco": "3.3.2"})
