"""Latent action models: a pair of frames, or a chunk of actions, as a few discrete codes.

Implements the latent actions of "From Pixels to Tokens: A Systematic Study of Latent Action Supervision for
Vision-Language-Action Models" (arXiv 2605.04678), from a size that a CPU trains in minutes to the paper's:

    LatentActionModel   image-based: (o_t, o_{t+delta}) -> P codes, after UniVLA (arXiv 2505.06111), in two stages
    ActionTokenizer     action-based: a chunk of H actions -> H codes

Several embodiments share all of the first but the output layer of its action head, and the codebook of the second.
The commands lie elsewhere: train_latent.py trains both, label.py labels a data set with the image-based model, probe.py
measures both on held-out episodes. univla.py reads UniVLA's checkpoints, quantiser.py holds the codebooks.

Three departures from UniVLA, each with a flag that undoes it. The codebook is a moving average of the encoder's outputs
instead of trained by a loss (`--codebook loss`). The decoder predicts the change of the patches, so that it
starts as a copy of the current frame (`--no-predict-change`). The encoder's outputs are normalised and c is centred for
each code position, so that all positions share the whole codebook and c points in different directions for different
motions (`--no-centre`; stage 1 on data/libero_tiny, held-out episodes: 13 to 14 of 16 codes in use at each position,
against 4 to 7 without the norm). Stage 2 also starts from all of stage 1, not from its codebook and queries alone.
Leaves out the training of frame features and text encoders: both stay frozen.

Axes: B batch, H chunk steps, A action size (of several embodiments: the largest), E embodiments, P codes per step, Q
codes of all sets (P or 2 P), K codebook size, d width of a code, D width of a transformer, L tokens, N patches of a
frame, F features of a patch, T frames (2).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from checkpoint import load_tensors_into
from common import all_mean, autocast, broadcast, to_device
from files import file_hash, load_tensors, read_json
from quantiser import QUANTISERS, EMAQuantiser, kmeans, masked_mse

CONSISTENCY_WEIGHT = 0.03  # of the tokenizer's consistency loss; the paper gives none, and more costs reconstruction
ACTION_WEIGHT = 0.5  # of the action head's loss
WORD_SIZE = 64  # width of the fixed random vectors of words
MOST_ROWS = 65_535  # that CUDA's attention takes at once, more would not fit its grid
KMEANS_CHUNKS = 4096  # chunks, at most, whose k-means are computed


# ----------------------------------------------------------------------------------------------------------------------
# Transformer parts


class Attention(nn.Module):
    """Pre-norm self-attention over the tokens of x [..., L, D], with its residual; no bias in q, k and v."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, causal=False, num_queries=None):
        """Map x [..., L, D] to [..., num_queries, D], the first num_queries tokens (default: all) after attention.

        mask: bool [..., L], False where a token is padding and not attended to (default: nowhere).
        """
        y = self.norm(x).flatten(0, -3)  # [n, L, D]
        q_weight, kv_weight = self.qkv.weight.tensor_split([x.shape[-1]])
        q = F.linear(y[:, :num_queries], q_weight)  # [n, num_queries, D]
        kv = F.linear(y, kv_weight)  # [n, L, 2 D]
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [n, heads, num_queries, D / heads]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, L, D / heads] each
        if mask is not None:
            mask = mask.flatten(0, -2)[:, None, None]  # [n, 1, 1, L]
        if len(q) > MOST_ROWS and mask is None:
            parts = zip(*(each.split(MOST_ROWS) for each in (q, k, v)))
            y = torch.cat([F.scaled_dot_product_attention(*part, is_causal=causal) for part in parts])
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x[..., :num_queries, :]
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention within a frame, then (temporal) causal attention over the frames, then an MLP."""

    def __init__(self, width, heads, hidden, temporal=False):
        super().__init__()
        self.spatial = Attention(width, heads)
        self.temporal = Attention(width, heads) if temporal else None
        layers = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x, mask=None, num_queries=None):
        """Map x [B, L, D] or, temporal, [B, T, L, D] to the same with num_queries for L; both as for `Attention`."""
        x = self.spatial(x, mask, num_queries=num_queries)
        if self.temporal is not None:
            x = self.temporal(x.transpose(1, 2), causal=True).transpose(1, 2)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Tokens of any width: embedded, given positions, joined with text tokens, passed through the blocks."""

    def __init__(self, size_in, length, width, heads, num_blocks, temporal=False, normalise=True):
        """size_in: width of the tokens; length: L without text; normalise: a layer norm before the embedding."""
        super().__init__()
        norm = nn.LayerNorm(size_in) if normalise else nn.Identity()
        self.embed = nn.Sequential(norm, nn.Linear(size_in, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, temporal) for _ in range(num_blocks))
        self.register_buffer("positions", sinusoids(length, width), persistent=False)

    def forward(self, x, num_outputs, text=None, text_mask=None):
        """Map x [B, T, L, size_in] to its first tokens [B, T, num_outputs, D], all that the last block computes.

        text: [B, n, D], tokens that join those of every frame; text_mask: bool [B, n], False where they are padding.
        """
        x = self.embed(x) + self.positions
        mask = None
        if text is not None:
            text = text[:, None].expand(-1, x.shape[1], -1, -1)  # [B, T, n, D]
            text_mask = text_mask[:, None].expand(-1, x.shape[1], -1)  # [B, T, n]
            mask = torch.cat([text_mask.new_ones(x.shape[:3]), text_mask], 2)  # [B, T, L + n]
            x = torch.cat([x, text], 2)  # [B, T, L + n, D]
        for number, block in enumerate(self.blocks, 1):
            x = block(x, mask, num_outputs if number == len(self.blocks) else None)
        return x


def sinusoids(length, width):
    """Return positions f32 [length, width]: sines and cosines, wavelengths geometric from 2 pi to 10 000 x 2 pi."""
    angle = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# Actions -> codes


class ActionCoder(nn.Module):
    """Encoder and decoder of the actions of one embodiment.

    Everything that mixes steps (convolutions, attention, the FFT) starts at zero: a latent is first a linear map of its
    own action, so that similar actions have similar latents. There are no positions and no final norm.
    """

    def __init__(self, action_size, dim):
        """action_size: A of this embodiment; dim: d."""
        super().__init__()
        self.action_size = action_size
        self.project = nn.Linear(3 * action_size, dim)
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=apart, dilation=apart) for apart in (1, 2, 4))
        self.blocks = nn.Sequential(*(Block(dim, 4, hidden=256) for _ in range(2)))
        self.decoder = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, action_size))
        with torch.no_grad():
            self.project.weight[:, action_size:] = 0
        branches = [layer for block in self.blocks for layer in (block.spatial.out, block.mlp[3])]
        for layer in [*self.convs, *branches]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def own_latents(self, actions):
        """Return the latents f32 [B, H, d] of normalised actions f32 [B, H, at least A]; padding is not read."""
        x = self.project(fourier_features(actions[..., : self.action_size])).transpose(1, 2)  # [B, d, H]
        for conv in self.convs:
            x = x + F.gelu(conv(x))
        return self.blocks(x.transpose(1, 2))  # [B, H, d]


class ActionTokenizer(ActionCoder):
    """The action-based latent actions of the paper: a chunk of H normalised actions <-> H codes, one per step.

    Late in training `refit` puts the codebook on k-means of the latents, once. docs/results.md measures what each part
    is worth. Several embodiments have one codebook: the tokenizer itself is the coder of the first embodiment, and
    `others` holds those of the later ones. Their actions are padded with 0 to the largest A.
    """

    def __init__(self, chunk, action_size, num_codes=256, dim=128, patience=50, seed=0, embodiments=None):
        """chunk: H; action_size: A; num_codes: K; dim: d; patience and seed: of the quantiser.

        embodiments: of several, {name: action size}; action_size is then the largest.
        """
        sizes = list(embodiments.values()) if embodiments else [action_size]
        super().__init__(sizes[0], dim)
        self.config = {"chunk": chunk, "action_size": action_size, "num_codes": num_codes, "dim": dim}
        if embodiments:
            self.config["embodiments"] = embodiments
        self.action_sizes = sizes  # of each embodiment
        self.num_codes = num_codes
        self.dim = dim
        self.quantiser = EMAQuantiser(num_codes, dim, patience=patience, seed=seed)
        self.others = nn.ModuleList(ActionCoder(size, dim) for size in sizes[1:])
        self.register_buffer("weights", padding_weights(sizes), persistent=False)  # [E]

    @property
    def coders(self):
        """The `ActionCoder` of each embodiment."""
        return [self, *self.others]

    def vectors(self, actions, embodiment=None):
        """Return the latents f32 [B, H, d] before quantisation of normalised actions f32 [B, H, A].

        embodiment: i64 [B], the number of each sample's; needed where there are several.
        """
        return select_rows([coder.own_latents(actions) for coder in self.coders], embodiment)

    def decode_vectors(self, vectors, embodiment=None):
        """Return the normalised actions f32 [B, H, A] that vectors f32 [B, H, d] of codes stand for."""
        size = max(self.action_sizes)
        decoded = [F.pad(coder.decoder(vectors), (0, size - coder.action_size)) for coder in self.coders]
        return select_rows(decoded, embodiment)

    @torch.no_grad()
    def refit(self, samples):
        """Put the codebook on k-means of the latents of the first `samples`, the same on every process."""
        loader = DataLoader(samples, 64, sampler=range(min(samples.epoch_length, KMEANS_CHUNKS)))
        latents = []
        for batch in loader:
            batch = to_device(batch, self.project.weight.device)
            _, vectors = self.encode(batch["actions"], batch["valid"], batch.get("embodiment"))
            latents.append(vectors[batch["valid"]])  # [n, d]
        means = kmeans(torch.cat(latents), self.num_codes, self.quantiser.seed)
        self.quantiser.set_codebook(broadcast(means))

    def encode(self, actions, valid=None, embodiment=None):
        """Return codes i64 [B, H] and latents f32 [B, H, d] of normalised actions f32 [B, H, A].

        valid: bool [B, H]; steps that are not valid count as 0 (default: all are valid); embodiment: as of `vectors`.
        """
        vectors = self.vectors(actions if valid is None else actions * valid[..., None], embodiment)
        return self.quantiser.nearest(vectors), vectors

    def decode(self, codes, embodiment=None):
        """Return the normalised actions f32 [B, H, A] of codes i64 [B, H]; 0 beyond an embodiment's own dimensions."""
        return self.decode_vectors(self.quantiser.codebook[codes], embodiment)

    def forward(self, batch):
        """Return the losses of a batch of `MaskedChunks` as scalars, and the `codes` i64 [B H, 1], -1 where not valid.

        batch: actions f32 [B, H, A] normalised; valid bool [B, H]; masked bool [B, H]; of several embodiments
        embodiment i64 [B]. loss = reconstruction_loss + quantisation_loss + 0.03 consistency_loss. The first is a mean
        over each sample's own dimensions. Consistency: with the latents zeroed at the masked steps, the decoded actions
        are encoded again; there this must match the encoding of the true actions.
        """
        valid, masked, embodiment = batch["valid"], batch["masked"], batch.get("embodiment")
        actions = batch["actions"] * valid[..., None]
        latents = self.vectors(actions, embodiment)
        quantised, codes, quantisation = self.quantiser(latents, valid)
        own = valid * sample_weights(self.weights, embodiment)  # [B, H]
        reconstruction = masked_mse(self.decode_vectors(quantised, embodiment) - actions, own)
        zeroed = latents * ~masked[..., None]
        quantised_again = self.quantiser.straight_through(zeroed, self.quantiser.nearest(zeroed))
        decoded = self.decode_vectors(quantised_again, embodiment)
        encoded_again = self.vectors(decoded * valid[..., None], embodiment)
        consistency = masked_mse(encoded_again - latents.detach(), valid & masked)
        return {
            "loss": reconstruction + quantisation + CONSISTENCY_WEIGHT * consistency,
            "reconstruction_loss": reconstruction,
            "quantisation_loss": quantisation,
            "consistency_loss": consistency,
            "codes": torch.where(valid, codes, -1).flatten()[:, None],
        }


def select_rows(parts, embodiment):
    """Return for each sample the row of its embodiment's part, [B, ...].

    parts: [B, ...] of each embodiment, all computed for all samples, so that shapes do not depend on the batch and
    every parameter has a gradient on every process; embodiment: i64 [B], not read where there is one part.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts)[embodiment, torch.arange(len(embodiment), device=embodiment.device)]


def padding_weights(sizes):
    """Return f32 [E]: of each action size, the largest / it.

    The mean error over padded dimensions, times this, is the mean over the embodiment's own dimensions.
    """
    return max(sizes) / torch.tensor(sizes, dtype=torch.float32)


def sample_weights(weights, embodiment):
    """Return the weight of each sample, f32 [B, 1], from those of the embodiments; embodiment: i64 [B] or None."""
    return weights[:1] if embodiment is None else weights[embodiment][:, None]


def fourier_features(actions):
    """Map actions [B, H, A] to [B, H, 3 A]: the actions, and the real and imaginary parts of their FFT over time."""
    spectrum = torch.fft.fft(actions, dim=1)
    return torch.cat([actions, spectrum.real, spectrum.imag], -1)


# ----------------------------------------------------------------------------------------------------------------------
# Frozen features of frames and instructions


class PixelPatches(nn.Module):
    """Frame features without a network: the frame at `image_size`, cut into patches of normalised pixels."""

    def __init__(self, image_size, patch_size):
        """Raise ValueError when patch_size does not divide image_size, both in pixels."""
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size}, which patch_size {patch_size} does not divide; change one")
        self.image_size = image_size
        self.patch_size = patch_size
        self.patches = (image_size // patch_size) ** 2  # N
        self.size = 3 * patch_size**2  # F

    def resize(self, image):
        """Return a stored frame u8 [h, w, 3] as u8 [image_size, image_size, 3], averaged over areas."""
        return np.asarray(Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BOX))

    def forward(self, frames):
        """Map frames u8 [B, image_size, image_size, 3] to patches f32 [B, N, F] in [-1, 1], in reading order."""
        p, n = self.patch_size, self.image_size // self.patch_size
        pixels = frames.float().div(127.5).sub(1).view(-1, n, p, n, p, 3)
        return pixels.transpose(2, 3).reshape(len(frames), n * n, p * p * 3)  # [B, N, F]


class DinoPatches(nn.Module):
    """Frozen patch tokens of DINOv2 with registers (arXiv 2309.16588), after its final norm."""

    def __init__(self, image_size, source, config=None):
        """source: checkpoint directory or hub id; config: builds the architecture alone, for weights to be loaded.

        Raise ValueError for another network, or when image_size is not a multiple of its patch size.
        """
        super().__init__()
        from transformers import AutoConfig, Dinov2WithRegistersConfig, Dinov2WithRegistersModel  # slow to import

        dino = Dinov2WithRegistersConfig(**config) if config else AutoConfig.from_pretrained(source)
        if dino.model_type != "dinov2_with_registers":
            raise ValueError(f"features {source} is a '{dino.model_type}'; it must be pixels or DINOv2 with registers")
        if image_size % dino.patch_size:
            raise ValueError(f"image_size is {image_size}; {source} needs a multiple of {dino.patch_size} (paper: 224)")
        if config:
            self.net = Dinov2WithRegistersModel(dino)
        else:
            self.net = Dinov2WithRegistersModel.from_pretrained(source, dtype=torch.float32)
        self.config = dino.to_dict()
        self.image_size = image_size
        self.prefix = 1 + dino.num_register_tokens  # class token and registers
        self.patches = (image_size // dino.patch_size) ** 2  # N
        self.size = dino.hidden_size  # F
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)  # ImageNet's
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def resize(self, image):
        """Return a stored frame u8 [h, w, 3] as u8 [image_size, image_size, 3], bicubic."""
        return np.asarray(Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))

    @torch.no_grad()
    def forward(self, frames):
        """Map frames u8 [B, image_size, image_size, 3] to patch tokens f32 [B, N, F]."""
        pixels = (frames.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std  # [B, 3, h, w]
        with autocast(pixels.device):
            return self.net(pixels).last_hidden_state[:, self.prefix :].float()


def build_features(sizes, config=None):
    """Return the frozen frame features that `sizes` names. config: as for `DinoPatches`."""
    if sizes.features == "pixels":
        return PixelPatches(sizes.image_size, sizes.patch_size)
    return DinoPatches(sizes.image_size, sizes.features, config)


def text_states(source, instructions, device="cpu"):
    """Return {instruction: f32 [number of tokens, width]}, each different instruction encoded once.

    source: "words", a fixed random vector for each word, or a T5 (checkpoint directory or hub id), whose encoder's last
    states are taken. An empty instruction has no words; T5 gives it one state, that of its end token.
    """
    instructions = sorted(set(instructions))
    if source == "words":
        return {text: _word_vectors(text) for text in instructions}
    from transformers import AutoTokenizer, T5EncoderModel  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(source)
    t5 = T5EncoderModel.from_pretrained(source, dtype=torch.float32).to(device)
    states = {}
    with torch.no_grad():
        for text in instructions:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
            states[text] = t5(ids).last_hidden_state[0].cpu()
    return states


def _word_vectors(text):
    """Return f32 [number of words, WORD_SIZE]: normal numbers that are a function of each word, in lower case."""
    vectors = [np.random.default_rng(list(word.encode())).normal(size=WORD_SIZE) for word in text.lower().split()]
    return torch.tensor(np.array(vectors).reshape(-1, WORD_SIZE), dtype=torch.float32)


def pad_text(states, length):
    """Return one instruction's states [n, width] as [length, width], and bool [length], False where that is padding."""
    return F.pad(states, (0, 0, 0, length - len(states))), torch.arange(length) < len(states)


def stack_texts(states, device):
    """Return the states of some instructions, a list of B [n, width], as text [B, longest, width] and its mask.

    The mask, bool [B, longest], is False where that is padding.
    """
    longest = max(map(len, states))
    padded, masks = zip(*(pad_text(each, longest) for each in states), strict=True)
    return torch.stack(padded).to(device), torch.stack(masks).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Frames -> codes


@dataclass(kw_only=True)
class LamSizes:
    """Sizes of a `LatentActionModel`, and what its codes mean."""

    stage: Literal[0, 1, 2] = 0
    """0: one model, no text; UniVLA's two: 1 (task-irrelevant codes, given the text) and 2 (task-centric codes)"""
    camera: str = ""
    """camera whose frames are used, by its name in the description of the data (default: the main one)"""
    delta: int = 32
    """frames between the two images of a latent action"""
    features: str = "pixels"
    """frozen frame features: pixels, or a DINOv2 with registers (checkpoint directory or hub id)"""
    image_size: int = 48
    """side to which frames are resized, pixels (DINOv2: 224)"""
    patch_size: int = 8
    """side of a patch of pixels (DINOv2 has its own)"""
    text: str = "words"
    """how stage 1 encodes instructions: words (fixed random vectors) or a T5 (checkpoint directory or hub id)"""
    width: int = 64
    """width of encoder and decoder (paper: 768)"""
    num_blocks: int = 2
    """blocks of the encoder, and of the decoder (paper: 12)"""
    heads: int = 4
    """heads of each attention (paper: 12)"""
    codes_per_step: int = 4
    """codes of one latent action"""
    num_codes: int = 16
    """codes in a codebook"""
    code_dim: int = 32
    """width of a code (paper: 128)"""
    codebook: Literal[tuple(QUANTISERS)] = "ema"
    """how codes follow the encoder: running means, or gradient descent on their distance (UniVLA)"""
    patience: int = 10
    """updates after which an unused code restarts"""
    predict_change: bool = True
    """the decoder predicts the change of the patches, so that it starts as a copy (UniVLA: the patches)"""
    centre: bool = True
    """normalise the encoder's outputs, and subtract each code position's running mean from c (UniVLA: neither)"""


class CodeSet(nn.Module):
    """P queries to the encoder, the quantiser of its outputs, and the projection of the codes for the decoder."""

    def __init__(self, sizes, feature_size, seed):
        """feature_size: F; seed: of the quantiser."""
        super().__init__()
        self.queries = nn.Parameter(torch.empty(sizes.codes_per_step, feature_size).uniform_(-1, 1))  # [P, F]
        self.project = nn.Linear(sizes.width, sizes.code_dim)
        self.up = nn.Linear(sizes.code_dim, sizes.width)
        make_quantiser = QUANTISERS[sizes.codebook]
        self.quantiser = make_quantiser(sizes.num_codes, sizes.code_dim, patience=sizes.patience, seed=seed)
        self.norm = nn.LayerNorm(sizes.width) if sizes.centre else nn.Identity()
        self.centring = sizes.centre
        self.register_buffer("centre", torch.zeros(sizes.codes_per_step, sizes.code_dim))

    def vectors(self, outputs):
        """Return c [B, P, d], before quantisation, of the encoder's outputs [B, P, D] at the queries."""
        c = self.project(self.norm(outputs))
        if self.training and self.centring:  # towards the mean of the global batch
            mean = all_mean(c.detach().mean(0))
            self.centre.lerp_(mean, (1 / (1 + self.quantiser.updates)).clamp(min=0.02))
        return c - self.centre


class ChunkHead(nn.Module):
    """Predicts a chunk of actions from the mean of a sample's code vectors; each embodiment has an output layer."""

    def __init__(self, code_dim, chunk, action_sizes):
        """code_dim: d; chunk: H; action_sizes: of each embodiment."""
        super().__init__()
        self.chunk = chunk
        self.action_sizes = action_sizes
        self.hidden = nn.Sequential(nn.Linear(code_dim, 128), nn.GELU())
        self.outs = nn.ModuleList(nn.Linear(128, chunk * size) for size in action_sizes)
        self.register_buffer("weights", padding_weights(action_sizes), persistent=False)  # [E]

    def forward(self, vectors, embodiment=None):
        """Map vectors f32 [B, d] to normalised actions f32 [B, H, A]. embodiment: i64 [B], of several."""
        x = self.hidden(vectors)
        parts = []
        for out, size in zip(self.outs, self.action_sizes, strict=True):
            actions = out(x).unflatten(1, (self.chunk, size))  # [B, H, size]
            parts.append(F.pad(actions, (0, max(self.action_sizes) - size)))
        return select_rows(parts, embodiment)


class LatentActionModel(nn.Module):
    """Frames o_t and o_{t+delta} -> P codes; from these and o_t, the patch features of o_{t+delta} are predicted.

    Stage 2 has two sets of codes: `codes`, the task-centric ones, which are exported, and `irrelevant`, those of stage
    1 with their codebook frozen. The other stages have `codes` alone.
    """

    def __init__(self, sizes, text_size=0, chunk=0, action_sizes=(), seed=0, features_config=None):
        """Build the model of `sizes`.

        text_size: width of the instructions' states, for stage 1; chunk: H, actions that the action head predicts;
        action_sizes: of each embodiment (none: no head, as in a saved model); seed: of the quantisers; features_config:
        of a DINOv2 whose weights will be loaded.
        """
        super().__init__()
        self.features = build_features(sizes, features_config).requires_grad_(False)
        self.sizes = sizes
        self.config = {"sizes": asdict(sizes), "text_size": text_size}
        self.config["features_config"] = getattr(self.features, "config", None)
        size, width = self.features.size, sizes.width
        self.codes = CodeSet(sizes, size, seed)
        self.irrelevant = CodeSet(sizes, size, seed) if sizes.stage == 2 else None
        self.code_sets = [self.codes] if self.irrelevant is None else [self.codes, self.irrelevant]
        length = sizes.codes_per_step * len(self.code_sets) + self.features.patches
        blocks = width, sizes.heads, sizes.num_blocks
        normalise = sizes.features != "pixels"  # a layer norm would remove the brightness of a patch
        self.encoder = Transformer(size, length, *blocks, temporal=True, normalise=normalise)
        self.patch_up = nn.Linear(size, width)
        self.out = nn.Linear(width, size)
        self.decoder = Transformer(width, length, *blocks)
        self.text_up = nn.Linear(text_size, width) if sizes.stage == 1 else None
        self.action_head = ChunkHead(sizes.code_dim, chunk, action_sizes) if action_sizes else None
        if sizes.predict_change:  # at first, predict no change
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        if sizes.stage == 2:
            self.irrelevant.quantiser.freeze()

    @property
    def num_codes(self):
        """Codes in the codebook, K."""
        return self.sizes.num_codes

    def train(self, mode=True):
        """Set the training mode and return the model; the frozen features stay in evaluation mode, without dropout."""
        super().train(mode)
        self.features.eval()
        return self

    def _text_tokens(self, text, text_mask):
        """Return (projected text [B, n, D], its mask bool [B, n]) for stage 1, else ()."""
        return () if self.text_up is None else (self.text_up(text), text_mask)

    def vectors(self, features_a, features_b, text=None, text_mask=None):
        """Return, for each set of codes, c [B, P, d] before quantisation, of patch features [B, N, F] of both frames.

        features_a: of o_t; features_b: of o_{t+delta}. Stage 1 needs text f32 [B, n, text_size] and text_mask bool
        [B, n], False where that is padding.
        """
        queries = torch.cat([code_set.queries for code_set in self.code_sets])  # [Q, F]
        queries = queries.expand(len(features_a), 2, -1, -1)  # [B, T, Q, F]
        x = torch.cat([queries, torch.stack([features_a, features_b], 1)], 2)  # [B, T, Q + N, F]
        with autocast(x.device):
            x = self.encoder(x, queries.shape[2], *self._text_tokens(text, text_mask))  # [B, T, Q, D]
        outputs = x[:, 1].float().chunk(len(self.code_sets), 1)  # [B, P, D] each, at the later frame
        return [code_set.vectors(part) for code_set, part in zip(self.code_sets, outputs, strict=True)]

    def encode(self, features_a, features_b, text=None, text_mask=None):
        """Return the exported codes i64 [B, P] and their c f32 [B, P, d]; arguments as for `vectors`."""
        vectors = self.vectors(features_a, features_b, text, text_mask)[0]
        return self.codes.quantiser.nearest(vectors), vectors

    def predict(self, features_a, quantised, text=None, text_mask=None):
        """Return predicted patch features f32 [B, N, F] of o_{t+delta} from those of o_t and the code vectors.

        quantised: [B, P, d] for each set of codes; the rest as for `vectors`.
        """
        with autocast(features_a.device):
            x = [code_set.up(part) for code_set, part in zip(self.code_sets, quantised, strict=True)]  # [B, P, D] each
            x = torch.cat([*x, self.patch_up(features_a)], 1)[:, None]  # [B, 1, Q + N, D]
            x = self.decoder(x, x.shape[2], *self._text_tokens(text, text_mask))  # [B, 1, Q + N, D]
            change = self.out(x[:, 0, -features_a.shape[1] :]).float()  # [B, N, F]
        return features_a + change if self.sizes.predict_change else change

    def forward(self, batch):
        """Return the losses of a batch of `FramePairs` as scalars, and the exported `codes` i64 [B, P].

        batch: frames u8 [B, 2, h, w, 3]; for stage 1 text f32 [B, n, text_size] and text_mask bool [B, n]; with an
        action head actions f32 [B, H, A] normalised, valid bool [B, H], weight f32 [B] and, of several embodiments,
        embodiment i64 [B]. loss = reconstruction_loss + quantisation_loss + 0.5 action_loss, the last a mean over each
        sample's own dimensions. copy_error is the reconstruction loss of predicting no change.
        """
        text = batch.get("text"), batch.get("text_mask")
        features = self.features(batch["frames"].flatten(0, 1))  # [2 B, N, F]
        a, b = features.unflatten(0, (-1, 2)).unbind(1)  # [B, N, F] each
        vectors = self.vectors(a, b, *text)
        results = [code_set.quantiser(c) for code_set, c in zip(self.code_sets, vectors, strict=True)]
        quantised, codes, quantisation = zip(*results, strict=True)
        losses = {
            "reconstruction_loss": F.mse_loss(self.predict(a, quantised, *text), b),
            "quantisation_loss": sum(quantisation),
            "copy_error": F.mse_loss(a, b),
        }
        loss = losses["reconstruction_loss"] + losses["quantisation_loss"]
        if self.action_head is not None:
            embodiment = batch.get("embodiment")
            predicted = self.action_head(quantised[0].mean(1), embodiment)  # [B, H, A]
            weight = batch["weight"][:, None] * sample_weights(self.action_head.weights, embodiment)  # [B, 1]
            losses["action_loss"] = masked_mse(predicted - batch["actions"], batch["valid"] * weight)
            loss = loss + ACTION_WEIGHT * losses["action_loss"]
        return {"loss": loss} | losses | {"codes": codes[0]}


def camera_name(sizes, dataset):
    """Return the name of the camera of a data set whose frames a model of `sizes` uses."""
    return sizes.camera or dataset.cameras[0]


def check_frames(sizes, dataset):
    """Raise ValueError when a data set lacks the camera, or has no two frames that are delta apart."""
    if camera_name(sizes, dataset) not in dataset.cameras:
        raise ValueError(
            f"camera is '{sizes.camera}', but {dataset.name} has {dataset.cameras}; train with another --camera"
        )
    longest = int(np.diff(dataset.starts).max())
    if sizes.delta >= longest:
        raise ValueError(
            f"delta is {sizes.delta}, but the longest episode of {dataset.name} has {longest} frames; train with a "
            "--delta that most episodes are a few times as long as"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Models on disk


def model_tensors(model):
    """Return {name: tensor} of all that encodes and decodes, frozen features included, the action head not."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith("action_head.")}


def build_model(kind, config):
    """Return the untrained model of a kind, "lam" or "tokenizer", from the entry "model" of its config.json."""
    if kind == "tokenizer":
        return ActionTokenizer(**config)
    return LatentActionModel(**config | {"sizes": LamSizes(**config["sizes"])})


def load_model(kind, path):
    """Return the frozen model in the folder `path`. Raise FileNotFoundError or ValueError when it holds no `kind`."""
    path = Path(path)
    remedy = f"Train one: python train_latent.py {kind} --data DIR --out DIR"
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path} is no {kind}: it has no {name}. {remedy}")
    config = read_json(path / "config.json")
    if config.get("kind") != kind:
        raise ValueError(f"{path} holds a '{config.get('kind', 'run')}' where a '{kind}' is needed. {remedy}")
    model = build_model(kind, config["model"])
    tensors, _ = load_tensors(path / "model.safetensors")
    load_tensors_into(model, model.state_dict(), tensors, path)
    return model.eval().requires_grad_(False)


def load_lam(path):
    """Return the frozen `LatentActionModel` in the folder `path`; raises as `load_model`."""
    return load_model("lam", path)


def load_tokenizer(path):
    """Return the frozen `ActionTokenizer` in the folder `path`; raises as `load_model`.

    dataset_statistics.json in the same folder holds the units of its actions.
    """
    return load_model("tokenizer", path)


def fingerprint(path):
    """Return a short hash of the saved model in the folder `path`: its sizes and its weights."""
    config = read_json(Path(path) / "config.json")
    digest = hashlib.sha256(json.dumps([config["kind"], config["model"]], sort_keys=True).encode())
    tensors, _ = load_tensors(Path(path) / "model.safetensors")
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def source_fingerprint(source):
    """Return `fingerprint` of a folder, or a short hash of the bytes of a checkpoint file."""
    if Path(source).is_dir():
        return fingerprint(source)
    return file_hash(source)
