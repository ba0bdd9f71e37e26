"""normalise.py against numpy and examples worked by hand."""

import numpy as np
import pytest
from data_helpers import change_index, change_spec, made_index, make_chunks

from data import Dataset, open_dataset
from dataspec import DataSpec, Gripper
from normalise import Normaliser, column_statistics, rare_motions, standardise, to_robosuite, unstandardise

# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_statistics_equal_numpy_over_all_steps(dataset, stats):
    """Mean, standard deviation, bounds and quantiles of the standardised actions and of the state."""
    action = np.array(dataset.index.columns["action"], np.float64)
    action[:, 6] = np.where(action[:, 6] > 0, 0.0, 1.0)  # closed 0, open 1
    state = np.float64(dataset.index.columns["observation/state"])
    for column, x in ((stats["action"], action), (stats["proprio"], state)):
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
        assert column["low"] == column["q01"] and column["high"] == column["q99"] and column["clip"]
    assert stats["action"]["mask"] == [True] * 6 + [False] and stats["proprio"]["mask"] == [True] * 8
    assert stats["num_transitions"] == len(dataset) and stats["num_trajectories"] == 8


@pytest.mark.parametrize("steps", (1, 2, 3, 99, 100, 101, 102, 1000, 70_001))
def test_quantiles_are_numpys_to_the_bit(steps):
    """Of f32 values in f64, for numbers of steps about 1 / 0.01 and more than are read at once."""
    rng = np.random.default_rng(steps)
    x = rng.normal(size=(steps, 3)).astype(np.float32)
    x[:, 1] = np.sign(x[:, 1])
    x[:, 2] *= 1e-30
    stats = column_statistics(x.__getitem__, steps, 3)
    exact = np.float64(x)
    for name, share in (("q01", 0.01), ("q99", 0.99)):
        assert stats[name] == np.quantile(exact, share, axis=0).tolist()
    assert np.allclose(stats["mean"], exact.mean(0), rtol=1e-9, atol=0)
    assert np.allclose(stats["std"], exact.std(0), rtol=1e-9, atol=0)
    assert stats["min"] == exact.min(0).tolist() and stats["max"] == exact.max(0).tolist()


def test_statistics_are_kept_until_the_description_changes(dataset, rlds, tmp_path):
    """In the cache, by the description; another one has statistics of its own."""
    opened = open_dataset(rlds, tmp_path)
    assert opened.stats == dataset.stats
    (kept,) = opened.cache.glob("statistics-*")
    kept.write_text(kept.read_text().replace('"num_trajectories": 8', '"num_trajectories": 9'))
    assert open_dataset(rlds, tmp_path).stats["num_trajectories"] == 9
    assert change_spec(opened, normalisation="bounds").stats["num_trajectories"] == 8
    assert len(list(opened.cache.glob("statistics-*"))) == 2
    kept.write_text("{")
    with pytest.raises(ValueError, match=f"{kept} is no JSON"):
        open_dataset(rlds, tmp_path).stats  # noqa: B018


def test_dimension_that_rarely_moves_falls_back_to_its_extremes():
    """q01 and q99 coincide though it moves: min and max, and it is reported; not a constant, nor what is unchanged."""
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    x[:, 1] = 0
    x[:, 2:] = 1e-6 * x[:, 2:]
    x[500:504, 2:] = 3, -2
    stats = column_statistics(x.__getitem__, 1000, 4, "bounds_q99", [3])
    assert rare_motions(stats) == [2]
    assert (stats["low"][2], stats["high"][2]) == (stats["min"][2], stats["max"][2]) and stats["high"][2] == 3
    assert stats["low"][:2] == stats["q01"][:2] and stats["high"][0] == stats["q99"][0]
    normaliser = Normaliser(stats)
    assert np.allclose(normaliser.normalise(np.float32([0, 0, 3, -2])), [normaliser.normalise(x * 0)[0, 0], 0, 1, -2])
    assert np.abs(normaliser.normalise(x)[:, 2] + 1).max() > 1.9  # the motion, not the noise, reaches the ends
    assert np.abs(np.delete(normaliser.normalise(x)[:, 2], range(500, 504)) + 1).max() < 1e-4
    assert np.allclose(
        normaliser.unnormalise(np.float32([0, 0, 1, -2])), [normaliser.unnormalise(x * 0)[0, 0], 0, 3, -2]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation


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
    normaliser = Normaliser(column)  # as of a run from before there was a choice
    assert np.allclose(normaliser.normalise(x), normalised, atol=1e-6)
    assert np.allclose(normaliser.unnormalise(normalised), clipped, atol=1e-6)


def test_bounds_and_mean_and_std_by_hand():
    """1, 2, 3, 6: the extremes go to -1 and 1; or mean 3 and deviation sqrt(3.5) to 0 and 1, and none is cut."""
    x = np.float32([[1], [2], [3], [6]])
    bounds = Normaliser(column_statistics(x.__getitem__, 4, 1, "bounds"))
    assert np.allclose(bounds.normalise(x)[:, 0], [-1, -0.6, -0.2, 1]) and bounds.normalise(np.float32([9])) == 1
    standard = Normaliser(column_statistics(x.__getitem__, 4, 1, "mean_std"))
    assert np.allclose(standard.normalise(x)[:, 0], np.array([-2, -1, 0, 3]) / 3.5**0.5)
    assert np.allclose(standard.normalise(np.float32([3 + 10 * 3.5**0.5])), 10)
    assert np.allclose(standard.unnormalise(np.float32([10])), 3 + 10 * 3.5**0.5)
    q99 = Normaliser(column_statistics(x.__getitem__, 4, 1))
    low, high = 1 + 0.03, 3 + 3 * 0.97
    assert np.allclose(q99.normalise(x)[:, 0], np.clip(2 * (x[:, 0] - low) / (high - low) - 1, -1, 1))


def test_unchanged_dimensions_pass(dataset):
    """As stored, in statistics of actions alone."""
    changed = change_spec(dataset, unchanged=[0, 4])
    assert changed.stats["action"]["mask"] == [False, True, True, True, False, True, False]
    stored = changed.stored_action(slice(None))
    assert np.array_equal(changed.normalised_action(slice(None))[:, [0, 4]], stored[:, [0, 4]])
    assert changed.stats["proprio"] == dataset.stats["proprio"]


def test_normalise_round_trip_on_the_data(dataset, stats):
    """Inside the bounds un-normalising gives the physical values back, constant dimension and gripper included."""
    action = dataset.action(slice(None))
    inside = np.clip(action, stats["action"]["q01"], stats["action"]["q99"])
    normalised = dataset.normalised_action(slice(None))
    restored = dataset.action_normaliser.unnormalise(normalised)
    assert np.allclose(restored, inside, atol=1e-6) and np.array_equal(restored[:, 6], action[:, 6])
    assert (normalised[:, 3] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Grippers


def test_gripper_keeps_its_sign_through_the_whole_chain(dataset):
    """Stored +1 (close) is +1 for the simulator after standardise, normalise, sample, un-normalise and to_robosuite."""
    stored = dataset.stored_action(slice(None))
    grippers = dataset.spec.grippers
    assert set(stored[:, 6]) == {-1.0, 1.0}
    chunks = make_chunks(dataset, chunk=1)
    for step in (0, int(dataset.starts[1]) - 1, len(dataset) - 1):
        actions = chunks.sample(0, step)["actions"].numpy()
        assert actions[0, 6] == (1.0 if stored[step, 6] < 0 else 0.0)  # 1 = open
        physical = dataset.action_normaliser.unnormalise(actions)
        assert to_robosuite(physical, grippers)[0, 6] == unstandardise(physical, grippers)[0, 6] == stored[step, 6]
    assert np.array_equal(to_robosuite(dataset.action(slice(None)), grippers)[:, 6], stored[:, 6])


def test_grippers_by_hand():
    """A width of which 8 cm are open, and 1 for closed: between the ends in proportion, beyond them cut, and back."""
    grippers = [Gripper(0, open=0.08, closed=0.0), Gripper(2, open=0.0, closed=1.0)]
    stored = np.float32([[0.08, 5, 0], [0.0, 5, 1], [0.02, 5, 0.25], [0.09, 5, -0.1]])
    standardised = np.float32([[1, 5, 1], [0, 5, 0], [0.25, 5, 0.75], [1, 5, 1]])
    assert np.allclose(standardise(stored, grippers), standardised) and stored[3, 0] == np.float32(0.09)
    assert np.allclose(unstandardise(standardised, grippers)[:3], stored[:3])
    assert np.array_equal(to_robosuite(standardised, grippers)[:, [0, 2]], [[-1, -1], [1, 1], [1, -1], [-1, -1]])
    assert not np.signbit(standardise(stored, grippers)).any()  # no -0.0, which would print and hash as another number


def test_no_and_two_grippers(tmp_path):
    """Without one, the last number is a motion like the others; of two, both are standardised and not normalised."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (60, 14)).astype(np.float32)
    index = made_index(tmp_path, {"action": action})
    dataset = Dataset(index, DataSpec("arm", action=["action[0:7]"]))
    assert dataset.stats["action"]["mask"] == [True] * 7
    low, high = (np.quantile(np.float64(action[:, 6]), share) for share in (0.01, 0.99))
    expected = np.clip(2 * (action[:, 6] - low) / (high - low) - 1, -1, 1)
    assert np.allclose(dataset.normalised_action(slice(None))[:, 6], expected, atol=1e-5)
    action[:, [6, 13]] = np.where(rng.random((60, 2)) > 0.5, 1, -1)
    index = made_index(tmp_path, {"action": action})
    spec = DataSpec("arms", action=["action"], grippers=[Gripper(6, -1, 1), Gripper(13, 1, -1)])
    dataset = Dataset(index, spec)
    normalised = dataset.normalised_action(slice(None))
    assert np.array_equal(normalised[:, 6], action[:, 6] < 0) and np.array_equal(normalised[:, 13], action[:, 13] > 0)
    assert [number for number, normal in enumerate(dataset.stats["action"]["mask"]) if not normal] == [6, 13]


def test_state_of_other_data_has_other_statistics(dataset):
    """Statistics are those of the columns, not of the name."""
    doubled = {**dataset.index.columns, "observation/state": 2 * np.asarray(dataset.index.columns["observation/state"])}
    other = change_index(dataset, columns=doubled, cache=dataset.cache / "none")
    assert np.allclose(other.stats["proprio"]["q99"], 2 * np.array(dataset.stats["proprio"]["q99"]))
    assert other.stats["action"] == dataset.stats["action"]
