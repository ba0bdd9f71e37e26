"""What the tests share, each made once per session: a simulator, small RLDS data sets with labels, a trained run."""

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models gain nothing from more threads
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.replace("\\\n", " ").strip().splitlines()]
TEXTS = {1: "put the bowl on the stove", 8: "put the bowl on the plate"}  # libero_goal task -> instruction


def printed(start):
    """The README's one command that is this, or begins like this, without the installation; as a list of words."""
    commands = [line.split(" && ")[-1] for line in COMMANDS]
    (found,) = [c for c in commands if c == start] or [c for c in commands if c.startswith(start)]
    return shlex.split(found)


@pytest.fixture(scope="session")
def sim():
    """libero_goal task 8, "put the bowl on the plate"; each test starts it anew."""
    from sim import Sim

    made = Sim("libero_goal", 8)
    yield made
    made.close()


# ----------------------------------------------------------------------------------------------------------------------
# RLDS data sets that tensorflow-datasets wrote


def picture(background, square, quality):
    """JPEG bytes, 96 x 96: a plain background with a bright square at (row, column)."""
    pixels = np.full((96, 96, 3), background, np.uint8)
    pixels[square[0] : square[0] + 20, square[1] : square[1] + 20] = (220, 200, 40)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def episode(number, rng, latents):
    """One episode of smooth motion; rotation about x never moves, the gripper closes half-way."""
    length, task, colour = int(rng.integers(14, 26)), (1, 8)[number % 2], rng.integers(0, 200, 3)
    phase, steps = rng.uniform(0, 6, 7), []
    for t in range(length):
        action = 0.5 * np.sin(phase + 0.3 * t)
        action[3], action[6] = 0.0, 1.0 if 2 * t > length else -1.0
        views = {
            "image": picture(colour, (2 * t, 20 + 20 * (task == 8)), 85),
            "wrist_image": picture(255 - colour, (40, 2 * t), 70),
        }
        observation = {name: io.BytesIO(jpeg) for name, jpeg in views.items()}
        observation |= {
            "state": np.cos(phase[0] + 0.1 * t * np.arange(8)).astype(np.float32),
            "joint_state": np.zeros(7, np.float32),
        }
        ends = {"is_first": t == 0, "is_last": t == length - 1, "is_terminal": t == length - 1}
        step = {
            "observation": observation,
            "action": action.astype(np.float32),
            "language_instruction": TEXTS[task],
            **ends,
        }
        step |= {"reward": float(t == length - 1), "discount": 1.0}
        if latents:
            step |= {
                "latent_idx": rng.integers(0, 16, 4).astype(np.float32),
                "latent_z": rng.normal(size=512).astype(np.float32),
            }
        steps.append(step)
    about = {
        "file_path": f"made/{number}",
        "seed": 10_000 + number,
        "task": task,
        "suite": "libero_goal",
        "widen": 0.06,
    }
    return f"{number:05d}", {"steps": steps, "episode_metadata": about | {"state": rng.normal(size=5 + number % 2)}}


def write_rlds(folder, name="made", episodes=8, seed=0, latents=False):
    """An RLDS data set of two shards in the features of modified_libero_rlds; returns its folder."""
    import tensorflow_datasets as tfds

    image = {"shape": (96, 96, 3), "encoding_format": "jpeg"}
    tensor = lambda size, dtype=np.float32: tfds.features.Tensor(shape=(size,), dtype=dtype)  # noqa: E731
    scalar, text = tfds.features.Scalar, tfds.features.Text
    observation = {
        "image": tfds.features.Image(**image),
        "wrist_image": tfds.features.Image(**image),
        "state": tensor(8),
        "joint_state": tensor(7),
    }
    step = {"observation": tfds.features.FeaturesDict(observation), "action": tensor(7), "language_instruction": text()}
    step |= {key: scalar(np.bool_) for key in ("is_first", "is_last", "is_terminal")} | {
        "reward": scalar(np.float32),
        "discount": scalar(np.float32),
    }
    step |= {"latent_idx": tensor(4), "latent_z": tensor(512)} if latents else {}
    about = {
        "file_path": text(),
        "seed": scalar(np.int64),
        "task": scalar(np.int64),
        "suite": text(),
        "widen": scalar(np.float32),
        "state": tensor(None, np.float64),
    }
    features = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": tfds.features.FeaturesDict(about)}
    )
    rng = np.random.default_rng(seed)
    made = [episode(number, rng, latents) for number in range(episodes)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name,
        "1.0.0",
        features,
        split_datasets={"train": made},
        data_dir=folder,
        download_config=tfds.download.DownloadConfig(num_shards=2),
    )
    return folder / name


def read_rlds(folder):
    """[(metadata, steps)] of all episodes as tensorflow-datasets reads them, shard after shard; images stay bytes."""
    import tensorflow_datasets as tfds

    skip = {"steps": {"observation": {camera: tfds.decode.SkipDecoding() for camera in ("image", "wrist_image")}}}
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    found = tfds.builder_from_directory(folder / "1.0.0").as_dataset("train", decoders=skip, read_config=in_order)
    about = [{name: value.numpy() for name, value in e["episode_metadata"].items()} for e in found]
    return list(zip(about, (list(e["steps"].as_numpy_iterator()) for e in found)))


def write_video(folder):
    """An RLDS data set of three episodes, of 9, 1 and 14 frames, without actions, states or instructions."""
    import tensorflow_datasets as tfds

    views = {"observation": tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(96, 96, 3))})}
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(views)})
    shots = lambda t: {"observation": {"image": io.BytesIO(picture((9, 90, 60), (4 * t, 3 * t), 80))}}  # noqa: E731
    made = [(f"{n}", {"steps": [shots(t + n) for t in range(length)]}) for n, length in enumerate((9, 1, 14))]
    tfds.dataset_builders.store_as_tfds_dataset(
        "video", "1.0.0", features, split_datasets={"train": made}, data_dir=folder
    )
    return folder / "video"


def write_all(folder):
    """8 episodes without labels; 4 with labels as in the paper's release; what tensorflow-datasets reads of the 8;
    and video alone."""
    made, released = write_rlds(folder), write_rlds(folder, "released", 4, 1, True)
    return made, released, read_rlds(made), write_video(folder)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """`write_all`, in a process of its own: in one that has loaded TensorFlow, MuJoCo's EGL context crashes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(write_all, tmp_path_factory.mktemp("rlds")).result()


@pytest.fixture(scope="session")
def rlds(written):
    """Folder of 8 episodes without labels."""
    return written[0]


@pytest.fixture(scope="session")
def rlds_latents(written):
    """Folder of 4 other episodes that carry `latent_idx` and `latent_z`."""
    return written[1]


@pytest.fixture(scope="session")
def as_tfds_reads(written):
    """[(metadata, steps)] of the episodes of `rlds`."""
    return written[2]


@pytest.fixture(scope="session")
def video(written):
    """Folder of `write_video`."""
    return written[3]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the tests keep indices."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def index(rlds, cache):
    """The index of `rlds`."""
    from data import open_index

    return open_index(rlds, cache)


# ----------------------------------------------------------------------------------------------------------------------
# Demonstrations that the README's command made


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """The README's command, for two episodes with small images, killed (kill -9) after attempt 1; attempt 0 had failed.
    Its config, its words, and the arrays of attempt 1 as they were at its death."""
    import tyro

    import demos

    small = {"--task-ids": 8, "--episodes": 2, "--trials": 2, "--image-size": 32, "--procs": 1}
    small["--out"] = tmp_path_factory.mktemp("demos") / "tiny_rlds"
    words = [sys.executable, *printed("python demos.py")[1:], *(str(word) for pair in small.items() for word in pair)]
    config = tyro.cli(demos.Config, args=words[2:])
    demos.resume(config)
    demos.stage(demos.staging(config) / "8_0.npz", None)
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not (demos.staging(config) / "8_1.npz").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert not config.out.exists()
    with np.load(demos.staging(config) / "8_1.npz") as arrays:
        return SimpleNamespace(config=config, words=words, arrays=dict(arrays))


@pytest.fixture(scope="session")
def demonstrations(interrupted):
    """The same command again: its data set's folder, and what it printed."""
    done = subprocess.run(interrupted.words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return interrupted.config.out, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What training needs, and one trained run


@pytest.fixture(scope="session")
def labels(index, tmp_path_factory):
    """Random image-based latent labels of `rlds`, as `latent.py label` writes them."""
    import torch

    from common import save_tensors

    path, rng = tmp_path_factory.mktemp("labels") / "labels.safetensors", np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 16, (len(index), 4), dtype=np.uint8))
    vectors = torch.from_numpy(rng.normal(size=(len(index), 4, 16))).half()
    save_tensors(path, {"codes": codes, "vectors": vectors}, data=index.fingerprint, lam="made", delta=32, num_codes=16)
    return path


@pytest.fixture(scope="session")
def tokenizer(rlds, cache, tmp_path_factory):
    """Folder of an action tokenizer that latent.py trained on `rlds` for two steps."""
    import torch

    import latent
    from common import Ranks

    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    config = latent.Tokenizer(
        data=[rlds], out=out, cache=cache, max_steps=2, global_batch_size=16, num_codes=16, code_dim=16
    )
    latent.train(config, Ranks(0, 1, torch.device("cpu")))
    return out


@pytest.fixture(scope="session")
def train_config(rlds, cache, labels, tokenizer):
    """Function (out, **changes) -> train.Config of a run of seconds on `rlds`."""
    import train

    def make(out, **changes):
        small = dict(
            data=(rlds,),
            cache=cache,
            labels=(labels,),
            tokenizer=str(tokenizer),
            global_batch_size=4,
            num_workers=0,
            val_fraction=0.25,
            max_steps=2,
        )
        return train.Config(**small | {"out": str(out)} | changes)

    return make


@dataclass
class Script:
    """A finished command."""

    code: int
    text: str  # what it printed, errors included


def run_script(*words):
    """Runs one of the scripts, or torchrun, as a user does."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Script(done.returncode, done.stdout)


@pytest.fixture(scope="session")
def script():
    """`run_script`."""
    return run_script


def run_script_here(*words):
    """As `run_script`, but in this process, which has imported torch and transformers already (4 s of CPU time)."""
    shown = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, words)))
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
    if isinstance(code, str):  # last words
        return Script(1, shown.getvalue() + code)
    return Script(code, shown.getvalue())


@pytest.fixture(scope="session")
def script_here():
    """`run_script_here`."""
    return run_script_here


@dataclass
class Run:
    """A run that train.py made: the flags it was given, its folder, and what it printed."""

    flags: list
    folder: Path
    text: str


@pytest.fixture(scope="session")
def run(rlds, cache, labels, tmp_path_factory):
    """One real training run through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = [
        "train.py",
        "--variant",
        "la_align",
        "--data",
        rlds,
        "--cache",
        cache,
        "--labels",
        labels,
        "--max-steps",
        40,
        "--global-batch-size",
        4,
        "--save-every",
        5,
        "--val-fraction",
        0.25,
    ]
    done = run_script(*flags, "--out", folder)
    assert done.code == 0, done.text
    return Run(flags, folder, done.text)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Function (dtype) -> folder of a small random Qwen3-VL as transformers saves it."""

    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

    import model

    def make(dtype):
        folder, tokenizer = tmp_path_factory.mktemp("qwen"), model.tiny_tokenizer()
        torch.manual_seed(7)
        Qwen3VLForConditionalGeneration(model.tiny_config(tokenizer)).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    """Folder of a small random DINOv2 with registers."""
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    out = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=7, image_size=28)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """Folder of a small random T5 whose tokenizer ends a text as T5's does."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    out = tmp_path_factory.mktemp("t5")
    words = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", "put", "the", "bowl", "on", "plate", "stove"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(out)
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(words))
    T5EncoderModel(T5Config(**sizes)).save_pretrained(out)
    return out
