"""demos.py: the expert in the real simulator, exact replay, the written data set, resuming."""

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_script_here
from PIL import Image

import demos
from data import open_dataset
from images import encode_image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(interrupted):
    """The interrupted command's config."""
    return interrupted.config


@pytest.fixture(scope="module")
def episode(interrupted):
    """One real episode of the expert on a widened start, which the interrupted run recorded."""
    arrays = interrupted.arrays
    ends = arrays["image_ends"][:-1]
    columns = {"image": np.split(arrays["image"], ends), "state": arrays["state"], "action": arrays["action"]}
    steps = [{name: column[t] for name, column in columns.items()} for t in range(arrays["length"])]
    return {"seed": int(arrays["seed"]), "state": arrays["start"], "steps": steps}


def test_expert_succeeds(episode):
    """The first episode that succeeds is that of attempt 1, of a plausible length; the gripper opens and closes."""
    assert episode["seed"] == 90_001 and 20 < len(episode["steps"]) < 120
    gripper = np.array([step["action"][6] for step in episode["steps"]])
    assert set(gripper) == {-1, 1} and gripper[0] == -1  # open on the way, closed while carrying


def test_embedded_episode_replays(sim, cache):
    """From the seed and state stored with it, an episode of data/libero_tiny proceeds as recorded and succeeds."""
    dataset = open_dataset(ROOT / "data" / "libero_tiny", cache)
    episode = dataset.metadata["task"].index(8)
    steps = range(*dataset.starts[episode : episode + 2])
    sim.restore(dataset.metadata["seed"][episode], np.array(dataset.metadata["state"][episode]))
    for step, state, action in zip(steps, dataset.state(steps), dataset.stored_action(steps)):
        assert np.allclose(sim.proprio(), state, atol=1e-3), step
        success = sim.step(action)
    assert success


def test_episode_replays_to_success(sim, episode, config):
    """From its seed and state, the actions give the recorded images and states, and success at the last step."""
    steps = episode["steps"]
    sim.restore(episode["seed"], episode["state"])
    for t, step in enumerate(steps):
        if t in (0, 5, len(steps) - 1):
            seen = sim.observe()
            assert (
                encode_image(seen["image"], config.image_size, quality=config.jpeg_quality) == step["image"].tobytes()
            )
            assert np.array_equal(seen["state"], step["state"])
        done = sim.step(step["action"], render=t + 1 in (5, len(steps) - 1))
        assert done == (t == len(steps) - 1)


def test_interrupted_run_resumes_and_writes_the_expected_features(demonstrations, episode, config):
    """Attempt 0 had failed and attempt 1 had ended before a kill -9: the second run repeats neither."""
    folder, text = demonstrations
    assert " 1/2 [00:00<?, ?episode/s]" in text
    assert not demos.staging(config).exists()
    note = json.loads((folder / "expert.json").read_text())
    assert note["tasks"]["8"]["attempts"] == 3 and note["tasks"]["8"]["successes"] == 2
    assert [(e["task"], e["seed"], e["widen"]) for e in note["evaluation"]] == [(8, 0, 0.06), (8, 1, 0.06)]
    check_written(folder, episode)
    with pytest.raises(FileExistsError, match="tiny_rlds"):
        demos.main(config)


def test_episodes_of_other_settings_are_not_continued(config, tmp_path):
    """A staging folder that other settings made is refused."""
    begun = replace(config, out=tmp_path / "tiny_rlds")
    demos.resume(begun)
    with pytest.raises(ValueError, match="other settings"):
        demos.main(replace(begun, jpeg_quality=50))


READ = """
import pickle, sys
import numpy as np
import tensorflow_datasets as tfds

def flat(features, prefix=""):
    for key, value in features.items():
        if hasattr(value, "items"):
            yield from flat(value, prefix + key + "/")
        else:
            kind = "text" if isinstance(value, tfds.features.Text) else np.dtype(value.np_dtype).name
            yield prefix + key, (value.shape, kind)

builder = tfds.builder_from_directory(sys.argv[1] + "/1.0.0")
keep = {"steps": {"observation": {key: tfds.decode.SkipDecoding() for key in ("image", "wrist_image")}}}
read = [{**one, "steps": list(one["steps"])} for one in tfds.as_numpy(builder.as_dataset(split="train", decoders=keep))]
pickle.dump((dict(flat(builder.info.features["steps"].feature)), read), open(sys.argv[2], "wb"))
"""  # its own process: TensorFlow and Mesa's EGL crash together


def check_written(folder, episode):
    """What tensorflow-datasets reads back is modified_libero_rlds' layout with our own bytes and numbers."""
    assert sorted(path.name for path in (folder / "1.0.0").iterdir()) == [
        "dataset_info.json",
        "features.json",
        "tiny_rlds-train.tfrecord-00000-of-00001",
    ]
    dump = folder.parent / "read.pkl"
    subprocess.run([sys.executable, "-c", READ, str(folder), str(dump)], check=True, capture_output=True)
    features, read = pickle.loads(dump.read_bytes())
    flag = ((), "bool")
    assert features == {
        "observation/image": ((32, 32, 3), "uint8"),
        "observation/wrist_image": ((32, 32, 3), "uint8"),
        "observation/state": ((8,), "float32"),
        "observation/joint_state": ((7,), "float32"),
        "action": ((7,), "float32"),
        "language_instruction": ((), "text"),
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
        "reward": ((), "float32"),
        "discount": ((), "float32"),
    }
    assert sorted(one["episode_metadata"]["seed"] for one in read) == [90_001, 90_002]
    for one in (one for one in read if one["episode_metadata"]["seed"] == episode["seed"]):
        assert np.array_equal(one["episode_metadata"]["state"], episode["state"])
        assert len(one["steps"]) == len(episode["steps"])
        for t, (written, step) in enumerate(zip(one["steps"], episode["steps"])):
            last = t == len(episode["steps"]) - 1
            assert written["observation"]["image"] == step["image"].tobytes()
            assert np.array_equal(written["action"], step["action"])
            assert np.array_equal(written["observation"]["state"], step["state"])
            assert written["language_instruction"] == b"put the bowl on the plate"
            flags = [written[name] for name in ("is_first", "is_last", "is_terminal", "reward")]
            assert flags == [t == 0, last, last, last]
        assert Image.open(io.BytesIO(one["steps"][0]["observation"]["wrist_image"])).size == (32, 32)


def test_failures_are_counted_and_end_a_hopeless_run(config):
    """A failed attempt is replaced by the next; a task whose attempts all fail is an error."""
    done = {(8, 0): True, (8, 1): False, (8, 2): True}
    assert [job[1:] for job in demos.next_attempts(replace(config, episodes=3), [8], done)] == [(8, 3)]
    with pytest.raises(RuntimeError, match="task 8.*0 of 16"):
        demos.next_attempts(config, [8], {(8, j): False for j in range(16)})


def test_surplus_of_an_earlier_call_is_left_out(config):
    """Fewer episodes than are staged: the first successes of each task asked for, so all have as many."""
    done = {(9, 0): True, **{(8, j): j > 0 for j in (3, 2, 1, 0)}, (7, 0): True}
    assert demos.chosen(replace(config, episodes=2), [9, 8], done) == [(8, 1), (8, 2), (9, 0)]


def test_worker_that_dies_ends_the_run(monkeypatch):
    """A process that is killed, of too little memory for example, is an error instead of a wait without end.

    The second time it has died before the attempts are handed out.
    """
    monkeypatch.setattr(demos, "attempt", os._exit)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a simulator process died, .*; the same command goes on"):
                list(demos.run_attempts(pool, [3, 4]))


def test_bad_input_is_refused():
    """Values out of range name their field; a goal that is not to pick and place names the expert's limit."""
    for wrong in ({"suite": "libero_gaol"}, {"task_ids": [10]}, {"episodes": 0}, {"jpeg_quality": 100}, {"seed": 999}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            demos.check(demos.Config(**wrong))
    world = SimpleNamespace(parsed_problem={"goal_state": [["open", "wooden_cabinet_1_middle_region"]]})
    with pytest.raises(ValueError, match="only picks and places"):
        demos.Expert(SimpleNamespace(world=world, suite="libero_goal", task=0)).reset()


def test_demonstrations_can_be_trained_on(demonstrations, tmp_path):
    """The documents' command, for two episodes (and killed between them), writes a data set that trains."""
    data, text = demonstrations  # conftest.py runs the command
    assert f"{data}: 2 episodes" in text
    small = ["--val-fraction", 0, "--num-workers", 0, "--max-steps", 2, "--out", tmp_path / "run"]
    done = run_script_here("train.py", "--variant", "baseline", "--data", data, "--cache", tmp_path / "cache", *small)
    assert done.code == 0, done.text
