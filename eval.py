"""Evaluate a trained run in closed loop in LIBERO and report success with 95 % Wilson intervals.

    python eval.py runs/NAME                             # the tasks and starts of the run's own data, 50 trials each
    python eval.py runs/NAME --suite libero_goal libero_object libero_goal_swap      # other suites
    python eval.py runs/NAME --blind                     # control: black images; docs/evaluation.md lists the others
    python eval.py runs/NAME --video failures            # an MP4 of each failure, a contact sheet of each task
    python eval.py runs/NAME --shard 1/4                 # a quarter of the trials, on each of four machines
    python eval.py --compare runs/A runs/B runs/B/eval-blind.jsonl   # paired differences, McNemar's test, a bar chart
    python eval.py --replay data/libero_tiny             # no policy: do data, statistics and simulator agree?

The protocol is OpenVLA-OFT's: 10 settling steps, both cameras rendered at 256 px and rotated by 180 degrees, stored as
the training images were (Lanczos, JPEG), centre crop, all actions of a chunk open-loop (fewer with --execute), success
by the task's own check within the suite's step limit. Trial i starts from official start i after seeding the simulator
with i; `widen` then moves the handled object, as in the run's data. Everything that must agree with training comes from
the run, and the policy itself sees to it (policy.py).

Simulators run in processes of their own and share one policy (pool.py). Cameras are drawn only where the policy gets an
observation. Each finished trial is one line of RUN/eval.jsonl, and an interrupted evaluation continues with the same
command. How to play is in rollout.py, which also says how to add a simulator; statistics, tables and comparisons are
in results.py.
"""

import difflib
import functools
import importlib
import math
import os
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from card import attempt, update_card
from common import init_distributed
from data import open_dataset
from execution import Execution
from files import at_least, file_hash, read_json, write_json
from index import CACHE
from normalise import Normaliser, statistics_hash, to_robosuite
from policy import Policy, find_run
from pool import play_all
from results import (
    Results,
    check_result_path,
    compare,
    group_by,
    print_table,
    shard,
    summarise,
    tally,
    trial_key,
    trial_record,
)
from rollout import TRIALS, Episode, contact_sheets

SIMULATORS = {"libero": "sim"}  # --simulator -> module; the interface is in rollout.py
CONTROLS = ("blind", "black_camera", "swap_cameras", "mute", "swap_instruction")
EXECUTION = ("execute", "average_chunks", "max_steps")


@dataclass
class Config:
    """Settings of `python eval.py`."""

    run: tyro.conf.Positional[str] = ""
    """folder of a trained run, or a Hub repository owner/name; its results go to runs/owner--name"""
    simulator: str = "libero"
    """where to play, one of SIMULATORS"""
    suite: tuple[str, ...] = ()
    """suites of the simulator, LIBERO or LIBERO-PRO (default: that of the run's data)"""
    task_ids: tuple[int, ...] = ()
    """tasks of the one suite (default: those of the run's data; of a suite without any, all)"""
    trials: int = TRIALS
    """trials per task"""
    seed: int = 0
    """seed of the first trial; trial i has seed + i"""
    widen: float | None = None
    """half-width in metres of the square in which the handled object starts (default: as in the run's data;
    0: official)"""
    blind: bool = False
    """control: the policy sees black images"""
    black_camera: str = ""
    """control: the image of this camera is black"""
    swap_cameras: bool = False
    """control: the first two cameras are exchanged"""
    mute: bool = False
    """control: the policy gets an empty instruction"""
    swap_instruction: bool = False
    """control: the policy gets the instruction of a different task of the suite"""
    execute: int = 0
    """actions of each chunk that are executed before the policy is asked again (default: all)"""
    average_chunks: bool = False
    """with a small --execute: execute the mean of the chunks that overlap, as ACT's temporal ensemble"""
    max_steps: int = 0
    """steps after which an episode has failed (default: the suite's)"""
    envs: int = 0
    """simulator processes (default: one per CPU core, at most 16)"""
    policy_batch: int = 8
    """the policy's batch, always padded to this"""
    shard: str = ""
    """i/n: play only every n-th trial, beginning with the i-th (from 1)"""
    video: str = ""
    """trials to record as videos: all, failures, or a number per task; outcomes stay the same"""
    watchdog: float = 300.0
    """seconds of silence after which a simulator is replaced"""
    out: Path | None = None
    """result file (default: eval.jsonl in the run, with the control and the shard in its name)"""
    data: str = ""
    """data set whose statistics to use, by name (needed only when the run was trained on several)"""
    backbone: str = ""
    """where the pretrained backbone lies now, if it was moved"""
    any_mujoco: bool = False
    """allow MuJoCo versions that differ from the benchmark's"""
    compare: tuple[Path, ...] = ()
    """print these results side by side instead of running: runs, or result files"""
    replay: Path | None = None
    """play the recorded actions of this data set (with the run's statistics if a run is given, else its own)"""
    cache: Path = CACHE
    """where indices are kept (for --replay)"""


def load_simulator(config):
    """Return the module of the config's simulator; its interface is in rollout.py."""
    return importlib.import_module(SIMULATORS[config.simulator])


# ----------------------------------------------------------------------------------------------------------------------
# What to play


def plan_trials(config, policy):
    """Return the episodes of an evaluation in order of suite, task and trial; by default what the run was trained on.

    Raise ValueError when neither the run's data nor the command line names a suite that there is, when the simulator
    lacks a task, or when a trial's seed was used for a demonstration.
    """
    entry = policy.data_entry
    simulator = load_simulator(config)
    playable = simulator.suites()
    suites = choose_suites(config, entry, playable)
    check_seeds(config, entry)
    episodes = []
    for suite in suites:
        texts = simulator.instructions(suite)
        trained = trained_tasks(entry, suite, simulator)
        widen = config.widen
        if widen is None:
            widen = entry["widen"] if suite == entry.get("suite") else 0.0
        shared = {
            "simulator": simulator.__name__,
            "suite": suite,
            "max_steps": config.max_steps or simulator.step_limit(suite),
            "widen": widen,
            "cameras": {name: stored["size"] for name, stored in entry["cameras"].items()},
            "chunk": policy.chunk,
            "execute": config.execute,
            "average": config.average_chunks,
            "blind": config.blind,
            "black_camera": config.black_camera,
            "swap_cameras": config.swap_cameras,
            "any_version": config.any_mujoco,
        }
        tasks = check_tasks(config.task_ids or trained, suite, playable[suite], len(texts))
        for task in tasks:
            shared |= {"task": task, "instruction": texts[task], "prompt": make_prompt(config, texts, task, trained)}
            episodes += [Episode(seed=config.seed + trial, trial=trial, **shared) for trial in range(config.trials)]
        if not widen:
            for starts in sorted({simulator.count_starts(suite, task) for task in tasks} - {0}):
                warn_of_known_starts(config, suite, starts, entry)
    return episodes


def warn_of_known_starts(config, suite, starts, entry):
    """Warn when trials of tasks that have so many official `starts` are no new ones.

    Their objects stand where they stood in other trials, or in demonstrations; fixtures differ where a suite has some
    that move.
    """
    played = {seed % starts for seed in range(config.seed, config.seed + config.trials)}
    if len(played) < config.trials:
        print(
            f"WARNING: {suite} has {starts} official starts of a task, so only {len(played)} of {config.trials} trials "
            "differ, but for fixtures: intervals are too narrow"
        )
    known = {seed % starts for seed in entry.get("official_seeds", ())} if suite == entry.get("suite") else set()
    if both := played & known:
        print(
            f"WARNING: {suite}: from {len(both)} of the {len(played)} starts of a task the run's demonstrations began, "
            "too; choose others with --seed, or new places with --widen"
        )


def choose_suites(config, entry, playable):
    """Return the suites to play, those of the config or else that of the run's data.

    entry: what the run's config says of its data; playable: the simulator's suites(). Raise ValueError for a suite that
    cannot be played, one that is named twice, or for task ids of several suites.
    """
    for name in ("suite", "task_ids"):
        values = list(getattr(config, name))
        if len(set(values)) < len(values):
            raise ValueError(f"{name} is {values}; name each once, as its trials count once")
    suites = config.suite or (entry.get("suite") or entry["name"].removesuffix("_no_noops"),)
    if unknown := [suite for suite in suites if suite not in playable]:
        raise ValueError(
            f"suite {', '.join(unknown)} is not one that can be run (the run's data is '{entry['name']}'); "
            f"give --suite one or several of {', '.join(playable)}"
        )
    if config.task_ids and len(suites) > 1:
        raise ValueError(f"task_ids {list(config.task_ids)} with {len(suites)} suites: give one suite")
    return suites


def check_seeds(config, entry):
    """Raise ValueError when a trial would start where a demonstration of the run's data started."""
    low, high = entry.get("seeds", (math.inf, -math.inf))
    if config.seed + config.trials > low and config.seed <= high:
        raise ValueError(
            f"seeds {config.seed} to {config.seed + config.trials - 1} overlap those of the demonstrations, "
            f"{low} to {high}; choose a smaller --seed"
        )


def trained_tasks(entry, suite, simulator):
    """Return the tasks of a suite that the run was trained on, matched by name; all tasks if there are none.

    Variants of a suite may put the scene in capitals before the name. Data that does not name a suite of the simulator
    is matched by instruction.
    """

    def without_scene(name):
        return re.sub("^[A-Z0-9_]+_(?=[a-z])", "", name)

    names = simulator.tasks(suite)
    if entry.get("suite") in simulator.suites():
        trained = {name for task, name in enumerate(simulator.tasks(entry["suite"])) if task in entry["tasks"]}
    else:
        trained = {name for name, text in zip(names, simulator.instructions(suite)) if text in entry["instructions"]}
    bare = {without_scene(name) for name in trained}
    same = [task for task, name in enumerate(names) if name in trained]
    similar = [task for task, name in enumerate(names) if without_scene(name) in bare]
    return same or similar or list(range(len(names)))


def check_tasks(tasks, suite, playable, count):
    """Return these tasks. Raise ValueError when one is not among the suite's `count`, or not playable."""
    if wrong := [task for task in tasks if not 0 <= task < count]:
        raise ValueError(f"task_ids {wrong} are not in {suite}, which has tasks 0 to {count - 1}")
    if lacking := [task for task in tasks if task not in playable]:
        raise ValueError(
            f"the package lacks starts or models of {suite} {lacking}; choose others with --task-ids: {playable}"
        )
    return tasks


def make_prompt(config, texts, task, trained):
    """Return what the policy gets as the instruction of a task: texts[task], unless a control changes it."""
    if config.mute:
        return ""
    if config.swap_instruction:
        return swapped_instruction(texts, task, trained)
    return texts[task]


def swapped_instruction(texts, task, trained):
    """Return the instruction of the next task in turn whose instruction differs: a trained task if possible.

    Raise ValueError when all tasks of the suite have the same instruction.
    """
    for candidates in (trained, range(len(texts))):
        different = [t for t in candidates if texts[t] != texts[task]]
        if different:
            return texts[next((t for t in different if t > task), different[0])]
    raise ValueError(f"swap_instruction: all tasks of the suite have the instruction {texts[task]!r}")


def plan_replay(config, dataset, stats):
    """Return the episodes of a data set from their recorded starts, with its actions normalised and back.

    stats: statistics of actions. Raise ValueError when the data set does not hold its starts.
    """
    metadata = dataset.metadata
    if missing := [name for name in ("suite", "task", "seed", "state") if name not in metadata]:
        raise ValueError(
            f"{config.replay} cannot be replayed: its episode_metadata has no {', '.join(missing)}, so nothing says "
            f"where an episode starts. It has {list(metadata)}; data made by demos.py has all of them."
        )
    simulator = load_simulator(config)
    normaliser = Normaliser(stats)
    actions = normaliser.unnormalise(normaliser.normalise(dataset.action(slice(None))))
    actions = to_robosuite(actions, dataset.spec.grippers)  # [S, A]
    texts = [dataset.instruction(start) for start in dataset.starts[:-1]]
    return [
        Episode(
            simulator=simulator.__name__,
            suite=metadata["suite"][number],
            task=metadata["task"][number],
            seed=metadata["seed"][number],
            trial=number,
            instruction=text,
            prompt=text,
            max_steps=simulator.step_limit(metadata["suite"][number]),
            state=np.array(metadata["state"][number]),
            actions=actions[dataset.starts[number] : dataset.starts[number + 1]],
            any_version=config.any_mujoco,
        )
        for number, text in enumerate(texts)
    ]


def check_policy(policy, config):
    """Raise ValueError when the simulator cannot give a policy what it was trained on, or a control does not fit it."""
    simulator = load_simulator(config)
    Execution(policy.chunk, config.execute, config.average_chunks)
    names = policy.cameras
    if config.black_camera and config.black_camera not in names:
        raise ValueError(f"black_camera is '{config.black_camera}'; the policy has the cameras {', '.join(names)}")
    if config.swap_cameras and len(names) < 2:
        raise ValueError(f"swap_cameras needs two cameras; the policy has {', '.join(names)}")
    trained = [len(policy.stats["action"]["q01"]), len(policy.stats.get("proprio", {"q01": []})["q01"])]
    cameras = policy.data_entry["cameras"]
    if not policy.vla.config.proprio_size:
        trained[1] = simulator.PROPRIO_SIZE  # the policy ignores it
    if trained != [simulator.ACTION_SIZE, simulator.PROPRIO_SIZE] or not set(cameras) <= set(simulator.CAMERAS):
        raise ValueError(
            f"the run was trained on {trained[0]} actions, {trained[1]} values of proprio and the cameras "
            f"{', '.join(cameras)}; {config.simulator} has {simulator.ACTION_SIZE}, {simulator.PROPRIO_SIZE} and "
            f"{', '.join(simulator.CAMERAS)}"
        )


def choose_data(config, run):
    """Return the name of the data set whose embodiment is the simulator's, before anything else is opened.

    run: the folder of the run. Raise ValueError when it was not trained on that embodiment, or on several data sets of
    it and the config does not name one.
    """
    path = run / "config.json"
    if not path.exists():
        return config.data  # what `Policy` says of it is better
    entries = read_json(path).get("data", [])
    if config.data:
        entries = [entry for entry in entries if entry.get("name") == config.data]
    robot = load_simulator(config).EMBODIMENT
    found = {entry["name"]: entry.get("embodiment", "libero") for entry in entries}  # runs of before had only LIBERO
    fitting = [name for name, embodiment in found.items() if embodiment == robot]
    if found and not fitting:
        raise ValueError(
            f"{config.run} was trained on {', '.join(f'{name} (a {kind})' for name, kind in found.items())}, but "
            f"simulator {config.simulator} is a {robot}"
        )
    return config.data or (fitting[0] if len(fitting) == 1 else "")


def warn_of_new_instructions(prompts, trained):
    """Warn of every prompt that is not, letter for letter, an instruction of the training data, naming the closest."""
    for prompt in sorted(set(prompts) - set(trained)):
        closest = difflib.get_close_matches(prompt, trained, 1, 0)
        about = f"which was never an instruction in its training; the closest one was {closest[0]!r}" if closest else ""
        print(f"WARNING: the policy gets the instruction {prompt!r}, {about or 'but its training had none'}")


def mark_videos(episodes, video, folder):
    """Return the episodes with the path of their video in `folder`: all, failures, or the first trials of each task."""
    if video.isdigit():
        count = int(video)
    elif video in ("", "all", "failures"):
        count = math.inf if video else 0
    else:
        raise ValueError(f"video is '{video}'; choose all, failures, or a number of trials per task")
    if count:
        folder.mkdir(parents=True, exist_ok=True)
    marked = []
    for episode in episodes:
        widened = f"-widen{episode.widen:g}" if episode.widen else ""
        path = folder.resolve() / f"{episode.suite}-task{episode.task}{widened}-seed{episode.seed}.mp4"
        marked.append(replace(episode, video=str(path), video_filter=video) if episode.trial < count else episode)
    return marked


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def result_path(config):
    """Return the result file: --out, else one named by simulator, control and shard, in the run or runs/owner--name."""
    if config.out:
        return config.out
    parts = ["eval"]
    if config.simulator != Config.simulator:
        parts.append(config.simulator)
    for control in CONTROLS + EXECUTION:
        if value := getattr(config, control):
            parts.append(control.replace("_", "-") if value is True else f"{control.replace('_', '-')}-{value}")
    if config.shard:
        parts.append(config.shard.replace("/", "of"))
    folder = Path(config.run)
    if not folder.exists():
        folder = Path("runs") / config.run.replace("/", "--")
    return folder / f"{'-'.join(parts)}.jsonl"


def run_all(config, episodes, act, results):
    """Play the episodes that the results lack, or that ended in an error, and record the videos that are missing."""
    played = {trial_key(trial): trial for trial in results.trials if trial["success"] is not None}
    trials = []  # the outcomes so far
    todo = []
    videos = []  # played, but without the video that they should have
    for episode in episodes:
        trial = played.get(trial_key(vars(episode)))
        if trial is None:
            todo.append(episode)
            continue
        trials.append(trial)
        if episode.video and not Path(episode.video).exists():
            if episode.video_filter != "failures" or trial["success"] is False:
                videos.append(episode)
    if trials:
        note = f", of which {len(videos)} are to be recorded as videos" if videos else ""
        print(f"{len(trials)} of {len(episodes)} episodes are in {results.path} already{note}")
    total = len(trials) + len(todo) + len(videos)
    with tqdm(total=total, initial=len(trials), unit="episode", smoothing=0) as bar:

        def finish(episode, result):
            if trial_key(vars(episode)) not in played:
                trials.append(trial_record(episode, result))
                results.add(trials[-1])
            counts = tally(trials)
            errors = f", {counts['errors']} errors" if counts["errors"] else ""
            bar.set_postfix_str(f"success {counts['successes']}/{counts['episodes']}{errors}")
            bar.update()

        try:
            envs = config.envs or min(16, len(os.sched_getaffinity(0)))
            play_all(todo + videos, act, finish, envs, config.watchdog)
        finally:
            results.close()


def report(episodes, results, entry, **provenance):
    """Write the summary of all trials of the file to its name in .json; print that of these episodes and return it.

    entry: see `expert_successes`; provenance: more keys of the summary.
    """
    provenance |= {name: results.shared[name] for name in ("settings", "versions")} | {"command": sys.argv}
    provenance |= {"commits": sorted({trial["commit"] for trial in results.trials})}
    path = results.path.with_suffix(".json")
    write_json(path, summarise(results.trials, entry) | provenance)
    keys = {trial_key(vars(episode)) for episode in episodes}
    trials = [trial for trial in results.trials if trial_key(trial) in keys]
    summary = summarise(trials, entry) | provenance
    print_table(summary)
    for trial in trials:
        if trial["success"] is None:
            print(f"{trial['suite']} task {trial['task']} seed {trial['seed']}: {trial['reason']}")
    others = len(results.trials) - len(trials)
    note = f" ({others} others are in it, and count in the result)" if others else ""
    print(f"\nresult: {path}\nepisodes: {results.path}{note}")
    return summary


def evaluate(config, policy):
    """Play the trials of a run and return the summary."""
    check_policy(policy, config)
    simulator = load_simulator(config)
    path = result_path(config)
    episodes = mark_videos(shard(plan_trials(config, policy), config.shard), config.video, path.with_suffix(""))
    for (suite,), group in group_by(map(vars, episodes), "suite").items():
        tasks = ", ".join(str(task) for (task,) in group_by(group, "task"))
        print(f"{suite}: task ids {tasks} (the suite has {len(simulator.tasks(suite))} tasks)")
    prompts = {episode.prompt for episode in episodes}
    policy.reserve_text(policy.tokens_needed(prompts))
    if not config.mute:
        warn_of_new_instructions(prompts, policy.data_entry["instructions"])
    weights = file_hash(policy.run / "model.safetensors")
    settings = {"model": weights, "data": policy.name, "device": policy.device, "policy_batch": config.policy_batch}
    settings |= {"text_length": policy.text_length}  # more room for text changes actions by rounding
    settings |= {control: getattr(config, control) for control in CONTROLS}
    settings |= {name: value for name in EXECUTION if (value := getattr(config, name))}
    if config.simulator != Config.simulator:
        settings |= {"simulator": config.simulator}
    results = Results(path, settings, simulator.versions())
    run_all(config, episodes, functools.partial(policy, gripper="robosuite"), results)
    summary = report(
        episodes, results, policy.data_entry, run=config.run, variant=policy.run_config["train"]["variant"]
    )
    if not config.out and path.parent == policy.run:
        attempt(update_card, policy.run)
    if config.video:
        contact_sheets(path.with_suffix(""))
        print(f"videos: {path.with_suffix('')}")
    return summary


def replay(config):
    """Play a data set's recorded actions and return the summary. Exit with status 1 when fewer than 95 % succeed."""
    dataset = open_dataset(config.replay, config.cache)
    stats = Policy(config.run, config.data, backbone=config.backbone).stats if config.run else dataset.stats
    episodes = shard(plan_replay(config, dataset, stats["action"]), config.shard)
    if not episodes:
        raise ValueError(f"shard {config.shard} of {dataset.num_episodes} episodes has none; give fewer shards")
    path = config.out
    if path and path.exists():
        raise ValueError(f"out is {path}, which exists; a replay begins anew, so give a file that does not")
    if not path:
        part = f"-{config.shard.replace('/', 'of')}" if config.shard else ""
        path = dataset.cache / f"replay{part}.jsonl"
        path.unlink(missing_ok=True)  # the simulator may have changed since
    settings = {"replay": dataset.fingerprint, "statistics": statistics_hash(stats)}
    results = Results(path, settings, load_simulator(config).versions())
    run_all(config, episodes, None, results)
    summary = report(episodes, results, {}, replay=str(config.replay), run=config.run)
    failed = [trial for trial in results.trials if not trial["success"]]
    if failed:
        names = [f"{trial['suite']} task {trial['task']} seed {trial['seed']}" for trial in failed]
        print("not successful: " + "; ".join(names))
    if len(failed) > 0.05 * len(results.trials):
        sys.exit("data, statistics and simulator do not agree: at least 95 % should succeed")
    print("data, statistics and simulator agree")
    return summary


def check(config):
    """Raise ValueError for values that cannot work and for options that would be ignored."""
    least = {"trials": 1, "policy_batch": 1, "envs": 0, "seed": 0, "widen": 0, "max_steps": 0, "watchdog": 1}
    at_least(config, least)
    if config.simulator not in SIMULATORS:
        raise ValueError(f"simulator is '{config.simulator}'; choose one of {', '.join(SIMULATORS)}")
    if config.mute and config.swap_instruction:
        raise ValueError("mute and swap_instruction exclude each other")
    if config.blind and (config.black_camera or config.swap_cameras):
        raise ValueError("blind makes all images black: leave out black_camera and swap_cameras")
    if not (config.run or config.compare or config.replay):
        raise ValueError("say which run to evaluate: python eval.py runs/NAME")
    mode = "a run"
    used = {f.name for f in fields(config)} - {"cache"}
    if config.compare:
        mode = "compare"
        used = {"compare"}
    elif config.replay:
        mode = "replay" if config.run else "replay without a run"
        used = {"replay", "run", "simulator", "cache", "shard", "envs", "watchdog", "out", "any_mujoco"}
        used |= {"data", "backbone"} if config.run else set()
    if ignored := [f.name for f in fields(config) if f.name not in used and getattr(config, f.name) != f.default]:
        raise ValueError(f"{', '.join(ignored)} cannot be used with {mode}")


def main(config):
    """Compare, replay or evaluate, as the config says; return the summary if there is one."""
    check(config)
    if config.compare:
        return compare(config.compare)
    init_distributed()  # for its number of threads
    if config.replay:
        return replay(config)
    check_result_path(result_path(config))
    run = find_run(config.run)
    policy = Policy(run, choose_data(config, run), batch=config.policy_batch, backbone=config.backbone)
    return evaluate(config, policy)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
