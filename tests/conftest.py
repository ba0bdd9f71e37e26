"""What the tests share, each made once per session: a simulator, small RLDS data sets with labels, a trained run."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from warm import running

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models gain nothing from more threads
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/README.md"]
BLOCKS = [block for path in DOCUMENTS for block in re.findall(r"```(\w*)\n(.*?)```", path.read_text(), re.S)]
TEXTS = {1: "put the bowl on the stove", 8: "put the bowl on the plate"}  # libero_goal task -> instruction


def fenced_commands():
    """Return the commands in the documents' fenced blocks without a language, each once, without the installation."""
    lines = [line for kind, text in BLOCKS if not kind for line in text.replace("\\\n", " ").strip().splitlines()]
    return list(dict.fromkeys(" ".join(line.split(" && ")[-1].split()) for line in lines))


COMMANDS = fenced_commands()


def printed(start):
    """Return the documents' one command that is `start`, or begins with it, as a list of arguments."""
    matches = [c for c in COMMANDS if c == start] or [c for c in COMMANDS if c.startswith(start)]
    assert len(matches) == 1, f"{len(matches)} commands of the documents begin with {start!r}"
    return shlex.split(matches[0])


def pytest_addoption(parser):
    """Add the option that gpu.py gives."""
    parser.addoption("--no-tensorflow", action="store_true", help="leave out tests of data that TensorFlow writes")


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that need `written`, if asked."""
    if config.getoption("--no-tensorflow"):
        left_out = [item for item in items if "written" in item.fixturenames]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
    """Return an image as JPEG bytes, 96 x 96: one background colour with a bright square at (row, column)."""
    pixels = np.full((96, 96, 3), background, np.uint8)
    pixels[square[0] : square[0] + 20, square[1] : square[1] + 20] = (220, 200, 40)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def episode(number, rng, latents):
    """Return (key, episode) of smooth motion; rotation about x never moves, the gripper closes half-way."""
    length = int(rng.integers(14, 26))
    task = (1, 8)[number % 2]
    colour = rng.integers(0, 200, 3)
    phase = rng.uniform(0, 6, 7)
    steps = []
    for t in range(length):
        action = 0.5 * np.sin(phase + 0.3 * t)
        action[3] = 0.0
        action[6] = 1.0 if 2 * t > length else -1.0
        step = {
            "observation": {
                "image": io.BytesIO(picture(colour, (2 * t, 20 + 20 * (task == 8)), 85)),
                "wrist_image": io.BytesIO(picture(255 - colour, (40, 2 * t), 70)),
                "state": np.cos(phase[0] + 0.1 * t * np.arange(8)).astype(np.float32),
                "joint_state": np.zeros(7, np.float32),
            },
            "action": action.astype(np.float32),
            "language_instruction": TEXTS[task],
            "is_first": t == 0,
            "is_last": t == length - 1,
            "is_terminal": t == length - 1,
            "reward": float(t == length - 1),
            "discount": 1.0,
        }
        if latents:
            step["latent_idx"] = rng.integers(0, 16, 4).astype(np.float32)
            step["latent_z"] = rng.normal(size=512).astype(np.float32)
        steps.append(step)
    metadata = {
        "file_path": f"made/{number}",
        "seed": 10_000 + number,
        "task": task,
        "suite": "libero_goal",
        "widen": 0.06,
        "state": rng.normal(size=5 + number % 2),
    }
    return f"{number:05d}", {"steps": steps, "episode_metadata": metadata}


def rlds_features(latents):
    """Return the features of modified_libero_rlds, with those of the paper's release if `latents`."""
    from tensorflow_datasets import features

    def vector(size, dtype=np.float32):
        return features.Tensor(shape=(size,), dtype=dtype)

    def image():
        return features.Image(shape=(96, 96, 3), encoding_format="jpeg")

    observation = {"image": image(), "wrist_image": image(), "state": vector(8), "joint_state": vector(7)}
    step = {
        "observation": features.FeaturesDict(observation),
        "action": vector(7),
        "language_instruction": features.Text(),
    }
    step |= {name: features.Scalar(np.bool_) for name in ("is_first", "is_last", "is_terminal")}
    step |= {name: features.Scalar(np.float32) for name in ("reward", "discount")}
    if latents:
        step |= {"latent_idx": vector(4), "latent_z": vector(512)}
    metadata = {
        "file_path": features.Text(),
        "seed": features.Scalar(np.int64),
        "task": features.Scalar(np.int64),
        "suite": features.Text(),
        "widen": features.Scalar(np.float32),
        "state": vector(None, np.float64),
    }
    return features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": features.FeaturesDict(metadata)})


def write_rlds(folder, name="made", episodes=8, seed=0, latents=False):
    """Write an RLDS data set of two shards in the features of modified_libero_rlds; return its folder."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(seed)
    written = [episode(number, rng, latents) for number in range(episodes)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name,
        "1.0.0",
        rlds_features(latents),
        split_datasets={"train": written},
        data_dir=folder,
        download_config=tfds.download.DownloadConfig(num_shards=2),
    )
    return folder / name


def read_rlds(folder):
    """Return [(metadata, steps)] of all episodes as tensorflow-datasets reads them, in order; images stay bytes."""
    import tensorflow_datasets as tfds

    skip = {"steps": {"observation": {camera: tfds.decode.SkipDecoding() for camera in ("image", "wrist_image")}}}
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    episodes = tfds.builder_from_directory(folder / "1.0.0").as_dataset("train", decoders=skip, read_config=in_order)
    contents = []
    for e in episodes:
        metadata = {name: value.numpy() for name, value in e["episode_metadata"].items()}
        contents.append((metadata, list(e["steps"].as_numpy_iterator())))
    return contents


def write_video(folder):
    """Write an RLDS data set of three episodes, of 9, 1 and 14 frames, without actions, states or instructions.

    A description lies beside it, for no preset fits.
    """
    import tensorflow_datasets as tfds

    def step(t):
        return {"observation": {"image": io.BytesIO(picture((9, 90, 60), (4 * t, 3 * t), 80))}}

    views = {"observation": tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(96, 96, 3))})}
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(views)})
    written = [(f"{n}", {"steps": [step(t + n) for t in range(length)]}) for n, length in enumerate((9, 1, 14))]
    tfds.dataset_builders.store_as_tfds_dataset(
        "video", "1.0.0", features, split_datasets={"train": written}, data_dir=folder
    )
    spec = {"embodiment": "film", "cameras": {"image": "observation/image"}}
    (folder / "video" / "spec.json").write_text(json.dumps(spec))
    return folder / "video"


def odd_features():
    """Return {path: (feature, function (step, number of the episode) -> value)} of `write_odd`."""
    import tensorflow as tf
    from tensorflow_datasets import features

    def image(height, width, channels=3, dtype=np.uint8, encoding="png"):
        return features.Image(shape=(height, width, channels), dtype=dtype, encoding_format=encoding)

    def vector(*shape, dtype=np.float32):
        return features.Tensor(shape=shape, dtype=dtype)

    def pixels(*shape, dtype=np.uint8):
        return lambda t, n: odd_pixels(t, n, shape, dtype)

    return {
        "observation/png": (image(48, 48), pixels(48, 48, 3)),
        "observation/tensor": (vector(40, 40, 3, dtype=np.uint8), pixels(40, 40, 3)),
        "observation/wide": (image(24, 40), pixels(24, 40, 3)),
        "observation/any_size": (image(None, None), lambda t, n: odd_pixels(t, n, (40 + n, 40 + n, 3))),
        "observation/grey": (image(48, 48, 1), pixels(48, 48, 1)),
        "observation/depth": (image(48, 48, 1, np.uint16), pixels(48, 48, 1, dtype=np.uint16)),
        "observation/metres": (vector(80, 80), lambda t, n: np.full((80, 80), t, np.float32)),
        "observation/joints": (vector(6, dtype=np.float64), lambda t, n: np.arange(6.0) + t + 10 * n),
        "observation/column": (vector(3, 1), lambda t, n: np.full((3, 1), t, np.float32)),
        "observation/class": (features.ClassLabel(names=["a", "b", "c"]), lambda t, n: t % 3),
        "observation/nested": (features.Sequence({"x": features.Scalar(np.float32)}), lambda t, n: {"x": [1.0] * t}),
        "observation/ragged": (
            features.Tensor(shape=(None,), dtype=np.float32),
            lambda t, n: np.ones(n + 1, np.float32),
        ),
        "observation/bytes": (features.Tensor(shape=(), dtype=tf.string), lambda t, n: b"\xff\xfe" + bytes([t])),
        "action/move": (vector(3), lambda t, n: np.float32([t, -t, n])),
        "action/grip": (vector(1), lambda t, n: np.float32([0.08 * (t % 2)])),
        "said": (features.Text(), lambda t, n: f"step {t // 2} of {n}"),
        "latent/idx": (vector(1, 4, dtype=np.int64), lambda t, n: np.full((1, 4), 1 + t % 16)),
        "latent/z": (vector(4, 8), lambda t, n: np.full((4, 8), t, np.float32)),
    }


def odd_pixels(t, n, shape, dtype=np.uint8):
    """Return the image of step t of episode n of `write_odd`: a slope of its own."""
    return (np.arange(np.prod(shape)).reshape(shape) + 7 * t + 50 * n).astype(dtype)


def write_odd(folder):
    """Write an RLDS data set of three episodes, of 5, 6 and 7 steps, with features of every kind. No preset fits."""
    import tensorflow_datasets as tfds

    def tree(values):
        """Return {path: value} as nested dictionaries."""
        nested = {}
        for path, value in values.items():
            *parents, name = path.split("/")
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
        return nested

    def as_features(node):
        return tfds.features.FeaturesDict({k: as_features(v) if isinstance(v, dict) else v for k, v in node.items()})

    made = odd_features()
    step = as_features(tree({path: feature for path, (feature, _) in made.items()}))
    picture_of_all = tfds.features.Image(shape=(8, 8, 3))
    metadata = tfds.features.FeaturesDict({"language_instruction": tfds.features.Text(), "picture": picture_of_all})
    features = {"steps": tfds.features.Dataset(step), "episode_metadata": metadata, "episode_id": tfds.features.Text()}
    written = []
    for n, length in enumerate((5, 6, 7)):
        steps = [tree({path: make(t, n) for path, (_, make) in made.items()}) for t in range(length)]
        about = {"language_instruction": f"do {n}", "picture": odd_pixels(0, n, (8, 8, 3))}
        written.append((f"{n}", {"steps": steps, "episode_metadata": about, "episode_id": f"id {n}"}))
    tfds.dataset_builders.store_as_tfds_dataset(
        "odd", "1.0.0", tfds.features.FeaturesDict(features), split_datasets={"train": written}, data_dir=folder
    )
    return folder / "odd"


def write_all(folder):
    """Return the folders of 8 episodes without labels and of 4 with labels as in the paper's release, what
    tensorflow-datasets reads of the 8, and the folders of video alone and of `write_odd`."""
    made = write_rlds(folder)
    released = write_rlds(folder, "released", 4, 1, True)
    return made, released, read_rlds(made), write_video(folder), write_odd(folder)


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
def odd(written):
    """Folder of `write_odd`."""
    return written[4]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the tests keep indices."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def index(rlds, cache):
    """The index of `rlds`: its features as stored, without a description."""
    from data import open_index

    return open_index(rlds, cache)


@pytest.fixture(scope="session")
def dataset(rlds, cache):
    """`rlds` read through the description that fits it."""
    from data import open_dataset

    return open_dataset(rlds, cache)


@pytest.fixture(scope="session")
def stats(dataset):
    """The statistics of `rlds`."""
    return dataset.stats


@pytest.fixture(scope="session")
def cameras(dataset):
    """The sizes of its images, as an evaluation takes them from a run's config."""
    return {name: dataset.storage_options(name)["size"] for name in dataset.cameras}


# ----------------------------------------------------------------------------------------------------------------------
# Demonstrations that the command in docs/data.md made


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """The demonstrations' command, for two small episodes, killed (kill -9) after attempt 1; attempt 0 had failed.

    Its config, the command, and the arrays of attempt 1 as they were when it was killed.
    """
    import tyro

    import demos

    small = {"--task-ids": 8, "--episodes": 2, "--trials": 2, "--image-size": 32, "--procs": 1}
    small["--out"] = tmp_path_factory.mktemp("demos") / "tiny_rlds"
    flags = [str(part) for pair in small.items() for part in pair]
    command = [sys.executable, *printed("python demos.py")[1:], *flags]
    config = tyro.cli(demos.Config, args=command[2:])
    demos.resume(config)
    demos.save_attempt(demos.staging(config) / "8_0.npz", None)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not (demos.staging(config) / "8_1.npz").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert not config.out.exists()
    with np.load(demos.staging(config) / "8_1.npz") as arrays:
        return SimpleNamespace(config=config, command=command, arrays=dict(arrays))


@pytest.fixture(scope="session")
def demonstrations(interrupted):
    """The same command again: its data set's folder, and what it printed."""
    done = subprocess.run(interrupted.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return interrupted.config.out, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What training needs, and one trained run


@pytest.fixture(scope="session")
def labels(index, tmp_path_factory):
    """Random image-based latent labels of `rlds`, as `label.py` writes them."""
    import torch

    from files import save_tensors

    path = tmp_path_factory.mktemp("labels") / "labels.safetensors"
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 16, (len(index), 4), dtype=np.uint8))
    vectors = torch.from_numpy(rng.normal(size=(len(index), 4, 16)) + rng.normal(size=16)).half()  # alike: learnable
    save_tensors(path, {"codes": codes, "vectors": vectors}, data=index.fingerprint, lam="made", delta=32, num_codes=16)
    return path


@pytest.fixture(scope="session")
def tokenizer(rlds, cache, tmp_path_factory):
    """Folder of an action tokenizer that train_latent.py trained on `rlds` for two updates."""
    import torch

    import train_latent
    from common import Ranks

    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    config = train_latent.TokenizerTraining(
        data=[rlds], out=out, cache=cache, max_steps=2, global_batch_size=16, num_codes=16, code_dim=16
    )
    train_latent.train(config, Ranks(0, 1, torch.device("cpu")))
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


def run_script(*words, ranks=1):
    """Run one of the scripts as a user does, or as torchrun does on several `ranks`."""
    with tempfile.NamedTemporaryFile("r") as output:
        with running(words, output.name, ranks) as processes:
            for process in processes:
                process.join()
        return Script(max((process.exitcode for process in processes), key=abs), output.read())


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

    import tiny

    def make(dtype):
        folder, tokenizer = tmp_path_factory.mktemp("qwen"), tiny.tiny_tokenizer()
        torch.manual_seed(7)
        Qwen3VLForConditionalGeneration(tiny.tiny_config(tokenizer)).to(dtype).save_pretrained(folder)
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


# ----------------------------------------------------------------------------------------------------------------------
# Another simulator


@pytest.fixture
def line(tmp_path, monkeypatch):
    """The simulator of docs/fork.md, a point on a line, as eval.py knows it in this process and its simulators'."""
    import eval as evaluation

    (simulator,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/fork.md").read_text(), re.S)
    (tmp_path / "line_sim.py").write_text(simulator)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(evaluation.SIMULATORS, "line", "line_sim")
    yield importlib.import_module("line_sim")
    monkeypatch.delitem(sys.modules, "line_sim")
