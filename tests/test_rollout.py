"""rollout.py: one episode in the real simulator, its observations and its video."""

import io

import cv2
import numpy as np
import pytest
from eval_helpers import episode
from PIL import Image

import rollout
from images import encode_image, store_image


class Recorder:
    """A policy that keeps its observations and gives small seeded motions."""

    def __init__(self):
        self.observations, self.chunks, self.rng = [], [], np.random.default_rng(0)

    def __call__(self, observation):
        images = [image.copy() for image in observation["images"].values()]
        self.observations.append((images, observation["state"].copy()))
        motion = self.rng.uniform(-0.2, 0.2, (8, 6))
        self.chunks.append(np.concatenate([motion, -np.ones((8, 1))], 1).astype(np.float32))
        return self.chunks[-1]


@pytest.fixture
def steps(sim, monkeypatch):
    """The (action, render, drawn) of every step of the simulator after settling."""
    taken, step, start = [], sim.step, sim.start

    def recorded_step(action, render=False):
        success = step(action, render)
        taken.append((np.array(action), render, sim.drawn))
        return success

    def recorded_start(*arguments):
        start(*arguments)
        taken.clear()

    monkeypatch.setattr(sim, "step", recorded_step)
    monkeypatch.setattr(sim, "start", recorded_start)
    return taken


def test_observation_equals_the_training_path(sim, cameras, dataset):
    """An observation has the frames as they are drawn. Stored as the data says, they are the pixels of the JPEG that
    demos.py would have stored, at each camera's own quality."""
    sim.start(1)
    observation = rollout.make_observation(sim, episode(cameras=cameras))
    observed = sim.observe()
    assert list(observation["images"]) == ["image", "wrist_image"]
    for name, quality in (("image", 85), ("wrist_image", 70)):
        frame = observation["images"][name]
        assert np.array_equal(frame, observed[name]) and frame.shape == (256, 256, 3)
        pixels = store_image(frame, **dataset.storage_options(name))
        stored = encode_image(observed[name], 96, quality=quality)
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(stored))))
    state = observation["state"]
    assert np.array_equal(state, observed["state"]) and state.dtype == np.float32
    assert observation["instruction"] == episode().prompt
    one_camera = episode(cameras={"wrist_image": cameras["wrist_image"]})
    assert list(rollout.make_observation(sim, one_camera)["images"]) == ["wrist_image"]


@pytest.mark.parametrize("execute, count", ((8, 3), (5, 4)))
def test_chunks_run_open_loop_and_cameras_draw_only_for_observations(execute, count, sim, cameras, steps):
    """20 steps are 8 + 8 + 4, or four times the first 5 of a chunk: an observation for each, their actions in order, a
    frame only before a new observation."""
    policy = Recorder()
    success, executed = rollout.play(sim, episode(seed=2, cameras=cameras, execute=execute), policy)
    assert (success, len(executed), len(policy.observations)) == (False, 20, count)
    parts = [chunk[:execute] for chunk in policy.chunks]
    assert np.array_equal([action for action, _, _ in steps], np.concatenate(parts)[:20])
    ends = [(number + 1) % execute == 0 for number in range(20)]
    assert [render for _, render, _ in steps] == ends and [drawn for _, _, drawn in steps] == ends
    positions = np.array([state[:3] for _, state in policy.observations])
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1).min() > 1e-3  # each observation is a new one


def test_blind_policy_gets_black_images_that_nobody_draws(sim, cameras, steps):
    """Image sizes and proprio do not change, and the robot moves as it would have."""
    seeing, blind = Recorder(), Recorder()
    rollout.play(sim, episode(cameras=cameras, max_steps=9), seeing)
    rollout.play(sim, episode(cameras=cameras, max_steps=9, blind=True), blind)
    assert not any(drawn for _, _, drawn in steps)
    for (black, state), (images, other) in zip(blind.observations, seeing.observations, strict=True):
        assert [image.shape for image in black] == [(96, 96, 3)] * 2 and not any(image.any() for image in black)
        assert all(image.any() for image in images) and np.array_equal(state, other)


def test_one_camera_can_be_black_and_two_exchanged(sim, cameras):
    """The others stay as they are; each exchanged view has the other's name."""
    unchanged, black, swapped = Recorder(), Recorder(), Recorder()
    small = cameras | {"wrist_image": 64}
    for policy, controls in (
        (unchanged, {}),
        (black, {"black_camera": "wrist_image"}),
        (swapped, {"swap_cameras": True}),
    ):
        rollout.play(sim, episode(cameras=small, max_steps=1, **controls), policy)
    (main, wrist), (same, none), (first, second) = (p.observations[0][0] for p in (unchanged, black, swapped))
    assert np.array_equal(same, main) and none.shape == (64, 64, 3) and not none.any() and wrist.any()
    assert np.array_equal(first, wrist) and np.array_equal(second, main) and not np.array_equal(main, wrist)


def test_success_ends_the_episode(sim, cameras, steps, monkeypatch):
    """When LIBERO's own check reports success at the third step, nothing more is executed."""
    monkeypatch.setattr(sim.world, "_check_success", lambda: len(steps) == 2)
    success, executed = rollout.play(sim, episode(cameras=cameras), Recorder())
    assert (success, len(executed), len(steps)) == (True, 3, 3)


def test_drawing_every_step_changes_nothing(sim, cameras, monkeypatch):
    """Observations are the same, bit for bit, whether cameras draw at every step or only for the policy."""
    observations, step = [], sim.step
    for forced in ({}, {"render": True}):
        monkeypatch.setattr(
            sim, "step", lambda action, render=False, forced=forced: step(action, **{"render": render} | forced)
        )
        policy = Recorder()
        rollout.play(sim, episode(seed=3, widen=0.06, cameras=cameras, max_steps=9), policy)
        observations.append(policy.observations)
    for (images, state), (others, other) in zip(*observations, strict=True):
        assert all(map(np.array_equal, images, others)) and np.array_equal(state, other)


def test_video_shows_the_episode_again(sim, cameras, tmp_path):
    """A frame of every second step, the last for a second; the file is complete; one report per frame; one sheet."""
    policy, reports = Recorder(), []
    recorded = [
        episode(seed=seed, cameras=cameras, max_steps=6, video=str(tmp_path / f"goal-task8-seed{seed}.mp4"))
        for seed in (5, 12)
    ]
    for part in recorded:
        _, executed = rollout.play(sim, part, policy)
        end = sim.state()
        rollout.record_video(sim, part, executed, False, lambda: reports.append(0))
        assert np.array_equal(sim.state(), end)
        video = cv2.VideoCapture(part.video)
        size = (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT))
        assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS), *size) == (3 + 10, 10, 512, 300)
    assert len(reports) == 2 * 4
    (tmp_path / "goal-task8-seed5.mp4.part.mp4").write_bytes(b"left by a kill")
    rollout.contact_sheets(tmp_path)
    (tmp_path / "goal-task8-seed5.mp4.part.mp4").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "goal-task8-seed12.mp4",
        "goal-task8-seed5.mp4",
        "goal-task8.png",
    ]
    sheet = np.asarray(Image.open(tmp_path / "goal-task8.png"))
    assert sheet.shape == (2 * 150, 3 * 256, 3) and all(sheet[y : y + 20, :120].max() > 200 for y in (0, 150))  # text
