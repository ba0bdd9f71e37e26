"""latent.py: the quantiser by hand, both models trained for seconds, labels and saved models."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import common
import data
import latent

ROOT = Path(__file__).resolve().parents[1]

DATA = ROOT / "data" / "libero_tiny"


# ----------------------------------------------------------------------------------------------------------------------
# Quantiser


def quantiser_at(codebook, **options):
    """A quantiser whose codes stand at `codebook`, each with count 1, as after an initialisation."""
    codebook = torch.as_tensor(codebook, dtype=torch.float32)
    q = latent.Quantiser(*codebook.shape, **options)
    q.codebook.copy_(codebook), q.sums.copy_(codebook), q.counts.fill_(1.0), q.updates.fill_(1)
    return q


def test_gradient_on_two_codes_by_hand():
    q = quantiser_at([[0.0, 0.0], [4.0, 0.0]]).eval()
    x = torch.tensor([[[1.0, 1.0], [3.0, -1.0]]], requires_grad=True)
    vectors, codes, commitment = q(x)
    assert codes.tolist() == [[0, 1]]
    assert vectors.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
    weight = torch.tensor([[[2.0, 3.0], [5.0, 7.0]]])
    (passed,) = torch.autograd.grad((vectors * weight).sum(), x, retain_graph=True)
    assert torch.equal(passed, weight)  # straight through: as if vectors were x
    assert commitment.item() == pytest.approx((1 + 1 + 1 + 1) / 4)
    (pulled,) = torch.autograd.grad(commitment, x)
    assert torch.allclose(pulled, 2 * torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]) / 4)  # 2 (x - code) / entries


def test_codebook_is_the_running_mean_of_a_reference_loop():
    torch.manual_seed(0)
    codebook = np.random.default_rng(0).normal(size=(5, 3))
    q = quantiser_at(codebook, patience=1000)
    counts, sums = np.ones(5), codebook.copy()
    for _ in range(30):
        x, valid = torch.randn(8, 4, 3), torch.rand(8, 4) < 0.7
        q(x, valid)
        hits, new = np.zeros(5), np.zeros((5, 3))
        for vector in x[valid].double().numpy():
            code = ((codebook - vector) ** 2).sum(1).argmin()
            hits[code] += 1
            new[code] += vector
        counts, sums = 0.99 * counts + 0.01 * hits, 0.99 * sums + 0.01 * new
        codebook = sums / counts[:, None]
    assert np.allclose(q.codebook, codebook, atol=1e-5) and np.allclose(q.counts, counts, atol=1e-5)


def test_codes_start_on_the_first_batch():
    x = torch.randn(16, 4, 8) * 100
    q = latent.Quantiser(32, 8, decay=1.0)  # the first update leaves the codes where they start
    q(x)
    distance = (q.codebook[:, None] - x.flatten(0, 1)).norm(dim=-1).min(1).values
    assert distance.max() < 1e-3 and len(torch.unique(q.codebook, dim=0)) == 32


def test_dead_code_is_restarted_on_an_encoder_output():
    q = quantiser_at([[0.0, 0.0], [1000.0, 0.0]], patience=3)
    x = torch.randn(4, 2, 2)
    for _ in range(3):
        assert q.codebook[1, 0] == pytest.approx(1000)
        q(x)
    assert torch.cdist(q.codebook[1:], x.flatten(0, 1)).min() < 1e-6
    assert q.unused.tolist() == [0, 0] and q.counts[1] == 1 and torch.equal(q.sums[1], q.codebook[1])


def train_quantiser(rank, world, out):
    """Six updates in float64: an initialisation, moves, restarts. Rank r has the rows r::world of each batch."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    q = latent.Quantiser(6, 3, patience=2).double()
    for step in range(6):
        rows = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 5 * step
        valid = torch.arange(16).view(8, 2) % 5 > 0
        q(rows[rank::world], valid[rank::world])
    torch.save(q.state_dict(), f"{out}/{world}-{rank}.pt")
    common.stop_ranks()


def test_two_processes_equal_one(tmp_path):
    train_quantiser(0, 1, tmp_path)
    mp.spawn(train_quantiser, (2, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name in one:
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(one[name].double(), first[name].double(), rtol=0, atol=1e-9), name


def test_code_usage_by_hand():
    used, perplexity = latent.code_usage(torch.tensor([[0, 3], [1, 3], [0, 3], [1, 3]]), 4)
    assert used.tolist() == [2, 1]
    assert perplexity.tolist() == pytest.approx([2, 1])


# ----------------------------------------------------------------------------------------------------------------------
# Action tokenizer


def test_fourier_features_equal_numpy():
    actions = np.random.default_rng(0).normal(size=(3, 8, 7))
    spectrum = np.fft.fft(actions, axis=1)
    expected = np.concatenate([actions, spectrum.real, spectrum.imag], -1)
    assert np.allclose(latent.fourier_features(torch.from_numpy(actions)), expected, atol=1e-12)


def sine_chunks(batch, generator):
    """Chunks [batch, 8, 3] of sines with random phase, amplitude and frequency."""
    phase, amplitude, frequency = torch.rand(3, batch, 1, 3, generator=generator)
    return amplitude * torch.sin(6 * phase + (0.2 + frequency) * torch.arange(8)[:, None])


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = latent.ActionTokenizer(8, 3, num_codes=64, dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        actions, masked = sine_chunks(64, generator), torch.rand(64, 8, generator=generator) < latent.MASKED
        loss = model(actions, torch.ones(64, 8, dtype=torch.bool), masked)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_tokenizer_round_trip(tokenizer):
    actions = sine_chunks(256, torch.Generator().manual_seed(1))
    codes, vectors = tokenizer.encode(actions)
    assert codes.shape == (256, 8) and codes.dtype == torch.long and vectors.shape == (256, 8, 32)
    error = (tokenizer.decode(codes) - actions).square().mean() / actions.square().mean()
    assert error < 0.2
    assert len(codes.unique()) >= 48  # of 64


def test_masked_steps_do_not_influence_the_loss(tokenizer):
    actions, valid = sine_chunks(16, torch.Generator().manual_seed(2)), torch.arange(8).expand(16, 8) < 5
    other = torch.where(valid[..., None], actions, 9.0)
    masked = torch.rand(16, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    a, b = tokenizer(actions, valid, masked), tokenizer(other, valid, masked)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert len(a["codes"]) == 16 * 5
    assert torch.equal(tokenizer.encode(actions, valid)[0], tokenizer.encode(other, valid)[0])
    assert tokenizer(actions, valid.fill_(True), masked)["loss"] != a["loss"]


def test_consistency_reaches_the_encoder_at_masked_steps_only(tokenizer):
    actions, valid = sine_chunks(4, torch.Generator().manual_seed(4)), torch.ones(4, 8, dtype=torch.bool)
    assert tokenizer(actions, valid, ~valid)["consistency_loss"] == 0
    loss = tokenizer(actions, valid, valid)["consistency_loss"]
    assert torch.autograd.grad(loss, tokenizer.project.weight)[0].abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Image-based model

MOVES = torch.tensor([[6, 0], [-6, 0], [0, 6], [0, -6]])


def moving_squares(batch, generator):
    """u8 [batch, 2, 24, 24, 3]: a bright square, then the same moved one of four ways; and which way, i64 [batch]"""
    frames = torch.full((batch, 2, 24, 24, 3), 40, dtype=torch.uint8)
    way = torch.randint(4, (batch,), generator=generator)
    at = torch.randint(6, 13, (batch, 2), generator=generator)
    for row in range(batch):
        for t, (y, x) in enumerate((at[row], at[row] + MOVES[way[row]])):
            frames[row, t, y : y + 6, x : x + 6] = 220
    return frames, way


def lam_inputs(frames, way):
    """`LatentActionModel.forward`'s arguments: the action of each pair is its move, known for a quarter of them."""
    actions = (MOVES[way] / 6).float()[:, None]  # [B, 1, 2]
    return frames, actions, torch.ones(len(way), 1, dtype=torch.bool), 4.0 * (torch.arange(len(way)) % 4 == 0)


@pytest.fixture(scope="module")
def lam():
    torch.manual_seed(0)
    sizes = latent.LamSizes(image_size=24, patch_size=6, width=32, code_dim=8, delta=3)
    model = latent.LatentActionModel(sizes, head_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        loss = model(*lam_inputs(*moving_squares(32, generator)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_lam_round_trip(lam):
    frames, way = moving_squares(128, torch.Generator().manual_seed(1))
    result = lam(*lam_inputs(frames, way))
    assert result["reconstruction_loss"] < 0.6 * result["copy_error"]
    a, b = lam.features(frames[:, 0]), lam.features(frames[:, 1])
    codes, vectors = lam.encode(a, b)
    assert codes.shape == (128, 4) and vectors.shape == (128, 4, 8)
    assert torch.equal(codes, result["codes"]) and len(codes.unique()) >= 8
    swapped = lam.predict(a, lam.quantiser.codebook[codes.roll(1, 0)])
    assert (swapped - b).square().mean() > 1.5 * result["reconstruction_loss"]  # the decoder listens to the codes
    majority = torch.stack([codes[way == w].mode(0).values for w in range(4)])
    assert len(torch.unique(majority, dim=0)) == 4  # different moves, different codes


def test_pixel_patches_are_pixels_in_reading_order():
    image = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    features = latent.PixelPatches(12, 4)
    patches = features(torch.from_numpy(features.read(image).copy())[None])
    assert patches.shape == (1, features.patches, features.dim) == (1, 9, 48)
    assert np.allclose(patches[0, 5].view(4, 4, 3), image[4:8, 8:12] / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="image_size is 12"):
        latent.PixelPatches(12, 5)


def test_unlabelled_samples_do_not_reach_the_action_head(lam):
    frames, actions, valid, weight = lam_inputs(*moving_squares(8, torch.Generator().manual_seed(2)))
    other = torch.where((weight > 0)[:, None, None], actions, 7.0)
    plain, changed, all_changed = (lam(frames, a, valid, weight)["action_loss"] for a in (actions, other, actions + 1))
    assert changed == plain and all_changed != plain


# ----------------------------------------------------------------------------------------------------------------------
# Models and labels on disk


@pytest.fixture
def index(tmp_path):
    """Two episodes, of 10 and 7 steps, of JPEGs in one file."""
    rng, images, at = np.random.default_rng(0), [], 0
    with open(tmp_path / "shard", "wb") as shard:
        for _ in range(17):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
            shard.write(buffer.getvalue())
            images.append((0, at, len(buffer.getvalue())))
            at = shard.tell()
    columns = {"action": rng.uniform(-1, 1, (17, 2)).astype(np.float32), "state": np.zeros((17, 1), np.float32)}
    where = {"directory": tmp_path, "cache": tmp_path, "fingerprint": "0123", "shards": [tmp_path / "shard"]}
    steps = {"starts": np.array([0, 10, 17]), "images": {"image": np.array(images)}, "columns": columns}
    return data.Index(name="two", **where, **steps, instructions=["a", "b"], metadata={})


def test_saved_models_encode_bit_identically(lam, tokenizer, tmp_path):
    for kind, model in (("lam", lam), ("tokenizer", tokenizer)):
        (tmp_path / kind).mkdir()
        latent.save_model(tmp_path / kind, kind, model, {})
    frames, _ = moving_squares(8, torch.Generator().manual_seed(3))
    a, b = lam.features(frames[:, 0]), lam.features(frames[:, 1])
    again = latent.load_lam(tmp_path / "lam")
    assert again.delta == 3 and not hasattr(again, "action_head")
    for before, after in zip(lam.encode(a, b), again.encode(a, b), strict=True):
        assert torch.equal(before, after)
    actions, again = sine_chunks(8, torch.Generator().manual_seed(4)), latent.load_tokenizer(tmp_path / "tokenizer")
    assert torch.equal(tokenizer.encode(actions)[0], again.encode(actions)[0])
    assert torch.equal(tokenizer.decode(again.encode(actions)[0]), again.decode(again.encode(actions)[0]))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_fingerprint_follows_the_weights(lam, tmp_path):
    latent.save_model(tmp_path, "lam", lam, {"out": "here"})
    first = latent.fingerprint(tmp_path)
    latent.save_model(tmp_path, "lam", lam, {"out": "there"})
    assert latent.fingerprint(tmp_path) == first
    with torch.no_grad():
        lam.queries[0, 0] += 1
        latent.save_model(tmp_path, "lam", lam, {})
        lam.queries[0, 0] -= 1
    assert latent.fingerprint(tmp_path) != first


def test_folders_that_hold_no_such_model_are_refused(lam, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json.*latent.py tokenizer"):
        latent.load_tokenizer(tmp_path)
    latent.save_model(tmp_path, "lam", lam, {})
    with pytest.raises(ValueError, match="holds a 'lam' where a 'tokenizer' is needed"):
        latent.load_tokenizer(tmp_path)


def test_labels_do_not_depend_on_the_batch_size(lam, index):
    (codes, vectors), (codes_3, vectors_3) = (latent.label_steps(index, lam, batch_size) for batch_size in (64, 3))
    assert torch.equal(codes, codes_3) and torch.allclose(vectors, vectors_3, atol=1e-5)
    for step, later in ((0, 3), (6, 9), (8, 9), (9, 9), (10, 13), (16, 16)):  # never across the end of an episode
        a, b = (lam.features(torch.from_numpy(index.image("image", s).copy())[None]) for s in (step, later))
        expected, _ = lam.encode(a, b)
        assert torch.equal(codes[step].long(), expected[0]), step


def test_frame_pairs(index, lam):
    pairs = latent.FramePairs([index], [data.statistics(index)], [], 2, model=lam, action_fraction=0.5)
    for step, later in ((0, 3), (7, 9), (9, 9), (10, 13), (15, 16)):
        for frame, shown in zip(pairs.sample(0, step)["frames"], (step, later), strict=True):
            assert np.array_equal(frame, index.image("image", shown)), step
    weights = [pairs.sample(0, step)["weight"].item() for step in range(17)]
    assert set(weights) == {0.0, 2.0}
    with pytest.raises(ValueError, match="camera is 'image', but two has .*front"):
        latent.check_camera(lam, replace(index, images={"front": index.images["image"]}))


# ----------------------------------------------------------------------------------------------------------------------
# The script itself


def latent_py(*words, code=0):
    run = subprocess.run([sys.executable, ROOT / "latent.py", *map(str, words)], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    return run.stdout + run.stderr


def test_commands_from_training_to_labels_that_refuse_other_data(tmp_path):
    common_flags = ("--data", DATA, "--cache", tmp_path / "cache")
    brief = ("--max-steps", 2, "--global-batch-size", 8)
    assert "--tokenizer" in latent_py("tokenizer", *common_flags, *brief, "--out", tmp_path / "tokenizer", "--chunk", 5)
    assert latent.load_tokenizer(tmp_path / "tokenizer").config["chunk"] == 5
    assert "q99" in (tmp_path / "tokenizer" / "dataset_statistics.json").read_text()
    assert "latent.py label" in latent_py("lam", *common_flags, *brief, "--out", tmp_path / "lam")
    assert len((tmp_path / "lam" / "log.jsonl").read_text().splitlines()) == 2
    assert "exists and is not empty" in latent_py("lam", *common_flags, *brief, "--out", tmp_path / "lam", code=1)
    assert "train.py" in latent_py("label", *common_flags, "--lam", tmp_path / "lam")
    index = data.open_index(DATA, tmp_path / "cache")
    path = index.cache / "labels.safetensors"
    labels, lam = data.load_labels(index, path, delta=32), latent.load_lam(tmp_path / "lam")
    assert (labels.num_codes, labels.fingerprint) == (16, latent.fingerprint(tmp_path / "lam"))
    codes, vectors = latent.label_steps(index, lam, 64)
    assert np.array_equal(labels.codes, codes) and np.array_equal(labels.vectors, vectors.half())
    with pytest.raises(ValueError, match="labels the data set with fingerprint"):
        data.load_labels(replace(index, fingerprint="other"), path)
    with pytest.raises(ValueError, match="made with delta 32"):
        data.load_labels(index, path, delta=8)
    assert "exists. Delete it" in latent_py("label", *common_flags, "--lam", tmp_path / "lam", code=1)
