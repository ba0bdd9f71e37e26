"""Many simulators, one policy: each simulator runs in a process of its own, at its own pace.

One policy acts for all that wait for it. A simulator that crashes or hangs is replaced.

Axes: H chunk steps, A action size.
"""

import contextlib
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from tqdm import tqdm

from rollout import Episode, Process

MAX_TRIES = 3  # an episode whose simulator crashes or hangs this often is recorded as an error


class Schedule:
    """The episodes that are left to play, and the order in which simulators get them."""

    def __init__(self, episodes):
        self.remaining = {}  # (suite, task) -> its episodes
        for episode in episodes:
            self.remaining.setdefault((episode.suite, episode.task), []).append(episode)

    def next(self, current, others):
        """Return the next episode for a simulator that is open for task `current` (None: for none), or None.

        It is of the current task; else of the task with most steps left, preferring those that no other simulator is
        open for (`others`). None when opening a second simulator of a task would take longer than the others need.
        """
        self.remaining = {task: episodes for task, episodes in self.remaining.items() if episodes}
        if current in self.remaining:
            return self.remaining[current].pop(0)
        steps = {
            task: sum(episode.max_steps for episode in episodes)
            for task, episodes in self.remaining.items()
            if not current or task not in others or len(episodes) > 3
        }
        if not steps:
            return None
        longest = max(steps, key=lambda task: (task not in others, steps[task]))
        return self.remaining[longest].pop(0)

    def put_back(self, episode):
        """Put an episode back in front of its task's others."""
        self.remaining.setdefault((episode.suite, episode.task), []).insert(0, episode)


@dataclass
class Worker:
    """One simulator process and the episode that it plays."""

    process: Process = field(default_factory=Process)
    task: tuple | None = None  # (suite, task) that its simulator is, or will be, open for
    episode: Episode | None = None
    started: float = 0.0
    last_message: float = field(default_factory=time.monotonic)  # when something was last sent or received

    def begin(self, episode):
        """Let the process play an episode."""
        self.task = (episode.suite, episode.task)
        self.episode = episode
        self.started = self.last_message = time.monotonic()
        with contextlib.suppress(OSError):  # a process that died meanwhile is noticed by `receive`
            self.process.play(episode)

    def act(self, actions):
        """Send the actions that the process waits for, f32 [H, A]."""
        self.last_message = time.monotonic()
        with contextlib.suppress(OSError):
            self.process.act(actions)

    def receive(self):
        """Return (kind, content) of the process's next message; ("died", reason) when there will be none."""
        self.last_message = time.monotonic()
        try:
            return self.process.connection.recv()
        except (EOFError, OSError):  # OSError: it ended, or hangs, in the middle of a message
            return "died", self.process.exit_reason()

    def restart(self):
        """Replace the process, dead or silent, by a new one."""
        self.process.kill()
        self.process = Process()
        self.task = None


def worker_events(workers, watchdog):
    """Wait until a worker sends something or has been silent for `watchdog` seconds; yield (worker, kind, content)."""
    patience = min(worker.last_message for worker in workers) + watchdog - time.monotonic()
    ready = wait([worker.process.connection for worker in workers], max(0.0, patience))
    for worker in workers:
        if worker.process.connection in ready:
            yield worker, *worker.receive()
        elif time.monotonic() - worker.last_message > watchdog:
            yield worker, "died", f"its simulator was silent for {watchdog:g} s"


class Pool:
    """Workers that share a schedule; an episode whose simulator fails is played MAX_TRIES times in all."""

    def __init__(self, episodes, finish, envs, watchdog):
        """Start up to `envs` simulator processes. finish, watchdog: see `play_all`."""
        self.schedule = Schedule(episodes)
        self.finish = finish
        self.watchdog = watchdog
        self.tries = Counter()  # episode -> failed tries
        self.opened = False  # whether any simulator has been opened
        self.failed_openings = 0  # before that
        self.workers = [Worker() for _ in range(min(envs, len(episodes)))]

    @property
    def busy(self):
        """The workers that play an episode."""
        return [worker for worker in self.workers if worker.episode]

    def assign(self):
        """Give episodes to idle workers; return whether any worker is busy."""
        for worker in self.workers:
            if not worker.episode:
                episode = self.schedule.next(worker.task, {other.task for other in self.busy})
                if episode:
                    worker.begin(episode)
        return bool(self.busy)

    def receive(self):
        """Handle the workers' messages; return [(worker, observation)] of those that wait for actions."""
        waiting = []
        for worker, kind, content in worker_events(self.busy, self.watchdog):
            if kind == "open":
                self.opened = True
            elif kind == "observation":
                waiting.append((worker, content))
            elif kind == "done":
                self.end(worker, reason="success" if content["success"] else "step limit", **content)
            elif kind == "refused" or (kind == "unopened" and not self.opened):
                raise RuntimeError(f"{worker.episode.suite} task {worker.episode.task} cannot be played: {content}")
            elif kind in ("unopened", "failed", "died"):
                self.fail(worker, content)
                if kind != "failed":
                    worker.restart()
        return waiting

    def end(self, worker, **result):
        """Hand over the result of a worker's episode."""
        seconds = round(time.monotonic() - worker.started, 2)
        self.finish(worker.episode, result | {"tries": self.tries[worker.episode] + 1, "seconds": seconds})
        worker.episode = None

    def fail(self, worker, reason):
        """Put a worker's episode back, or record it as an error after the last try.

        Raise RuntimeError when simulators keep failing before any was opened.
        """
        if not self.opened:
            self.failed_openings += 1
            if self.failed_openings == MAX_TRIES:
                raise RuntimeError(f"{MAX_TRIES} simulators died before one was open; the last: {reason}")
        episode = worker.episode
        number = self.tries[episode] + 1
        name = f"{episode.suite} task {episode.task} seed {episode.seed}"
        tqdm.write(f"{name}: {reason} (try {number} of {MAX_TRIES})", file=sys.stderr)
        if number == MAX_TRIES:
            self.end(worker, success=None, steps=0, reason=f"error: {reason}", spent={})
            return
        self.tries[episode] = number
        self.schedule.put_back(episode)
        worker.episode = None

    def close(self):
        """End all simulator processes."""
        for worker in self.workers:
            worker.process.kill()


def play_all(episodes, act, finish, envs, watchdog):
    """Play all episodes on `envs` simulator processes, each at its own pace.

    act maps a list of observations to their actions for the simulator, f32 [H, A] each. finish(episode, result) is
    called as each episode ends; a result has success (None for an error), steps, reason, tries, seconds, spent. A
    simulator that dies, raises or is silent for `watchdog` seconds is replaced, its episode played again. Raise
    RuntimeError when the very first task cannot be opened, or when an episode can never be played.
    """
    pool = Pool(episodes, finish, envs, watchdog)
    try:
        while pool.assign():
            waiting = pool.receive()
            if waiting:
                chunks = act([observation for _, observation in waiting])
                for (worker, _), actions in zip(waiting, chunks):
                    worker.act(actions)
    finally:
        pool.close()
