"""Looking at a data set: its description, numbers and pictures, and all that is wrong with it.

`python data.py DIR` prints and draws it, `python data.py DIR --check` reads everything and lists the faults.
"""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dataspec import READ, absolute_dimensions, format_spec, gripper_dimensions
from normalise import rare_motions
from targets import label_path, load_labels

THUMBNAIL = 160  # pixels, the side of a frame in the contact sheet
SHOWN = 12  # instructions, at most, that are listed


# ----------------------------------------------------------------------------------------------------------------------
# Folders that are no data set

UNKNOWN = {  # ends of names -> what a folder with such files is, and what to do
    ".hdf5 .h5": "It holds HDF5 ({}), as LIBERO's own demonstrations are, which is not read. Take their RLDS version, "
    "openvla/modified_libero_rlds on the Hub, or convert them to LeRobot with the lerobot package. ",
    ".tfrecord": "It holds TFRecord shards ({}) without the features.json that describes them. Copy features.json and "
    "dataset_info.json from where they came. ",
    ".parquet": "It holds Parquet files ({}) without a LeRobot data set's meta/info.json. Copy all of its folder. ",
    ".zarr .zarray .zgroup": "It holds zarr ({}), which is not read. Convert it with the lerobot package. ",
    ".bag .mcap .db3": "It holds recordings of ROS ({}). Convert them with the lerobot package. ",
    ".npz .npy .pkl .pt .pth": "It holds arrays ({}). Convert them with the lerobot package. ",
    ".avi .mov .mkv .webm": "It holds videos ({}) that are not MP4. Convert each: ffmpeg -i NAME.avi NAME.mp4. ",
    ".png .jpg .jpeg": "It holds single images ({}). Make an MP4 of each episode: ffmpeg -i %06d.png NAME.mp4. ",
    ".zip .tar .gz .tgz .zst": "It holds archives ({}). Unpack them. ",
    ".safetensors": "It holds weights or labels ({}), so it may be a run. ",
}
LOOKED_AT = 2000  # files, at most


def describe_unknown(path):
    """Return what lies at a path that is no data set, and what to do, as sentences; "" for what is not known."""
    if (path / "meta").is_dir():
        return "It looks like a LeRobot data set without its meta/info.json. Copy all of its folder again. "
    inside = [str(file.relative_to(path)) for file in itertools.islice(path.rglob("*"), LOOKED_AT)]
    for ends, text in UNKNOWN.items():
        for name in inside or [path.name]:
            if {f".{part.split('-')[0]}" for part in Path(name).name.lower().split(".")[1:]} & set(ends.split()):
                return text.format(name)
    return ""


def find_lfs_pointer(path):
    """Return a file in a folder that is a pointer of Git LFS, as after a clone without git-lfs; None without."""
    for file in itertools.islice(Path(path).rglob("*"), LOOKED_AT):
        if file.is_file() and file.stat().st_size < 1024:
            with open(file, "rb") as start:
                if start.read(40).startswith(b"version https://git-lfs.github.com"):
                    return file
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def print_summary(dataset):
    """Print the description in force, episodes, instructions, cameras, and each dimension's range and readings."""
    lengths = np.diff(dataset.starts)
    print(
        f"{dataset.name}: {len(lengths)} episodes, {len(dataset)} steps ({lengths.min()} to {lengths.max()} an "
        f"episode), fingerprint {dataset.fingerprint}"
    )
    print(f"described by {dataset.source}:\n{format_spec(dataset.spec)}")
    _print_instructions(dataset)
    for camera in dataset.cameras:
        path = dataset.spec.cameras[camera]
        stored = dataset.index.image(path, 0).shape[:2]
        shown = dataset.image(camera, 0).shape[:2]
        print(f"  camera {camera} ({path}): {stored[0]} x {stored[1]} pixels, used as {shown[0]} x {shown[1]}")
    used = {*dataset.spec.cameras.values(), *(part.split("[")[0] for part in dataset.spec.action + dataset.spec.state)}
    unused = sorted(set(dataset.index.features) - used - {dataset.spec.instruction})
    print(f"  not used: {', '.join(unused) or 'nothing'}")
    for name, column in (("action", "action"), ("state", "proprio")):
        if column in dataset.stats:
            labels = gripper_labels(dataset) if name == "action" else {}
            _print_ranges(name, dataset.stats[column], labels)
    for number, (gripper, shares) in enumerate(zip(dataset.spec.grippers, dataset.gripper_shares().T)):
        opened, closed, between = shares
        print(
            f"  gripper {number} (dimension {gripper.index}): open ({gripper.open:g}) {opened:.0%}, closed "
            f"({gripper.closed:g}) {closed:.0%}, between {between:.0%} of the steps"
        )


def gripper_labels(dataset):
    """Return {dimension of the action: its name}; of grippers with what the numbers mean."""
    labels = dict(enumerate(dataset.spec.action_names))
    for gripper in dataset.spec.grippers:
        name = labels.get(gripper.index, "gripper")
        labels[gripper.index] = f"{name}: 1 open ({gripper.open:g} in the data), 0 closed ({gripper.closed:g})"
    return labels


def describe_reading(dataset):
    """Return one line that says how a data set is read."""
    spec = dataset.spec
    ends = [f"{gripper.index} ({gripper.open:g} open, {gripper.closed:g} closed)" for gripper in spec.grippers]
    parts = [
        f"cameras {', '.join(spec.cameras)}",
        f"state of {dataset.state_size}",
        f"action of {dataset.action_size}" if dataset.action_size else "no actions (video)",
        *([f"gripper {', '.join(ends)}"] if ends else []),
        f"{len(dataset.instructions())} instructions",
    ]
    return f"{dataset.name}: {dataset.num_episodes} episodes, described by {dataset.source}: {'; '.join(parts)}"


def _print_instructions(dataset):
    first = [dataset.instruction(start) for start in dataset.starts[:-1]]
    texts = dataset.instructions()
    for text in texts[:SHOWN]:
        print(f"  {first.count(text):5d} episodes begin with: {text!r}")
    if len(texts) > SHOWN:
        print(f"  and {len(texts) - SHOWN} other instructions")


def _print_ranges(name, stats, labels):
    print(f"  {name}       {'min':>9} {'1 %':>9} {'mean':>9} {'99 %':>9} {'max':>9}")
    for number, values in enumerate(zip(*(stats[kind] for kind in ("min", "q01", "mean", "q99", "max")), strict=True)):
        label = labels.get(number, "")
        notes = " (by min and max: it rarely moves)" if number in rare_motions(stats) else ""
        notes += "" if stats["mask"][number] else " (not normalised)"
        print(f"  {number:6d}       " + " ".join(f"{value:9.4f}" for value in values) + f"  {label}{notes}")


def contact_sheet(dataset):
    """Return a PIL image with one column for each of eight episodes and, for each camera, its first and last frame.

    The episodes are evenly spread over the data set. Captions say how far each gripper is open, so that one can see
    whether that is so.
    """
    shown = np.unique(np.linspace(0, dataset.num_episodes - 1, 8).astype(int))
    rows = [(camera, place) for camera in dataset.cameras for place in ("first", "last")]
    sheet = Image.new("RGB", (len(shown) * THUMBNAIL, len(rows) * THUMBNAIL), "white")
    draw = ImageDraw.Draw(sheet)
    for column, episode in enumerate(shown):
        for row, (camera, place) in enumerate(rows):
            step = dataset.starts[episode] if place == "first" else dataset.starts[episode + 1] - 1
            frame = Image.fromarray(dataset.image(camera, step)).resize((THUMBNAIL, THUMBNAIL))
            x = column * THUMBNAIL
            y = row * THUMBNAIL
            sheet.paste(frame, (x, y))
            caption = f"episode {episode}, {camera}, {place}"
            for gripper in dataset.spec.grippers:
                opening = dataset.action([step])[0, gripper.index]
                caption += f"\ngripper {gripper.index} {opening:.0%} open"
            draw.text((x + 4, y + 4), caption, fill="white", stroke_width=1, stroke_fill="black")
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Checking


def check_dataset(config, open_dataset):
    """Print all faults of a data set: errors, then warnings (odd, but usable). Return the number of errors.

    config: `data`, `cache` and `spec`, as of the command; open_dataset: data.open_dataset. Reads every record, image,
    number and text, and the labels if there are any; writes nothing but statistics where the data is indexed already.
    Raise where not even the files of the data set can be listed.
    """
    errors = []
    warnings = []

    def on_fault(fault, warning=False):
        (warnings if warning else errors).append(fault)

    try:
        dataset = open_dataset(config.data, config.cache, config.spec, on_fault)
    except ValueError as fault:  # no description fits, or nothing is left to describe
        errors.append(fault)
        dataset = None
    if dataset:
        labels_may_fit = not errors  # they would not fit an index without the damaged records
        for camera in dataset.cameras:
            for step in range(len(dataset)):
                errors += _raised(dataset.image, camera, step)
        errors += dataset.value_faults()
        warnings += odd_texts(dataset)
        if not errors:
            warnings += [*odd_images(dataset), *odd_numbers(dataset)]
        if labels_may_fit:
            path = label_path(dataset, config.data)
            unstated = dataset.spec.latents and "delta" not in dataset.spec.latents and not path.exists()
            any_delta = 1 if unstated else 0
            errors += _raised(load_labels, dataset, path, any_delta)
    errors = list(dict.fromkeys(map(str, errors)))
    for fault in errors:
        print(f"error: {fault}")
    for fault in warnings:
        print(f"warning: {fault}")
    count = str(len(errors) + len(warnings)) if errors or warnings else "nothing"
    size = ""
    if dataset:
        images = len(dataset) * len(dataset.cameras)
        size = f" in {dataset.num_episodes} episodes, {len(dataset)} steps, {images} images"
    print(f"{dataset.name if dataset else config.data}: {count} found{size}")
    return len(errors)


def _raised(function, *arguments):
    """Return the ValueError that a call raises, in a list; an empty list if it raises none."""
    try:
        function(*arguments)
    except ValueError as error:
        return [error]
    return []


def odd_images(dataset):
    """Yield a text for each camera whose images are smaller than a patch of the backbone."""
    for camera in dataset.cameras:
        side = min(dataset.image(camera, 0).shape[:2])
        if side < 32:
            yield f"{dataset.directory}: camera {camera} has only {side} pixels; train with --image-size 32"


def odd_texts(dataset):
    """Yield a text for episodes with an empty instruction, and for instructions that differ in case or a final dot."""
    instructions = dataset.instructions()
    if not all(text.strip() for text in instructions):
        empty = sorted(
            {dataset.episode_of(step) for step in range(len(dataset)) if not dataset.instruction(step).strip()}
        )
        yield f"{dataset.directory}: the instruction is empty in {len(empty)} episodes, the first is {empty[0]}"
    spellings = {}
    for text in instructions:
        spellings.setdefault(" ".join(text.lower().split()).rstrip(" ."), []).append(text)
        if "\ufffd" in text:
            yield f"{dataset.directory}: an instruction holds bytes that are no UTF-8 text: {text!r:.80}"
    for texts in spellings.values():
        if len(texts) > 1:
            yield f"{dataset.directory}: instructions that differ only in case, blanks or a final dot: {texts}"


def odd_numbers(dataset):
    """Yield a text for what is odd about the actions although one can train with it."""
    if not dataset.action_size:
        yield f"{dataset.directory}: there are no actions; only the latent losses can be trained"
        return
    smallest, largest = dataset.action_range()
    for dimension in np.flatnonzero(smallest == largest):
        yield f"{dataset.directory}: dimension {dimension} of the action is {smallest[dimension]:g} at all steps"
    for episode, (start, stop) in enumerate(zip(dataset.starts[:-1], dataset.starts[1:])):
        actions = dataset.stored_action(slice(start, stop))
        if stop - start > 1 and (actions == actions[0]).all():
            file, _ = dataset.locate(start)
            yield f"{file}: the action never changes in the {stop - start} steps of episode {episode}"
    for place, steps in (("first", dataset.starts[:-1]), ("last", dataset.starts[1:] - 1)):
        if largest.any() and not any(dataset.stored_action(slice(step, step + 1)).any() for step in steps):
            yield (
                f"{dataset.directory}: the {place} action of every episode is 0; if it was never executed, leave that "
                "step out of the data, because it is trained as an action"
            )
    for dimension in rare_motions(dataset.stats["action"]):
        yield f"{dataset.directory}: dimension {dimension} of the action rarely moves: normalised by its min and max"
    for gripper, between in zip(dataset.spec.grippers, dataset.gripper_shares()[2]):
        if between > 0.5:
            yield (
                f"{dataset.directory}: the gripper, dimension {gripper.index} of the action, is neither open nor "
                f"closed in {between:.0%} of the steps; is it one?"
            )
    grippers = gripper_dimensions(dataset.stored_action(slice(0, READ)), dataset.spec.action_names)
    for dimension in sorted(set(grippers) - {gripper.index for gripper in dataset.spec.grippers}):
        yield (
            f"{dataset.directory}: dimension {dimension} of the action has just two values, or is called a gripper, "
            "but the description has no such gripper: it is trained as a motion"
        )
    relative = set(range(dataset.action_size)) - set(dataset.spec.absolute)
    relative -= {gripper.index for gripper in dataset.spec.grippers}
    following = absolute_dimensions(dataset.stored_action(slice(0, READ)), dataset.state(slice(0, READ)))
    odd = sorted(relative & set(following))
    if len(odd) > len(relative) / 2:  # one alone can be a motion that corrects the state
        yield (
            f"{dataset.directory}: dimensions {odd} of the action follow the state, as absolute targets do, but are "
            f'described as relative motions; if they are targets, add "absolute": {odd} to the description'
        )
