"""Measure speed; not run by pytest. Every mode but ddp compares two ways with the same weights in the same run.

    python tests/bench.py eval runs/NAME          # eval.py against the field's loop: one simulator, drawing always
    python tests/bench.py label                   # label.py against one frame pair at a time
    python tests/bench.py label --full --steps 32 # the same at the paper's size, random weights
    python tests/bench.py data                    # the input pipeline against a Hugging Face processor for each sample
    python tests/bench.py train --size wide --steps 1           # a training step against transformers' forward; 10 min
    python tests/bench.py train --size 2b --batch 32            # the same at the real size on a GPU
    python tests/bench.py numerics --size 2b      # losses of training steps in bf16 and in fp32
    python tests/bench.py memory --size 2b        # what fits on a GPU, by a formula, on any machine
    python tests/bench.py infer --size 2b         # a chunk of actions against transformers' own forward
    python tests/bench.py ddp --size 2b           # train.py's step on 1 to n processes
    python tests/bench.py versions ../other       # the default training run of a second checkout and of this one

Prints a table and writes it as JSON (--out). Times on a shared machine mean little; their ratios within one run do.
The modes train, numerics, memory, infer and ddp are in bench_model.py, what they compare with in bench_helpers.py.
Nothing is downloaded: weights are random, tokens are the tiny backbone's.

Axes: B batch, H chunk steps, A action size, P codes per step, S steps of a data set.
"""

import functools
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_helpers import CHUNK, TEXTS, Stopwatch, VlaConfig, random_vla, repeat_in_time
from bench_model import (
    DdpConfig,
    InferConfig,
    MemoryConfig,
    NumericsConfig,
    TrainConfig,
    bench_ddp,
    bench_infer,
    bench_memory,
    bench_numerics,
    bench_train,
)

from backbone import PROMPT
from batches import ActionChunks, action_chunk, prepare_images
from common import init_distributed
from normalise import statistics
from rlds import RldsIndex

# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class EvalConfig:
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


WATCHDOG = 300.0  # s of silence after which eval.py replaces a simulator
PARTS_OF_EVALUATION = ("open", "reset", "physics", "render", "policy", "wait")


class TimedPolicy:
    """A policy, and the seconds spent in it."""

    def __init__(self, policy):
        self.policy = policy
        self.seconds = 0.0

    def __call__(self, *inputs):
        """Return the policy's actions."""
        started = time.perf_counter()
        actions = self.policy(*inputs)
        self.seconds += time.perf_counter() - started
        return actions


def act_alone(policy, prompt, images, proprio):
    """Return the simulator's actions f32 [H, A] for one observation, at batch 1."""
    from normalise import to_robosuite

    return to_robosuite(policy([image[None] for image in images], [prompt], proprio[None])[0])


def play_in_turn(episodes, policy):
    """Play the episodes in one simulator in this process, as the field evaluates.

    Return ({seed: success}, seconds, {part: seconds}).
    """
    from rollout import play
    from sim import Sim

    started = time.perf_counter()
    policy = TimedPolicy(policy)
    sim = Sim(episodes[0].suite, episodes[0].task)
    del sim.world._initialize_sim, sim.world._destroy_sim  # back to robosuite's own, which compile and upload each time
    spent = {"open": time.perf_counter() - started}
    outcomes = {}
    for episode in episodes:
        act = functools.partial(act_alone, policy, episode.prompt)
        outcomes[episode.seed], _ = play(sim, episode, act, render_every_step=True)
    sim.close()
    return outcomes, time.perf_counter() - started, spent | sim.spent | {"policy": policy.seconds}


def play_in_processes(episodes, policy, config):
    """Play the episodes as eval.py does; return as `play_in_turn`, with seconds summed over the processes."""
    from eval import batch_policy, play_all

    started = time.perf_counter()
    policy = TimedPolicy(policy)
    outcomes = {}
    spent = {}

    def finish(episode, result):
        outcomes[episode.seed] = result["success"]
        for name, seconds in result["spent"].items():
            spent[name] = spent.get(name, 0.0) + seconds

    play_all(episodes, batch_policy(policy, config.policy_batch), finish, config.envs, WATCHDOG)
    return outcomes, time.perf_counter() - started, spent | {"policy": policy.seconds}


def eval_row(outcomes, seconds, spent):
    """Return one row of the table from what `play_in_turn` returned. Raise RuntimeError when a simulator failed."""
    if None in outcomes.values():
        raise RuntimeError("a simulator failed three times; its messages are above")
    return {
        "episodes": len(outcomes),
        "successes": sum(outcomes.values()),
        "seconds": round(seconds, 1),
        "episodes_per_hour": round(3600 * len(outcomes) / seconds, 1),
        "spent": {part: round(value, 1) for part, value in spent.items()},
        "outcomes": outcomes,
    }


def bench_eval(config):
    """Play the same episodes both ways, the field's first; print episodes per hour and where the time went.

    "wait" is how long simulators waited for the policy, its own time included.
    """
    from eval import Config, plan_trials
    from policy import Policy

    policy = Policy(config.run)
    task = policy.data_entry["tasks"][0]
    episodes = plan_trials(Config(run=str(config.run), trials=config.episodes, task_ids=(task,)), policy)
    sizes = [camera["size"] for camera in policy.data_entry["cameras"].values()]
    black = [np.zeros((1, size, size, 3), np.uint8) for size in sizes]
    policy(black, [episodes[0].prompt], np.zeros((1, 8), np.float32))  # the first call is slower
    first = eval_row(*play_in_turn(episodes, policy))
    second = eval_row(*play_in_processes(episodes, policy, config))
    same = sum(first["outcomes"][seed] == second["outcomes"][seed] for seed in first["outcomes"])
    rows = {"field's loop": first, f"eval.py, {config.envs} envs": second}
    header = "  ".join(f"{part:>8}" for part in PARTS_OF_EVALUATION)
    print(f"{'':20} episodes/h  success  {header}  (s, summed over processes)")
    for name, row in rows.items():
        parts = "  ".join(f"{row['spent'].get(part, 0.0):8.1f}" for part in PARTS_OF_EVALUATION)
        print(f"{name:20} {row['episodes_per_hour']:10.1f}  {row['successes']:3d}/{row['episodes']:<3d}  {parts}")
    ratio = second["episodes_per_hour"] / first["episodes_per_hour"]
    print(f"ratio {ratio:.2f}; same outcome in {same} of {len(episodes)} trials")
    return {"rows": rows, "ratio": ratio, "same_outcomes": same}


# ----------------------------------------------------------------------------------------------------------------------
# Labelling


@dataclass
class LabelConfig:
    """Labelled steps per second of label.py against one frame pair at a time, both frames read and encoded."""

    data: Path = Path("data/libero_tiny")
    """folder of an RLDS data set"""
    full: bool = False
    """the paper's size: DINOv2 ViT-B/14 at 224 px, 12 + 12 blocks of width 768; random weights either way"""
    steps: int = 512
    """labelled steps"""
    batch_size: int = 64
    """frames, and pairs, encoded at once by label.py"""
    out: Path = Path("bench-label.json")
    """where the table goes"""


VIT_B = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518)
PAPER_SIZES = dict(features="dinov2", image_size=224, width=768, num_blocks=12, heads=12, code_dim=128)


@torch.no_grad()
def label_pair_by_pair(index, lam, device):
    """Return the codes i64 [S, P] of an index of one episode as published code computes them.

    Each frame is read and encoded for each pair that it is in.
    """
    codes = []
    for step in range(len(index)):
        pair = (step, min(step + lam.sizes.delta, len(index) - 1))
        features = []
        for place in pair:
            frame = torch.from_numpy(lam.features.resize(index.image("image", place)).copy())
            features.append(lam.features(frame[None].to(device)))
        pair_codes, _ = lam.encode(*features)
        codes.append(pair_codes.cpu())
    return torch.cat(codes)


def label_in_batches(index, lam, batch_size):
    """Return the codes u8 [S, P] of an index of one episode as label.py computes them."""
    from label import label_episodes

    codes, _ = next(label_episodes(index, lam, [0], batch_size))
    return codes


def bench_label(config):
    """Label the same steps both ways, as one long episode; print steps per second and the share of equal codes."""
    from data import open_index
    from latent import LamSizes, LatentActionModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    whole = open_index(config.data)
    index, short = (replace(whole, starts=np.array([0, min(steps, len(whole))])) for steps in (config.steps, 8))
    sizes = LamSizes(**PAPER_SIZES) if config.full else LamSizes()
    lam = LatentActionModel(sizes, features_config=VIT_B if config.full else None).to(device).eval()
    lam.codes.quantiser.set_codebook(0.1 * torch.randn(sizes.num_codes, sizes.code_dim))
    functions = {
        "one pair at a time": functools.partial(label_pair_by_pair, lam=lam, device=device),
        "label.py": functools.partial(label_in_batches, lam=lam, batch_size=config.batch_size),
    }
    rows = {}
    codes = []
    for name, label in functions.items():
        label(short)  # the first call is slower
        started = time.perf_counter()
        codes.append(label(index))
        rows[name] = {"steps_per_s": len(index) / (time.perf_counter() - started)}
        print(f"{name:20} {rows[name]['steps_per_s']:10.2f} steps/s")
    ratio = rows["label.py"]["steps_per_s"] / rows["one pair at a time"]["steps_per_s"]
    same = (codes[0] == codes[1]).float().mean().item()
    print(f"ratio {ratio:.2f}; {100 * same:.1f} % of the codes are the same; {torch.get_num_threads()} thread(s)")
    return {"rows": rows, "ratio": ratio, "same_codes": same}


# ----------------------------------------------------------------------------------------------------------------------
# The input pipeline


@dataclass
class DataConfig:
    """Samples/s of one core and its ms by stage in the input pipeline, against a processor call for each sample."""

    samples: int = 128
    """of two 256 px images each, in batches of 16"""
    rounds: int = 3
    """how often the ways take turns; the median counts"""
    out: Path = Path("bench-data.json")
    """where the table goes"""


BATCH = 16  # samples that are cropped, jittered and laid out at once
STAGES = ("read and decode", "assemble", "normalise", "crop", "augment", "patches", "image processor", "tokenise")
HOST_STAGES = ("read and decode", "assemble", "tokenise")  # a core's work when a GPU makes the pixels


def random_jpeg(rng):
    """Return a JPEG of 256 px as costly to decode as a simulator's: smooth areas with some grain, about 20 KB."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((256, 256), Image.BICUBIC)
    grain = np.asarray(coarse, np.float32) + rng.normal(0, 3, (256, 256, 3))
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


class TimedIndex(RldsIndex):
    """An index whose `stopwatch` counts the reading of images apart."""

    stopwatch = None

    def image(self, camera, step):
        """Return an image, u8 [256, 256, 3]."""
        self.stopwatch.lap("assemble")
        pixels = super().image(camera, step)
        self.stopwatch.lap("read and decode")
        return pixels


def write_index(folder, steps):
    """Return a `TimedIndex` of random episodes with two cameras of 256 px, whose one shard is written to `folder`."""
    rng = np.random.default_rng(0)
    shard = folder / "images"
    places = {"image": [], "wrist_image": []}  # (number of the shard, byte offset, length)
    offset = 0
    with open(shard, "wb") as file:
        for camera in list(places) * steps:
            jpeg = random_jpeg(rng)
            places[camera].append((0, offset, len(jpeg)))
            offset += file.write(jpeg)
    starts = np.append(np.arange(0, steps, 32), steps)
    action = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    state = rng.uniform(-1, 1, (steps, 8)).astype(np.float32)
    return TimedIndex(
        name="random",
        directory=folder,
        cache=folder,
        fingerprint="random",
        starts=starts,
        columns={"action": action, "state": state},
        instructions=[TEXTS[episode % len(TEXTS)] for episode in range(len(starts) - 1)],
        shards=[shard],
        images={camera: np.array(rows) for camera, rows in places.items()},
    )


def run_batches(dataset, backbone, pixels):
    """Prepare every sample once, in batches: what train.py's workers, `VLA.predict` and `Backbone` do before layer 1.

    pixels: "augment" as in training, "crop" as in evaluation, or "normalise": neither, as a processor does.
    """
    index = dataset.indices[0]
    size = backbone.grid * backbone.patch
    for start in range(0, len(index), BATCH):
        batch = default_collate([dataset[start + number] for number in range(BATCH)])
        index.stopwatch.lap("assemble")
        if pixels == "normalise":
            images = torch.stack(batch["images"], 1).permute(0, 1, 4, 2, 3).float().div_(127.5).sub_(1)
        else:
            images = prepare_images(batch["images"], size, batch["draws"] if pixels == "augment" else None)
        index.stopwatch.lap(pixels)
        backbone.patches(images)
        index.stopwatch.lap("patches")
        backbone.tokenise(batch["text"])
        index.stopwatch.lap("tokenise")


def run_processor(dataset, backbone, processor):
    """Prepare every sample once, each by itself: Pillow, Hugging Face's image processor, chat template and tokens."""
    index = dataset.indices[0]
    for start in range(0, len(index), BATCH):
        samples = [processor_sample(dataset, backbone, processor, start + number) for number in range(BATCH)]
        pixels, ids, rest = zip(*samples)
        torch.cat(pixels)
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        default_collate(rest)
        index.stopwatch.lap("assemble")


def processor_sample(dataset, backbone, processor, step):
    """Return (patches, token ids, (actions, valid, proprio)) of one sample."""
    index = dataset.indices[0]
    tokenizer = backbone.tokenizer
    stored = [index.stored_bytes(camera, step) for camera in dataset.cameras]
    images = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in stored]
    index.stopwatch.lap("read and decode")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    index.stopwatch.lap("image processor")
    instruction = index.instructions[index.episode_of(step)]
    text = {"type": "text", "text": PROMPT.format(instruction=instruction, chunk=CHUNK)}
    message = {"role": "user", "content": [{"type": "image"}] * len(images) + [text]}
    chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    pad = tokenizer.convert_ids_to_tokens(backbone.qwen.config.image_token_id)
    chat = chat.replace(pad, pad * backbone.tokens_per_image)
    ids = tokenizer(chat, return_tensors="pt")["input_ids"][0]
    index.stopwatch.lap("tokenise")
    actions, valid, _ = action_chunk(dataset.actions[0], index.starts, step, CHUNK)
    return pixels, ids, (actions, valid, dataset.proprio[0][step])


def image_processor(backbone):
    """Return Hugging Face's image processor, the Pillow variant, with the backbone's patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=backbone.patch,
        merge_size=backbone.merge,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 2**16, "longest_edge": 2**24},
    )


def check_same_pixels(index, backbone, processor):
    """Raise RuntimeError unless our patches of an image are the processor's to rounding: both do the same work."""
    frame = np.array(index.image("image", 0))
    expected = processor(images=[Image.fromarray(frame)], return_tensors="pt")["pixel_values"]
    pixels = torch.tensor(frame).permute(2, 0, 1)[None, None].float() / 127.5 - 1
    patches = repeat_in_time(backbone.patches(pixels))[0]
    if patches.shape != expected.shape or (patches - expected).abs().max() > 1e-6:
        raise RuntimeError(f"patches {tuple(patches.shape)} differ from the processor's {tuple(expected.shape)}")


def bench_data(config):
    """Prepare the same samples in several ways in turns, in this process; print ms of CPU time by stage and samples/s.

    "processor" neither crops nor augments. "same pixels" is our pipeline when it makes exactly what the processor does;
    "host" is what a core is left with when pixels are a GPU's task, as in training on one; "evaluation" also crops the
    centre on this core, "augmented" makes all of a training batch on it.
    """
    samples = config.samples // BATCH * BATCH
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(Path(folder), samples)
        index.stopwatch = Stopwatch()
        dataset = ActionChunks([index], [statistics(index)], list(index.images), CHUNK)
        backbone = random_vla(VlaConfig(device="cpu", precision="fp32")).backbone
        processor = image_processor(backbone)
        check_same_pixels(index, backbone, processor)
        functions = {
            "processor": functools.partial(run_processor, dataset, backbone, processor),
            "same pixels": functools.partial(run_batches, dataset, backbone, "normalise"),
            "evaluation": functools.partial(run_batches, dataset, backbone, "crop"),
            "augmented": functools.partial(run_batches, dataset, backbone, "augment"),
        }
        rounds = {name: [] for name in functions}
        for _ in range(config.rounds):
            for name, function in functions.items():
                index.stopwatch = Stopwatch()
                function()
                rounds[name].append({stage: 1000 * s / samples for stage, s in index.stopwatch.seconds.items()})
    rows = {name: {s: float(np.median([ms[s] for ms in each])) for s in each[0]} for name, each in rounds.items()}
    rows["host"] = {stage: rows["augmented"][stage] for stage in HOST_STAGES}
    size = index.mean_frame_bytes("image") / 1024
    print(f"{samples} samples of 2 images of 256 px ({size:.0f} KiB), one process, {torch.get_num_threads()} thread(s)")
    return print_stages(rows, ["processor", "same pixels", "host", "evaluation", "augmented"])


def print_stages(rows, names):
    """Print one column for each of `names` in {name: {stage: ms a sample}}; return them with samples/s and ratios."""
    print(f"{'CPU ms a sample':20}" + "".join(f"{name:>13}" for name in names))
    for stage in STAGES:
        cells = [f"{rows[name][stage]:13.2f}" if stage in rows[name] else " " * 13 for name in names]
        print(f"{stage:20}" + "".join(cells))
    rates = {name: 1000 / sum(rows[name].values()) for name in names}
    ratios = {name: rates[name] / rates["processor"] for name in names}
    print(f"{'samples/s per core':20}" + "".join(f"{rates[name]:13.1f}" for name in names))
    print(f"{'x processor':20}" + "".join(f"{ratios[name]:13.2f}" for name in names))
    return {"rows": {name: {"ms": rows[name], "samples_per_s": rates[name]} for name in names}, "ratios": ratios}


# ----------------------------------------------------------------------------------------------------------------------
# Two versions of the code


@dataclass
class VersionsConfig:
    """CPU time of the same training run by a second checkout and by this one, in turns."""

    before: tyro.conf.Positional[Path]
    """folder of the second checkout"""
    pairs: int = 20
    """runs of each"""
    steps: int = 100
    """training steps of a run"""
    out: Path = Path("bench-versions.json")
    """where the table goes"""


def cpu_seconds(checkout, steps):
    """Return the user and system time of train.py in `checkout`, from the command to its end, data workers included.

    Raise RuntimeError with its messages when it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--max-steps", str(steps), "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_versions(config):
    """Print each pair, and the geometric mean of the ratios with its 95 % interval (bootstrap over pairs)."""
    root = Path(__file__).resolve().parents[1]
    rows = []
    for number in range(config.pairs):
        order = (config.before, root) if number % 2 else (root, config.before)
        seconds = {checkout: cpu_seconds(checkout, config.steps) for checkout in order}
        before, here = seconds[config.before], seconds[root]
        rows.append((before, here))
        print(f"{number + 1:3} {before:8.2f} s before, {here:8.2f} s here", flush=True)
    logs = np.log([here / before for before, here in rows])
    means = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, ratio, high = np.exp([np.quantile(means, 0.025), logs.mean(), np.quantile(means, 0.975)]).tolist()
    print(f"CPU time x {ratio:.3f} ({low:.3f} to {high:.3f}) in {config.pairs} pairs")
    return {"rows": rows, "ratio": ratio, "interval": [low, high]}


# ----------------------------------------------------------------------------------------------------------------------
# The command line

MODES = {
    "eval": (EvalConfig, bench_eval),
    "label": (LabelConfig, bench_label),
    "data": (DataConfig, bench_data),
    "train": (TrainConfig, bench_train),
    "numerics": (NumericsConfig, bench_numerics),
    "memory": (MemoryConfig, bench_memory),
    "infer": (InferConfig, bench_infer),
    "ddp": (DdpConfig, bench_ddp),
    "versions": (VersionsConfig, bench_versions),
}


def main():
    """Run one mode and write its table."""
    configs = {name: config_class for name, (config_class, _) in MODES.items()}
    config = tyro.extras.subcommand_cli_from_dict(configs, description=__doc__)
    bench = next(function for config_class, function in MODES.values() if config_class is type(config))
    init_distributed()  # for its number of threads, and TF32 on a GPU
    result = bench(config)
    config.out.write_text(json.dumps(result | {"command": sys.argv}, indent=1) + "\n")


if __name__ == "__main__":
    main()
