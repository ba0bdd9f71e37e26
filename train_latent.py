"""Train latent actions: the image-based latent action model (two stages) or the action tokenizer, both of latent.py.

    python train_latent.py lam --stage 1 --data data/libero_tiny --out runs/lam1                           # 3 minutes
    python train_latent.py lam --stage 2 --init-from runs/lam1 --data data/libero_tiny --out runs/lam      # 3 minutes
    python label.py --data data/libero_tiny --lam runs/lam --out runs/labels.safetensors                   # 5 seconds
    python train_latent.py tokenizer --data data/libero_tiny --out runs/tokenizer                          # 1.5 minutes
    torchrun --nproc-per-node 8 train_latent.py lam --stage 1 --data DIR --out runs/lam1 --features DINOV2 --text T5 \\
        --image-size 224 --width 768 --num-blocks 12 --heads 12 --code-dim 128                       # the paper's size
    python train_latent.py lam --stage 2 --init-from FILE.ckpt --max-steps 0 --no-predict-change --no-centre \\
        --data DIR --out runs/univla --features DINOV2 --image-size 224 --width 768 --num-blocks 12 --heads 12 \\
        --code-dim 128                                                       # a checkpoint of UniVLA, to label with

Implements the training of the latent actions in arXiv 2605.04678 (image-based: after UniVLA, arXiv 2505.06111). Data
sets of several embodiments train one model together; an image-based model also learns from video without actions.
Leaves out gradient accumulation and early stopping.

Which stage when. Stage 1 gets the instruction, so its codes hold what the instruction leaves open: the camera, the
background, other people. Stage 2 keeps that codebook, gets no text, and puts what the task changes into codes of its
own; label with these. Stage 0, one model without text, takes half the time and is a fair start where nothing moves but
the robot. Train until the reconstruction loss in log.jsonl no longer falls (the embedded data: 1 000 updates; UniVLA's
stage 1: 100 000), then check with probe.py whether the codes are good enough; it lists good values.

Axes: B batch, H chunk steps, A action size (of several embodiments: the largest), P codes per step, N vectors of a
batch.
"""

import functools
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from batches import ShuffledSteps, Source, StepBatchSampler, action_chunk, chunk_steps, pad
from checkpoint import is_restarted, load_tensors_into, prepare_run, restore_training, save_training
from common import (
    Log,
    Meter,
    all_mean,
    all_sum,
    catch_signals,
    distribute,
    init_distributed,
    learning_rate,
    parameter_groups,
    print0,
    report_worker_failures,
    shutdown_distributed,
    to_device,
    worker_options,
)
from data import check_embodiments, choose_chunk, open_datasets
from dataspec import to_dict
from files import at_least, check_new_folder, git_commit, read_json, resolve_folder, shell_command, to_json, write_json
from index import CACHE, changed_cache, later_steps, split_episodes
from latent import (
    KMEANS_CHUNKS,
    ActionTokenizer,
    LamSizes,
    LatentActionModel,
    camera_name,
    check_frames,
    load_lam,
    model_tensors,
    pad_text,
    source_fingerprint,
    text_states,
)
from prepare import check_length, refuse_ignored, settings_to_resume
from quantiser import code_counts, code_usage, kmeans
from targets import action_sizes
from univla import UNIVLA_SETTINGS, univla_tensors

MASK_RATIO = 0.15  # share of the latents that the tokenizer's consistency loss masks
REFIT_AT = 0.7  # share of its training after which the tokenizer's codebook is put on k-means of its latents
WEIGHT_DECAY = 0.01
MAX_MEASURED = 1024  # held-out samples, at most, that a model is measured on after training
FRAME_CACHE = 2**30  # bytes of decoded frames that stay in memory, over all data workers of a process


# ----------------------------------------------------------------------------------------------------------------------
# Samples


class MaskedChunks(ShuffledSteps):
    """The training samples of an `ActionTokenizer`. Each item holds

    actions      f32 [H, A] normalised; 0 beyond the embodiment's own dimensions
    valid        bool [H], False past the end of the episode
    embodiment   i64 [], its number
    masked       bool [H], the steps that the consistency loss masks, keyed by (seed, position)
    """

    def __init__(self, datasets, chunk, seed=0, sources=None):
        """chunk: H; the rest as for `ShuffledSteps`. All data sets must have actions."""
        super().__init__(datasets, seed, sources)
        self.chunk = chunk
        self.action_sizes = action_sizes(datasets)
        self.names = list(self.action_sizes)  # of the embodiments

    def __getitem__(self, position):
        draws = np.random.default_rng([self.seed, 3, position]).random(self.chunk)
        return super().__getitem__(position) | {"masked": torch.from_numpy(draws < MASK_RATIO)}

    def sample(self, number, step):
        """Return the item at `step` of source `number`, without its mask."""
        dataset = self.datasets[self.sources[number].dataset]
        steps, valid = chunk_steps(dataset.starts, step, self.chunk)
        actions = pad(action_chunk(dataset, steps, valid), max(self.action_sizes.values()))
        return {
            "actions": torch.from_numpy(actions),
            "valid": torch.from_numpy(valid),
            "embodiment": torch.tensor(self.names.index(dataset.spec.embodiment)),
        }


class FramePairs(ShuffledSteps):
    """The training samples of a `LatentActionModel`; video without actions is enough. Each item holds

    frames            u8 [2, h, w, 3], o_t and o_{t+delta} (near the end: the episode's last), resized for the features
    text, text_mask   with `texts`: the instruction's states f32 [n, width], padded, and bool [n], False at padding

    and, with an `action_fraction` and at least one data set that has actions

    actions           f32 [H, A] normalised, of labelled samples; 0 beyond the embodiment's own dimensions
    valid             bool [H], False past the end of the episode, and for samples that are not labelled
    weight            f32 [], of the sample in the action loss: 1 / the expected share of labelled samples for these,
                      else 0, so that neither that share nor video changes the scale of the loss
    embodiment        i64 [], its number among those with actions; 0 for samples that are not labelled
    """

    def __init__(
        self,
        datasets,
        model,
        texts=None,
        chunk=0,
        action_fraction=0.0,
        cache_bytes=FRAME_CACHE,
        seed=0,
        sources=None,
    ):
        """Raise ValueError for a data set without the model's camera or with too short episodes.

        texts: {instruction: states}, for stage 1; chunk: H; action_fraction: share of the steps with actions that are
        labelled, 0 for items without actions; cache_bytes: of decoded frames that stay in memory; the rest as for
        `ShuffledSteps`.
        """
        super().__init__(datasets, seed, sources)
        for dataset in datasets:
            check_frames(model.sizes, dataset)
        self.model = model
        self.cameras = [camera_name(model.sizes, dataset) for dataset in datasets]
        self.texts = texts
        self.text_length = max(map(len, texts.values())) if texts else 0
        self.chunk = chunk
        self.action_fraction = action_fraction
        self.action_sizes = action_sizes(datasets) if action_fraction else {}
        self.names = list(self.action_sizes)  # of the embodiments
        with_actions = sum(count for source, count in zip(self.sources, self.counts) if self._uses_actions(source))
        self.labelled_share = action_fraction * with_actions / self.epoch_length  # of the samples
        frame_bytes = 3 * model.features.image_size**2
        self.frame = functools.lru_cache(cache_bytes // frame_bytes)(self.frame)

    def _uses_actions(self, source):
        """Return whether the actions of a source are used; else it is video."""
        return source.labelled and self.datasets[source.dataset].action_size > 0

    def frame(self, number, step):
        """Return the frame u8 [h, w, 3] at `step` of data set `number`, resized for the features."""
        return self.model.features.resize(self.datasets[number].image(self.cameras[number], step))

    def labelled(self, source, step):
        """Return whether the actions at a step of a `Source` count: the same in every epoch, by the seed."""
        rng = np.random.default_rng([self.seed, 4, source.dataset, step])
        return self._uses_actions(source) and rng.random() < self.action_fraction

    def sample(self, number, step):
        """Return the item at `step` of source `number`."""
        source = self.sources[number]
        dataset = self.datasets[source.dataset]
        later = int(later_steps(dataset, step, self.model.sizes.delta))
        frames = np.stack([self.frame(source.dataset, step), self.frame(source.dataset, later)])
        item = {"frames": torch.from_numpy(frames)}
        if self.texts:
            states = self.texts[dataset.instruction(step)]
            item["text"], item["text_mask"] = pad_text(states, self.text_length)
        if self.action_sizes:
            item |= self._actions(source, step)
        return item

    def _actions(self, source, step):
        """Return the entries actions, valid, weight and embodiment of an item."""
        size = max(self.action_sizes.values())
        actions = np.zeros((self.chunk, size), np.float32)
        valid = np.zeros(self.chunk, bool)
        weight = 0.0
        embodiment = 0
        if self.labelled(source, step):
            dataset = self.datasets[source.dataset]
            steps, valid = chunk_steps(dataset.starts, step, self.chunk)
            actions = pad(action_chunk(dataset, steps, valid), size)
            weight = 1 / self.labelled_share
            embodiment = self.names.index(dataset.spec.embodiment)
        return {
            "actions": torch.from_numpy(actions),
            "valid": torch.from_numpy(valid),
            "weight": torch.tensor(weight),
            "embodiment": torch.tensor(embodiment),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Starting from saved weights


def init_from_model(model, source):
    """Load `source` into `model`: a folder that `train_latent.py lam` made, or a checkpoint file of UniVLA.

    A model of the same stage is loaded whole, but for the action head. One of stage 1 gives stage 2 its encoder, its
    decoder and its features, and its codes become the irrelevant ones. Raise FileNotFoundError, or ValueError listing
    what does not fit.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"init_from {source} does not exist; it must be a folder of train_latent.py lam or a UniVLA file"
        )
    not_saved = ["action_head."]  # parts of the names of tensors that keep their initial values
    if source.is_dir():
        saved = load_lam(source)
        settings, tensors = asdict(saved.sizes), saved.state_dict()
    else:
        tensors = univla_tensors(source)
        settings = UNIVLA_SETTINGS | {"stage": 2 if any("irrelevant." in name for name in tensors) else 1}
        not_saved += ["centre", "sums", "counts", "unused", "updates"]
    check_architecture(model.sizes, settings, source)
    into_second_stage = (settings["stage"], model.sizes.stage) == (1, 2)
    if into_second_stage:
        tensors = {name.replace("codes.", "irrelevant."): t for name, t in tensors.items() if "text_up" not in name}
        not_saved.append("codes.")
    expected = {}
    for name, tensor in model.state_dict().items():
        if name in tensors or not any(part in name for part in not_saved):
            expected[name] = tensor
    load_tensors_into(model, expected, tensors, source)
    if not source.is_dir() and not into_second_stage:
        model.codes.quantiser.set_codebook(model.codes.quantiser.codebook)


def check_architecture(sizes, settings, source):
    """Raise ValueError listing where a model of `sizes` cannot start from one with `settings` ({name: value})."""
    wanted = asdict(sizes)
    compared = ["heads", "predict_change", "centre", "camera", "image_size", "patch_size", "delta"]
    if not (sizes.camera and settings.get("camera")):
        compared.remove("camera")  # the data's main one: check_init_data compares it
    if (settings["stage"], sizes.stage) != (1, 2):
        compared.append("stage")
    differences = [
        f"{name} is {wanted[name]}, but there {settings[name]}"
        for name in compared
        if settings.get(name, wanted[name]) != wanted[name]
    ]
    if differences:
        raise ValueError(f"init_from {source} is another architecture: {', '.join(differences)}")


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class Training:
    """Settings that both commands share."""

    data: list[Path]
    """data sets, one folder each: RLDS, LeRobot, or MP4 files"""
    spec: tuple[str, ...] = ()
    """description of each data set: a JSON file or a preset's name (default: spec.json next to it, or what fits)"""
    out: Path
    """new folder for the model: config.json, model.safetensors, dataset_statistics.json, log.jsonl"""
    resume: bool = False
    """continue the training in --out from its last save; without one, start it (again)"""
    cache: Path = CACHE
    """where indices are kept"""
    max_steps: int = 1000
    """updates"""
    global_batch_size: int = 64
    """samples per update, over all processes"""
    learning_rate: float = 1e-3
    """peak learning rate: 5 % warm-up, then a cosine down to 1 %"""
    val_fraction: float = 0.1
    """share of the episodes that is held out and measured at the end"""
    chunk: int = 0
    """actions per chunk (default: what the description of the data says, else 8)"""
    save_every: int = 1000
    """updates between saves"""
    keep: int = 2
    """saves that stay: should the newest be damaged, the one before it is taken"""
    timeout: int = 600
    """seconds to wait for a data worker or another process before the training ends with an error"""
    seed: int = 0
    """of initialisation, order, masks and split"""
    num_workers: int = 0
    """processes per rank that decode images; on a GPU give some (0: the training process itself)"""
    wandb_project: str = ""
    """log to this wandb project too"""


@dataclass(kw_only=True)
class LamTraining(LamSizes, Training):
    """Settings of `python train_latent.py lam`."""

    init_from: Path | None = None
    """start from the model in this folder, or from a checkpoint file of UniVLA; stage 2 needs a stage 1"""
    action_fraction: float = 0.05
    """share of the steps at which the action head of stages 0 and 2 learns the next `chunk` actions (0: no head)"""


@dataclass(kw_only=True)
class TokenizerTraining(Training):
    """Settings of `python train_latent.py tokenizer`."""

    num_codes: int = 256
    """codes in the codebook"""
    code_dim: int = 128
    """width of a code, and of the encoder"""
    patience: int = 50
    """updates after which an unused code restarts"""


# Settings that a resumed training may change: they say where files lie, or do not alter results.
FREE_TO_CHANGE = set("resume out data spec init_from cache num_workers save_every keep timeout wandb_project".split())


def check(config, world):
    """Raise ValueError for a setting that cannot work with `world` processes."""
    names = "global_batch_size delta num_codes code_dim codes_per_step num_blocks width image_size patch_size "
    names += "heads patience save_every keep timeout"
    least = {name: 1 for name in names.split()} | {"chunk": 0, "seed": 0, "num_workers": 0}
    least["max_steps"] = 0 if getattr(config, "init_from", None) else 1
    at_least(config, {name: value for name, value in least.items() if hasattr(config, name)})
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"val_fraction is {config.val_fraction}; it must be in [0, 1)")
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate is {config.learning_rate}; it must be positive")
    if config.spec and len(config.spec) != len(config.data):
        raise ValueError(f"spec has {len(config.spec)} entries for {len(config.data)} data sets")
    if config.global_batch_size % world:
        raise ValueError(f"global_batch_size is {config.global_batch_size}; {world} processes cannot share it equally")
    if isinstance(config, TokenizerTraining) and config.code_dim % 4:
        raise ValueError(f"code_dim is {config.code_dim}; it must be a multiple of the 4 heads")
    if isinstance(config, LamTraining):
        check_lam(config)


def check_lam(config):
    """Raise ValueError for a setting of `LamTraining` that cannot work."""
    if not 0 <= config.action_fraction <= 1:
        raise ValueError(f"action_fraction is {config.action_fraction}; it must be in [0, 1]")
    if config.num_codes > 256:
        raise ValueError(f"num_codes is {config.num_codes}; labels hold codes in one byte, so at most 256")
    if config.width % (2 * config.heads):
        raise ValueError(f"width is {config.width}; it must be a multiple of 2 x heads, {2 * config.heads}")
    stage = f"--stage {config.stage}"
    ignored = [("text", config.stage != 1, stage), ("action_fraction", config.stage == 1, stage)]
    ignored.append(("chunk", config.stage == 1 or not config.action_fraction, f"{stage} and without actions"))
    refuse_ignored(config, [*ignored, ("patch_size", config.features != "pixels", f"--features {config.features}")])
    if config.stage == 2 and not config.init_from:
        raise ValueError(
            "stage is 2 but init_from is not given; it needs a stage 1: "
            "python train_latent.py lam --stage 1 --data DIR --out DIR1, then --stage 2 --init-from DIR1"
        )


def check_init_data(config, datasets):
    """Raise ValueError when the model that `config` starts from saw episodes that are held out now, or other cameras.

    A camera that is not named is each data set's main one.
    """
    if not config.init_from.is_dir():
        return
    saved = read_json(config.init_from / "config.json")
    sizes = LamSizes(**saved["model"]["sizes"])
    for dataset in datasets:
        camera, saved_camera = camera_name(config, dataset), camera_name(sizes, dataset)
        if camera != saved_camera:
            raise ValueError(
                f"camera of {dataset.name} is {camera}, but {config.init_from} was trained on {saved_camera}"
            )
    split = config.val_fraction, config.seed
    saved_split = saved["training"]["val_fraction"], saved["training"]["seed"]
    shared = {dataset.fingerprint for dataset in datasets} & {entry["fingerprint"] for entry in saved["data"]}
    if shared and split != saved_split:
        raise ValueError(
            f"val_fraction and seed are {split}, but {config.init_from} was trained on the same data with "
            f"{saved_split}: it saw episodes that would count as held out. Use the same."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_lam(config, datasets, ranks):
    """Return a `LatentActionModel` and a function (list of `Source`) -> its `FramePairs`.

    Raise ValueError when the data or `config.init_from` does not fit.
    """
    sizes = LamSizes(**{field.name: getattr(config, field.name) for field in fields(LamSizes)})
    texts, text_size = None, 0
    if config.stage == 1:
        instructions = [text for dataset in datasets for text in dataset.instructions()]
        texts = text_states(config.text, instructions, ranks.device)
        text_size = next(iter(texts.values())).shape[1]
    action_fraction = config.action_fraction if config.stage != 1 else 0.0
    head_sizes = list(action_sizes(datasets).values()) if action_fraction else []
    model = LatentActionModel(sizes, text_size, config.chunk, head_sizes, config.seed)
    if config.init_from:
        init_from_model(model, config.init_from)
        check_init_data(config, datasets)

    def make_samples(sources):
        return FramePairs(
            datasets,
            model,
            texts=texts,
            chunk=config.chunk,
            action_fraction=action_fraction,
            cache_bytes=FRAME_CACHE // max(1, config.num_workers),
            seed=config.seed,
            sources=sources,
        )

    return model, make_samples


def build_tokenizer(config, datasets, ranks):
    """Return an `ActionTokenizer` and a function (list of `Source`) -> its `MaskedChunks`.

    Raise ValueError for data without actions.
    """
    for dataset in datasets:
        if not dataset.action_size:
            raise ValueError(
                f"{dataset.name}, as described by {dataset.source}, has no actions; the action tokenizer needs them: "
                "leave it out of --data, or name them in its description"
            )
    sizes = action_sizes(datasets)
    model = ActionTokenizer(
        config.chunk,
        max(sizes.values()),
        config.num_codes,
        config.code_dim,
        patience=config.patience,
        seed=config.seed,
        embodiments=sizes if len(sizes) > 1 else None,
    )

    def make_samples(sources):
        return MaskedChunks(datasets, config.chunk, config.seed, sources)

    return model, make_samples


def make_sources(episodes):
    """Return a `Source` for each data set that has some episodes. episodes: of each data set their numbers i64 [n]"""
    return [Source(number, chosen) for number, chosen in enumerate(episodes) if len(chosen)]


@report_worker_failures
def train(config, ranks):
    """Train the model that `config` describes, save it in config.out and measure it on held-out episodes.

    Raise ValueError, FileNotFoundError or FileExistsError before anything is written when a setting cannot work.
    """
    check(config, ranks.world)
    if isinstance(config, LamTraining):
        text = resolve_folder(config.text, ["words"])
        config = replace(config, features=resolve_folder(config.features, ["pixels"]), text=text)
    if ranks.main and not (config.resume or is_restarted()):
        check_new_folder(config.out)
    datasets = open_datasets(config.data, config.cache, config.spec)
    check_embodiments(datasets)
    config = replace(config, chunk=choose_chunk(config.chunk, datasets))
    stats = {dataset.name: dataset.stats for dataset in datasets}
    torch.manual_seed(config.seed)
    kind, build = ("lam", build_lam) if isinstance(config, LamTraining) else ("tokenizer", build_tokenizer)
    model, make_samples = build(config, datasets, ranks)
    split = [split_episodes(dataset, config.val_fraction, config.seed) for dataset in datasets]
    samples = {"training": make_samples(make_sources([fitted for fitted, _ in split]))}
    held_out = make_sources([held for _, held in split])
    if held_out:
        samples["held-out"] = make_samples(held_out)
    description = describe_run(config, kind, model, datasets)
    if before := settings_to_resume(config.out, config.resume, "training"):
        check_length(config.out, before["max_steps"], config.max_steps, "cosine")
    resuming = prepare_run(config.out, config.resume, ranks.main, description, "training", FREE_TO_CHANGE)
    if ranks.main:
        write_json(config.out / "dataset_statistics.json", stats)
    if not run_training(model.to(ranks.device), samples["training"], config, ranks, resuming):
        print0(f"Ctrl-C or SIGTERM: saved. Go on: the same command with --resume continues {config.out}")
        return
    report(config, kind, model, samples, ranks)


def describe_run(config, kind, model, datasets):
    """Return what config.json holds: the model, its settings, what the data is, and the fingerprint of `init_from`."""
    source = getattr(config, "init_from", None)
    return {
        "kind": kind,
        "model": model.config,
        "training": to_json(config),
        "commit": git_commit(),
        "data": [
            {"name": dataset.name, "fingerprint": dataset.fingerprint, "spec": to_dict(dataset.spec)}
            for dataset in datasets
        ],
        "targets": [{"fingerprint": source_fingerprint(source)}] if source else [],
    }


def report(config, kind, model, samples, ranks):
    """Print how good the trained model is on the last of `samples`, {name: samples}, and the next command."""
    name = list(samples)[-1]
    measures = measure(model, samples[name], ranks.device, config.global_batch_size // ranks.world)
    shown = (f"{measure_name} {np.round(value, 4).tolist()}" for measure_name, value in measures.items())
    print0(f"On {name} episodes: " + ", ".join(shown))
    if kind == "tokenizer":
        compared = {"training episodes": samples["training"], f"{name} episodes": samples[name]}
        print0(format_kmeans_comparison(model, compared))
    print0(f"{config.out} is ready. Next: {next_command(config, kind, ranks.world)}")


def next_command(config, kind, world):
    """Return the command that uses the trained model; a second stage is trained as the first one was, on `world`
    processes."""
    places = {"data": config.data, "spec": config.spec}
    options = {"cache": changed_cache(config)}
    if kind == "tokenizer":
        options = {"tokenizer": config.out, "chunk": config.chunk or None} | options
        return shell_command("python", "train.py", variant="la_tok", **places, **options)
    if config.stage != 1:
        first = {name: values[:1] for name, values in places.items()}
        return shell_command("python", "label.py", **first, lam=config.out, **options)
    of_the_first = {"stage", "text", "init_from", "out", "resume"}
    settings = ((each, getattr(config, each.name)) for each in fields(config) if each.name not in of_the_first)
    changed = {each.name: value for each, value in settings if value != each.default}
    starter = ["torchrun", "--standalone", "--nproc-per-node", world] if world > 1 else ["python"]
    return shell_command(*starter, "train_latent.py", "lam", stage=2, init_from=config.out, out="DIR", **changed)


def run_training(model, samples, config, ranks, resuming=False):
    """Train `model` for config.max_steps updates, log each, save every config.save_every and at the end.

    Return True at the end, False when a signal ended the training early, after a save. Raise FloatingPointError when
    loss or gradient is no longer finite.
    """
    net = distribute(model, ranks)
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), WEIGHT_DECAY))
    first = restore_training(config.out, model, optimizer) if resuming else 0
    save = functools.partial(save_training, config.out, model, optimizer)
    log = Log(config.out, ranks.main, first, config.wandb_project, to_json(config))
    meter = Meter()
    signals = catch_signals()
    interrupted = False
    batches = DataLoader(
        samples,
        batch_sampler=batch_sampler(config, ranks, first),
        pin_memory=ranks.device.type == "cuda",
        **worker_options(config.num_workers, config.timeout),
    )
    bar = tqdm(enumerate(batches, first), initial=first, total=config.max_steps, disable=not ranks.main)
    for step, batch in bar:
        lr = learning_rate(step, config.max_steps, config.learning_rate, "cosine", warmup_ratio=0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if isinstance(model, ActionTokenizer) and step == int(REFIT_AT * config.max_steps):
            model.refit(samples)

        result = net(to_device(batch, ranks.device))
        optimizer.zero_grad()
        result["loss"].backward()
        result["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        result["stop"] = torch.tensor(float(signals.is_set()), device=ranks.device)
        entry = summarise([result], model.num_codes)
        interrupted = entry.pop("stop") > 0  # on any process
        entry |= {"lr": lr, "samples_per_s": meter.tick(config.global_batch_size)}
        log.write(step=step, **entry)
        check_finite(entry, step, samples, config.global_batch_size)
        bar.set_postfix_str(format_progress(entry, model.num_codes), refresh=False)

        due = (step + 1) % config.save_every == 0 and step + 1 < config.max_steps
        if ranks.main and (interrupted or due):
            save(step + 1, model_tensors(model), log, config.keep, interrupted)
        if interrupted:
            break
    if ranks.main and not interrupted:
        save(config.max_steps, model_tensors(model), log, config.keep, True)
    log.close()
    return not interrupted


def batch_sampler(config, ranks, first):
    """Return the sampler of this process's share of every global batch from update `first` on."""
    batch_size = config.global_batch_size
    return StepBatchSampler(first, config.max_steps, batch_size, batch_size // ranks.world, ranks.rank, ranks.world)


def check_finite(entry, step, samples, batch_size):
    """Raise FloatingPointError naming the samples of update `step` when its loss or gradient norm is not finite."""
    if not np.isfinite(entry["loss"] + entry["grad_norm"]):
        batch = samples.describe_samples(range(step * batch_size, (step + 1) * batch_size))
        raise FloatingPointError(f"step {step}: loss {entry['loss']}, gradient {entry['grad_norm']}. Look at {batch}")


def format_progress(entry, num_codes):
    """Return the text of the progress bar for an entry of the log."""
    codes = f"codes {min(entry['usage'])}/{num_codes}"
    return f"loss {entry['loss']:.4f}, {codes}, {entry['samples_per_s']:.0f} samples/s"


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def measure(model, samples, device, batch_size):
    """Return `summarise` of the model in evaluation mode over every sample once, at most MAX_MEASURED."""
    model.eval()
    loader = DataLoader(samples, batch_size, sampler=range(min(samples.epoch_length, MAX_MEASURED)))
    return summarise([model(to_device(batch, device)) for batch in loader], model.num_codes)


def summarise(results, num_codes):
    """Return {name: mean} of the scalars in `forward`'s results over all processes, and usage and perplexity.

    results: one per batch, each with `codes` i64 [N, P]; usage and perplexity are lists, one entry per code position.
    """
    names = [name for name in results[0] if name != "codes"]
    values = torch.stack([torch.stack([result[name].detach() for name in names]) for result in results])
    sizes = values.new_tensor([len(result["codes"]) for result in results])
    means = sizes @ values / sizes.sum()
    counts = code_counts(torch.cat([result["codes"] for result in results]), num_codes)
    used, perplexity = code_usage(all_sum(counts))
    entry = dict(zip(names, all_mean(means).tolist(), strict=True))
    return entry | {"usage": used.tolist(), "perplexity": perplexity.tolist()}


@torch.no_grad()
def format_kmeans_comparison(tokenizer, parts):
    """Return text: codes in use and squared error of the tokenizer, and the error of as many k-means of the actions.

    parts: {name: `MaskedChunks`}, a line each, of several embodiments one for each; the means are those of the first
    part. Their error is the floor for one code per step that encodes that step alone.
    """
    means, lines = {}, []
    for name, samples in parts.items():
        loader = DataLoader(samples, 64, sampler=range(min(samples.epoch_length, KMEANS_CHUNKS)))
        batches = list(to_device(batch, tokenizer.project.weight.device) for batch in loader)
        whole = {key: torch.cat([batch[key] for batch in batches]) for key in ("actions", "valid", "embodiment")}
        for number, (embodiment, size) in enumerate(samples.action_sizes.items()):
            rows = whole["embodiment"] == number
            actions, valid = whole["actions"][rows], whole["valid"][rows]
            if not len(actions):
                continue
            codes, _ = tokenizer.encode(actions, valid, whole["embodiment"][rows])
            decoded = tokenizer.decode(codes, whole["embodiment"][rows])[..., :size]
            actions = actions[..., :size]
            error = (decoded - actions)[valid].square().mean().item()
            if number not in means:
                means[number] = kmeans(actions[valid], tokenizer.num_codes)
            floor = torch.cdist(actions[valid], means[number]).amin(1).square().mean().item() / size
            title = f"{name} of {embodiment}" if len(samples.action_sizes) > 1 else name
            compared = f"{error / floor:.2f} times k-means' {floor:.5f}" if floor > 1e-8 else "k-means has none"
            used = f"{len(codes[valid].unique())} of {tokenizer.num_codes} codes in use"
            lines.append(f"On {title}: {used}, squared error {error:.5f}, {compared}")
    return "\n".join(lines)


def main():
    """Run one of the two commands."""
    commands = {"lam": LamTraining, "tokenizer": TokenizerTraining}
    config = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    ranks = init_distributed(config.timeout, config.global_batch_size)
    train(config, ranks)
    shutdown_distributed()


if __name__ == "__main__":
    main()
