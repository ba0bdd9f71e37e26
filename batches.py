"""Samples, batches and pixels: from the steps of a data set to what a model is trained on.

The sample at a position of the stream is a pure function of (seed, position), so that any number of processes and of
data workers, and any later start, sees the same batches. Pixels are cropped, resized and coloured on the whole batch,
on its device, with the augmentation of OpenVLA-OFT (arXiv 2502.19645).
Left out: samples of latent models (train_latent.py).

Axes: S steps of a data set, E episodes, B batch, C cameras, H chunk steps, A action size, N proprio size, P codes per
step, d width of a code.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from index import episode_steps
from normalise import normalise, standardise

CROP_AREA = 0.9  # share of the area that a training crop, and the centre crop at evaluation, keeps


# ----------------------------------------------------------------------------------------------------------------------
# Samples


class ShuffledSteps(torch.utils.data.Dataset):
    """An endless, globally shuffled stream of the steps of one or more data sets; a subclass adds `sample`.

    The step at a position is a pure function of (seed, position): each epoch of `epoch_length` positions is a new
    permutation. A data set of weight w occurs w times per epoch; for a fraction, a random part of it does.
    """

    def __init__(self, indices, seed=0, weights=None, episodes=None):
        """weights: one number per index (default: 1 each); episodes: per index the episodes to use (default: all)."""
        self.indices = indices
        self.seed = seed
        self.weights = weights or [1.0] * len(indices)
        self.steps = [episode_steps(index, chosen) for index, chosen in zip(indices, episodes or [None] * len(indices))]
        self.epoch_length = sum(round(w * len(s)) for w, s in zip(self.weights, self.steps))
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch):
        """Return the order of one epoch, i64 [epoch_length, 2] of (number of the data set, step)."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        places = []
        for number, (steps, weight) in enumerate(zip(self.steps, self.weights)):
            count = round(weight * len(steps))
            permutations = [rng.permutation(steps) for _ in range(count // len(steps) + 1)]
            places.append(np.stack([np.full(count, number), np.concatenate(permutations)[:count]], 1))
        return rng.permutation(np.concatenate(places))

    def place(self, position):
        """Return (number of the data set, step) at a position of the stream."""
        epoch, row = divmod(position, self.epoch_length)
        number, step = self._order(epoch)[row]
        return int(number), int(step)

    def describe_samples(self, positions):
        """Return file, step and episode of the samples at some positions, as text for messages."""
        texts = []
        for number, step in map(self.place, positions):
            file, place = self.indices[number].locate(step)
            texts.append(f"{file}: {place}")
        return "; ".join(texts)

    def sample(self, number, step):
        """Return the sample at `step` of data set `number`, without random draws."""
        raise NotImplementedError

    def __len__(self):
        return 2**62  # endless: the training loop decides when to stop

    def __getitem__(self, position):
        """Return the sample at a position of the stream."""
        return self.sample(*self.place(position))


class ActionChunks(ShuffledSteps):
    """The training samples of a policy. Each item holds

    images      list of u8 [h, w, 3], one per camera      proprio  f32 [N] normalised
    actions     f32 [H, A] normalised                      valid    bool [H], False past the end of the episode
    text        str, the instruction                       draws    f32 [C, 6] in [0, 1): what augmentation uses
    codes       i64 [H, P] and vectors f32 [H, P, d], when labels are given
    """

    def __init__(self, indices, stats, cameras, chunk, seed=0, labels=None, weights=None, episodes=None):
        """stats: one `statistics` per index; labels: None, or one `Labels` per index; the rest as for `ShuffledSteps`.

        Raises ValueError unless all data sets pass `check_same_sizes`.
        """
        super().__init__(indices, seed, weights, episodes)
        self.stats = stats
        self.labels = labels
        self.cameras = cameras
        self.chunk = chunk
        check_same_sizes(indices, cameras)
        self.actions = [normalise(standardise(i.columns["action"]), s["action"]) for i, s in zip(indices, stats)]
        self.proprio = [normalise(i.columns["state"], s["proprio"]) for i, s in zip(indices, stats)]

    def __getitem__(self, position):
        """Return the item at a position of the stream, with augmentation draws keyed by (seed, position)."""
        draws = np.random.default_rng([self.seed, 1, position]).random((len(self.cameras), 6), np.float32)
        return super().__getitem__(position) | {"draws": torch.from_numpy(draws)}

    def sample(self, number, step):
        """Return the item at `step` of data set `number`, without augmentation draws."""
        index = self.indices[number]
        actions, valid, steps = action_chunk(self.actions[number], index.starts, step, self.chunk)
        item = {
            "images": [torch.from_numpy(index.image(camera, step).copy()) for camera in self.cameras],
            "proprio": torch.from_numpy(self.proprio[number][step]),
            "actions": torch.from_numpy(actions),
            "valid": torch.from_numpy(valid),
            "text": index.instructions[index.episode_of(step)],
        }
        if self.labels is not None:
            labels = self.labels[number]
            item["codes"] = torch.from_numpy(labels.codes[steps].astype(np.int64))  # [H, P]
            item["vectors"] = torch.from_numpy(labels.vectors[steps].astype(np.float32))  # [H, P, d]
        return item


def action_chunk(actions, starts, step, chunk):
    """Return the chunk of actions f32 [S, A] that begins at `step`: actions f32 [H, A], valid bool [H], steps i64 [H].

    starts: i64 [E + 1] as of an `Index`. Past the end of the episode a step is not valid, its action is no motion with
    the gripper of the last action, and its number is that of the last step.
    """
    end = int(starts[np.searchsorted(starts, step, "right")])
    steps = np.arange(step, step + chunk)
    valid = steps < end
    steps = np.minimum(steps, end - 1)
    chosen = actions[steps]
    chosen[~valid, :-1] = 0.0
    return chosen, valid, steps


def check_same_sizes(indices, cameras):
    """Raise ValueError unless all data sets have the cameras, and images, actions and states of the same sizes.

    The last action must be a gripper, within [-1, 1].
    """
    first = indices[0]
    for index in indices:
        missing = [camera for camera in cameras if camera not in index.cameras]
        if missing:
            raise ValueError(f"{index.name} has no camera {missing}; it has {index.cameras}. Choose with --cameras.")
        for name in ("action", "state"):
            if name not in index.columns:
                raise ValueError(f"{index.name} has no steps feature '{name}'; it has {list(index.columns)}")
            shape = index.columns[name].shape[1:]
            expected = first.columns[name].shape[1:]
            if shape != expected:
                raise ValueError(
                    f"{name} has shape {shape} in {index.name} but {expected} in {first.name}; they cannot be mixed."
                )
        sizes = [(index.image(camera, 0).shape, first.image(camera, 0).shape) for camera in cameras]
        if any(size != expected for size, expected in sizes):
            raise ValueError(f"{index.name} stores images of other sizes than {first.name}: {sizes}")
        if np.abs(index.columns["action"][:, -1]).max() > 1:
            raise ValueError(
                f"the last action of {index.name} leaves [-1, 1]; it must be the gripper, -1 open, 1 close"
            )


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


def prepare_images(images, size, draws=None):
    """Return the cameras' u8 images as f32 [B, C, 3, size, size] in [-1, 1], on the images' device.

    images: list of C tensors u8 [B, h, w, 3]; draws: f32 [B, C, 6] in [0, 1) for training, None for evaluation.
    With draws, OpenVLA-OFT's augmentation: random crop of 90 % of the area, brightness +-0.2, contrast and saturation
    0.8 to 1.2, hue +-0.05. Without, the centre crop of the same area.
    """
    frames = []
    for number, batch in enumerate(images):
        pixels = batch.permute(0, 3, 1, 2).float() / 255  # [B, 3, h, w]
        if draws is None:
            pixels = _crop(pixels, size, None)
        else:
            pixels = _crop(pixels, size, draws[:, number, :2])
            pixels = colour_jitter(pixels, draws[:, number, 2:])
        frames.append(pixels)  # [B, 3, size, size]
    return torch.stack(frames, 1) * 2 - 1


def _crop(pixels, size, u):
    """Return pixels [B, 3, h, w] cropped to CROP_AREA of the area and resized bilinearly, [B, 3, size, size].

    u: f32 [B, 2] in [0, 1), where the crop lies between left and right and between top and bottom; None for the centre.
    """
    side = CROP_AREA**0.5
    room = 1 - side
    centre = torch.zeros(len(pixels), 2, device=pixels.device) if u is None else (2 * u - 1) * room
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta.diagonal(0, 1, 2).fill_(side)
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, (len(pixels), 3, size, size), align_corners=False)
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
