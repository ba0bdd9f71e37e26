"""Latent actions: what happens between two frames, and what a chunk of actions is, as a few discrete codes.

Implements the two models of "From Pixels to Tokens: A Systematic Study of Latent Action Supervision for
Vision-Language-Action Models" (arXiv 2605.04678) in the size that a CPU trains in minutes:

    LatentActionModel   images: (o_t, o_{t+delta}) -> P codes, after UniVLA (arXiv 2505.06111)
    ActionTokenizer     actions: a chunk of H actions -> H codes

    python latent.py lam --data data/libero_tiny --out runs/lam              # train on frames of the primary camera
    python latent.py label --data data/libero_tiny --lam runs/lam            # write the codes of every step to a file
    python latent.py tokenizer --data data/libero_tiny --out runs/tokenizer --chunk 8
    torchrun --nproc-per-node 2 latent.py lam --data data/libero_tiny --out runs/lam2     # on two processes

Both share one quantiser, whose codes stay alive: initialised from data, moved by EMA, restarted when unused.
Left out: DINOv2 features (their place is `FEATURES`), the language-conditioned first stage of UniVLA and its second
codebook. Departures from UniVLA: the decoder predicts the change of the patches, so that it starts as a copy of the
current frame; there is no layer norm over raw patch features (it would remove their brightness); and the running mean
of each code position is subtracted from c, so that all positions share the whole codebook and c points different ways
for different motions. (29 episodes of data/libero_tiny, 500 steps, with and without: 16 of 16 codes in use at every
position and 2 to 10; a cosine of 0.1 and of 0.6 between two random steps; the same held-out reconstruction.)

Axes: B batch, H chunk steps, A action size, P codes per step, K codebook size, d width of a code, D width of a
transformer, L tokens, N patches of a frame, F features of a patch, T frames (2), S steps of a data set.
"""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from data import CACHE, Chunks, StepBatches, open_index, split_episodes, statistics

COMMITMENT = 0.25  # weight of the commitment loss
CONSISTENCY = 0.1  # weight of the tokenizer's consistency loss; the paper gives none, and 1 costs reconstruction
ACTION = 0.5  # weight of the action head's loss
MASKED = 0.15  # share of the latents that the tokenizer's consistency loss hides
HEADS = 4  # of every attention
WEIGHT_DECAY = 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Vector quantisation


class Quantiser(nn.Module):
    """Nearest code with a straight-through gradient; the codebook is the running mean of what each code stands for.

    EMA as in van den Oord et al. (arXiv 1711.00937), appendix A. Codes start on encoder outputs of the first batch with
    count 1 and matching sum; a code that nothing chose for `patience` updates is put on an encoder output again.
    Every process ends with the same codebook, and n processes with that of one: counts and sums are added up over
    them, initialisation and restarts draw from their common batch with a generator keyed by (seed, updates).
    """

    def __init__(self, num_codes, dim, decay=0.99, patience=50, seed=0):
        super().__init__()
        self.num_codes, self.decay, self.patience, self.seed = num_codes, decay, patience, seed
        self.register_buffer("codebook", torch.zeros(num_codes, dim))
        self.register_buffer("sums", torch.zeros(num_codes, dim))  # running sum of the vectors of each code ...
        self.register_buffer("counts", torch.zeros(num_codes))  # ... and their running number
        self.register_buffer("unused", torch.zeros(num_codes, dtype=torch.long))  # updates since a code was last chosen
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def nearest(self, x):
        """The codes i64 [...] of x [..., d], by Euclidean distance; the same whatever else is in the batch."""
        distance = torch.cdist(x.flatten(0, -2), self.codebook, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.argmin(-1).view(x.shape[:-1])

    def straight_through(self, x, codes):
        """The vectors of `codes`, [..., d]; their gradient goes to x unchanged."""
        return x + (self.codebook[codes] - x).detach()

    def forward(self, x, valid=None):
        """x [B, n, d], valid bool [B, n] (default: all) -> vectors [B, n, d], codes i64 [B, n], commitment loss."""
        valid = x.new_ones(x.shape[:-1]) if valid is None else valid.to(x.dtype)
        if self.training and self.updates == 0:
            self._place(torch.ones_like(self.counts, dtype=torch.bool), x.detach(), valid)
        codes = self.nearest(x)
        vectors, commitment = self.straight_through(x, codes), masked_mean(x - self.codebook[codes], valid)
        if self.training:
            self._update(x.detach(), codes, valid)
        return vectors, codes, commitment

    @torch.no_grad()
    def _update(self, x, codes, valid):
        chosen = (F.one_hot(codes, self.num_codes) * valid[..., None]).flatten(0, 1)  # [B * n, K]
        hits, sums = common.all_sum(chosen.sum(0)), common.all_sum(chosen.T @ x.flatten(0, 1))  # [K], [K, d]
        self.counts.lerp_(hits, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
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
        self.codebook[which] = pool[np.resize(order, int(which.sum()))]
        self.sums[which], self.counts[which], self.unused[which] = self.codebook[which], 1.0, 0


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


def code_usage(codes, num_codes):
    """Of codes i64 [n, P] on all processes: (number of codes in use, perplexity = exp of the entropy), each [P]."""
    counts = common.all_sum(F.one_hot(codes, num_codes).sum(0))  # [P, K]
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

    def forward(self, x, causal=False):
        qkv = self.qkv(self.norm(x)).flatten(0, -3).unflatten(-1, (3, self.heads, -1))  # [n, L, 3, heads, D / heads]
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=causal)  # [n, heads, L, D / heads]
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention within a frame, then (temporal) causally over the frames, then an MLP. x: [B, L, D] or [B, T, L, D]"""

    def __init__(self, width, hidden, temporal=False):
        super().__init__()
        self.spatial, self.temporal = Attention(width, HEADS), Attention(width, HEADS) if temporal else None
        layers = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x):
        x = self.spatial(x)
        if self.temporal is not None:
            x = self.temporal(x.transpose(1, 2), causal=True).transpose(1, 2)
        return x + self.mlp(x)


def sinusoids(length, width):
    """Fixed positions f32 [length, width], of geometric wavelengths: sines, then cosines."""
    angle = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Actions -> codes


class ActionTokenizer(nn.Module):
    """A chunk of H normalised actions <-> H codes, one per step (the paper's action-based latent actions)."""

    inputs = ("actions", "valid", "masked")  # of a batch, in the order of `forward`

    def __init__(self, chunk, action_size, num_codes=256, dim=128, seed=0):
        super().__init__()
        self.config = {"chunk": chunk, "action_size": action_size, "num_codes": num_codes, "dim": dim}
        self.num_codes, self.dim = num_codes, dim
        self.project = nn.Linear(3 * action_size, dim)
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=apart, dilation=apart) for apart in (1, 2, 4))
        self.blocks = nn.Sequential(*(Block(dim, hidden=256) for _ in range(2)))
        self.norm = nn.LayerNorm(dim)
        self.quantiser = Quantiser(num_codes, dim, seed=seed)
        self.decoder = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, action_size))
        self.register_buffer("positions", sinusoids(chunk, dim), persistent=False)

    def vectors(self, actions):
        """[B, H, A] -> the encoder's output [B, H, d], before quantisation."""
        x = self.project(fourier_features(actions)).transpose(1, 2)  # [B, d, H]
        for conv in self.convs:
            x = x + F.gelu(conv(x))
        return self.norm(self.blocks(x.transpose(1, 2) + self.positions))  # [B, H, d]

    def encode(self, actions, valid=None):
        """f32 [B, H, A] normalised -> codes i64 [B, H], vectors f32 [B, H, d]. Steps that are not valid count as 0."""
        vectors = self.vectors(actions if valid is None else actions * valid[..., None])
        return self.quantiser.nearest(vectors), vectors

    def decode(self, codes):
        """codes i64 [B, H] -> normalised actions f32 [B, H, A]"""
        return self.decoder(self.quantiser.codebook[codes])

    def forward(self, actions, valid, masked):
        """actions f32 [B, H, A] normalised; valid bool [B, H], False past the end of an episode; masked bool [B, H].

        Returns scalars `loss` = reconstruction_loss + 0.25 commitment_loss + 0.1 consistency_loss, and the `codes`
        [n, 1] of the valid steps. Consistency: with the masked latents zeroed, the decoded actions are encoded again,
        and at the masked steps that must give the encoding of the true actions.
        """
        actions = actions * valid[..., None]
        latents = self.vectors(actions)
        quantised, codes, commitment = self.quantiser(latents, valid)
        reconstruction = masked_mean(self.decoder(quantised) - actions, valid)
        hidden = latents * ~masked[..., None]
        guess = self.decoder(self.quantiser.straight_through(hidden, self.quantiser.nearest(hidden)))
        again = self.vectors(guess * valid[..., None])
        consistency = masked_mean(again - latents.detach(), valid & masked)
        return {
            "loss": reconstruction + COMMITMENT * commitment + CONSISTENCY * consistency,
            "reconstruction_loss": reconstruction,
            "commitment_loss": commitment,
            "consistency_loss": consistency,
            "codes": codes[valid][:, None],
        }


def fourier_features(actions):
    """[B, H, A] -> [B, H, 3 A]: the actions, and the real and the imaginary part of their FFT over time."""
    spectrum = torch.fft.fft(actions, dim=1)
    return torch.cat([actions, spectrum.real, spectrum.imag], -1)


class MaskedChunks(Chunks):
    """Chunks with `masked` bool [H]: the steps that the consistency loss hides, keyed by (seed, sample)."""

    def __getitem__(self, position):
        draws = np.random.default_rng([self.seed, 3, position]).random(self.chunk)
        return super().__getitem__(position) | {"masked": torch.from_numpy(draws < MASKED)}


# ----------------------------------------------------------------------------------------------------------------------
# Frames -> codes


class PixelPatches(nn.Module):
    """Frozen frame features without a network: the frame at `image_size`, cut into patches of normalised pixels."""

    def __init__(self, image_size, patch_size):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size}, which patch_size {patch_size} does not divide; change one")
        self.image_size, self.patch_size = image_size, patch_size
        self.patches, self.dim = (image_size // patch_size) ** 2, 3 * patch_size**2

    def read(self, image):
        """u8 [h, w, 3] as stored -> u8 [image_size, image_size, 3], by area."""
        return np.asarray(Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BOX))

    def forward(self, frames):
        """u8 [B, image_size, image_size, 3] -> f32 [B, N, F] in [-1, 1], patches in reading order"""
        p, n = self.patch_size, self.image_size // self.patch_size
        pixels = frames.float().div(127.5).sub(1).view(-1, n, p, n, p, 3)
        return pixels.transpose(2, 3).reshape(len(frames), n * n, p * p * 3)  # [B, N, F]


FEATURES = {"pixels": PixelPatches}  # name -> class with image_size, patches, dim, read(image) and forward(frames)


@dataclass(kw_only=True)
class LamSizes:
    """What a `LatentActionModel` is made of, and what its codes mean."""

    camera: str = "image"
    """camera whose frames are used"""
    delta: int = 32
    """frames between the two images of a latent action"""
    features: str = "pixels"
    """frozen frame features: pixels"""
    image_size: int = 48
    """side to which frames are resized, pixels"""
    patch_size: int = 8
    """side of a patch, pixels"""
    width: int = 64
    """width of encoder and decoder"""
    num_blocks: int = 2
    """blocks of the encoder, and of the decoder"""
    codes_per_step: int = 4
    """codes of one latent action"""
    num_codes: int = 16
    """codes in the codebook"""
    code_dim: int = 32
    """width of a code"""


class LatentActionModel(nn.Module):
    """Frames o_t and o_{t+delta} -> P codes, from which and o_t the patch features of o_{t+delta} are predicted."""

    inputs = ("frames", "actions", "valid", "weight")  # of a batch, in the order of `forward`

    def __init__(self, sizes, head_size=0, seed=0):
        """head_size: numbers that the action head predicts, chunk x action size; 0: no head, as in a saved model."""
        super().__init__()
        if sizes.features not in FEATURES:
            raise ValueError(f"features is '{sizes.features}'; choose one of {list(FEATURES)}")
        self.config, self.num_codes, self.num_queries = asdict(sizes), sizes.num_codes, sizes.codes_per_step
        self.delta, self.camera, self.dim, width = sizes.delta, sizes.camera, sizes.code_dim, sizes.width
        self.features = FEATURES[sizes.features](sizes.image_size, sizes.patch_size).requires_grad_(False)
        self.embed = nn.Sequential(nn.Linear(self.features.dim, width), nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(self.num_queries, width))
        self.encoder = nn.Sequential(*(Block(width, 4 * width, temporal=True) for _ in range(sizes.num_blocks)))
        self.to_codebook = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.dim))
        self.quantiser = Quantiser(self.num_codes, self.dim, patience=10, seed=seed)
        self.action_up, self.patch_up = nn.Linear(self.dim, width), nn.Linear(self.features.dim, width)
        self.decoder = nn.Sequential(*(Block(width, 4 * width) for _ in range(sizes.num_blocks)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.features.dim))
        nn.init.zeros_(self.out[1].weight), nn.init.zeros_(self.out[1].bias)  # at first, predict no change
        self.register_buffer("centre", torch.zeros(self.num_queries, self.dim))  # subtracted from c
        self.register_buffer("positions", sinusoids(self.num_queries + self.features.patches, width), persistent=False)
        if head_size:
            self.action_head = nn.Sequential(nn.Linear(self.dim, 128), nn.GELU(), nn.Linear(128, head_size))

    def vectors(self, features_a, features_b):
        """Patch features [B, N, F] of o_t and o_{t+delta} -> c [B, P, d], before quantisation."""
        patches = self.embed(torch.stack([features_a, features_b], 1))  # [B, T, N, D]
        queries = self.queries.expand(*patches.shape[:2], -1, -1)  # [B, T, P, D]
        x = self.encoder(torch.cat([queries, patches], 2) + self.positions)  # [B, T, P + N, D]
        c = self.to_codebook(x[:, 1, : self.num_queries])  # [B, P, d], read at the later frame
        if self.training:
            self._track(c.detach().mean(0))
        return c - self.centre

    def _track(self, mean):
        """Moves the running centre of each code position towards the mean [P, d] of the global batch."""
        self.centre.lerp_(common.all_mean(mean), max(0.02, 1 / (1 + int(self.quantiser.updates))))

    def encode(self, features_a, features_b):
        """Patch features [B, N, F] of o_t and o_{t+delta} -> codes i64 [B, P], c f32 [B, P, d] before quantisation."""
        vectors = self.vectors(features_a, features_b)
        return self.quantiser.nearest(vectors), vectors

    def predict(self, features_a, quantised):
        """Patch features [B, N, F] of o_t and code vectors [B, P, d] -> those of o_{t+delta}, [B, N, F]."""
        x = torch.cat([self.action_up(quantised), self.patch_up(features_a)], 1)  # [B, P + N, D]
        x = self.decoder(x + self.positions)[:, self.num_queries :]  # [B, N, D]
        return features_a + self.out(x)

    def forward(self, frames, actions, valid, weight):
        """frames u8 [B, 2, h, w, 3]; actions f32 [B, H, A] normalised, valid bool [B, H]; weight f32 [B].

        weight: of a sample in the action loss, 1 / (share of labelled samples), 0 where it is not labelled.
        Returns scalars `loss` = reconstruction_loss + 0.25 commitment_loss + 0.5 action_loss, `copy_error` (the
        reconstruction loss of predicting no change), and `codes` i64 [B, P].
        """
        a, b = self.features(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1)  # [B, N, F] each
        quantised, codes, commitment = self.quantiser(self.vectors(a, b))
        reconstruction = F.mse_loss(self.predict(a, quantised), b)
        action = masked_mean(self.action_head(quantised.mean(1)).view_as(actions) - actions, valid * weight[:, None])
        return {
            "loss": reconstruction + COMMITMENT * commitment + ACTION * action,
            "reconstruction_loss": reconstruction,
            "commitment_loss": commitment,
            "action_loss": action,
            "copy_error": F.mse_loss(a, b),
            "codes": codes,
        }


class FramePairs(Chunks):
    """Chunks with `frames` u8 [2, h, w, 3], o_t and o_{t+delta} (near its end: the episode's last), and `weight`.

    Frames are decoded when needed; the last `kept` of them stay in memory in the size that the features read (with
    pixels of 48 x 48, 7 KB each: 0.7 GB at most).
    """

    def __init__(self, *args, model, action_fraction, kept=100_000, **options):
        super().__init__(*args, **options)
        for index in self.indices:
            check_camera(model, index)
        self.model, self.action_fraction = model, action_fraction
        draws = (np.random.default_rng([self.seed, 4, n]).random(len(i)) for n, i in enumerate(self.indices))
        self.labelled = [draw < action_fraction for draw in draws]  # which steps have actions: always the same ones
        self.frame = functools.lru_cache(kept)(self.frame)

    def frame(self, number, step):
        return self.model.features.read(self.indices[number].image(self.model.camera, step))

    def sample(self, number, step):
        starts = self.indices[number].starts
        last = int(starts[np.searchsorted(starts, step, "right")]) - 1
        frames = np.stack([self.frame(number, step), self.frame(number, min(step + self.model.delta, last))])
        weight = 1 / self.action_fraction if self.labelled[number][step] else 0.0
        return super().sample(number, step) | {"frames": torch.from_numpy(frames), "weight": torch.tensor(weight)}


# ----------------------------------------------------------------------------------------------------------------------
# Models on disk


def check_camera(model, index):
    if model.camera not in index.images:
        raise ValueError(f"camera is '{model.camera}', but {index.name} has {list(index.images)}; choose with --camera")


BUILD = {"lam": lambda sizes: LatentActionModel(LamSizes(**sizes)), "tokenizer": lambda sizes: ActionTokenizer(**sizes)}


def save_model(folder, kind, model, training):
    """config.json and model.safetensors: what is needed to encode and decode, so not the action head."""
    tensors = {name: t for name, t in common.trainable_tensors(model).items() if not name.startswith("action_head.")}
    common.save_tensors(Path(folder) / "model.safetensors", tensors)
    config = {"kind": kind, "model": model.config, "training": training, "commit": common.commit()}
    common.write_json(Path(folder) / "config.json", config)


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
    common.load_trainable(model, common.load_tensors(path / "model.safetensors")[0], path)
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


# ----------------------------------------------------------------------------------------------------------------------
# Training and labelling


@dataclass(kw_only=True)
class Training:
    data: list[Path]
    """folders of RLDS data sets"""
    out: Path
    """new folder for the model: config.json, model.safetensors, dataset_statistics.json, log.jsonl"""
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
    seed: int = 0
    """of initialisation, order, masks and split"""


@dataclass(kw_only=True)
class Lam(LamSizes, Training):
    action_fraction: float = 0.05
    """share of the steps whose actions the action head sees"""


@dataclass(kw_only=True)
class Tokenizer(Training):
    max_steps: int = 1500
    """optimizer steps"""
    num_codes: int = 256
    """codes in the codebook"""
    code_dim: int = 128
    """width of a code, and of the encoder"""


@dataclass(kw_only=True)
class Label:
    data: Path
    """folder of an RLDS data set"""
    lam: Path
    """folder of a model that `latent.py lam` trained"""
    out: Path | None = None
    """file to write; default: beside the cached index, where training looks for it"""
    cache: Path = CACHE
    """where indices are kept"""
    batch_size: int = 64
    """frames, and pairs, encoded at once"""


def check(config, world):
    """Raises ValueError for a setting that cannot work."""
    for name in ("max_steps", "global_batch_size", "chunk", "delta", "num_codes"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"val_fraction is {config.val_fraction}; it must be in [0, 1)")
    if not 0 < getattr(config, "action_fraction", 1) <= 1:
        raise ValueError(f"action_fraction is {config.action_fraction}; it must be in (0, 1]")
    if isinstance(config, Lam) and config.num_codes > 256:
        raise ValueError(f"num_codes is {config.num_codes}; labels hold codes in one byte, so at most 256")
    if config.global_batch_size % world:
        raise ValueError(f"global_batch_size is {config.global_batch_size}; {world} processes cannot share it equally")


def train(config, ranks):
    """Trains the model that `config` describes, saves it in config.out and measures it on held-out episodes."""
    check(config, ranks.world)
    indices = [open_index(path, config.cache) for path in config.data]
    stats = [statistics(index) for index in indices]
    action_size = indices[0].columns["action"].shape[1]
    torch.manual_seed(config.seed)
    if isinstance(config, Lam):
        sizes = LamSizes(**{field.name: getattr(config, field.name) for field in fields(LamSizes)})
        model = LatentActionModel(sizes, config.chunk * action_size, config.seed)
        samples = functools.partial(FramePairs, model=model, action_fraction=config.action_fraction)
        kind, command = "lam", f"latent.py label --data {config.data[0]} --lam {config.out}"
    else:
        model = ActionTokenizer(config.chunk, action_size, config.num_codes, config.code_dim, config.seed)
        samples = MaskedChunks
        kind, command = "tokenizer", f"train.py --variant la_tok --data {config.data[0]} --tokenizer {config.out}"
    split = [split_episodes(index, config.val_fraction, config.seed) for index in indices]
    parts = [training for training, _ in split], [held if len(held) else training for training, held in split]
    training, held_out = (samples(indices, stats, [], config.chunk, config.seed, episodes=part) for part in parts)
    if ranks.main:
        common.new_directory(config.out)
    fit(model.to(ranks.device), training, config, ranks)
    if ranks.main:
        save_model(config.out, kind, model, common.plain(config))
        named = {index.name: rows for index, rows in zip(indices, stats, strict=True)}
        common.write_json(config.out / "dataset_statistics.json", named)
    report = measure(model, held_out, ranks.device, config.global_batch_size)
    words = (f"{name} {np.round(value, 4).tolist()}" for name, value in report.items())
    common.print0("On held-out episodes: " + ", ".join(words))
    common.print0(f"{config.out} is ready. Next: python {command}")


def fit(model, samples, config, ranks):
    """config.max_steps updates of `model`; one line of the log for each."""
    net = DistributedDataParallel(model, broadcast_buffers=False) if ranks.world > 1 else model.train()
    optimizer = torch.optim.AdamW(common.parameter_groups(model, WEIGHT_DECAY))
    batch_size, log, meter = config.global_batch_size, common.Log(config.out, ranks.main), common.Meter()
    rows = StepBatches(0, config.max_steps, batch_size, batch_size // ranks.world, ranks.rank, ranks.world)
    bar = tqdm(DataLoader(samples, batch_sampler=rows), disable=not ranks.main)
    for step, batch in enumerate(bar):
        lr = common.learning_rate(step, config.max_steps, config.learning_rate, "cosine", warmup_ratio=0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        result = net(*(batch[name].to(ranks.device) for name in model.inputs))
        optimizer.zero_grad()
        result["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        entry = summary([result], model.num_codes) | {"lr": lr, "samples_per_s": meter.tick(batch_size)}
        log.write(step=step, **entry)
        codes = f"codes {min(entry['usage'])}/{model.num_codes}"
        bar.set_postfix_str(f"loss {entry['loss']:.4f}, {codes}, {entry['samples_per_s']:.0f} samples/s", refresh=False)
    log.close()


@torch.no_grad()
def measure(model, samples, device, batch_size):
    """`summary` over every sample once, in evaluation mode."""
    model.eval()
    loader = DataLoader(samples, batch_size, sampler=range(samples.epoch_length))
    return summary([model(*(batch[name].to(device) for name in model.inputs)) for batch in loader], model.num_codes)


def summary(results, num_codes):
    """Of `forward`'s results: means of the scalars over all processes, usage and perplexity per code position."""
    names = [name for name in results[0] if name != "codes"]
    means = torch.stack([torch.stack([result[name].detach() for name in names]) for result in results]).mean(0)
    used, perplexity = code_usage(torch.cat([result["codes"] for result in results]), num_codes)
    entry = dict(zip(names, common.all_mean(means).tolist(), strict=True))
    return entry | {"usage": used.tolist(), "perplexity": perplexity.tolist()}


@torch.no_grad()
def encode_episode(model, frames, batch_size):
    """Codes i64 [n, P] and vectors f32 [n, P, d] of an episode's n frames (u8 arrays); each frame's features once."""
    device = model.queries.device
    parts = [torch.from_numpy(np.stack(frames[at : at + batch_size])) for at in range(0, len(frames), batch_size)]
    features = torch.cat([model.features(part.to(device)) for part in parts])  # [n, N, F]
    later = features[torch.arange(len(frames)).add(model.delta).clamp(max=len(frames) - 1)]  # [n, N, F]
    pairs = zip(features.split(batch_size), later.split(batch_size), strict=True)
    codes, vectors = zip(*(model.encode(a, b) for a, b in pairs), strict=True)
    return torch.cat(codes), torch.cat(vectors)


def label_steps(index, model, batch_size, rank=0, world=1):
    """codes u8 [S, P] and vectors f32 [S, P, d] of every step; each process encodes its own part of the episodes."""
    check_camera(model, index)
    codes = torch.zeros(len(index), model.num_queries, dtype=torch.uint8, device=model.queries.device)
    vectors = torch.zeros(*codes.shape, model.dim, device=codes.device)
    with tqdm(total=len(index) // world, unit=" samples", disable=rank > 0) as bar:
        for episode in range(rank, len(index.starts) - 1, world):
            start, end = index.starts[episode : episode + 2]
            frames = [model.features.read(index.image(model.camera, step)) for step in range(start, end)]
            codes[start:end], vectors[start:end] = encode_episode(model, frames, batch_size)
            bar.update(len(frames))
    return common.all_sum(codes), common.all_sum(vectors)


def label(config, ranks):
    """Writes the file that `data.load_labels` reads. Raises FileExistsError rather than replace one."""
    index, model = open_index(config.data, config.cache), load_lam(config.lam).to(ranks.device)
    out = config.out or index.cache / "labels.safetensors"
    if out.exists():
        raise FileExistsError(f"{out} exists. Delete it to label again, or choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    codes, vectors = label_steps(index, model, config.batch_size, ranks.rank, ranks.world)
    used, perplexity = code_usage(codes.long(), model.num_codes)
    if ranks.main:
        info = {"lam": fingerprint(config.lam), "delta": model.delta, "num_codes": model.num_codes}
        common.save_tensors(out, {"codes": codes, "vectors": vectors.half()}, data=index.fingerprint, **info)
    report = f"codes in use {used.tolist()}, perplexity {[round(p, 1) for p in perplexity.tolist()]}"
    common.print0(f"{out}: {len(index)} steps, {report}")
    common.print0(f"Next: torchrun --standalone train.py --variant la_align --data {config.data} --labels {out}")


def main():
    """Runs one of the three commands."""
    commands = {"lam": Lam, "label": Label, "tokenizer": Tokenizer}
    config = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    ranks = common.start_ranks()
    (label if isinstance(config, Label) else train)(config, ranks)
    common.stop_ranks()


if __name__ == "__main__":
    main()
