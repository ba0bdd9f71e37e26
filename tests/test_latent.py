"""latent.py and label.py: both models against examples worked by hand and trained for seconds, saved models, labels."""

import copy
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from torch.utils.data import default_collate

import common
import files
import label
import latent
import quantiser
import train_latent
from batches import Source
from data import open_dataset
from index import split_episodes

ONE = common.Ranks(0, 1, torch.device("cpu"))
DATA = ROOT / "data" / "libero_tiny"


@pytest.fixture(autouse=True)
def seed():
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


def train_model(model, batches, lr):
    """Train a model on `batches`, one update each, and return it in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for batch in batches:
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Action tokenizer


def test_attention_in_parts(monkeypatch):
    """A batch that is larger than what CUDA's attention takes is the same in parts."""
    attention = latent.Attention(16, 2)
    x = torch.randn(7, 3, 5, 16)
    whole = attention(x, causal=True)
    monkeypatch.setattr(latent, "MOST_ROWS", 4)
    assert torch.equal(attention(x, causal=True), whole)


def test_fourier_features_equal_numpy():
    """The actions, then both parts of numpy's FFT over time."""
    actions = np.random.default_rng(0).normal(size=(3, 8, 7))
    spectrum = np.fft.fft(actions, axis=1)
    expected = np.concatenate([actions, spectrum.real, spectrum.imag], -1)
    assert np.allclose(latent.fourier_features(torch.from_numpy(actions)), expected, atol=1e-12)


def sine_chunks(batch_size, generator):
    """Return chunks [batch_size, 8, 3] of sines with random phase, amplitude and frequency."""
    phase, amplitude, frequency = torch.rand(3, batch_size, 1, 3, generator=generator)
    return amplitude * torch.sin(6 * phase + (0.2 + frequency) * torch.arange(8)[:, None])


def chunk_batch(actions, valid, masked):
    """Return a batch of `MaskedChunks`."""
    return {"actions": actions, "valid": valid, "masked": masked}


@pytest.fixture(scope="module")
def tokens():
    """A tokenizer trained on `sine_chunks`."""
    torch.manual_seed(0)
    model = latent.ActionTokenizer(8, 3, num_codes=64, dim=32)
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(64, 8, dtype=torch.bool)

    def draw_batches():
        for _ in range(100):
            actions = sine_chunks(64, generator)
            yield chunk_batch(actions, valid, torch.rand(64, 8, generator=generator) < train_latent.MASK_RATIO)

    return train_model(model, draw_batches(), 3e-3)


@torch.no_grad()
def test_tokenizer_round_trip(tokens):
    """Decoded chunks are close to the encoded ones, and most codes are in use."""
    actions = sine_chunks(256, torch.Generator().manual_seed(1))
    codes, vectors = tokens.encode(actions)
    assert codes.shape == (256, 8) and codes.dtype == torch.long and vectors.shape == (256, 8, 32)
    error = (tokens.decode(codes) - actions).square().mean() / actions.square().mean()
    assert error < 0.2
    assert len(codes.unique()) >= 48  # of 64


def test_steps_past_the_end_do_not_influence_losses_and_codes(tokens):
    """Changing the actions of steps that are not valid changes nothing; making these steps valid does."""
    actions, valid = sine_chunks(16, torch.Generator().manual_seed(2)), torch.arange(8).expand(16, 8) < 5
    changed = torch.where(valid[..., None], actions, 9.0)
    masked = torch.rand(16, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    a, b = tokens(chunk_batch(actions, valid, masked)), tokens(chunk_batch(changed, valid, masked))
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert torch.equal((a["codes"] < 0).view(16, 8), ~valid)
    assert torch.equal(tokens.encode(actions, valid)[0], tokens.encode(changed, valid)[0])
    assert tokens(chunk_batch(actions, torch.ones_like(valid), masked))["loss"] != a["loss"]


def test_losses_of_the_tokenizer_by_hand(tokens):
    """Reconstruction + quantisation + 0.03 consistency, which encodes again what is decoded with latents zeroed."""
    actions, valid = sine_chunks(4, torch.Generator().manual_seed(4)), torch.arange(8).expand(4, 8) < 7
    masked = torch.arange(8).expand(4, 8) % 3 == 0
    losses = tokens(chunk_batch(actions, valid, masked))
    count = 4 * 8
    latents = tokens.vectors(actions * valid[..., None])
    codes = tokens.quantiser.nearest(latents)
    reconstruction = (tokens.decode(codes) - actions)[valid].square().sum() / (count * 3)
    assert losses["reconstruction_loss"].item() == pytest.approx(reconstruction.item(), rel=1e-4)
    distance = (latents - tokens.quantiser.codebook[codes])[valid].square().sum() / (count * 32)
    assert losses["quantisation_loss"].item() == pytest.approx(0.25 * distance.item(), rel=1e-4)
    zeroed = torch.where(masked[..., None], 0.0, latents)
    decoded = tokens.decoder(tokens.quantiser.straight_through(zeroed, tokens.quantiser.nearest(zeroed)))
    encoded_again = tokens.vectors(decoded * valid[..., None])
    consistency = (encoded_again - latents.detach())[valid & masked].square().sum() / (count * 32)
    assert losses["consistency_loss"].item() == pytest.approx(consistency.item(), rel=1e-4)
    gradient, expected = (
        torch.autograd.grad(loss, tokens.project.weight, retain_graph=True)[0]
        for loss in (losses["consistency_loss"], consistency)
    )
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    total = losses["reconstruction_loss"] + losses["quantisation_loss"] + 0.03 * losses["consistency_loss"]
    assert losses["loss"].item() == pytest.approx(total.item())
    assert [conv.dilation for conv in tokens.convs] == [(1,), (2,), (4,)]


def test_latents_start_as_a_linear_map_of_their_own_action():
    """Before training, other steps have no influence and the encoder is linear."""
    model = latent.ActionTokenizer(8, 3, num_codes=8, dim=16)
    a, b = sine_chunks(2, torch.Generator().manual_seed(0))[:, None]
    changed = a.clone()
    changed[:, 3:] = b[:, 3:]
    assert torch.allclose(model.vectors(a)[:, :3], model.vectors(changed)[:, :3], atol=1e-6)
    assert torch.allclose(model.vectors(a) + model.vectors(b), 2 * model.vectors((a + b) / 2), atol=1e-5)


def test_consistency_reaches_the_encoder_at_masked_steps_only(tokens):
    """Without masked steps the loss is 0; with them it has a gradient."""
    actions, valid = sine_chunks(4, torch.Generator().manual_seed(4)), torch.ones(4, 8, dtype=torch.bool)
    assert tokens(chunk_batch(actions, valid, ~valid))["consistency_loss"] == 0
    loss = tokens(chunk_batch(actions, valid, valid))["consistency_loss"]
    assert torch.autograd.grad(loss, tokens.project.weight)[0].abs().sum() > 0


class PublishedQuantiser(quantiser.EMAQuantiser):
    """The recipe of the paper's published code: counts from zero, sums from noise, no data, no restart."""

    def __init__(self, num_codes, dim):
        super().__init__(num_codes, dim, patience=10**9)
        noise = torch.randn(num_codes, dim)
        self.codebook.copy_(noise)
        self.sums.copy_(noise)
        self.counts.fill_(1e-5)
        self.updates.fill_(1)


def test_published_recipe_collapses_and_ours_does_not(dataset):
    """The action tokenizer on the same data, order and weights: few codes there, most of them here."""
    chunks = train_latent.MaskedChunks([dataset], 8)
    batches = [default_collate([chunks[32 * step + row] for row in range(32)]) for step in range(20)]
    used = []
    for published in (True, False):
        torch.manual_seed(0)
        model = latent.ActionTokenizer(8, 7, num_codes=64, dim=32, patience=5)
        if published:
            model.quantiser = PublishedQuantiser(64, 32)
        train_model(model, batches * 3, 1e-3)
        with torch.no_grad():
            used.append(len(torch.cat([model(batch)["codes"] for batch in batches]).unique()))
    assert used[0] <= 4 and used[1] >= 32, used


def test_tokenizer_is_compared_with_kmeans(dataset):
    """Printed: codes in use, its error over the valid steps, and the error of as many means."""
    samples = train_latent.MaskedChunks([dataset], 8)
    model = latent.ActionTokenizer(8, 7, num_codes=16, dim=16).eval()
    model.quantiser.set_codebook(torch.randn(16, 16))
    parts = {"training": samples, "held-out episodes": samples}
    line = train_latent.format_kmeans_comparison(model, parts).splitlines()[1]
    pattern = r"On held-out episodes: (\d+) of 16 .* error ([0-9.]+), ([0-9.]+) times k-means' ([0-9.]+)"
    used, error, ratio, floor = map(float, re.match(pattern, line).groups())
    items = [samples.sample(0, step) for step in range(len(dataset))]
    codes, errors = [], []
    for item in items:
        item_codes, _ = model.encode(item["actions"][None], item["valid"][None])
        codes.append(item_codes[0][item["valid"]])
        errors.append((model.decode(item_codes)[0] - item["actions"])[item["valid"]])
    assert used == len(torch.cat(codes).unique())
    assert error == pytest.approx(torch.cat(errors).square().mean().item(), abs=2e-5)
    assert ratio == pytest.approx(error / floor, rel=0.01)
    actions = torch.cat([item["actions"][item["valid"]] for item in items])
    assert 0 < floor < 0.5 * (actions - actions.mean(0)).square().mean()  # 16 means, better than one


@torch.no_grad()
def test_refitting_puts_the_codebook_on_means_of_the_latents(tokens):
    """Of the valid steps: each code lies among the latents, and rounding to codes costs less than before."""
    actions, valid = sine_chunks(64, torch.Generator().manual_seed(5)), torch.arange(8).expand(64, 8) < 6

    class Samples(torch.utils.data.Dataset):
        epoch_length = 64

        def __getitem__(self, row):
            return {"actions": actions[row], "valid": valid[row]}

    model = copy.deepcopy(tokens)
    model.quantiser.set_codebook(0.1 * torch.randn(64, 32))
    latents = model.encode(actions, valid)[1][valid]
    before = torch.cdist(latents, model.quantiser.codebook).amin(1).square().mean()
    model.refit(Samples())
    distance = torch.cdist(latents, model.quantiser.codebook)
    assert distance.amin(1).square().mean() < 0.2 * before
    assert torch.allclose(model.quantiser.codebook, quantiser.kmeans(latents, 64), atol=1e-4)
    assert torch.equal(model.quantiser.sums, model.quantiser.codebook) and (model.quantiser.counts == 1).all()


# ----------------------------------------------------------------------------------------------------------------------
# Frame features and text


def test_pixel_patches_are_pixels_in_reading_order():
    """Patch 5 of a 3 x 3 grid is in the middle row, at the right."""
    image = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    features = latent.PixelPatches(12, 4)
    patches = features(torch.from_numpy(features.resize(image).copy())[None])
    assert patches.shape == (1, features.patches, features.size) == (1, 9, 48)
    assert np.allclose(patches[0, 5].view(4, 4, 3), image[4:8, 8:12] / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="image_size is 12"):
        latent.PixelPatches(12, 5)


@torch.no_grad()
def test_dino_patches_are_its_last_states_without_class_and_registers(dino, tmp_path):
    """The same as transformers' own model gives for normalised pixels; other networks are refused."""
    from transformers import Dinov2WithRegistersModel, T5Config

    features = latent.DinoPatches(21, dino)
    image = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    frame = features.resize(image)
    patches = features(torch.from_numpy(frame.copy())[None])
    assert patches.shape == (1, features.patches, features.size) == (1, 9, 24)
    pixels = (frame / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    states = Dinov2WithRegistersModel.from_pretrained(dino)(torch.tensor(pixels).permute(2, 0, 1)[None].float())[0]
    assert states.shape[1] == 1 + 4 + 9 and torch.allclose(patches[0], states[0, 5:], atol=1e-5)
    with pytest.raises(ValueError, match="image_size is 24.*multiple of 7"):
        latent.DinoPatches(24, dino)
    T5Config(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 't5'; it must be"):
        latent.DinoPatches(21, tmp_path)


@torch.no_grad()
def test_t5_states_are_those_of_a_padded_batch(t5):
    """One text at a time gives what transformers gives for all at once, with padding masked."""
    from transformers import AutoTokenizer, T5EncoderModel

    texts = ["put the bowl on the plate", "put the bowl", "", "put the bowl"]
    encoded = latent.text_states(t5, texts)
    sizes = {text: tuple(states.shape) for text, states in encoded.items()}
    assert sizes == {texts[0]: (7, 16), texts[1]: (4, 16), "": (1, 16)}
    batch = AutoTokenizer.from_pretrained(t5)(texts, padding=True, return_tensors="pt")
    states = T5EncoderModel.from_pretrained(t5)(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    for row, mask, text in zip(states, batch["attention_mask"].bool(), texts, strict=True):
        assert torch.allclose(row[mask], encoded[text], atol=1e-5)


def test_words_have_fixed_vectors():
    """The same word has the same vector in every text, in any case; different words differ."""
    encoded = latent.text_states("words", ["put the bowl", "Bowl", ""])
    states = encoded["put the bowl"]
    assert states.shape == (3, 64) and encoded[""].shape == (0, 64)
    assert torch.equal(states[2], encoded["Bowl"][0])
    assert states[0].norm() > 4 and torch.cosine_similarity(*states[:2], 0) < 0.6
    padded, mask = latent.pad_text(states, 5)
    assert padded.shape == (5, 64) and mask.tolist() == [True] * 3 + [False] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Image-based model

MOVES = torch.tensor([[6, 0], [-6, 0], [0, 6], [0, -6]])


def moving_squares(batch_size, generator):
    """Return frames u8 [batch_size, 2, 24, 24, 3], a square and the same moved in one of four directions; and which."""
    frames = torch.full((batch_size, 2, 24, 24, 3), 40, dtype=torch.uint8)
    directions = torch.randint(4, (batch_size,), generator=generator)
    corners = torch.randint(6, 13, (batch_size, 2), generator=generator)
    for row in range(batch_size):
        for t, (y, x) in enumerate((corners[row], corners[row] + MOVES[directions[row]])):
            frames[row, t, y : y + 6, x : x + 6] = 220
    return frames, directions


def lam_batch(frames, directions):
    """Return a batch of `FramePairs`: the action of each pair is its move, labelled for a quarter of them."""
    actions = (MOVES[directions] / 6).float()[:, None]  # [B, 1, 2]
    valid = torch.ones(len(directions), 1, dtype=torch.bool)
    weight = 4.0 * (torch.arange(len(directions)) % 4 == 0)
    return {"frames": frames, "actions": actions, "valid": valid, "weight": weight}


SIZES = dict(image_size=24, patch_size=6, width=32, code_dim=8, delta=3)


@pytest.fixture(scope="module")
def lam():
    """A model trained on `moving_squares`."""
    torch.manual_seed(0)
    sizes = latent.LamSizes(**SIZES, camera="image", num_blocks=1)
    model = latent.LatentActionModel(sizes, chunk=1, action_sizes=[2])
    generator = torch.Generator().manual_seed(0)
    return train_model(model, (lam_batch(*moving_squares(16, generator)) for _ in range(350)), 5e-3)


@torch.no_grad()
def test_lam_round_trip(lam):
    """The moved square is predicted, from codes that differ between the directions."""
    frames, directions = moving_squares(128, torch.Generator().manual_seed(1))
    result = lam(lam_batch(frames, directions))
    assert result["reconstruction_loss"] < 0.6 * result["copy_error"]
    a, b = lam.features(frames[:, 0]), lam.features(frames[:, 1])
    codes, vectors = lam.encode(a, b)
    assert codes.shape == (128, 4) and vectors.shape == (128, 4, 8)
    assert torch.equal(codes, result["codes"]) and len(codes.unique()) >= 8
    swapped = lam.predict(a, [lam.codes.quantiser.codebook[codes.roll(1, 0)]])
    assert (swapped - b).square().mean() > 1.5 * result["reconstruction_loss"]  # the decoder uses the codes
    majority = torch.stack([codes[directions == number].mode(0).values for number in range(4)])
    assert len(torch.unique(majority, dim=0)) == 4


def test_unlabelled_samples_do_not_reach_the_action_head(lam):
    """Their actions do not change the action loss; those of labelled samples do."""
    batch = lam_batch(*moving_squares(8, torch.Generator().manual_seed(2)))
    unlabelled = (batch["weight"] == 0)[:, None, None]
    losses = [
        lam(batch | {"actions": actions})["action_loss"]
        for actions in (batch["actions"], torch.where(unlabelled, 7.0, batch["actions"]), batch["actions"] + 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def random_pairs(batch_size=6):
    """Return frames u8 [batch_size, 2, 24, 24, 3] of noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (batch_size, 2, 24, 24, 3), dtype=torch.uint8, generator=generator)


def update_once(model, batch):
    """Return the model in evaluation mode after one update by gradient descent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(batch)["loss"].backward()
    optimizer.step()
    return model.eval()


@torch.no_grad()
def test_first_stage_reads_the_text_but_not_its_padding():
    """In the encoder and in the decoder."""
    sizes = latent.LamSizes(**SIZES, stage=1, predict_change=False, centre=False)
    model = latent.LatentActionModel(sizes, text_size=5).eval()
    model.codes.quantiser.set_codebook(torch.randn(16, 8))
    a, b = (model.features(frames) for frames in random_pairs().unbind(1))
    text = torch.randn(6, 3, 5)
    mask = torch.tensor([True, True, False]).expand(6, -1)
    other_text = torch.stack([text[:, 0], text[:, 1] + 1, text[:, 2]], 1)
    other_padding = torch.cat([text[:, :2], text[:, 2:] + 1], 1)
    texts = (text, other_text, other_padding)
    c, c_text, c_padding = (model.vectors(a, b, states, mask)[0] for states in texts)
    assert torch.equal(c, c_padding) and (c - c_text).abs().max() > 1e-3
    quantised = [torch.randn(6, 4, 8)]
    predicted, predicted_text, predicted_padding = (model.predict(a, quantised, states, mask) for states in texts)
    assert torch.equal(predicted, predicted_padding) and (predicted - predicted_text).abs().max() > 1e-3
    without_padding = model.predict(a, quantised, text[:, :2], mask[:, :2])
    assert torch.allclose(predicted, without_padding, atol=1e-5)


@pytest.mark.parametrize("kind", ("ema", "loss"))
def test_second_stage_keeps_the_first_codebook_and_learns_its_own(kind, tmp_path):
    """It starts from all of stage 1; in training everything moves but the codebook of stage 1."""
    first = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=1, codebook=kind), text_size=5)
    text = {"text": torch.randn(6, 3, 5), "text_mask": torch.ones(6, 3, dtype=torch.bool)}
    update_once(first, {"frames": random_pairs()} | text)
    write_model(tmp_path, first)
    second = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=2, codebook=kind), chunk=1, action_sizes=[2])
    train_latent.init_from_model(second, tmp_path)
    saved = first.state_dict()
    for name, tensor in second.state_dict().items():
        if not name.startswith(("codes.", "action_head.")):
            assert torch.equal(tensor, saved[name.replace("irrelevant.", "codes.")]), name
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    batch = lam_batch(random_pairs(), torch.zeros(6, dtype=torch.long))
    for _ in range(3):
        update_once(second, batch)
    after = second.state_dict()
    assert torch.equal(after["irrelevant.quantiser.codebook"], before["irrelevant.quantiser.codebook"])
    for name in ("codes.quantiser.codebook", "irrelevant.queries", "irrelevant.project.weight", "irrelevant.up.weight"):
        assert not torch.equal(after[name], before[name]), name
    with torch.no_grad():
        a, b = (second.features(frames) for frames in random_pairs().unbind(1))
        assert torch.equal(second.encode(a, b)[0], second(batch)["codes"])  # the exported codes are the task-centric


def test_losses_of_both_sets_and_the_action_head():
    """Loss = reconstruction + quantisation of both sets + 0.5 action, whose head reads the exported codes alone."""
    model = latent.LatentActionModel(latent.LamSizes(**SIZES, stage=2), chunk=1, action_sizes=[2])
    for code_set in model.code_sets:
        code_set.quantiser.set_codebook(torch.randn(16, 8))
    losses = model(lam_batch(random_pairs(), torch.zeros(6, dtype=torch.long)))
    total = losses["reconstruction_loss"] + losses["quantisation_loss"] + 0.5 * losses["action_loss"]
    assert losses["loss"].item() == pytest.approx(total.item())
    projections = [code_set.project.weight for code_set in model.code_sets]
    for name, reached in (("quantisation_loss", [True, True]), ("action_loss", [True, False])):
        gradients = torch.autograd.grad(losses[name], projections, retain_graph=True, allow_unused=True)
        assert [g is not None and g.abs().sum().item() > 0 for g in gradients] == reached, name


def test_outputs_count_by_direction_and_the_centre_follows_them():
    """Their length does not matter, and after many updates c is centred."""
    code_set = latent.CodeSet(latent.LamSizes(**SIZES), 108, 0)
    outputs = torch.randn(16, 4, 32) + 3
    assert torch.allclose(code_set.eval().vectors(outputs), code_set.vectors(7 * outputs), atol=1e-4)
    for _ in range(300):
        code_set.train().vectors(outputs)
    code_set.quantiser.updates.fill_(300)
    assert code_set.eval().vectors(outputs).mean(0).abs().max() < 1e-3


def test_codebooks_and_queries_do_not_decay():
    """Weight decay is for the other matrices."""
    model = latent.LatentActionModel(latent.LamSizes(**SIZES, codebook="loss"))
    decayed, not_decayed = (group["params"] for group in common.parameter_groups(model, 0.1))
    assert any(p is model.codes.quantiser.codebook for p in not_decayed)
    assert any(p is model.codes.queries for p in not_decayed)
    assert any(p is model.patch_up.weight for p in decayed)


# ----------------------------------------------------------------------------------------------------------------------
# A new quantiser


class FiniteScalarQuantiser(quantiser.Quantiser):
    """Finite scalar quantisation (arXiv 2309.15505): d numbers, each bounded and rounded to one of L values, K = L^d.

    The codebook is a fixed grid, so there is nothing to learn and no loss.
    """

    def __init__(self, num_codes, dim, patience=50, seed=0):
        super().__init__(num_codes, dim, patience, seed)
        levels = round(num_codes ** (1 / dim))
        if levels**dim != num_codes:
            raise ValueError(f"num_codes is {num_codes}; it must be a power of code_dim, {dim}")
        grid = torch.cartesian_prod(*[torch.linspace(-1, 1, levels)] * dim)  # [K, d]
        self.register_buffer("codebook", grid, persistent=False)

    def nearest(self, x):
        """Return the codes i64 [...] of x [..., d], bounded to (-1, 1)."""
        return super().nearest(x.tanh())

    def straight_through(self, x, codes):
        """Return the grid points [..., d] of `codes`; their gradient goes to the bounded x."""
        return super().straight_through(x.tanh(), codes)

    def loss(self, x, codes, valid):
        """Return 0."""
        return x.new_zeros(())


def test_a_new_quantiser_trains_labels_and_loads(rlds, cache, tmp_path, monkeypatch):
    """One class and one entry in QUANTISERS are enough, for both stages; its labels are the grid points of c."""
    monkeypatch.setitem(quantiser.QUANTISERS, "fsq", FiniteScalarQuantiser)
    small = dict(image_size=24, width=16, num_blocks=1, code_dim=2, delta=5, codebook="fsq")
    small |= dict(data=[rlds], cache=cache, max_steps=3, global_batch_size=8, val_fraction=0.25)
    first, second, labels = tmp_path / "one", tmp_path / "two", tmp_path / "labels"
    train_latent.train(train_latent.LamTraining(out=first, stage=1, **small), ONE)
    train_latent.train(train_latent.LamTraining(out=second, stage=2, init_from=first, **small), ONE)
    model = latent.load_lam(second)
    assert [type(code_set.quantiser) for code_set in model.code_sets] == [FiniteScalarQuantiser] * 2
    assert model.codes.quantiser.updates == 3
    label.main(label.Config(data=rlds, lam=second, out=labels, cache=cache), ONE)
    tensors, metadata = files.load_tensors(labels)
    assert metadata["saw_actions"] == "yes"  # by its action head, which is the default
    assert metadata["num_codes"] == "16" and tensors["vectors"].shape[1:] == (4, 2)
    steps = tensors["vectors"].float().tanh().add(1).mul(1.5).round()  # 0 to 3 in each dimension
    agree = (steps[..., 0] * 4 + steps[..., 1]).long() == tensors["codes"].long()
    assert agree.float().mean() > 0.99  # vectors are stored in float16


# ----------------------------------------------------------------------------------------------------------------------
# Models on disk


def write_model(folder, model, kind="lam"):
    """Write a folder as `train_latent.py` does, as far as loading reads it, and return it."""
    folder.mkdir(exist_ok=True)
    files.save_tensors(folder / "model.safetensors", latent.model_tensors(model))
    files.write_json(folder / "config.json", {"kind": kind, "model": model.config})
    return folder


def test_saved_models_encode_bit_identically(lam, tokens, dino, tmp_path):
    """Pixels, a DINOv2 whose folder is gone, and the action tokenizer."""
    shutil.copytree(dino, tmp_path / "dino")
    sizes = latent.LamSizes(**SIZES | dict(image_size=28), features=str(tmp_path / "dino"))
    batch = {"frames": torch.randint(0, 255, (4, 2, 28, 28, 3)).byte()}
    with_dino = update_once(latent.LatentActionModel(sizes), batch)
    shutil.rmtree(tmp_path / "dino")
    for model, side in ((lam, 24), (with_dino, 28)):
        frames = torch.randint(0, 255, (8, 2, side, side, 3), dtype=torch.uint8)
        loaded = latent.load_lam(write_model(tmp_path / "lam", model))
        assert loaded.sizes == model.sizes and loaded.action_head is None
        with torch.no_grad():
            expected, encoded = (m.encode(*map(m.features, frames.unbind(1))) for m in (model, loaded))
        assert all(torch.equal(before, after) for before, after in zip(expected, encoded, strict=True))
    loaded = latent.load_tokenizer(write_model(tmp_path / "tokenizer", tokens, "tokenizer"))
    codes, _ = loaded.encode(sine_chunks(8, torch.Generator().manual_seed(4)))
    assert torch.equal(tokens.encode(sine_chunks(8, torch.Generator().manual_seed(4)))[0], codes)
    assert torch.equal(tokens.decode(codes), loaded.decode(codes))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_fingerprint_follows_the_weights(lam, tmp_path):
    """The same weights have the same one; a single changed number changes it."""
    before = latent.fingerprint(write_model(tmp_path, lam))
    assert latent.fingerprint(write_model(tmp_path, lam)) == before
    changed = copy.deepcopy(lam)
    with torch.no_grad():
        changed.codes.queries[0, 0] += 1
    assert latent.fingerprint(write_model(tmp_path, changed)) != before


def test_folders_that_hold_no_such_model_are_refused(lam, tmp_path):
    """With the command that makes one."""
    with pytest.raises(FileNotFoundError, match="no config.json.*train_latent.py tokenizer"):
        latent.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds a 'lam' where a 'tokenizer' is needed"):
        latent.load_tokenizer(write_model(tmp_path, lam))


def test_models_of_another_architecture_are_refused(lam, tmp_path):
    """With every setting that differs, or the names of the tensors that do not fit."""
    folder = write_model(tmp_path, lam)
    for change, match in (
        (dict(heads=8), "heads is 8, but there 4"),
        (dict(centre=False, predict_change=False), "predict_change is False, but there True, centre is False"),
        (dict(stage=1), "stage is 1, but there 0"),
        (dict(delta=7), "delta is 7, but there 3"),
        (dict(camera="front", image_size=48), "camera is front, but there image, image_size is 48, but there 24"),
        (dict(stage=2), "stage is 2, but there 0"),
        (dict(width=64), r"does not fit.*codes.project.weight is \(8, 32\), the model's is \(8, 64\)"),
        (dict(codebook="loss"), "unknown codes.quantiser.counts"),
    ):
        model = latent.LatentActionModel(latent.LamSizes(**SIZES | dict(num_blocks=1) | change), text_size=5)
        with pytest.raises(ValueError, match=match):
            train_latent.init_from_model(model, folder)
    tensors, _ = files.load_tensors(folder / "model.safetensors")
    del tensors["out.weight"]
    files.save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="does not fit this model: missing out.weight"):
        latent.load_lam(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The embedded data


def test_shipped_labels_and_tokenizer_use_their_codebooks(tmp_path):
    """The embedded data's: at least 12 of 16 codes at each position; half of the tokenizer's, near k-means."""
    with safe_open(DATA / "labels.safetensors", "numpy") as file:
        codes = file.get_tensor("codes")
    assert min(len(np.unique(codes[:, position])) for position in range(4)) >= 12
    dataset = open_dataset(DATA, tmp_path)
    training, _ = split_episodes(dataset, 0.1, 0)
    samples = train_latent.MaskedChunks([dataset], 8, sources=[Source(0, training)])
    line = train_latent.format_kmeans_comparison(latent.load_tokenizer(DATA / "tokenizer"), {"training": samples})
    pattern = r"On training: (\d+) of 256 codes in use, squared error [0-9.]+, ([0-9.]+) times"
    used, ratio = re.match(pattern, line).groups()
    assert int(used) >= 128 and float(ratio) <= 1.3


def test_a_small_last_batch_counts_as_its_samples():
    """Of 64 samples and one, with losses 0 and 10, the mean is 10 / 65."""
    results = [
        {"loss": torch.tensor(loss), "codes": torch.zeros(size, 4, dtype=torch.int64)}
        for loss, size in ((0.0, 64), (10.0, 1))
    ]
    assert train_latent.summarise(results, 16)["loss"] == pytest.approx(10 / 65)
