"""Speed, measured; not run by pytest. Every mode compares two ways with the same weights in the same run.

    python tests/bench.py eval runs/NAME          # eval.py against the field's loop: one simulator, drawing always
    python tests/bench.py label                   # latent.py label against one frame pair at a time
    python tests/bench.py label --full --steps 32 # the same at the paper's size, random weights

Prints a table and writes it as JSON (--out). Times on a shared machine mean little; their ratios within one run do.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
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


@dataclass
class Label:
    """Labelled steps per second of latent.py label against one frame pair at a time, both frames read and encoded."""

    data: Path = Path("data/libero_tiny")
    """folder of an RLDS data set"""
    full: bool = False
    """the paper's size: DINOv2 ViT-B/14 at 224 px, 12 + 12 blocks of width 768; random weights either way"""
    steps: int = 512
    """labelled steps"""
    batch_size: int = 64
    """frames, and pairs, encoded at once by latent.py"""
    out: Path = Path("bench-label.json")
    """where the table goes"""


VIT_B = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518)
PAPER = dict(features="dinov2", image_size=224, width=768, num_blocks=12, heads=12, code_dim=128)


@torch.no_grad()
def one_pair_at_a_time(index, model, device):
    """codes [n, P] of every step of one episode, in the published way: each frame is read and encoded for each pair."""
    found = []
    for step in range(len(index)):
        places = step, min(step + model.sizes.delta, len(index) - 1)
        frames = [torch.from_numpy(model.features.read(index.image("image", place)).copy())[None] for place in places]
        codes, _ = model.encode(*(model.features(frame.to(device)) for frame in frames))
        found.append(codes.cpu())
    return torch.cat(found)


def bench_label(config, device):
    """Both ways on the same steps, as one long episode, after a warm-up; prints steps per second and equal codes."""
    from data import open_index
    from latent import LamSizes, LatentActionModel, label_episodes

    torch.manual_seed(0)
    whole = open_index(config.data)
    index, warm = (replace(whole, starts=np.array([0, min(n, len(whole))])) for n in (config.steps, 8))
    sizes, vit = (LamSizes(**PAPER), VIT_B) if config.full else (LamSizes(), None)
    model = LatentActionModel(sizes, features_config=vit).to(device).eval()
    model.codes.quantiser.start_at(0.1 * torch.randn(sizes.num_codes, sizes.code_dim))
    ways = {
        "one pair at a time": lambda index: one_pair_at_a_time(index, model, device),
        "latent.py label": lambda index: next(label_episodes(index, model, [0], config.batch_size))[0],
    }
    rows, codes = {}, []
    for name, way in ways.items():
        way(warm)
        clock = time.perf_counter()
        codes.append(way(index))
        rows[name] = {"steps_per_s": len(index) / (time.perf_counter() - clock)}
        print(f"{name:20} {rows[name]['steps_per_s']:10.2f} steps/s")
    first, second = (row["steps_per_s"] for row in rows.values())
    same = (codes[0] == codes[1]).float().mean().item()
    print(
        f"ratio {second / first:.2f}; {100 * same:.1f} % of the codes are the same; {torch.get_num_threads()} thread(s)"
    )
    return {"rows": rows, "ratio": second / first, "same_codes": same}


def main():
    config = tyro.extras.subcommand_cli_from_dict({"eval": Eval, "label": Label}, description=__doc__)
    device = start_ranks().device
    result = bench_eval(config) if isinstance(config, Eval) else bench_label(config, device)
    config.out.write_text(json.dumps(result | {"command": sys.argv}, indent=1) + "\n")


if __name__ == "__main__":
    main()
