"""Rolls a trained run out in LIBERO, in closed loop, and reports success with 95 % Wilson intervals.

    python eval.py runs/NAME                       # the tasks and starts of the run's own data, 20 trials each
    python eval.py runs/NAME --blind               # control: black images; --mute: an empty instruction
    python eval.py runs/NAME --trials 2 --video    # a GIF of each episode
    python eval.py --compare A.json B.json         # two results of the same starts, paired: exact McNemar test

The protocol is OpenVLA-OFT's: 10 settling steps, both cameras rendered at 256 px and rotated by 180 degrees, stored as
the training images were (Lanczos, JPEG), centre crop, all actions of a chunk open-loop, success by the task's own check
within the suite's step limit. Trial i starts from official start i after seeding the simulator with i; `widen` then
moves the handled object, as in the run's data. Cameras are drawn only when the policy looks.
"""

import io
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from common import commit, start_ranks, write_json
from data import to_robosuite
from model import Policy
from sim import CAMERAS, MAX_STEPS, Sim, encode_jpeg, instructions, versions


@dataclass
class Config:
    run: tyro.conf.Positional[str] = ""
    """folder of a trained run"""
    trials: int = 20
    """episodes per task"""
    suite: str = ""
    """LIBERO suite (default: that of the run's data)"""
    task_ids: tuple[int, ...] = ()
    """tasks of the suite (default: those of the run's data)"""
    widen: float = -1.0
    """half-width in metres of the square in which the handled object starts (default: as in
    the run's data; 0: official)"""
    seed: int = 0
    """seed of the first trial; trial i has seed + i"""
    blind: bool = False
    """control: the policy sees black images"""
    mute: bool = False
    """control: the policy gets an empty instruction"""
    video: bool = False
    """save a GIF of each episode beside the result (draws at every step, so it is slower)"""
    out: str = ""
    """result file (default: eval.json in the run, eval-blind.json, eval-mute.json)"""
    data: str = ""
    """data set whose statistics to use, by name (needed only when the run was trained on several)"""
    any_mujoco: bool = False
    """allow another MuJoCo version than the benchmark's"""
    compare: tuple[Path, ...] = ()
    """print these result files side by side instead of running"""


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


def mcnemar(first, second):
    """Two-sided p of McNemar's exact test for paired outcomes (lists of bool)."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


# ----------------------------------------------------------------------------------------------------------------------
# One episode


def look(sim, cameras, blind):
    """The policy's view: list of C arrays u8 [1, size, size, 3] stored like training data, and proprio f32 [1, N]."""
    seen = sim.observe()
    views = []
    for name, stored in cameras.items():
        jpeg = encode_jpeg(seen[name], **stored)
        view = np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))[None]
        views.append(np.zeros_like(view) if blind else view)
    return views, seen["state"][None]


def run_episode(sim, policy, cameras, seed, widen, instruction, limit, blind=False, frames=None):
    """One trial. Returns (success, policy steps taken). `frames`, a list, gets every step's two camera images."""
    sim.start(seed, widen)
    steps, success = 0, False
    while steps < limit and not success:
        views, proprio = look(sim, cameras, blind)
        chunk = to_robosuite(policy(views, [instruction], proprio)[0])[: limit - steps]  # [H, A]
        for number, action in enumerate(chunk):
            success = sim.step(action, look=number + 1 == len(chunk) or frames is not None)
            steps += 1
            if frames is not None:
                seen = sim.observe()
                frames.append(np.concatenate([seen[name] for name in CAMERAS], 1))
            if success:
                break
    return success, steps


def save_gif(path, frames, caption, every=4):
    """frames: list of u8 [h, w, 3] at 20 Hz -> a GIF at 5 Hz with a line of text, its last frame held."""
    pictures = []
    for frame in frames[::every] + frames[-1:] * 5:
        picture = Image.fromarray(frame)
        ImageDraw.Draw(picture).text((6, 4), caption, fill="white", stroke_width=2, stroke_fill="black")
        pictures.append(picture.quantize(96))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50 * every, loop=0, optimize=True)


# ----------------------------------------------------------------------------------------------------------------------
# A whole evaluation


def plan(config, policy):
    """(suite, task ids, widen, data entry of the run): what to evaluate, by default what the run was trained on.

    Raises ValueError when the run's data does not say it and the command line neither, or when a trial's seed was used
    for a demonstration.
    """
    entry = next(e for e in policy.config["data"] if e["name"] == policy.name)
    suite = config.suite or entry.get("suite") or entry["name"].removesuffix("_no_noops")
    if suite not in MAX_STEPS:
        raise ValueError(
            f"the run's data does not name a LIBERO suite (found '{suite}'); "
            f"give --suite, one of {', '.join(MAX_STEPS)}"
        )
    known = instructions(suite)
    own = suite == entry.get("suite")
    trained = entry["tasks"] if own else [task for task, text in enumerate(known) if text in entry["instructions"]]
    tasks = list(config.task_ids) or trained or list(range(len(known)))
    wrong = [task for task in tasks if not 0 <= task < len(known)]
    if wrong:
        raise ValueError(f"task_ids {wrong} are not in {suite}, which has tasks 0 to {len(known) - 1}")
    if config.trials < 1:
        raise ValueError(f"trials is {config.trials}; it must be at least 1")
    low, high = entry.get("seeds", (math.inf, -math.inf))
    if config.seed + config.trials > low and config.seed <= high:
        raise ValueError(
            f"seeds {config.seed} to {config.seed + config.trials - 1} overlap those of the demonstrations, "
            f"{low} to {high}; choose a smaller --seed"
        )
    widen = config.widen if config.widen >= 0 else entry["widen"] if own else 0.0
    return suite, tasks, widen, entry


def evaluate(config, out):
    """Runs all trials and returns the result as it is written to JSON; videos go beside `out`."""
    policy = Policy(config.run, config.data)
    suite, tasks, widen, entry = plan(config, policy)
    rows, bar = [], tqdm(total=len(tasks) * config.trials, desc="episodes")
    for task in tasks:
        sim = Sim(suite, task, config.any_mujoco)
        text = "" if config.mute else sim.instruction
        for trial in range(config.trials):
            seed, frames, started = config.seed + trial, [] if config.video else None, time.perf_counter()
            success, steps = run_episode(
                sim, policy, entry["cameras"], seed, widen, text, MAX_STEPS[suite], config.blind, frames
            )
            rows.append(
                {
                    "task": task,
                    "seed": seed,
                    "success": success,
                    "steps": steps,
                    "seconds": round(time.perf_counter() - started, 2),
                }
            )
            if config.video:
                save_gif(
                    out.with_suffix("") / f"task{task}-seed{seed}.gif",
                    frames,
                    f"{sim.instruction}: {'success' if success else 'failure'}",
                )
            bar.update()
            bar.set_postfix(success=f"{sum(r['success'] for r in rows)}/{len(rows)}")
        sim.close()
    bar.close()
    names = instructions(suite)
    return tally(rows) | {
        "tasks": [
            {"task": t, "instruction": names[t]}
            | tally([r for r in rows if r["task"] == t])
            | expert(entry, suite, t, widen, rows)
            for t in tasks
        ],
        "suite": suite,
        "widen": widen,
        "blind": config.blind,
        "mute": config.mute,
        "run": config.run,
        "variant": policy.config["train"]["variant"],
        "rows": rows,
        "versions": versions() | {"torch": torch.__version__},
        "command": sys.argv,
        "commit": commit(),
    }


def tally(rows):
    """{"episodes", "successes", "success_rate", "ci95"} of some episodes."""
    episodes, successes = len(rows), sum(r["success"] for r in rows)
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": successes / episodes,
        "ci95": wilson(successes, episodes),
    }


def expert(entry, suite, task, widen, rows):
    """{"expert_successes", "expert_episodes"} of the scripted expert on the same starts, as far as the data says."""
    seeds = {r["seed"] for r in rows if r["task"] == task and suite == entry.get("suite")}
    same = [e for e in entry.get("expert", []) if e["task"] == task and e["seed"] in seeds and widen == e["widen"]]
    return {"expert_successes": sum(e["success"] for e in same), "expert_episodes": len(same)}


def result_path(config):
    """Where the result goes. Raises FileExistsError rather than overwrite one."""
    control = "".join("-" + name for name in ("blind", "mute") if getattr(config, name))
    path = Path(config.out or Path(config.run) / f"eval{control}.json")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another --out, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def print_table(result):
    """Success per task and in all, with intervals and the expert beside them."""
    rows = [
        *result["tasks"],
        {
            "instruction": "all tasks",
            **result,
            "expert_successes": sum(t["expert_successes"] for t in result["tasks"]),
            "expert_episodes": sum(t["expert_episodes"] for t in result["tasks"]),
        },
    ]
    width = max(len(row["instruction"]) for row in rows)
    print(f"{'':{width}}  success          95 % interval    expert")
    for row in rows:
        low, high = row["ci95"]
        own = f"{row['successes']:3d}/{row['episodes']:<3d} {100 * row['success_rate']:5.1f} %"
        beside = f"{row['expert_successes']}/{row['expert_episodes']}" if row["expert_episodes"] else "not run"
        print(f"{row['instruction']:{width}}  {own}  {100 * low:5.1f} to {100 * high:5.1f} %  {beside}")


def print_comparison(paths):
    """Each later result against the first, paired by (task, seed)."""
    results = [json.loads(path.read_text()) for path in paths]
    outcomes = [{(r["task"], r["seed"]): r["success"] for r in result["rows"]} for result in results]
    kinds = [(result["suite"], result["widen"], outcome.keys()) for result, outcome in zip(results, outcomes)]
    for path, result, found, kind in zip(paths, results, outcomes, kinds):
        if kind != kinds[0]:
            raise ValueError(f"{path} and {paths[0]} are results of different starts; they cannot be paired")
        low, high = result["ci95"]
        line = f"{path}: {result['successes']}/{result['episodes']} = {100 * result['success_rate']:.1f} %"
        line += f" ({100 * low:.1f} to {100 * high:.1f})"
        if path != paths[0]:
            p = mcnemar([outcomes[0][start] for start in found], list(found.values()))
            line += f", McNemar against the first p = {p:.2g}"
        print(line)


def main(config):
    if config.compare:
        return print_comparison(config.compare)
    if not config.run:
        raise ValueError("say which run to evaluate: python eval.py runs/NAME")
    start_ranks()  # for its number of threads
    out = result_path(config)
    result = evaluate(config, out)
    write_json(out, result)
    print_table(result)
    print(f"result: {out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
