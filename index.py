"""The one interface behind which every data format lies.

An `Index` holds the numbers of a data set and knows where each camera image is stored. Training, labelling, evaluation
and probing read data through it alone. A format is one file with a subclass and its `open_index` (rlds.py), listed in
data.py. Left out: everything that depends on how a format stores its data.

Axes: S steps of a data set, E episodes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CACHE = Path("~/.cache/latent-actions")  # where indices and labels are kept unless --cache says otherwise
COPY_AGAIN = "Copy it again from where it came."


@dataclass
class Index:
    """The contents of a data set, and where they are stored.

    cache: the folder of this index and of labels; fingerprint: hash of the contents, the same wherever the data lies;
    starts: i64 [E + 1], episode e has the steps starts[e] to starts[e + 1] - 1; columns: {name: [S, ...]}, numbers,
    memory-mapped; instructions: [E] texts; metadata: {name: [E] values}. A subclass adds `cameras`, `read_image`,
    `file_of`, `mean_frame_bytes` and `storage_options`.
    """

    name: str
    directory: Path
    cache: Path
    fingerprint: str
    starts: np.ndarray
    columns: dict
    instructions: list
    metadata: dict = field(default_factory=dict)

    def __len__(self):
        return int(self.starts[-1])

    @property
    def num_episodes(self):
        """The number of episodes, E."""
        return len(self.starts) - 1

    @property
    def cameras(self):
        """The names of the cameras, a list."""
        raise NotImplementedError

    def read_image(self, camera, step):
        """Return an image, u8 [height, width, 3]. May raise any exception where the stored image is unusable."""
        raise NotImplementedError

    def file_of(self, step):
        """Return the file that a step is stored in, for messages."""
        raise NotImplementedError

    def mean_frame_bytes(self, camera):
        """Return the mean size of a stored image in bytes."""
        raise NotImplementedError

    def storage_options(self, camera):
        """Return how images were stored, {"size", ...JPEG options}, so that evaluation can store its own alike."""
        raise NotImplementedError

    def image(self, camera, step):
        """Return an image, u8 [height, width, 3].

        Raises ValueError with file, camera, step and episode where the stored image is unusable.
        """
        try:
            return self.read_image(camera, step)
        except Exception as error:  # whatever a decoder raises
            file, place = self.locate(step)
            raise ValueError(f"{file}: camera {camera} at {place} cannot be used: {error}. {COPY_AGAIN}") from error

    def episode_of(self, step):
        """Return the number of the episode that a step belongs to."""
        return int(np.searchsorted(self.starts, step, "right")) - 1

    def locate(self, step):
        """Return (file, "step n of episode m") of a step, for messages."""
        episode = self.episode_of(step)
        return self.file_of(step), f"step {step - self.starts[episode]} of episode {episode}"


def later_steps(index, steps, delta):
    """Return the steps that are `delta` after `steps`, i64 of the same shape; at most the last step of each episode."""
    last = index.starts[np.searchsorted(index.starts, steps, "right")] - 1
    return np.minimum(np.add(steps, delta), last)


def episode_steps(index, episodes):
    """Return the steps of some episodes, or of all episodes for None, as i64 [n]."""
    if episodes is None:
        return np.arange(len(index))
    ranges = [np.arange(index.starts[episode], index.starts[episode + 1]) for episode in episodes]
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def step_episodes(index):
    """Return the episode of every step, i64 [S]."""
    return np.repeat(np.arange(index.num_episodes), np.diff(index.starts))


def split_episodes(index, val_fraction, seed):
    """Return (training, held-out) episode numbers, sorted; at least one is held out when val_fraction > 0."""
    order = np.random.default_rng([seed, 2]).permutation(index.num_episodes)
    held_out = 0
    if val_fraction > 0:
        held_out = min(max(1, round(val_fraction * index.num_episodes)), index.num_episodes - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
