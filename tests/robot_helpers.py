"""Writes small LeRobot data sets of any robot, with pictures in the Parquet file, and labels for them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from video_helpers import moving_square, write_video

from files import save_tensors

TASKS = ["stack the cups", "fold the cloth"]


def encode(pixels):
    """Return a picture as Parquet holds it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_robot(folder, actions, state_size, cameras, spec=None, episodes=4, length=30, seed=0):
    """Write a LeRobot v3.0 data set and its spec.json; return the folder.

    actions: function (step, number of the episode) -> [A]; cameras: {name: (height, width)}; spec: without cameras,
    state, action and instruction, which are filled in. Odd episodes do the second task.
    """
    rng = np.random.default_rng(seed)
    rows = {name: [] for name in ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index")}
    rows |= {"task_index": []} | {f"observation.images.{name}": [] for name in cameras}
    entries = []
    for episode in range(episodes):
        steps = length + episode
        entries.append({"episode_index": episode, "length": steps, "data/chunk_index": 0, "data/file_index": 0})
        for step in range(steps):
            rows["observation.state"].append(np.float32(np.cos(0.1 * step * np.arange(state_size) + episode)))
            rows["action"].append(np.float32(actions(step, episode)))
            rows["timestamp"].append(step / 10)
            rows["frame_index"].append(step)
            rows["episode_index"].append(episode)
            rows["index"].append(len(rows["index"]))
            rows["task_index"].append(episode % 2)
            for name, (height, width) in cameras.items():
                pixels = np.full((height, width, 3), rng.integers(0, 255, 3), np.uint8)
                pixels[step % height] = 255
                rows[f"observation.images.{name}"].append(encode(pixels))
    size = len(rows["action"][0])
    features = {
        name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1]}
    features["action"] = {"dtype": "float32", "shape": [size]}
    if state_size:
        features["observation.state"] = {"dtype": "float32", "shape": [state_size]}
    else:
        del rows["observation.state"]
    for name, shape in cameras.items():
        names = ["height", "width", "channels"]
        features[f"observation.images.{name}"] = {"dtype": "image", "shape": [*shape, 3], "names": names}
    info = {"codebase_version": "v3.0", "fps": 10, "features": features, "chunks_size": 1000}
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    for part in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / part).mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.Table.from_pylist(entries), folder / "meta/episodes/chunk-000/file-000.parquet")
    tasks = [{"task_index": number, "task": text} for number, text in enumerate(TASKS)]
    pq.write_table(pa.Table.from_pylist(tasks), folder / "meta/tasks.parquet")
    table = pa.table({name: pa.array(list(values)) for name, values in rows.items()})
    pq.write_table(table, folder / "data/chunk-000/file-000.parquet", row_group_size=40)
    meaning = {
        "embodiment": folder.name,
        "cameras": {name: f"observation.images.{name}" for name in cameras},
        "state": ["observation.state"] if state_size else [],
        "action": ["action"],
        "instruction": "task",
    }
    (folder / "spec.json").write_text(json.dumps(meaning | (spec or {})))
    return folder


def two_arms(step, episode):
    """Return 14 absolute joint targets, grippers 6 and 13: 1 open, 0 closed."""
    action = np.sin(0.2 * step + np.arange(14) + episode)
    action[[6, 13]] = step % 20 < 10, step % 14 < 7
    return action


def five_joints(step, episode):
    """Return 5 relative motions."""
    return 0.1 * np.cos(0.3 * step + np.arange(5) - episode)


def write_two_arms(folder):
    """Two arms: 14 numbers of action and state, three cameras of different sizes, chunks of 25."""
    spec = {"absolute": list(range(14)), "chunk": 25, "image_fit": "pad"}
    spec["grippers"] = [{"index": 6, "open": 1.0, "closed": 0.0}, {"index": 13, "open": 1.0, "closed": 0.0}]
    return write_robot(folder, two_arms, 14, {"top": (64, 64), "left": (48, 64), "right": (32, 40)}, spec)


def write_five_joints(folder):
    """One arm of five joints without state or gripper, one camera, chunks of 20."""
    return write_robot(folder, five_joints, 0, {"front": (64, 64)}, {"chunk": 20})


def write_labels(dataset, path, codes_per_step=2, dim=8):
    """Write random image-based labels of a data set; return the path."""
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 16, (len(dataset), codes_per_step), dtype=np.uint8))
    vectors = torch.from_numpy(rng.normal(size=(len(dataset), codes_per_step, dim))).half()
    info = dict(data=dataset.fingerprint, lam="made", delta=5, num_codes=16)
    save_tensors(path, {"codes": codes, "vectors": vectors}, **info)
    return path


def write_videos(folder):
    """Write two MP4 files with captions and a description; return the folder."""
    folder.mkdir()
    for number in range(len(TASKS)):
        write_video(folder / f"{number}.mp4", moving_square(12, 64, 64, number))
    (folder / "captions.json").write_text(json.dumps({f"{number}.mp4": text for number, text in enumerate(TASKS)}))
    spec = {"embodiment": "my_robot", "cameras": {"front": "video"}, "instruction": "caption"}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder
