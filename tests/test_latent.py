"""latent.py: the quantiser by hand, both models trained for seconds, labels and saved models."""

import ast
import copy
import io
import json
import os
import re
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from PIL import Image
from safetensors import safe_open
from torch.utils.data import default_collate
from transformers import AutoTokenizer, Dinov2WithRegistersModel, T5Config, T5EncoderModel

import common
import data
import latent

SMALL = dict(max_steps=2, global_batch_size=8, val_fraction=0.25, image_size=24, width=16, num_blocks=1, code_dim=8)
ONE = common.Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[1]

DATA = ROOT / "data" / "libero_tiny"


# ----------------------------------------------------------------------------------------------------------------------
# Quantiser


def quantiser_at(codebook, **options):
    """A quantiser whose codes stand at `codebook`, each with count 1, as after an initialisation."""
    codebook = torch.as_tensor(codebook, dtype=torch.float32)
    q = latent.Quantiser(*codebook.shape, **options)
    q.start_at(codebook)
    return q


def test_gradient_on_two_codes_by_hand():
    q = quantiser_at([[0.0, 0.0], [4.0, 0.0]]).eval()
    x = torch.tensor([[[1.0, 1.0], [3.0, -1.0]]], requires_grad=True)
    vectors, codes, loss = q(x)
    assert codes.tolist() == [[0, 1]]
    assert vectors.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
    weight = torch.tensor([[[2.0, 3.0], [5.0, 7.0]]])
    (passed,) = torch.autograd.grad((vectors * weight).sum(), x, retain_graph=True)
    assert torch.equal(passed, weight)  # straight through: as if vectors were x
    assert loss.item() == pytest.approx(0.25 * (1 + 1 + 1 + 1) / 4)
    (pulled,) = torch.autograd.grad(loss, x)
    assert torch.allclose(pulled, 0.25 * 2 * torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]) / 4)  # 2 (x - code) / entries


def test_gradient_of_a_learned_codebook_by_hand():
    q = quantiser_at([[0.0, 0.0], [4.0, 0.0]], learn="loss")
    x = torch.tensor([[[1.0, 1.0], [1.0, -3.0]]], requires_grad=True)
    valid = torch.tensor([[True, False]])
    vectors, codes, loss = q(x, valid)
    assert codes.tolist() == [[0, 0]] and loss.item() == pytest.approx(1.25 * (1 + 1) / 4)
    pulled, drawn = torch.autograd.grad(loss + 0 * vectors.sum(), (x, q.codebook))
    assert torch.allclose(pulled, 0.25 * 2 * torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]) / 4)
    assert torch.allclose(drawn, -2 * torch.tensor([[1.0, 1.0], [0.0, 0.0]]) / 4)  # only towards what counts
    q.freeze()
    _, _, loss = q(x, valid)
    assert loss.item() == pytest.approx(0.25 * (1 + 1) / 4) and not q.codebook.requires_grad


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


@pytest.mark.parametrize("learn", ("ema", "loss"))
def test_codes_start_on_the_first_batch(learn):
    x = torch.randn(16, 4, 8) * 100
    q = latent.Quantiser(32, 8, learn, decay=1.0)  # the first update leaves the codes where they start
    q(x)
    distance = (q.codebook[:, None] - x.flatten(0, 1)).norm(dim=-1).min(1).values
    assert distance.max() < 1e-3 and len(torch.unique(q.codebook, dim=0)) == 32


@pytest.mark.parametrize("learn", ("ema", "loss"))
def test_dead_code_is_restarted_on_an_encoder_output(learn):
    q = quantiser_at([[0.0, 0.0], [1000.0, 0.0]], learn=learn, patience=3)
    x = torch.randn(4, 2, 2)
    for _ in range(3):
        assert q.codebook[1, 0].item() == pytest.approx(1000)
        q(x)
    assert torch.cdist(q.codebook[1:], x.flatten(0, 1)).min() < 1e-6
    assert q.unused.tolist() == [0, 0]
    assert learn == "loss" or q.counts[1] == 1 and torch.equal(q.sums[1], q.codebook[1])


def test_codes_are_placed_on_valid_vectors_by_seed_and_update():
    x = torch.randn(8, 4, 3)
    x[:, 1] = 1000.0
    valid = torch.arange(4).expand(8, 4) != 1
    placed = []
    for seed, updates in ((0, 0), (0, 0), (1, 0), (0, 5)):
        q = latent.Quantiser(6, 3, seed=seed)
        q.updates.fill_(updates)
        q._place(torch.ones(6, dtype=torch.bool), x, valid)
        assert q.codebook.abs().max() < 100
        placed.append(q.codebook)
    assert torch.equal(placed[0], placed[1])
    assert not torch.equal(placed[0], placed[2]) and not torch.equal(placed[0], placed[3])


def train_quantiser(rank, world, learn):
    """The state after each of five updates in float64, an initialisation and restarts. Rank r has the rows r::world."""
    q, states = latent.Quantiser(6, 3, learn, patience=2).double(), []
    for step in range(5):
        rows = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 5 * step
        valid = torch.arange(16).view(8, 2) % 5 > 0
        *_, loss = q(rows[rank::world], valid[rank::world])
        if learn == "loss":
            (gradient,) = torch.autograd.grad(loss, q.codebook)
            with torch.no_grad():
                q.codebook -= common.all_mean(gradient)  # as DistributedDataParallel averages
        states.append({name: tensor.clone() for name, tensor in q.state_dict().items()})
    return states


def train_on_ranks(rank, world, out, config):
    """What each of `world` processes has after training quantisers, and what it logs when it trains a whole model."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.save({learn: train_quantiser(rank, world, learn) for learn in ("ema", "loss")}, f"{out}/{world}-{rank}.pt")
    ranks = common.Ranks(rank, world, torch.device("cpu"))
    latent.train(replace(config, out=out / f"lam{world}"), ranks)
    whole, latent.PART = latent.PART, 3  # of 8 episodes: three parts
    latent.label(
        latent.Label(data=config.data[0], lam=out / "lam1", out=out / f"labels{world}", cache=config.cache), ranks
    )
    latent.PART = whole
    common.stop_ranks()


@pytest.fixture(scope="module")
def on_ranks(rlds, cache, tmp_path_factory):
    """`train_on_ranks` of one process and then of two: the folder with what they wrote."""
    out = tmp_path_factory.mktemp("ranks")
    config = latent.Lam(data=[rlds], out=out, cache=cache, delta=5, **SMALL | dict(max_steps=4, global_batch_size=16))
    train_on_ranks(0, 1, out, config)
    mp.spawn(train_on_ranks, (2, out, config), nprocs=2)
    return out


@pytest.mark.parametrize("learn", ("ema", "loss"))
def test_quantiser_on_two_processes_equals_one(learn, on_ranks):
    """Bit-equal on both, and 1e-9 from one process, through an initialisation and restarts."""
    one, first, second = (torch.load(on_ranks / f"{name}.pt")[learn] for name in ("1-0", "2-0", "2-1"))
    moved = [(a["codebook"] - b["codebook"]).norm(dim=1) for a, b in zip(one, one[1:])]
    assert max(step.max() for step in moved) > 4  # a restart
    for ours, both, other in zip(one, first, second, strict=True):
        for name in ours:
            assert torch.equal(both[name], other[name]), name
            assert torch.allclose(ours[name].double(), both[name].double(), rtol=0, atol=1e-9), name


def test_whole_model_on_two_processes_equals_one(on_ranks):
    """Losses, usage and the trained codebook; then the labels, which one model gives on one process and on two."""
    one, two = ([json.loads(line) for line in open(on_ranks / f"lam{world}" / "log.jsonl")] for world in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["usage"] == theirs["usage"]
        for name in ("loss", "reconstruction_loss", "quantisation_loss", "action_loss", "copy_error"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    tensors = [common.load_tensors(on_ranks / f"lam{world}" / "model.safetensors")[0] for world in (1, 2)]
    assert torch.allclose(*(found["codes.quantiser.codebook"] for found in tensors), atol=1e-4)
    (labels, about), (others, about_others) = (common.load_tensors(on_ranks / f"labels{world}") for world in (1, 2))
    assert about == about_others and all(torch.equal(labels[name], others[name]) for name in labels)
    assert not list(on_ranks.glob("*.parts"))


def test_code_usage_by_hand():
    used, perplexity = latent.code_usage(latent.code_counts(torch.tensor([[0, 3], [1, 3], [0, 3], [1, 3]]), 4))
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


def chunk_batch(actions, valid, masked):
    return {"actions": actions, "valid": valid, "masked": masked}


@pytest.fixture(scope="module")
def tokens():
    """A tokenizer trained on `sine_chunks`."""
    torch.manual_seed(0)
    model = latent.ActionTokenizer(8, 3, num_codes=64, dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        actions, masked = sine_chunks(64, generator), torch.rand(64, 8, generator=generator) < latent.MASKED
        loss = model(chunk_batch(actions, torch.ones(64, 8, dtype=torch.bool), masked))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_tokenizer_round_trip(tokens):
    actions = sine_chunks(256, torch.Generator().manual_seed(1))
    codes, vectors = tokens.encode(actions)
    assert codes.shape == (256, 8) and codes.dtype == torch.long and vectors.shape == (256, 8, 32)
    error = (tokens.decode(codes) - actions).square().mean() / actions.square().mean()
    assert error < 0.2
    assert len(codes.unique()) >= 48  # of 64


def test_masked_steps_do_not_influence_the_loss(tokens):
    actions, valid = sine_chunks(16, torch.Generator().manual_seed(2)), torch.arange(8).expand(16, 8) < 5
    other = torch.where(valid[..., None], actions, 9.0)
    masked = torch.rand(16, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    a, b = tokens(chunk_batch(actions, valid, masked)), tokens(chunk_batch(other, valid, masked))
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert len(a["codes"]) == 16 * 5
    assert torch.equal(tokens.encode(actions, valid)[0], tokens.encode(other, valid)[0])
    assert tokens(chunk_batch(actions, valid.fill_(True), masked))["loss"] != a["loss"]


def test_losses_of_the_tokenizer_by_hand(tokens):
    """Reconstruction + quantisation + 0.03 consistency, which encodes again what is decoded with latents zeroed."""
    actions, valid = sine_chunks(4, torch.Generator().manual_seed(4)), torch.arange(8).expand(4, 8) < 7
    masked = torch.arange(8).expand(4, 8) % 3 == 0
    found, count = tokens(chunk_batch(actions, valid, masked)), 4 * 8
    latents = tokens.vectors(actions * valid[..., None])
    codes = tokens.quantiser.nearest(latents)
    wrong = (tokens.decode(codes) - actions)[valid].square().sum() / (count * 3)
    assert found["reconstruction_loss"].item() == pytest.approx(wrong.item(), rel=1e-4)
    away = (latents - tokens.quantiser.codebook[codes])[valid].square().sum() / (count * 32)
    assert found["quantisation_loss"].item() == pytest.approx(0.25 * away.item(), rel=1e-4)
    hidden = torch.where(masked[..., None], 0.0, latents)
    guess = tokens.decoder(tokens.quantiser.straight_through(hidden, tokens.quantiser.nearest(hidden)))
    again = tokens.vectors(guess * valid[..., None])
    apart = (again - latents.detach())[valid & masked].square().sum() / (count * 32)
    assert found["consistency_loss"].item() == pytest.approx(apart.item(), rel=1e-4)
    ours, theirs = (torch.autograd.grad(x, tokens.project.weight, retain_graph=True)[0]
                    for x in (found["consistency_loss"], apart))  # fmt: skip
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    parts = found["reconstruction_loss"] + found["quantisation_loss"] + 0.03 * found["consistency_loss"]
    assert found["loss"].item() == pytest.approx(parts.item())
    assert [conv.dilation for conv in tokens.convs] == [(1,), (2,), (4,)]


def test_latents_start_as_a_linear_map_of_their_own_action():
    torch.manual_seed(0)
    model = latent.ActionTokenizer(8, 3, num_codes=8, dim=16)
    a, b = sine_chunks(2, torch.Generator().manual_seed(0))[:, None]
    other = a.clone()
    other[:, 3:] = b[:, 3:]
    assert torch.allclose(model.vectors(a)[:, :3], model.vectors(other)[:, :3], atol=1e-6)
    assert torch.allclose(model.vectors(a) + model.vectors(b), 2 * model.vectors((a + b) / 2), atol=1e-5)


def test_consistency_reaches_the_encoder_at_masked_steps_only(tokens):
    actions, valid = sine_chunks(4, torch.Generator().manual_seed(4)), torch.ones(4, 8, dtype=torch.bool)
    assert tokens(chunk_batch(actions, valid, ~valid))["consistency_loss"] == 0
    loss = tokens(chunk_batch(actions, valid, valid))["consistency_loss"]
    assert torch.autograd.grad(loss, tokens.project.weight)[0].abs().sum() > 0


class PublishedQuantiser(latent.Quantiser):
    """The recipe of the paper's published code: counts from zero, sums from noise, no data, no restart."""

    def __init__(self, num_codes, dim):
        super().__init__(num_codes, dim, patience=10**9)
        noise = torch.randn(num_codes, dim)
        self.codebook.copy_(noise), self.sums.copy_(noise), self.updates.fill_(1), self.counts.fill_(1e-5)


def test_published_recipe_collapses_and_ours_does_not(index):
    """The action tokenizer on the same data, order and weights: few codes there, most of them here."""
    chunks, used = latent.MaskedChunks([index], [data.statistics(index)], 8), []
    batches = [default_collate([chunks[32 * step + row] for row in range(32)]) for step in range(40)]
    for published in (True, False):
        torch.manual_seed(0)
        model = latent.ActionTokenizer(8, 7, num_codes=64, dim=32, patience=5)
        if published:
            model.quantiser = PublishedQuantiser(64, 32)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for batch in batches * 3:
            optimizer.zero_grad()
            model(batch)["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            used.append(len(torch.cat([model(batch)["codes"] for batch in batches]).unique()))
    assert used[0] <= 4 and used[1] >= 32, used


def test_kmeans_finds_clusters_and_leaves_no_mean_where_nothing_is():
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    x = torch.cat([centre + torch.randn(size, 2) for centre, size in zip(centres, (900, 50, 20, 100))])
    means = latent.kmeans(x, 4, seed=1)
    assert torch.cdist(centres, means).amin(1).max() < 1.5  # also the one with 20 points of 1070
    assert torch.equal(latent.kmeans(x, 4, seed=1), means)
    few = torch.tensor([[0.0], [1.0]]).repeat(5, 1)
    assert sorted(latent.kmeans(few, 4).unique().tolist()) == [0.0, 1.0]


def test_tokenizer_is_compared_with_kmeans(index):
    """Printed: codes in use, its error over the valid steps, and the error of as many means."""
    samples = latent.MaskedChunks([index], [data.statistics(index)], 8)
    torch.manual_seed(0)
    model = latent.ActionTokenizer(8, 7, num_codes=16, dim=16).eval()
    model.quantiser.start_at(torch.randn(16, 16))
    line = latent.beside_kmeans(model, {"training": samples, "held-out episodes": samples}).splitlines()[1]
    pattern = r"On held-out episodes: (\d+) of 16 .* error ([0-9.]+), ([0-9.]+) times k-means' ([0-9.]+)"
    used, error, ratio, floor = map(float, re.match(pattern, line).groups())
    items, found = [samples.sample(0, step) for step in range(len(index))], []
    wrong = []
    for item in items:
        codes, _ = model.encode(item["actions"][None], item["valid"][None])
        found.append(codes[0][item["valid"]])
        wrong.append((model.decode(codes)[0] - item["actions"])[item["valid"]])
    assert used == len(torch.cat(found).unique())
    assert error == pytest.approx(torch.cat(wrong).square().mean().item(), abs=2e-5)
    assert ratio == pytest.approx(error / floor, rel=0.01)
    actions = torch.cat([i["actions"][i["valid"]] for i in items])
    assert 0 < floor < 0.5 * (actions - actions.mean(0)).square().mean()  # 16 means, better than one


@torch.no_grad()
def test_refitting_puts_the_codebook_on_means_of_the_latents(tokens):
    """Of what is valid: each code lies among the latents, and rounding to codes costs less than before."""
    actions, valid = sine_chunks(64, torch.Generator().manual_seed(5)), torch.arange(8).expand(64, 8) < 6

    class Samples(torch.utils.data.Dataset):
        epoch_length = 64

        def __getitem__(self, row):
            return {"actions": actions[row], "valid": valid[row]}

    model = copy.deepcopy(tokens)
    model.quantiser.start_at(0.1 * torch.randn(64, 32))
    latents = model.encode(actions, valid)[1][valid]
    before = torch.cdist(latents, model.quantiser.codebook).amin(1).square().mean()
    model.refit(Samples())
    distance = torch.cdist(latents, model.quantiser.codebook)
    assert distance.amin(1).square().mean() < 0.2 * before
    assert torch.allclose(model.quantiser.codebook, latent.kmeans(latents, 64), atol=1e-4)
    assert torch.equal(model.quantiser.sums, model.quantiser.codebook) and (model.quantiser.counts == 1).all()


# ----------------------------------------------------------------------------------------------------------------------
# Frame features and text


def test_pixel_patches_are_pixels_in_reading_order():
    image = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    features = latent.PixelPatches(12, 4)
    patches = features(torch.from_numpy(features.read(image).copy())[None])
    assert patches.shape == (1, features.patches, features.size) == (1, 9, 48)
    assert np.allclose(patches[0, 5].view(4, 4, 3), image[4:8, 8:12] / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="image_size is 12"):
        latent.PixelPatches(12, 5)


@torch.no_grad()
def test_dino_patches_are_its_last_states_without_class_and_registers(dino, tmp_path):
    features = latent.DinoPatches(21, dino)
    image = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    frame = features.read(image)
    found = features(torch.from_numpy(frame.copy())[None])
    assert found.shape == (1, features.patches, features.size) == (1, 9, 24)
    pixels = (frame / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    states = Dinov2WithRegistersModel.from_pretrained(dino)(torch.tensor(pixels).permute(2, 0, 1)[None].float())[0]
    assert states.shape[1] == 1 + 4 + 9 and torch.allclose(found[0], states[0, 5:], atol=1e-5)
    with pytest.raises(ValueError, match="image_size is 24.*multiple of 7"):
        latent.DinoPatches(24, dino)
    T5Config(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 't5'; it must be"):
        latent.DinoPatches(21, tmp_path)


@torch.no_grad()
def test_t5_states_are_those_of_a_padded_batch(t5):
    texts = ["put the bowl on the plate", "put the bowl", "", "put the bowl"]
    found = latent.text_states(t5, texts)
    assert {text: tuple(states.shape) for text, states in found.items()} == {
        texts[0]: (7, 16),
        texts[1]: (4, 16),
        "": (1, 16),
    }
    batch = AutoTokenizer.from_pretrained(t5)(texts, padding=True, return_tensors="pt")
    states = T5EncoderModel.from_pretrained(t5)(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    for row, real, text in zip(states, batch["attention_mask"].bool(), texts, strict=True):
        assert torch.allclose(row[real], found[text], atol=1e-5)


def test_words_have_fixed_vectors():
    found = latent.text_states("words", ["put the bowl", "Bowl", ""])
    assert found["put the bowl"].shape == (3, 64) and found[""].shape == (0, 64)
    assert torch.equal(found["put the bowl"][2], found["Bowl"][0])
    assert found["put the bowl"][0].norm() > 4 and torch.cosine_similarity(*found["put the bowl"][:2], 0) < 0.6
    padded, known = latent.pad_text(found["put the bowl"], 5)
    assert padded.shape == (5, 64) and known.tolist() == [True] * 3 + [False] * 2


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


def lam_batch(frames, way):
    """What `LatentActionModel` takes: the action of each pair is its move, known for a quarter of them."""
    actions = (MOVES[way] / 6).float()[:, None]  # [B, 1, 2]
    valid, weight = torch.ones(len(way), 1, dtype=torch.bool), 4.0 * (torch.arange(len(way)) % 4 == 0)
    return {"frames": frames, "actions": actions, "valid": valid, "weight": weight}


SIZES = dict(image_size=24, patch_size=6, width=32, code_dim=8, delta=3)


@pytest.fixture(scope="module")
def lam():
    """A model trained on `moving_squares`."""
    torch.manual_seed(0)
    model = latent.LatentActionModel(latent.LamSizes(**SIZES), head_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        loss = model(lam_batch(*moving_squares(32, generator)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_lam_round_trip(lam):
    frames, way = moving_squares(128, torch.Generator().manual_seed(1))
    result = lam(lam_batch(frames, way))
    assert result["reconstruction_loss"] < 0.6 * result["copy_error"]
    a, b = lam.features(frames[:, 0]), lam.features(frames[:, 1])
    codes, vectors = lam.encode(a, b)
    assert codes.shape == (128, 4) and vectors.shape == (128, 4, 8)
    assert torch.equal(codes, result["codes"]) and len(codes.unique()) >= 8
    swapped = lam.predict(a, [lam.codes.quantiser.codebook[codes.roll(1, 0)]])
    assert (swapped - b).square().mean() > 1.5 * result["reconstruction_loss"]  # the decoder listens to the codes
    majority = torch.stack([codes[way == w].mode(0).values for w in range(4)])
    assert len(torch.unique(majority, dim=0)) == 4  # different moves, different codes


def test_unlabelled_samples_do_not_reach_the_action_head(lam):
    batch = lam_batch(*moving_squares(8, torch.Generator().manual_seed(2)))
    unlabelled = (batch["weight"] == 0)[:, None, None]
    losses = [
        lam(batch | {"actions": actions})["action_loss"]
        for actions in (batch["actions"], torch.where(unlabelled, 7.0, batch["actions"]), batch["actions"] + 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def random_pairs(batch=6):
    return torch.randint(0, 255, (batch, 2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def one_step(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(batch)["loss"].backward()
    optimizer.step()
    return model.eval()


@torch.no_grad()
def test_first_stage_reads_the_text_but_not_its_padding():
    torch.manual_seed(0)
    sizes = latent.LamSizes(**SIZES, stage=1, predict_change=False, centre=False)
    model = latent.LatentActionModel(sizes, text_size=5).eval()
    model.codes.quantiser.start_at(torch.randn(16, 8))
    (a, b), text = (model.features(frames) for frames in random_pairs().unbind(1)), torch.randn(6, 3, 5)
    known = torch.tensor([True, True, False]).expand(6, -1)
    changed = torch.stack([text[:, 0], text[:, 1] + 1, text[:, 2]], 1), torch.cat([text[:, :2], text[:, 2:] + 1], 1)
    c, other, padded = (model.vectors(a, b, words, known)[0] for words in (text, *changed))
    assert torch.equal(c, padded) and (c - other).abs().max() > 1e-3
    quantised = [torch.randn(6, 4, 8)]
    seen, other, padded = (model.predict(a, quantised, words, known) for words in (text, *changed))
    assert torch.equal(seen, padded) and (seen - other).abs().max() > 1e-3
    shorter = model.predict(a, quantised, text[:, :2], known[:, :2])
    assert torch.allclose(seen, shorter, atol=1e-5)


@pytest.mark.parametrize("learn", ("ema", "loss"))
def test_second_stage_keeps_the_first_codebook_and_learns_its_own(learn, tmp_path):
    torch.manual_seed(0)
    first = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=1, codebook=learn), text_size=5)
    text = {"text": torch.randn(6, 3, 5), "known": torch.ones(6, 3, dtype=torch.bool)}
    one_step(first, {"frames": random_pairs()} | text)
    write_model(tmp_path, first)
    second = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=2, codebook=learn), head_size=2)
    latent.initialise(second, tmp_path)
    old = first.state_dict()
    for name, tensor in second.state_dict().items():
        source = name.replace("irrelevant.", "codes.")
        if not name.startswith(("codes.", "action_head.")):
            assert torch.equal(tensor, old[source]), name
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    batch = lam_batch(random_pairs(), torch.zeros(6, dtype=torch.long))
    for _ in range(3):
        one_step(second, batch)
    after = second.state_dict()
    assert torch.equal(after["irrelevant.quantiser.codebook"], before["irrelevant.quantiser.codebook"])
    for name in ("codes.quantiser.codebook", "irrelevant.queries", "irrelevant.project.weight", "irrelevant.up.weight"):
        assert not torch.equal(after[name], before[name]), name
    with torch.no_grad():
        a, b = (second.features(frames) for frames in random_pairs().unbind(1))
        assert torch.equal(second.encode(a, b)[0], second(batch)["codes"])  # the exported codes are the task-centric


def test_losses_of_both_sets_and_the_action_head():
    """Loss = reconstruction + quantisation of both sets + 0.5 action, whose head reads the exported codes alone."""
    torch.manual_seed(0)
    model = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=2), head_size=2)
    for part in model.sets:
        part.quantiser.start_at(torch.randn(16, 8))
    found = model(lam_batch(random_pairs(), torch.zeros(6, dtype=torch.long)))
    parts = found["reconstruction_loss"] + found["quantisation_loss"] + 0.5 * found["action_loss"]
    assert found["loss"].item() == pytest.approx(parts.item())
    projections = [part.project.weight for part in model.sets]
    for name, reached in (("quantisation_loss", [True, True]), ("action_loss", [True, False])):
        gradients = torch.autograd.grad(found[name], projections, retain_graph=True, allow_unused=True)
        assert [g is not None and g.abs().sum().item() > 0 for g in gradients] == reached, name


def test_answers_count_by_direction_and_centre_follows_them():
    torch.manual_seed(0)
    part = latent.CodeSet(latent.LamSizes(**SIZES), 108, 0)
    answers = torch.randn(16, 4, 32) + 3
    assert torch.allclose(part.eval().vectors(answers), part.vectors(7 * answers), atol=1e-4)
    for _ in range(300):
        part.train().vectors(answers)
    part.quantiser.updates.fill_(300)
    assert part.eval().vectors(answers).mean(0).abs().max() < 1e-3


def test_codebooks_and_queries_do_not_decay():
    model = latent.LatentActionModel(latent.LamSizes(**SIZES, codebook="loss"))
    decayed, plain = (group["params"] for group in common.parameter_groups(model, 0.1))
    assert any(p is model.codes.quantiser.codebook for p in plain) and any(p is model.codes.queries for p in plain)
    assert any(p is model.patch_up.weight for p in decayed)


# ----------------------------------------------------------------------------------------------------------------------
# Models and labels on disk


def write_model(folder, model, kind="lam"):
    """A folder as `latent.py` leaves it, as far as loading reads it."""
    folder.mkdir(exist_ok=True)
    common.save_tensors(folder / "model.safetensors", latent.model_tensors(model))
    common.write_json(folder / "config.json", {"kind": kind, "model": model.config})
    return folder


@pytest.fixture
def two(tmp_path):
    """The index of two episodes, of 10 and 7 steps, of JPEGs in one file."""
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


def test_saved_models_encode_bit_identically(lam, tokens, dino, tmp_path):
    """Pixels, a DINOv2 whose folder is gone, and the action tokenizer."""
    torch.manual_seed(0)
    shutil.copytree(dino, tmp_path / "dino")
    sizes = latent.LamSizes(**SIZES | dict(image_size=28), features=str(tmp_path / "dino"))
    seeing = one_step(latent.LatentActionModel(sizes), {"frames": torch.randint(0, 255, (4, 2, 28, 28, 3)).byte()})
    shutil.rmtree(tmp_path / "dino")
    for model, side in ((lam, 24), (seeing, 28)):
        frames = torch.randint(0, 255, (8, 2, side, side, 3), dtype=torch.uint8)
        again = latent.load_lam(write_model(tmp_path / "lam", model))
        assert again.sizes == model.sizes and again.action_head is None
        with torch.no_grad():
            for before, after in zip(
                *(m.encode(*map(m.features, frames.unbind(1))) for m in (model, again)), strict=True
            ):
                assert torch.equal(before, after)
    again = latent.load_tokenizer(write_model(tmp_path / "tokenizer", tokens, "tokenizer"))
    actions = sine_chunks(8, torch.Generator().manual_seed(4))
    assert torch.equal(tokens.encode(actions)[0], again.encode(actions)[0])
    assert torch.equal(tokens.decode(again.encode(actions)[0]), again.decode(again.encode(actions)[0]))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_fingerprint_follows_the_weights(lam, tmp_path):
    first = latent.fingerprint(write_model(tmp_path, lam))
    assert latent.fingerprint(write_model(tmp_path, lam)) == first
    with torch.no_grad():
        lam.codes.queries[0, 0] += 1
        write_model(tmp_path, lam)
        lam.codes.queries[0, 0] -= 1
    assert latent.fingerprint(tmp_path) != first


def test_folders_that_hold_no_such_model_are_refused(lam, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json.*latent.py tokenizer"):
        latent.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds a 'lam' where a 'tokenizer' is needed"):
        latent.load_tokenizer(write_model(tmp_path, lam))


def test_models_of_another_architecture_are_refused(lam, tmp_path):
    folder = write_model(tmp_path, lam)
    for change, match in (
        (dict(heads=8), "heads is 8, but there 4"),
        (dict(centre=False, predict_change=False), "predict_change is False, but there True, centre is False"),
        (dict(stage=1), "stage is 1, but there 0"),
        (dict(camera="front", image_size=48), "camera is front, but there image, image_size is 48, but there 24"),
        (dict(stage=2), "stage is 2, but there 0"),
        (dict(width=64), r"does not fit.*codes.project.weight is \(8, 32\), the model's is \(8, 64\)"),
        (dict(codebook="loss"), "unknown codes.quantiser.counts"),
    ):
        model = latent.LatentActionModel(latent.LamSizes(**SIZES | change), text_size=5)
        with pytest.raises(ValueError, match=match):
            latent.initialise(model, folder)
    tensors, _ = common.load_tensors(folder / "model.safetensors")
    del tensors["out.weight"]
    common.save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="does not fit this model: missing out.weight"):
        latent.load_lam(folder)


def labels_of(index, model, batch_size):
    return [torch.cat(part) for part in zip(*latent.label_episodes(index, model, range(2), batch_size), strict=True)]


def test_labels_do_not_depend_on_the_batch_size(lam, two):
    (codes, vectors), (codes_3, vectors_3) = (labels_of(two, lam, batch_size) for batch_size in (64, 3))
    assert torch.equal(codes, codes_3) and torch.allclose(vectors, vectors_3, atol=1e-2)
    for step, later in ((0, 3), (6, 9), (8, 9), (9, 9), (10, 13), (16, 16)):  # never across the end of an episode
        a, b = (lam.features(torch.from_numpy(two.image("image", s).copy())[None]) for s in (step, later))
        expected, _ = lam.encode(a, b)
        assert torch.equal(codes[step].long(), expected[0]), step


def test_first_stage_labels_with_the_instruction_of_each_episode(two):
    torch.manual_seed(0)
    model = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=1, centre=False), text_size=64).eval()
    model.codes.quantiser.start_at(torch.randn(16, 8))
    texts = latent.text_states("words", two.instructions)
    _, (found, _) = zip(*latent.label_episodes(two, model, [0, 1], texts=texts), strict=True)
    frames = torch.from_numpy(np.stack([two.image("image", step) for step in (10, 13)]))
    known = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        expected, other = (model.vectors(*model.features(frames)[:, None], texts[t][None], known)[0] for t in "ba")
    _, vectors = list(latent.label_episodes(two, model, [1], texts=texts))[0]
    assert torch.allclose(vectors[0].float(), expected[0], atol=1e-2) and not torch.allclose(expected, other, atol=1e-2)


def test_frame_pairs(two, lam):
    pairs = latent.FramePairs([two], [data.statistics(two)], lam, chunk=2, action_size=2, action_fraction=0.5)
    for step, later in ((0, 3), (7, 9), (9, 9), (10, 13), (15, 16)):
        for frame, shown in zip(pairs.sample(0, step)["frames"], (step, later), strict=True):
            assert np.array_equal(frame, two.image("image", shown)), step
    whole, own = pairs.sample(0, 3)["actions"], data.statistics(two)["action"]
    assert np.allclose(whole, data.normalise(data.standardise(two.columns["action"][3:5]), own))
    weights = [pairs.sample(0, step)["weight"].item() for step in range(17)]
    assert set(weights) == {0.0, 2.0}
    assert pairs.sample(0, 9)["valid"].tolist() == [True, False]
    texts = latent.text_states("words", ["a", "b c"])
    sample = latent.FramePairs([replace(two, instructions=["a", "b c"])], [None], lam, texts).sample(0, 3)
    assert sample["known"].tolist() == [True, False] and torch.equal(sample["text"][0], texts["a"][0])
    assert sample.keys() == {"frames", "text", "known"}


def test_videos_that_cannot_be_learned_from_are_refused(two, lam):
    with pytest.raises(ValueError, match="camera is 'image', but two has .*front"):
        latent.check_video(lam.sizes, replace(two, images={"front": two.images["image"]}))
    for delta, fits in ((9, True), (10, False)):
        if fits:
            latent.check_video(replace(lam.sizes, delta=delta), two)
        else:
            with pytest.raises(ValueError, match="delta is 10, but the longest episode of two has 10 frames"):
                latent.check_video(replace(lam.sizes, delta=delta), two)


def test_an_episode_of_one_frame_is_paired_with_itself(two, lam):
    """Beside longer ones it trains and gets labels: those of no change."""
    index = replace(two, starts=np.array([0, 16, 17]))
    pairs = latent.FramePairs([index], [data.statistics(index)], lam, chunk=2, action_size=2)
    first, second = pairs.sample(0, 16)["frames"]
    assert torch.equal(first, second)
    _, (codes, _) = latent.label_episodes(index, lam, range(2))
    a = lam.features(first[None])
    assert torch.equal(codes.long(), lam.encode(a, a)[0])


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def lam_config(out, rlds, cache, **changes):
    return latent.Lam(data=[rlds], out=out, cache=cache, **SMALL | dict(delta=5) | changes)


def test_video_without_actions_or_instructions_trains_both_stages(video, cache, t5, dino, tmp_path, capsys):
    """Stage 1 with T5 and DINOv2, stage 2 from it, labels: each command's last line names the next command."""
    seen = dict(features=str(dino), text=str(t5), image_size=14, action_fraction=0.5, max_steps=1)
    latent.train(lam_config(tmp_path / "one", video, cache, stage=1, **seen), ONE)
    assert f"--stage 2 --init-from {tmp_path / 'one'}" in capsys.readouterr().out
    latent.train(lam_config(tmp_path / "two", video, cache, stage=2, init_from=tmp_path / "one", **seen), ONE)
    assert "latent.py label" in capsys.readouterr().out
    (entry,) = [json.loads(line) for line in open(tmp_path / "two" / "log.jsonl")]
    assert "action_loss" not in entry and entry["loss"] > 0 and len(entry["usage"]) == len(entry["perplexity"]) == 4
    for folder in ("one", "two"):
        latent.label(latent.Label(data=video, lam=tmp_path / folder, out=tmp_path / f"{folder}.st", cache=cache), ONE)
        labels = data.load_labels(data.open_index(video, cache), tmp_path / f"{folder}.st", delta=5)
        assert labels.fingerprint == latent.fingerprint(tmp_path / folder) and labels.vectors.shape[1:] == (4, 8)


def test_resumed_training_ends_bit_identically(rlds, cache, tmp_path, monkeypatch):
    """Stopped after a save and continued, or not: the same weights, codebook counts included, and the same log."""
    whole = lam_config(tmp_path / "whole", rlds, cache, max_steps=4)
    latent.train(whole, ONE)
    part = replace(whole, out=tmp_path / "part", save_every=2, resume=True)
    save = common.save_training

    def save_and_stop(*given):
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(common, "save_training", save_and_stop)
        latent.train(part, ONE)
    latent.train(part, ONE)
    assert [json.loads(line)["step"] for line in open(part.out / "log.jsonl")] == [0, 1, 2, 3]
    ours, theirs = (common.load_tensors(folder / "model.safetensors")[0] for folder in (whole.out, part.out))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    untouched = replace(whole, out=tmp_path / "again", init_from=whole.out, max_steps=0)
    latent.train(untouched, ONE)  # as a checkpoint of UniVLA is made a folder for `label`
    again, _ = common.load_tensors(untouched.out / "model.safetensors")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    with pytest.raises(
        ValueError, match=r"seed are \(0.25, 1\), but .*whole was trained on the same data with \(0.25, 0\)"
    ):
        latent.train(replace(untouched, out=tmp_path / "other", seed=1), ONE)
    with pytest.raises(ValueError, match="trained with other settings: learning_rate 0.001 .now 0.1."):
        latent.train(replace(part, learning_rate=0.1), ONE)


@pytest.mark.parametrize("settings", (latent.Lam, latent.Tokenizer))
def test_sigterm_saves_and_the_rest_is_the_same(settings, rlds, cache, tmp_path, monkeypatch, capsys):
    """Stopped by a scheduler after two steps, its newest save then damaged: the weights and log of a whole training."""
    small = SMALL | {"delta": 5} if settings is latent.Lam else dict(global_batch_size=8, num_codes=16, code_dim=16)
    whole = settings(data=[rlds], out=tmp_path / "whole", cache=cache, **small | {"max_steps": 5, "save_every": 1})
    latent.train(whole, ONE)
    part, tick = replace(whole, out=tmp_path / "part", resume=True), common.Meter.tick
    with monkeypatch.context() as patched:
        ask = lambda meter: len(meter.times) == 2 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patched.setattr(common.Meter, "tick", lambda meter, *given: (ask(meter), tick(meter, *given))[1])
        latent.train(part, ONE)
    assert "SIGTERM: saved. Go on: the same command with --resume" in capsys.readouterr().out
    newest, before = common.checkpoints(part.out).values()
    newest.write_bytes(newest.read_bytes()[:-1])
    latent.train(part, ONE)
    assert f"{newest} is damaged" in capsys.readouterr().err
    ours, theirs = (common.load_tensors(folder / "model.safetensors")[0] for folder in (whole.out, part.out))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [[json.loads(line) for line in open(config.out / "log.jsonl")] for config in (whole, part)]
    for a, b in zip(*logs, strict=True):
        assert a | {"samples_per_s": 0} == b | {"samples_per_s": 0} and a["grad_norm"] > 0


@pytest.mark.parametrize("settings", (latent.Lam, latent.Tokenizer))
def test_loss_that_is_not_finite_ends_the_training(settings, rlds, cache, tmp_path):
    """Without a save, naming the step and its samples."""
    small = SMALL | {"delta": 5} if settings is latent.Lam else dict(global_batch_size=8, num_codes=16, code_dim=16)
    small |= {"max_steps": 30, "learning_rate": 1e36}
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*tfrecord-\S+: step \d+ of episode \d+; /"):
        latent.train(settings(data=[rlds], out=tmp_path / "out", cache=cache, **small), ONE)
    assert not common.checkpoints(tmp_path / "out")


@pytest.mark.parametrize("settings", (latent.Lam, latent.Tokenizer))
def test_held_out_episodes_are_measured_and_not_trained_on(settings, rlds, cache, index, tmp_path, monkeypatch, capsys):
    """And late in its training the tokenizer's codebook is refitted once, to what it trains on."""
    seen, fit, measure, refit = {}, latent.fit, latent.measure, latent.ActionTokenizer.refit
    monkeypatch.setattr(latent, "fit", lambda *given: (seen.update(fit=given[1]), fit(*given)))
    monkeypatch.setattr(latent, "measure", lambda *given: seen.update(measure=given[1]) or measure(*given))
    monkeypatch.setattr(latent.ActionTokenizer, "refit", lambda *given: seen.update(refit=given[1]) or refit(*given))
    small = SMALL if settings is latent.Lam else dict(max_steps=2, global_batch_size=8, num_codes=16, code_dim=16)
    sizes = small | dict(val_fraction=0.25, seed=2) | ({"delta": 5} if settings is latent.Lam else {})
    latent.train(settings(data=[rlds], out=tmp_path / "out", cache=cache, **sizes), ONE)
    kept, held = data.split_episodes(index, 0.25, 2)
    assert seen["fit"].steps[0].tolist() == data.steps_of(index, kept).tolist()
    assert seen["measure"].steps[0].tolist() == data.steps_of(index, held).tolist()
    assert seen.get("refit") is (seen["fit"] if settings is latent.Tokenizer else None)
    assert "On held-out episodes" in capsys.readouterr().out
    latent.train(settings(data=[rlds], out=tmp_path / "all", cache=cache, **sizes | {"val_fraction": 0.0}), ONE)
    text = capsys.readouterr().out
    assert "On training episodes" in text and "held-out" not in text


def test_second_stage_is_announced_with_the_flags_that_it_needs(tmp_path):
    config = lam_config(tmp_path / "one", tmp_path / "data", tmp_path, stage=1, centre=False, text="t5")
    words = latent.next_command(config, "lam").split()
    assert words[:6] == ["latent.py", "lam", "--stage", "2", "--init-from", str(tmp_path / "one")]
    again = tyro.cli(latent.Lam, args=words[2:])
    for name in ("image_size", "width", "num_blocks", "code_dim", "delta", "centre", "data"):
        assert getattr(again, name) == getattr(config, name), name


def test_resuming_from_a_changed_first_stage_is_refused(rlds, cache, tmp_path):
    for seed, out in ((0, "one"), (0, "again")):
        latent.train(
            lam_config(tmp_path / out, rlds, cache, stage=1, learning_rate=1e-3 + 1e-3 * (out == "again")), ONE
        )
    second = lam_config(tmp_path / "two", rlds, cache, stage=2, init_from=tmp_path / "one", resume=True)
    latent.train(second, ONE)
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "again").rename(tmp_path / "one")
    with pytest.raises(ValueError, match="contents of the targets"):
        latent.train(second, ONE)


def test_a_stopped_labelling_goes_on(rlds, cache, index, on_ranks, tmp_path):
    """Parts of the same model, data and delta are kept; others are made again."""
    lam, out = on_ranks / "lam1", tmp_path / "labels"
    info = common.load_tensors(on_ranks / "labels1")[1]
    count = len(index)
    marked = {"codes": torch.full((count, 4), 7, dtype=torch.uint8), "vectors": torch.zeros(count, 4, 8).half()}
    (tmp_path / "labels.parts").mkdir()
    for about, kept in ((info | {"lam": "another"}, False), (info, True)):
        common.save_tensors(tmp_path / "labels.parts" / "0.safetensors", marked, **about)
        latent.label(latent.Label(data=rlds, lam=lam, out=out, cache=cache), ONE)
        codes = common.load_tensors(out)[0]["codes"]
        assert bool((codes == 7).all()) == kept and not (tmp_path / "labels.parts").exists()
        out.unlink()
        (tmp_path / "labels.parts").mkdir()


def test_bad_settings_are_refused_before_anything_is_written(rlds, cache, two, tmp_path):
    def refused(match, kind=ValueError, **changes):
        with pytest.raises(kind, match=match):
            latent.train(lam_config(tmp_path / "out", rlds, cache, **changes), ONE)

    refused("stage is 2 but init_from is not given", stage=2)
    refused("delta is 99, but the longest episode of made has", delta=99)
    refused("num_codes is 257", num_codes=257)
    refused("code_dim is 0; it must be at least 1", code_dim=0)
    refused("patch_size is 0", patch_size=0)
    refused("width is 20; it must be a multiple of 2 x heads, 8", width=20)
    refused("max_steps is 0; it must be at least 1", max_steps=0)
    refused("action_fraction is 2", action_fraction=2.0)
    refused("init_from .*nothing does not exist", FileNotFoundError, init_from=tmp_path / "nothing", stage=2)
    assert not (tmp_path / "out").exists()
    columns = two.columns | {"action": two.columns["action"].copy()}
    columns["action"][12, 1] = np.nan
    with pytest.raises(ValueError, match="action of two is nan at step 2 of episode 1, dimension 1"):
        data.statistics(replace(two, columns=columns))
    with pytest.raises(ValueError, match=r"two data sets of one name, \['made', 'made'\]"):
        latent.train(replace(lam_config(tmp_path / "out", rlds, cache), data=[rlds, rlds]), ONE)
    with pytest.raises(ValueError, match="code_dim is 30; it must be a multiple of the 4 heads"):
        latent.train(latent.Tokenizer(data=[rlds], out=tmp_path / "out", cache=cache, code_dim=30), ONE)


def test_labels_are_found_beside_the_index_and_refuse_other_data(tmp_path, rlds, cache, on_ranks, capsys):
    """Without --out they lie where training looks; a second labelling, other data or another delta is refused."""
    command = latent.Label(data=rlds, lam=on_ranks / "lam1", cache=tmp_path / "cache")
    latent.label(command, ONE)
    assert "codes in use" in (text := capsys.readouterr().out) and "train.py --variant la_align" in text
    index = data.open_index(rlds, tmp_path / "cache")
    path = data.label_path(index, rlds)
    labels = data.load_labels(index, path, delta=5)
    assert (labels.num_codes, labels.fingerprint) == (16, latent.fingerprint(on_ranks / "lam1"))
    with pytest.raises(ValueError, match="labels the data set with fingerprint"):
        data.load_labels(replace(index, fingerprint="other"), path)
    with pytest.raises(ValueError, match="made with delta 5"):
        data.load_labels(index, path, delta=8)
    with pytest.raises(FileExistsError, match="exists. Delete it"):
        latent.label(command, ONE)


def test_trained_folders_hold_what_they_promise(rlds, cache, on_ranks, tokenizer):
    """Loadable models, the statistics of their data, one log line per step; a folder is never written to twice."""
    assert latent.load_tokenizer(tokenizer).config["chunk"] == 8
    for folder in (tokenizer, on_ranks / "lam1"):
        assert "q99" in (folder / "dataset_statistics.json").read_text()
    lines = [json.loads(line) for line in (on_ranks / "lam1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"usage", "perplexity", "lr", "samples_per_s", "reconstruction_loss"} <= lines[0].keys()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        latent.train(lam_config(on_ranks / "lam1", rlds, cache), ONE)


def test_shipped_labels_and_tokenizer_are_alive(tmp_path):
    """The embedded data's: at least 12 of 16 codes at each position; half of the tokenizer's, near k-means."""
    with safe_open(DATA / "labels.safetensors", "numpy") as file:
        codes = file.get_tensor("codes")
    assert min(len(np.unique(codes[:, position])) for position in range(4)) >= 12
    index = data.open_index(DATA, tmp_path)
    samples = latent.MaskedChunks(
        [index], [data.statistics(index)], 8, episodes=[data.split_episodes(index, 0.1, 0)[0]]
    )
    line = latent.beside_kmeans(latent.load_tokenizer(DATA / "tokenizer"), {"training": samples})
    used, ratio = re.match(
        r"On training: (\d+) of 256 codes in use, squared error [0-9.]+, ([0-9.]+) times", line
    ).groups()
    assert int(used) >= 128 and float(ratio) <= 1.3


@pytest.mark.parametrize("settings", (latent.Lam, latent.Tokenizer, latent.Label))
def test_every_setting_is_read(settings):
    """No field of a command is there for nothing: each is read as `config.<field>` or `sizes.<field>`."""
    nodes = [node for node in ast.walk(ast.parse(open(latent.__file__).read())) if isinstance(node, ast.Attribute)]
    owner = lambda node: getattr(node.value, "id", getattr(node.value, "attr", ""))  # noqa: E731
    read = {node.attr for node in nodes if owner(node) in ("config", "sizes")}
    assert {field.name for field in fields(settings)} <= read
