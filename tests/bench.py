"""Speed, measured; not run by pytest. Every mode compares two ways with the same weights in the same run.

    python tests/bench.py eval runs/NAME          # eval.py against the field's loop: one simulator, drawing always

Prints a table and writes it as JSON (--out). Times on a shared machine mean little; their ratios within one run do.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import start_ranks


@dataclass
class Eval:
    """Episodes per hour of eval.py against the field's loop: one simulator that draws both cameras at every step and
    resets in full, batch 1, one episode after another."""

    run: tyro.conf.Positional[Path]
    """a trained run"""
    episodes: int = 20
    """trials of the first task of the run's data"""
    envs: int = 2
    """simulator processes of eval.py"""
    policy_batch: int = 8
    """padded batch of eval.py"""
    out: Path = Path("bench-eval.json")
    """where the table goes"""


class Timed:
    """A policy, and the seconds spent in it."""

    def __init__(self, policy):
        self.policy, self.seconds = policy, 0.0

    def __call__(self, *given):
        started = time.perf_counter()
        actions = self.policy(*given)
        self.seconds += time.perf_counter() - started
        return actions


def fields_loop(episodes, policy):
    """(outcomes, seconds by part) of one simulator in this process, as the field evaluates."""
    from data import to_robosuite
    from sim import Sim, play

    clock, policy = time.perf_counter(), Timed(policy)
    sim = Sim(episodes[0].suite, episodes[0].task)
    del sim.world._initialize_sim, sim.world._destroy_sim  # back to robosuite's own, which compile and upload each time
    spent = {"open": time.perf_counter() - clock}
    outcomes = {}
    for episode in episodes:
        ask = lambda views, proprio: to_robosuite(policy([v[None] for v in views], [episode.told], proprio[None])[0])  # noqa: E731, B023
        outcomes[episode.seed] = play(sim, episode, ask, every_step=True)[0]
    sim.close()
    return outcomes, time.perf_counter() - clock, spent | sim.spent | {"policy": policy.seconds}


def side_by_side(episodes, policy, config):
    """(outcomes, seconds by part) of eval.py's way; the parts are summed over its processes."""
    from eval import batched, play_all

    clock, policy, outcomes, spent = time.perf_counter(), Timed(policy), {}, {}

    def finish(episode, result):
        outcomes[episode.seed] = result["success"]
        for name, seconds in result["spent"].items():
            spent[name] = spent.get(name, 0.0) + seconds

    play_all(episodes, batched(policy, config.policy_batch), finish, config.envs, 300.0)
    return outcomes, time.perf_counter() - clock, spent | {"policy": policy.seconds}


def bench_eval(config):
    """Both ways on the same episodes, the field's first; prints episodes per hour and where the time went.

    "wait" is what simulators waited for the policy, its own time included.
    """
    from eval import Config, plan
    from model import Policy

    policy = Policy(config.run)
    task = policy.entry["tasks"][0]
    episodes = plan(Config(run=str(config.run), trials=config.episodes, task_ids=(task,)), policy)
    zeros = [np.zeros((1, c["size"], c["size"], 3), np.uint8) for c in policy.entry["cameras"].values()]
    policy(zeros, [episodes[0].told], np.zeros((1, 8), np.float32))  # warm
    rows = {}
    ways = {"field's loop": lambda: fields_loop(episodes, policy)}
    ways[f"eval.py, {config.envs} envs"] = lambda: side_by_side(episodes, policy, config)
    for name, way in ways.items():
        outcomes, seconds, spent = way()
        if None in outcomes.values():
            raise RuntimeError("a simulator failed three times; its messages are above")
        rows[name] = {"episodes": len(outcomes), "successes": sum(outcomes.values()), "seconds": round(seconds, 1)}
        rows[name] |= {"episodes_per_hour": round(3600 * len(outcomes) / seconds, 1)}
        rows[name] |= {"spent": {part: round(s, 1) for part, s in spent.items()}, "outcomes": outcomes}
    first, second = rows.values()
    same = sum(first["outcomes"][seed] == second["outcomes"][seed] for seed in first["outcomes"])
    parts = ("open", "reset", "physics", "render", "policy", "wait")
    print(f"{'':20} episodes/h  success  " + "  ".join(f"{part:>8}" for part in parts) + "  (s, summed over processes)")
    for name, row in rows.items():
        found = "  ".join(f"{row['spent'].get(part, 0.0):8.1f}" for part in parts)
        print(f"{name:20} {row['episodes_per_hour']:10.1f}  {row['successes']:3d}/{row['episodes']:<3d}  {found}")
    ratio = second["episodes_per_hour"] / first["episodes_per_hour"]
    print(f"ratio {ratio:.2f}; same outcome in {same} of {len(episodes)} trials")
    return {"rows": rows, "ratio": ratio, "same_outcomes": same}


def main():
    config = tyro.extras.subcommand_cli_from_dict({"eval": Eval}, description=__doc__)
    start_ranks()
    result = bench_eval(config)
    config.out.write_text(json.dumps(result | {"command": sys.argv}, indent=1) + "\n")


if __name__ == "__main__":
    main()
