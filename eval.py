"""Rolls a trained run out in LIBERO, in closed loop, and reports success with 95 % Wilson intervals.

    python eval.py runs/NAME                             # the tasks and starts of the run's own data, 50 trials each
    python eval.py runs/NAME --suite libero_goal libero_object libero_goal_swap      # other suites
    python eval.py runs/NAME --blind                     # control: black images; --mute, --swap-instruction: the words
    python eval.py runs/NAME --video failures            # an MP4 of each failure, a contact sheet of each task
    python eval.py runs/NAME --shard 1/4                 # a quarter of the trials, on each of four machines
    python eval.py --compare runs/A runs/B runs/B/eval-blind.jsonl   # paired differences, McNemar's test, a bar chart
    python eval.py --replay data/libero_tiny             # no policy: do data, statistics and simulator agree?

The protocol is OpenVLA-OFT's: 10 settling steps, both cameras rendered at 256 px and rotated by 180 degrees, stored as
the training images were (Lanczos, JPEG), centre crop, all actions of a chunk open-loop, success by the task's own check
within the suite's step limit. Trial i starts from official start i after seeding the simulator with i; `widen` then
moves the handled object, as in the run's data. Everything that must agree with training comes from the run.

Simulators run in processes of their own, each at its own pace; one policy answers whoever is ready, always at the same
padded batch, so that an outcome depends neither on the number of simulators nor on their order. Cameras are drawn only
when the policy looks. Each finished episode is one line of RUN/eval.jsonl: the same command goes on where it stopped.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import commit, start_ranks, write_json, write_text
from data import CACHE, normalise, open_index, standardise, statistics, statistics_hash, to_robosuite, unnormalise
from model import Policy
from sim import CAMERAS, TRIALS, Episode, Process, instructions, step_limit, suites, tasks, versions

TRIES = 3  # an episode whose simulator crashes or hangs this often is recorded as an error
CONTROLS = ("blind", "mute", "swap_instruction")


@dataclass
class Config:
    run: tyro.conf.Positional[str] = ""
    """folder of a trained run"""
    suite: tuple[str, ...] = ()
    """LIBERO or LIBERO-PRO suites (default: that of the run's data)"""
    task_ids: tuple[int, ...] = ()
    """tasks of the one suite (default: those of the run's data; of a suite without any, all)"""
    trials: int = TRIALS
    """episodes per task"""
    seed: int = 0
    """seed of the first trial; trial i has seed + i"""
    widen: float | None = None
    """half-width in metres of the square in which the handled object starts (default: as in the run's data;
    0: official)"""
    blind: bool = False
    """control: the policy sees black images"""
    mute: bool = False
    """control: the policy gets an empty instruction"""
    swap_instruction: bool = False
    """control: the policy gets the instruction of another task of the suite"""
    envs: int = 0
    """simulator processes (default: one per CPU core, at most 16)"""
    policy_batch: int = 8
    """the policy's batch, always padded to this"""
    shard: str = ""
    """i/n: play only every n-th episode, beginning with the i-th (from 1)"""
    video: str = ""
    """film episodes: all, failures, or a number of trials per task; outcomes stay the same"""
    watchdog: float = 300.0
    """seconds of silence after which a simulator is replaced"""
    out: Path | None = None
    """result file (default: eval.jsonl in the run, with the control and the shard in its name)"""
    data: str = ""
    """data set whose statistics to use, by name (needed only when the run was trained on several)"""
    any_mujoco: bool = False
    """allow another MuJoCo version than the benchmark's"""
    compare: tuple[Path, ...] = ()
    """print these results side by side instead of running: runs, or result files"""
    replay: Path | None = None
    """play the recorded actions of this data set (with the run's statistics if a run is given, else its own)"""
    cache: Path = CACHE
    """where indices are kept (for --replay)"""


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def wilson(successes, episodes, z=1.959964):
    """95 % Wilson score interval of a success rate, (low, high)."""
    if not episodes:
        return 0.0, 1.0
    rate, spread = successes / episodes, z * z / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / episodes + spread / (4 * episodes))
    return max(0.0, centre - half), min(1.0, centre + half)


def discordant(first, second):
    """(pairs that only the first won, pairs that only the second won) of two lists of bool."""
    pairs = Counter(zip(map(bool, first), map(bool, second), strict=True))
    return pairs[True, False], pairs[False, True]


def mcnemar(first, second):
    """Two-sided p of McNemar's exact test for paired outcomes (lists of bool)."""
    only_first, only_second = discordant(first, second)
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(first, second, z=1.959964):
    """Success rate of the second minus the first's, and its 95 % interval: (difference, low, high).

    Agresti and Min (2005): Wald's interval for paired proportions after adding half a pair to each of the four cells.
    """
    only_first, only_second = discordant(first, second)
    lost, won, pairs = only_first + 0.5, only_second + 0.5, len(first) + 2
    centre = (won - lost) / pairs
    half = z * math.sqrt(won + lost - (won - lost) ** 2 / pairs) / pairs
    return (only_second - only_first) / len(first), max(-1.0, centre - half), min(1.0, centre + half)


# ----------------------------------------------------------------------------------------------------------------------
# What to play


def plan(config, policy):
    """The episodes of an evaluation in order of suite, task and trial; by default what the run was trained on.

    Raises ValueError when the run's data does not say it and the command line neither, when the package lacks a task,
    or when a trial's seed was used for a demonstration.
    """
    entry = policy.entry
    own = entry.get("suite") or entry["name"].removesuffix("_no_noops")
    known = suites()
    if odd := [suite for suite in config.suite or (own,) if suite not in known]:
        raise ValueError(
            f"suite {', '.join(odd)} is not one that can be run (the run's data is '{entry['name']}'); "
            f"give --suite one or several of {', '.join(known)}"
        )
    if config.task_ids and len(config.suite) > 1:
        raise ValueError(f"task_ids {list(config.task_ids)} with {len(config.suite)} suites: give one suite")
    low, high = entry.get("seeds", (math.inf, -math.inf))
    if config.seed + config.trials > low and config.seed <= high:
        raise ValueError(
            f"seeds {config.seed} to {config.seed + config.trials - 1} overlap those of the demonstrations, "
            f"{low} to {high}; choose a smaller --seed"
        )
    episodes = []
    for suite in config.suite or (own,):
        texts, usual = instructions(suite), usual_tasks(entry, suite)
        chosen = check_tasks(config.task_ids or usual, suite, known[suite])
        widen = config.widen
        if widen is None:
            widen = entry["widen"] if suite == entry.get("suite") else 0.0
        for task in chosen:
            told = "" if config.mute else another(texts, task, usual) if config.swap_instruction else texts[task]
            same = {"suite": suite, "task": task, "instruction": texts[task], "told": told, "widen": widen}
            same |= {"limit": step_limit(suite), "cameras": entry["cameras"], "blind": config.blind}
            same |= {"any_mujoco": config.any_mujoco}
            episodes += [Episode(seed=config.seed + trial, trial=trial, **same) for trial in range(config.trials)]
    return episodes


def check_policy(policy):
    """Raises ValueError when the simulator cannot give a policy what it was trained on, or take its actions."""
    sizes = {name: len(policy.stats[name]["q01"]) for name in ("action", "proprio")}
    if sizes != {"action": 7, "proprio": 8} or not policy.entry["cameras"].keys() <= CAMERAS.keys():
        raise ValueError(
            f"the run was trained on {sizes['action']} actions, {sizes['proprio']} values of proprio and the cameras "
            f"{', '.join(policy.entry['cameras'])}; LIBERO has 7, 8 and {', '.join(CAMERAS)}"
        )


def usual_tasks(entry, suite):
    """Tasks of a suite that the run was trained on, found by their names; of a suite without any, all."""
    names = [record.name for record in tasks(suite)]
    if "suite" in entry:
        trained = {record.name for task, record in enumerate(tasks(entry["suite"])) if task in entry["tasks"]}
    else:
        trained = {name for name, text in zip(names, instructions(suite)) if text in entry["instructions"]}
    bare = lambda name: re.sub("^[A-Z0-9_]+_(?=[a-z])", "", name)  # noqa: E731  without the scene that variants put first
    same = [task for task, name in enumerate(names) if name in trained]
    alike = [task for task, name in enumerate(names) if bare(name) in set(map(bare, trained))]
    return same or alike or list(range(len(names)))


def check_tasks(wanted, suite, whole):
    """These tasks as a list. Raises ValueError when the suite does not have one, or its files (those of `whole`)."""
    count = len(tasks(suite))
    if wrong := [task for task in wanted if not 0 <= task < count]:
        raise ValueError(f"task_ids {wrong} are not in {suite}, which has tasks 0 to {count - 1}")
    if lacking := [task for task in wanted if task not in whole]:
        raise ValueError(
            f"the package lacks starts or models of {suite} {lacking}; choose others with --task-ids: {whole}"
        )
    return list(wanted)


def another(texts, task, usual):
    """The instruction of the next task, in turn, that has another one: of the usual tasks if there is, else of all."""
    for candidates in (usual, range(len(texts))):
        if others := [t for t in candidates if texts[t] != texts[task]]:
            return texts[next((t for t in others if t > task), others[0])]
    raise ValueError(f"swap_instruction: all tasks of the suite have the instruction {texts[task]!r}")


def plan_replay(config, index, stats):
    """The episodes of a data set from their recorded starts, their actions having gone through the policy's path.

    stats: statistics of actions. Raises ValueError when the data set does not hold its starts.
    """
    about = index.metadata
    if missing := [name for name in ("suite", "task", "seed", "state") if name not in about]:
        raise ValueError(
            f"{config.replay} cannot be replayed: its episode_metadata has no {', '.join(missing)}, so nothing says "
            f"where an episode starts. It has {list(about)}; data made by demos.py has all of them."
        )
    played = to_robosuite(unnormalise(normalise(standardise(index.columns["action"]), stats), stats))  # [S, 7]
    return [
        Episode(
            *(about[name][number] for name in ("suite", "task", "seed")),
            number,
            instruction=text,
            told=text,
            limit=step_limit(about["suite"][number]),
            state=np.array(about["state"][number]),
            actions=played[index.starts[number] : index.starts[number + 1]],
            any_mujoco=config.any_mujoco,
        )
        for number, text in enumerate(index.instructions)
    ]


def shard(episodes, which):
    """The part `which` = "i/n" of the episodes; all of them for ""."""
    if not which:
        return episodes
    number, _, count = which.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard is '{which}'; write it as i/n with i from 1 to n, for example 1/4")
    return episodes[int(number) - 1 :: int(count)]


def with_videos(episodes, video, folder):
    """Marks the episodes that are to be filmed: all, failures, or the first trials of each task."""
    if not (video in ("", "all", "failures") or video.isdigit()):
        raise ValueError(f"video is '{video}'; choose all, failures, or a number of trials per task")
    most = int(video) if video.isdigit() else math.inf if video else 0
    if most:
        folder.mkdir(parents=True, exist_ok=True)
    kind = lambda e: f"{e.suite}-task{e.task}" + (f"-widen{e.widen:g}" if e.widen else "")  # noqa: E731
    path = lambda e: str(folder.resolve() / f"{kind(e)}-seed{e.seed}.mp4")  # noqa: E731
    return [replace(e, video=path(e), film=video) if e.trial < most else e for e in episodes]


# ----------------------------------------------------------------------------------------------------------------------
# Playing: many simulators, one policy


def batched(policy, size):
    """Function (looks) -> actions for the simulator, f32 [H, 7] each; the policy always computes `size` rows.

    looks: list of (instruction, images, proprio). Rows do not see each other, so what a look gets does not depend on
    who else is ready.
    """

    def answer(looks):
        chunks = []
        for at in range(0, len(looks), size):
            part = looks[at : at + size]
            texts, views, proprio = zip(*(part + part[:1] * (size - len(part))))
            images = [np.stack(camera) for camera in zip(*views)]  # each u8 [size, h, w, 3]
            chunks += list(to_robosuite(policy(images, list(texts), np.stack(proprio)))[: len(part)])
        return chunks

    return answer


class Schedule:
    """Which episode a free simulator plays next."""

    def __init__(self, episodes):
        self.left = {}
        for episode in episodes:
            self.left.setdefault((episode.suite, episode.task), []).append(episode)

    def next(self, current, others):
        """The next episode of the simulator's current task; else of the task with most steps to go, preferring those
        that none of the `others` is at. None when opening another simulator would take longer than the others need."""
        self.left = {task: episodes for task, episodes in self.left.items() if episodes}
        if current in self.left:
            return self.left[current].pop(0)
        worth = {task: e for task, e in self.left.items() if not current or task not in others or len(e) > 3}
        if not worth:
            return None
        longest = max(worth, key=lambda task: (task not in others, sum(episode.limit for episode in worth[task])))
        return self.left[longest].pop(0)

    def again(self, episode):
        """Puts an episode back in front."""
        self.left.setdefault((episode.suite, episode.task), []).insert(0, episode)


@dataclass
class Seat:
    """One simulator process and what it is at."""

    process: Process = field(default_factory=Process)
    task: tuple | None = None  # (suite, task) that its simulator is, or will be, open for
    episode: Episode | None = None
    started: float = 0.0
    heard: float = field(default_factory=time.monotonic)  # when it last had something to do or to say

    def begin(self, episode):
        self.task, self.episode = (episode.suite, episode.task), episode
        self.started = self.heard = time.monotonic()
        with contextlib.suppress(OSError):  # a process that died meanwhile is noticed when it is listened to
            self.process.play(episode)

    def answer(self, actions):
        self.heard = time.monotonic()
        with contextlib.suppress(OSError):
            self.process.answer(actions)

    def listen(self):
        """(kind, content) of the next message; ("died", how) when there will be none."""
        self.heard = time.monotonic()
        try:
            return self.process.connection.recv()
        except (EOFError, OSError):  # OSError: it stopped in the middle of a message
            return "died", self.process.obituary()

    def renew(self):
        """Another process instead of a dead or silent one."""
        self.process.kill()
        self.process, self.task = Process(), None


def events(seats, watchdog):
    """Waits until a busy seat says something, or has been silent for too long: yields (seat, kind, content)."""
    patience = min(seat.heard for seat in seats) + watchdog - time.monotonic()
    ready = wait([seat.process.connection for seat in seats], max(0.0, patience))
    for seat in seats:
        if seat.process.connection in ready:
            yield seat, *seat.listen()
        elif time.monotonic() - seat.heard > watchdog:
            yield seat, "died", f"its simulator was silent for {watchdog:g} s"


def play_all(episodes, answer, finish, envs, watchdog):
    """Plays all episodes on `envs` simulator processes.

    answer(looks) -> actions of each, see `batched`. finish(episode, result) is called as each one ends; a result has
    success (None for an error), steps, reason, tries, seconds, spent. Nobody waits for anybody but the policy. A
    simulator that dies, raises or is silent for `watchdog` seconds is replaced, its episode played TRIES times in all.
    Raises RuntimeError when the very first task cannot be opened, or when an episode makes no sense.
    """
    schedule, tries, unopened = Schedule(episodes), Counter(), 0  # unopened: None as soon as one is open
    seats = [Seat() for _ in range(min(envs, len(episodes)))]

    def end(seat, **result):
        took = round(time.monotonic() - seat.started, 2)
        finish(seat.episode, result | {"tries": tries[seat.episode] + 1, "seconds": took})
        seat.episode = None

    def fail(seat, why):
        """Puts the episode back, or gives it up."""
        name = f"{seat.episode.suite} task {seat.episode.task} seed {seat.episode.seed}"
        tqdm.write(f"{name}: {why} (try {tries[seat.episode] + 1} of {TRIES})", file=sys.stderr)
        if tries[seat.episode] + 1 == TRIES:
            return end(seat, success=None, steps=0, reason=f"error: {why}", spent={})
        tries[seat.episode] += 1
        schedule.again(seat.episode)
        seat.episode = None

    try:
        while True:
            for seat in (s for s in seats if not s.episode):
                if episode := schedule.next(seat.task, {s.task for s in seats if s.episode}):
                    seat.begin(episode)
            busy = [seat for seat in seats if seat.episode]
            if not busy:
                return
            looking = []
            for seat, kind, content in events(busy, watchdog):
                if kind == "open":
                    unopened = None
                elif kind == "look":
                    looking.append((seat, (seat.episode.told, *content)))
                elif kind == "done":
                    end(seat, reason="success" if content["success"] else "step limit", **content)
                elif kind == "refused" or kind == "unopened" and unopened is not None:
                    raise RuntimeError(f"{seat.episode.suite} task {seat.episode.task} cannot be played: {content}")
                elif kind in ("unopened", "failed", "died"):
                    unopened = None if unopened is None else unopened + 1
                    if unopened == TRIES:
                        raise RuntimeError(f"{TRIES} simulators died before one was open; the last: {content}")
                    fail(seat, content)
                    if kind != "failed":
                        seat.renew()
            if looking:
                for (seat, _), actions in zip(looking, answer([look for _, look in looking])):
                    seat.answer(actions)
    finally:
        for seat in seats:
            seat.process.kill()


# ----------------------------------------------------------------------------------------------------------------------
# The result file


class Results:
    """Rows of a JSONL file, one per finished episode. What is in the file already counts as played."""

    def __init__(self, path, settings):
        """settings: what all rows of a file share, as well as versions.

        Raises ValueError when the file's differ, RuntimeError when another evaluation is writing it.
        """
        if path.suffix != ".jsonl":
            raise ValueError(f"out is {path}; its name must end in .jsonl (the summary goes beside it, in .json)")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, open(path, "a", buffering=1)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another evaluation is writing {path}; wait for it, or choose another --out") from None
        if os.fstat(self.file.fileno()).st_ino != path.stat().st_ino:
            raise RuntimeError(f"another evaluation has just finished {path}; start again")
        self.about = {"settings": settings, "versions": versions() | {"torch": torch.__version__}, "commit": commit()}
        self.rows = read_rows(path)
        for row in self.rows:
            theirs, ours = ({**about["settings"], **about["versions"]} for about in (row, self.about))
            if theirs != ours:
                names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
                differ = "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in names)
                raise ValueError(f"{path} has other results ({differ}): choose another --out, or delete it")
        text = path.read_text()
        self.file.truncate(len(text[: text.rfind("\n") + 1].encode()))  # without a line that was cut

    def add(self, row):
        self.rows.append(row | self.about)
        self.file.write(json.dumps(self.rows[-1]) + "\n")

    def close(self):
        """Sorts the file by trial: it does not tell in which order, or in how many goes, the episodes were played."""
        self.rows.sort(key=key)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file.close()


def key(row):
    """What makes two rows the same trial."""
    return row["suite"], row["task"], row["seed"], row["widen"]


def read_rows(path):
    """Rows of a result file, or of several in one; an unfinished last line is left out.

    Raises ValueError when a line is not a row, or when the file holds a trial twice.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
            key(rows[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a result: {line[:80]!r}") from error
    if twice := [trial for trial, count in Counter(map(key, rows)).items() if count > 1]:
        raise ValueError(f"{path} holds {len(twice)} trials twice, the first is {twice[0]}; delete one of them")
    return rows


def make_row(episode, result):
    """An episode's line, without what all lines share."""
    about = ("suite", "task", "instruction", "told", "trial", "seed", "widen")
    found = ("success", "steps", "reason", "tries", "seconds", "spent")
    return {name: getattr(episode, name) for name in about} | {name: result[name] for name in found}


def result_path(config):
    """Where the rows go: --out, else a name in the run that says control and shard."""
    parts = ["eval", *(control.replace("_", "-") for control in CONTROLS if getattr(config, control))]
    parts += [config.shard.replace("/", "of")] if config.shard else []
    return config.out or Path(config.run) / f"{'-'.join(parts)}.jsonl"


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def tally(rows):
    """{"episodes", "successes", "errors", "success_rate", "ci95"} of some episodes; errors are not counted as any."""
    played = [row for row in rows if row["success"] is not None]
    successes = sum(row["success"] for row in played)
    return {
        "episodes": len(played),
        "successes": successes,
        "errors": len(rows) - len(played),
        "success_rate": successes / len(played) if played else None,
        "ci95": wilson(successes, len(played)),
    }


def by(rows, *names):
    """{values of these columns: rows}, in order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def expert(entry, rows):
    """{"expert_successes", "expert_episodes"} of the scripted expert on the same starts, as far as the data says."""
    starts = {key(row)[1:] for row in rows if row["suite"] == entry.get("suite")}
    same = [e for e in entry.get("expert", []) if (e["task"], e["seed"], e["widen"]) in starts]
    return {"expert_successes": sum(e["success"] for e in same), "expert_episodes": len(same)}


def summarise(rows, entry):
    """Success per suite (one widened and not widened counts as two) and task, and the mean of the suites."""
    found = [
        {"suite": suite, "widen": widen, **tally(group), **expert(entry, group)}
        | {"tasks": [
            {"task": task, "instruction": part[0]["instruction"], **tally(part), **expert(entry, part)}
            for (task,), part in by(group, "task").items()
        ]}
        for (suite, widen), group in by(rows, "suite", "widen").items()
    ]  # fmt: skip
    rates = [suite["success_rate"] for suite in found if suite["episodes"]]
    return {"suites": found, "mean_of_suites": sum(rates) / len(rates) if rates else None}


def in_words(found):
    """Successes, success rate and interval of a `tally`."""
    low, high = found["ci95"]
    rate = f"{100 * found['success_rate']:5.1f} %" if found["episodes"] else "   -   "
    return f"{found['successes']:3d}/{found['episodes']:<3d} {rate}  {100 * low:5.1f} to {100 * high:5.1f} %"


def print_table(summary):
    """Success per task and suite with intervals; the expert where it is known; errors where there are any."""
    for suite in summary["suites"]:
        lines = [*suite["tasks"], {"instruction": "all tasks", **suite}]
        width = max(len(line["instruction"]) for line in lines)
        print(f"\n{suite['suite']}" + (f", starts widened by {suite['widen']:g} m" if suite["widen"] else ""))
        print(f"{'':{width}}  success          95 % interval" + "    expert" * bool(suite["expert_episodes"]))
        for line in lines:
            shown = in_words(line)
            if line["expert_episodes"]:
                shown += f"  {line['expert_successes']}/{line['expert_episodes']}"
            if line["errors"]:
                shown += f"  {line['errors']} ERRORS, counted neither way"
            print(f"{line['instruction']:{width}}  {shown}")
    if len(summary["suites"]) > 1 and summary["mean_of_suites"] is not None:
        print(f"\nmean of the above: {100 * summary['mean_of_suites']:.1f} %")


def contact_sheets(folder):
    """One PNG per task from its videos, ten to a column: of each the first, the middle and the last picture."""
    import cv2

    def strip(path):
        video = cv2.VideoCapture(str(path))
        frames = []
        while (frame := video.read()[1]) is not None:
            frames.append(frame)
        chosen = (frames[0], frames[len(frames) // 2], frames[-1])
        return np.concatenate([cv2.resize(f, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for f in chosen], 1)

    groups = {}
    finished = [path for path in folder.glob("*-seed*.mp4") if path.stem.rsplit("seed", 1)[1].isdigit()]  # not partial
    for path in sorted(finished, key=lambda p: int(p.stem.rsplit("seed", 1)[1])):
        groups.setdefault(path.stem.rsplit("-seed", 1)[0], []).append(path)
    for task, paths in groups.items():
        strips = [strip(path) for path in paths]
        strips += [np.zeros_like(strips[0])] * (-len(strips) % min(10, len(strips)))
        rows = min(10, len(strips))
        columns = [np.concatenate(strips[at : at + rows]) for at in range(0, len(strips), rows)]
        cv2.imwrite(str(folder / f"{task}.png"), np.concatenate(columns, 1))


def load_results(path):
    """(name, rows) of a run or of a result file, for --compare."""
    file = path / "eval.jsonl" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; make it with python eval.py {path}")
    if not (rows := read_rows(file)):
        raise ValueError(f"{file} has no result yet")
    return str(path), rows


def common_trials(names, results):
    """The results' rows of the trials that all of them have, without those that were an error in one; says so if fewer.

    Raises ValueError when there is none.
    """
    played = [{key(row): row for row in rows if row["success"] is not None} for rows in results]
    shared = sorted(set.intersection(*map(set, played)))
    if not shared:
        raise ValueError(f"{', '.join(names)} are results of different starts; they cannot be paired")
    counts = [len(rows) for rows in results]
    if set(counts) != {len(shared)}:
        print(f"compared on the {len(shared)} trials that all have; they have {', '.join(map(str, counts))}\n")
    return [[found[trial] for trial in shared] for found in played]


def compare(paths):
    """Prints results side by side: success, difference to the first paired by trial, McNemar's test; draws a chart.

    Raises ValueError when the results have no trial in common.
    """
    names, results = zip(*map(load_results, paths))
    results = common_trials(names, results)
    if len({json.dumps(row["versions"]) for rows in results for row in rows}) > 1:
        print("NOTE: these results come from different versions of the simulator or of torch\n")
    letters = [chr(ord("A") + number) for number in range(len(names))]
    for letter, name in zip(letters, names):
        print(f"{letter}  {name}")
    several, lines = len(by(results[0], "suite")) > 1, []
    for suite, task, text in by(results[0], "suite", "task", "instruction"):
        parts = [[row for row in rows if (row["suite"], row["task"]) == (suite, task)] for rows in results]
        lines.append((f"{suite}: {text}" if several else text, parts))
    lines.append(("all", results))
    for text, parts in lines:
        print(f"\n{text}")
        for letter, rows in zip(letters, parts):
            print(f"  {letter}  {beside(parts[0], rows)}")
    chart = (paths[0] if paths[0].is_dir() else paths[0].parent) / "compare.png"
    draw_chart(names, lines, chart)
    print("\nintervals: Wilson; of differences, paired by trial: Agresti and Min. p: McNemar's exact test")
    print(f"chart: {chart}")


def beside(first, rows):
    """Success of some rows in words and, unless they are the first themselves, the difference to those."""
    words = in_words(tally(rows))
    if rows is first:
        return words
    a, b = ([row["success"] for row in part] for part in (first, rows))
    difference, low, high = (100 * x for x in paired_difference(a, b))
    return words + f"   minus A: {difference:+6.1f} ({low:+.1f} to {high:+.1f}), p = {mcnemar(a, b):.2g}"


def draw_chart(names, lines, path):
    """Bars of success with Wilson intervals: a group per instruction and one for all, a bar per result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6, 1 + 1.6 * len(lines)), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        found = [tally(parts[number]) for _, parts in lines]
        rates = np.array([100 * row["success_rate"] for row in found])
        ends = 100 * np.array([row["ci95"] for row in found]).T
        at = np.arange(len(lines)) + (number - (len(names) - 1) / 2) * width
        axes.bar(at, rates, width, label=name, yerr=np.clip([rates - ends[0], ends[1] - rates], 0, None), capsize=3)
    axes.set_xticks(range(len(lines)), [textwrap.fill(text, 18) for text, _ in lines], fontsize=8)
    axes.set(ylabel="success, % (95 % Wilson interval)", ylim=(0, 105))
    figure.legend(loc="outside upper left", fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def run_all(config, episodes, answer, results):
    """Plays what the results lack, one row each, with a progress bar. What only lacks its film is filmed."""
    played = {key(row): row for row in results.rows}
    known = [e for e in episodes if key(vars(e)) in played]
    unseen = [e for e in known if e.video and not Path(e.video).exists()]
    unseen = [e for e in unseen if e.film != "failures" or played[key(vars(e))]["success"] is False]
    if known:
        films = f", of which {len(unseen)} are to be filmed" if unseen else ""
        print(f"{len(known)} of {len(episodes)} episodes are in {results.path} already{films}")
    rows = [played[key(vars(e))] for e in known]
    todo = [e for e in episodes if key(vars(e)) not in played] + unseen
    with tqdm(total=len(rows) + len(todo), initial=len(rows), unit="episode", smoothing=0) as bar:

        def finish(episode, result):
            if key(vars(episode)) not in played:
                rows.append(make_row(episode, result))
                results.add(rows[-1])
            found = tally(rows)
            errors = f", {found['errors']} errors" if found["errors"] else ""
            bar.set_postfix_str(f"success {found['successes']}/{found['episodes']}{errors}")
            bar.update()

        try:
            play_all(todo, answer, finish, config.envs or min(16, len(os.sched_getaffinity(0))), config.watchdog)
        finally:
            results.close()


def report(episodes, results, entry, **about):
    """Writes the summary of these episodes beside the rows, prints it and returns it."""
    asked = {key(vars(episode)) for episode in episodes}
    rows = [row for row in results.rows if key(row) in asked]
    about |= {name: results.about[name] for name in ("settings", "versions")}
    about |= {"command": sys.argv, "commits": sorted({row["commit"] for row in rows})}
    summary = summarise(rows, entry) | about
    path = results.path.with_suffix(".json")
    write_json(path, summary)
    print_table(summary)
    for row in rows:
        if row["success"] is None:
            print(f"{row['suite']} task {row['task']} seed {row['seed']}: {row['reason']}")
    others = f" ({len(results.rows) - len(rows)} others are in it)" if len(results.rows) > len(rows) else ""
    print(f"\nresult: {path}\nepisodes: {results.path}{others}")
    return summary


def evaluate(config, policy):
    """Plays the trials of a run; returns the summary."""
    check_policy(policy)
    path = result_path(config)
    episodes = with_videos(shard(plan(config, policy), config.shard), config.video, path.with_suffix(""))
    for (suite,), part in by(map(vars, episodes), "suite").items():
        print(f"{suite}: tasks {', '.join(str(task) for (task,) in by(part, 'task'))} of {len(tasks(suite))}")
    policy.make_room({episode.told for episode in episodes})
    with open(Path(config.run) / "model.safetensors", "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    settings = {"model": weights, "data": policy.name, "device": policy.device, "policy_batch": config.policy_batch}
    settings |= {"text_length": policy.vla.spec.text_length}  # longer instructions change others' answers by rounding
    results = Results(path, settings | {control: getattr(config, control) for control in CONTROLS})
    run_all(config, episodes, batched(policy, config.policy_batch), results)
    summary = report(episodes, results, policy.entry, run=config.run, variant=policy.config["train"]["variant"])
    if config.video:
        contact_sheets(path.with_suffix(""))
        print(f"videos: {path.with_suffix('')}")
    return summary


def replay(config):
    """Plays a data set's recorded actions anew; returns the summary. Exits with status 1 when under 95 % succeed."""
    index = open_index(config.replay, config.cache)
    stats = Policy(config.run, config.data).stats if config.run else statistics(index)
    episodes = shard(plan_replay(config, index, stats["action"]), config.shard)
    path = index.cache / f"replay{'-' * bool(config.shard)}{config.shard.replace('/', 'of')}.jsonl"
    path.unlink(missing_ok=True)  # the simulator may have changed since
    path = config.out or path
    results = Results(path, {"replay": index.fingerprint, "statistics": statistics_hash(stats)})
    run_all(config, episodes, None, results)
    summary = report(episodes, results, {}, replay=str(config.replay), run=config.run)
    if failed := [row for row in results.rows if not row["success"]]:
        print("not successful: " + "; ".join(f"{row['suite']} task {row['task']} seed {row['seed']}" for row in failed))
    if len(failed) > 0.05 * len(results.rows):
        sys.exit("data, statistics and simulator do not agree: at least 95 % should succeed")
    print("data, statistics and simulator agree")
    return summary


def check(config):
    """Refuses what cannot work, and options that would be ignored, before anything is opened."""
    for name, low in (("trials", 1), ("policy_batch", 1), ("envs", 0), ("seed", 0), ("widen", 0), ("watchdog", 1)):
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {low}")
    if config.mute and config.swap_instruction:
        raise ValueError("mute and swap_instruction exclude each other")
    if not (config.run or config.compare or config.replay):
        raise ValueError("say which run to evaluate: python eval.py runs/NAME")
    used = {f.name for f in fields(config)}
    if config.compare:
        used = {"compare"}
    elif config.replay:
        used = {"replay", "run", "data", "cache", "shard", "envs", "watchdog", "out", "any_mujoco"}
    if ignored := [f.name for f in fields(config) if f.name not in used and getattr(config, f.name) != f.default]:
        raise ValueError(f"{', '.join(ignored)} cannot be used with {'compare' if config.compare else 'replay'}")


def main(config):
    check(config)
    if config.compare:
        return compare(config.compare)
    start_ranks()  # for its number of threads
    if config.replay:
        return replay(config)
    return evaluate(config, Policy(config.run, config.data))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
