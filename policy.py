"""A trained run as a policy, for robots, simulators and servers.

    policy = Policy("runs/NAME")
    actions = policy({"images": {"image": frame, "wrist_image": wrist}, "state": state, "instruction": text})

A camera's frame is u8 [h, w, 3] of any size, upright, RGB, or floats in [0, 1]; the state is in the units of the data.
Everything that must be done to them as in training is done here; evaluation goes the same way.

Axes: B batch, C cameras, H chunk steps, A action size, N proprio size.
"""

import re
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from backbone import prompt_ids
from checkpoint import load_trainable
from dataspec import PRESETS, fit_image, format_spec, parse_spec
from execution import Execution
from files import load_tensors, read_json
from images import read_image, resize_image, store_image
from lora import base_hash, merge_lora
from model import VLA, ModelConfig, check_model_config
from normalise import Normaliser, statistics_hash, to_robosuite, unstandardise
from pretrained import check_bf16_support, load_qwen
from tiny import SIZES

MOST = 128  # observations of one forward pass; more take several
GRIPPERS = ("data", "robosuite")
RANGE_SLACK = 0.1  # of the range of a state in training, by which it may leave it without a warning


def find_run(run):
    """Return the folder of a run: `run` itself, or a copy of the Hub repository "owner/name".

    Raise FileNotFoundError when there is neither, or no way to reach the Hub.
    """
    if Path(run).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(run)):
        return Path(run)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(run), allow_patterns=["*.json", "model.safetensors"]))
    except Exception as error:  # no network, no such repository, no access
        raise FileNotFoundError(f"there is no folder {run}, and the Hub has no such run for you: {error}") from error


def load_vla(run, backbone="", device="cpu"):
    """Return (VLA in evaluation mode, on the CPU, config.json of the run).

    backbone: where the backbone lies now, if not where it was; device: as of `pretrained.load_qwen`. Raise
    FileNotFoundError or ValueError when `run` is not a finished run, is damaged, or was trained on another base model.
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
        if backbone and settings["backbone"] in SIZES:
            raise ValueError(f"backbone is {backbone}, but {run} has '{settings['backbone']}', which lies nowhere")
        if backbone:
            settings["backbone"] = backbone
        config = ModelConfig(**settings)
        _check_sizes(config, sum(tensor.numel() for tensor in tensors.values()))
        vla = VLA(config, load_qwen(config, device))
        load_trainable(vla, tensors, weights)
        trained_on, _ = run_config["base_hash"], run_config["data"]  # the latter for `Policy`
    except (TypeError, KeyError, OSError) as error:
        advice = "Put its own files, and its backbone, back"
        if isinstance(error, OSError):
            advice += ", or say where that lies now: --backbone DIR, or Policy(run, backbone=DIR)"
        raise ValueError(f"{run} cannot be loaded: {error!r}. {advice}.") from error
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
    least = width * max(config.chunk, config.action_size, config.proprio_size, 14 * width)  # a block has 14 W^2
    least = max(least, 64 * max(config.num_codes, config.code_dim, config.lora_rank))  # no backbone is narrower
    if least > num_weights:
        raise ValueError(f"config.json asks for more than the {num_weights} weights of the run: {config}")


class Policy:
    """A run's model with the statistics and the description of one of its data sets.

    On a GPU the backbone's weights are bf16 and the forward is a CUDA graph for each batch size. Batches are padded: to
    powers of two up to `MOST`, or all to `batch`, so that actions do not depend on what else is asked.
    """

    def __init__(self, run, data="", device="", batch=0, backbone=""):
        """Load a run folder, or the run that the Hub repository "owner/name" holds.

        data: whose statistics to use, by data set name; needed only when the run was trained on several. device: the
        GPU when there is one, unless stated. batch: pad all batches to this. backbone: where the pretrained backbone
        lies now, if it was moved. Raise as `find_run` and `load_vla`, or ValueError when statistics and run do not fit.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = batch
        self.run = find_run(run)
        self._load(backbone)
        statistics = read_json(self.run / "dataset_statistics.json")
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
        self.warned = set()  # dimensions of the state
        self.embodiment = 0
        if embodiments := self.vla.config.embodiments:
            self.embodiment = [known for known, *_ in embodiments].index(self.data_entry["embodiment"])

    def _load(self, backbone):
        """Read the run, with LoRA merged into its matrices."""
        vla, self.run_config = load_vla(self.run, backbone, self.device)
        self.vla = vla.to(self.device)
        merge_lora(self.vla)
        if self.vla.queries.is_cuda:
            torch.set_float32_matmul_precision("high")  # as in training
            check_bf16_support(torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device))
            for parameter in self.vla.backbone.qwen.parameters():
                parameter.data = parameter.data.bfloat16()
            # A CUDA graph belongs to the thread that first ran it, and its next run overwrites its outputs: call the
            # policy from one thread; `predict` copies the actions to the CPU. Dynamo compiles eight sizes, then raises.
            options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead")
            self.vla.forward_pass = torch.compile(self.vla.forward_pass, **options)

    @property
    def cameras(self):
        """The names of the cameras, in the model's order."""
        return list(self.data_entry["cameras"])

    @property
    def chunk(self):
        """The number of actions H that are predicted at once."""
        return self.vla.config.chunk

    @property
    def text_length(self):
        """The number of tokens that are reserved for an instruction with its request."""
        return self.vla.backbone.text_length

    def tokens_needed(self, instructions):
        """Return how many tokens the longest of these takes with its request; 0 where all are known."""
        backbone = self.vla.backbone
        new = [text for text in instructions if not backbone.knows(text)]
        return max((len(prompt_ids(backbone.tokenizer, text, self.chunk)) for text in new), default=0)

    def reserve_text(self, tokens):
        """Reserve at least this many tokens for an instruction with its request.

        Padding is masked, so actions for shorter instructions stay the same to rounding.
        """
        if tokens > self.text_length:
            self.vla.backbone.reserve_text((tokens + 7) // 8 * 8)
            if self.vla.queries.is_cuda:
                torch.compiler.reset()  # the graphs of the shorter length count towards Dynamo's limit of eight

    # -- observations ------------------------------------------------------------------------------------------------

    def __call__(self, observation, gripper="data"):
        """Return actions f32 [H, A] in physical units for one observation, [B, H, A] for a list of them.

        observation: {"images": {camera: u8 [h, w, 3], or floats in [0, 1]}, "state": [N] in physical units (not for a
        model without), "instruction": text}. gripper: "data" for the convention of the data, "robosuite" for -1 open
        and 1 closed. Actions never leave what training saw. Warn of a state that training did not see. Raise ValueError
        for what cannot be meant, with what was expected.
        """
        several = isinstance(observation, (list, tuple))
        prepared = [self.prepare(each) for each in (observation if several else [observation])]
        actions = self.act(prepared, gripper)
        return actions if several else actions[0]

    def prepare(self, observation):
        """Return (stored images, state, instruction) of one observation for `act`. Raise as the call itself."""
        self._check_names(observation)
        images = [self.stored(name, observation["images"][name]) for name in self.cameras]
        return images, self._read_state(observation), observation["instruction"]

    def act(self, prepared, gripper="data"):
        """Return actions f32 [B, H, A] for a list of what `prepare` returned."""
        if gripper not in GRIPPERS:
            raise ValueError(f"gripper is {gripper!r}; choose {' or '.join(GRIPPERS)}")
        if not prepared:
            raise ValueError("there is no observation in the list")
        images, states, instructions = zip(*prepared)
        actions = self.predict([np.stack(camera) for camera in zip(*images)], list(instructions), np.stack(states))
        convert = to_robosuite if gripper == "robosuite" else unstandardise
        return convert(actions, self.spec.grippers)

    def _check_names(self, observation):
        """Raise ValueError unless an observation has everything under its name."""
        expected = {"images": dict, "instruction": str} | ({"state": object} if self.state else {})
        if not isinstance(observation, dict):
            raise ValueError(
                f"an observation is a {type(observation).__name__}; it must be a dict of {self._example()}"
            )
        if missing := [name for name in expected if name not in observation]:
            raise ValueError(
                f"the observation has no {', '.join(missing)}, but {', '.join(map(str, observation)) or 'nothing'}; it "
                f"must be {self._example()}"
            )
        for name, kind in expected.items():
            if not isinstance(observation[name], kind):
                raise ValueError(
                    f"{name} is a {type(observation[name]).__name__}, not a {kind.__name__}; an observation is "
                    f"{self._example()}"
                )
        if any("\ud800" <= letter <= "\udfff" for letter in observation["instruction"]):
            raise ValueError(f"the instruction {observation['instruction']!r} is no text: it has half a character")
        if missing := [name for name in self.cameras if name not in observation["images"]]:
            raise ValueError(
                f"there is no image of {', '.join(missing)}; there are images of "
                f"{', '.join(map(str, observation['images'])) or 'no camera'}, and the policy needs "
                f"{', '.join(self.cameras)}"
            )

    def _example(self):
        """Return how an observation looks, as text."""
        images = ", ".join(f'"{name}": u8 [h, w, 3]' for name in self.cameras)
        state = f', "state": [{len(self.state.low)} numbers]' if self.state else ""
        return f'{{"images": {{{images}}}{state}, "instruction": text}}'

    def stored(self, name, image):
        """Return a camera's frame as a training image is read: u8, resized (Lanczos) and compressed as those were.

        A frame of another shape than theirs is made square first, as the description of the data says. Raise ValueError
        where it says nothing, or where the frame is none.
        """
        image = read_image(name, image)
        options = dict(self.data_entry["cameras"][name])
        height, width = np.broadcast_to(options.pop("size"), 2).tolist()
        if abs(image.shape[0] * width - image.shape[1] * height) > max(*image.shape[:2], height, width):
            if not self.spec.image_fit:
                raise ValueError(
                    f"the image of {name} has {image.shape[0]} x {image.shape[1]} pixels, but those of training had "
                    f"{height} x {width}: pad or crop it to that shape first. Their description:\n"
                    f"{format_spec(self.spec)}"
                )
            image = fit_image(image, self.spec.image_fit)
        return store_image(image, (height, width), **options)

    def _read_state(self, observation):
        """Return the state f32 [N]; [0] of a model without. Raise ValueError for a wrong size and for NaN."""
        if not self.state:
            return np.zeros(0, np.float32)
        state = np.asarray(observation["state"])
        size = len(self.state.low)
        if state.shape != (size,) or state.dtype.kind not in "fiu":
            raise ValueError(f"the state is {state.dtype} {state.shape}; it must be {size} numbers, ({size},)")
        with np.errstate(over="ignore"):
            state = state.astype(np.float32)  # as in data sets, so that what is given in f64 gives the same actions
        if not np.isfinite(state).all():
            wrong = ", ".join(f"state[{number}]" for number in np.flatnonzero(~np.isfinite(state)))
            raise ValueError(f"{wrong} is not finite: the state is {state.tolist()}")
        self._warn_of_range(state)
        return state

    def _warn_of_range(self, state):
        """Warn, once for each dimension, of a state [N] that is far from all of training."""
        low, high = (np.array(self.stats["proprio"][name]) for name in ("min", "max"))
        slack = np.maximum(RANGE_SLACK * (high - low), 1e-3)
        for number in np.flatnonzero((state < low - slack) | (state > high + slack)):
            if number in self.warned:
                continue
            self.warned.add(number)
            advice = ""
            for first in range(max(0, number - 2), min(number, len(state) - 3) + 1):
                part = slice(first, first + 3)
                other = other_way_round(state[part])
                if (np.abs(other - (low + high)[part] / 2) <= (high - low)[part] / 2 + slack[part]).all():
                    advice = (
                        f". If state[{first}:{first + 3}] is a rotation vector, the same rotation turned the other way "
                        f"round, {other.astype(float).round(3).tolist()}, is inside: give that one"
                    )
            warnings.warn(
                f"state[{number}] is {state[number]:.4g}, but in training it was {low[number]:.4g} to "
                f"{high[number]:.4g}, so the policy was never trained for this{advice}",
                stacklevel=6,  # the line that called the policy
            )

    # -- the model ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, images, instructions, state):
        """Return standardised actions f32 [B, H, A] in physical units, a gripper 1 open and 0 closed.

        images: C arrays u8 [B, h, w, 3] as stored in training, in the order of `cameras`; state: [B, N].
        """
        self.reserve_text(self.tokens_needed(instructions))
        count = len(instructions)
        most = self.batch or MOST
        parts = []
        for first in range(0, count, most):
            rows = np.arange(first, min(first + most, count))
            rows = np.append(rows, np.full(self._padding(len(rows)), first))
            inputs = [camera[rows] for camera in images], [instructions[row] for row in rows], state[rows]
            actions, _ = self.vla.predict(self._batch(*inputs))
            parts.append(actions[: count - first].float().cpu().numpy())
        actions = self.action.unnormalise(np.concatenate(parts)[..., : len(self.action.low)])
        return actions.clip(*self.action.limits).astype(np.float32)

    def _padding(self, count):
        """Return how many observations are added to `count`."""
        return (self.batch or 1 << (count - 1).bit_length()) - count

    def _batch(self, images, instructions, state):
        """Return what `VLA.predict` takes; cameras and numbers that the embodiment lacks are 0."""
        count = len(instructions)
        config = self.vla.config
        sides = self.data_entry.get("image_sides", [0] * len(images))
        images = [self._fitted(*entry) for entry in zip(images, sides)]
        images = [torch.as_tensor(camera, device=self.device) for camera in images]
        absent = torch.zeros(count, 32, 32, 3, dtype=torch.uint8, device=self.device)
        proprio = np.zeros((count, config.proprio_size), np.float32)
        if self.state:
            proprio[:, : state.shape[1]] = self.state.normalise(state)
        return {
            "images": images + [absent] * (config.cameras - len(images)),
            "text": instructions,
            "proprio": torch.from_numpy(proprio).to(self.device),
            "embodiment": torch.full((count,), self.embodiment, device=self.device),
            "num_cameras": torch.full((count,), len(images), device=self.device),
        }

    def _fitted(self, images, side):
        """Return a camera's stored images u8 [B, h, w, 3] as samples of training have them: square, of one size."""
        return np.stack([resize_image(fit_image(image, self.spec.image_fit), side) for image in images])

    def warm_up(self):
        """Answer a black observation, so that what is compiled at first use is compiled.

        On a GPU three times: the second call records a CUDA graph, and the third is the first to replay it.
        """
        sizes = [np.broadcast_to(camera["size"], 2) for camera in self.data_entry["cameras"].values()]
        images = [np.zeros((1, *side, 3), np.uint8) for side in sizes]
        for _ in range(3 if str(self.device).startswith("cuda") else 1):
            self.predict(images, [""], np.zeros((1, len(self.state.low) if self.state else 0)))

    def controller(self, execute=0, average=False, gripper="data"):
        """Return a `Controller` that asks this policy; see `execution.Execution` for execute and average."""
        return Controller(self, Execution(self.chunk, execute, average), gripper)


class Controller:
    """One robot's loop: `controller(observation)` returns the next action f32 [A]; call `reset()` before an episode.

    The policy is asked only when the executed part of its last chunk is used up; `due` says whether the next call will
    ask it, so that observations need not be made in between.
    """

    def __init__(self, policy, execution, gripper):
        self.policy = policy
        self.execution = execution
        self.gripper = gripper

    @property
    def due(self):
        """Whether the next call needs an observation; until then it may be None."""
        return self.execution.due

    def __call__(self, observation=None):
        """Return the next action f32 [A]. observation: as of `Policy`."""
        if self.execution.due:
            self.execution.add(self.policy(observation, self.gripper))
        return self.execution.next()

    def reset(self):
        """Forget the actions that were planned."""
        self.execution.reset()


# ----------------------------------------------------------------------------------------------------------------------
# Rotations


def other_way_round(rotation):
    """Return the rotation vector [3] of the same rotation about the opposite axis, by 2 pi minus the angle."""
    angle = float(np.linalg.norm(rotation))
    return rotation * (1 - 2 * np.pi / angle) if angle else np.asarray(rotation)
