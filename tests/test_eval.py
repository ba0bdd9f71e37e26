"""eval.py: statistics against known values, the protocol in the real simulator, a real evaluation of a trained run."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from data import to_robosuite
from model import Policy
from sim import encode_jpeg

TASK = "put the bowl on the plate"  # libero_goal task 8


class Recorder:
    """A policy that keeps what it is given and answers with seeded small motions."""

    def __init__(self):
        self.seen, self.answers, self.rng = [], [], np.random.default_rng(0)

    def __call__(self, images, instructions, proprio):
        self.seen.append(([view.copy() for view in images], instructions, proprio.copy()))
        self.answers.append(
            np.concatenate([self.rng.uniform(-0.2, 0.2, (8, 6)), np.ones((8, 1))], 1).astype(np.float32)
        )
        return self.answers[-1][None]


@pytest.fixture(scope="module")
def cameras(index):
    """How the training images were stored, as a run's config says it."""
    return {name: index.jpeg_options(name) for name in ("image", "wrist_image")}


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


@pytest.mark.parametrize(
    "only_first, only_second, p",
    ((0, 0, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 6, 2 / 64), (2, 12, 2 * 106 / 2**14)),
)
def test_mcnemar_against_the_binomial(only_first, only_second, p):
    """Exact two-sided p from the discordant pairs; concordant ones do not count."""
    first = [True] * only_first + [False] * only_second + [True] * 7 + [False] * 4
    second = [False] * only_first + [True] * only_second + [True] * 7 + [False] * 4
    assert evaluation.mcnemar(first, second) == pytest.approx(p)


def result(path, outcomes, widen=0.06):
    """A small result file: task 1 with these outcomes at seeds 0, 1, ..."""
    rows = [
        {"task": 1, "seed": seed, "success": bool(s), "steps": 9, "seconds": 1.0} for seed, s in enumerate(outcomes)
    ]
    path.write_text(json.dumps(evaluation.tally(rows) | {"rows": rows, "suite": "libero_goal", "widen": widen}))
    return path


def test_compare_prints_paired_results(tmp_path, capsys):
    """9 of 10 against 1 of 10 with no pair won by the second: p = 2 / 2^8."""
    first, second = result(tmp_path / "a.json", [1] * 9 + [0]), result(tmp_path / "b.json", [1] + [0] * 9)
    evaluation.main(evaluation.Config(compare=(first, second)))
    a, b = capsys.readouterr().out.splitlines()
    assert (
        f"{first}: 9/10 = 90.0 % (59.6 to 98.2)" in a
        and f"{second}: 1/10 = 10.0 % (1.8 to 40.4)" in b
        and "p = 0.0078" in b
    )


@pytest.mark.parametrize("outcomes, widen", (([1] * 9, 0.06), ([1] * 10, 0.0)))
def test_compare_refuses_other_starts(outcomes, widen, tmp_path):
    """Other seeds or another width cannot be paired."""
    first, second = result(tmp_path / "a.json", [1] * 10), result(tmp_path / "b.json", outcomes, widen)
    with pytest.raises(ValueError, match="different starts"):
        evaluation.main(evaluation.Config(compare=(first, second)))


# ----------------------------------------------------------------------------------------------------------------------
# One episode


def test_look_equals_the_training_path(sim, cameras):
    """What the policy sees are the pixels of the JPEG that demos.py would have stored, at each camera's own quality."""
    sim.start(1)
    (image, wrist), proprio = evaluation.look(sim, cameras, blind=False)
    seen = sim.observe()
    for view, name, quality in ((image, "image", 85), (wrist, "wrist_image", 70)):
        stored = encode_jpeg(seen[name], 96, quality=quality)
        assert np.array_equal(view, np.asarray(Image.open(io.BytesIO(stored)))[None])
    assert np.array_equal(proprio, seen["state"][None]) and proprio.dtype == np.float32
    (only,), _ = evaluation.look(sim, {"wrist_image": cameras["wrist_image"]}, blind=False)
    assert np.array_equal(only, wrist)


def test_chunks_run_open_loop_and_cameras_draw_only_at_looks(sim, cameras, steps):
    """20 steps are 8 + 8 + 4: three looks, all actions in order, the gripper's sign, a frame at each chunk's end."""
    policy = Recorder()
    success, taken = evaluation.run_episode(sim, policy, cameras, 2, 0.0, TASK, 20)
    assert (success, taken, len(policy.seen)) == (False, 20, 3)
    expected = np.concatenate([to_robosuite(answer) for answer in policy.answers])[:20]
    assert np.array_equal([action for action, _, _ in steps], expected) and (expected[:, 6] == -1).all()  # 1 = open
    ends = [number in (7, 15, 19) for number in range(20)]
    assert [look for _, look, _ in steps] == ends and [drawn for _, _, drawn in steps] == ends
    positions = np.array([proprio[0, :3] for _, _, proprio in policy.seen])
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1).min() > 1e-3  # each look is a new one
    assert all(text == [TASK] for _, text, _ in policy.seen)


def test_episode_is_a_function_of_seed_and_actions(sim, cameras):
    """The same start and the same answers show the policy the same pixels; frames for a video do not change them."""
    seen = []
    for frames in (None, []):
        policy = Recorder()
        evaluation.run_episode(sim, policy, cameras, 3, 0.06, TASK, 9, frames=frames)
        seen.append(policy.seen)
    assert len(frames) == 9 and frames[0].shape == (256, 512, 3)
    for (views, _, proprio), (others, _, other) in zip(*seen, strict=True):
        assert all(map(np.array_equal, views, others)) and np.array_equal(proprio, other)


def test_success_ends_the_episode(sim, cameras, steps, monkeypatch):
    """When LIBERO's own check says so at the third step, nothing more is executed."""
    monkeypatch.setattr(sim.world, "_check_success", lambda: len(steps) == 2)
    assert evaluation.run_episode(sim, Recorder(), cameras, 0, 0.0, TASK, 20) == (True, 3)
    assert len(steps) == 3


# ----------------------------------------------------------------------------------------------------------------------
# A whole evaluation


def test_real_evaluation_ends_with_a_result(run, script, tmp_path):
    """The command rolls the run out in LIBERO, on the suite and kind of start of its data, and writes what it found."""
    done = script("eval.py", run.folder, "--trials", 1, "--task-ids", 8, "--out", tmp_path / "result.json")
    assert done.code == 0, done.text
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["episodes"] == len(found["rows"]) == 1 and found["successes"] == int(found["rows"][0]["success"])
    assert found["success_rate"] == found["successes"] and found["ci95"] == pytest.approx(
        evaluation.wilson(found["successes"], 1)
    )
    (task,) = found["tasks"]
    assert (task["task"], task["instruction"], task["episodes"]) == (8, TASK, 1) and task["ci95"] == found["ci95"]
    assert (found["suite"], found["variant"], found["blind"], found["mute"]) == (
        "libero_goal",
        "la_align",
        False,
        False,
    )
    assert found["widen"] == pytest.approx(0.06) and found["versions"]["mujoco"] == "3.3.2"
    (row,) = found["rows"]
    assert row["seed"] == 0 and (row["success"] or row["steps"] == 300)
    assert TASK in done.text and "95 % interval" in done.text and str(tmp_path / "result.json") in done.text


class Watched(Policy):
    """The real policy, with a list of what it was given."""

    def __call__(self, images, instructions, proprio):
        self.__dict__.setdefault("seen", []).append((images, instructions))
        return super().__call__(images, instructions, proprio)


@pytest.mark.parametrize("control", ("", "blind", "mute"))
def test_controls_take_away_what_they_say(control, run, sim, monkeypatch, tmp_path):
    """--blind: black images of the usual size; --mute: an empty instruction; else neither. Up to the step limit."""
    made = []
    monkeypatch.setattr(evaluation, "Policy", lambda *given: made.append(Watched(*given)) or made[0])
    monkeypatch.setattr(evaluation, "Sim", lambda *given: sim)  # the session's own, which is the one asked for
    monkeypatch.setattr(sim, "close", lambda: None)
    monkeypatch.setitem(evaluation.MAX_STEPS, "libero_goal", 12)
    flags = {control: True} if control else {"video": True}
    config = evaluation.Config(run=str(run.folder), trials=1, task_ids=(8,), **flags)
    found = evaluation.evaluate(config, tmp_path / "r.json")
    assert (found["blind"], found["mute"]) == (control == "blind", control == "mute") and found["rows"][0][
        "steps"
    ] == 12
    assert (tmp_path / "r" / "task8-seed0.gif").exists() == (not control)
    assert len(made[0].seen) == 2
    for views, texts in made[0].seen:
        assert texts == ["" if control == "mute" else TASK]
        assert [view.shape for view in views] == [(1, 96, 96, 3)] * 2
        assert all((view.max() == 0) == (control == "blind") for view in views)


def plan(entry, **flags):
    """What `plan` decides for a run on one data set."""
    policy = SimpleNamespace(name=entry["name"], config={"data": [entry]})
    return evaluation.plan(evaluation.Config(**flags), policy)[:3]


ENTRY = {
    "name": "made",
    "suite": "libero_goal",
    "tasks": [1, 8],
    "widen": 0.06,
    "seeds": [10_000, 10_007],
    "instructions": [TASK],
}


def test_tasks_and_starts_default_to_those_of_the_data():
    """Suite, tasks and width from the data unless given; a released data set is known by its name and instructions."""
    assert plan(ENTRY) == ("libero_goal", [1, 8], 0.06)
    assert plan(ENTRY, suite="libero_object") == ("libero_object", list(range(10)), 0.0)
    assert plan(ENTRY, task_ids=(4,), widen=0.0) == ("libero_goal", [4], 0.0)
    released = {"name": "libero_goal_no_noops", "instructions": ["put the bowl on the stove", TASK]}
    assert plan(released) == ("libero_goal", [1, 8], 0.0)
    with pytest.raises(ValueError, match="does not name a LIBERO suite.*--suite, one of libero_spatial"):
        plan(released | {"name": "kitchen"})
    with pytest.raises(ValueError, match=r"task_ids \[10\] are not in libero_goal, which has tasks 0 to 9"):
        plan(ENTRY, task_ids=(8, 10))


def test_seeds_of_demonstrations_are_refused():
    """Not one trial may start where a demonstration started; just before and after is fine."""
    for seed in (10_000, 9_999, 10_007, 9_981):
        with pytest.raises(ValueError, match="overlap those of the demonstrations, 10000 to 10007"):
            plan(ENTRY, seed=seed)
    assert plan(ENTRY, seed=9_980) and plan(ENTRY, seed=10_008)


def test_expert_is_counted_on_the_same_starts_only():
    """Same suite, task, seed and width."""
    kinds = [(8, 0, 0.06, True), (8, 1, 0.06, False), (8, 2, 0.06, True), (1, 0, 0.06, True), (8, 0, 0.0, True)]
    entry = {
        "suite": "libero_goal",
        "expert": [dict(zip(("task", "seed", "widen", "success"), kind)) for kind in kinds],
    }
    rows = [{"task": 8, "seed": 0}, {"task": 8, "seed": 1}, {"task": 1, "seed": 2}]
    assert evaluation.expert(entry, "libero_goal", 8, 0.06, rows) == {"expert_successes": 1, "expert_episodes": 2}
    assert evaluation.expert(entry, "libero_object", 8, 0.06, rows)["expert_episodes"] == 0


def test_existing_result_stays(run, tmp_path):
    """A result is never overwritten, and that is said before anything runs."""
    (tmp_path / "r.json").write_text("mine")
    with pytest.raises(FileExistsError, match="r.json exists; choose another --out"):
        evaluation.main(evaluation.Config(run=str(run.folder), trials=1, out=str(tmp_path / "r.json")))
    assert (tmp_path / "r.json").read_text() == "mine"
