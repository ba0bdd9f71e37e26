"""Label every step of a data set with the codes of an image-based latent action model (latent.py).

    python label.py --data data/libero_tiny --lam runs/lam --out runs/labels.safetensors                   # 5 seconds
    torchrun --nproc-per-node 8 label.py --data DIR --lam DIR                                      # on 8 processes

Writes one safetensors file, which `targets.load_labels` reads: codes u8 [S, P] and vectors f16 [S, P, d] (c, before
quantisation), with the fingerprints of data and model, delta and the codebook size as metadata. A labelling that was
interrupted continues when the same command runs again. Memory grows with the longest episode alone, whose frames are
read at once; finished parts and the whole file are mapped. Leaves out action-based codes: train.py computes those on
the fly with the action tokenizer.

Axes: S steps of a data set, n steps of an episode, B batch, P codes per step, K codebook size, d width of a code, N
patches of a frame, F features of a patch.
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import all_sum, init_distributed, shutdown_distributed, worker_options
from data import open_dataset
from files import (
    at_least,
    check_writable,
    make_folder,
    map_tensors,
    read_json,
    read_metadata,
    save_tensors,
    shell_command,
)
from index import CACHE, changed_cache
from latent import camera_name, check_frames, fingerprint, load_lam, stack_texts, text_states
from quantiser import code_counts, code_usage

EPISODES_PER_PART = 32  # a labelling that was interrupted continues after the last complete part


@dataclass(kw_only=True)
class Config:
    """Settings of `python label.py`."""

    data: Path
    """folder of a data set"""
    lam: Path
    """folder of a model that `train_latent.py lam` trained"""
    out: Path | None = None
    """file to write; default: the folder of the cached index, where training looks when the data ships no labels"""
    spec: str = ""
    """description of the data: a JSON file or the name of a preset (default: spec.json next to it, or what fits)"""
    cache: Path = CACHE
    """where indices are kept"""
    batch_size: int = 64
    """frames, and pairs, encoded at once"""
    num_workers: int = 0
    """processes per rank that decode images; on a GPU give some (0: the labelling process itself)"""


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


class EpisodeFrames(torch.utils.data.Dataset):
    """Some episodes as (episode, its frames u8 [n, h, w, 3], resized for the features)."""

    def __init__(self, dataset, model, episodes):
        self.dataset = dataset
        self.model = model
        self.episodes = episodes
        self.camera = camera_name(model.sizes, dataset)

    def __len__(self):
        return len(self.episodes)

    def __getitem__(self, number):
        episode = self.episodes[number]
        steps = range(*self.dataset.starts[episode : episode + 2])
        resize, side = self.model.features.resize, self.model.features.image_size
        frames = np.empty((len(steps), side, side, 3), np.uint8)
        for place, step in enumerate(steps):
            frames[place] = resize(self.dataset.image(self.camera, step))
        return episode, torch.from_numpy(frames)


@torch.no_grad()
def encode_episode(model, frames, batch_size, texts=None):
    """Return codes u8 [n, P] and c f16 [n, P, d] of an episode's frames u8 [n, h, w, 3].

    The features of each frame are computed once. texts: for stage 1 the states of each step's instruction, a list of n
    f32 [length, width].
    """
    device = model.patch_up.weight.device
    count = len(frames)
    later = torch.arange(count).add(model.sizes.delta).clamp(max=count - 1)  # the second frame of each pair
    features = torch.empty(0, device=device)  # [m, N, F], of the frames from `start` on that have been needed so far
    codes, vectors = [], []
    for start in range(0, count, batch_size):
        batch_later = later[start : start + batch_size]  # [B]
        if start:
            features = features[batch_size:]
        missing = frames[start + len(features) : int(batch_later[-1]) + 1].to(device)
        added = [model.features(part) for part in missing.split(batch_size) if len(part)]
        features = torch.cat([features, *added])
        a = features[: len(batch_later)]
        b = features[(batch_later - start).to(device)]
        text = stack_texts(texts[start : start + batch_size], device) if texts else ()
        batch_codes, batch_vectors = model.encode(a, b, *text)
        codes.append(batch_codes)
        vectors.append(batch_vectors)
    return torch.cat(codes).to("cpu", torch.uint8), torch.cat(vectors).to("cpu", torch.float16)


def label_episodes(dataset, model, episodes, batch_size=64, texts=None, num_workers=0):
    """Yield (codes u8 [n, P], c f16 [n, P, d]) of each of `episodes`, in order.

    texts: {instruction: states f32 [length, width]}, for stage 1.
    """
    samples = EpisodeFrames(dataset, model, episodes)
    loader = DataLoader(samples, batch_size=None, **worker_options(num_workers, timeout=0))
    for episode, frames in loader:
        steps = range(*dataset.starts[episode : episode + 2])
        states = [texts[dataset.instruction(step)] for step in steps] if texts else None
        yield encode_episode(model, frames, batch_size, states)


# ----------------------------------------------------------------------------------------------------------------------
# The file of labels, in parts until it is complete


def main(config, ranks):
    """Label a data set on all processes and write the file of labels.

    Raise FileExistsError rather than replace a file, PermissionError when it cannot be written, and ValueError when
    the model does not fit the data.
    """
    at_least(config, {"batch_size": 1, "num_workers": 0})
    dataset = open_dataset(config.data, config.cache, config.spec)
    out = config.out or dataset.cache / "labels.safetensors"
    if all_sum(torch.tensor(int(out.exists()), device=ranks.device)):  # asked by all before the first writes it
        raise FileExistsError(f"{out} exists. Delete it to label again, or choose another --out.")
    check_writable(out.parent, "--out")
    model = load_lam(config.lam).to(ranks.device)
    check_frames(model.sizes, dataset)
    folder = out.with_name(out.name + ".parts")
    make_folder(folder, "--out")
    all_sum(torch.zeros(1, device=ranks.device))  # the first removes the folder when all is labelled
    camera = camera_name(model.sizes, dataset)
    metadata = {
        "data": dataset.fingerprint,
        "camera": str(dataset.spec.cameras[camera]),
        "image_fit": str(dataset.spec.image_fit),
        "lam": fingerprint(config.lam),
        "delta": str(model.sizes.delta),
        "num_codes": str(model.num_codes),
        "saw_actions": saw_actions(config.lam),
    }
    starts = range(0, dataset.num_episodes, EPISODES_PER_PART)
    groups = [range(start, min(start + EPISODES_PER_PART, dataset.num_episodes)) for start in starts]
    write_parts(dataset, model, groups[ranks.rank :: ranks.world], folder, metadata, config, ranks)
    if ranks.main:
        tensors, counts = join_parts([part_path(folder, group) for group in groups], metadata, len(dataset))
        save_tensors(out, tensors, **metadata)
        shutil.rmtree(folder)
        used, perplexity = code_usage(counts)
        report = f"codes in use {used.tolist()}, perplexity {[round(p, 1) for p in perplexity.tolist()]}"
        print(f"{out}: {len(dataset)} steps, {report}")
        words = ("torchrun", "--standalone", "train.py")
        places = {"data": config.data, "spec": config.spec, "labels": out, "cache": changed_cache(config)}
        print(f"Next: {shell_command(*words, variant='la_align', **places)}")


def saw_actions(run):
    """Return "yes" where a latent action model, or one that it started from, learned from actions, else "no".

    "unknown" where that one is gone.
    """
    saved = read_json(Path(run) / "config.json")
    training = saved["training"]
    if training["stage"] == 1:  # which has no action head, nor has what it can start from
        return "no"
    learned = training["action_fraction"] and training["max_steps"]
    if learned and any(entry["spec"].get("action") for entry in saved["data"]):
        return "yes"
    source = training["init_from"]
    if not source or Path(source).is_file():  # of UniVLA, which learns from images and text
        return "no"
    return saw_actions(source) if (Path(source) / "config.json").exists() else "unknown"


def part_path(folder, group):
    """Return the file in `folder` that holds the labels of a group of episodes."""
    return folder / f"{group[0]}.safetensors"


def is_matching_part(path, metadata):
    """Return whether `path` exists and holds labels with this metadata, thus of the same model and data."""
    return path.exists() and metadata.items() <= read_metadata(path).items()


def write_parts(dataset, model, groups, folder, metadata, config, ranks):
    """Label each group of episodes into a file of `folder`, unless a matching part is there."""
    texts = text_states(model.sizes.text, dataset.instructions(), ranks.device) if model.sizes.stage == 1 else None
    steps = [int(dataset.starts[group[-1] + 1] - dataset.starts[group[0]]) for group in groups]
    with tqdm(total=sum(steps), unit=" samples", disable=not ranks.main) as bar:
        for group, count in zip(groups, steps, strict=True):
            path = part_path(folder, group)
            if is_matching_part(path, metadata):
                bar.update(count)
                continue
            labels = []
            for episode_labels in label_episodes(dataset, model, group, config.batch_size, texts, config.num_workers):
                labels.append(episode_labels)
                bar.update(len(episode_labels[0]))
            codes, vectors = map(torch.cat, zip(*labels, strict=True))
            save_tensors(path, {"codes": codes, "vectors": vectors}, **metadata)


def join_parts(paths, metadata, steps):
    """Return ({"codes": u8 [S, P], "vectors": f16 [S, P, d]} of all parts, mapped from their files; code counts).

    Waits for the parts of other processes. steps: S; counts: i64 [P, K], how often each code occurs at each position.
    """
    if not all(is_matching_part(path, metadata) for path in paths):
        print(f"waiting for the other processes' parts in {paths[0].parent}")
    while not all(is_matching_part(path, metadata) for path in paths):
        time.sleep(1)
    joined = {}
    counts = 0
    done = 0
    for path in paths:
        part, _ = map_tensors(path)
        for name, tensor in part.items():
            if name not in joined:
                joined[name] = map_new_tensor(path.parent / f"{name}.joined", (steps, *tensor.shape[1:]), tensor.dtype)
            joined[name][done : done + len(tensor)] = tensor
        counts = counts + code_counts(part["codes"].long(), int(metadata["num_codes"]))
        done += len(part["codes"])
    return joined, counts


def map_new_tensor(path, shape, dtype):
    """Return a tensor whose contents lie in the new file `path`."""
    path.unlink(missing_ok=True)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    main(config, init_distributed())
    shutdown_distributed()
