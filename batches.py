"""Samples, batches and pixels: from the steps of data sets to what a model is trained on.

The sample at a position of the stream is a pure function of (seed, position), so that any number of processes and of
data workers, and any later start, sees the same batches; memory grows with the number of episodes alone. Pixels are
cropped or shifted, resized and coloured on the whole batch, on its device, with the augmentation of OpenVLA-OFT (arXiv
2502.19645) or DrQ (arXiv 2004.13649).
Left out: samples of latent models (train_latent.py).

Axes: S steps of a data set, E episodes, B batch, C cameras, H chunk steps, A action size, N proprio size, P codes per
step, d width of a code.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from images import common_sides, resize_image

AUGMENTATIONS = ("crop", "shift")
CROP_AREA = 0.9  # share of the area that a training crop, and the centre crop at evaluation, keeps
SHIFT = 1 / 24  # of the side, by which a shifted image moves at most


# ----------------------------------------------------------------------------------------------------------------------
# Shuffling without tables


def permute(position, count, keys):
    """Return where a pseudo-random permutation of 0 .. count - 1 puts `position`: a Feistel network.

    keys: an even number of integers, one for each round. Numbers beyond `count` are permuted again until they are below
    (cycle walking): at most two tries on average, for three numbers or more.
    """
    bits = max(2, (count - 1).bit_length())
    while True:
        left_bits, right_bits = bits // 2, bits - bits // 2
        left, right = position >> right_bits, position & ((1 << right_bits) - 1)
        for key in keys:
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, (left + (mixed >> 32)) & ((1 << left_bits) - 1)
            left_bits, right_bits = right_bits, left_bits
        position = left << right_bits | right
        if position < count:
            return position


@functools.lru_cache(maxsize=256)
def round_keys(*seed):
    """Return the keys of `permute` that belong to some integers."""
    return tuple(int(key) for key in np.random.default_rng(seed).integers(1 << 62, size=8))


class EpisodeSteps:
    """The steps of some episodes as a sequence: number k is found from the episodes' lengths alone."""

    def __init__(self, starts, episodes):
        """starts: i64 [E + 1] as of an `Index`; episodes: numbers of the episodes, in any order."""
        self.first = starts[episodes]
        self.ends = np.cumsum(starts[np.add(episodes, 1)] - self.first)

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = int(np.searchsorted(self.ends, number, "right"))
        before = int(self.ends[row - 1]) if row else 0
        return int(self.first[row]) + number - before


@dataclass
class Source:
    """Episodes of one data set that are drawn alike."""

    dataset: int
    """number of the data set"""
    episodes: np.ndarray
    """their numbers, i64 [n]"""
    weight: float = 1.0
    """how often each of their steps occurs in an epoch; of a fraction, a random part occurs"""
    labelled: bool = True
    """whether their actions are used; else they are video"""


class ShuffledSteps(torch.utils.data.Dataset):
    """An endless, globally shuffled stream of the steps of one or more data sets; a subclass adds `sample`.

    The step at a position is a pure function of (seed, position): each epoch of `epoch_length` positions is a new
    permutation of all sources together.
    """

    def __init__(self, datasets, seed=0, sources=None):
        """sources: list of `Source` (default: all episodes of each data set, labelled where there are actions)."""
        self.datasets = datasets
        self.seed = seed
        self.sources = sources or [
            Source(number, np.arange(each.num_episodes), labelled=each.action_size > 0)
            for number, each in enumerate(datasets)
        ]
        self.steps = [EpisodeSteps(datasets[source.dataset].starts, source.episodes) for source in self.sources]
        self.counts = [round(source.weight * len(steps)) for source, steps in zip(self.sources, self.steps)]
        self.ends = np.cumsum(self.counts)
        self.epoch_length = int(self.ends[-1])
        if not self.epoch_length:
            raise ValueError("the sources of the data have no step, or weights of 0")

    def place(self, position):
        """Return (number of the source, step) at a position of the stream."""
        epoch, slot = divmod(position, self.epoch_length)
        slot = permute(slot, self.epoch_length, round_keys(self.seed, 0, epoch))
        number = int(np.searchsorted(self.ends, slot, "right"))
        within = slot - (int(self.ends[number - 1]) if number else 0)
        steps = self.steps[number]
        repetition, within = divmod(within, len(steps))  # of a source that occurs more than once in an epoch
        return number, steps[permute(within, len(steps), round_keys(self.seed, 0, epoch, number + 1, repetition))]

    def describe_samples(self, positions):
        """Return file, step and episode of the samples at some positions, as text for messages."""
        texts = []
        for number, step in map(self.place, positions):
            file, place = self.datasets[self.sources[number].dataset].locate(step)
            texts.append(f"{file}: {place}")
        return "; ".join(texts)

    def sample(self, number, step):
        """Return the sample at `step` of source `number`, without random draws."""
        raise NotImplementedError

    def __len__(self):
        return 2**62  # endless: the training loop decides when to stop

    def __getitem__(self, position):
        """Return the sample at a position of the stream."""
        return self.sample(*self.place(position))


# ----------------------------------------------------------------------------------------------------------------------
# Samples of a policy


class ActionChunks(ShuffledSteps):
    """The training samples of a policy. Each item holds

    images          list of u8 [h, w, 3], one per camera   proprio  f32 [N] normalised
    actions         f32 [H, A] normalised                   valid    bool [H], False past the end of the episode
    action_weight   f32 [A], the weight of each dimension's error; 0 for video, and for dimensions that are padding
    text            str, the instruction                    draws    f32 [C, 6] in [0, 1): what augmentation uses
    codes           i64 [H, P] and vectors f32 [H, P, d], when labels are given

    and, when there are several sources, the number of its own, of its embodiment, and of its cameras (the others are
    black): source, embodiment and num_cameras, i64 [] each.

    Data sets of different embodiments are padded with 0 to the largest A, N and C. The error of a sample is a mean over
    its own dimensions, and that of labelled samples is divided by their expected share, so that neither padding nor
    video changes the scale of the loss.
    """

    def __init__(self, datasets, cameras, chunk, seed=0, labels=None, sources=None):
        """cameras: of each data set the names in order; labels: None, or one `Labels` per data set."""
        super().__init__(datasets, seed, sources)
        self.labels = labels
        self.cameras = cameras
        self.chunk = chunk
        self.names = list(dict.fromkeys(dataset.spec.embodiment for dataset in datasets))  # of the embodiments
        self.action_size = max(dataset.action_size for dataset in datasets)
        self.state_size = max(dataset.state_size for dataset in datasets)
        self.num_cameras = max(map(len, cameras))
        self.source_names = [
            datasets[source.dataset].name + ("" if source.labelled else " (video)") for source in self.sources
        ]
        self.image_sides = common_sides(datasets, cameras)
        expected = [count for source, count in zip(self.sources, self.counts) if source.labelled]
        self.labelled_share = sum(expected) / self.epoch_length
        self.fixed = [self._fixed_entries(number) for number in range(len(self.sources))]

    def _fixed_entries(self, number):
        """Return what all items of a source have in common."""
        source = self.sources[number]
        dataset = self.datasets[source.dataset]
        weight = torch.zeros(self.action_size)
        if source.labelled:
            weight[: dataset.action_size] = self.action_size / dataset.action_size / (self.labelled_share or 1)
        entries = {"action_weight": weight}
        if len(self.sources) > 1 or len(self.names) > 1:
            entries["source"] = torch.tensor(number)
            entries["embodiment"] = torch.tensor(self.names.index(dataset.spec.embodiment))
            entries["num_cameras"] = torch.tensor(len(self.cameras[source.dataset]))
        return entries

    def __getitem__(self, position):
        """Return the item at a position of the stream, with augmentation draws keyed by (seed, position)."""
        draws = np.random.default_rng([self.seed, 1, position]).random((self.num_cameras, 6), np.float32)
        return super().__getitem__(position) | {"draws": torch.from_numpy(draws)}

    def sample(self, number, step):
        """Return the item at `step` of source `number`, without augmentation draws."""
        source = self.sources[number]
        dataset = self.datasets[source.dataset]
        steps, valid = chunk_steps(dataset.starts, step, self.chunk)
        item = {
            "images": self._images(source.dataset, step),
            "proprio": torch.from_numpy(pad(dataset.normalised_state([step])[0], self.state_size)),
            "valid": torch.from_numpy(valid),
            "text": dataset.instruction(step),
        }
        item |= self.fixed[number]
        if source.labelled:
            item["actions"] = torch.from_numpy(pad(action_chunk(dataset, steps, valid), self.action_size))
        else:
            item["actions"] = torch.zeros(self.chunk, self.action_size)
        if self.labels is not None:
            labels = self.labels[source.dataset]
            item["codes"] = torch.from_numpy(labels.codes[steps].astype(np.int64))  # [H, P]
            item["vectors"] = torch.from_numpy(labels.vectors[steps].astype(np.float32))  # [H, P, d]
        return item

    def _images(self, number, step):
        """Return the images of a step, black ones for cameras that the data set does not have."""
        images = []
        for slot, side in enumerate(self.image_sides):
            if slot >= len(self.cameras[number]):
                images.append(torch.zeros(side, side, 3, dtype=torch.uint8))
                continue
            pixels = self.datasets[number].image(self.cameras[number][slot], step)
            images.append(torch.from_numpy(np.array(resize_image(pixels, side))))
        return images


def chunk_steps(starts, steps, chunk):
    """Return the steps i64 [..., H] of the chunks that begin at `steps` i64 [...], and bool [..., H]: in the episode.

    starts: i64 [E + 1] as of an `Index`. Past the end of the episode a step's number is that of the last step.
    """
    last = starts[np.searchsorted(starts, steps, "right"), None] - 1  # [..., 1]
    wanted = np.add.outer(steps, np.arange(chunk))  # [..., H]
    return np.minimum(wanted, last), wanted <= last


def action_chunk(dataset, steps, valid):
    """Return normalised actions f32 [H, A] of `chunk_steps`. Past the end, which has no loss, relative ones are 0."""
    actions = dataset.normalised_action(steps)
    if not valid.all():
        lasting = set(dataset.spec.absolute) | {gripper.index for gripper in dataset.spec.grippers}
        relative = [number for number in range(dataset.action_size) if number not in lasting]
        actions[np.ix_(~valid, relative)] = 0.0
    return actions


def pad(x, size):
    """Return f32 [..., n] with zeros behind up to [..., size]."""
    if x.shape[-1] == size:
        return x
    return np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]), np.float32)], -1)


class StepBatchSampler(torch.utils.data.Sampler):
    """The stream positions of one rank's micro-batches, for a range of updates.

    The global batch of update u has the positions u * global_batch to (u + 1) * global_batch - 1. Rank r of `world`
    takes every world-th of them from the r-th on, in micro-batches of `micro_batch`, in order.
    """

    def __init__(self, first_update, last_update, global_batch, micro_batch, rank=0, world=1):
        """last_update: the first update that is left out."""
        self.updates = range(first_update, last_update)
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world = world

    def __iter__(self):
        for update in self.updates:
            start = update * self.global_batch
            positions = range(start + self.rank, start + self.global_batch, self.world)
            for at in range(0, len(positions), self.micro_batch):
                yield list(positions[at : at + self.micro_batch])

    def __len__(self):
        return len(self.updates) * (self.global_batch // self.world // self.micro_batch)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels: crop, resize and colour on the batch


def prepare_images(images, size, draws=None, augmentation="crop"):
    """Return the cameras' u8 images as f32 [B, C, 3, size, size] in [-1, 1], on the images' device.

    images: list of C tensors u8 [B, h, w, 3]; draws: f32 [B, C, 6] in [0, 1) for training, None for evaluation.
    "crop" with draws is OpenVLA-OFT's augmentation: random crop of 90 % of the area, brightness +-0.2, contrast and
    saturation 0.8 to 1.2, hue +-0.05; without, the centre crop of the same area. "shift" moves the whole image by up to
    `SHIFT` of its side instead, by whole pixels, and leaves it as it is without draws.
    """
    place = {"crop": _crop, "shift": _shift}[augmentation]
    frames = []
    for number, batch in enumerate(images):
        pixels = place(batch, size, None if draws is None else draws[:, number, :2])
        if draws is not None:
            pixels = colour_jitter(pixels, draws[:, number, 2:])
        frames.append(pixels)  # [B, 3, size, size]
    return torch.stack(frames, 1) * 2 - 1


def _shift(images, size, u):
    """Return images u8 [B, h, w, 3] as f32 [B, 3, size, size] in [0, 1], moved by whole pixels, their edges repeated.

    u: f32 [B, 2] in [0, 1), how far to the right and down; None for not at all.
    """
    pixels = images
    if images.shape[1:3] != (size, size):
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    if u is not None:
        reach = round(SHIFT * size)
        places = torch.arange(size, device=u.device)
        sources = (places[:, None] - ((2 * reach + 1) * u[:, None]).long() + reach).clamp(0, size - 1)  # [B, size, 2]
        columns, rows = sources.unbind(2)
        first = size * torch.arange(len(u), device=u.device)[:, None, None]  # row of each image in the batch
        flat = (first + rows[:, :, None]) * size + columns[:, None]  # [B, size, size]
        pixels = pixels.reshape(-1, 3).index_select(0, flat.flatten()).view(-1, size, size, 3)  # [B, size, size, 3]
    return pixels.permute(0, 3, 1, 2).float() / 255


def _crop(images, size, u):
    """Return images u8 [B, h, w, 3] as f32 [B, 3, size, size] in [0, 1]: CROP_AREA of the area, resized bilinearly.

    u: f32 [B, 2] in [0, 1), where the crop lies between left and right and between top and bottom; None for the centre.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if max(images.shape[1:3]) > size:  # with a filter: what follows reads single pixels
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    side = CROP_AREA**0.5
    centre = pixels.new_zeros(len(pixels), 2) if u is None else (2 * u - 1) * (1 - side)
    places = (2 * torch.arange(size, device=pixels.device) + 1) / size - 1  # of the pixels, from -1 to 1
    columns, rows = (side * places[:, None] + centre[:, None]).unbind(2)  # [B, size] each
    grid = torch.stack(torch.broadcast_tensors(columns[:, None], rows[:, :, None]), 3)  # [B, size, size, 2]
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


@functools.cache
def _yiq(device):
    """Return the matrices from RGB to YIQ and back, f32 [3, 3] each, made on the device once.

    A copy to a GPU or an inverse on it would wait for the GPU at every batch.
    """
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)


def colour_jitter(pixels, u):
    """Return pixels f32 [B, 3, h, w] in [0, 1] with other brightness, contrast, saturation and hue, drawn from u.

    u: f32 [B, 4] in [0, 1), in that order. Saturation and hue are a scaling and a rotation of the chroma plane of YIQ,
    so that all four are one affine map of the colours per image.
    """
    brightness = 0.4 * u[:, 0] - 0.2
    contrast = 0.8 + 0.4 * u[:, 1]
    saturation = 0.8 + 0.4 * u[:, 2]
    hue = (0.1 * u[:, 3] - 0.05) * 2 * torch.pi  # rad
    to_yiq, from_yiq = _yiq(pixels.device)
    chroma = torch.zeros(len(pixels), 3, 3, device=pixels.device)
    chroma[:, 0, 0].fill_(1)
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * hue.cos()
    chroma[:, 2, 1] = saturation * hue.sin()
    chroma[:, 1, 2] = -chroma[:, 2, 1]
    colour = from_yiq @ chroma @ to_yiq  # [B, 3, 3]
    matrix = colour * contrast[:, None, None]
    mean = pixels.mean((2, 3))[:, :, None]  # [B, 3, 1], what contrast leaves in place
    offset = colour @ (mean + brightness[:, None, None]) - matrix @ mean  # [B, 3, 1]
    flat = torch.baddbmm(offset, matrix, pixels.flatten(2))  # [B, 3, h * w]
    return flat.clamp_(0, 1).view_as(pixels)
