"""A trained run as a policy: `Policy("runs/NAME")(images, instructions, proprio)` gives actions in the data's units.

Axes: B batch, C cameras, H chunk steps, A action size, N proprio size.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from backbone import prompt_ids
from batches import resize_image
from checkpoint import load_trainable
from common import check_bf16_support
from dataspec import PRESETS, fit_image, format_spec, parse_spec
from files import load_tensors, read_json
from lora import base_hash, merge_lora
from model import VLA, ModelConfig, check_model_config
from normalise import Normaliser, statistics_hash, to_robosuite, unstandardise


def load_vla(run, text_length=0):
    """Return (VLA in evaluation mode, config.json of the run).

    text_length: tokens reserved for instructions, if another number than in training. Raise FileNotFoundError or
    ValueError when `run` is not a finished run, is damaged, or was trained on another base model.
    """
    run = Path(run)
    for name in ("config.json", "model.safetensors"):
        if not (run / name).exists():
            raise FileNotFoundError(f"{run} has no {name}: it is not a run that train.py saved")
    run_config = read_json(run / "config.json")
    weights = run / "model.safetensors"
    try:
        tensors, _ = load_tensors(weights)
        settings = dict(run_config["model"])
        if text_length:
            settings["text_length"] = text_length
        config = ModelConfig(**settings)
        _check_sizes(config, sum(tensor.numel() for tensor in tensors.values()))
        vla = VLA(config)
        load_trainable(vla, tensors, weights)
        trained_on, _ = run_config["base_hash"], run_config["data"]  # the latter for `Policy`
    except (TypeError, KeyError, OSError) as error:
        raise ValueError(f"{run} cannot be loaded: {error!r}. Put its own files, and its backbone, back.") from error
    if base_hash(vla) != trained_on:
        raise ValueError(
            f"{run} was trained on another {config.backbone}: "
            f"base weights hash to {base_hash(vla)}, the run's to {trained_on}"
        )
    return vla.eval(), run_config


def _check_sizes(config, num_weights):
    """Raise ValueError for a `ModelConfig` with a value of another type, or that needs more than `num_weights` weights.

    This comes before anything of such a size is built. Prompts have a longest length of their own.
    """
    for field in fields(config):
        types = {float: (float, int), tuple: (tuple, list)}.get(field.type, field.type)
        value = getattr(config, field.name)
        if not isinstance(value, types) or (field.type is int and value < 0):
            raise ValueError(f"{field.name} is {value!r:.80} in config.json. Put the run's own file back.")
    limits = config.action_size, config.proprio_size, config.cameras
    for entry in config.embodiments:
        sizes = list(entry[1:]) if isinstance(entry, (tuple, list)) else []
        if len(sizes) != 3 or not all(type(n) is int and 0 <= n <= most for n, most in zip(sizes, limits)):
            raise ValueError(f"embodiments hold {entry!r:.80} in config.json. Put the run's own file back.")
    check_model_config(config)
    width = config.head_width or 1
    least = width * max(config.chunk, config.action_size, config.proprio_size, 14 * width)  # of a block of the head
    least = max(least, 64 * max(config.num_codes, config.code_dim, config.lora_rank))  # no backbone is narrower
    if least > num_weights:
        raise ValueError(f"config.json asks for more than the {num_weights} weights of the run: {config}")


class Policy:
    """A run's model with the statistics and the description of one of its data sets.

    policy(images, instructions, proprio) -> actions in the convention of that data.

    On a GPU the backbone's weights are bf16 and the forward is a CUDA graph for each batch size, at most eight of them.
    """

    def __init__(self, run, data="", device=""):
        """Load a run folder.

        data: whose statistics to use, by data set name; needed only when the run was trained on several. device: the
        GPU when there is one, unless stated. Raise as `load_vla`, or ValueError when statistics and run do not fit.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.run = run
        self._load()
        statistics = read_json(Path(run) / "dataset_statistics.json")
        name = data or (next(iter(statistics)) if len(statistics) == 1 else "")
        if name not in statistics:
            raise ValueError(f"{run} has statistics of {list(statistics)}, not of '{name}'; choose one of them")
        self.name = name
        self.stats = statistics[name]
        try:
            self.data_entry = {entry["name"]: entry for entry in self.run_config["data"]}[name]
            trained_with = self.data_entry["statistics"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{run}/config.json says nothing of '{name}': put the run's own file back") from error
        self.spec = PRESETS["libero"]  # of runs from before data sets had descriptions
        if "spec" in self.data_entry:
            self.spec = parse_spec(self.data_entry["spec"], f"{run}/config.json")
        if statistics_hash(self.stats) != trained_with:
            raise ValueError(
                f"{run}/dataset_statistics.json holds other statistics of '{name}' than the run was trained with "
                f"(hash {statistics_hash(self.stats)}, not {trained_with}): put the run's own file back"
            )
        if "action" not in self.stats:
            raise ValueError(f"{run}: '{name}' has no actions, so its policy has no units to answer in")
        self.action = Normaliser(self.stats["action"])
        has_state = self.vla.config.proprio_size and "proprio" in self.stats
        self.state = Normaliser(self.stats["proprio"]) if has_state else None
        self.embodiment = 0
        if embodiments := self.vla.config.embodiments:
            self.embodiment = [known for known, *_ in embodiments].index(self.data_entry["embodiment"])

    def _load(self, text_length=0):
        """Read the run, with LoRA merged into its matrices."""
        vla, self.run_config = load_vla(self.run, text_length)
        self.vla = vla.to(self.device)
        merge_lora(self.vla)
        if self.vla.queries.is_cuda:
            check_bf16_support(torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device))
            for parameter in self.vla.backbone.qwen.parameters():
                parameter.data = parameter.data.bfloat16()
            # A CUDA graph belongs to the thread that first ran it, and its next run overwrites its outputs: call the
            # policy from one thread; __call__ copies the actions to the CPU. Dynamo compiles eight sizes, then raises.
            options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead")
            self.vla.forward_pass = torch.compile(self.vla.forward_pass, **options)

    def fit_instructions(self, instructions):
        """Reserve more tokens for the text, if these instructions are longer than those of training.

        Padding is masked, so actions for shorter instructions stay the same to rounding.
        """
        backbone = self.vla.backbone
        longest = max(len(prompt_ids(backbone.tokenizer, text, backbone.chunk)) for text in instructions)
        if longest > backbone.text_length:
            self._load((longest + 7) // 8 * 8)

    @torch.inference_mode()
    def __call__(self, images, instructions, proprio, gripper="data"):
        """Return actions f32 [B, H, A] in physical units.

        images: list of C arrays u8 [B, h, w, 3] in the run's camera order; instructions: [B] strings; proprio: f32
        [B, N] in physical units, ignored by a model without; gripper: "data" for the convention of the data,
        "robosuite" for -1 open and 1 closed.
        """
        actions, _ = self.vla.predict(self._batch(images, instructions, proprio))
        actions = self.action.unnormalise(actions[..., : len(self.action.low)].cpu().numpy())
        if gripper == "robosuite":
            return to_robosuite(actions, self.spec.grippers)
        return unstandardise(actions, self.spec.grippers)

    def _batch(self, images, instructions, proprio):
        """Return what `VLA.predict` takes; cameras and numbers that the embodiment lacks are 0."""
        count = len(instructions)
        config = self.vla.config
        names = list(self.data_entry["cameras"])
        if len(images) != len(names):
            raise ValueError(f"there are images of {len(images)} cameras; the policy has {', '.join(names)}")
        sides = self.data_entry.get("image_sides", [0] * len(names))
        images = [self._fit_images(*entry, count) for entry in zip(names, images, sides)]
        images = [torch.as_tensor(camera, device=self.device) for camera in images]
        absent = torch.zeros(count, 32, 32, 3, dtype=torch.uint8, device=self.device)
        state = np.zeros((count, config.proprio_size), np.float32)
        if self.state:
            proprio = np.asarray(proprio)
            if proprio.shape != (count, len(self.state.low)):
                raise ValueError(f"proprio has the shape {proprio.shape}; it must be {(count, len(self.state.low))}")
            normalised = self.state.normalise(proprio)
            state[:, : normalised.shape[1]] = normalised
        return {
            "images": images + [absent] * (config.cameras - len(images)),
            "text": instructions,
            "proprio": torch.from_numpy(state).to(self.device),
            "embodiment": torch.full((count,), self.embodiment, device=self.device),
            "num_cameras": torch.full((count,), len(images), device=self.device),
        }

    def _fit_images(self, name, images, side, count):
        """Return a camera's images u8 [B, h, w, 3] as in training: grey ones repeated, square, resized to `side`."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != count or images.shape[3] not in (1, 3):
            raise ValueError(
                f"images of {name} are {images.dtype} {images.shape}; they must be uint8 [{count}, height, width, 3]"
            )
        height, width = images.shape[1:3]
        if height != width and not self.spec.image_fit:
            raise ValueError(
                f"images of {name} have {height} x {width} pixels, but the policy was trained on square ones; pad or "
                f"crop them first. Its description:\n{format_spec(self.spec)}"
            )
        images = images.repeat(3 // images.shape[3], 3)
        return np.stack([resize_image(fit_image(image, self.spec.image_fit), side) for image in images])
