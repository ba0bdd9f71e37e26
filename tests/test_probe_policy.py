"""probe_policy.py: the way to a grasp by hand, what is left without the images, whose episodes, the table of a run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare
import probe_policy
import train
from batches import ActionChunks, EpisodeSteps
from common import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


def test_way_ends_where_the_gripper_changes_next():
    """Sums of the actions until then, within the episode; small motions of the gripper are none."""
    x = np.array([1.0, 2, 3, 4, 5, 6, 7])
    opening = np.array([1, 0.9, 0, 0, 1, 1, 1.0])  # an episode of five steps, one of two
    actions = np.stack([x, -x, 0 * x, opening], 1)

    class Made:
        starts = np.array([0, 5, 7])
        spec = SimpleNamespace(grippers=[SimpleNamespace(index=3)])

        def __len__(self):
            return len(actions)

        def action(self, steps):
            return actions[steps]

        stored_action = action

    way, changes = probe_policy.way_to_change(Made())
    assert changes.tolist() == [True, True, True, True, False, False, False]
    assert way[:4, 0].tolist() == [3, 2, 7, 4] and way[:4, 1].tolist() == [-3, -2, -7, -4]


def test_only_what_the_images_show_counts(dataset):
    """Of a target that follows from instruction, step number and gripper, nothing is left; of one that differs by
    episode, that difference is."""
    known = probe_policy.known_without_images(dataset)
    steps = np.arange(len(dataset))
    episodes = probe_policy.episodes_of(dataset, steps)
    number = steps - dataset.starts[episodes]
    first = np.array([dataset.instruction(step) for step in steps]) == dataset.instructions()[0]
    opening = dataset.action(steps)[:, 6]
    alike = np.where(first, 3 * number - 0.2 * number**2, 5.0) + number * opening * first
    differs = np.random.default_rng(0).normal(size=dataset.num_episodes)[episodes]
    left = probe_policy.residuals(known, np.stack([alike, alike + differs], 1), episodes, np.arange(4))
    assert left[:, 0].std() < 0.05 * alike.std()
    assert np.corrcoef(left[:, 1], differs)[0, 1] > 0.7


PLATE = {"instructions": ("put the bowl on the plate",), "val_fraction": 0.4}


@pytest.mark.parametrize("settings", ({"episodes": 1}, {}, PLATE))
def test_table_of_a_run(settings, train_config, tmp_path):
    """Its own episodes are those of the training, the held-out ones of the same instructions; the errors are what
    training would measure; R2 is near 1 from the targets themselves and near 0 from noise."""
    config = train_config(tmp_path / "run", variant="la_align", max_steps=2, **settings)
    setup = prepare.prepare(config, ONE, set())
    folder = train.main(train_config(tmp_path / "again", variant="la_align", max_steps=2, **settings))
    asked = probe_policy.Config((folder,), cache=config.cache)
    run = probe_policy.open_run(folder, asked)
    assert run.own.tolist() == setup.dataset.sources[0].episodes.tolist()
    for number, steps in setup.held_out:
        assert {steps[k] for k in range(len(steps))} <= set(probe_policy.episode_steps(run.dataset, run.held_out))
    texts = settings.get("instructions", run.dataset.instructions())
    assert all(run.dataset.instruction(run.dataset.starts[e]) in texts for e in run.held_out)
    samples = ActionChunks([run.dataset], [run.dataset.cameras], setup.vla.config.chunk)
    (row,) = probe_policy.main(asked)
    assert row["updates"] == "2" and ("L1 rest" in row) and (row["L1 rest"] != "") == ("episodes" in settings)
    for head, part in (("own", run.own), ("rest", run.rest), ("held out", run.held_out)):
        if len(part):
            places = [(0, EpisodeSteps(run.dataset.starts, part))]
            expected = train.validate(run.vla, samples, places, ONE, samples=10**6)
            assert float(row[f"L1 {head}"].split()[0]) == pytest.approx(expected, abs=1e-4)
    targets = probe_policy.probe_targets(run.dataset, samples.chunk)
    states = np.random.default_rng(0).normal(size=(len(run.dataset), 9))
    split = run.own, np.concatenate([run.rest, run.held_out])
    noise = probe_policy.probe_states(run.dataset, targets, states, *split)
    for column, (values, known, at) in enumerate(targets.values()):
        left = probe_policy.residuals(known, values, probe_policy.episodes_of(run.dataset, at), run.own)
        states[at, 3 * column : 3 * column + 3] = left
    known = probe_policy.probe_states(run.dataset, targets, states, *split)
    assert min(known.values()) > 0.9 and max(noise.values()) < 0.1


def test_runs_that_cannot_be_probed(train_config, tmp_path):
    """Nothing to fit on, another description, no run, no label file: each is said before anything is computed."""
    config = train_config(tmp_path / "run", variant="la_direct", max_steps=1, episodes=1, rest="video")
    folder = train.main(config)
    asked = probe_policy.Config((folder,), cache=config.cache)
    content = json.loads((folder / "config.json").read_text())

    def refuses(kind, expected, **changes):
        changed = {"train": content["train"] | changes.get("train", {})}
        changed["data"] = [content["data"][0] | changes.get("data", {})] * changes.get("sets", 1)
        (folder / "config.json").write_text(json.dumps(content | changed))
        with pytest.raises(kind, match=expected):
            probe_policy.open_run(folder, asked)

    refuses(ValueError, "had the actions of 0 episodes of 8", train={"episodes": 0, "data_fraction": 0})
    refuses(ValueError, "trained on made, made; only runs on one", sets=2)
    refuses(ValueError, "trained with a different description", data={"statistics": "x"})
    refuses(ValueError, "trained on a different made than", data={"fingerprint": "x"})
    with pytest.raises(FileNotFoundError, match="it is not a run that train.py saved"):
        probe_policy.open_run(tmp_path, asked)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="there is no label file"):
        probe_policy.main(probe_policy.Config((folder,), labels=tmp_path / "no.safetensors", cache=config.cache))
