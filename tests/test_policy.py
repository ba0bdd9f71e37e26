"""policy.py and execution.py: observations, refusals, batches, executed actions; a policy in other people's code."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, printed
from PIL import Image, JpegImagePlugin

import model
import policy as policies
from checkpoint import trainable_tensors
from dataspec import PRESETS, to_dict
from execution import Execution
from files import save_tensors, write_json
from images import read_image, store_image
from lora import base_hash
from normalise import statistics_hash
from policy import Policy

TEXT = "put the bowl on the plate"
LONG_TEXT = f"{TEXT} and then open the drawer of the cabinet and close it again"


def jpeg_options(quality):
    """Return how a JPEG of some quality is stored, as a run's config states it."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    image = Image.open(file)
    tables = [list(table) for _, table in sorted(image.quantization.items())]
    return {"format": "JPEG", "qtables": tables, "subsampling": JpegImagePlugin.get_sampling(image)}


def statistics(low, high, mask=None):
    """Return the statistics of a column whose quantiles are `low` and `high` and whose extremes lie 0.1 beyond."""
    low, high = np.array(low, float), np.array(high, float)
    column = {"q01": low, "q99": high, "low": low, "high": high, "min": low - 0.1, "max": high + 0.1, "mean": low}
    stats = {name: values.tolist() for name, values in column.items()} | {"std": [1.0] * len(low), "clip": True}
    return stats | {"mask": mask or [True] * len(low)}


def write_run(folder, state_size=8):
    """Write a run of the tiny model with random weights, of LIBERO's sizes, and chunks of 4 actions; return the folder.

    Images are 48 x 48, in JPEGs of quality 85 for one camera and 24 x 24 without loss for the other.
    """
    torch.manual_seed(1)
    sizes = dict(cameras=2, image_size=32, text_length=24, chunk=4, action_size=7, proprio_size=state_size)
    vla = model.VLA(model.ModelConfig("baseline", "tiny", gate=1.0, **sizes))
    stats = {"action": statistics([-0.5] * 6 + [0.1], [0.5] * 6 + [0.9], [True] * 6 + [False])}
    if state_size:  # position, rotation vector, two fingers
        low, high = [-0.5, -0.5, 0.5, 2.9, -0.2, -0.2, 0.0, -0.04], [0.5, 0.5, 1.5, 3.4, 0.2, 0.2, 0.04, 0.0]
        stats["proprio"] = statistics(low, high)
    entry = {"name": "made", "embodiment": "libero", "statistics": statistics_hash(stats), "instructions": [TEXT]}
    entry |= {"image_sides": [0, 0], "spec": to_dict(PRESETS["libero"])}
    entry["cameras"] = {"image": {"size": 48} | jpeg_options(85), "wrist_image": {"size": 24, "format": "PNG"}}
    folder.mkdir()
    save_tensors(folder / "model.safetensors", trainable_tensors(vla))
    write_json(folder / "dataset_statistics.json", {"made": stats})
    write_json(folder / "config.json", {"model": asdict(vla.config), "base_hash": base_hash(vla), "data": [entry]})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of `write_run`."""
    return write_run(tmp_path_factory.mktemp("policy") / "run")


@pytest.fixture(scope="module")
def loaded(folder):
    """Its policy."""
    return Policy(folder)


@pytest.fixture
def policy(loaded):
    """Its policy, as if it had not warned yet."""
    loaded.warned.clear()
    return loaded


def observe(seed=0, side=48):
    """Return a random observation whose state lies inside that of training."""
    rng = np.random.default_rng(seed)
    image, wrist = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2))
    state = [*rng.uniform(-0.5, 0.5, 2), 1.0, 3.1, *rng.uniform(-0.2, 0.2, 2), 0.02, -0.02]
    return {"images": {"image": image, "wrist_image": wrist}, "state": np.float32(state), "instruction": TEXT}


def with_image(observation, image, name="image"):
    """Return the observation with another image of one camera."""
    return observation | {"images": observation["images"] | {name: image}}


def without(observation, name):
    """Return the observation without one of its entries."""
    return {key: value for key, value in observation.items() if key != name}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def wrong_images(change):
    """Return a function that changes the main camera's image of an observation."""
    return lambda observation: with_image(observation, change(observation["images"]["image"]))


REFUSED = {
    "nothing": (lambda o: None, 'an observation is a NoneType; it must be a dict of {"images": {"image": u8 .h, w, 3'),
    "an array": (lambda o: o["images"]["image"], "an observation is a ndarray; it must be a dict"),
    "no images": (lambda o: without(o, "images"), "the observation has no images, but state, instruction; it must be"),
    "no state": (
        lambda o: without(o, "state"),
        'has no state, but images, instruction; it must be .*"state": .8 numbers',
    ),
    "no instruction": (lambda o: without(o, "instruction"), "the observation has no instruction, but images, state"),
    "empty": (lambda o: {}, "the observation has no images, instruction, state, but nothing"),
    "a list of images": (lambda o: o | {"images": list(o["images"].values())}, "images is a list, not a dict"),
    "several instructions": (lambda o: o | {"instruction": [TEXT]}, "instruction is a list, not a str"),
    "no wrist": (
        lambda o: o | {"images": without(o["images"], "wrist_image")},
        "there is no image of wrist_image; there are images of image, and the policy needs image, wrist_image",
    ),
    "channels first": (
        wrong_images(lambda image: image.transpose(2, 0, 1)),
        r"image of image is \(3, 48, 48\), channels first; .* image.transpose\(1, 2, 0\)",
    ),
    "several images": (
        wrong_images(lambda image: image[None]),
        r"image of image is \(1, 48, 48, 3\); it must be one image \[height, width, 3\]",
    ),
    "no channels": (wrong_images(lambda image: image[..., 0]), r"\(48, 48\); it must be one image"),
    "four channels": (wrong_images(lambda image: image[..., [0, 1, 2, 0]]), r"\(48, 48, 4\); it must be one image"),
    "no pixels": (wrong_images(lambda image: image[:0]), r"\(0, 48, 3\); it must be one image"),
    "bytes as floats": (wrong_images(lambda image: image.astype(np.float32)), "float32 from 0 to 255; .*Give bytes"),
    "normalised": (wrong_images(lambda image: image / 127.5 - 1), r"float64 from -1 to 1; floats must lie in \[0, 1\]"),
    "not a number": (wrong_images(lambda image: np.full(image.shape, np.nan)), "float64 from nan to nan; floats must"),
    "integers": (wrong_images(lambda image: image.astype(np.int64)), "is int64; it must be uint8, or floats"),
    "another shape": (
        wrong_images(lambda image: image[:40, :30]),
        "(?s)image of image has 40 x 30 pixels, but those of training had 48 x 48: pad or crop it.*embodiment.*libero",
    ),
    "short state": (lambda o: o | {"state": o["state"][:7]}, r"state is float32 \(7,\); it must be 8 numbers, \(8,\)"),
    "several states": (lambda o: o | {"state": o["state"][None]}, r"state is float32 \(1, 8\); it must be 8 numbers"),
    "a text as state": (lambda o: o | {"state": ["0"] * 8}, "state is .*; it must be 8 numbers"),
    "not finite": (
        lambda o: o | {"state": np.where(np.arange(8) % 3 == 2, np.nan, o["state"])},
        r"state\[2\], state\[5\] is not finite",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_observation_that_cannot_be_meant_is_refused(fault, policy):
    """By what came and what was expected, alone and as the second of a list."""
    change, message = REFUSED[fault]
    for observation in (change(observe()), [observe(), change(observe())]):
        with pytest.raises(ValueError, match=message):
            policy(observation)


def test_other_arguments_that_cannot_be_meant_are_refused(policy):
    """An empty list, a gripper that is none."""
    for empty in ([], ()):
        with pytest.raises(ValueError, match="there is no observation in the list"):
            policy(empty)
    with pytest.raises(ValueError, match="gripper is 'libero'; choose data or robosuite"):
        policy(observe(), gripper="libero")


# ----------------------------------------------------------------------------------------------------------------------
# What is accepted


def test_images_are_stored_as_in_training(policy):
    """Resized by Pillow's Lanczos filter to the size of that camera, then through the very JPEG, bit for bit."""
    frame = observe(side=96)["images"]["image"]
    small = {side: Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS) for side in (48, 24)}
    file = io.BytesIO()
    small[48].save(file, "JPEG", quality=85)
    assert np.array_equal(policy.stored("image", frame), np.asarray(Image.open(file)))
    assert np.array_equal(policy.stored("wrist_image", frame), np.asarray(small[24]))
    wide = np.concatenate([frame, frame], 1)  # as they were in training, wide images are only resized
    assert store_image(wide, (24, 48), "PNG").shape == (24, 48, 3)


def test_black_frames_stay_black():
    """A control's black image is exactly 0 in JPEGs of the embedded data (85) and of tensorflow-datasets (95)."""
    black = np.zeros((64, 64, 3), np.uint8)
    for quality in (85, 95):
        assert not store_image(black, 48, **jpeg_options(quality)).any(), quality


def test_floats_mean_the_same_as_bytes(policy):
    """For every byte, in three precisions; values between two bytes are rounded."""
    observation = observe()
    expected = policy(observation)
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for dtype in (np.float16, np.float32, np.float64):
        assert np.array_equal(read_image("image", (every_byte / 255).astype(dtype)), every_byte)
        between = (every_byte + np.where(every_byte, -0.3, 0.3)) / 255
        assert np.array_equal(read_image("image", between.astype(dtype)), every_byte)
        images = {name: (image / 255).astype(dtype) for name, image in observation["images"].items()}
        assert np.array_equal(policy(observation | {"images": images}), expected)


def test_images_of_any_size_and_strides(policy):
    """Reversed, transposed, every second pixel, read-only: as a copy of the same pixels; memory in Fortran's order."""
    frame = observe(side=96)["images"]["image"]
    read_only = frame.copy()
    read_only.flags.writeable = False
    views = (frame[::-1], frame[:, ::-1, ::-1], frame.swapaxes(0, 1), frame[::2, ::2], frame[1:, 1:], read_only)
    for view in (*views, np.asfortranarray(frame)):
        assert np.array_equal(policy.stored("image", view), policy.stored("image", np.array(view, order="C")))
        assert np.array_equal(
            policy(with_image(observe(), view)), policy(with_image(observe(), np.array(view, order="C")))
        )
    for side in (1, 7, 48, 500):
        assert policy(observe(side=side)).shape == (4, 7)


def test_grey_images_are_repeated(policy):
    """One channel means three equal ones."""
    grey = observe()["images"]["image"][..., :1]
    assert np.array_equal(policy(with_image(observe(), grey)), policy(with_image(observe(), grey.repeat(3, 2))))


def test_more_than_the_policy_needs_is_ignored(policy):
    """Other cameras, whatever they are, other entries, and the order of the cameras."""
    observation = observe()
    expected = policy(observation)
    images = {"depth": None, "wrist_image": observation["images"]["wrist_image"]} | observation["images"]
    assert np.array_equal(policy(observation | {"images": images, "time": 3.0}), expected)


def test_model_without_a_state_needs_none(tmp_path):
    """It acts without one, and ignores one that is there."""
    policy = Policy(write_run(tmp_path / "run", state_size=0))
    observation = observe()
    assert np.array_equal(policy(without(observation, "state")), policy(observation | {"state": None}))


def test_actions_follow_what_is_observed(policy):
    """Each image, the state and the instruction change them; so nothing is dropped on the way."""
    first, second = observe(0), observe(1)
    expected = policy(first)
    changed = [with_image(first, second["images"][name], name) for name in first["images"]]
    changed += [first | {"state": second["state"]}, first | {"instruction": "open the drawer"}]
    for observation in changed:
        assert np.abs(policy(observation) - expected).max() > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# States that training did not see


def warnings_of(policy, state):
    """Return the texts of what the policy warns of at a state."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy(observe() | {"state": state})
    assert all(warning.filename == __file__ for warning in caught)  # the caller's line
    return [str(warning.message) for warning in caught]


def test_state_outside_of_training_warns_once(policy):
    """It names each dimension, its value and its range; a tenth of the range beyond it is nothing to speak of."""
    state = observe()["state"]
    assert warnings_of(policy, state) == []
    assert warnings_of(policy, state + np.float32([0, 0, 0.6, 0, 0, 0, 0, 0])) == []  # 1.6, the largest
    assert warnings_of(policy, np.float32([0.7, 0, 1, 3.1, 0, 0, 0.02, -0.02])) == []
    texts = warnings_of(policy, np.float32([0.8, 0, 1, 3.1, 0, 0, 0.5, -0.02]))
    assert texts == [
        "state[0] is 0.8, but in training it was -0.6 to 0.6, so the policy was never trained for this",
        "state[6] is 0.5, but in training it was -0.1 to 0.14, so the policy was never trained for this",
    ]
    texts = warnings_of(policy, np.float32([-900, 0, 9, 3.1, 0, 0, 0.5, -0.02]))
    assert [text.split()[0] for text in texts] == ["state[2]"]


def test_rotation_the_other_way_round_is_recognised(policy):
    """Only where the same rotation about the opposite axis is one of training's."""
    rotation = np.array([3.1, 0.1, -0.1])
    state = observe()["state"]
    state[3:6] = policies.other_way_round(rotation)
    (text,) = warnings_of(policy, state)
    assert text.startswith("state[3] is -3.") and "turned the other way round, [3.1, 0.1, -0.1], is inside" in text
    assert "If state[3:6] is a rotation vector" in text
    policy.warned.clear()
    state[3:6] = -0.5, 0.1, 0.1
    (text,) = warnings_of(policy, state)
    assert text.startswith("state[3] is -0.5") and "rotation" not in text
    for angle in (0.0, 0.5, 3.0):
        vector = angle * np.array([0.6, 0.0, 0.8])
        assert np.allclose(matrix(policies.other_way_round(vector)), matrix(vector))


def matrix(rotation):
    """Return the rotation matrix of a rotation vector."""
    x, y, z = rotation
    generator = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(generator).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Actions


def test_actions_never_leave_what_training_saw(folder):
    """A network that asks for far more gets the limits: quantiles where those are clipped, extremes of a gripper."""
    policy = Policy(folder)
    with torch.no_grad():
        policy.vla.head.out.weight *= 1000
    actions = policy([observe(seed) for seed in range(8)])
    assert actions.dtype == np.float32
    assert actions[..., :6].min() == -0.5 and actions[..., :6].max() == 0.5
    assert set(np.round(1 - 2 * np.float32([0.0, 1.0]), 6)) == set(
        np.round([actions[..., 6].min(), actions[..., 6].max()], 6)
    )
    gripper = policy([observe(seed) for seed in range(8)], gripper="robosuite")[..., 6]
    assert set(gripper.ravel()) == {-1.0, 1.0}


def test_actions_do_not_depend_on_what_else_is_asked(folder, policy):
    """Alone, in a list of one, of three, in a batch that is padded to 8: the same to rounding. In batches of one fixed
    size the same bit for bit, whatever the others are."""
    observations = [observe(seed) for seed in range(3)]
    alone = np.stack([policy(observation) for observation in observations])
    assert alone.shape == (3, 4, 7) and np.abs(alone[0] - alone[1]).max() > 1e-3
    assert np.array_equal(policy([observations[0]]), alone[:1])
    assert np.allclose(policy(observations), alone, atol=1e-6)
    assert np.allclose(policy(tuple(observations[::-1])), alone[::-1], atol=1e-6)
    padded = Policy(folder, batch=8)
    each = np.stack([padded(observation) for observation in observations])
    assert np.allclose(each, alone, atol=1e-6)
    assert np.array_equal(padded(observations), each) and np.array_equal(padded(observations[::-1]), each[::-1])


@pytest.mark.parametrize("batch, sizes", ((0, [4, 4, 1]), (3, [3, 3, 3]), (6, [6, 6])))
def test_long_lists_are_split_and_short_ones_padded(batch, sizes, folder, policy, monkeypatch):
    """Nine observations, of which at most four are answered at once; actions in order."""
    monkeypatch.setattr(policies, "MOST", 4)
    asked = []
    split = Policy(folder, batch=batch)
    predict = split.vla.predict
    monkeypatch.setattr(split.vla, "predict", lambda inputs: asked.append(len(inputs["text"])) or predict(inputs))
    observations = [observe(seed) for seed in range(9)]
    actions = split(observations)
    assert asked == sizes
    assert np.allclose(actions, [policy(observation) for observation in observations], atol=1e-6)
    asked.clear()
    split(observations[:3])
    assert asked == [batch or 4]


def test_longer_instructions_need_nothing(folder, tmp_path):
    """Not even the run's folder; what a shorter one gets stays the same to rounding, and a prompt beyond all bounds is
    refused and leaves the policy as it was."""
    policy = Policy(shutil.copytree(folder, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    expected, reserved = policy(observe()), policy.text_length
    longer = policy(observe() | {"instruction": LONG_TEXT})
    assert policy.text_length > reserved == 24 and np.abs(longer - expected).max() > 1e-4
    assert np.allclose(policy(observe()), expected, atol=1e-5)
    both = policy([observe(), observe() | {"instruction": LONG_TEXT}])
    assert np.allclose(both, [expected, longer], atol=1e-5)
    with pytest.raises(ValueError, match="the prompt would take .* tokens"):
        policy(observe() | {"instruction": "word " * 9000})
    assert np.allclose(policy(observe() | {"instruction": LONG_TEXT}), longer, atol=1e-6)


def test_known_instructions_are_not_tokenised_again(folder, monkeypatch):
    """Only the first call with an instruction needs the tokenizer; a robot asks with the same one many times."""
    policy = Policy(folder)
    expected = policy(observe())
    monkeypatch.setattr(policy.vla.backbone, "tokenizer", None)
    assert np.array_equal(policy([observe(), observe()])[0], policy([observe(), observe()])[1])
    assert np.allclose(policy(observe()), expected, atol=1e-6)


def test_room_for_longer_instructions_is_the_model_s_with_that_room(folder, tmp_path):
    """A policy that made room later acts as one of the same weights that had it from the start."""
    shutil.copytree(folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    policy = Policy(folder)
    longer = policy(observe() | {"instruction": LONG_TEXT})
    config["model"]["text_length"] = policy.text_length
    write_json(tmp_path / "run" / "config.json", config)
    assert np.array_equal(Policy(tmp_path / "run")(observe() | {"instruction": LONG_TEXT}), longer)


# ----------------------------------------------------------------------------------------------------------------------
# Which actions are executed


@pytest.mark.parametrize("execute", (1, 3, 4, 7))
def test_averages_are_acts(execute):
    """As ACT computes them, with a table of all chunks by step; grippers too."""
    rng = np.random.default_rng(0)
    chunk, steps = 8, 30
    execution = Execution(chunk, execute, average=True)
    planned = np.full((steps, steps + chunk, 7), np.nan)  # by the step at which a chunk was predicted
    for step in range(steps):
        assert execution.due == (step % execute == 0)
        if execution.due:
            planned[step, step : step + chunk] = rng.normal(size=(chunk, 7))
            execution.add(planned[step, step : step + chunk].astype(np.float32))
        candidates = planned[:, step][~np.isnan(planned[:, step, 0])]  # oldest first
        weights = np.exp(-0.01 * np.arange(len(candidates)))
        expected = (candidates * (weights / weights.sum())[:, None]).sum(0)
        action = execution.next()
        assert action.dtype == np.float32 and np.allclose(action, expected, atol=1e-6)


def test_averages_by_hand():
    """Chunks of two actions, one executed: step 1 is planned twice, and the older plan weighs exp(0.01) times more."""
    execution = Execution(2, 1, average=True)
    found = []
    for chunk in ([1, 2], [10, 20], [100, 200]):
        execution.add(np.float32(chunk)[:, None])
        found.append(float(execution.next()[0]))
    newer = 1 / (1 + np.exp(0.01))
    assert found == pytest.approx([1, 2 + newer * 8, 20 + newer * 80])


@pytest.mark.parametrize("execute", (0, 1, 3, 8))
def test_chunks_are_executed_from_their_start(execute):
    """Without averages the first actions of each chunk, bit for bit; 0 means all; a reset forgets the rest."""
    execution = Execution(8, execute)
    for number in range(3):
        chunk = np.random.default_rng(number).normal(size=(8, 7)).astype(np.float32)
        assert execution.due
        execution.add(chunk)
        for step in range(execute or 8):
            assert not execution.due and np.array_equal(execution.next(), chunk[step])
    execution.add(chunk)
    execution.reset()
    assert execution.due


def test_execution_that_cannot_be_is_refused():
    """More actions than a chunk has, fewer than none, an average of chunks that do not overlap."""
    for execute in (-1, 9):
        with pytest.raises(ValueError, match=f"execute is {execute}; the policy predicts 8 actions .* 1 to 8"):
            Execution(8, execute)
    for execute in (0, 8):
        with pytest.raises(ValueError, match="8 actions of which 8 are executed do not overlap: lower execute"):
            Execution(8, execute, average=True)


def test_controller_executes_chunks(policy):
    """The actions of the chunks that the policy predicts, asked only when it is due; a reset begins anew."""
    observations = [observe(seed) for seed in range(8)]
    chunks = policy(observations, gripper="robosuite")
    controller = policy.controller(execute=3, gripper="robosuite")
    for step in range(8):
        assert controller.due == (step % 3 == 0)
        action = controller(observations[step] if controller.due else None)
        assert action.shape == (7,) and np.allclose(action, chunks[step - step % 3, step % 3], atol=1e-6)
    controller.reset()
    assert controller.due and np.allclose(controller(observations[5]), chunks[5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="execute is 5; the policy predicts 4 actions"):
        policy.controller(execute=5)
    with pytest.raises(ValueError, match="an observation is a NoneType"):
        policy.controller()()
    averaged = policy.controller(execute=1, average=True)
    first, second = (averaged(observation) for observation in observations[:2])
    chunks = policy(observations[:2])
    older = 1 / (1 + np.exp(-0.01))
    assert np.allclose(first, chunks[0, 0], atol=1e-6)
    assert np.allclose(second, older * chunks[0, 1] + (1 - older) * chunks[1, 0], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# In other people's code


ELSEWHERE = """
import os, sys

MISSING = {"libero", "mujoco", "robosuite", "av", "pyarrow", "tensorflow", "tensorflow_datasets", "cv2"}
MISSING |= {"google_crc32c", "tyro", "wandb", "matplotlib", "simplejpeg"}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
import numpy as np
from policy import Policy

policy = Policy(sys.argv[1])
os.chdir("/")
black = np.zeros((48, 48, 3), np.uint8)
observation = {"images": {"image": black, "wrist_image": black}, "state": [0, 0, 1, 3.1, 0, 0, 0.02, -0.02]}
print(policy(observation | {"instruction": "a " * 40}).shape, sorted(MISSING & sys.modules.keys()))
"""


def test_policy_needs_no_simulator_and_no_reader_of_data(folder):
    """From another folder, with none of the packages installed that only training and evaluation need; the folder may
    be relative, and the process may move on before a longer instruction comes."""
    command = [sys.executable, "-c", ELSEWHERE, folder.name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert done.stdout == "(4, 7) []\n", done.stderr


HOSTILE = """
import importlib, pickle, sys
import numpy as np, torch
import data, common, model  # this folder's own, as those below

before = [data, common, model]
path = list(sys.path)
from latent_actions import Policy

import backbone, files, policy
from common import mine
assert [data.WHOSE, common.WHOSE, model.WHOSE, files.WHOSE, policy.WHOSE, backbone.WHOSE, mine] == ["yours"] * 7
assert [sys.modules[name] for name in ("data", "common", "model")] == before and sys.path == path
made = Policy(sys.argv[1])
black = np.zeros((48, 48, 3), np.uint8)
observation = {"images": {"image": black, "wrist_image": black}, "state": [0, 0, 1, 3.1, 0, 0, 0.02, -0.02]}
observation["instruction"] = "put the bowl on the plate"
actions = made(observation)
made.vla.forward_pass = torch.compile(made.vla.forward_pass, fullgraph=True, dynamic=False, backend="eager")
assert np.allclose(made(observation), actions, atol=1e-5)  # the compiler imports modules by their names
made(observation | {"instruction": "a " * 40})
assert np.allclose(made(observation), actions, atol=1e-5)
assert pickle.loads(pickle.dumps(Policy)) is Policy and importlib.import_module(Policy.__module__).Policy is Policy
assert not [name for name in sys.modules if name in ("batches", "dataspec", "normalise")]
print(actions.shape, Policy.__module__)
"""


def test_installed_policy_and_files_of_the_same_names(folder, tmp_path):
    """After `pip install -e .` the import works in a folder whose files have the same names as this project's; those
    stay the user's own, imported before or after. Metadata are valid; a copy of the module alone says what is wrong."""
    project, mine, site = tmp_path / "project", tmp_path / "mine", tmp_path / "site"
    mine.mkdir()
    project.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "requirements.txt", ROOT / "README.md"):
        shutil.copy(path, project)
    _, *command = printed("pip install -e . --no-deps")
    options = ["--no-build-isolation", "--no-index", "-q", "--prefix", str(site)]  # not into this environment
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, *options], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (metadata,) = site.rglob("METADATA")
    text = metadata.read_text()
    assert "Name: latent-actions\n" in text and "Requires-Python: >=3.11\n" in text
    pinned = [line for line in (ROOT / "requirements.txt").read_text().split() if line]
    assert all(f"Requires-Dist: {requirement}\n" in text for requirement in pinned)
    assert "Provides-Extra: vla-eval\n" in text

    for name in ("data", "common", "model", "policy", "files", "backbone", "images"):
        (mine / f"{name}.py").write_text("WHOSE = mine = 'yours'\n")
    (mine / "script.py").write_text(f"import site\nsite.addsitedir({str(metadata.parents[1])!r})\n" + HOSTILE)
    done = subprocess.run([sys.executable, "script.py", folder], cwd=mine, capture_output=True, text=True)
    assert done.stdout == "(4, 7) latent_actions.policy\n", done.stderr

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "latent_actions.py", alone)
    done = subprocess.run([sys.executable, "-c", "import latent_actions"], cwd=alone, capture_output=True, text=True)
    assert f"ImportError: there is no {alone}/policy.py: install the project's folder itself" in done.stderr
