"""Latent actions: what happens between two frames, and what a chunk of actions is, as a few discrete codes.

Implements the latent actions of "From Pixels to Tokens: A Systematic Study of Latent Action Supervision for
Vision-Language-Action Models" (arXiv 2605.04678), from the size that a CPU trains in minutes to the paper's:

    LatentActionModel   images: (o_t, o_{t+delta}) -> P codes, after UniVLA (arXiv 2505.06111), in two stages
    ActionTokenizer     actions: a chunk of H actions -> H codes

    python latent.py lam --stage 1 --data data/libero_tiny --out runs/lam1                           # 3 minutes
    python latent.py lam --stage 2 --init-from runs/lam1 --data data/libero_tiny --out runs/lam      # 3 minutes
    python latent.py label --data data/libero_tiny --lam runs/lam --out runs/labels.safetensors      # 5 seconds
    python latent.py tokenizer --data data/libero_tiny --out runs/tokenizer --chunk 8                # 1.5 minutes
    torchrun --nproc-per-node 8 latent.py lam --stage 1 --data DIR --out runs/lam1 --features DINOV2 --text T5 \\
        --image-size 224 --width 768 --num-blocks 12 --heads 12 --code-dim 128                       # the paper's size
    python latent.py lam --stage 2 --init-from FILE.ckpt --max-steps 0 --no-predict-change --no-centre \\
        --data DIR --out runs/univla --features DINOV2 --image-size 224 --width 768 --num-blocks 12 --heads 12 \\
        --code-dim 128                                                       # a checkpoint of UniVLA, to label with

Which stage when. Stage 1 is given the instruction, so its codes hold what the instruction does not tell: the camera,
the background, other people. Stage 2 keeps that codebook, loses the text, and puts what the task changes into codes of
its own; these are the ones to label with. Stage 0, one model without text, takes half the time and is a fair start
where nothing moves but the robot. Train until the reconstruction loss in log.jsonl no longer falls (the embedded data:
1 000 steps; UniVLA's stage 1: 100 000), then ask probe.py whether the codes are good enough; it says what its numbers
should be.

All share one quantiser, whose codes stay alive: initialised from data, moved by EMA or gradient descent, restarted
when unused. Departures from UniVLA, which two flags undo: the decoder predicts the change of the patches, so that it
starts as a copy of the current frame; and the encoder's answers are normalised and centred for each code position, so
that all positions share the whole codebook and c points different ways for different motions (stage 1 of
data/libero_tiny, held-out episodes: 13 to 14 of 16 codes in use at each position, against 4 to 7 without the norm).
Also, stage 2 starts from all of stage 1, not from its codebook and queries alone.

Axes: B batch, H chunk steps, A action size, P codes per step, K codebook size, d width of a code, D width of a
transformer, L tokens, N patches of a frame, F features of a patch, T frames (2), S steps of a data set.
"""

import functools
import hashlib
import json
import pickle
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from data import (
    CACHE,
    StepBatches,
    Steps,
    action_chunk,
    later,
    normalise,
    open_index,
    open_indices,
    split_episodes,
    standardise,
    statistics,
)

COMMITMENT = 0.25  # weight of the commitment loss
CONSISTENCY = 0.03  # weight of the tokenizer's consistency loss; the paper gives none, and more costs reconstruction
ACTION = 0.5  # weight of the action head's loss
MASKED = 0.15  # share of the latents that the tokenizer's consistency loss hides
REFIT = 0.7  # share of its training after which the tokenizer's codebook is put on k-means of its latents
WEIGHT_DECAY = 0.01
WORD_SIZE = 64  # width of the fixed random vectors of words
CHUNKS = 4096  # chunks, at most, of which k-means are taken
MEASURED = 1024  # held-out samples, at most, that a model is measured on after training
PART = 32  # episodes in one part of a labelling that can be continued


# ----------------------------------------------------------------------------------------------------------------------
# Vector quantisation


class Quantiser(nn.Module):
    """Nearest code with a straight-through gradient to the encoder; a codebook that follows what the encoder says.

    learn "ema": each code is the running mean of what chose it (van den Oord et al., arXiv 1711.00937, appendix A).
    learn "loss": the codebook is a parameter, drawn to what chose it by its squared distance (same paper, equation 3).
    Either way codes start on encoder outputs of the first batch (EMA: with count 1 and matching sum), and a code that
    nothing chose for `patience` updates is put on an encoder output again. Every process ends with the same codebook,
    and n processes with that of one: counts and sums are added up over them, initialisation and restarts draw from
    their common batch with a generator keyed by (seed, updates).
    """

    def __init__(self, num_codes, dim, learn="ema", decay=0.99, patience=50, seed=0):
        super().__init__()
        self.num_codes, self.learn, self.decay, self.patience, self.seed = num_codes, learn, decay, patience, seed
        self.frozen = False
        if learn == "loss":
            self.codebook = nn.Parameter(torch.zeros(num_codes, dim))
        else:
            self.register_buffer("codebook", torch.zeros(num_codes, dim))
            self.register_buffer("sums", torch.zeros(num_codes, dim))  # running sum of the vectors of each code ...
            self.register_buffer("counts", torch.zeros(num_codes))  # ... and their running number
        self.register_buffer("unused", torch.zeros(num_codes, dtype=torch.long))  # updates since a code was last chosen
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def start_at(self, codebook):
        """Puts the codes on `codebook` [K, d], instead of on the first batch."""
        with torch.no_grad():
            self.codebook.copy_(codebook)
            self.updates.clamp_(min=1)
            self.unused.zero_()
            if self.learn == "ema":
                self.sums.copy_(codebook), self.counts.fill_(1.0)

    def freeze(self):
        """Keeps the codebook as it is from now on; the encoder is still drawn to it."""
        self.frozen = True
        self.requires_grad_(False)

    @torch.no_grad()
    def nearest(self, x):
        """The codes i64 [...] of x [..., d], by Euclidean distance; the same whatever else is in the batch."""
        distance = torch.cdist(x.flatten(0, -2), self.codebook, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.argmin(-1).view(x.shape[:-1])

    def straight_through(self, x, codes):
        """The vectors of `codes`, [..., d]; their gradient goes to x unchanged."""
        return x + (self.codebook[codes] - x).detach()

    def forward(self, x, valid=None):
        """x f32 [B, n, d], valid bool [B, n] (default: all) -> vectors [B, n, d], codes i64 [B, n], loss.

        The loss is 0.25 x commitment (the encoder's distance to its codes), with learn "loss" + the codes' to it.
        """
        valid = x.new_ones(x.shape[:-1]) if valid is None else valid.to(x.dtype)
        learning = self.training and not self.frozen
        if learning and self.updates == 0:
            self._place(torch.ones_like(self.unused, dtype=torch.bool), x.detach(), valid)
        codes = self.nearest(x)
        vectors, loss = self.straight_through(x, codes), masked_mean(x - self.codebook[codes].detach(), valid)
        loss = COMMITMENT * loss
        if self.learn == "loss" and not self.frozen:
            loss = loss + masked_mean(x.detach() - self.codebook[codes], valid)
        if learning:
            self._update(x.detach(), codes, valid)
        return vectors, codes, loss

    @torch.no_grad()
    def _update(self, x, codes, valid):
        chosen = (F.one_hot(codes, self.num_codes) * valid[..., None]).flatten(0, 1)  # [B * n, K]
        hits = common.all_sum(chosen.sum(0))  # [K]
        if self.learn == "ema":
            self.counts.lerp_(hits, 1 - self.decay)
            self.sums.lerp_(common.all_sum(chosen.T @ x.flatten(0, 1)), 1 - self.decay)  # [K, d]
            self.codebook.copy_(self.sums / self.counts[:, None])
        self.unused.copy_(torch.where(hits > 0, 0, self.unused + 1))
        self.updates += 1
        dead = self.unused >= self.patience
        if dead.any():
            self._place(dead, x, valid)

    @torch.no_grad()
    def _place(self, which, x, valid):
        """Puts the codes `which` (bool [K]) on distinct vectors of the global batch (repeated if there are too few)."""
        pool = gather(torch.cat([x, valid[..., None]], -1)).flatten(0, 1)  # [all, d + 1]
        pool = pool[pool[:, -1] > 0, :-1]
        order = np.random.default_rng([self.seed, int(self.updates)]).permutation(len(pool))
        self.codebook[which], self.unused[which] = pool[np.resize(order, int(which.sum()))], 0
        if self.learn == "ema":
            self.sums[which], self.counts[which] = self.codebook[which], 1.0


def kmeans(x, count, seed=0, rounds=20):
    """`count` means of x [n, d], [count, d]: k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's rounds."""
    rng, means = np.random.default_rng(seed), x.new_empty(count, x.shape[1])
    nearest = x.new_ones(len(x))  # squared distance to the nearest mean so far; the first is drawn uniformly
    for number in range(count):
        chance = nearest.double().cpu().numpy() + 1e-12  # where x has fewer distinct rows than means
        means[number] = x[rng.choice(len(x), p=chance / chance.sum())]
        distance = (x - means[number]).square().sum(1)
        nearest = torch.minimum(nearest, distance) if number else distance
    for _ in range(rounds):
        codes = torch.cdist(x, means).argmin(1)
        hits, sums = torch.bincount(codes, minlength=count)[:, None], torch.zeros_like(means).index_add_(0, codes, x)
        means = torch.where(hits > 0, sums / hits.clamp(min=1), means)
    return means


def gather(x):
    """The global batch [world * B, ...] from every process's x [B, ...]; process r holds the rows r::world of it."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def masked_mean(error, valid):
    """Sum of error² over valid entries / number of ALL entries: a constant, so that n processes average to one's."""
    return (error.square() * valid[..., None]).mean()


def code_counts(codes, num_codes):
    """Of codes i64 [n, P]: how often each occurs at each position, i64 [P, K]."""
    return F.one_hot(codes, num_codes).sum(0)


def code_usage(counts):
    """Of `code_counts`: (number of codes in use, perplexity = exp of the entropy), each [P]."""
    share = counts / counts.sum(-1, keepdim=True)
    return (counts > 0).sum(-1), torch.special.entr(share).sum(-1).exp()


# ----------------------------------------------------------------------------------------------------------------------
# Transformer parts


class Attention(nn.Module):
    """Pre-norm self-attention over the last axis but one, with its residual; no bias in q, k, v. x: [..., L, D]"""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x, keys=None, causal=False, rows=None):
        """keys: bool [..., L] like x, False where a token is padding and not looked at (default: none is).
        rows: only the first so many tokens look, and are returned (default: all)."""
        y = self.norm(x).flatten(0, -3)  # [n, L, D]
        q_weight, kv_weight = self.qkv.weight.tensor_split([x.shape[-1]])
        q, kv = F.linear(y[:, :rows], q_weight), F.linear(y, kv_weight)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [n, heads, rows, D / heads]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, L, D / heads] each
        mask = None if keys is None else keys.flatten(0, -2)[:, None, None]  # [n, 1, 1, L]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x[..., :rows, :]
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention within a frame, then (temporal) causally over the frames, then an MLP. x: [B, L, D] or [B, T, L, D]"""

    def __init__(self, width, heads, hidden, temporal=False):
        super().__init__()
        self.spatial, self.temporal = Attention(width, heads), Attention(width, heads) if temporal else None
        layers = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x, keys=None, rows=None):
        """keys and rows: as of `Attention`, within a frame."""
        x = self.spatial(x, keys, rows=rows)
        if self.temporal is not None:
            x = self.temporal(x.transpose(1, 2), causal=True).transpose(1, 2)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Tokens of any width: embedded, with positions, joined by text tokens, through the blocks."""

    def __init__(self, size_in, length, width, heads, num_blocks, temporal=False, normalise=True):
        """length: L without text; normalise: with a layer norm before the embedding."""
        super().__init__()
        norm = nn.LayerNorm(size_in) if normalise else nn.Identity()
        self.embed = nn.Sequential(norm, nn.Linear(size_in, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, temporal) for _ in range(num_blocks))
        self.register_buffer("positions", sinusoids(length, width), persistent=False)

    def forward(self, x, rows, text=None, known=None):
        """x [B, T, L, in]; text [B, n, D], of which the tokens known (bool [B, n]) are real -> [B, T, rows, D]

        Only the first `rows` tokens are wanted, so the last block computes no others.
        """
        x, keys = self.embed(x) + self.positions, None
        if text is not None:
            text, known = (part[:, None].expand(-1, x.shape[1], *part.shape[1:]) for part in (text, known))
            x, keys = torch.cat([x, text], 2), torch.cat([known.new_ones(x.shape[:3]), known], 2)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, keys, rows if number == len(self.blocks) else None)
        return x


def sinusoids(length, width):
    """Fixed positions f32 [length, width]: of each geometric wavelength, up to 10 000 x 2 pi, a sine and a cosine."""
    angle = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# Actions -> codes


class ActionTokenizer(nn.Module):
    """A chunk of H normalised actions <-> H codes, one per step (the paper's action-based latent actions).

    What mixes the steps (convolutions, attention, the FFT) starts at zero, so that at first a latent is a linear map of
    its own action and close actions have close latents; late in training the codebook is put on k-means of the latents
    once; and there are no positions and no last norm. tests/BENCHMARKS.md says what each is worth.
    """

    def __init__(self, chunk, action_size, num_codes=256, dim=128, patience=50, seed=0):
        super().__init__()
        self.config = {"chunk": chunk, "action_size": action_size, "num_codes": num_codes, "dim": dim}
        self.num_codes, self.dim = num_codes, dim
        self.project = nn.Linear(3 * action_size, dim)
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=apart, dilation=apart) for apart in (1, 2, 4))
        self.blocks = nn.Sequential(*(Block(dim, 4, hidden=256) for _ in range(2)))
        self.quantiser = Quantiser(num_codes, dim, patience=patience, seed=seed)
        self.decoder = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, action_size))
        with torch.no_grad():
            self.project.weight[:, action_size:] = 0
            branches = [*self.convs, *(part for block in self.blocks for part in (block.spatial.out, block.mlp[3]))]
            for layer in branches:
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def vectors(self, actions):
        """[B, H, A] -> the encoder's output [B, H, d], before quantisation."""
        x = self.project(fourier_features(actions)).transpose(1, 2)  # [B, d, H]
        for conv in self.convs:
            x = x + F.gelu(conv(x))
        return self.blocks(x.transpose(1, 2))  # [B, H, d]

    @torch.no_grad()
    def refit(self, samples):
        """Puts the codebook on k-means of the latents of the first samples; the same on every process."""
        loader = DataLoader(samples, 64, sampler=range(min(samples.epoch_length, CHUNKS)))
        batches = (common.to_device(batch, self.project.weight.device) for batch in loader)
        latents = [self.encode(batch["actions"], batch["valid"])[1][batch["valid"]] for batch in batches]  # [n, d] each
        means = kmeans(torch.cat(latents), self.num_codes, self.quantiser.seed)
        self.quantiser.start_at(common.broadcast(means))

    def encode(self, actions, valid=None):
        """f32 [B, H, A] normalised -> codes i64 [B, H], vectors f32 [B, H, d]. Steps that are not valid count as 0."""
        vectors = self.vectors(actions if valid is None else actions * valid[..., None])
        return self.quantiser.nearest(vectors), vectors

    def decode(self, codes):
        """codes i64 [B, H] -> normalised actions f32 [B, H, A]"""
        return self.decoder(self.quantiser.codebook[codes])

    def forward(self, batch):
        """Of `MaskedChunks`: actions f32 [B, H, A] normalised; valid bool [B, H]; masked bool [B, H].

        Returns scalars `loss` = reconstruction_loss + quantisation_loss + 0.03 consistency_loss, and the `codes`
        [n, 1] of the valid steps. Consistency: with the masked latents zeroed, the decoded actions are encoded again,
        and at the masked steps that must give the encoding of the true actions.
        """
        actions, valid, masked = batch["actions"], batch["valid"], batch["masked"]
        actions = actions * valid[..., None]
        latents = self.vectors(actions)
        quantised, codes, quantisation = self.quantiser(latents, valid)
        reconstruction = masked_mean(self.decoder(quantised) - actions, valid)
        hidden = latents * ~masked[..., None]
        guess = self.decoder(self.quantiser.straight_through(hidden, self.quantiser.nearest(hidden)))
        again = self.vectors(guess * valid[..., None])
        consistency = masked_mean(again - latents.detach(), valid & masked)
        return {
            "loss": reconstruction + quantisation + CONSISTENCY * consistency,
            "reconstruction_loss": reconstruction,
            "quantisation_loss": quantisation,
            "consistency_loss": consistency,
            "codes": codes[valid][:, None],
        }


def fourier_features(actions):
    """[B, H, A] -> [B, H, 3 A]: the actions, and the real and the imaginary part of their FFT over time."""
    spectrum = torch.fft.fft(actions, dim=1)
    return torch.cat([actions, spectrum.real, spectrum.imag], -1)


class MaskedChunks(Steps):
    """The training samples of an `ActionTokenizer`: actions f32 [H, A] normalised; valid bool [H], False past the end
    of the episode; masked bool [H], the steps that the consistency loss hides, keyed by (seed, draw)."""

    def __init__(self, indices, stats, chunk, seed=0, episodes=None):
        super().__init__(indices, seed, episodes=episodes)
        self.chunk, pairs = chunk, zip(indices, stats, strict=True)
        self.actions = [normalise(standardise(index.columns["action"]), own["action"]) for index, own in pairs]

    def __getitem__(self, position):
        draws = np.random.default_rng([self.seed, 3, position]).random(self.chunk)
        return super().__getitem__(position) | {"masked": torch.from_numpy(draws < MASKED)}

    def sample(self, number, step):
        actions, valid, _ = action_chunk(self.actions[number], self.indices[number].starts, step, self.chunk)
        return {"actions": torch.from_numpy(actions), "valid": torch.from_numpy(valid)}


# ----------------------------------------------------------------------------------------------------------------------
# Frames -> codes


class PixelPatches(nn.Module):
    """Frozen frame features without a network: the frame at `image_size`, cut into patches of normalised pixels."""

    def __init__(self, image_size, patch_size):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size}, which patch_size {patch_size} does not divide; change one")
        self.image_size, self.patch_size = image_size, patch_size
        self.patches, self.size = (image_size // patch_size) ** 2, 3 * patch_size**2  # N, F

    def read(self, image):
        """u8 [h, w, 3] as stored -> u8 [image_size, image_size, 3], by area."""
        return np.asarray(Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BOX))

    def forward(self, frames):
        """u8 [B, image_size, image_size, 3] -> f32 [B, N, F] in [-1, 1], patches in reading order"""
        p, n = self.patch_size, self.image_size // self.patch_size
        pixels = frames.float().div(127.5).sub(1).view(-1, n, p, n, p, 3)
        return pixels.transpose(2, 3).reshape(len(frames), n * n, p * p * 3)  # [B, N, F]


class DinoPatches(nn.Module):
    """Frozen patch tokens of DINOv2 with registers (arXiv 2309.16588), after its final norm."""

    def __init__(self, image_size, source, config=None):
        """source: checkpoint directory or hub id; with a config only its architecture, for weights to be loaded."""
        super().__init__()
        from transformers import AutoConfig, Dinov2WithRegistersConfig, Dinov2WithRegistersModel  # slow to import

        found = Dinov2WithRegistersConfig(**config) if config else AutoConfig.from_pretrained(source)
        if found.model_type != "dinov2_with_registers":
            raise ValueError(f"features {source} is a '{found.model_type}'; it must be pixels or DINOv2 with registers")
        if image_size % found.patch_size:
            raise ValueError(
                f"image_size is {image_size}; {source} needs a multiple of {found.patch_size} (paper: 224)"
            )
        load = functools.partial(Dinov2WithRegistersModel.from_pretrained, source, dtype=torch.float32)
        self.net = Dinov2WithRegistersModel(found) if config else load()
        self.config, self.image_size, self.prefix = found.to_dict(), image_size, 1 + found.num_register_tokens
        self.patches, self.size = (image_size // found.patch_size) ** 2, found.hidden_size  # N, F
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)  # ImageNet's
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def read(self, image):
        """u8 [h, w, 3] as stored -> u8 [image_size, image_size, 3], bicubic."""
        return np.asarray(Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))

    @torch.no_grad()
    def forward(self, frames):
        """u8 [B, image_size, image_size, 3] -> f32 [B, N, F]"""
        pixels = (frames.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std  # [B, 3, h, w]
        with common.autocast(pixels.device):
            return self.net(pixels).last_hidden_state[:, self.prefix :].float()


def text_states(source, instructions, device="cpu"):
    """{instruction: f32 [n tokens, width]} of some texts, computed once.

    source: "words", a fixed random vector for each word, or a T5 (checkpoint directory or hub id), whose encoder's last
    states they are. An empty instruction has no words; T5 gives it one state, of its end token.
    """
    instructions = sorted(set(instructions))
    if source == "words":
        draw = lambda word: np.random.default_rng(list(word.encode())).normal(size=WORD_SIZE)  # noqa: E731
        rows = ([draw(word) for word in text.lower().split()] for text in instructions)
        found = [torch.tensor(np.array(row).reshape(-1, WORD_SIZE), dtype=torch.float32) for row in rows]
    else:
        from transformers import AutoTokenizer, T5EncoderModel

        tokenizer = AutoTokenizer.from_pretrained(source)
        t5 = T5EncoderModel.from_pretrained(source, dtype=torch.float32).to(device)
        with torch.no_grad():
            ids = (tokenizer(text, return_tensors="pt")["input_ids"].to(device) for text in instructions)
            found = [t5(row).last_hidden_state[0].cpu() for row in ids]
    return dict(zip(instructions, found, strict=True))


def pad_text(states, length):
    """One text's states [n, width] -> [length, width], and which are real, bool [length]."""
    return F.pad(states, (0, 0, 0, length - len(states))), torch.arange(length) < len(states)


@dataclass(kw_only=True)
class LamSizes:
    """What a `LatentActionModel` is made of, and what its codes mean."""

    stage: Literal[0, 1, 2] = 0
    """0: one model, no text; UniVLA's two: 1 (task-irrelevant codes, given the text) and 2 (task-centric codes)"""
    camera: str = "image"
    """camera whose frames are used"""
    delta: int = 32
    """frames between the two images of a latent action"""
    features: str = "pixels"
    """frozen frame features: pixels, or a DINOv2 with registers (checkpoint directory or hub id)"""
    image_size: int = 48
    """side to which frames are resized, pixels (DINOv2: 224)"""
    patch_size: int = 8
    """side of a patch of pixels (DINOv2 has its own)"""
    text: str = "words"
    """how stage 1 reads instructions: words (fixed random vectors) or a T5 (checkpoint directory or hub id)"""
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
    codebook: Literal["ema", "loss"] = "ema"
    """how codes follow the encoder: running means, or gradient descent on their distance (UniVLA)"""
    patience: int = 10
    """updates after which a code that nothing chose is restarted"""
    predict_change: bool = True
    """the decoder predicts the change of the patches, so that it starts as a copy (UniVLA: the patches)"""
    centre: bool = True
    """normalise the encoder's answers, and subtract each code position's running mean from c (UniVLA: neither)"""


class CodeSet(nn.Module):
    """P queries to the encoder, the codebook for its answers, and what the decoder sees of them."""

    def __init__(self, sizes, feature_size, seed):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(sizes.codes_per_step, feature_size).uniform_(-1, 1))  # [P, F]
        self.project, self.up = nn.Linear(sizes.width, sizes.code_dim), nn.Linear(sizes.code_dim, sizes.width)
        self.quantiser = Quantiser(sizes.num_codes, sizes.code_dim, sizes.codebook, patience=sizes.patience, seed=seed)
        self.norm = nn.LayerNorm(sizes.width) if sizes.centre else nn.Identity()
        self.centring = sizes.centre
        self.register_buffer("centre", torch.zeros(sizes.codes_per_step, sizes.code_dim))

    def vectors(self, answers):
        """The encoder's answers [B, P, D] -> c [B, P, d], before quantisation."""
        c = self.project(self.norm(answers))
        if self.training and self.centring:  # towards the mean of the global batch
            mean = common.all_mean(c.detach().mean(0))
            self.centre.lerp_(mean, max(0.02, 1 / (1 + int(self.quantiser.updates))))
        return c - self.centre


class LatentActionModel(nn.Module):
    """Frames o_t and o_{t+delta} -> P codes, from which and o_t the patch features of o_{t+delta} are predicted.

    Stage 2 has two sets of codes: `codes`, the task-centric ones, which are exported, and `irrelevant`, those of stage
    1 with their codebook frozen. Otherwise `codes` is the only one.
    """

    def __init__(self, sizes, text_size=0, head_size=0, seed=0, features_config=None):
        """text_size: width of the text states of stage 1; head_size: numbers that the action head predicts, chunk x
        action size, 0: no head, as in a saved model; features_config: of a DINOv2 whose weights will be loaded."""
        super().__init__()
        self.features = build_features(sizes, features_config).requires_grad_(False)
        self.sizes, self.config = sizes, {"sizes": asdict(sizes), "text_size": text_size}
        self.config["features_config"] = getattr(self.features, "config", None)
        size, width, blocks = self.features.size, sizes.width, (sizes.width, sizes.heads, sizes.num_blocks)
        self.codes = CodeSet(sizes, size, seed)
        self.irrelevant = CodeSet(sizes, size, seed) if sizes.stage == 2 else None
        self.sets = [part for part in (self.codes, self.irrelevant) if part is not None]
        length = sizes.codes_per_step * len(self.sets) + self.features.patches
        normalise = sizes.features != "pixels"  # a layer norm would remove the brightness of a patch
        self.encoder = Transformer(size, length, *blocks, temporal=True, normalise=normalise)
        self.patch_up, self.out = nn.Linear(size, width), nn.Linear(width, size)
        self.decoder = Transformer(width, length, *blocks)
        self.text_up = nn.Linear(text_size, width) if sizes.stage == 1 else None
        self.action_head = None
        if head_size:
            self.action_head = nn.Sequential(nn.Linear(sizes.code_dim, 128), nn.GELU(), nn.Linear(128, head_size))
        if sizes.predict_change:
            nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)  # at first, predict no change
        if sizes.stage == 2:
            self.irrelevant.quantiser.freeze()

    @property
    def num_codes(self):
        return self.sizes.num_codes

    def train(self, mode=True):
        """As of every module, but the frozen features never drop anything."""
        super().train(mode)
        self.features.eval()
        return self

    def _words(self, text, known):
        """Of stage 1: the projected text [B, n, D] and which of its tokens are real; else nothing."""
        return () if self.text_up is None else (self.text_up(text), known)

    def vectors(self, features_a, features_b, text=None, known=None):
        """Patch features [B, N, F] of o_t and o_{t+delta} -> of each set of codes c [B, P, d], before quantisation.

        text f32 [B, n, text_size] and known bool [B, n], its real tokens, are for stage 1.
        """
        queries = torch.cat([part.queries for part in self.sets]).expand(len(features_a), 2, -1, -1)  # [B, T, Q, F]
        x = torch.cat([queries, torch.stack([features_a, features_b], 1)], 2)  # [B, T, Q + N, F]
        with common.autocast(x.device):
            x = self.encoder(x, queries.shape[2], *self._words(text, known))  # [B, T, Q, D]
        answers = x[:, 1].float().chunk(len(self.sets), 1)  # [B, P, D] each, read at the later frame
        return [part.vectors(answer) for part, answer in zip(self.sets, answers, strict=True)]

    def encode(self, features_a, features_b, text=None, known=None):
        """As `vectors`, of the exported codes: codes i64 [B, P], c f32 [B, P, d]."""
        vectors = self.vectors(features_a, features_b, text, known)[0]
        return self.codes.quantiser.nearest(vectors), vectors

    def predict(self, features_a, quantised, text=None, known=None):
        """Patch features [B, N, F] of o_t and code vectors [B, P, d] of each set -> those of o_{t+delta} [B, N, F]."""
        with common.autocast(features_a.device):
            x = [part.up(vectors) for part, vectors in zip(self.sets, quantised, strict=True)]  # [B, P, D] each
            x = torch.cat([*x, self.patch_up(features_a)], 1)[:, None]  # [B, 1, Q + N, D]
            x = self.decoder(x, x.shape[2], *self._words(text, known))[:, 0, -features_a.shape[1] :]  # [B, N, D]
            change = self.out(x).float()  # [B, N, F]
        return features_a + change if self.sizes.predict_change else change

    def forward(self, batch):
        """Of `FramePairs`: frames u8 [B, 2, h, w, 3]; of stage 1 text and known; with an action head actions f32
        [B, H, A] normalised, valid bool [B, H] and weight f32 [B].

        Returns scalars `loss` = reconstruction_loss + quantisation_loss + 0.5 action_loss, `copy_error` (the
        reconstruction loss of predicting no change), and `codes` i64 [B, P], the exported ones.
        """
        text = batch.get("text"), batch.get("known")
        a, b = self.features(batch["frames"].flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)  # [B, N, F] each
        found = [part.quantiser(c) for part, c in zip(self.sets, self.vectors(a, b, *text), strict=True)]
        quantised, codes, quantisation = zip(*found, strict=True)
        result = {"reconstruction_loss": F.mse_loss(self.predict(a, quantised, *text), b)}
        result |= {"quantisation_loss": sum(quantisation), "copy_error": F.mse_loss(a, b), "codes": codes[0]}
        loss = result["reconstruction_loss"] + result["quantisation_loss"]
        if self.action_head is not None:
            guess = self.action_head(quantised[0].mean(1)).view_as(batch["actions"])
            valid = batch["valid"] * batch["weight"][:, None]
            result["action_loss"] = masked_mean(guess - batch["actions"], valid)
            loss = loss + ACTION * result["action_loss"]
        return {"loss": loss} | result


def build_features(sizes, config=None):
    """The frozen frame features that `sizes` names."""
    if sizes.features == "pixels":
        return PixelPatches(sizes.image_size, sizes.patch_size)
    return DinoPatches(sizes.image_size, sizes.features, config)


class FramePairs(Steps):
    """The training samples of a `LatentActionModel`; video without actions is enough. Each item holds

    frames   u8 [2, h, w, 3], o_t and o_{t+delta} (near its end: the episode's last) in the size that the features read
    text     f32 [n, width] and known bool [n], with `texts`: the instruction's states, padded
    actions  f32 [H, A] normalised, valid bool [H], with an `action_size`; weight f32 [], of the sample in the action
             loss: 1 / action_fraction where it is labelled, else 0

    Frames are decoded when needed; the last ones stay in memory, up to `kept` bytes.
    """

    def __init__(
        self, indices, stats, model, texts=None, chunk=8, action_size=0, action_fraction=0.05, kept=2**30, **of
    ):
        """texts: {instruction: states}, for stage 1; of: seed, weights and episodes, as of `Steps`."""
        super().__init__(indices, **of)
        for index in indices:
            check_video(model.sizes, index)
        self.model, self.texts, self.chunk, self.action_size = model, texts, chunk, action_size
        self.longest = max(map(len, texts.values())) if texts else 0
        self.actions = [self._actions(index, own) for index, own in zip(indices, stats, strict=True)]
        self.action_fraction = action_fraction
        draws = (np.random.default_rng([self.seed, 4, n]).random(len(i)) for n, i in enumerate(indices))
        self.labelled = [draw < action_fraction for draw in draws]  # which steps have actions: always the same ones
        self.frame = functools.lru_cache(kept // (3 * model.features.image_size**2))(self.frame)

    def _actions(self, index, stats):
        """Normalised actions f32 [S, A]; None when they are not wanted, or of a video without."""
        if not self.action_size or "action" not in index.columns:
            return None
        return normalise(standardise(index.columns["action"]), stats["action"])

    def frame(self, number, step):
        return self.model.features.read(self.indices[number].image(self.model.sizes.camera, step))

    def sample(self, number, step):
        index = self.indices[number]
        episode = int(np.searchsorted(index.starts, step, "right")) - 1
        ahead = int(later(index, step, self.model.sizes.delta))
        frames = np.stack([self.frame(number, step), self.frame(number, ahead)])
        item = {"frames": torch.from_numpy(frames)}
        if self.texts:
            item["text"], item["known"] = pad_text(self.texts[index.instructions[episode]], self.longest)
        if self.action_size:
            own = self.actions[number]
            nothing = np.zeros((self.chunk, self.action_size), np.float32), np.zeros(self.chunk, bool)
            actions, valid = nothing if own is None else action_chunk(own, index.starts, step, self.chunk)[:2]
            weight = 1 / self.action_fraction if self.labelled[number][step] else 0.0
            item |= {"actions": torch.from_numpy(actions), "valid": torch.from_numpy(valid)}
            item |= {"weight": torch.tensor(weight)}
        return item


def check_video(sizes, index):
    """Raises ValueError when a data set lacks the camera, or has no two frames that are delta apart."""
    if sizes.camera not in index.images:
        raise ValueError(
            f"camera is '{sizes.camera}', but {index.name} has {list(index.images)}; train with another --camera"
        )
    longest = int(np.diff(index.starts).max())
    if sizes.delta >= longest:
        raise ValueError(
            f"delta is {sizes.delta}, but the longest episode of {index.name} has {longest} frames; train with a "
            "--delta that most episodes are a few times as long as"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Models on disk


BUILD = {
    "lam": lambda config: LatentActionModel(LamSizes(**config.pop("sizes")), **config),
    "tokenizer": lambda config: ActionTokenizer(**config),
}


def model_tensors(model):
    """All that is needed to encode and decode, frozen features included, the action head not."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith("action_head.")}


def load_model(kind, path):
    """The frozen model in folder `path`. Raises FileNotFoundError or ValueError when that is not a `kind`."""
    path, remedy = Path(path), f"Train one: python latent.py {kind} --data DIR --out DIR"
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path} is no {kind}: it has no {name}. {remedy}")
    config = json.loads((path / "config.json").read_text())
    if config.get("kind") != kind:
        raise ValueError(f"{path} holds a '{config.get('kind')}' where a '{kind}' is needed. {remedy}")
    model = BUILD[kind](config["model"])
    tensors, _ = common.load_tensors(path / "model.safetensors")
    common.load_tensors_into(model, model.state_dict(), tensors, path)
    return model.eval().requires_grad_(False)


load_lam = functools.partial(load_model, "lam")
load_tokenizer = functools.partial(load_model, "tokenizer")  # dataset_statistics.json beside it: its actions' units


def fingerprint(path):
    """Short hash of a saved model: its sizes and its weights."""
    config = json.loads((Path(path) / "config.json").read_text())
    digest = hashlib.sha256(json.dumps([config["kind"], config["model"]], sort_keys=True).encode())
    tensors, _ = common.load_tensors(Path(path) / "model.safetensors")
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def source_fingerprint(source):
    """`fingerprint` of a folder; of a checkpoint file the hash of its bytes."""
    if Path(source).is_dir():
        return fingerprint(source)
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Starting from another model


def initialise(model, source):
    """Loads `source` into `model`: a folder that `latent.py lam` made, or a checkpoint file of UniVLA.

    A model of the same stage is loaded whole, but for the action head. One of stage 1 gives stage 2 its encoder,
    decoder and features, and its codes become the irrelevant ones. Raises ValueError listing what does not fit.
    """
    source, sizes, own = Path(source), asdict(model.sizes), model.state_dict()
    if not source.exists():
        raise FileNotFoundError(
            f"init_from {source} does not exist; it must be a folder of latent.py lam or a UniVLA file"
        )
    skipped = ("action_head.",)
    if source.is_dir():
        given = load_lam(source)
        theirs, tensors = asdict(given.sizes), given.state_dict()
    else:
        tensors, skipped = univla_tensors(source), (*skipped, "centre", "sums", "counts", "unused", "updates")
        theirs = UNIVLA | {"stage": 2 if any("irrelevant." in name for name in tensors) else 1}
    second = (theirs["stage"], sizes["stage"]) == (1, 2)
    compared = ["heads", "predict_change", "centre", "camera", "image_size", "patch_size"] + ["delta"] * second
    differ = [name for name in compared if theirs.get(name, sizes[name]) != sizes[name]]
    if second:
        tensors = {name.replace("codes.", "irrelevant."): t for name, t in tensors.items() if "text_up" not in name}
        skipped = (*skipped, "codes.")
    elif theirs["stage"] != sizes["stage"]:
        differ.append("stage")
    if differ:
        found = ", ".join(f"{name} is {sizes[name]}, but there {theirs[name]}" for name in differ)
        raise ValueError(f"init_from {source} is another architecture: {found}")
    own = {name: t for name, t in own.items() if name in tensors or not any(part in name for part in skipped)}
    common.load_tensors_into(model, own, tensors, source)
    if not source.is_dir() and not second:
        model.codes.quantiser.start_at(model.codes.quantiser.codebook)


UNIVLA = {"heads": 12, "predict_change": False, "centre": False}  # what its tensors do not tell
UNIVLA_NAMES = [  # (pattern in its names, ours), applied in this order
    ("^lam[.]", ""),
    # DINOv2: facebook's names to transformers'
    ("^dino_encoder[.]", "features.net."),
    ("net[.](cls_token|mask_token|register_tokens)", r"net.embeddings.\1"),
    ("net[.]pos_embed", "net.embeddings.position_embeddings"),
    ("net[.]patch_embed[.]proj", "net.embeddings.patch_embeddings.projection"),
    ("net[.]blocks", "net.encoder.layer"),
    ("attn[.]proj", "attention.o_proj"),
    ("ls([12])[.]gamma", r"layer_scale\1.lambda1"),
    ("net[.]norm", "net.layernorm"),
    # encoder and decoder
    ("coder[.]ffn", "coder.embed"),
    ("transformer_blocks", "blocks"),
    ("(spatial|temporal)_attn[.]to_out[.]0", r"\1.out"),
    ("^(.*coder.blocks[.][0-9]+)[.]norm1", r"\1.spatial.norm"),
    ("^(encoder.blocks[.][0-9]+)[.]norm2", r"\1.temporal.norm"),
    ("^(.*coder.blocks[.][0-9]+)[.](norm2|norm3)", r"\1.mlp.0"),
    ("^(.*coder.blocks[.][0-9]+)[.]ffn[.]([03])", lambda m: f"{m[1]}.mlp.{int(m[2]) // 3 * 2 + 1}"),
    ("^decoder[.]out", "out"),
    ("^lang_proj", "text_up"),
]
UNIVLA_SETS = {  # the same, of the sets of codes, by its stage
    1: [
        ("^action_latent$", "codes.queries"),
        ("^to_codebook[.]", "codes.project."),
        ("^vq[.]codebook[.]weight", "codes.quantiser.codebook"),
        ("^action_up[.]", "codes.up."),
    ],
    2: [
        ("^action_latent_controllable$", "codes.queries"),
        ("^to_codebook[.]", "codes.project."),
        ("^vq_action[.]codebook[.]weight", "codes.quantiser.codebook"),
        ("^action_up[.]", "codes.up."),
        ("^action_latent$", "irrelevant.queries"),
        ("^to_codebook_uncontrol[.]", "irrelevant.project."),
        ("^vq[.]codebook[.]weight", "irrelevant.quantiser.codebook"),
        ("^action_up_uncontrol[.]", "irrelevant.up."),
    ],
}


def univla_tensors(path):
    """{our name: tensor} of a checkpoint file of UniVLA (stage 1 or 2), DINOv2 included, T5 not.

    Raises ValueError when it holds more than tensors, saying what and how to save the weights alone.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, KeyError, RuntimeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({error!r}). Copy it again.") from error
    except pickle.UnpicklingError as error:
        more = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise ValueError(
            f"{path} holds more than tensors: {', '.join(more)}. Loading that runs code of its author. If you trust "
            f"it, save its weights alone:\n    state = torch.load('{path}', weights_only=False)['state_dict']\n"
            f"    torch.save({{'state_dict': state}}, 'weights.ckpt')\nand give --init-from weights.ckpt"
        ) from error
    if "state_dict" not in state:
        raise ValueError(
            f"{path} has no 'state_dict', only {list(state)[:5]}; it must be a Lightning checkpoint of UniVLA"
        )
    state = {name: t for name, t in state["state_dict"].items() if "text_encoder" not in name}
    names = UNIVLA_NAMES + UNIVLA_SETS[2 if any("control" in name for name in state) else 1]
    tensors = {}
    for name, tensor in state.items():
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        tensors[name] = tensor[0, 0] if name.endswith("queries") else tensor
    for name in [name for name in tensors if ".attn.qkv." in name]:  # one matrix there, three in transformers
        for letter, part in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
    for name in [name for name in tensors if "_attn.to_q." in name]:  # three matrices there, one here
        parts = [name.replace("to_q", f"to_{letter}") for letter in "qkv"]
        if all(part in tensors for part in parts):
            tensors[name.replace("_attn.to_q", ".qkv")] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(kw_only=True)
class Training:
    data: list[Path]
    """folders of RLDS data sets"""
    out: Path
    """new folder for the model: config.json, model.safetensors, dataset_statistics.json, log.jsonl"""
    resume: bool = False
    """continue the training in --out from its last save; without one, start it (again)"""
    cache: Path = CACHE
    """where indices are kept"""
    max_steps: int = 1000
    """optimizer steps"""
    global_batch_size: int = 64
    """samples per step, over all processes"""
    learning_rate: float = 1e-3
    """peak learning rate: 5 % warm-up, then a cosine down to 1 %"""
    val_fraction: float = 0.1
    """share of the episodes that is held out and measured at the end"""
    chunk: int = 8
    """actions per chunk"""
    save_every: int = 1000
    """steps between saves"""
    keep: int = 2
    """saves that stay: should the newest be damaged, the one before it is taken"""
    timeout: int = 600
    """seconds to wait for a data worker or another process before the training ends with an error"""
    seed: int = 0
    """of initialisation, order, masks and split"""
    num_workers: int = 0
    """processes per rank that decode images (0: the training process itself)"""
    wandb_project: str = ""
    """log to this wandb project too"""


@dataclass(kw_only=True)
class Lam(LamSizes, Training):
    init_from: Path | None = None
    """start from the model in this folder, or from a checkpoint file of UniVLA; stage 2 needs a stage 1"""
    action_fraction: float = 0.05
    """share of the steps whose actions the action head of stages 0 and 2 sees (0: no head)"""


@dataclass(kw_only=True)
class Tokenizer(Training):
    num_codes: int = 256
    """codes in the codebook"""
    code_dim: int = 128
    """width of a code, and of the encoder"""
    patience: int = 50
    """updates after which a code that nothing chose is restarted"""


# Of a resumed training: where things lie, and what does not alter results.
FREE_TO_CHANGE = {"resume", "out", "data", "cache", "num_workers", "save_every", "keep", "timeout", "wandb_project"}


def check(config, world):
    """Raises ValueError for a setting that cannot work."""
    least = {"max_steps": 0 if getattr(config, "init_from", None) else 1, "heads": 1, "patience": 1, "save_every": 1}
    names = "global_batch_size chunk delta num_codes code_dim codes_per_step num_blocks width image_size patch_size "
    least |= {name: 1 for name in (names + "keep timeout").split()}
    for name, value in least.items():
        if getattr(config, name, value) < value:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {value}")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"val_fraction is {config.val_fraction}; it must be in [0, 1)")
    if config.global_batch_size % world:
        raise ValueError(f"global_batch_size is {config.global_batch_size}; {world} processes cannot share it equally")
    if isinstance(config, Tokenizer) and config.code_dim % 4:
        raise ValueError(f"code_dim is {config.code_dim}; it must be a multiple of the 4 heads")
    if isinstance(config, Lam):
        check_lam(config)


def check_lam(config):
    if not 0 <= config.action_fraction <= 1:
        raise ValueError(f"action_fraction is {config.action_fraction}; it must be in [0, 1]")
    if config.num_codes > 256:
        raise ValueError(f"num_codes is {config.num_codes}; labels hold codes in one byte, so at most 256")
    if config.width % (2 * config.heads):
        raise ValueError(f"width is {config.width}; it must be a multiple of 2 x heads, {2 * config.heads}")
    if config.stage == 2 and not config.init_from:
        raise ValueError(
            "stage is 2 but init_from is not given; it needs a stage 1: "
            "python latent.py lam --stage 1 --data DIR --out DIR1, then --stage 2 --init-from DIR1"
        )


def lam_and_samples(config, indices, stats, ranks):
    """(the model, function (episodes of each data set) -> its samples)"""
    sizes = LamSizes(**{field.name: getattr(config, field.name) for field in fields(LamSizes)})
    instructions = [text for index in indices for text in index.instructions]
    texts = text_states(config.text, instructions, ranks.device) if config.stage == 1 else None
    widths = [index.columns["action"].shape[1] for index in indices if "action" in index.columns]
    if len(set(widths)) > 1:
        raise ValueError(f"actions have sizes {widths} in these data sets; they cannot be mixed")
    supervised = config.stage != 1 and config.action_fraction > 0 and widths
    action_size = widths[0] if supervised else 0
    text_size = next(iter(texts.values())).shape[1] if texts else 0
    model = LatentActionModel(sizes, text_size, config.chunk * action_size, config.seed)
    if config.init_from:
        initialise(model, config.init_from)
        check_split(config, indices)
    of = dict(texts=texts, chunk=config.chunk, action_size=action_size, action_fraction=config.action_fraction)
    of |= {"kept": 2**30 // max(1, config.num_workers)}  # each worker keeps its own
    return model, lambda parts: FramePairs(indices, stats, model, **of, seed=config.seed, episodes=parts)


def check_split(config, indices):
    """Raises ValueError when the model that `config` starts from saw, of the same data, what is held out now."""
    if not config.init_from.is_dir():
        return
    theirs = json.loads((config.init_from / "config.json").read_text())
    ours, known = (config.val_fraction, config.seed), (theirs["training"]["val_fraction"], theirs["training"]["seed"])
    if ours != known and {i.fingerprint for i in indices} & {entry["fingerprint"] for entry in theirs["data"]}:
        raise ValueError(
            f"val_fraction and seed are {ours}, but {config.init_from} was trained on the same data with {known}: it "
            "saw episodes that would count as held out. Use the same."
        )


def tokenizer_and_samples(config, indices, stats, ranks):
    """(the model, function (episodes of each data set) -> its samples)"""
    for index in indices:
        if "action" not in index.columns:
            raise ValueError(f"{index.name} has no steps feature 'action', only {list(index.columns)}")
    sizes = config.chunk, indices[0].columns["action"].shape[1], config.num_codes, config.code_dim
    model = ActionTokenizer(*sizes, patience=config.patience, seed=config.seed)
    return model, lambda parts: MaskedChunks(indices, stats, config.chunk, config.seed, parts)


@common.explained
def train(config, ranks):
    """Trains the model that `config` describes, saves it in config.out and measures it on held-out episodes."""
    check(config, ranks.world)
    indices = open_indices(config.data, config.cache)
    stats = [statistics(index) for index in indices]
    torch.manual_seed(config.seed)
    kind, make = ("lam", lam_and_samples) if isinstance(config, Lam) else ("tokenizer", tokenizer_and_samples)
    model, samples = make(config, indices, stats, ranks)
    split = [split_episodes(index, config.val_fraction, config.seed) for index in indices]
    training = samples([kept for kept, _ in split])
    some = any(len(held) for _, held in split)
    name, measured = ("held-out", samples([held for _, held in split])) if some else ("training", training)
    description = {"kind": kind, "model": model.config, "training": common.plain(config), "commit": common.commit()}
    description |= {"data": [{"name": i.name, "fingerprint": i.fingerprint} for i in indices]}
    source = getattr(config, "init_from", None)
    description["targets"] = [{"fingerprint": source_fingerprint(source)}] if source else []
    resuming = common.prepare_run(config.out, config.resume, ranks.main, description, "training", FREE_TO_CHANGE)
    if ranks.main:
        named = {index.name: rows for index, rows in zip(indices, stats, strict=True)}
        common.write_json(config.out / "dataset_statistics.json", named)
    if not fit(model.to(ranks.device), training, config, ranks, resuming):
        return common.print0(f"SIGTERM: saved. Go on: the same command with --resume continues {config.out}")
    report = measure(model, measured, ranks.device, config.global_batch_size)
    words = (f"{word} {np.round(value, 4).tolist()}" for word, value in report.items())
    common.print0(f"On {name} episodes: " + ", ".join(words))
    if kind == "tokenizer":
        common.print0(beside_kmeans(model, {"training episodes": training, f"{name} episodes": measured}))
    common.print0(f"{config.out} is ready. Next: python {next_command(config, kind)}")


def next_command(config, kind):
    """What to run with the trained model; for a second stage with the flags that its sizes need."""
    data = " ".join(map(str, config.data))
    if kind == "tokenizer":
        return f"train.py --variant la_tok --data {data} --tokenizer {config.out}"
    if config.stage != 1:
        return f"latent.py label --data {config.data[0]} --lam {config.out}"
    flags = f"latent.py lam --stage 2 --init-from {config.out} --data {data} --out DIR"
    for field in fields(LamSizes):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value != field.default and field.name not in ("stage", "text"):
            flags += f" --no-{flag}" if value is False else f" --{flag} {value}"
    return flags


def fit(model, samples, config, ranks, resuming=False):
    """config.max_steps updates of `model`; one line of the log for each; saved now and then, and at the end.

    Returns whether it came to the end: SIGTERM stops it after a save.
    """
    net = common.distribute(model, ranks)
    optimizer = torch.optim.AdamW(common.parameter_groups(model.train(), WEIGHT_DECAY))
    first = common.restore_training(config.out, model, optimizer) if resuming else 0
    batch_size, steps = config.global_batch_size, config.max_steps
    log, meter = common.Log(config.out, ranks.main, first, config.wandb_project, common.plain(config)), common.Meter()
    sigterm, save = common.note_sigterm(), functools.partial(common.save_training, config.out, model, optimizer)
    rows = StepBatches(first, steps, batch_size, batch_size // ranks.world, ranks.rank, ranks.world)
    cuda = ranks.device.type == "cuda"
    workers = common.data_workers(config.num_workers, config.timeout)
    batches = DataLoader(samples, batch_sampler=rows, pin_memory=cuda, **workers)
    bar = tqdm(enumerate(batches, first), initial=first, total=steps, disable=not ranks.main)
    for step, batch in bar:
        lr = common.learning_rate(step, steps, config.learning_rate, "cosine", warmup_ratio=0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if isinstance(model, ActionTokenizer) and step == int(REFIT * steps):
            model.refit(samples)
        result = net(common.to_device(batch, ranks.device))
        optimizer.zero_grad()
        result["loss"].backward()
        result["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result["stop"] = torch.tensor(float(sigterm.is_set()), device=ranks.device)
        entry = summary([result], model.num_codes) | {"lr": lr, "samples_per_s": meter.tick(batch_size)}
        stop = entry.pop("stop") > 0  # on any process
        log.write(step=step, **entry)
        if not np.isfinite(entry["loss"] + entry["grad_norm"]):
            of = samples.names(range(step * batch_size, (step + 1) * batch_size))
            raise FloatingPointError(f"step {step}: loss {entry['loss']}, gradient {entry['grad_norm']}. Look at {of}")
        codes = f"codes {min(entry['usage'])}/{model.num_codes}"
        bar.set_postfix_str(f"loss {entry['loss']:.4f}, {codes}, {entry['samples_per_s']:.0f} samples/s", refresh=False)
        if ranks.main and (stop or (step + 1) % config.save_every == 0 and step + 1 < steps):
            save(step + 1, model_tensors(model), log, config.keep, stop)
        if stop:
            break
    else:
        stop = False
        if ranks.main:
            save(steps, model_tensors(model), log, config.keep, True)
    log.close()
    return not stop


@torch.no_grad()
def measure(model, samples, device, batch_size):
    """`summary` over every sample once, at most `MEASURED`, in evaluation mode."""
    model.eval()
    loader = DataLoader(samples, batch_size, sampler=range(min(samples.epoch_length, MEASURED)))
    return summary([model(common.to_device(batch, device)) for batch in loader], model.num_codes)


def summary(results, num_codes):
    """Of `forward`'s results: means of the scalars over all processes, usage and perplexity per code position."""
    names = [name for name in results[0] if name != "codes"]
    means = torch.stack([torch.stack([result[name].detach() for name in names]) for result in results]).mean(0)
    counts = code_counts(torch.cat([result["codes"] for result in results]), num_codes)
    used, perplexity = code_usage(common.all_sum(counts))
    entry = dict(zip(names, common.all_mean(means).tolist(), strict=True))
    return entry | {"usage": used.tolist(), "perplexity": perplexity.tolist()}


@torch.no_grad()
def beside_kmeans(tokenizer, parts):
    """Lines for print: codes in use and squared error of the tokenizer on each of {name: samples}, beside as many
    k-means of the first one's actions, the floor for one code per step that sees that step alone."""
    means, lines = None, []
    for name, samples in parts.items():
        loader = DataLoader(samples, 64, sampler=range(min(samples.epoch_length, CHUNKS)))
        batch = {key: torch.cat([part[key] for part in loader]) for key in ("actions", "valid")}
        actions, valid = (batch[key].to(tokenizer.project.weight.device) for key in ("actions", "valid"))
        codes, _ = tokenizer.encode(actions, valid)
        error = (tokenizer.decode(codes) - actions)[valid].square().mean().item()
        means = kmeans(actions[valid], tokenizer.num_codes) if means is None else means
        floor = torch.cdist(actions[valid], means).amin(1).square().mean().item() / actions.shape[2]
        used = f"{len(codes[valid].unique())} of {tokenizer.num_codes} codes in use"
        lines.append(f"On {name}: {used}, squared error {error:.5f}, {error / floor:.2f} times k-means' {floor:.5f}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Labelling


@dataclass(kw_only=True)
class Label:
    data: Path
    """folder of an RLDS data set"""
    lam: Path
    """folder of a model that `latent.py lam` trained"""
    out: Path | None = None
    """file to write; default: beside the cached index, where training looks when the data ships none"""
    cache: Path = CACHE
    """where indices are kept"""
    batch_size: int = 64
    """frames, and pairs, encoded at once"""
    num_workers: int = 0
    """processes per rank that decode images (0: the labelling process itself)"""


class EpisodeFrames(torch.utils.data.Dataset):
    """(episode, its frames u8 [n, h, w, 3] in the size that the features read) of some episodes."""

    def __init__(self, index, model, episodes):
        self.index, self.model, self.episodes = index, model, episodes

    def __len__(self):
        return len(self.episodes)

    def __getitem__(self, number):
        episode = self.episodes[number]
        steps = range(*self.index.starts[episode : episode + 2])
        frames = [self.model.features.read(self.index.image(self.model.sizes.camera, step)) for step in steps]
        return episode, torch.from_numpy(np.stack(frames))


@torch.no_grad()
def encode_episode(model, frames, batch_size, text=None):
    """Codes u8 [n, P] and c f16 [n, P, d] of an episode's frames u8 [n, h, w, 3]; each frame's features once.

    text: of stage 1, the instruction's states [length, width].
    """
    device, count, codes, vectors = model.patch_up.weight.device, len(frames), [], []
    ahead = torch.arange(count).add(model.sizes.delta).clamp(max=count - 1)
    known = torch.empty(0, device=device)  # features of the frames from the batch's first on
    for at in range(0, count, batch_size):
        rows = ahead[at : at + batch_size]  # of the later frames
        known = known[batch_size:] if at else known
        missing = frames[at + len(known) : int(rows[-1]) + 1].to(device)
        known = torch.cat(
            [known, *(model.features(part) for part in missing.split(batch_size) if len(part))]
        )  # [n, N, F]
        a, b = known[: len(rows)], known[(rows - at).to(device)]
        words = () if text is None else (text.expand(len(a), -1, -1), torch.ones(len(a), len(text), dtype=torch.bool))
        for found, part in zip((codes, vectors), model.encode(a, b, *(word.to(device) for word in words)), strict=True):
            found.append(part)
    return torch.cat(codes).to("cpu", torch.uint8), torch.cat(vectors).to("cpu", torch.float16)


def label_episodes(index, model, episodes, batch_size=64, texts=None, num_workers=0):
    """Yields (codes u8 [n, P], c f16 [n, P, d]) of each of some episodes, in order. texts: of stage 1."""
    loader = DataLoader(EpisodeFrames(index, model, episodes), batch_size=None, num_workers=num_workers)
    for episode, frames in loader:
        yield encode_episode(model, frames, batch_size, texts and texts[index.instructions[episode]])


def label(config, ranks):
    """Writes the file that `data.load_labels` reads, in parts that a stopped labelling finds again.

    Raises FileExistsError rather than replace a file.
    """
    index, model = open_index(config.data, config.cache), load_lam(config.lam).to(ranks.device)
    check_video(model.sizes, index)
    out = config.out or index.cache / "labels.safetensors"
    if out.exists():
        raise FileExistsError(f"{out} exists. Delete it to label again, or choose another --out.")
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    about = {"data": index.fingerprint, "lam": fingerprint(config.lam)}
    about |= {"delta": str(model.sizes.delta), "num_codes": str(model.num_codes)}
    groups = [range(at, min(at + PART, len(index.starts) - 1)) for at in range(0, len(index.starts) - 1, PART)]
    label_groups(index, model, groups[ranks.rank :: ranks.world], parts, about, config, ranks)
    if ranks.main:
        paths = [parts / f"{group[0]}.safetensors" for group in groups]
        if not all(is_part(path, about) for path in paths):
            print(f"waiting for the other processes' parts in {parts}")
        while not all(is_part(path, about) for path in paths):
            time.sleep(1)
        loaded = [common.load_tensors(path)[0] for path in paths]
        tensors = {name: torch.cat([part[name] for part in loaded]) for name in ("codes", "vectors")}
        common.save_tensors(out, tensors, **about)
        shutil.rmtree(parts)
        used, perplexity = code_usage(code_counts(tensors["codes"].long(), model.num_codes))
        report = f"codes in use {used.tolist()}, perplexity {[round(p, 1) for p in perplexity.tolist()]}"
        print(f"{out}: {len(index)} steps, {report}")
        print(f"Next: torchrun --standalone train.py --variant la_align --data {config.data} --labels {out}")


def is_part(path, about):
    """Whether labels of the same model and data are in a file."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return about.items() <= file.metadata().items()


def label_groups(index, model, groups, folder, about, config, ranks):
    """Labels each group of episodes into a file of `folder`, unless a file `about` the same model and data is there."""
    texts = text_states(model.sizes.text, index.instructions, ranks.device) if model.sizes.stage == 1 else None
    steps = [int(index.starts[group[-1] + 1] - index.starts[group[0]]) for group in groups]
    with tqdm(total=sum(steps), unit=" samples", disable=not ranks.main) as bar:
        for group, count in zip(groups, steps, strict=True):
            path, found = folder / f"{group[0]}.safetensors", []
            if is_part(path, about):
                bar.update(count)
                continue
            for labels in label_episodes(index, model, group, config.batch_size, texts, config.num_workers):
                found.append(labels)
                bar.update(len(labels[0]))
            codes, vectors = map(torch.cat, zip(*found, strict=True))
            common.save_tensors(path, {"codes": codes, "vectors": vectors}, **about)


def main():
    """Runs one of the three commands."""
    commands = {"lam": Lam, "label": Label, "tokenizer": Tokenizer}
    config = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    ranks = common.start_ranks(getattr(config, "timeout", 600))
    (label if isinstance(config, Label) else train)(config, ranks)
    common.stop_ranks()


if __name__ == "__main__":
    main()
