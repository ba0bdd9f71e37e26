"""What a data set means: which features are cameras, state, action, gripper and instruction, in which convention.

A `DataSpec` is the whole description, and a small JSON file. It comes from `--spec FILE`, from `spec.json` next to the
data, or from a preset whose features all match by name and shape; nothing else is ever assumed. What it says is checked
against the values of the data, and a mismatch is refused with both readings. Where nothing fits, the error prints a
proposal.

Inside the project a gripper is 1 open and 0 closed, whatever it is in the data.

Axes: S steps of a data set, A action size, N proprio size.
"""

import copy
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

NORMALISATIONS = ("bounds_q99", "bounds", "mean_std")
IMAGE_FITS = ("", "pad", "crop", "squeeze")
READ = 20_000  # steps, at most, in which actions are looked at to propose what they mean
GRIPPER_SLACK = 0.1  # of the distance between open and closed, by which values may leave it or fail to reach it


@dataclass
class Gripper:
    """One gripper of an action."""

    index: int
    """its number in the action"""
    open: float
    """the stored value of an open gripper"""
    closed: float
    """the stored value of a closed one"""


@dataclass
class DataSpec:
    """The description of a data set. A part such as "observation/state[0:6]" is a feature's path and a slice of it."""

    embodiment: str
    """a name; data sets of one embodiment share action space, state and the head's small layers"""
    cameras: dict = field(default_factory=dict)
    """the policy's name of each camera -> feature path, the main camera first"""
    state: list = field(default_factory=list)
    """parts that are joined into the proprioceptive state; none: there is no state"""
    action: list = field(default_factory=list)
    """parts that are joined into the action; none: video without actions"""
    grippers: list = field(default_factory=list)
    """for each gripper {"index", "open", "closed"}: its number in the action and the stored values"""
    absolute: list = field(default_factory=list)
    """numbers of the action's dimensions that are absolute targets: past the end of an episode they repeat"""
    normalisation: str = "bounds_q99"
    """bounds_q99 (1 % and 99 % quantiles), bounds (smallest and largest value) or mean_std"""
    unchanged: list = field(default_factory=list)
    """numbers of the action's dimensions that are not normalised; grippers never are"""
    instruction: str = ""
    """feature path of the instruction"""
    text: str = ""
    """one constant instruction, for data without"""
    image_fit: str = ""
    """how images that are not square become so: pad (with black), crop (the centre) or squeeze; "": all are square"""
    chunk: int = 8
    """actions per chunk, unless --chunk says otherwise"""
    latents: dict = field(default_factory=dict)
    """features with latent labels, if the data has some: {"codes", "vectors", "num_codes", "quantised"}"""
    action_names: list = field(default_factory=list)
    """a name of each dimension of the action, for reports"""

    def __post_init__(self):
        self.grippers = [Gripper(**gripper) if isinstance(gripper, dict) else gripper for gripper in self.grippers]


def to_dict(spec):
    """Return a spec as JSON values, without what has its default."""
    return {f.name: value for f in fields(DataSpec) if (value := asdict(spec)[f.name]) or f.name == "embodiment"}


def format_spec(spec):
    """Return a spec as the text of a JSON file."""
    return json.dumps(to_dict(spec), indent=2)


def fit_image(pixels, fit):
    """Return u8 [h, w, 3] made square by padding with black ("pad") or by its centre ("crop"); else as it is."""
    height, width = pixels.shape[:2]
    if height == width or fit not in ("pad", "crop"):
        return pixels
    side = max(height, width) if fit == "pad" else min(height, width)
    top, left = abs(side - height) // 2, abs(side - width) // 2
    if fit == "crop":
        return pixels[top : top + side, left : left + side]
    square = np.zeros((side, side, 3), np.uint8)
    square[top : top + height, left : left + width] = pixels
    return square


# ----------------------------------------------------------------------------------------------------------------------
# Reading a spec


def read_spec(path):
    """Return the `DataSpec` in a JSON file. Raise ValueError naming the file and what is wrong in it."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return parse_spec(content, path)


def parse_spec(content, source):
    """Return the `DataSpec` of a dictionary. Raise ValueError naming `source` and what is wrong."""
    known = {f.name: f.type for f in fields(DataSpec)}
    if not isinstance(content, dict) or "embodiment" not in content:
        raise ValueError(f"{source} is no description of a data set: it must be an object with an 'embodiment'")
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"{source}: '{name}' is not a field of a description; there are {', '.join(known)}")
        if type(value) is not known[name]:
            raise ValueError(f"{source}: {name} is {value!r}; it must be of type {known[name].__name__}")
        _check_entries(name, value, source)
    spec = DataSpec(**content)
    if not spec.embodiment:
        raise ValueError(f"{source}: embodiment is empty; it must be a name")
    if spec.normalisation not in NORMALISATIONS:
        raise ValueError(f"{source}: normalisation is '{spec.normalisation}'; choose {', '.join(NORMALISATIONS)}")
    if spec.image_fit not in IMAGE_FITS:
        raise ValueError(f"{source}: image_fit is '{spec.image_fit}'; choose pad, crop or squeeze")
    if spec.chunk < 1:
        raise ValueError(f"{source}: chunk is {spec.chunk}; it must be at least 1")
    for gripper in spec.grippers:
        if gripper.open == gripper.closed:
            raise ValueError(f"{source}: gripper {gripper.index} is {gripper.open} both open and closed")
    if len({gripper.index for gripper in spec.grippers}) < len(spec.grippers):
        raise ValueError(f"{source}: two grippers have the same index")
    if spec.instruction and spec.text:
        raise ValueError(f"{source}: both instruction and text are given; choose one")
    for part in [*spec.state, *spec.action]:
        split_part(part, source)
    return spec


def _check_entries(name, value, source):
    """Raise ValueError unless the entries of a field have the types that they must have."""
    if name in ("absolute", "unchanged"):
        valid = all(type(entry) is int for entry in value)
        expected = "numbers of dimensions"
    elif name in ("state", "action", "action_names"):
        valid = all(isinstance(entry, str) for entry in value)
        expected = "texts"
    elif name == "cameras":
        valid = all(isinstance(path, str) for path in value.values())
        expected = "a name and a feature path for each camera"
    elif name == "grippers":
        valid = all(map(_is_gripper, value))
        expected = 'for each gripper {"index", "open", "closed"}: a dimension and two numbers, as stored in the data'
    elif name == "latents":
        valid = not value or _is_latents(value)
        expected = (
            '{"codes", "vectors"}: feature paths, with "num_codes" and "delta" (at least 1) and "quantised" (bool)'
        )
    else:
        return
    if not valid:
        raise ValueError(f"{source}: {name} is {value!r}; it must hold {expected}")


def _is_gripper(entry):
    return (
        isinstance(entry, dict)
        and entry.keys() == {"index", "open", "closed"}
        and type(entry["index"]) is int
        and all(type(entry[end]) in (int, float) and math.isfinite(entry[end]) for end in ("open", "closed"))
    )


def _is_latents(value):
    types = {"codes": str, "vectors": str, "num_codes": int, "delta": int, "quantised": bool}
    return (
        {"codes", "vectors"} <= value.keys() <= types.keys()
        and all(type(entry) is types[name] for name, entry in value.items())
        and all(value.get(name, 1) > 0 for name in ("num_codes", "delta"))
    )


def split_part(part, source="the description"):
    """Return (feature path, slice) of a part such as "action" or "observation/state[0:6]". Raise ValueError."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d+)(?::(\d+))?\])?", str(part))
    if not match:
        raise ValueError(f"{source}: {part!r} is no part; write a feature path, with [a:b] for some of its numbers")
    path, first, last = match.groups()
    if first is None:
        return path, slice(None)
    cut = slice(int(first), int(first) + 1 if last is None else int(last))
    if cut.start >= cut.stop:
        raise ValueError(f"{source}: {part!r} holds no number; in [a:b] b must be larger than a")
    return path, cut


# ----------------------------------------------------------------------------------------------------------------------
# Presets

_POSE = ["x", "y", "z", "rotation x", "rotation y", "rotation z"]
_ARM_14 = [f"{side} {name}" for side in ("left", "right") for name in (*(f"joint {n}" for n in range(6)), "gripper")]


def _arms_of_14(embodiment, cameras):
    """Two arms of six joints and a gripper each: absolute joint targets, grippers 0 closed and 1 open."""
    return DataSpec(
        embodiment,
        cameras={name: f"observation.images.{name}" for name in cameras},
        state=["observation.state[0:14]"],
        action=["action[0:14]"],
        grippers=[Gripper(6, open=1.0, closed=0.0), Gripper(13, open=1.0, closed=0.0)],
        absolute=list(range(14)),
        instruction="task",
        image_fit="pad",
        chunk=25,
        action_names=_ARM_14,
    )


PRESETS = {
    # openvla/modified_libero_rlds: relative end-effector motion; robosuite's gripper command
    "libero": DataSpec(
        "libero",
        cameras={"image": "observation/image", "wrist_image": "observation/wrist_image"},
        state=["observation/state[0:8]"],
        action=["action[0:7]"],
        grippers=[Gripper(6, open=-1.0, closed=1.0)],
        instruction="language_instruction",
        latents={"codes": "latent_idx", "vectors": "latent_z", "num_codes": 16, "quantised": True},
        action_names=[*_POSE, "gripper"],
    ),
    # BridgeData V2 as RLDS: one main camera; the others are missing in many episodes
    "bridge": DataSpec(
        "bridge",
        cameras={"image": "observation/image_0"},
        state=["observation/state[0:7]"],
        action=["action[0:7]"],
        grippers=[Gripper(6, open=1.0, closed=0.0)],
        instruction="language_instruction",
        action_names=[*_POSE, "gripper"],
    ),
    # DROID as RLDS: joint targets; its gripper is 0 open and 1 closed; images of 180 x 320 pixels
    "droid": DataSpec(
        "droid",
        cameras={"image": "observation/exterior_image_1_left", "wrist_image": "observation/wrist_image_left"},
        state=["observation/joint_position[0:7]", "observation/gripper_position[0:1]"],
        action=["action_dict/joint_position[0:7]", "action_dict/gripper_position[0:1]"],
        grippers=[Gripper(7, open=0.0, closed=1.0)],
        absolute=list(range(8)),
        instruction="language_instruction",
        image_fit="pad",
        action_names=[*(f"joint {n}" for n in range(7)), "gripper"],
    ),
    # ALOHA and RoboTwin 2.0 as LeRobot data sets
    "aloha": _arms_of_14("aloha", ["cam_high", "cam_left_wrist", "cam_right_wrist"]),
    "robotwin": _arms_of_14("robotwin", ["head_camera", "left_camera", "right_camera"]),
    # CALVIN as RLDS: relative motion, gripper 1 open and -1 closed
    "calvin": DataSpec(
        "calvin",
        cameras={"image": "observation/rgb_static", "wrist_image": "observation/rgb_gripper"},
        state=["observation/robot_obs[0:7]", "observation/robot_obs[14:15]"],
        action=["rel_actions[0:7]"],
        grippers=[Gripper(6, open=1.0, closed=-1.0)],
        instruction="language_instruction",
        action_names=[*_POSE, "gripper"],
    ),
    # the paper's real arm; its feature names are not published: only by name, `--spec jaka`
    "jaka": DataSpec(
        "jaka",
        cameras={"image": "observation/image", "wrist_image": "observation/wrist_image"},
        state=["observation/state[0:7]"],
        action=["action[0:7]"],
        grippers=[Gripper(6, open=1.0, closed=0.0)],
        instruction="language_instruction",
        chunk=20,
        action_names=[*_POSE, "gripper"],
    ),
}


def matching_presets(index):
    """Return the names of the presets all of whose features the data set has, with the same sizes."""
    return [name for name, spec in PRESETS.items() if name != "jaka" and _matches(spec, index)]


def _matches(spec, index):
    """Return whether every feature of a preset is there; a part must span the whole feature, or end it."""
    for path in spec.cameras.values():
        feature = index.features.get(path)
        if feature is None or not _is_camera(feature, (3,)):
            return False
    for parts in (spec.state, spec.action):
        sizes = {}
        for part in parts:
            path, cut = split_part(part)
            sizes[path] = max(sizes.get(path, 0), cut.stop)
        for path, size in sizes.items():
            feature = index.features.get(path)
            if feature is None or feature.kind != "number" or feature.shape != (size,):
                return False
    return spec.instruction in index.features and index.features[spec.instruction].kind == "text"


# ----------------------------------------------------------------------------------------------------------------------
# Choosing the spec of a data set


def find_spec(index, chosen="", folders=()):
    """Return (the `DataSpec` of a data set, where it comes from), checked against the features.

    chosen: a JSON file or the name of a preset, "" for none; folders: those in which spec.json is looked for. Raise
    FileNotFoundError, or ValueError that says what does not fit, with a proposal where there is no description at all.
    """
    spec, source = _choose_spec(index, str(chosen), folders)
    spec = copy.deepcopy(spec)
    if spec.latents and spec.latents.get("codes") not in index.features and source in PRESETS:
        spec.latents = {}  # only the paper's release has them
    check_features(spec, index, source)
    return spec, source


def _choose_spec(index, chosen, folders):
    if chosen in PRESETS:
        return PRESETS[chosen], chosen
    if chosen:
        if not Path(chosen).is_file():
            raise FileNotFoundError(f"spec {chosen} is neither a file nor a preset; presets are {', '.join(PRESETS)}")
        return read_spec(chosen), chosen
    for folder in folders:
        if (Path(folder) / "spec.json").is_file():
            return read_spec(Path(folder) / "spec.json"), str(Path(folder) / "spec.json")
    presets = matching_presets(index)
    if len(presets) == 1:
        return PRESETS[presets[0]], presets[0]
    if presets:
        raise ValueError(f"{index.directory} fits the presets {', '.join(presets)}; choose one with --spec NAME")
    raise ValueError(explain_proposal(index))


def check_features(spec, index, source):
    """Raise ValueError unless every feature that a spec names is there, of the right kind, and its numbers fit."""
    place = f"{index.name}, as described by {source}"
    known = {path: _describe(feature) for path, feature in index.features.items()}
    for name, path in spec.cameras.items():
        _check_kind(index, path, "image", f"camera {name}", place, known)
        feature = index.features[path]
        if not _is_camera(feature):
            raise ValueError(f"{place}: camera {name} is {_describe(feature)}; it must have 8 bits and 1 or 3 channels")
    for kind, parts in (("state", spec.state), ("action", spec.action)):
        for part in parts:
            path, cut = split_part(part)
            _check_kind(index, path, "number", f"{kind} part {part}", place, known)
            shape = index.features[path].shape
            if not _is_vector(shape):
                raise ValueError(f"{place}: {kind} part {part} has the shape {shape}; it must have one axis")
            if cut.stop is not None and cut.stop > math.prod(shape):
                raise ValueError(f"{place}: {kind} part {part} does not fit the feature, whose shape is {shape}")
    if spec.instruction:
        _check_kind(index, spec.instruction, "text", "instruction", place, known)
    size = part_size(index, spec.action)
    numbers = [gripper.index for gripper in spec.grippers] + spec.absolute + spec.unchanged
    if any(not 0 <= number < size for number in numbers):
        raise ValueError(f"{place}: grippers, absolute and unchanged name dimensions {numbers}, the action has {size}")
    if spec.action_names and len(spec.action_names) != size:
        raise ValueError(f"{place}: action_names are {len(spec.action_names)}, the action has {size} dimensions")
    if spec.latents:
        for name in ("codes", "vectors"):
            _check_kind(index, spec.latents[name], "number", f"latents' {name}", place, known)


def _check_kind(index, path, kind, what, place, known):
    feature = index.features.get(path)
    if feature is None or feature.kind != kind:
        found = f"is {_describe(feature)}" if feature else "is missing"
        listed = "; ".join(f"{name}: {text}" for name, text in known.items())
        raise ValueError(f"{place}: {what} reads '{path}', which {found}; it must be {kind}. There are {listed}")


def _describe(feature):
    shape = " x ".join("?" if size is None else str(size) for size in feature.shape)
    return f"{feature.kind} {feature.dtype if feature.kind != 'text' else ''} {shape}".strip()


def _is_camera(feature, channels=(1, 3)):
    return feature.kind == "image" and feature.dtype == "uint8" and feature.shape[2] in channels


def _is_vector(shape):
    """Return whether at most one axis is longer than 1, as of (), (7,), (7, 1) and (1, 7)."""
    return sum(size > 1 for size in shape) <= 1


def read_parts(index, parts, steps):
    """Return the numbers of some parts, joined, at some steps, f32 [n, size]. steps: i64 [n] or a slice."""
    arrays = []
    for path, cut in map(split_part, parts):
        rows = index.columns[path][steps]
        arrays.append(rows.reshape(len(rows), -1)[:, cut])
    if not arrays:
        count = len(range(len(index))[steps]) if isinstance(steps, slice) else len(steps)
        return np.zeros((count, 0), np.float32)
    return np.concatenate(arrays, 1, dtype=np.float32)


def part_size(index, parts):
    """Return how many numbers some parts have together."""
    size = 0
    for part in parts:
        path, cut = split_part(part)
        size += len(range(math.prod(index.features[path].shape))[cut])
    return size


# ----------------------------------------------------------------------------------------------------------------------
# What a spec says, held against the values


def gripper_faults(spec, smallest, largest, between, source, name):
    """Yield a text for each gripper whose values contradict the spec, with both readings.

    smallest, largest: stored values of each dimension of the action, [A] each; between: for each gripper the share of
    steps in which it is neither open nor closed; source: where the spec comes from; name: the data set's. A gripper
    that never moves is no contradiction if it stays at one of its ends. A preset's command of -1 or 1 is no gripper if
    most values lie between: it may be a joint angle. Who means it says so in a spec of their own.
    """
    for gripper, share in zip(spec.grippers, between, strict=True):
        low, high = sorted((gripper.open, gripper.closed))
        slack = GRIPPER_SLACK * (high - low)
        first, last = float(smallest[gripper.index]), float(largest[gripper.index])
        outside = first < low - slack or last > high + slack
        misses_an_end = first > low + slack or last < high - slack
        moves = last - first > slack
        rests_between = not moves and first > low + slack and last < high - slack
        is_command = source in PRESETS and low < 0 < high
        found = f"its values go from {first:g} to {last:g}"
        if is_command and share > 0.5:
            found += f" and lie between these in {share:.0%} of the steps"
        elif not (outside or rests_between or (moves and misses_an_end)):
            continue
        yield (
            f"{name}, as described by {source}: dimension {gripper.index} of the action is described as a gripper from "
            f"{gripper.closed:g} (closed) to {gripper.open:g} (open), but {found}. "
            f"{_readings(gripper, first, last)}\n{format_spec(spec)}"
        )


def _readings(gripper, smallest, largest):
    ends = f"{smallest:g} and {largest:g}"
    return (
        f"Either it is a gripper with the ends {ends}: say which is open, "
        f'{{"index": {gripper.index}, "open": {largest:g}, "closed": {smallest:g}}} or '
        f'{{"index": {gripper.index}, "open": {smallest:g}, "closed": {largest:g}}}; or it is none: leave it out of '
        '"grippers". Save the description, so corrected, as spec.json next to the data, or give it with --spec:'
    )


def absolute_dimensions(actions, state):
    """Return the dimensions of stored actions [n, A] that look like absolute targets: they follow a state's number.

    state: [n, N] of the same steps. A target correlates with what it is a target of, and lies near it; a relative
    motion does not.
    """
    actions, state = (np.asarray(x, np.float64) for x in (actions, state))
    moving = [number for number in range(state.shape[1]) if state[:, number].std() > 0]
    found = []
    for number in range(actions.shape[1]):
        values = actions[:, number]
        spread = values.std()
        for column in moving if spread > 0 else []:
            follows = np.corrcoef(values, state[:, column])[0, 1] > 0.9
            if follows and np.abs(values - state[:, column]).mean() < 0.5 * spread:
                found.append(number)
                break
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Proposals


def propose_spec(index):
    """Return (a `DataSpec` that may fit, [what was guessed and must be checked])."""
    guesses = []
    images = [path for path in index.paths("image") if _is_camera(index.features[path])]
    colour = [path for path in images if _is_camera(index.features[path], (3,))]
    late = ("depth", "wrist", "gripper", "hand")  # names that no main camera has, the least likely first
    images = sorted(colour or images, key=lambda path: (*(name in path for name in late), path))
    cameras = {_last_name(path): path for path in images}
    if len(cameras) < len(images):  # the last parts of their paths are not different
        cameras = {path: path for path in images}
    if images:
        guesses.append(f"the main camera is {next(iter(cameras))}")
    else:
        guesses.append("there is no camera of 8 bits with 1 or 3 channels: no policy can be trained on this data")
    if depths := [name for name, path in cameras.items() if "depth" in path]:
        guesses.append(f"by name {', '.join(depths)} is depth, in 8 bits or in colours; is it worth being a camera?")
    if images and not colour:
        guesses.append("the cameras are grey; are they no depth? Grey is repeated to three channels")
    shapes = {index.features[path].shape[:2] for path in images}
    fit = "pad" if any(height != width or height is None for height, width in shapes) else ""
    if fit:
        guesses.append("images that are not square are padded with black (or: crop, squeeze)")
    state = _first_path(index, "number", ("state", "proprio", "robot_obs"), guesses)
    action = _action_parts(index, guesses)
    instruction = _first_path(index, "text", ("language_instruction", "instruction", "task", "caption"), guesses)
    if not state:
        shapes = {path: index.features[path].shape for path in index.paths("number") if path not in action}
        rows = [path for path, shape in shapes.items() if math.prod(shape) > 1 and _is_vector(shape)]
        guesses.append("there is no state" + (f"; is one of these it: {', '.join(rows)}?" if rows else ""))
    if not instruction:
        guesses.append('there is no instruction; "text" can hold one for all')
    if instruction and not any(text.strip() for text in index.texts[instruction].used()):
        guesses.append(f'{instruction} is empty in all episodes; without instructions, "text" can hold one for all')
    spec = DataSpec(
        index.name,
        cameras=cameras,
        state=[state] if state else [],
        action=action,
        instruction=instruction,
        image_fit=fit,
    )
    if action:
        _propose_conventions(index, spec, guesses)
    else:
        guesses.append("there is no action: the data can only train latent losses")
    return spec, guesses


def _last_name(path):
    return re.split(r"[/.]", path)[-1]


def _first_path(index, kind, names, guesses):
    """Return the first feature of a kind whose path ends with one of the names; "" where there is none."""
    for name in names:
        paths = [path for path in index.paths(kind) if path.endswith(name) and _is_vector(index.features[path].shape)]
        if paths:
            exact = [path for path in paths if _last_name(path) == name]
            chosen = (exact or paths)[0]
            guesses.append(f"the {'instruction' if kind == 'text' else 'state'} is {chosen}")
            return chosen
    return ""


def _action_parts(index, guesses):
    called = {path: each for path, each in index.features.items() if re.match(r"(rel_)?actions?($|[/.])", path)}
    paths = [path for path, each in called.items() if each.kind == "number" and _is_vector(each.shape)]
    if left_out := [f"{path} ({_describe(each)})" for path, each in called.items() if path not in paths]:
        guesses.append(
            f"{', '.join(left_out)} is not taken for an action, which is a row of numbers (for LeRobot their type must "
            "be the dtype in meta/info.json)"
        )
    if len(paths) > 1:
        guesses.append(f"the action joins {', '.join(paths)} in this order")
    return paths


def _names_of(index, path):
    """Return the names of a feature's numbers: its own, else the last part of its path for each."""
    feature = index.features[path]
    size = math.prod(feature.shape)
    if len(feature.names) == size:
        return list(feature.names)
    name = _last_name(path)
    return [name] if size == 1 else [f"{name} {number}" for number in range(size)]


def _propose_conventions(index, spec, guesses):
    """Add what the values and names of the action say of its grippers and absolute targets."""
    actions = read_parts(index, spec.action, slice(0, READ))
    if len(spec.action) > 1 or len(index.features[spec.action[0]].names) == actions.shape[1]:
        spec.action_names = [name for path in spec.action for name in _names_of(index, path)]
    starts = index.starts[:-1][index.starts[:-1] < len(actions)]
    for number in gripper_dimensions(actions, spec.action_names):
        low, high = float(actions[:, number].min()), float(actions[:, number].max())
        nearer_high = (actions[starts, number] > (low + high) / 2).mean()
        spec.grippers.append(Gripper(number, open=None, closed=None))
        guesses.append(
            f"dimension {number} of the action is a gripper, from {low:g} to {high:g}: write which of them is open and "
            f"which is closed (at the start of {nearer_high:.0%} of the episodes it is nearer to {high:g}), or leave "
            "the gripper out"
        )
    if not spec.grippers:
        guesses.append("the action has no gripper (no dimension is called so, or has just two values)")
    grippers = {gripper.index for gripper in spec.grippers}
    following = set(absolute_dimensions(actions, read_parts(index, spec.state, slice(0, READ)))) - grippers
    if len(following) > (actions.shape[1] - len(grippers)) / 2:
        spec.absolute = sorted(following)
        guesses.append(f"dimensions {spec.absolute} of the action follow the state: they are absolute targets")
    else:
        guesses.append('all motion is relative; "absolute" lists the dimensions that are absolute targets')


def gripper_dimensions(actions, names=()):
    """Return the dimensions of stored actions [n, A] that look like grippers: of two common values, or called so."""
    found = []
    for number, column in enumerate(actions.T):
        values, counts = np.unique(column, return_counts=True)
        is_called_so = names and "grip" in names[number].lower()
        if is_called_so or (len(values) == 2 and counts.min() >= 0.01 * len(column)):
            found.append(number)
    return found


def explain_proposal(index):
    """Return the text of the error for data without a description: a proposal, what it guesses, and where it goes."""
    spec, guesses = propose_spec(index)
    features = "\n".join(f"    {path}: {_describe(feature)}" for path, feature in index.features.items())
    listed = "\n".join(f"    - {guess}" for guess in guesses)
    return (
        f"{index.directory}: no description says what its features mean, and no preset fits "
        f"({', '.join(PRESETS)}). It has\n{features}\n"
        f"A description that may fit:\n{format_spec(spec)}\n"
        f"It guesses; check each:\n{listed}\n"
        f"Save it, corrected, as {index.directory}/spec.json, or give it with --spec FILE."
    )
