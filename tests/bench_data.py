"""The modes of bench.py that read data: `label`, `data` and `video`.

Axes: S steps of a data set, P codes per step, H chunk steps.
"""

import functools
import io
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from bench_helpers import CHUNK, TEXTS, Stopwatch, VlaConfig, random_vla, repeat_in_time
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from backbone import PROMPT
from batches import ActionChunks, StepBatchSampler, action_chunk, chunk_steps, prepare_images
from data import Dataset, open_dataset
from dataspec import DataSpec
from index import CACHE, Feature, Texts
from rlds import RldsIndex

# ----------------------------------------------------------------------------------------------------------------------
# Labelling


@dataclass
class LabelConfig:
    """Labelled steps per second of label.py against one frame pair at a time, both frames read and encoded."""

    data: Path = Path("data/libero_tiny")
    """folder of a data set"""
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
def label_pair_by_pair(dataset, steps, lam, device):
    """Return the codes i64 [S, P] of the first `steps` steps of episode 0 as published code computes them.

    Each frame is read and encoded for each pair that it is in.
    """
    codes = []
    for step in range(steps):
        features = []
        for place in (step, min(step + lam.sizes.delta, steps - 1)):
            frame = torch.from_numpy(lam.features.resize(dataset.image(dataset.cameras[0], place)).copy())
            features.append(lam.features(frame[None].to(device)))
        pair_codes, _ = lam.encode(*features)
        codes.append(pair_codes.cpu())
    return torch.cat(codes)


def label_in_batches(dataset, steps, lam, batch_size):
    """Return the codes u8 [S, P] of the same steps as label.py computes them."""
    from label import label_episodes

    codes, _ = next(label_episodes(with_one_episode(dataset, steps), lam, [0], batch_size))
    return codes


def with_one_episode(dataset, steps):
    """Return a `Dataset` whose only episode is the first `steps` steps."""
    return Dataset(replace(dataset.index, starts=np.array([0, steps])), dataset.spec)


def bench_label(config):
    """Label the same steps both ways, as one long episode; print steps per second and the share of equal codes."""
    from latent import LamSizes, LatentActionModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dataset = open_dataset(config.data)
    steps = min(config.steps, len(dataset))
    sizes = LamSizes(**PAPER_SIZES) if config.full else LamSizes()
    lam = LatentActionModel(sizes, features_config=VIT_B if config.full else None).to(device).eval()
    lam.codes.quantiser.set_codebook(0.1 * torch.randn(sizes.num_codes, sizes.code_dim))
    functions = {
        "one pair at a time": functools.partial(label_pair_by_pair, dataset, lam=lam, device=device),
        "label.py": functools.partial(label_in_batches, dataset, lam=lam, batch_size=config.batch_size),
    }
    rows = {}
    codes = []
    for name, label in functions.items():
        label(8)  # the first call is slower
        started = time.perf_counter()
        codes.append(label(steps))
        rows[name] = {"steps_per_s": steps / (time.perf_counter() - started)}
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

    def image(self, path, step):
        """Return an image, u8 [256, 256, 3]."""
        self.stopwatch.lap("assemble")
        pixels = super().image(path, step)
        self.stopwatch.lap("read and decode")
        return pixels


def write_images(file, jpegs):
    """Append encoded images to an open file; return their places i64 [n, 3] as in `RldsIndex.images`."""
    places = []
    for jpeg in jpegs:
        places.append((0, file.tell(), len(jpeg)))
        file.write(jpeg)
    return np.array(places)


def write_dataset(folder, steps):
    """Return a `Dataset` of random episodes with two cameras of 256 px, over a `TimedIndex` whose shard is written."""
    rng = np.random.default_rng(0)
    shard = folder / "images"
    cameras = ("image", "wrist_image")
    with open(shard, "wb") as file:
        images = {camera: write_images(file, [random_jpeg(rng) for _ in range(steps)]) for camera in cameras}
    features = {camera: Feature("image", "uint8", (256, 256, 3)) for camera in cameras}
    action = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    state = rng.uniform(-1, 1, (steps, 8)).astype(np.float32)
    starts = np.append(np.arange(0, steps, 32), steps)
    numbers = (np.arange(steps) // 32 % len(TEXTS)).astype(np.int32)
    index = TimedIndex(
        name="random",
        directory=folder,
        cache=folder,
        fingerprint="random",
        starts=starts,
        features=features | {"action": Feature("number", "float32", (7,)), "state": Feature("number", "float32", (8,))},
        columns={"action": action, "state": state},
        texts={"text": Texts(TEXTS, numbers)},
        shards=[shard],
        images=images,
    )
    spec = DataSpec("random", dict(zip(cameras, cameras)), ["state"], ["action"], instruction="text")
    return Dataset(index, spec)


def run_batches(chunks, backbone, pixels):
    """Prepare every sample once, in batches: what train.py's workers, `VLA.predict` and `Backbone` do before layer 1.

    pixels: "augment" as in training, "crop" as in evaluation, or "normalise": neither, as a processor does.
    """
    index = chunks.datasets[0].index
    size = backbone.grid * backbone.patch
    for start in range(0, len(index), BATCH):
        batch = default_collate([chunks[start + number] for number in range(BATCH)])
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
    index = dataset.index
    for start in range(0, len(index), BATCH):
        samples = [processor_sample(dataset, backbone, processor, start + number) for number in range(BATCH)]
        pixels, ids, rest = zip(*samples)
        torch.cat(pixels)
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        default_collate(rest)
        index.stopwatch.lap("assemble")


def processor_sample(dataset, backbone, processor, step):
    """Return (patches, token ids, (actions, valid, proprio)) of one sample."""
    index = dataset.index
    tokenizer = backbone.tokenizer
    stored = [index.stored_bytes(camera, step) for camera in dataset.cameras]
    images = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in stored]
    index.stopwatch.lap("read and decode")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    index.stopwatch.lap("image processor")
    text = {"type": "text", "text": PROMPT.format(instruction=dataset.instruction(step), chunk=CHUNK)}
    message = {"role": "user", "content": [{"type": "image"}] * len(images) + [text]}
    chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    pad = tokenizer.convert_ids_to_tokens(backbone.qwen.config.image_token_id)
    chat = chat.replace(pad, pad * backbone.tokens_per_image)
    ids = tokenizer(chat, return_tensors="pt")["input_ids"][0]
    index.stopwatch.lap("tokenise")
    steps, valid = chunk_steps(dataset.starts, step, CHUNK)
    return pixels, ids, (action_chunk(dataset, steps, valid), valid, dataset.normalised_state([step])[0])


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
        dataset = write_dataset(Path(folder), samples)
        index = dataset.index
        index.stopwatch = Stopwatch()
        chunks = ActionChunks([dataset], [dataset.cameras], CHUNK)
        backbone = random_vla(VlaConfig(device="cpu", precision="fp32")).backbone
        processor = image_processor(backbone)
        check_same_pixels(index, backbone, processor)
        functions = {
            "processor": functools.partial(run_processor, dataset, backbone, processor),
            "same pixels": functools.partial(run_batches, chunks, backbone, "normalise"),
            "evaluation": functools.partial(run_batches, chunks, backbone, "crop"),
            "augmented": functools.partial(run_batches, chunks, backbone, "augment"),
        }
        rounds = {name: [] for name in functions}
        for _ in range(config.rounds):
            for name, function in functions.items():
                index.stopwatch = Stopwatch()
                function()
                rounds[name].append({stage: 1000 * s / samples for stage, s in index.stopwatch.seconds.items()})
    rows = {name: {s: float(np.median([ms[s] for ms in each])) for s in each[0]} for name, each in rounds.items()}
    rows["host"] = {stage: rows["augmented"][stage] for stage in HOST_STAGES}
    size = index.images["image"][:, 2].mean() / 1024
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
# Data sets of videos


@dataclass
class VideoConfig:
    """Samples/s of data sets through train.py's data loader, beside the same frames as JPEGs in an RLDS index, and
    beside LeRobot's own loader on the same files."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """folders of data sets whose cameras are videos"""
    spec: str = ""
    """their description, as of train.py"""
    lerobot: Path | None = None
    """a Python with the package `lerobot`, whose loader reads the same folders (default: left out)"""
    backend: str = "pyav"
    """its video_backend"""
    workers: tuple[int, ...] = (0, 2)
    """data workers"""
    batches: int = 40
    """of 16 samples, in a round"""
    rounds: int = 5
    """how often the ways take turns"""
    out: Path = Path("bench-video.json")
    """where the table goes"""


WARM_UP = 6  # batches that are read before the clock starts


def read_batches(batches, count):
    """Return the samples/s of an iterator of batches, after `WARM_UP` of them."""
    iterator = iter(batches)
    for _ in range(WARM_UP):
        next(iterator)
    started = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return BATCH * count / (time.perf_counter() - started)


def read_as_train(dataset, workers, count, seed):
    """Return the samples/s of the shuffled stream of a data set, as train.py reads it."""
    chunks = ActionChunks([dataset], [dataset.cameras], CHUNK, seed)
    sampler = StepBatchSampler(0, WARM_UP + count, BATCH, BATCH)
    return read_batches(DataLoader(chunks, batch_sampler=sampler, num_workers=workers), count)


def jpeg_twin(dataset, folder):
    """Return a `Dataset` with the same numbers and texts, whose images are JPEGs in one shard, as in RLDS data."""
    shard = folder / f"{dataset.name}-images"
    images = {}
    with open(shard, "wb") as file:
        for path in dataset.spec.cameras.values():
            images[path] = write_images(
                file, (as_jpeg(dataset.index.image(path, step)) for step in range(len(dataset)))
            )
    index = dataset.index
    twin = RldsIndex(
        index.name, folder, folder, index.fingerprint, index.starts, index.features, index.columns, index.texts,
        index.metadata, [shard], images,
    )  # fmt: skip
    return Dataset(twin, dataset.spec)


def as_jpeg(pixels):
    """Return the JPEG of an image u8 [h, w, 3], with the quality of LIBERO's released data."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


LEROBOT_LOADER = """
import json, sys, time
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
folder, backend, workers, warm_up, count, batch, chunk, seed = sys.argv[1:]
fps = json.load(open(folder + "/meta/info.json"))["fps"]
times = {"action": [step / fps for step in range(int(chunk))]}
dataset = LeRobotDataset("bench/bench", root=folder, video_backend=backend, delta_timestamps=times)
shuffled = torch.Generator().manual_seed(int(seed))
loader = torch.utils.data.DataLoader(dataset, int(batch), shuffle=True, num_workers=int(workers), generator=shuffled)
iterator = iter(loader)
for _ in range(int(warm_up)):
    next(iterator)
started = time.perf_counter()
for _ in range(int(count)):
    next(iterator)
print("samples/s", int(batch) * int(count) / (time.perf_counter() - started))
"""


def read_with_lerobot(python, folder, backend, workers, count, seed):
    """Return the samples/s of LeRobot's own loader with the same batches and chunks, in a process of that Python.

    Raises RuntimeError with its messages when it fails.
    """
    arguments = (folder.resolve(), backend, workers, WARM_UP, count, BATCH, CHUNK, seed)
    command = [str(python), "-c", LEROBOT_LOADER, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "samples/s" not in done.stdout:
        raise RuntimeError(f"LeRobot's loader failed on {folder}:\n{done.stderr[-2000:]}")
    return float(done.stdout.rsplit("samples/s", 1)[1])


def bench_video(config):
    """Read each data set in several ways in turns; print medians of samples/s, and the median of the rounds' ratios."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for folder in config.data:
            dataset = open_dataset(folder, CACHE, config.spec)
            twin = jpeg_twin(dataset, Path(temporary))
            ways = {
                "this code": functools.partial(read_as_train, dataset),
                "the same as JPEGs": functools.partial(read_as_train, twin),
            }
            if config.lerobot:
                ways["LeRobot's loader"] = functools.partial(read_with_lerobot, config.lerobot, folder, config.backend)
            for workers in config.workers:
                rates = time_ways(ways, workers, config)
                rows += [describe_rates(folder, workers, rates, name) for name in ways]
    return {"rows": rows}


def time_ways(ways, workers, config):
    """Return {way: samples/s of each round}. The ways take turns; ways: {name: function (workers, count, seed)}."""
    rates = {name: [] for name in ways}
    for number in range(config.rounds):
        for name, read in ways.items():
            rates[name].append(read(workers=workers, count=config.batches, seed=number))
    return rates


def describe_rates(folder, workers, rates, name):
    """Print and return one row of the table: a way's samples/s, and its share of this code's, round by round."""
    ratios = np.divide(rates["this code"], rates[name])
    row = {
        "data": folder.name,
        "workers": workers,
        "way": name,
        "samples_per_s": rates[name],
        "median": float(np.median(rates[name])),
        "ratio": float(np.median(ratios)),
        "ratios": [float(ratios.min()), float(ratios.max())],
    }
    print(
        f"{folder.name:20} {workers} workers  {name:18} {row['median']:8.1f} samples/s"
        f"   this code x {row['ratio']:.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
        flush=True,
    )
    return row
