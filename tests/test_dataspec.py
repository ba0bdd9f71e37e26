"""dataspec.py: what the features of a data set mean, where the description comes from, and what contradicts it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import action_place, as_format, fitting_index, made_index

import data
from batches import action_chunk, chunk_steps
from data import Dataset
from dataspec import PRESETS, DataSpec, Gripper, find_spec, format_spec, propose_spec, read_spec, to_dict
from index import Feature
from normalise import unstandardise

LIBERO = PRESETS["libero"]


def libero_index(folder, gripper=None, **changes):
    """Return an index that has the features of LIBERO. gripper: stored values of the action's last dimension, [60]."""
    index = fitting_index(folder, replace(LIBERO, latents={}))
    if gripper is not None:
        index.columns["action"][:, 6] = gripper
    return replace(index, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# Spec files


def test_spec_survives_its_file(tmp_path):
    """Every preset, written as JSON, is read as it was; what has its default is left out."""
    for name, spec in PRESETS.items():
        (tmp_path / "spec.json").write_text(format_spec(spec))
        assert read_spec(tmp_path / "spec.json") == spec, name
    assert to_dict(DataSpec("bare")) == {"embodiment": "bare", "normalisation": "bounds_q99", "chunk": 8}


WRONG_SPECS = {
    "no object": ([1], "no description of a data set: it must be an object with an 'embodiment'"),
    "no embodiment": ({"chunk": 8}, "it must be an object with an 'embodiment'"),
    "empty embodiment": ({"embodiment": ""}, "embodiment is empty"),
    "unknown field": ({"camera": {}}, "'camera' is not a field of a description; there are embodiment, cameras, state"),
    "text as list": ({"state": "observation/state"}, "state is 'observation/state'; it must be of type list"),
    "list as dict": ({"cameras": ["observation/image"]}, "cameras is .*; it must be of type dict"),
    "camera path": ({"cameras": {"image": 3}}, "cameras is .*; it must hold a name and a feature path for each camera"),
    "part of a number": ({"action": [7]}, r"action is \[7\]; it must hold texts"),
    "part without end": ({"action": ["action[0:"]}, r"'action\[0:' is no part; write a feature path, with \[a:b\]"),
    "part of nothing": ({"action": ["action[3:3]"]}, r"'action\[3:3\]' holds no number"),
    "part backwards": ({"state": ["state[5:2]"]}, r"'state\[5:2\]' holds no number"),
    "gripper as number": ({"grippers": [6]}, "grippers is .*; it must hold for each gripper .*index.*open.*closed"),
    "gripper without end": ({"grippers": [{"index": 6, "open": 1}]}, "grippers is .*; it must hold for each gripper"),
    "gripper with text": ({"grippers": [{"index": "6", "open": 1, "closed": 0}]}, "a dimension and two numbers"),
    "gripper not finite": ({"grippers": [{"index": 6, "open": float("nan"), "closed": 0}]}, "two numbers"),
    "gripper without motion": ({"grippers": [{"index": 6, "open": 1, "closed": 1}]}, "gripper 6 is 1 both open and"),
    "gripper twice": ({"grippers": 2 * [{"index": 6, "open": 1, "closed": 0}]}, "two grippers have the same index"),
    "absolute as text": ({"absolute": ["x"]}, "absolute is .*; it must hold numbers of dimensions"),
    "unchanged as half": ({"unchanged": [0.5]}, "unchanged is .*; it must hold numbers of dimensions"),
    "normalisation": ({"normalisation": "q99"}, "normalisation is 'q99'; choose bounds_q99, bounds, mean_std"),
    "image_fit": ({"image_fit": "stretch"}, "image_fit is 'stretch'; choose pad, crop or squeeze"),
    "chunk of none": ({"chunk": 0}, "chunk is 0; it must be at least 1"),
    "chunk as text": ({"chunk": "8"}, "chunk is '8'; it must be of type int"),
    "chunk as bool": ({"chunk": True}, "chunk is True; it must be of type int"),
    "two instructions": ({"instruction": "task", "text": "do it"}, "both instruction and text are given; choose one"),
    "latents without vectors": (
        {"latents": {"codes": "latent_idx"}},
        'latents is .*; it must hold {"codes", "vectors"}',
    ),
    "latents of text": ({"latents": {"codes": "a", "vectors": "b", "num_codes": "16"}}, "latents is .*num_codes"),
    "latents of no delta": ({"latents": {"codes": "a", "vectors": "b", "delta": 0}}, "latents is .*delta"),
    "names": ({"action_names": [1]}, "action_names is .*; it must hold texts"),
}


@pytest.mark.parametrize("fault", WRONG_SPECS)
def test_wrong_spec_file_is_named(fault, tmp_path):
    """The file, the field, its value and what it must be."""
    content, message = WRONG_SPECS[fault]
    if isinstance(content, dict) and "embodiment" not in fault:
        content = {"embodiment": "mine"} | content
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{path}:? .*{message}"):
        read_spec(path)


def test_file_that_is_no_json_is_named(tmp_path):
    """Cut in the middle, or no text at all."""
    for content in (b'{"embodiment": ', b"\xff\xfe"):
        (tmp_path / "spec.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path}/spec.json is no JSON"):
            read_spec(tmp_path / "spec.json")


DEPTH = Feature("image", "uint16", (64, 64, 1))
MISFITS = {
    "camera missing": (
        {"cameras": {"image": "observation/front"}},
        "camera image reads 'observation/front', which is mi",
    ),
    "camera of numbers": (
        {"cameras": {"image": "action"}},
        "camera image reads 'action', which is number float32 7; it",
    ),
    "16-bit depth": ({"cameras": {"image": "depth"}}, "camera image is image uint16 64 x 64 x 1; it must have 8 bits"),
    "state missing": (
        {"state": ["state"]},
        "state part state reads 'state', which is missing; it must be number. There",
    ),
    "slice too long": ({"state": ["observation/state[0:9]"]}, r"state\[0:9\] does not fit the feature, .*\(8,\)"),
    "part of a picture": (
        {"action": ["observation/image[0:3]"]},
        "which is image uint8 64 x 64 x 3; it must be number",
    ),
    "matrix": ({"state": ["matrix"]}, r"state part matrix has the shape \(2, 3\); it must have one axis"),
    "gripper too large": ({"grippers": [{"index": 7, "open": 1, "closed": 0}]}, r"\[7\], the action has 7"),
    "gripper below": ({"grippers": [{"index": -1, "open": 1, "closed": 0}]}, r"\[-1\], the action has 7"),
    "absolute too large": ({"absolute": [0, 9]}, r"name dimensions \[6, 0, 9\], the action has 7"),
    "unchanged too large": ({"unchanged": [12]}, r"name dimensions \[6, 12\], the action has 7"),
    "gripper of nothing": ({"action": []}, r"name dimensions \[6\], the action has 0"),
    "names of others": ({"action_names": ["x", "y"]}, "action_names are 2, the action has 7 dimensions"),
    "instruction missing": ({"instruction": "task"}, "instruction reads 'task', which is missing; it must be text"),
    "instruction of numbers": ({"instruction": "action"}, "'action', which is number float32 7; it must be text"),
    "latents missing": ({"latents": {"codes": "idx", "vectors": "z"}}, "latents' codes reads 'idx', which is missing"),
}


@pytest.mark.parametrize("fault", MISFITS)
def test_spec_that_does_not_fit_the_features_is_named(fault, tmp_path):
    """The data set, the file, the field, and what there is instead."""
    changes, message = MISFITS[fault]
    index = libero_index(tmp_path)
    index.features |= {"depth": DEPTH, "matrix": Feature("number", "float32", (2, 3))}
    content = to_dict(replace(LIBERO, latents={}, action_names=[])) | changes
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"made, as described by {tmp_path}/mine.json: .*{message}"):
        find_spec(index, tmp_path / "mine.json")


# ----------------------------------------------------------------------------------------------------------------------
# Where the description comes from


def test_first_of_option_file_and_preset_is_used(tmp_path):
    """--spec before spec.json in the folder that was named, before the one in the version folder, before presets."""
    index = libero_index(tmp_path)
    version = tmp_path / "1.0.0"
    version.mkdir()
    folders = (tmp_path, version)
    assert find_spec(index, "", folders) == (replace(LIBERO, latents={}), "libero")
    for folder in (version, tmp_path):
        own = replace(LIBERO, latents={}, embodiment=f"in {folder.name}")
        (folder / "spec.json").write_text(format_spec(own))
        assert find_spec(index, "", folders) == (own, str(folder / "spec.json"))
    chosen = tmp_path / "other.json"
    chosen.write_text(format_spec(replace(LIBERO, latents={}, embodiment="other")))
    assert find_spec(index, chosen, folders)[0].embodiment == "other"
    assert find_spec(index, "jaka", folders)[1] == "jaka" and find_spec(index, "libero", folders)[1] == "libero"
    with pytest.raises(FileNotFoundError, match="spec nowhere.json is neither a file nor a preset; presets are libero"):
        find_spec(index, "nowhere.json", folders)


def test_preset_that_is_not_chosen_is_not_changed(tmp_path):
    """What a run does to its description does not reach the preset."""
    spec, _ = find_spec(libero_index(tmp_path))
    spec.cameras["front"] = "x"
    spec.grippers[0].open = 5.0
    assert list(PRESETS["libero"].cameras) == ["image", "wrist_image"] and PRESETS["libero"].grippers[0].open == -1


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "jaka"])
def test_each_preset_is_found_by_its_features(name, tmp_path):
    """And by nothing else: not with a camera missing, of 16 bits or grey, nor with other sizes of state or action."""
    spec = PRESETS[name]
    index = fitting_index(tmp_path, spec)
    assert find_spec(index) == (replace(spec, latents={}), name)
    camera = list(spec.cameras.values())[-1]
    for feature in (None, DEPTH, Feature("image", "uint8", (64, 64, 1)), Feature("number", "float32", (7,))):
        others = dict(index.features) | {camera: feature}
        changed = replace(index, features={path: other for path, other in others.items() if other})
        with pytest.raises(ValueError, match=f"no description says .* no preset fits .*{name}"):
            find_spec(changed)
    for part in spec.state + spec.action:
        path = part.split("[")[0]
        size = index.features[path].shape[0] + 1
        longer = dict(index.features) | {path: Feature("number", "float32", (size,))}
        with pytest.raises(ValueError, match="no description says"):
            find_spec(replace(index, features=longer))


def test_two_presets_that_fit_are_both_named(tmp_path):
    """Data with the features of two presets: an error that names them, until one is chosen."""
    index = fitting_index(tmp_path, PRESETS["aloha"])
    other = fitting_index(tmp_path, PRESETS["robotwin"])
    both = replace(index, features=index.features | other.features, pictures=index.pictures | other.pictures)
    with pytest.raises(ValueError, match="fits the presets aloha, robotwin; choose one with --spec NAME"):
        find_spec(both)
    assert find_spec(both, "robotwin")[0].cameras == PRESETS["robotwin"].cameras


def test_no_description_ends_in_a_proposal_that_can_be_saved(tmp_path):
    """With all features, what is guessed, and where to save it; with the gripper's ends filled in, it reads the data,
    and not without."""
    index = libero_index(tmp_path)
    features = dict(index.features)
    features["observation/natural_language_instruction"] = features.pop("language_instruction")
    texts = {"observation/natural_language_instruction": index.texts["language_instruction"]}
    index = replace(index, features=features, texts=texts)
    with pytest.raises(ValueError, match="no preset fits") as error:
        find_spec(index)
    text = str(error.value)
    assert "observation/state: number float32 8" in text and "the main camera is image" in text
    assert "dimension 6 of the action is a gripper, from -1 to 1: write which of them is open" in text
    assert f"Save it, corrected, as {tmp_path}/spec.json, or give it with --spec FILE." in text
    proposal = text[text.index("{\n") : text.rindex("\n}") + 2]
    (tmp_path / "spec.json").write_text(proposal)
    with pytest.raises(ValueError, match="grippers is .*'open': None.*a dimension and two numbers, as stored"):
        find_spec(index, "", [tmp_path])
    proposal = proposal.replace('"open": null', '"open": -1').replace('"closed": null', '"closed": 1')
    (tmp_path / "spec.json").write_text(proposal)
    dataset = Dataset(index, *find_spec(index, "", [tmp_path]))
    assert dataset.instruction(0) == "put the bowl on the plate" and dataset.cameras == ["image", "wrist_image"]
    assert dataset.action_size == 7 and dataset.state_size == 8


def test_proposal_is_careful(tmp_path):
    """Wrist cameras come last, depth and 16 bits never, grey only where there is no colour and with a question; parts
    of an action are joined; the state proper comes before other states; no camera is said to be none."""
    colour, grey = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 1), np.uint8)
    columns = {
        "action/turn": np.zeros((60, 3), np.float32),
        "action/grip": np.tile([[0.0], [0.08]], (30, 1)).astype(np.float32),
        "observation/joint_state": np.zeros((60, 7), np.float32),
        "observation/state": np.zeros((60, 9), np.float32),
    }
    pictures = {"a/wrist": colour, "b/front": colour, "a/depth": grey}
    index = made_index(tmp_path, columns, {"x/caption": "go"}, pictures, depth=DEPTH)
    spec, guesses = propose_spec(index)
    assert spec.cameras == {"front": "b/front", "wrist": "a/wrist"} and spec.instruction == "x/caption"
    assert spec.action == ["action/turn", "action/grip"] and spec.state == ["observation/state"]
    (gripper,) = spec.grippers
    assert (gripper.index, gripper.open, gripper.closed) == (3, None, None)
    start = "at the start of 0% of the episodes it is nearer to 0.08"
    assert any("a gripper, from 0 to 0.08: write which" in guess and start in guess for guess in guesses)
    assert any("the action joins action/turn, action/grip in this order" in guess for guess in guesses)
    assert not any("no policy can be trained" in guess or "by name" in guess for guess in guesses)
    spec, guesses = propose_spec(made_index(tmp_path, columns, {}, {"a/left": grey, "b/left": grey}))
    assert spec.cameras == {"a/left": "a/left", "b/left": "b/left"}
    assert any("the cameras are grey; are they no depth?" in guess for guess in guesses)
    spec, guesses = propose_spec(made_index(tmp_path, {"reward": np.zeros(60)}, {}, {}, depth=DEPTH))
    assert not spec.cameras and not spec.action
    assert any("no policy can be trained" in guess for guess in guesses)
    assert any("can only train latent losses" in guess for guess in guesses)


def test_proposal_says_what_it_leaves_out(tmp_path):
    """Actions that are no row of numbers, rows of numbers that may be the state, and depth in colours, the last of the
    cameras; a gripper is known by the path of its own part, too."""
    columns = {
        "action/world_vector": np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32),
        "action/gripper_position": np.linspace(0, 1, 60, dtype=np.float32),
        "observation/qpos": np.zeros((60, 14), np.float32),
        "reward": np.zeros(60, np.float32),
    }
    colour = np.zeros((64, 64, 3), np.uint8)
    unread = {"action/pairs": Feature("number", "float32", (2, 7)), "action/all": Feature("unread", "object", (12,))}
    index = made_index(tmp_path, columns, {}, {"x/depth": colour, "x/image": colour, "x/wrist": colour}, **unread)
    spec, guesses = propose_spec(index)
    assert list(spec.cameras) == ["image", "wrist", "depth"]
    assert spec.action_names == ["world_vector 0", "world_vector 1", "world_vector 2", "gripper_position"]
    assert [gripper.index for gripper in spec.grippers] == [3]
    for text in (
        "by name depth is depth, in 8 bits or in colours",
        "there is no state; is one of these it: observation/qpos?",
        "action/pairs (number float32 2 x 7), action/all (unread object 12) is not taken for an action, which is a row",
    ):
        assert any(guess.startswith(text) for guess in guesses), (text, guesses)


@pytest.mark.parametrize("name, size", (("droid", (180, 320)), ("aloha", (480, 640)), ("robotwin", (240, 320))))
def test_presets_of_robots_with_wide_cameras_say_how_they_become_square(name, size, tmp_path):
    """Their data needs no description, so images of the size that these robots record are used as they come."""
    index = fitting_index(tmp_path, PRESETS[name])
    wide = {path: np.zeros((*size, 3), np.uint8) for path in index.pictures}
    features = index.features | {path: Feature("image", "uint8", (*size, 3)) for path in wide}
    dataset = Dataset(replace(index, pictures=wide, features=features), *find_spec(index))
    assert dataset.image(dataset.cameras[0], 0).shape == (size[1], size[1], 3)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers in every convention


@pytest.mark.parametrize("normalisation", ("bounds_q99", "bounds", "mean_std"))
@pytest.mark.parametrize("name", PRESETS)
def test_physical_actions_survive_the_round_trip(name, normalisation, tmp_path):
    """Stored -> standardised -> normalised -> back -> stored, in every convention: equal to 1e-6 inside the bounds."""
    spec = replace(PRESETS[name], normalisation=normalisation, latents={})
    dataset = Dataset(fitting_index(tmp_path, spec, 400), spec)
    stored = dataset.stored_action(slice(None))
    normaliser = dataset.action_normaliser
    restored = unstandardise(normaliser.unnormalise(normaliser.normalise(dataset.action(slice(None)))), spec.grippers)
    stats = dataset.stats["action"]
    inside = np.ones(len(stored), bool)
    if normalisation == "bounds_q99":
        free = [number for number in range(dataset.action_size) if stats["mask"][number]]
        low, high = (np.array(stats[bound])[free] for bound in ("q01", "q99"))
        inside = ((stored[:, free] >= low) & (stored[:, free] <= high)).all(1)
        assert 0.5 < inside.mean() < 1
    assert np.abs(restored - stored)[inside].max() < 1e-6
    assert (normaliser.normalise(dataset.action(slice(None))) != stored).any()
    for gripper in spec.grippers:
        opening = dataset.action(slice(None))[:, gripper.index]
        assert np.array_equal(opening, stored[:, gripper.index] == np.float32(gripper.open))
        assert np.array_equal(dataset.normalised_action(slice(None))[:, gripper.index], opening)


def test_every_gripper_convention_gives_the_same_targets(tmp_path):
    """-1 and 1, 1 and 0, a width in metres: equal standardised values, statistics and chunks, to the bit."""
    opening = np.arange(60) % 7 < 3
    chunks, statistics = [], []
    for opened, closed in ((-1, 1), (1, -1), (1, 0), (0, 1), (0.08, 0.0)):
        index = libero_index(tmp_path, np.where(opening, opened, closed))
        spec = replace(LIBERO, grippers=[Gripper(6, opened, closed)], latents={})
        dataset = Dataset(index, spec)
        assert np.array_equal(dataset.action(slice(None))[:, 6], opening)
        chunks.append([action_chunk(dataset, *chunk_steps(dataset.starts, step, 8)) for step in (0, 25, 28, 55)])
        statistics.append(dataset.stats)
    for other in range(1, 5):
        assert np.array_equal(chunks[other], chunks[0]) and statistics[other] == statistics[0]


def test_parts_are_joined_in_order(tmp_path):
    """Slices, single numbers, scalars, [n, 1] and [1, n], f64 and integers become one f32 vector."""
    rng = np.random.default_rng(0)
    columns = {
        "a": rng.normal(size=(60, 6)),
        "b": rng.normal(size=60).astype(np.float32),
        "c": rng.integers(-5, 5, (60, 3, 1)),
        "d": rng.normal(size=(60, 1, 2)).astype(np.float32),
    }
    index = made_index(tmp_path, columns)
    spec = DataSpec("mine", action=["a[4:6]", "b", "c", "d[1]"], state=["c[1]", "a"])
    spec, _ = find_spec(index, save(spec, tmp_path))
    dataset = Dataset(index, spec)
    assert (dataset.action_size, dataset.state_size) == (7, 7)
    parts = [columns["a"][:, 4:], columns["b"][:, None], columns["c"][:, :, 0], columns["d"][:, 0, 1:]]
    expected = np.concatenate(parts, 1).astype(np.float32)
    assert dataset.action(slice(None)).dtype == np.float32
    assert np.array_equal(dataset.action(slice(None)), expected)
    assert np.array_equal(dataset.action(np.array([3, 59])), expected[[3, 59]])
    state = np.concatenate([columns["c"][:, 1], columns["a"]], 1).astype(np.float32)
    assert np.array_equal(dataset.state([7]), state[[7]]) and dataset.stats["proprio"]["min"] == state.min(0).tolist()


def save(spec, folder):
    """Write a spec to a file and return its path."""
    path = folder / "mine.json"
    path.write_text(format_spec(spec))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# What a spec says, held against the values

ANGLE = np.sin(np.arange(60))
CONTRADICTIONS = {
    "1 and 0 for -1 and 1": np.arange(60) % 2,
    "a width in metres": np.arange(60) % 2 * 0.08,
    "a small angle": 0.5 * ANGLE,
    "an angle from -1 to 1": ANGLE / np.abs(ANGLE).max(),
    "never an end": np.full(60, 0.2),
    "outside": np.where(np.arange(60) % 2, 1.7, -1),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_gripper_that_contradicts_its_preset_is_refused(name, tmp_path):
    """With its values, both readings, and the description to correct; before training, and by the check."""
    values = np.float32(CONTRADICTIONS[name])
    index = libero_index(tmp_path, values)
    dataset = Dataset(index, *find_spec(index))
    low, high = f"{values.min():g}", f"{values.max():g}"
    with pytest.raises(ValueError) as error:
        dataset.stats  # noqa: B018
    text = str(error.value)
    assert (
        "made, as described by libero: dimension 6 of the action is described as a gripper from 1 (closed) to -1"
        in text
    )
    assert f"its values go from {low} to {high}" in text and "or it is none: leave it out" in text
    assert f'{{"index": 6, "open": {high}, "closed": {low}}} or {{"index": 6, "open": {low}, "closed": {high}}}' in text
    assert "spec.json" in text and format_spec(dataset.spec) in text


@pytest.mark.parametrize("name", ("1 and 0 for -1 and 1", "a width in metres", "an angle from -1 to 1"))
def test_both_readings_of_a_refused_gripper_are_accepted(name, tmp_path):
    """A gripper with the ends that it has, in a description of its own; and none, which is normalised as a motion."""
    values = np.float32(CONTRADICTIONS[name])
    index = libero_index(tmp_path, values)
    own = replace(LIBERO, grippers=[Gripper(6, float(values.max()), float(values.min()))], latents={})
    dataset = Dataset(index, own, "spec.json")
    opening = dataset.action(slice(None))[:, 6]
    assert np.allclose(opening, (values - values.min()) / np.ptp(values), atol=1e-6) and dataset.stats
    dataset = Dataset(index, replace(LIBERO, grippers=[], latents={}), "spec.json")
    assert dataset.stats["action"]["mask"][6] and np.array_equal(dataset.action(slice(None))[:, 6], values)


@pytest.mark.parametrize("value", (-1, 1, -0.98))
def test_gripper_that_stays_at_an_end_is_accepted(value, tmp_path):
    """Always open, always closed, or nearly so."""
    dataset = Dataset(libero_index(tmp_path, np.full(60, value)), LIBERO, "libero")
    assert np.allclose(dataset.action(slice(None))[:, 6], (1 - value) / 2) and dataset.stats


def test_continuous_gripper_of_a_preset_is_accepted(tmp_path):
    """DROID's and ALOHA's grippers are positions between 0 and 1, not commands."""
    index = fitting_index(tmp_path, PRESETS["droid"])
    path, number = action_place(PRESETS["droid"], 7)
    index.columns[path][:, number] = np.linspace(0, 1, 60)
    dataset = Dataset(index, *find_spec(index))
    assert dataset.stats and np.allclose(dataset.action(slice(None))[:, 7], np.linspace(1, 0, 60), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_images_that_are_not_square_need_a_choice(tmp_path, monkeypatch):
    """An error with the description to complete; then padded with black, cropped to the centre, or as they are."""
    wide = np.arange(36 * 64 * 3).reshape(36, 64, 3).astype(np.uint8)
    tall = wide.transpose(1, 0, 2).copy()
    index = made_index(tmp_path, {}, {}, {"wide": wide, "tall": tall})
    monkeypatch.setattr(data, "FORMATS", (as_format(index),))
    spec = DataSpec("mine", cameras={"wide": "wide", "tall": "tall"})
    message = "camera wide have 36 x 64 pixels. Say how they become square: .*pad.*crop.*squeeze.*embodiment"
    with pytest.raises(ValueError, match="(?s)" + message):
        data.open_dataset(tmp_path, spec=save(spec, tmp_path))
    opened = {
        fit: data.open_dataset(tmp_path, spec=save(replace(spec, image_fit=fit), tmp_path))
        for fit in ("pad", "crop", "squeeze")
    }
    padded = opened["pad"].image("wide", 5)
    assert padded.shape == (64, 64, 3) and np.array_equal(padded[14:50], wide)
    assert not padded[:14].any() and not padded[50:].any()
    padded = opened["pad"].image("tall", 5)
    assert np.array_equal(padded[:, 14:50], tall) and not padded[:, :14].any() and not padded[:, 50:].any()
    assert np.array_equal(opened["crop"].image("wide", 5), wide[:, 14:50])
    assert np.array_equal(opened["crop"].image("tall", 5), tall[14:50])
    assert np.array_equal(opened["squeeze"].image("wide", 5), wide)
    assert opened["pad"].storage_options("wide")["size"] == 64 and opened["crop"].storage_options("wide")["size"] == 36
    assert opened["squeeze"].storage_options("wide")["size"] == [36, 64]


def test_grey_is_a_camera_only_by_an_explicit_spec(tmp_path):
    """Repeated to three channels; no preset takes it."""
    grey = np.arange(64 * 64).reshape(64, 64, 1).astype(np.uint8)
    index = made_index(tmp_path, {}, {}, {"front": grey})
    spec, _ = find_spec(index, save(DataSpec("mine", cameras={"main": "front"}), tmp_path))
    assert np.array_equal(Dataset(index, spec).image("main", 0), np.repeat(grey, 3, 2))
