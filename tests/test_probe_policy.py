"""probe_policy.py: the way to a grasp by hand, which episodes had actions, and the table of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare
import probe_policy
import train
from batches import EpisodeSteps
from common import Ranks
from policy import load_vla

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


def test_probe_finds_what_states_hold_on_other_episodes():
    """A target that is linear in the states has R2 1, one that has nothing to do with them about 0; steps without a
    target do not count."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 4))
    known = np.arange(300) % 3 > 0
    linear = states @ rng.normal(size=(4, 5))
    linear[~known] = 1e6
    episodes = np.repeat(np.arange(10), 30)
    targets = {"linear": (linear, known, episodes), "noise": (rng.normal(size=(300, 5)), known, episodes)}
    found = probe_policy.probe_states(states, targets, (np.arange(6), np.arange(6, 10)))
    assert found["linear"] > 0.999 and abs(found["noise"]) < 0.1


@pytest.mark.parametrize("settings", ({"episodes": 1}, {}, {"instructions": ("put the bowl on the plate",)}))
def test_table_of_a_run(settings, train_config, tmp_path):
    """The episodes with actions are those of the training; the error on the others is what training would measure."""
    config = train_config(tmp_path / "run", variant="baseline", max_steps=2, **settings)
    setup = prepare.prepare(config, ONE, set())
    (dataset,) = setup.dataset.datasets
    run = train.main(train_config(tmp_path / "again", variant="baseline", max_steps=2, **settings))
    vla, content = load_vla(run)
    own, others = probe_policy.split_of_run(content["train"], dataset)
    assert own.tolist() == setup.dataset.sources[0].episodes.tolist()
    assert sorted([*own, *others]) == list(range(dataset.num_episodes))
    samples = probe_policy.ActionChunks([dataset], [list(content["data"][0]["cameras"])], content["model"]["chunk"])
    (row,) = probe_policy.main(probe_policy.Config((run,), cache=config.cache))
    for head, part in (("L1 on them", own), ("on others", others)):
        expected = train.validate(vla, samples, [(0, EpisodeSteps(dataset.starts, part))], ONE, samples=10**6)
        assert float(row[head]) == pytest.approx(expected, abs=1e-4)
    assert row["episodes with actions"] == str(len(own))
