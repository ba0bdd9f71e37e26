"""inspection.py: what `python data.py` prints and draws of a data set, and the faults that its check lists."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import as_format, change_episode, fitting_index, made_index, replace_number, replace_step
from PIL import Image

import data
from dataspec import PRESETS, DataSpec, Gripper, format_spec
from files import save_tensors
from index import Feature
from inspection import check_dataset

LIBERO = replace(PRESETS["libero"], latents={})

# ----------------------------------------------------------------------------------------------------------------------
# The check of files


def test_check_finds_nothing_in_good_data(rlds_latents, video, script_here, tmp_path):
    """Exit status 0 and how much was read; nothing is written. Video without actions or texts is odd, not wrong."""
    for folder, oddities in ((rlds_latents, ["dimension 3 of the action is 0 at all steps"]), (video, VIDEO_ODDITIES)):
        done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
        *warnings, count = done.text.splitlines()
        assert done.code == 0 and len(warnings) == len(oddities)
        assert all(line.startswith("warning: ") and oddity in line for line, oddity in zip(warnings, oddities))
        assert re.search(rf": {len(oddities)} found in \d+ episodes, \d+ steps, \d+ images", count)
    assert not (tmp_path / "cache").exists()


VIDEO_ODDITIES = [
    "has 1 steps",
    "the instruction is empty in 3 episodes",
    "there are no actions; only the latent losses",
]


def test_check_lists_everything_in_one_go(rlds, labels, script_here, tmp_path):
    """Faults of records, images, numbers, texts and labels in both shards, each on its own line; exit status 1."""
    changes = {
        "/image": replace_step(3, b"no image"),
        "/action": replace_number(0, np.nan),
        "/language_instruction": lambda v: [b""] * len(v),
    }
    folder, path = change_episode(rlds, tmp_path, changes)
    shutil.copy(labels, folder / "labels.safetensors")
    check = ("data.py", folder, "--check", "--cache", tmp_path / "cache")
    done = script_here(*check)
    expected = [
        f"error: {path}: camera observation/image at step 3 of episode 1",
        f"error: {path}: action of made is nan at step 0 of episode 1",
        "labels.safetensors labels the data set with",
        "warning: .*: the instruction is empty in 1 episodes, the first is 1",
    ]
    assert done.code == 1
    assert all(re.search(text, line) for text, line in zip(expected, done.text.splitlines(), strict=False))
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # of the first record: what comes after it is read all the same, as episodes 0 to 2
    path.write_bytes(content)
    other = path.with_name(path.name.replace("00000-of", "00001-of"))
    other.write_bytes(other.read_bytes()[:-1])
    done = script_here(*check)
    expected = [
        f"{path.name}: wrong checksum of the record",
        f"{path.name}: 3 whole records, 4 in",
        f"{other.name}: the record at",
        f"{other.name}: 3 whole records, 4 in",
        f"{path.name}: camera observation/image at step 3 of episode 0",
        f"{path.name}: action of made is nan at step 0 of episode 0",
    ]
    assert done.code == 1 and all(text in line for text, line in zip(expected, done.text.splitlines()))
    assert "found in 6 episodes" in done.text and not any(tmp_path.glob("cache/*"))
    other.unlink()
    done = script_here(*check)
    assert done.code == 1 and "1 of 2 shards are missing" in done.text and "found in 3 episodes" in done.text


def test_check_goes_on_behind_the_first_image(rlds, script_here, tmp_path):
    """One that cannot be decoded where opening looks first hides nothing that comes later."""
    content = {"/image": lambda v: [b"no image", *v[1:]], "/action": replace_number(0, np.nan)}
    folder, path = change_episode(rlds, tmp_path, content)
    swapped = path.with_name(path.name.replace("00000-of", "00001-of"))
    done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
    assert done.code == 1 and "2 found in 8 episodes" in done.text
    records = path.read_bytes()
    path.write_bytes(swapped.read_bytes())
    swapped.write_bytes(records)
    assert script_here("data.py", folder, "--check", "--cache", tmp_path / "cache").code == 1


def test_check_of_data_of_which_nothing_is_left(rlds, script_here, tmp_path):
    """Every record damaged: each is named, and no traceback ends the list."""
    folder, path = change_episode(rlds, tmp_path, {})
    for shard in folder.glob("*/*.tfrecord*"):
        shard.write_bytes(b"\0" * 40)
    done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
    assert done.code == 1 and done.text.count("wrong checksum of the record length at byte 0") == 2
    assert "no episode in the shards" in done.text and "Traceback" not in done.text


# ----------------------------------------------------------------------------------------------------------------------
# The check of what the features mean


def run_check(index, capsys, monkeypatch, spec=""):
    """Return (number of errors, printed lines) of the check of an index."""
    monkeypatch.setattr(data, "FORMATS", (as_format(index),))
    config = data.Config(index.directory, str(spec), index.cache)
    errors = check_dataset(config, data.open_dataset)
    return errors, capsys.readouterr().out.splitlines()


def rename(index, kind, old, new):
    """Return the index with a feature under another path."""
    features = {new if path == old else path: feature for path, feature in index.features.items()}
    values = {new if path == old else path: value for path, value in getattr(index, kind).items()}
    return replace(index, features=features, **{kind: values})


def without(index, *paths):
    """Return the index without some features."""
    return replace(index, features={path: f for path, f in index.features.items() if path not in paths})


def with_action(index, dimension, values):
    """Return the index with other values of a dimension of the action."""
    actions = index.columns["action"].copy()
    actions[:, dimension] = values
    return replace(index, columns=index.columns | {"action": actions})


GREY = Feature("image", "uint8", (64, 64, 1))
WIDE = np.zeros((36, 64, 3), np.uint8)
PROPOSED = "no description says what its features mean, and no preset fits"
CANNOT_TRAIN = {
    "no action": (
        lambda i: without(i, "action"),
        PROPOSED,
        "there is no action: the data can only train latent losses",
    ),
    "no state": (lambda i: without(i, "observation/state"), PROPOSED, '"action": ["action"]'),
    "no camera": (lambda i: without(i, "observation/image", "observation/wrist_image"), PROPOSED, "no policy can be"),
    "only the wrist": (lambda i: without(i, "observation/image"), PROPOSED, "the main camera is wrist_image"),
    "only the main": (lambda i: without(i, "observation/wrist_image"), PROPOSED, "the main camera is image"),
    "grey": (
        lambda i: replace(i, features=i.features | {"observation/image": GREY, "observation/wrist_image": GREY}),
        PROPOSED,
        "the cameras are grey; are they no depth?",
    ),
    "actions": (lambda i: rename(i, "columns", "action", "actions"), PROPOSED, '"action": ["actions"]'),
    "another instruction": (
        lambda i: rename(i, "texts", "language_instruction", "observation/natural_language_instruction"),
        PROPOSED,
        '"instruction": "observation/natural_language_instruction"',
    ),
    "instruction": (
        lambda i: rename(i, "texts", "language_instruction", "instruction"),
        PROPOSED,
        '"instruction": "instruction"',
    ),
    "other cameras": (
        lambda i: rename(i, "pictures", "observation/image", "observation/image_primary"),
        PROPOSED,
        "the main camera is image_primary",
    ),
    "two arms": (
        lambda i: replace(
            i,
            columns=i.columns | {"action": np.tile(i.columns["action"], 2)},
            features=i.features | {"action": Feature("number", "float32", (14,))},
        ),
        PROPOSED,
        "dimension 13 of the action is a gripper",
    ),
    "a width": (
        lambda i: with_action(i, 6, np.arange(60) % 2 * 0.08),
        "but its values go from 0 to 0.08",
        '"grippers"',
    ),
    "1 and 0": (
        lambda i: with_action(i, 6, np.arange(60) % 2),
        "but its values go from 0 to 1. Either",
        "leave it out",
    ),
    "an angle": (
        lambda i: with_action(i, 6, np.linspace(-1, 1, 60)),
        "go from -1 to 1 and lie between these in 80% of the steps",
        "leave it out",
    ),
    "wide images": (
        lambda i: replace(i, pictures=dict.fromkeys(i.pictures, WIDE)),
        "cannot be used: it is .36, 64, 3., but the metadata has .64, 64, 3.",
        "",
    ),
    "images that are not square": (
        lambda i: replace(
            i,
            pictures=dict.fromkeys(i.pictures, WIDE),
            features=i.features | dict.fromkeys(i.pictures, Feature("image", "uint8", (36, 64, 3))),
        ),
        "camera image have 36 x 64 pixels. Say how they become square",
        '"pad" (with black), "crop" (the centre) or "squeeze"',
    ),
    "not finite": (lambda i: with_action(i, 2, np.inf), "action of made is inf at step 0 of episode 0", "Repair or"),
}


@pytest.mark.parametrize("oddity", CANNOT_TRAIN)
def test_check_fails_for_what_cannot_train(oddity, tmp_path, capsys, monkeypatch):
    """Exit status 1, and a text that says why and what to do."""
    change, message, remedy = CANNOT_TRAIN[oddity]
    errors, lines = run_check(change(fitting_index(tmp_path, LIBERO)), capsys, monkeypatch)
    text = "\n".join(lines)
    assert errors and lines[0].startswith("error: ")
    assert re.search(message, text), text
    assert remedy in re.sub(r"\[\s+(.*?)\s+\]", r"[\1]", text), text


def first_action_of_nothing(index):
    """Return the index with actions of 0 at the first step of each episode, as BridgeData has them."""
    actions = index.columns["action"].copy()
    actions[[0, 30]] = 0
    actions[1:30, 6], actions[31:, 6] = np.arange(29) % 2, np.arange(29) % 2
    return replace(index, columns=index.columns | {"action": actions})


SMALL = np.zeros((24, 24, 3), np.uint8)
ONE_GRIPPER = {"grippers": [Gripper(6, 1.0, 0.0)]}  # a change of the description
TRAINS = {
    "as it should be": (lambda i: i, {}, []),
    "always open": (lambda i: with_action(i, 6, -1), {}, ["dimension 6 of the action is -1 at all steps"]),
    "depth of 8 bits": (
        lambda i: replace(i, features={"observation/depth": GREY} | i.features),
        {},
        [],
    ),
    "depth of 16 bits": (
        lambda i: replace(i, features={"a": Feature("image", "uint16", (64, 64, 1))} | i.features),
        {},
        [],
    ),
    "1 and 0, described": (lambda i: with_action(i, 6, np.arange(60) % 2), ONE_GRIPPER, []),
    "an angle, described": (
        lambda i: with_action(i, 6, np.linspace(-1, 1, 60)),
        {"grippers": [], "action_names": []},
        [],
    ),
    "two values, no gripper": (
        lambda i: with_action(i, 6, np.arange(60) % 2),
        {"grippers": [], "action_names": []},
        ["dimension 6 of the action has just two values, or is called a gripper, but the description has no such"],
    ),
    "a gripper that rests between": (
        lambda i: with_action(i, 6, np.linspace(0, 1, 60)),
        ONE_GRIPPER,
        ["the gripper, dimension 6 of the action, is neither open nor closed in 80% of the steps; is it one?"],
    ),
    "a rare motion": (
        lambda i: with_action(fitting_index(i.directory, LIBERO, 400), 2, np.arange(400) == 30),
        {},
        ["dimension 2 of the action rarely moves: normalised by its min and max"],
    ),
    "a first action that was never executed": (
        first_action_of_nothing,
        {"grippers": [], "action_names": []},
        [
            "the first action of every episode is 0; if it was never executed, leave that step out",
            "dimension 6 of the action has just two values, or is called a gripper, but the description has no such",
        ],
    ),
    "bounds": (lambda i: i, {"normalisation": "bounds"}, []),
    "absolute targets": (
        lambda i: replace(
            i, columns=i.columns | {"observation/state": np.float32(np.pad(i.columns["action"], ((0, 0), (1, 0))))}
        ),
        {},
        [r'dimensions \[0, 1, 2, 3, 4, 5\] of the action follow the state.*add "absolute": \[0, 1, 2, 3, 4, 5\]'],
    ),
    "absolute targets, described": (
        lambda i: replace(
            i, columns=i.columns | {"observation/state": np.float32(np.pad(i.columns["action"], ((0, 0), (1, 0))))}
        ),
        {"absolute": [0, 1, 2, 3, 4, 5]},
        [],
    ),
    "small images": (
        lambda i: replace(
            i,
            pictures=dict.fromkeys(i.pictures, SMALL),
            features=i.features | dict.fromkeys(i.pictures, Feature("image", "uint8", (24, 24, 3))),
        ),
        {},
        ["camera image has only 24 pixels; train with --image-size 32", "camera wrist_image has only 24 pixels"],
    ),
    "two spellings": (
        lambda i: made_texts(i, ["put it down", "Put it down."] * 30),
        {},
        [r"instructions that differ only in case, blanks or a final dot: \['Put it down.', 'put it down'\]"],
    ),
    "an empty text in the middle": (
        lambda i: made_texts(i, ["put it down"] * 45 + [" "] + ["put it down"] * 14),
        {},
        ["the instruction is empty in 1 episodes, the first is 1"],
    ),
    "no instruction": (lambda i: i, {"instruction": ""}, ["the instruction is empty in 2 episodes, the first is 0"]),
    "bytes for a text": (
        lambda i: made_texts(i, ["put \ufffd down"] * 60),
        {},
        ["an instruction holds bytes that are no UTF-8 text: 'put \ufffd down'"],
    ),
    "no state, described": (lambda i: without(i, "observation/state"), {"state": []}, []),
    "no action, described": (
        lambda i: without(i, "action"),
        {"action": [], "grippers": [], "action_names": []},
        ["there are no actions; only the latent losses can be trained"],
    ),
}


def made_texts(index, texts):
    """Return the index with these instructions, one a step."""
    path = "language_instruction"
    return replace(index, texts={path: made_index(index.directory, texts={path: texts}).texts[path]})


@pytest.mark.parametrize("oddity", TRAINS)
def test_check_passes_what_can_train(oddity, tmp_path, capsys, monkeypatch):
    """Exit status 0; what is odd about it is a warning, and nothing else is."""
    change, fields, warnings = TRAINS[oddity]
    spec = ""
    if fields:
        spec = tmp_path / "mine.json"
        spec.write_text(format_spec(replace(LIBERO, **fields)))
    index = change(fitting_index(tmp_path, LIBERO))
    errors, lines = run_check(index, capsys, monkeypatch, spec)
    assert errors == 0 and len(lines) == len(warnings) + 1, lines
    for line, warning in zip(lines, warnings):
        assert re.search(f"^warning: {tmp_path}: {warning}", line)
    assert re.search(rf"made: (nothing|\d) found in 2 episodes, {len(index)} steps, {2 * len(index)} images", lines[-1])


LABEL_FAULTS = {
    "from 1": (lambda codes: codes + 1, r"error: .*codes go from \d to 16.*; they must be whole numbers from 0 to 15"),
    "1 x 4": (lambda codes: codes[:, None], "made: nothing found"),
    "not whole": (lambda codes: codes + 0.5, "error: .*not all whole; they must be whole"),
}


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_check_reads_the_labels_in_the_data(fault, tmp_path, capsys, monkeypatch):
    """Codes and vectors that the description names; their horizon may come with the training command."""
    change, message = LABEL_FAULTS[fault]
    index = fitting_index(tmp_path, LIBERO)
    codes = np.random.default_rng(0).permutation(np.arange(240) % 16).reshape(60, 4).astype(np.float32)
    columns = {"latent_idx": change(codes), "latent_z": np.ones((60, 512), np.float32)}
    features = {path: Feature("number", "float32", x.shape[1:]) for path, x in columns.items()}
    index = replace(index, columns=index.columns | columns, features=index.features | features)
    errors, lines = run_check(index, capsys, monkeypatch)
    assert errors == lines[0].startswith("error") and re.search(message, lines[0])


def test_check_reads_a_label_file(rlds, index, script_here, tmp_path):
    """Of another number of steps, as one that was made before data was added."""
    import torch

    folder = shutil.copytree(rlds, tmp_path / "made")
    tensors = {"codes": torch.zeros(7, 4, dtype=torch.uint8), "vectors": torch.zeros(7, 4, 2)}
    path = folder / "labels.safetensors"
    save_tensors(path, tensors, data=index.fingerprint, lam="made", delta=5, num_codes=16)
    done = script_here("data.py", folder, "--check", "--cache", tmp_path / "cache")
    assert done.code == 1 and f"error: {path} labels 7 steps, not {len(index)}. Make them again" in done.text


# ----------------------------------------------------------------------------------------------------------------------
# What is in a data set


def test_command_prints_what_is_in_the_data(rlds, dataset, cache, script_here):
    """The description, counts, instructions, ranges and gripper readings as they are, and a picture of each episode."""
    done = script_here("data.py", rlds, "--cache", cache)
    assert done.code == 0, done.text
    lengths = np.diff(dataset.starts)
    assert f"made: 8 episodes, {len(dataset)} steps ({lengths.min()} to {lengths.max()} an episode)" in done.text
    assert f"fingerprint {dataset.fingerprint}" in done.text
    assert f"described by libero:\n{format_spec(dataset.spec)}" in done.text
    for text in ("put the bowl on the stove", "put the bowl on the plate"):
        assert f"4 episodes begin with: '{text}'" in done.text
    assert "camera image (observation/image): 96 x 96 pixels, used as 96 x 96" in done.text
    assert "camera wrist_image (observation/wrist_image): 96 x 96 pixels, used as 96 x 96" in done.text
    unused = re.search("not used: (.*)", done.text)[1].split(", ")
    assert "observation/joint_state" in unused and "action" not in unused and "observation/image" not in unused
    action = dataset.action(slice(None))
    expected = [
        action.min(0),
        np.quantile(action, 0.01, 0),
        action.mean(0),
        np.quantile(action, 0.99, 0),
        action.max(0),
    ]
    table = done.text[done.text.index("  action  ") :].splitlines()[1:8]
    for number, line in enumerate(table):
        values = re.findall(r"-?\d+\.\d+", line)
        assert int(line.split()[0]) == number and np.allclose(
            list(map(float, values)), np.array(expected)[:, number], atol=1e-4
        )
        assert dataset.spec.action_names[number] in line
    assert table[6].endswith("gripper: 1 open (-1 in the data), 0 closed (1) (not normalised)")
    opened = np.mean(action[:, 6] == 1)
    line = f"gripper 0 (dimension 6): open (-1) {opened:.0%}, closed (1) {1 - opened:.0%}, between 0% of the steps"
    assert line in done.text
    with Image.open(done.text.split("contact sheet: ")[1].strip()) as sheet:
        assert sheet.size == (8 * 160, 4 * 160)
        last = np.asarray(Image.fromarray(dataset.image("image", int(dataset.starts[1]) - 1)).resize((160, 160)), int)
        assert np.abs(np.asarray(sheet, int)[160 + 40 : 320, 0:160] - last[40:]).max() == 0  # below its caption


def test_command_shows_what_another_robot_has(odd, tmp_path, script_here):
    """A spec beside the data: padded images, a gripper's width, motions that are rare, and video without actions."""
    folder = shutil.copytree(odd, tmp_path / "odd")
    grip = Gripper(3, 0.08, 0.0)
    spec = DataSpec(
        "mine", {"wide": "observation/wide"}, action=["action/move", "action/grip"], grippers=[grip], text="go"
    )
    (folder / "spec.json").write_text(format_spec(replace(spec, image_fit="pad")))
    done = script_here("data.py", folder, "--cache", tmp_path / "cache")
    assert done.code == 0 and f"described by {folder}/spec.json" in done.text
    assert "camera wide (observation/wide): 24 x 40 pixels, used as 40 x 40" in done.text
    assert "gripper 0 (dimension 3): open (0.08) 44%, closed (0) 56%, between 0% of the steps" in done.text
    assert "3 episodes begin with: 'go'" in done.text
    (folder / "spec.json").write_text(format_spec(DataSpec("film", {"main": "observation/png"}, instruction="said")))
    done = script_here("data.py", folder, "--cache", tmp_path / "cache")
    assert (
        done.code == 0
        and "gripper" not in done.text.split("not used")[0]
        and "1 episodes begin with: 'step 0" in done.text
    )
    assert "step 3 of" in done.text  # a text of a later step
