"""Quantisers: codebooks that turn the vectors of an encoder into codes, and what measures how well they are used.

Implements the two codebooks of VQ-VAE (van den Oord et al., arXiv 1711.00937), "ema" (appendix A) and "loss" (equation
3), and k-means++ (Arthur and Vassilvitskii, 2007). Both codebooks start on encoder outputs and restart unused codes.
Leaves out residual and product quantisation.

Nothing here waits for a GPU: what depends on numbers is chosen by `torch.where`, not by `if`.

To add a quantiser, write a subclass of `Quantiser` and give it a line in `QUANTISERS`. The option `--codebook` of
`python train_latent.py lam` then offers it; training, saving, labelling and probing need no other change.

Axes: B batch, n vectors of a sample, P codes per step, K codebook size, d width of a code.
"""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import all_sum

COMMITMENT_WEIGHT = 0.25  # of the commitment loss


class Quantiser(nn.Module):
    """The interface that all quantisers share: vectors f32 [..., d] to codes i64 [...] in 0 .. K - 1, and back.

    A subclass takes (num_codes, dim, patience, seed), as all do, and provides

        codebook        f32 [K, d], a parameter, a buffer or a property: the decoder reads code k as codebook[k]
        loss            the loss that it adds to the model's

    It may override `nearest` (how a code is chosen), `straight_through` (the gradient), `initialise` and `update` (what
    the codebook learns from a batch), `set_codebook` and `freeze`. Its parameters and persistent buffers are saved with
    the model. `updates` counts the training batches.
    """

    def __init__(self, num_codes, dim, patience=50, seed=0):
        """Set up K = num_codes codes of d = dim numbers.

        patience: updates after which an unused code may restart; seed: of all random draws.
        """
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.patience = patience
        self.seed = seed
        self.frozen = False
        self.first_batch = True  # of this process
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def nearest(self, x):
        """Return the codes i64 [...] of x [..., d], by Euclidean distance; the rest of the batch has no influence."""
        distance = torch.cdist(x.flatten(0, -2), self.codebook, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.argmin(-1).view(x.shape[:-1])

    def straight_through(self, x, codes):
        """Return the vectors [..., d] of `codes` i64 [...]; their gradient goes to x [..., d] unchanged."""
        return x + (self.codebook[codes] - x).detach()

    def forward(self, x, valid=None):
        """Quantise x f32 [B, n, d], and in training let the codebook learn from it unless it is frozen.

        valid: bool [B, n], the vectors that count (default: all). Returns vectors [B, n, d], codes i64 [B, n], loss [].
        """
        valid = x.new_ones(x.shape[:-1]) if valid is None else valid.to(x.dtype)
        learning = self.training and not self.frozen
        if learning and self.first_batch:
            self.initialise(x.detach(), valid)
            self.first_batch = False
        codes = self.nearest(x)
        vectors = self.straight_through(x, codes)
        loss = self.loss(x, codes, valid)
        if learning:
            self.updates += 1
            self.update(x.detach(), codes, valid)
        return vectors, codes, loss

    def loss(self, x, codes, valid):
        """Return the loss [] of x f32 [B, n, d] and its codes i64 [B, n]. valid: f32 [B, n] of 0 and 1."""
        raise NotImplementedError

    def initialise(self, x, valid):
        """Place the codes before the first training batch of a process, x f32 [B, n, d] and valid f32 [B, n].

        Do so only where `updates` is 0: a run may have been resumed.
        """

    def update(self, x, codes, valid):
        """Let the codebook follow a training batch x f32 [B, n, d] with its codes i64 [B, n] and valid f32 [B, n]."""

    @torch.no_grad()
    def set_codebook(self, codebook):
        """Copy the codes from `codebook` f32 [K, d]; training goes on from them, without `initialise`."""
        self.codebook.copy_(codebook)
        self.updates.clamp_(min=1)

    def freeze(self):
        """Keep the codebook as it is from now on. The commitment loss still pulls the encoder towards it."""
        self.frozen = True
        self.requires_grad_(False)


class VectorQuantiser(Quantiser):
    """A codebook on encoder outputs: codes start on those of the first batch, and unused codes restart on others.

    A code is unused when no vector chose it for `patience` updates. All processes have the same codebook, and n
    processes that of one: counts and sums run over all processes, initialisation and restarts draw from their common
    batch, with numbers keyed by (seed, updates).
    """

    def __init__(self, num_codes, dim, patience=50, seed=0):
        super().__init__(num_codes, dim, patience, seed)
        self.register_buffer("unused", torch.zeros(num_codes, dtype=torch.long))  # updates since a code was last chosen

    def loss(self, x, codes, valid):
        """Return 0.25 x the commitment loss: the mean squared distance of x to its codes, for the encoder alone."""
        return COMMITMENT_WEIGHT * masked_mse(x - self.codebook[codes].detach(), valid)

    def initialise(self, x, valid):
        """Put every code on a vector of the first batch."""
        self._reinitialise((self.updates == 0).expand(self.num_codes), x, valid)

    @torch.no_grad()
    def update(self, x, codes, valid):
        """Move the codes towards the vectors that chose them and restart those that have been unused for too long."""
        chosen = (F.one_hot(codes, self.num_codes) * valid[..., None]).flatten(0, 1)  # [B * n, K]
        counts = all_sum(chosen.sum(0))  # [K]
        self._move(x.flatten(0, 1), chosen, counts)
        self.unused.copy_(torch.where(counts > 0, 0, self.unused + 1))
        self._reinitialise(self.unused >= self.patience, x, valid)

    def _move(self, x, chosen, counts):
        """Move the codes. x: f32 [B * n, d]; chosen: f32 [B * n, K], one-hot; counts: f32 [K], over all processes."""

    @torch.no_grad()
    def _reinitialise(self, which, x, valid):
        """Put the codes `which` (bool [K]) on distinct vectors of the global batch (repeated if there are too few)."""
        pool = gather_batch(torch.cat([x, valid[..., None]], -1)).flatten(0, 1)  # [all, d + 1]
        is_valid = pool[:, -1] > 0
        numbers = random_numbers(len(pool), self.seed, self.updates)
        order = torch.where(is_valid, numbers, torch.iinfo(torch.int64).max).argsort()  # valid ones first
        rank = (which.cumsum(0) - 1).clamp(min=0)  # of a code among those that are placed
        vectors = pool[order[rank % is_valid.sum().clamp(min=1)], :-1]  # [K, d]
        self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))
        self.unused.copy_(torch.where(which, 0, self.unused))

    def set_codebook(self, codebook):
        """Copy the codes from `codebook` f32 [K, d]; all count as just used."""
        super().set_codebook(codebook)
        self.unused.zero_()


class EMAQuantiser(VectorQuantiser):
    """A codebook of running means: each code is that of the vectors that chose it (arXiv 1711.00937, appendix A).

    A code that starts or restarts has count 1 and the matching sum.
    """

    decay = 0.99  # share of the running sums that one update keeps

    def __init__(self, num_codes, dim, patience=50, seed=0):
        super().__init__(num_codes, dim, patience, seed)
        self.register_buffer("codebook", torch.zeros(num_codes, dim))
        self.register_buffer("sums", torch.zeros(num_codes, dim))  # running sum of the vectors of each code
        self.register_buffer("counts", torch.zeros(num_codes))  # running number of the vectors of each code

    def _move(self, x, chosen, counts):
        sums = all_sum(chosen.T @ x)  # [K, d]
        counts = self.counts.lerp(counts, 1 - self.decay)
        sums = self.sums.lerp(sums, 1 - self.decay)
        known = counts > 1e-20  # a code that is long unused keeps its place: smaller numbers lose their digits
        self.counts.copy_(torch.where(known, counts, self.counts))
        self.sums.copy_(torch.where(known[:, None], sums, self.sums))
        self.codebook.copy_(self.sums / self.counts[:, None])

    @torch.no_grad()
    def _reinitialise(self, which, x, valid):
        super()._reinitialise(which, x, valid)
        self.sums.copy_(torch.where(which[:, None], self.codebook, self.sums))
        self.counts.copy_(torch.where(which, 1.0, self.counts))

    @torch.no_grad()
    def set_codebook(self, codebook):
        """Copy the codes from `codebook` f32 [K, d], each with count 1."""
        super().set_codebook(codebook)
        self.sums.copy_(codebook)
        self.counts.fill_(1.0)


class GradientQuantiser(VectorQuantiser):
    """A codebook that is a parameter, pulled to the vectors that chose it (arXiv 1711.00937, equation 3; UniVLA)."""

    def __init__(self, num_codes, dim, patience=50, seed=0):
        super().__init__(num_codes, dim, patience, seed)
        self.codebook = nn.Parameter(torch.zeros(num_codes, dim))

    def loss(self, x, codes, valid):
        """Return 0.25 x commitment loss + codebook loss, the latter for the codes alone and only until `freeze`."""
        loss = super().loss(x, codes, valid)
        if not self.frozen:
            loss = loss + masked_mse(x.detach() - self.codebook[codes], valid)
        return loss


QUANTISERS = {"ema": EMAQuantiser, "loss": GradientQuantiser}  # the choices of `train_latent.py lam --codebook`


# ----------------------------------------------------------------------------------------------------------------------
# What quantisers and latent models share


def kmeans(x, count, seed=0):
    """Return `count` means [count, d] of x [n, d]: k-means++ chooses the first ones, then Lloyd's rounds move them."""
    rng = np.random.default_rng(seed)
    means = x.new_empty(count, x.shape[1])
    nearest = x.new_ones(len(x))  # squared distance to the nearest mean so far; the first mean is drawn uniformly
    for number in range(count):
        chance = nearest.double().cpu().numpy() + 1e-12  # above 0 where x has fewer distinct vectors than means
        means[number] = x[rng.choice(len(x), p=chance / chance.sum())]
        distance = (x - means[number]).square().sum(1)
        nearest = torch.minimum(nearest, distance) if number else distance
    for _ in range(20):
        codes = torch.cdist(x, means).argmin(1)
        counts = torch.bincount(codes, minlength=count)[:, None]
        sums = torch.zeros_like(means).index_add_(0, codes, x)
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means


def random_numbers(count, seed, updates):
    """Return i64 [count] pseudo-random numbers keyed by (seed, updates), after SplitMix64 (Steele et al., 2014).

    Its shifts are of u64, those here of i64. updates: i64 [], on the device on which they are made.
    """
    x = torch.arange(count, device=updates.device) + (updates + (seed << 32)) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * _signed(factor)
    return x ^ (x >> 31)


def _signed(number):
    """Return the i64 with the bits of a u64."""
    return number - (1 << 64) if number >> 63 else number


def gather_batch(x):
    """Return the global batch [world * B, ...] of all processes' x [B, ...]; process r holds its samples r::world."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def masked_mse(error, valid):
    """Return the sum of error² [..., d] over the valid entries (f32 or bool [...]) / the number of ALL entries.

    The divisor is a constant, so that the average over n processes equals the value of one.
    """
    return (error.square() * valid[..., None]).mean()


def code_counts(codes, num_codes):
    """Return how often each code occurs at each position, i64 [P, K], in codes i64 [n, P]; -1 is none."""
    return (codes[..., None] == torch.arange(num_codes, device=codes.device)).sum(0)


def code_usage(counts):
    """Return (number of codes in use, perplexity = exp of the entropy), [P] each, of `code_counts`' counts [P, K]."""
    share = counts / counts.sum(-1, keepdim=True)
    return (counts > 0).sum(-1), torch.special.entr(share).sum(-1).exp()
