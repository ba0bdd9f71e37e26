"""rollout.py: one episode in the real simulator, its observations and its video."""

import io

import cv2
import numpy as np
import pytest
from eval_helpers import episode
from PIL import Image

import rollout
from rollout import encode_image


class Recorder:
    """A policy that keeps its observations and gives small seeded motions."""

    def __init__(self):
        self.observations, self.chunks, self.rng = [], [], np.random.default_rng(0)

    def __call__(self, images, proprio):
        self.observations.append(([image.copy() for image in images], proprio.copy()))
        motion = self.rng.uniform(-0.2, 0.2, (8, 6))
        self.chunks.append(np.concatenate([motion, -np.ones((8, 1))], 1).astype(np.float32))
        return self.chunks[-1]


@pytest.fixture(scope="module")
def cameras(dataset):
    """How the training images were stored, as a run's config states it."""
    return {name: dataset.storage_options(name) for name in dataset.cameras}


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


def test_observation_equals_the_training_path(sim, cameras):
    """A policy's images are the pixels of the JPEG that demos.py would have stored, at each camera's own quality."""
    sim.start(1)
    (image, wrist), proprio = rollout.policy_observation(sim, cameras)
    observed = sim.observe()
    for pixels, name, quality in ((image, "image", 85), (wrist, "wrist_image", 70)):
        stored = encode_image(observed[name], 96, quality=quality)
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(stored))))
    assert np.array_equal(proprio, observed["state"]) and proprio.dtype == np.float32
    (only,), _ = rollout.policy_observation(sim, {"wrist_image": cameras["wrist_image"]})
    assert np.array_equal(only, wrist)


def test_chunks_run_open_loop_and_cameras_draw_only_for_observations(sim, cameras, steps):
    """20 steps are 8 + 8 + 4: three observations, all actions in order, a frame at each chunk's end."""
    policy = Recorder()
    success, executed = rollout.play(sim, episode(seed=2, cameras=cameras), policy)
    assert (success, len(executed), len(policy.observations)) == (False, 20, 3)
    assert np.array_equal([action for action, _, _ in steps], np.concatenate(policy.chunks)[:20])
    ends = [number in (7, 15, 19) for number in range(20)]
    assert [render for _, render, _ in steps] == ends and [drawn for _, _, drawn in steps] == ends
    positions = np.array([proprio[:3] for _, proprio in policy.observations])
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1).min() > 1e-3  # each observation is a new one


def test_blind_policy_gets_black_images_that_nobody_draws(sim, cameras, steps):
    """Image sizes and proprio do not change, and the robot moves as it would have."""
    seeing, blind = Recorder(), Recorder()
    rollout.play(sim, episode(cameras=cameras, max_steps=9), seeing)
    rollout.play(sim, episode(cameras=cameras, max_steps=9, blind=True), blind)
    assert not any(drawn for _, _, drawn in steps)
    for (black, proprio), (images, other) in zip(blind.observations, seeing.observations, strict=True):
        assert [image.shape for image in black] == [(96, 96, 3)] * 2 and not any(image.any() for image in black)
        assert all(image.any() for image in images) and np.array_equal(proprio, other)


def test_one_camera_can_be_black_and_two_exchanged(sim, cameras):
    """The others stay as they are; exchanged views are stored at the size of the camera whose place they take."""
    plain, black, swapped = Recorder(), Recorder(), Recorder()
    small = cameras | {"wrist_image": cameras["wrist_image"] | {"size": 64}}
    for policy, controls in ((plain, {}), (black, {"black_camera": "wrist_image"}), (swapped, {"swap_cameras": True})):
        rollout.play(sim, episode(cameras=small, max_steps=1, **controls), policy)
    ((main, wrist), _), ((same, none), _), ((first, second), _) = (p.observations[0] for p in (plain, black, swapped))
    assert np.array_equal(same, main) and none.shape == (64, 64, 3) and not none.any() and wrist.any()
    assert first.shape == (96, 96, 3) and second.shape == (64, 64, 3)
    for view, right, wrong in ((first, wrist, main), (second, main, wrist)):
        errors = [
            np.abs(np.array(Image.fromarray(x).resize(view.shape[:2]), float) - view).mean() for x in (right, wrong)
        ]
        assert errors[0] < 6 < errors[1]


def test_success_ends_the_episode(sim, cameras, steps, monkeypatch):
    """When LIBERO's own check reports success at the third step, nothing more is executed."""
    monkeypatch.setattr(sim.world, "_check_success", lambda: len(steps) == 2)
    success, executed = rollout.play(sim, episode(cameras=cameras), Recorder())
    assert (success, len(executed), len(steps)) == (True, 3, 3)


def test_drawing_every_step_changes_nothing(sim, cameras):
    """Observations are the same, bit for bit, whether cameras draw at every step or only for the policy."""
    observations = []
    for every_step in (False, True):
        policy = Recorder()
        rollout.play(sim, episode(seed=3, widen=0.06, cameras=cameras, max_steps=9), policy, every_step)
        observations.append(policy.observations)
    for (images, proprio), (others, other) in zip(*observations, strict=True):
        assert all(map(np.array_equal, images, others)) and np.array_equal(proprio, other)


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
