"""Other robots, several robots at once, and video without actions: from the data to a policy's actions."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from robot_helpers import write_five_joints, write_labels, write_robot, write_two_arms, write_videos
from torch.utils.data import default_collate

import batches
import common
import eval as evaluation
import prepare
import train
import train_latent
from curves import read_log
from data import open_dataset
from files import load_tensors, save_tensors
from model import VARIANTS
from policy import Policy

ONE = common.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    """Folders of `write_two_arms` and `write_five_joints`."""
    folder = tmp_path_factory.mktemp("robots")
    return {"two_arms": write_two_arms(folder / "two_arms"), "five_joints": write_five_joints(folder / "five_joints")}


@pytest.fixture(scope="module")
def made(robots, cache, tmp_path_factory):
    """{name: (data set, label file)} of the robots."""
    folder = tmp_path_factory.mktemp("labels")
    datasets = {name: open_dataset(path, cache) for name, path in robots.items()}
    return {name: (each, write_labels(each, folder / f"{name}.safetensors")) for name, each in datasets.items()}


@pytest.fixture(scope="module")
def action_tokenizer(robots, cache, tmp_path_factory):
    """Function (names of robots) -> folder of an action tokenizer of them that was trained for two updates."""
    folders = {}

    def make(*names):
        if names not in folders:
            out = tmp_path_factory.mktemp("tokenizer") / "_".join(names)
            chunk = 25 if "two_arms" in names else 20
            config = train_latent.TokenizerTraining(
                data=[robots[name] for name in names],
                out=out,
                cache=cache,
                chunk=chunk,
                max_steps=2,
                global_batch_size=8,
                num_codes=16,
                code_dim=8,
            )
            train_latent.train(config, ONE)
            folders[names] = out
        return folders[names]

    return make


@pytest.fixture(scope="module")
def config_for(robots, made, cache, action_tokenizer):
    """Function (names of robots, out, **changes) -> train.Config of a run of seconds."""

    def make(names, out, **changes):
        options = dict(
            data=tuple(robots[name] for name in names),
            labels=tuple(made[name][1] for name in names),
            cache=cache,
            out=str(out),
            global_batch_size=4,
            num_workers=0,
            max_steps=2,
            val_fraction=0.25,
            image_size=32,
        )
        if changes.get("variant") == "la_tok":
            options["tokenizer"] = str(action_tokenizer(*names))
        return train.Config(**options | changes)

    return make


def observe(dataset, step, read=None):
    """Return what a policy of a data set gets at a step. read(camera) -> image (default: as training reads it)."""
    images = {camera: (read or dataset.image)(camera, step) for camera in dataset.cameras}
    return {"images": images, "state": dataset.state([step])[0], "instruction": dataset.instruction(step)}


# ----------------------------------------------------------------------------------------------------------------------
# One robot


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ("two_arms", "five_joints"))
def test_any_robot_goes_the_whole_way(name, variant, config_for, made, tmp_path):
    """Trained, saved, loaded, it predicts whole chunks in the data's own convention, from raw images of any size."""
    train.main(config_for([name], tmp_path / "run", variant=variant))
    policy = Policy(tmp_path / "run")
    dataset, _ = made[name]
    sizes = policy.vla.config
    expected = (25, 14, 14, 3) if name == "two_arms" else (20, 5, 0, 1)
    assert (sizes.chunk, sizes.action_size, sizes.proprio_size, sizes.cameras) == expected

    def as_the_camera_gives_it(camera, step):
        return dataset.index.image(dataset.spec.cameras[camera], step)

    actions = policy(observe(dataset, 3, as_the_camera_gives_it))
    assert actions.shape == expected[:2] and np.isfinite(actions).all()
    batch = default_collate([prepared(config_for([name], tmp_path / "again", variant=variant)).dataset.sample(0, 3)])
    with torch.no_grad():
        normalised, _ = policy.vla.predict(batch)
    physical = dataset.action_normaliser.unnormalise(normalised.numpy())
    # these grippers are 1 open and 0 closed in the data, too
    assert np.allclose(actions, physical[0].clip(*policy.action.limits), atol=1e-5)


def prepared(config):
    """Return what train.py prepares for a run."""
    return prepare.prepare(config, ONE, train.FREE_TO_CHANGE)


def test_targets_past_the_end_repeat_only_where_they_last(made):
    """Absolute joint targets and grippers keep their last value, relative motion becomes 0; both count in no loss."""
    for name, lasting in (("two_arms", True), ("five_joints", False)):
        dataset, _ = made[name]
        chunks = batches.ActionChunks([dataset], [dataset.cameras], dataset.spec.chunk)
        last = int(dataset.starts[1]) - 1
        item = chunks.sample(0, last - 2)
        assert item["valid"].tolist() == [True] * 3 + [False] * (dataset.spec.chunk - 3)
        expected = item["actions"][2] if lasting else torch.zeros(5)
        assert (item["actions"][3:] == expected).all() and item["actions"][2].abs().max() > 0


def test_images_that_are_not_square_are_padded_in_training_and_in_the_policy(made):
    """A 48 x 64 frame lies in the middle of 64 x 64 pixels, black above and below."""
    dataset, _ = made["two_arms"]
    frame = dataset.image("left", 4)
    stored = dataset.index.image("observation.images.left", 4)
    assert frame.shape == (64, 64, 3) and np.array_equal(frame[8:56], stored)
    assert not frame[:8].any() and not frame[56:].any()


def test_frame_of_another_shape_is_made_square_as_in_training_or_refused(config_for, made, tmp_path):
    """Padded where the description says so; where it says nothing, the error names the camera, both sizes and it."""
    train.main(config_for(["five_joints"], tmp_path / "run", variant="baseline"))
    policy = Policy(tmp_path / "run")
    observation = observe(made["five_joints"][0], 3)
    observation["images"]["front"] = observation["images"]["front"][:40, :30]
    with pytest.raises(ValueError, match='(?s)image of front has 40 x 30 pixels, .* had 64 x 64: pad or crop.*"front"'):
        policy(observation)
    train.main(config_for(["two_arms"], tmp_path / "arms", variant="baseline"))
    dataset, _ = made["two_arms"]
    policy = Policy(tmp_path / "arms")
    frame = dataset.index.image("observation.images.left", 4)
    assert frame.shape == (48, 64, 3) and np.array_equal(policy.stored("left", frame), dataset.image("left", 4))


def test_images_that_are_squeezed_keep_their_stored_size(config_for, robots, cache, tmp_path):
    """Of a frame of their shape, or of another: both in one batch."""
    folder = shutil.copytree(robots["two_arms"], tmp_path / "two_arms")
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"image_fit": "squeeze"}))
    train.main(config_for(["two_arms"], tmp_path / "run", variant="baseline", data=(folder,)))
    policy = Policy(tmp_path / "run")
    observation = observe(open_dataset(folder, cache), 3)
    square = np.zeros((90, 90, 3), np.uint8)
    assert policy.stored("left", observation["images"]["left"]).shape == (48, 64, 3)
    assert policy.stored("left", square).shape == (48, 64, 3)
    other = observation | {"images": observation["images"] | {"left": square}}
    assert policy([observation, other]).shape == (2, 25, 14)


# ----------------------------------------------------------------------------------------------------------------------
# Several robots


def test_samples_of_two_robots_are_those_of_each_alone(made):
    """Padded with 0 to the largest sizes; cameras that a robot lacks are black and not counted; weights make the mean
    over A numbers that over its own."""
    datasets = [made[name][0] for name in ("two_arms", "five_joints")]
    together = batches.ActionChunks(datasets, [each.cameras for each in datasets], 8)
    for number, dataset in enumerate(datasets):
        alone = batches.ActionChunks([dataset], [dataset.cameras], 8).sample(0, 11)
        item = together.sample(number, 11)
        size = dataset.action_size
        assert torch.equal(item["actions"][:, :size], alone["actions"]) and not item["actions"][:, size:].any()
        assert torch.equal(item["proprio"][: dataset.state_size], alone["proprio"])
        assert item["action_weight"].sum() == 14 and (item["action_weight"][:size] == 14 / size).all()
        assert item["embodiment"] == number and item["num_cameras"] == len(dataset.cameras)
        for camera in range(3):
            if camera >= len(dataset.cameras):
                assert not item["images"][camera].any()
        assert [image.shape for image in item["images"]] == [(64, 64, 3), (64, 64, 3), (40, 40, 3)]


@pytest.mark.parametrize("variant", ("la_cond", "la_tok"))
def test_two_robots_train_one_policy(variant, config_for, made, tmp_path):
    """The log has the losses of each; each robot's policy has its own sizes, statistics and convention."""
    names = ["two_arms", "five_joints"]
    train.main(config_for(names, tmp_path / "run", variant=variant, chunk=25, max_steps=4, data_weights=(1.0, 2.0)))
    log = read_log(tmp_path / "run")
    for entry in log:
        shares = {name: entry[f"action_loss/{name}"] for name in names if f"action_loss/{name}" in entry}
        assert shares and all(f"latent_loss/{name}" in entry for name in shares)
        assert (
            min(shares.values()) <= entry["action_loss"] + 1e-6 and entry["action_loss"] <= max(shares.values()) + 1e-6
        )
    for name in names:
        dataset, _ = made[name]
        policy = Policy(tmp_path / "run", name)
        assert policy(observe(dataset, 3)).shape == (25, dataset.action_size)
    with pytest.raises(ValueError, match="has statistics of .*choose one of them"):
        Policy(tmp_path / "run")


def test_held_out_error_is_a_mean_over_an_even_choice_of_both_robots_steps(made):
    """Every 12th step of 128, counted on from one data set to the next; own dimensions, and steps before the end."""
    datasets = [made[name][0] for name in ("two_arms", "five_joints")]
    chunks = batches.ActionChunks(datasets, [each.cameras for each in datasets], 8)
    held_out = [(number, batches.EpisodeSteps(each.starts, [1, 3])) for number, each in enumerate(datasets)]
    places = [(number, step) for number, steps in held_out for step in steps]
    values = []
    for number, step in places[:: len(places) // 10]:
        item = chunks.sample(number, step)
        values.append(item["actions"][item["valid"], : datasets[number].action_size].abs().flatten())
    still = SimpleNamespace(
        eval=lambda: None, train=lambda: None, predict=lambda batch: (torch.zeros_like(batch["actions"]), None)
    )
    found = train.validate(still, chunks, held_out, ONE, batch_size=4, samples=10)
    assert found == pytest.approx(torch.cat(values).mean().item())


def test_data_sets_of_one_robot_must_agree(robots, config_for, tmp_path):
    """Two sets of one embodiment with other sizes are refused, with both sizes."""
    spec = json.loads((robots["five_joints"] / "spec.json").read_text()) | {"embodiment": "two_arms"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    config = config_for(["two_arms", "five_joints"], tmp_path / "run", spec=("", str(tmp_path / "spec.json")), chunk=8)
    with pytest.raises(ValueError, match=r"both described as 'two_arms', but their cameras are \['front'\] and \['top"):
        train.main(config)
    spec = json.loads((robots["five_joints"] / "spec.json").read_text()) | {"normalisation": "mean_std"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    copy = shutil.copytree(robots["five_joints"], tmp_path / "copy")
    twice = config_for(["five_joints"], tmp_path / "run", spec=("", str(tmp_path / "spec.json")), labels=())
    with pytest.raises(ValueError, match="normalisations are mean_std and bounds_q99"):
        train.main(replace(twice, data=(*twice.data, copy)))
    with pytest.raises(ValueError, match="different chunks, {'two_arms': 25, 'five_joints': 20}; choose one"):
        train.main(config_for(["two_arms", "five_joints"], tmp_path / "run"))


def test_weight_that_leaves_nothing_is_refused(config_for, tmp_path):
    """So small a weight that no step is ever drawn, which would be as if the data were not there."""
    names = ["two_arms", "five_joints"]
    with pytest.raises(
        ValueError, match="five_joints has so small a weight, 0.0004, that no step of it is in an epoch"
    ):
        train.main(config_for(names, tmp_path / "run", variant="la_cond", chunk=25, data_weights=(1.0, 0.0004)))


# ----------------------------------------------------------------------------------------------------------------------
# Video without actions


@pytest.mark.parametrize("options, labelled, video", (
    ({}, 12, 0),
    ({"episodes": 2}, 4, 0),
    ({"episodes": 2, "rest": "video"}, 4, 8),
    ({"data_fraction": 0.5, "rest": "video"}, 6, 6),
    ({"data_fraction": 0.01, "rest": "video"}, 2, 10),
    ({"data_fraction": 7 / 6 - 1, "rest": "video"}, 2, 10),
    ({"data_fraction": 0.0, "rest": "video"}, 0, 12),
))  # fmt: skip
def test_which_episodes_keep_their_actions(options, labelled, video, tmp_path, cache):
    """So many of each of two instructions, the same for one seed, others for another; the rest is video or gone."""
    folder = write_robot(tmp_path / "arm", lambda t, n: [np.sin(t), n], 2, {"front": (32, 32)}, episodes=12, length=6)
    dataset = open_dataset(folder, cache)
    config = train.Config(variant="la_direct", **options)
    sources = prepare.make_sources(config, [dataset], [np.arange(12)])
    found = {source.labelled: source.episodes.tolist() for source in sources}
    kept, rest = found.get(True, []), found.get(False, [])
    assert (len(kept), len(rest)) == (labelled, video) and not set(kept) & set(rest)
    texts = [dataset.instruction(dataset.starts[episode]) for episode in kept]
    assert len({texts.count(text) for text in set(texts)}) <= 1
    again = prepare.make_sources(config, [dataset], [np.arange(12)])
    assert [source.episodes.tolist() for source in again] == [source.episodes.tolist() for source in sources]
    if 0 < labelled < 12:
        seeds = [prepare.make_sources(train.Config(variant="la_direct", seed=s, **options), [dataset], [np.arange(12)])
                 for s in range(4)]  # fmt: skip
        assert len({tuple(each[0].episodes) for each in seeds}) > 1


def test_no_episode_of_video_is_held_out(config_for, robots, made, cache, tmp_path):
    """Of data without actions nothing is measured, so all of it is trained on; of other data a part is held out."""
    folder = write_videos(tmp_path / "video")
    labels = write_labels(open_dataset(folder, cache), tmp_path / "labels.safetensors")
    both = {"data": (robots["five_joints"], folder), "labels": (made["five_joints"][1], labels)}
    setup = prepare.prepare(config_for(["five_joints"], tmp_path / "run", variant="la_direct", **both), ONE, set())
    assert [source.episodes.tolist() for source in setup.dataset.sources if not source.labelled] == [[0, 1]]
    assert len(setup.dataset.sources[0].episodes) < made["five_joints"][0].num_episodes


@pytest.mark.parametrize("variant, options, saw, expected", (
    ("la_direct", {"episodes": 1}, "yes", "five_joints: the latent model behind the labels learned from actions"),
    ("la_direct", {"data_fraction": 0.5}, None, "the labels may have learned from actions"),
    ("la_direct", {"episodes": 1}, "no", ""),
    ("la_direct", {}, "yes", ""),
    ("la_tok", {"episodes": 1}, "no", "the action tokenizer may have learned from the episodes whose actions"),
    ("la_tok", {}, "no", ""),
    ("baseline", {"episodes": 1}, "yes", ""),
))  # fmt: skip
def test_targets_that_know_actions_are_named(variant, options, saw, expected, config_for, made, tmp_path, capsys):
    """Where actions are taken away: labels by what their file says, the tokenizer in any case."""
    tensors, info = load_tensors(made["five_joints"][1])
    save_tensors(tmp_path / "labels", tensors, **info | ({"saw_actions": saw} if saw else {}))
    options = {"variant": variant, "labels": (tmp_path / "labels",)} | options
    prepare.prepare(config_for(["five_joints"], tmp_path / "run", **options), ONE, set())
    said = re.findall("WARNING: .* learned from .*", capsys.readouterr().out)
    assert len(said) == bool(expected) and all(expected in text for text in said)


def test_share_of_video_does_not_change_the_scale_of_the_action_loss(made):
    """Over an epoch the mean of the weighted errors is that of the labelled samples alone, whatever share is video."""
    dataset, _ = made["five_joints"]
    means = []
    for weight in (0.0, 0.5, 3.0):
        sources = [batches.Source(0, np.array([0, 2])), batches.Source(0, np.array([1, 3]), weight, labelled=False)]
        chunks = batches.ActionChunks([dataset], [dataset.cameras], 8, sources=sources)
        items = [chunks.sample(*chunks.place(position)) for position in range(chunks.epoch_length)]
        means.append(np.mean([(item["actions"].abs() * item["action_weight"]).mean() for item in items]))
        video = [item for item in items if not item["action_weight"].any()]
        assert len(video) == round(weight * 64) and all(not item["actions"].any() for item in video)
    assert means[1] == pytest.approx(means[0], rel=1e-5) and means[2] == pytest.approx(means[0], rel=1e-5)


def test_batches_without_any_action_train_in_one_process_and_two(config_for, robots, made, cache, script, tmp_path):
    """la_direct on video alone: the latent loss falls in, the action loss is 0, the head stays; two processes agree."""
    video = dict(variant="la_direct", data_fraction=0.0, rest="video", max_steps=3)
    train.main(config_for(["five_joints"], tmp_path / "one", **video))
    one = read_log(tmp_path / "one")
    assert all(entry["action_loss"] == 0 and entry["latent_loss"] > 0 for entry in one)
    assert "val_action_l1" not in one[-1]
    command = [
        "train.py",
        "--variant",
        "la_direct",
        "--data",
        robots["five_joints"],
        "--labels",
        made["five_joints"][1],
    ]
    command += ["--cache", cache, "--data-fraction", 0, "--rest", "video", "--max-steps", 3, "--global-batch-size", 4]
    command += ["--val-fraction", 0.25, "--image-size", 32, "--num-workers", 0, "--out", tmp_path / "two"]
    done = script(*command, ranks=2)
    assert done.code == 0, done.text
    two = read_log(tmp_path / "two")
    assert np.allclose([e["latent_loss"] for e in two], [e["latent_loss"] for e in one], rtol=1e-4)
    assert [e["skipped"] for e in two] == [0, 0, 0]


@pytest.mark.parametrize("variant", ("baseline", "la_tok"))
def test_video_is_refused_where_nothing_learns_from_it(variant, config_for, tmp_path):
    """The variant, the data and the variants that do learn are named."""
    with pytest.raises(
        ValueError, match=f"variant {variant} learns nothing .*five_joints.*la_align, la_direct, la_cond"
    ):
        train.main(config_for(["five_joints"], tmp_path / "run", variant=variant, episodes=1, rest="video"))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_run_of_another_robot_is_refused_before_anything_is_opened(config_for, tmp_path):
    """Even if its weights are gone: the robot and the simulator's are named."""
    train.main(config_for(["two_arms"], tmp_path / "run", variant="baseline"))
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"trained on two_arms \(a two_arms\), but simulator libero is a libero"):
        evaluation.main(evaluation.Config(run=str(tmp_path / "run")))


def test_instruction_that_was_never_trained_on_is_named(capsys):
    """With the closest that was: a capital letter or a final dot makes another instruction."""
    evaluation.warn_of_new_instructions(
        {"put the bowl on the plate", "stack the cups"}, ["Put the bowl on the plate.", "stack the cups"]
    )
    text = capsys.readouterr().out
    assert (
        "gets the instruction 'put the bowl on the plate'" in text
        and "closest one was 'Put the bowl on the plate.'" in text
    )
    assert "stack" not in text
