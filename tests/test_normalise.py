"""normalise.py against numpy and examples worked by hand."""

import numpy as np
from data_helpers import make_chunks

from normalise import normalise, standardise, to_robosuite, unnormalise


def test_statistics_equal_numpy_over_all_steps(index, stats):
    """Mean, standard deviation, bounds and quantiles of the standardised actions and of the state."""
    action = np.array(index.columns["action"], np.float64)
    action[:, 6] = np.where(action[:, 6] > 0, 0.0, 1.0)  # closed 0, open 1
    for column, x in ((stats["action"], action), (stats["proprio"], np.float64(index.columns["state"]))):
        ordered = np.sort(x, 0)
        n = len(x)
        mean = x.sum(0) / n
        assert np.allclose(column["mean"], mean)
        assert np.allclose(column["std"], np.sqrt(((x - mean) ** 2).sum(0) / n))
        assert np.allclose(column["min"], ordered[0]) and np.allclose(column["max"], ordered[-1])
        for name, share in (("q01", 0.01), ("q99", 0.99)):  # linear between the order statistics
            place = share * (n - 1)
            low = int(place)
            part = place - low
            assert np.allclose(column[name], ordered[low] * (1 - part) + ordered[low + 1] * part)
    assert stats["action"]["mask"] == [True] * 6 + [False] and "mask" not in stats["proprio"]
    assert stats["num_transitions"] == len(index) and stats["num_trajectories"] == 8


def test_normalise_by_hand():
    """Bounds go to -1 and 1 and clip; a constant dimension becomes 0; an unmasked one passes."""
    column = {
        "q01": [-2.0, 3.0, 0.0],
        "q99": [2.0, 3.0, 1.0],
        "min": [-9.0, 3.0, 0.0],
        "max": [9.0, 3.0, 1.0],
        "mask": [True, True, False],
    }
    x = np.array([[-2.0, 3.0, 0.0], [1.0, 3.0, 1.0], [7.0, 3.0, 0.25]])
    normalised = np.array([[-1.0, 0.0, 0.0], [0.5, 0.0, 1.0], [1.0, 0.0, 0.25]])
    clipped = np.array([[-2.0, 3.0, 0.0], [1.0, 3.0, 1.0], [2.0, 3.0, 0.25]])
    assert np.allclose(normalise(x, column), normalised, atol=1e-6)
    assert np.allclose(unnormalise(normalised, column), clipped, atol=1e-6)


def test_normalise_round_trip_on_the_data(index, stats):
    """Inside the bounds un-normalising gives the physical values back, constant dimension and gripper included."""
    action = standardise(index.columns["action"])
    inside = np.clip(action, stats["action"]["q01"], stats["action"]["q99"])
    normalised = normalise(action, stats["action"])
    restored = unnormalise(normalised, stats["action"])
    assert np.allclose(restored, inside, atol=1e-6) and np.array_equal(restored[:, 6], action[:, 6])
    assert (normalised[:, 3] == 0).all()


def test_gripper_keeps_its_sign_through_the_whole_chain(index, stats):
    """Stored +1 (close) is +1 for the simulator after standardise, normalise, sample, un-normalise and to_robosuite."""
    stored = index.columns["action"][:, 6]
    assert set(stored) == {-1.0, 1.0}
    chunks = make_chunks(index, stats, chunk=1)
    for step in (0, int(index.starts[1]) - 1, len(index) - 1):
        actions = chunks.sample(0, step)["actions"].numpy()
        assert actions[0, 6] == (1.0 if stored[step] < 0 else 0.0)  # 1 = open
        assert to_robosuite(unnormalise(actions, stats["action"]))[0, 6] == stored[step]
    assert np.array_equal(to_robosuite(standardise(index.columns["action"]))[:, 6], stored)
