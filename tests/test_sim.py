"""sim.py against the environment's own behaviour: frames, starts, settling, replay, errors."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

import sim as simulator
from images import encode_image

ROOT = Path(__file__).parents[1]
WIGGLE = np.c_[np.random.default_rng(0).normal(size=(5, 6)) * 0.2, -np.ones(5)]  # [5, 7] actions


def same(a, b):
    """Return whether two dicts of arrays are equal in every bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def wiggle(sim):
    """Execute five steps, of which only the last draws the cameras."""
    for action in WIGGLE[:-1]:
        sim.step(action)
    sim.step(WIGGLE[-1], render=True)


def test_frame_drawn_on_demand_is_the_environments_own(sim, monkeypatch):
    """A frame is the same whether cameras draw only at its step or, as robosuite's own sensors do, at every step."""
    sim.start(3)
    wiggle(sim)
    on_demand = sim.observe()
    monkeypatch.setattr(sim, "_lazy_sensor", lambda sensor: sensor)
    sim.start(3)
    wiggle(sim)
    for key, camera in simulator.CAMERAS.items():
        assert np.array_equal(on_demand[key], np.rot90(sim.observed[f"{camera}_image"], 2))


def test_start_is_a_function_of_its_arguments(sim):
    """The same seed and width give the same observation, whatever was played before; a different seed does not."""
    sim.start(4, widen=0.06)
    first = sim.observe()
    sim.start(5)
    assert not same(first, sim.observe())
    sim.start(4, widen=0.06)
    assert same(first, sim.observe())


def test_reset_that_keeps_the_compiled_model_is_a_full_one(sim, monkeypatch):
    """State and frames after it, and five steps on, are those of robosuite's own reset, which compiles again."""
    seen = []
    for full in (False, True):
        if full:
            monkeypatch.delattr(sim.world, "_initialize_sim")
            monkeypatch.delattr(sim.world, "_destroy_sim")
        for seed in (6, 3):
            sim.start(seed)
            first, state = sim.observe(), sim.state()
            wiggle(sim)
            seen.append([first, {"state": state}, sim.observe(), {"state": sim.state()}])
    assert all(same(a, b) for fast, full in zip(seen[:2], seen[2:]) for a, b in zip(fast, full))
    assert not same(seen[0][0], seen[1][0])


def test_start_settles_and_draws_once(sim, monkeypatch):
    """Ten steps without motion, of which the last draws the cameras."""
    calls, step = [], sim.step

    def recorded(action, render=False):
        calls.append((tuple(action), render))
        return step(action, render)

    monkeypatch.setattr(sim, "step", recorded)
    sim.start(0)
    assert calls == [((0, 0, 0, 0, 0, 0, -1), False)] * 9 + [((0, 0, 0, 0, 0, 0, -1), True)]


def test_widened_start_moves_the_handled_object_alone(sim):
    """The bowl lies elsewhere within the square; the fixtures, drawn by the same seed, stay."""
    assert sim.handled_object() == "akita_black_bowl_1"
    sim.start(1)
    before = {name: sim.position(name) for name in sim.world.obj_body_id}
    sim.start(1, widen=0.06)
    after = {name: sim.position(name) for name in before}
    bowl = before.pop("akita_black_bowl_1") - after["akita_black_bowl_1"]
    assert 0.005 < np.abs(bowl[:2]).max() < 0.065
    for fixture in ("wooden_cabinet_1", "flat_stove_1", "wine_rack_1"):
        assert np.array_equal(before[fixture], after[fixture])


def test_widened_start_needs_a_free_place_and_an_object(sim, monkeypatch):
    """A square without a free place, and a goal without a movable object, are errors."""
    sim.start(1)
    with monkeypatch.context() as patch:
        patch.setattr(simulator, "CLEARANCE", 1.0)
        with pytest.raises(ValueError, match="no free place"):
            sim.start(1, widen=0.06)
    monkeypatch.setitem(sim.world.parsed_problem, "goal_state", [["open", "wooden_cabinet_1_middle_region"]])
    with pytest.raises(ValueError, match="moves no object"):
        sim.start(1, widen=0.06)


def test_restore_is_exact(sim):
    """Restored twice, with other episodes in between, states and frames five steps on are the same in every bit."""
    sim.start(2, widen=0.06)
    wiggle(sim)
    state, runs = sim.state(), []
    for other in (7, 8):
        sim.restore(2, state)
        first = sim.observe()
        wiggle(sim)
        runs.append([first, sim.observe(), {"state": sim.state()}])
        sim.start(other)
    assert all(same(a, b) for a, b in zip(*runs))


def test_observe_needs_a_drawn_frame(sim):
    """An observation has the documented shapes; without a drawn frame there is none."""
    sim.start(0)
    seen = sim.observe()
    assert {key: (value.shape, value.dtype.name) for key, value in seen.items()} == {
        "image": ((256, 256, 3), "uint8"),
        "wrist_image": ((256, 256, 3), "uint8"),
        "state": ((8,), "float32"),
        "joint_state": ((7,), "float32"),
    }
    sim.step(simulator.NO_MOTION)
    with pytest.raises(RuntimeError, match="render=True"):
        sim.observe()


def test_axis_angle_equals_robosuites():
    """On random quaternions and the identity."""
    from robosuite.utils.transform_utils import quat2axisangle

    for quat in np.random.default_rng(0).normal(size=(20, 4)):
        quat /= np.linalg.norm(quat)
        assert np.allclose(simulator.axis_angle(quat), quat2axisangle(quat.copy()), atol=1e-12)
    assert np.array_equal(simulator.axis_angle(np.array([0, 0, 0, 1.0])), np.zeros(3))


def test_jpeg_holds_the_options_to_write_the_same(sim):
    """Quantisation tables and subsampling, read from a stored image, reproduce it in every byte."""
    sim.start(0)
    frame = sim.observe()["image"]
    written = encode_image(frame, 96, quality=85)
    with Image.open(io.BytesIO(written)) as image:
        assert image.size == (96, 96)
        options = {"qtables": image.quantization, "subsampling": JpegImagePlugin.get_sampling(image)}
    assert encode_image(frame, 96, **options) == written
    assert encode_image(frame, 96, quality=50) != written


def test_import_is_light():
    """Importing sim and rollout loads none of the large packages, so simulator processes do not pay for torch."""
    code = "import sys, rollout, sim; print([name for name in ('mujoco', 'libero', 'torch') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_errors_say_what_to_do(monkeypatch):
    """An unknown suite, a task that there is not, a MuJoCo that differs from the benchmark's."""
    with pytest.raises(ValueError, match="libero_gaol.*libero_goal"):
        simulator.Sim("libero_gaol", 0)
    with pytest.raises(ValueError, match="task=10.*0 to 9"):
        simulator.Sim("libero_goal", 10)
    monkeypatch.setattr(simulator, "version", lambda name: "3.4.1")
    with pytest.raises(RuntimeError, match="pip install mujoco==3.3.2"):
        simulator.Sim("libero_goal", 8)


def test_missing_egl_names_the_debian_packages():
    """Without a vendor library EGL finds no device, as on a machine without Mesa."""
    code = "import sim; sim.Sim('libero_goal', 8)"
    hidden = {**os.environ, "MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=hidden)
    assert shown.returncode and "apt-get install libegl1 libegl-mesa0" in shown.stderr
