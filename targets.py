"""The training targets of latent action supervision: image-based labels and action tokenizers, loaded and checked.

Labels come from a file that label.py wrote, or from features of the data that its description names, as `latent_idx`
and `latent_z` of the RLDS release of "From Pixels to Tokens" (arXiv 2605.04678). Action codes are computed by the
tokenizer, batch by batch.
Left out: the latent models themselves (latent.py) and the losses on these targets (model.py).

Axes: S steps of a data set, B batch, H chunk steps, P codes per step, d width of a code.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataspec import to_dict
from files import locate_tensors, read_json, shell_command
from index import ROWS, Column, changed_cache
from latent import fingerprint, load_tokenizer
from normalise import Normaliser

# ----------------------------------------------------------------------------------------------------------------------
# Latent labels of one data set


@dataclass
class Labels:
    """Image-based latent actions of every step, between it and the step `delta` later: codes and vectors."""

    codes: Column  # integers or whole floats [S, P], or an array
    vectors: Column  # floats [S, P, d], or an array
    delta: int
    num_codes: int
    quantised: bool  # vectors are codebook rows, not the encoder's continuous output
    fingerprint: str  # of the latent action model
    saw_actions: str = "unknown"  # "yes" or "no": whether that model learned from actions

    @property
    def dim(self):
        """The width d of a code."""
        return self.vectors.shape[2]


def label_path(dataset, data):
    """Return the default label file of a data set: next to it if one exists there, else in the cache.

    data: the folder that was given for the data set.
    """
    for shipped in (Path(data) / "labels.safetensors", dataset.find_shipped("labels.safetensors")):
        if shipped.exists():
            return shipped
    return dataset.cache / "labels.safetensors"


def load_labels(dataset, path, delta=0):
    """Return the `Labels` in the file `path`, else those in the data's own features, else None.

    delta: the expected number of steps between the two frames of a latent action, 0 for any. Data with its own labels
    must state it, here or in its description. Raise ValueError for a damaged file, labels of other data, another
    delta, or codes and vectors that cannot be what they should.
    """
    path = Path(path)
    if path.exists():
        return _labels_from_file(dataset, path, delta)
    if dataset.spec.latents:
        return _labels_from_features(dataset, delta)
    return None


def _labels_from_file(dataset, path, delta):
    remedy = shell_command("python", "label.py", data=dataset.directory, lam="DIR", out=path)
    remedy = f"Make them again: {remedy}"
    try:
        places, info = locate_tensors(path)
        codes = Column(path, *places["codes"])
        vectors = Column(path, *places["vectors"])
        sizes = int(info["delta"]), int(info["num_codes"])
        labels = Labels(codes, vectors, *sizes, False, info["lam"], info.get("saw_actions", "unknown"))
        labelled = info["data"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no labels: {error}. {remedy}") from error
    if labelled != dataset.fingerprint:
        raise ValueError(
            f"{path} labels the data set with fingerprint {labelled}, but {dataset.directory} has "
            f"{dataset.fingerprint}. {remedy}"
        )
    _check_labels(labels, path, remedy)
    if len(codes) != len(dataset):
        raise ValueError(f"{path} labels {len(codes)} steps, not {len(dataset)}. {remedy}")
    if delta and labels.delta != delta:
        raise ValueError(f"{path} was made with delta {labels.delta}, but --delta is {delta}")
    return labels


def _labels_from_features(dataset, delta):
    latents = dataset.spec.latents
    stated = latents.get("delta", 0)
    if delta and stated and delta != stated:
        raise ValueError(f"{dataset.name} is described with delta {stated}, but --delta is {delta}")
    delta = delta or stated
    if not delta:
        raise ValueError(
            f"{dataset.name} carries {latents['codes']} but not its horizon; state it (paper's release: --delta 11)"
        )
    codes, vectors = (dataset.index.columns[latents[name]] for name in ("codes", "vectors"))
    count, width = (math.prod(column.shape[1:]) for column in (codes, vectors))  # P and P * d
    if width % count:
        raise ValueError(
            f"{dataset.name}: {latents['vectors']} has {width} numbers a step, which the {count} codes of "
            f"{latents['codes']} do not divide"
        )
    codes = codes.reshape(len(dataset), count)  # [S, P]
    vectors = vectors.reshape(len(dataset), count, width // count)  # [S, P, d]
    num_codes, quantised = latents.get("num_codes", 16), latents.get("quantised", True)
    labels = Labels(codes, vectors, delta, num_codes, quantised, "stored in the data")
    remedy = f"Correct {latents['codes']} and {latents['vectors']}, or what the description says of them."
    _check_labels(labels, f"{dataset.name}, {latents['codes']}", remedy)
    return labels


def _check_labels(labels, source, remedy):
    """Raise ValueError unless codes are whole numbers from 0 to K - 1, and vectors finite with one for each code."""
    codes, vectors = labels.codes, labels.vectors
    if codes.ndim != 2 or vectors.ndim != 3 or codes.shape != vectors.shape[:2] or 0 in vectors.shape:
        raise ValueError(
            f"{source}: codes have the shape {codes.shape} and vectors {vectors.shape}; they must be [steps, P] and "
            f"[steps, P, d]. {remedy}"
        )
    if labels.delta < 1:
        raise ValueError(f"{source}: delta is {labels.delta}; it must be at least 1. {remedy}")
    for start in range(0, len(codes), ROWS):
        part = np.asarray(codes[start : start + ROWS])
        low, high = part.min(), part.max()
        whole = (part == np.floor(part)).all()
        if not whole or low < 0 or high >= labels.num_codes:
            counted = "" if whole else ", not all whole"
            if low >= 1 and high == labels.num_codes:
                counted += " (counted from 1?)"
            raise ValueError(
                f"{source}: codes go from {low:g} to {high:g}{counted}; they must be whole numbers from 0 to "
                f"{labels.num_codes - 1}. {remedy}"
            )
        finite = np.isfinite(vectors[start : start + ROWS]).all((1, 2))
        if not finite.all():
            raise ValueError(f"{source}: the vector of step {start + np.argmin(finite)} is not finite. {remedy}")


# ----------------------------------------------------------------------------------------------------------------------
# The targets of a training run


def load_targets(variant, config, datasets, chunk):
    """Return (list of `Labels`, one per data set, or None; `ActionTokenizer` or None): the targets of the latent loss.

    variant: a row of `model.VARIANTS`; config: that of train.py; chunk: H. Raise FileNotFoundError with the command
    that makes what is missing, and ValueError where labels or tokenizer do not fit the data or the config.
    """
    if variant.target == "":
        return None, None
    if variant.target == "action":
        return None, tokenizer_of_run(config, datasets, chunk)
    reads_vectors = variant.loss != "codes" or config.continuous
    labels = [labels_of_run(config, number, dataset, reads_vectors) for number, dataset in enumerate(datasets)]
    sources = {(each.delta, each.fingerprint, each.num_codes, *each.vectors.shape[1:]) for each in labels}
    if len(sources) > 1:
        raise ValueError(
            "the labels of these data sets come from different latent models (delta, fingerprint, codes, codes a step, "
            f"their width): {sources}"
        )
    return labels, None


def labels_of_run(config, number, dataset, reads_vectors):
    """Return the `Labels` of data set `number`. A label file that the config names must exist."""
    data = config.data[number]
    path = config.labels[number] if config.labels else label_path(dataset, data)
    labels = None
    if path.exists() or not config.labels:
        labels = load_labels(dataset, path, config.delta)
    if labels is None:
        delta = {"delta": config.delta or None}
        raise FileNotFoundError(
            f"variant {config.variant} needs latent labels, and {path} does not exist. Make them: "
            f"{shell_command('python', 'train_latent.py', 'lam', **_places(config), **delta, out='runs/lam')} && "
            f"{shell_command('python', 'label.py', **_places(config, number), lam='runs/lam', out=path)}"
        )
    if reads_vectors and labels.quantised != (config.align_target == "quantised"):
        raise ValueError(
            f"the labels of {dataset.name} hold {'quantised' if labels.quantised else 'continuous'} vectors, "
            f"but align_target is '{config.align_target}'"
        )
    return labels


def _places(config, number=None):
    """Return the options that say where the data of a run lies, or one of its data sets, for a command."""
    chosen = slice(None) if number is None else slice(number, number + 1)
    return {"data": config.data[chosen], "spec": config.spec[chosen], "cache": changed_cache(config)}


def tokenizer_of_run(config, datasets, chunk):
    """Return the action tokenizer, with its `fingerprint`.

    Raise ValueError unless it has the sizes and the action statistics of the run.
    """
    folder = Path(config.tokenizer or datasets[0].find_shipped("tokenizer"))
    options = _places(config) | {"chunk": config.chunk or None}
    command = functools.partial(shell_command, "python", "train_latent.py", "tokenizer", **options)
    if not folder.exists():
        raise FileNotFoundError(
            f"variant {config.variant} needs an action tokenizer, and {folder} does not exist. Make it: "
            f"{command(out=folder)}"
        )
    tokenizer = load_tokenizer(folder)
    tokenizer.fingerprint = fingerprint(folder)
    expected = {"chunk": chunk, "action_sizes": action_sizes(datasets)}
    names = tokenizer.config.get("embodiments") or expected["action_sizes"]  # of one embodiment the name is not stored
    stored = {"chunk": tokenizer.config["chunk"], "action_sizes": dict(zip(names, tokenizer.action_sizes))}
    if stored != expected or list(stored["action_sizes"]) != list(expected["action_sizes"]):
        raise ValueError(
            f"the action tokenizer in {folder} is for {stored}, but this run has {expected}. Make one: "
            f"{command(out='DIR')}"
        )
    stored_stats = read_json(folder / "dataset_statistics.json")
    entries = {entry["name"]: entry for entry in read_json(folder / "config.json")["data"]}
    for dataset in datasets:
        spec = entries.get(dataset.name, {}).get("spec", {})
        if spec and spec.get("grippers", []) != to_dict(dataset.spec).get("grippers", []):
            raise ValueError(
                f"the action tokenizer in {folder} was trained on {dataset.name} with the grippers "
                f"{spec.get('grippers', [])}, now described as {to_dict(dataset.spec).get('grippers', [])}"
            )
        if not _same_bounds(stored_stats.get(dataset.name, {}).get("action"), dataset.stats["action"]):
            raise ValueError(
                f"the action tokenizer in {folder} was trained on {list(stored_stats)}, not on {dataset.name} with "
                f"these statistics. Make one: {command(out='DIR')}"
            )
    return tokenizer


def action_sizes(datasets):
    """Return {embodiment: action size}, in order of first appearance; data without actions does not count."""
    return {each.spec.embodiment: each.action_size for each in datasets if each.action_size}


def _same_bounds(stats, expected):
    """Return whether two statistics of actions normalise alike, to rounding; the first may be missing."""
    if not stats or len(stats["q01"]) != len(expected["q01"]):
        return False
    first, second = Normaliser(stats), Normaliser(expected)
    alike = np.allclose(first.low, second.low, rtol=1e-5) and np.allclose(first.range, second.range, rtol=1e-5)
    return bool(alike and np.array_equal(first.mask, second.mask) and first.clip == second.clip)


@torch.no_grad()
def add_action_codes(batch, tokenizer):
    """Return `batch` with the codes i64 [B, H, 1] and vectors f32 [B, H, 1, d] of its chunks: the targets of la_tok.

    batch: actions f32 [B, H, A] normalised, valid bool [B, H] and, of several, embodiment i64 [B]; tokenizer: an
    `ActionTokenizer`.
    """
    codes, vectors = tokenizer.encode(batch["actions"], batch["valid"], batch.get("embodiment"))
    return batch | {"codes": codes[:, :, None], "vectors": vectors[:, :, None]}
