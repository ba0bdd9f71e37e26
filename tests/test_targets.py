"""targets.py: latent labels, and that those of other data are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import make_chunks

from checkpoint import load_tensors, save_tensors
from data import open_index
from normalise import statistics
from targets import label_path, load_labels


def test_labels_follow_their_steps(index, labels, stats):
    """A chunk's labels are those of its steps; past the end the last one is repeated (and masked)."""
    loaded = load_labels(index, labels)
    assert (loaded.delta, loaded.num_codes, loaded.dim) == (32, 16, 16)
    assert not loaded.quantised and loaded.fingerprint == "made"
    end = int(index.starts[1])
    item = make_chunks(index, stats, labels=[loaded]).sample(0, end - 2)
    steps = [end - 2, end - 1] + [end - 1] * 6
    assert item["codes"].dtype == torch.int64 and np.array_equal(item["codes"], loaded.codes[steps])
    assert np.array_equal(item["vectors"], loaded.vectors[steps].astype(np.float32))


def test_labels_in_the_data_itself_are_used(rlds_latents, cache, tmp_path):
    """`latent_idx` (floats) and `latent_z` of the paper's release, marked as quantised; a label file comes first."""
    index = replace(open_index(rlds_latents, cache), cache=tmp_path)
    loaded = load_labels(index, label_path(index, rlds_latents), delta=11)
    assert loaded.quantised and (loaded.num_codes, loaded.dim, loaded.delta) == (16, 128, 11)
    item = make_chunks(index, statistics(index), chunk=4, labels=[loaded]).sample(0, 5)
    assert np.array_equal(item["codes"], index.columns["latent_idx"][5:9].astype(int))
    assert item["codes"].dtype == torch.int64
    assert np.array_equal(item["vectors"].reshape(4, 512), index.columns["latent_z"][5:9])


def test_data_without_labels_has_none(index, rlds, tmp_path):
    """Nothing with the data, nothing in the cache, no field in the records."""
    index = replace(index, cache=tmp_path)
    assert label_path(index, rlds) == tmp_path / "labels.safetensors"
    assert load_labels(index, label_path(index, rlds)) is None


def test_labels_of_other_data_or_delta_are_refused(index, labels):
    """The error names both fingerprints and the command that makes labels."""
    remedy = rf"python label.py --data {index.directory} --lam DIR --out {labels}"
    with pytest.raises(ValueError, match=rf"fingerprint {index.fingerprint}, but .* has 0000\. .*{remedy}"):
        load_labels(replace(index, fingerprint="0000"), labels)
    with pytest.raises(ValueError, match="made with delta 32, but --delta is 11"):
        load_labels(index, labels, delta=11)


def test_damaged_labels_are_refused(index, labels, tmp_path):
    """No such file's format, no metadata, labels of too few steps: file and remedy."""
    tensors, info = load_tensors(labels)
    path = tmp_path / "labels.safetensors"
    codes = {"codes": tensors["codes"]}
    shorter = {name: tensor[:-1].clone() for name, tensor in tensors.items()}
    for content, metadata in ((codes, info), (tensors, {}), (shorter, info)):
        save_tensors(path, content, **metadata)
        with pytest.raises(ValueError, match=f"{path}.* Make them again: python label.py"):
            load_labels(index, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path} holds no labels: .* Make them again: python label.py"):
        load_labels(index, path)
