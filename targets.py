"""The training targets of latent action supervision: image-based labels and action tokenizers, loaded and checked.

Labels come from a file that label.py wrote, or from the data's own columns `latent_idx` and `latent_z`, as in the RLDS
release of "From Pixels to Tokens" (arXiv 2605.04678). Action codes are computed by the tokenizer, batch by batch.
Left out: the latent models themselves (latent.py) and the losses on these targets (model.py).

Axes: S steps of a data set, B batch, H chunk steps, P codes per step, d width of a code.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_tensors
from latent import load_tokenizer

RELEASE_NUM_CODES = 16  # codebook size behind `latent_idx` in the RLDS release of the paper


# ----------------------------------------------------------------------------------------------------------------------
# Latent labels of one data set


@dataclass
class Labels:
    """Image-based latent actions of every step, between it and the step `delta` later: codes and vectors."""

    codes: np.ndarray  # integers or whole floats [S, P]
    vectors: np.ndarray  # floats [S, P, d]
    delta: int
    num_codes: int
    quantised: bool  # vectors are codebook rows, not the encoder's continuous output
    fingerprint: str  # of the latent action model

    @property
    def dim(self):
        """The width d of a code."""
        return self.vectors.shape[2]


def label_path(index, data):
    """Return the default label file of `index`: in the folder `data` if it exists there, else in the cache."""
    shipped = Path(data) / "labels.safetensors"
    return shipped if shipped.exists() else index.cache / "labels.safetensors"


def load_labels(index, path, delta=0):
    """Return the `Labels` in the file `path`, else those in the data's own columns, else None.

    delta: the expected number of steps between the two frames of a latent action, 0 for any. Data with its own labels
    does not store it, so it must be given there. Raises ValueError for a damaged file, labels of other data, or another
    delta.
    """
    path = Path(path)
    if path.exists():
        return _labels_from_file(index, path, delta)
    if "latent_idx" in index.columns:
        return _labels_from_columns(index, delta)
    return None


def _labels_from_file(index, path, delta):
    remedy = f"Make them again: python label.py --data {index.directory} --lam DIR --out {path}"
    try:
        tensors, info = load_tensors(path)
        codes = tensors["codes"].numpy()
        vectors = tensors["vectors"].numpy()
        labels = Labels(codes, vectors, int(info["delta"]), int(info["num_codes"]), False, info["lam"])
        labelled = info["data"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no labels: {error}. {remedy}") from error
    if labelled != index.fingerprint:
        raise ValueError(
            f"{path} labels the data set with fingerprint {labelled}, but {index.directory} has {index.fingerprint}. "
            f"{remedy}"
        )
    if not len(codes) == len(vectors) == len(index):
        raise ValueError(f"{path} labels {len(codes)} steps, not {len(index)}. {remedy}")
    if delta and labels.delta != delta:
        raise ValueError(f"{path} was made with delta {labels.delta}, but --delta is {delta}")
    return labels


def _labels_from_columns(index, delta):
    if not delta:
        raise ValueError(f"{index.name} carries latent_idx but not its horizon; state it (paper's release: --delta 11)")
    codes = index.columns["latent_idx"]
    vectors = index.columns["latent_z"].reshape(*codes.shape, -1)
    return Labels(codes, vectors, delta, RELEASE_NUM_CODES, True, "rlds")


# ----------------------------------------------------------------------------------------------------------------------
# The targets of a training run


def load_targets(target, config, indices, stats):
    """Return (list of `Labels`, one per data set, or None; `ActionTokenizer` or None): the targets of the latent loss.

    target: the variant's kind of latent target, "image", "action" or "" for none; config: that of train.py; stats: one
    `statistics` per index. Raises FileNotFoundError with the command that makes what is missing, and ValueError where
    labels or tokenizer do not fit the data or the config.
    """
    if not target:
        return None, None
    if target == "action":
        return None, _load_tokenizer(config, indices, stats)
    labels = [_load_labels(config, number, index) for number, index in enumerate(indices)]
    sources = {(each.delta, each.fingerprint, each.num_codes) for each in labels}
    if len(sources) > 1:
        raise ValueError(
            f"the labels of these data sets come from different latent models (delta, fingerprint, codes): {sources}"
        )
    return labels, None


def _load_labels(config, number, index):
    """Return the `Labels` of data set `number`. A label file that the config names must exist."""
    data = config.data[number]
    path = config.labels[number] if config.labels else label_path(index, data)
    labels = None
    if path.exists() or not config.labels:
        labels = load_labels(index, path, config.delta)
    if labels is None:
        raise FileNotFoundError(
            f"variant {config.variant} needs latent labels, and {path} does not exist. Make them: "
            f"python train_latent.py lam --data {data} --out runs/lam && "
            f"python label.py --data {data} --lam runs/lam --out {path}"
        )
    reads_vectors = config.variant == "la_align" or config.continuous
    if reads_vectors and labels.quantised != (config.align_target == "quantised"):
        raise ValueError(
            f"the labels of {index.name} hold {'quantised' if labels.quantised else 'continuous'} vectors, "
            f"but align_target is '{config.align_target}'"
        )
    return labels


def _load_tokenizer(config, indices, stats):
    """Return the action tokenizer. Raises ValueError unless it has the sizes and the action statistics of the run."""
    folder = Path(config.tokenizer or config.data[0] / "tokenizer")
    if not folder.exists():
        raise FileNotFoundError(
            f"variant {config.variant} needs an action tokenizer, and {folder} does not exist. Make it: "
            f"python train_latent.py tokenizer --data {config.data[0]} --out {folder}"
        )
    tokenizer = load_tokenizer(folder)
    expected = {"chunk": config.chunk, "action_size": indices[0].columns["action"].shape[1]}
    stored = {name: tokenizer.config[name] for name in expected}
    if stored != expected:
        raise ValueError(
            f"the action tokenizer in {folder} is for {stored}, but this run has {expected}; train one for it"
        )
    stored_stats = json.loads((folder / "dataset_statistics.json").read_text())
    for index, expected_stats in zip(indices, stats):
        if not _same_bounds(stored_stats.get(index.name, {}).get("action"), expected_stats["action"]):
            raise ValueError(
                f"the action tokenizer in {folder} was trained on {list(stored_stats)}, not on {index.name} with these "
                f"statistics. Make one: python train_latent.py tokenizer --data {index.directory} --out DIR"
            )
    return tokenizer


def _same_bounds(stats, expected):
    """Return whether two statistics of actions normalise alike, to rounding; the first may be missing."""
    return bool(stats) and all(np.allclose(stats[name], expected[name], rtol=1e-5) for name in ("q01", "q99"))


@torch.no_grad()
def add_action_codes(batch, tokenizer):
    """Return `batch` with the codes i64 [B, H, 1] and vectors f32 [B, H, 1, d] of its chunks: the targets of la_tok.

    batch: actions f32 [B, H, A] normalised and valid bool [B, H]; tokenizer: an `ActionTokenizer`.
    """
    codes, vectors = tokenizer.encode(batch["actions"], batch["valid"])
    return batch | {"codes": codes[:, :, None], "vectors": vectors[:, :, None]}
