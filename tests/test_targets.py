"""targets.py: latent labels, and that those of other data, or that cannot be what they should, are refused."""

import numpy as np
import pytest
import torch
from data_helpers import change_index, change_spec, made_index, make_chunks

from data import Dataset, open_dataset
from dataspec import PRESETS, DataSpec
from files import load_tensors, save_tensors
from model import VARIANTS
from targets import _same_bounds, label_path, load_labels, load_targets


def test_labels_follow_their_steps(dataset, labels):
    """A chunk's labels are those of its steps; past the end the last one is repeated (and masked)."""
    loaded = load_labels(dataset, labels)
    assert (loaded.delta, loaded.num_codes, loaded.dim) == (32, 16, 16)
    assert not loaded.quantised and loaded.fingerprint == "made"
    tensors, _ = load_tensors(labels)
    assert all(np.array_equal(getattr(loaded, name), tensors[name]) for name in ("codes", "vectors"))
    end = int(dataset.starts[1])
    item = make_chunks(dataset, labels=[loaded]).sample(0, end - 2)
    steps = [end - 2, end - 1] + [end - 1] * 6
    assert item["codes"].dtype == torch.int64 and np.array_equal(item["codes"], loaded.codes[steps])
    assert np.array_equal(item["vectors"], loaded.vectors[steps].astype(np.float32))


def test_labels_in_the_data_itself_are_used(rlds_latents, cache, tmp_path):
    """`latent_idx` (floats) and `latent_z` of the paper's release, marked as quantised; a label file comes first."""
    dataset = open_dataset(rlds_latents, cache)
    assert dataset.spec.latents == PRESETS["libero"].latents
    dataset = change_index(dataset, cache=tmp_path)
    loaded = load_labels(dataset, label_path(dataset, rlds_latents), delta=11)
    assert loaded.quantised and (loaded.num_codes, loaded.dim, loaded.delta) == (16, 128, 11)
    item = make_chunks(dataset, chunk=4, labels=[loaded]).sample(0, 5)
    assert np.array_equal(item["codes"], dataset.index.columns["latent_idx"][5:9].astype(int))
    assert item["codes"].dtype == torch.int64
    assert np.array_equal(item["vectors"].reshape(4, 512), dataset.index.columns["latent_z"][5:9])


def test_data_without_labels_has_none(dataset, rlds, tmp_path):
    """Nothing with the data, nothing in the cache, no field in the records."""
    dataset = change_index(dataset, cache=tmp_path)
    assert label_path(dataset, rlds) == tmp_path / "labels.safetensors"
    assert load_labels(dataset, label_path(dataset, rlds)) is None


def test_labels_of_other_data_or_delta_are_refused(dataset, labels):
    """The error names both fingerprints and the command that makes labels."""
    remedy = rf"python label.py --data {dataset.directory} --lam DIR --out {labels}"
    with pytest.raises(ValueError, match=rf"fingerprint {dataset.fingerprint}, but .* has 0000\. .*{remedy}"):
        load_labels(change_index(dataset, fingerprint="0000"), labels)
    with pytest.raises(ValueError, match="made with delta 32, but --delta is 11"):
        load_labels(dataset, labels, delta=11)


# ----------------------------------------------------------------------------------------------------------------------
# Label files that cannot be used


def test_damaged_labels_are_refused(dataset, labels, tmp_path):
    """No such file's format, no metadata, labels of too few steps: file and remedy."""
    tensors, info = load_tensors(labels)
    path = tmp_path / "labels.safetensors"
    codes = {"codes": tensors["codes"]}
    shorter = {name: tensor[:-1].clone() for name, tensor in tensors.items()}
    for content, metadata in ((codes, info), (tensors, {}), (shorter, info)):
        save_tensors(path, content, **metadata)
        with pytest.raises(ValueError, match=f"{path}.* Make them again: python label.py"):
            load_labels(dataset, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path} holds no labels: .* Make them again: python label.py"):
        load_labels(dataset, path)


def one_changed(tensor, value):
    """Return a copy of a tensor with another value in its middle."""
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


WRONG_LABELS = {
    "scalar codes": ({"codes": lambda t: t.view(-1)[0]}, r"codes have the shape \(\) and vectors \(\d+, 4, 16\)"),
    "flat codes": ({"codes": lambda t: t.view(-1)}, r"codes have the shape \(\d+,\)"),
    "flat vectors": ({"vectors": lambda t: t.flatten(1)}, r".* vectors \(\d+, 64\); they must be \[steps, P\] and"),
    "fewer codes": ({"codes": lambda t: t[:, :3]}, r"codes have the shape \(\d+, 3\) and vectors \(\d+, 4, 16\)"),
    "no width": ({"vectors": lambda t: t[:, :, :0]}, "holds no labels: .* is damaged"),
    "codes of fewer steps": ({"codes": lambda t: t[1:]}, "codes have the shape"),
    "codes from 1": ({"codes": lambda t: t.clamp(max=15) % 16 + 1}, r"codes go from 1 to 16 \(counted from 1\?\)"),
    "codes below 0": ({"codes": lambda t: one_changed(t.long(), -1)}, "codes go from -1 to 15; they must be whole"),
    "half codes": ({"codes": lambda t: one_changed(t.float(), 0.5)}, "codes go from 0 to 15, not all whole; they must"),
    "codes of none": ({"codes": lambda t: one_changed(t.float(), float("nan"))}, "codes go from nan to nan"),
    "vector not finite": ({"vectors": lambda t: one_changed(t, float("inf"))}, r"the vector of step \d+ is not finite"),
}


@pytest.mark.parametrize("fault", WRONG_LABELS)
def test_labels_that_cannot_be_are_refused(fault, dataset, labels, tmp_path):
    """File, what is wrong, and the command that makes them again."""
    changes, message = WRONG_LABELS[fault]
    tensors, info = load_tensors(labels)
    tensors |= {name: change(tensors[name]).contiguous() for name, change in changes.items()}
    path = tmp_path / "labels.safetensors"
    save_tensors(path, tensors, **info)
    with pytest.raises(ValueError, match=f"{path}:? {message}.* Make them again: python label.py"):
        load_labels(dataset, path)


@pytest.mark.parametrize(
    "delta, message", (("0", "delta is 0"), ("-3", "delta is -3"), ("x", "holds no labels: .*'x'"))
)
def test_labels_without_a_horizon_are_refused(delta, message, dataset, labels, tmp_path):
    """Metadata whose delta is no positive number."""
    tensors, info = load_tensors(labels)
    path = tmp_path / "labels.safetensors"
    save_tensors(path, tensors, **info | {"delta": delta})
    with pytest.raises(ValueError, match=f"{path}.*{message}.* Make them again"):
        load_labels(dataset, path)


# ----------------------------------------------------------------------------------------------------------------------
# Labels in the data


def labelled_dataset(folder, codes, vectors, **latents):
    """Return a `Dataset` of 60 steps that carries codes and vectors as features."""
    index = made_index(folder, {"idx": codes, "z": vectors, "action": np.zeros((60, 2), np.float32)})
    names = {"codes": "idx", "vectors": "z", "num_codes": 16, "delta": 5}
    return Dataset(index, DataSpec("mine", action=["action"], latents=names | latents))


def own_labels(dataset, delta=0):
    """Return the labels in the data."""
    return load_labels(dataset, dataset.cache / "labels.safetensors", delta)


CODES = np.random.default_rng(0).integers(0, 16, (60, 4))
CODES[0] = 0, 15, 3, 3
VECTORS = np.random.default_rng(0).normal(size=(60, 4, 8)).astype(np.float32)
CODE_FORMS = {
    "floats": np.float32(CODES),
    "1 x 4": CODES[:, None],
    "4 x 1": np.uint8(CODES)[:, :, None],
    "u8": np.uint8(CODES),
}


@pytest.mark.parametrize("form", CODE_FORMS)
@pytest.mark.parametrize("shape", ((32,), (4, 8), (1, 32)))
def test_codes_and_vectors_are_read_in_every_form(form, shape, tmp_path):
    """Whole floats and integers, of shape (4,), (1, 4) and (4, 1), and vectors of 32 numbers."""
    dataset = labelled_dataset(tmp_path, CODE_FORMS[form], VECTORS.reshape(60, *shape))
    loaded = own_labels(dataset)
    assert loaded.delta == 5
    assert np.array_equal(loaded.codes[3:9], CODES[3:9]) and np.array_equal(loaded.vectors[3:9], VECTORS[3:9])
    assert loaded.codes.shape == (60, 4) and loaded.vectors.shape == (60, 4, 8)


WRONG_FEATURES = {
    "from 1": (
        CODES + 1,
        VECTORS,
        r"codes go from 1 to 16 \(counted from 1\?\); they must be whole numbers from 0 to 15",
    ),
    "half": (CODES + 0.5, VECTORS, r"codes go from 0.5 to 15.5, not all whole; they must"),
    "other width": (CODES, VECTORS.reshape(60, 32)[:, :30], "z has 30 numbers a step, which the 4 codes of idx do not"),
    "fewer vectors": (CODES, VECTORS[:, :1, :2].reshape(60, 2), "z has 2 numbers a step, which the 4 codes"),
    "not finite": (
        CODES,
        np.where(np.arange(60)[:, None, None] == 9, np.nan, VECTORS),
        "vector of step 9 is not finite",
    ),
}


@pytest.mark.parametrize("fault", WRONG_FEATURES)
def test_features_that_are_no_labels_are_refused(fault, tmp_path):
    """The data set, the feature and what is wrong."""
    codes, vectors, message = WRONG_FEATURES[fault]
    with pytest.raises(ValueError, match=f"made.*{message}"):
        own_labels(labelled_dataset(tmp_path, codes, vectors))


def test_horizon_must_be_stated(rlds_latents, cache, tmp_path):
    """The data carries codes but not the steps between their frames: an error until the command or the spec says so."""
    dataset = change_index(open_dataset(rlds_latents, cache), cache=tmp_path)
    with pytest.raises(ValueError, match="released carries latent_idx but not its horizon; state it .*--delta 11"):
        own_labels(dataset)


def test_horizon_is_stated_once(rlds_latents, cache, tmp_path):
    """A description that says 11 and an option that says 32 are refused, with both."""
    dataset = change_index(open_dataset(rlds_latents, cache), cache=tmp_path)
    stated = change_spec(dataset, latents=dataset.spec.latents | {"delta": 11})
    path = label_path(stated, tmp_path)
    assert load_labels(stated, path).delta == load_labels(stated, path, 11).delta == 11
    with pytest.raises(ValueError, match="released is described with delta 11, but --delta is 32"):
        load_labels(stated, path, 32)


def test_tokenizer_of_other_units_is_refused(dataset):
    """Statistics with the same bounds, but a dimension that is not normalised, or values that are not cut."""
    stats = dataset.stats["action"]
    assert _same_bounds(stats, dict(stats))
    assert not _same_bounds(stats | {"mask": [False, *stats["mask"][1:]]}, stats)
    assert not _same_bounds(stats | {"clip": False}, stats)


def test_labels_of_other_sizes_do_not_mix(dataset, labels, tmp_path):
    """Another latent model, another width of the codes: named before the loss meets them."""
    from train import Config

    def load(*paths, datasets):
        config = Config(data=tuple(each.directory for each in datasets), variant="la_cond", labels=paths)
        return load_targets(VARIANTS["la_cond"], config, datasets, 8)

    tensors, info = load_tensors(labels)
    path = tmp_path / "narrow.safetensors"
    save_tensors(path, {**tensors, "vectors": tensors["vectors"][:, :, :8].contiguous()}, **info)
    assert [each.dim for each in load(labels, labels, datasets=[dataset, dataset])[0]] == [16, 16]
    with pytest.raises(ValueError, match="different latent models .*width.*32, 'made', 16, 4, 16"):
        load(labels, path, datasets=[dataset, dataset])
