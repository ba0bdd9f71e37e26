"""Which of the predicted actions are executed: the first of each chunk, or an average over the chunks that overlap.

Axes: H chunk steps, A action size.
"""

import numpy as np

DECAY = 0.01  # of an action's weight for each later chunk, in averages (ACT, arXiv 2304.13705: m)


class Execution:
    """The actions of an episode that are planned.

    The policy is asked every `execute` steps. Without averaging the first `execute` actions of each chunk are executed;
    with it each step executes the mean of all chunks that planned it, the k-th oldest with weight exp(-DECAY k) (ACT's
    temporal ensemble). Grippers are averaged like the rest.
    """

    def __init__(self, chunk, execute=0, average=False):
        """chunk: H; execute: from 1 to H, 0 for H. Raise ValueError for others, or where no chunks would overlap."""
        if not 0 <= execute <= chunk:
            raise ValueError(
                f"execute is {execute}; the policy predicts {chunk} actions at once, so it may be 1 to {chunk}"
            )
        self.execute = execute or chunk
        if average and self.execute == chunk:
            raise ValueError(f"chunks of {chunk} actions of which {chunk} are executed do not overlap: lower execute")
        self.average = average
        self.reset()

    def reset(self):
        """Forget everything."""
        self.plans = []  # [H - n, A]: of each chunk, the actions that are still ahead
        self.left = 0  # steps until the policy is asked again

    @property
    def due(self):
        """Whether the policy must be asked before the next action."""
        return not self.left

    def add(self, chunk):
        """Take a new chunk [H, A]."""
        self.plans = [*self.plans, chunk] if self.average else [chunk]
        self.left = self.execute

    def next(self):
        """Return the next action f32 [A]."""
        weights = np.exp(-DECAY * np.arange(len(self.plans)))
        actions = np.stack([plan[0] for plan in self.plans])  # [chunks, A]
        self.plans = [plan[1:] for plan in self.plans if len(plan) > 1]
        self.left -= 1
        if len(actions) == 1:
            return actions[0]
        return (weights @ actions / weights.sum()).astype(np.float32)
