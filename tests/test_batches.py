"""batches.py: samples, batches and pixels, against numpy and examples worked by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import equal_batches, make_chunks
from torch.utils.data import DataLoader

from batches import ActionChunks, StepBatchSampler, colour_jitter, prepare_images
from index import episode_steps, split_episodes
from normalise import normalise, standardise

DRAWS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # augmentation draws of one camera


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_chunk_stops_at_the_end_of_the_episode(index, stats):
    """Three steps before an end: three valid steps, then no motion and a held gripper, nothing of the next episode."""
    normalised = normalise(standardise(index.columns["action"]), stats["action"])
    chunks = make_chunks(index, stats)
    end = int(index.starts[2])
    item = chunks.sample(0, end - 3)
    assert item["valid"].tolist() == [True] * 3 + [False] * 5
    assert np.array_equal(item["actions"][:3], normalised[end - 3 : end])
    assert (item["actions"][3:, :6] == 0).all() and (item["actions"][3:, 6] == float(normalised[end - 1, 6])).all()
    assert item["text"] == index.instructions[1]
    after = chunks.sample(0, end)
    assert after["valid"].all() and np.array_equal(after["actions"], normalised[end : end + 8])
    assert after["text"] == index.instructions[2]


def test_sample_holds_the_observation_of_its_step(index, stats):
    """Cameras in the order asked for, proprio normalised."""
    item = make_chunks(index, stats, ["wrist_image", "image"]).sample(0, 20)
    assert np.array_equal(item["images"][0], index.image("wrist_image", 20))
    assert np.array_equal(item["images"][1], index.image("image", 20))
    assert np.array_equal(item["proprio"], normalise(index.columns["state"][20], stats["proprio"]))


def first_places(chunks, count):
    """Return (number of the data set, step) of the first samples."""
    return [chunks.place(position) for position in range(count)]


def test_epoch_sees_each_sample_once_in_a_new_order(index, stats):
    """Two epochs: every step once in each, in different orders; another seed orders differently; same seed alike."""
    chunks = make_chunks(index, stats, seed=3)
    n = len(index)
    places = first_places(chunks, 2 * n)
    assert chunks.epoch_length == n and sorted(places[:n]) == sorted(places[n:]) == [(0, step) for step in range(n)]
    assert places[:n] != places[n:]
    assert places == first_places(make_chunks(index, stats, seed=3), 2 * n)
    assert places != first_places(make_chunks(index, stats, seed=4), 2 * n)
    for position in (0, n):
        assert torch.equal(chunks[position]["actions"], chunks.sample(*places[position])["actions"])


def test_shuffle_is_global(index, stats):
    """A batch of 32 spans most episodes of both shards, whatever the order on disk."""
    places = first_places(make_chunks(index, stats), 96)
    for batch in range(3):
        steps = [step for _, step in places[32 * batch : 32 * batch + 32]]
        assert len(set(np.searchsorted(index.starts, steps, "right"))) >= 6


def test_weights_scale_how_often_a_data_set_occurs(index, stats):
    """Per epoch: weight 2 gives each step twice, weight 0.5 half of the steps once."""
    n = len(index)
    chunks = ActionChunks([index, index], [stats] * 2, ["image"], 8, weights=[2.0, 0.5])
    count = Counter(first_places(chunks, chunks.epoch_length))
    assert chunks.epoch_length == 2 * n + round(n / 2)
    assert all(count[0, step] == 2 for step in range(n))
    assert sorted(count[1, step] for step in range(n)) == [0] * (n - round(n / 2)) + [1] * round(n / 2)


def test_held_out_episodes_stay_out(index, stats):
    """Splits are disjoint, complete and seeded; a training epoch never reads a held-out step."""
    kept, held = split_episodes(index, 0.25, seed=0)
    assert len(held) == 2 and sorted([*kept, *held]) == list(range(8))
    assert any(split_episodes(index, 0.25, seed)[1].tolist() != held.tolist() for seed in (1, 2, 3))
    assert len(split_episodes(index, 0.01, 0)[1]) == 1 and len(split_episodes(index, 0.0, 0)[1]) == 0
    chunks = make_chunks(index, stats, episodes=[kept])
    trained = sorted(step for _, step in first_places(chunks, chunks.epoch_length))
    assert trained == sorted(set(range(len(index))) - set(episode_steps(index, held)))


def test_sizes_and_cameras_must_agree(index, stats):
    """A camera that does not exist and data sets of different action sizes are named."""
    with pytest.raises(ValueError, match=r"made has no camera \['front'\]; it has \['image', 'wrist_image'\]"):
        make_chunks(index, stats, ["front"])
    other = replace(index, name="other", columns=dict(index.columns, action=index.columns["action"][:, :5]))
    with pytest.raises(ValueError, match=r"action has shape \(5,\) in other but \(7,\) in made"):
        ActionChunks([index, other], [stats, stats], ["image"], 8)


def test_gripper_that_is_not_liberos_is_refused(index, stats):
    """A last action outside [-1, 1] is no gripper; inverting it silently would spoil every action."""
    actions = np.array(index.columns["action"])
    actions[3, -1] = 1.7
    wrong = replace(index, columns={**index.columns, "action": actions})
    with pytest.raises(ValueError, match="must be the gripper, -1 open, 1 close"):
        make_chunks(wrong, stats)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_ranks_cover_the_global_batch_exactly_once():
    """Rank r of n reads the positions r::n of each update, in micro-batches, for any n and any micro-batch."""
    whole = list(StepBatchSampler(0, 3, 12, 12))
    assert whole == [list(range(12)), list(range(12, 24)), list(range(24, 36))]
    for world, micro in ((1, 4), (2, 6), (3, 2), (4, 3)):
        samplers = [StepBatchSampler(0, 3, 12, micro, rank, world) for rank in range(world)]
        parts = list(map(list, samplers))
        per_update = 12 // world // micro
        for update in range(3):
            positions = [sum(part[update * per_update : (update + 1) * per_update], []) for part in parts]
            assert positions == [list(range(12 * update + rank, 12 * update + 12, world)) for rank in range(world)]
        assert list(map(len, samplers)) == list(map(len, parts))


def test_later_start_equals_the_tail():
    """A sampler from update k on gives what the whole one gives from there: nothing to skip, nothing to remember."""
    assert list(StepBatchSampler(5, 9, 8, 2, 1, 2)) == list(StepBatchSampler(0, 9, 8, 2, 1, 2))[5 * 2 :]


def test_any_number_of_workers_gives_the_same_batches(index, stats):
    """0 and 2 workers: images, actions, texts and augmentation draws; and a later start gives the same later batch."""
    chunks = make_chunks(index, stats, ["image", "wrist_image"], seed=5)

    def read(workers, first=0):
        """Return all batches from update `first` on."""
        return list(DataLoader(chunks, batch_sampler=StepBatchSampler(first, 4, 6, 3), num_workers=workers))

    alone = read(0)
    shared = read(2)
    assert len(alone) == len(shared) == 8 and all(map(equal_batches, alone, shared))
    assert all(map(equal_batches, alone[4:], read(0, first=2))) and not equal_batches(alone[0], alone[1])


def test_draws_are_keyed_by_seed_sample_and_camera(index, stats):
    """Uniform numbers that no two (seed, sample, camera) share."""
    streams = [make_chunks(index, stats, ["image", "wrist_image"], seed=seed) for seed in (0, 1)]
    draws = torch.stack([chunks[position]["draws"] for chunks in streams for position in (0, 1, 200)])
    assert draws.shape == (6, 2, 6) and len(draws.flatten().unique()) == draws.numel()
    assert draws.min() >= 0 and draws.max() < 1


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def ramp(size=40):
    """Return u8 [1, size, size, 3]: red grows by 5 a column, green by 5 a row, blue is constant."""
    line = torch.arange(size, dtype=torch.uint8) * 5
    blue = torch.full((size, size), 77, dtype=torch.uint8)
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size), blue], -1)[None]


def test_augmentation_on_average():
    """Of grey images: brightness moves all pixels by -0.2 to 0.2, 0 on average, and nothing gives them colour; of
    a ramp: the crop's place is central on average, anywhere in the free room."""
    u = torch.rand(4000, 1, 6, generator=torch.Generator().manual_seed(0))
    grey = torch.full((1, 4, 4, 3), 128, dtype=torch.uint8).expand(4000, -1, -1, -1)
    level = prepare_images([grey], 4, u)[:, 0] / 2 + 0.5 - 128 / 255  # [4000, 3, 4, 4]
    assert (level - level.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-3
    assert level.abs().max() < 0.2 + 1e-4 and level.max() > 0.195 and level.min() < -0.195 and level.mean().abs() < 0.01
    u[..., 2:] = 0.5  # colours as they are
    pixels = (prepare_images([ramp().expand(4000, -1, -1, -1)], 20, u)[:, 0] + 1) / 2 * 255
    for channel in (0, 1):
        place = pixels[:, channel].mean((1, 2)) / 5 - 19.5  # of the crop's centre, in input pixels from the image's
        room = 20 * (1 - 0.9**0.5)
        assert place.abs().max() < room + 1e-3 and place.abs().max() > 0.97 * room and place.mean().abs() < 0.03


def test_centre_crop_by_hand():
    """sqrt(0.9) of each edge about the centre: output pixel j shows the ramp at side (j + 1/2 - 10) 2 + 20 - 1/2."""
    pixels = (prepare_images([ramp()], 20)[0, 0] + 1) / 2 * 255  # [3, 20, 20]
    place = 0.9**0.5 * (torch.arange(20) + 0.5 - 10) * 2 + 20 - 0.5  # in input pixels
    assert torch.allclose(pixels[0], (5 * place).expand(20, 20), atol=1e-3)
    assert torch.allclose(pixels[1], (5 * place)[:, None].expand(20, 20), atol=1e-3)
    assert torch.allclose(pixels[2], torch.tensor(77.0), atol=1e-3)


def test_middle_draws_are_the_evaluation_view():
    """With all draws 0.5 training sees the centre crop in its own colours."""
    images = [torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)] * 2
    middle = prepare_images(images, 32, torch.full((3, 2, 6), 0.5))
    assert torch.allclose(middle, prepare_images(images, 32), atol=1e-4)


def test_augmentation_is_a_function_of_its_draws():
    """The same draws give the same pixels whatever else is in the batch; each draw matters; cameras have their own."""
    image = torch.randint(40, 200, (1, 32, 32, 3), dtype=torch.uint8)
    u = torch.from_numpy(DRAWS).float().expand(1, 1, 6).clone()
    alone = prepare_images([image], 32, u)
    batch = prepare_images([image.expand(4, -1, -1, -1)], 32, torch.cat([u, torch.rand(3, 1, 6)]))
    assert torch.allclose(batch[:1], alone, atol=1e-6)
    for number in range(6):
        other = u.clone()
        other[..., number] += 0.3
        assert (prepare_images([image], 32, other) - alone).abs().max() > 0.01, number
    two = prepare_images([image, image], 32, torch.cat([u, 1 - u], 1))
    assert torch.equal(two[:, 0], alone[:, 0]) and not torch.allclose(two[:, 1], alone[:, 0], atol=0.01)


def test_random_crop_moves_within_the_image():
    """Draws 0 and 1 put the crop at the edges: rows and columns 0 to sqrt(0.9) and the rest, never outside."""
    for draw, low in ((0.0, 0.0), (1.0, 40 * (1 - 0.9**0.5))):
        u = torch.full((1, 1, 6), 0.5)
        u[..., :2] = draw
        pixels = (prepare_images([ramp()], 20, u)[0, 0] + 1) / 2 * 255
        place = low + 0.9**0.5 * (torch.arange(20) + 0.5) * 2 - 0.5
        assert torch.allclose(pixels[0, 10], 5 * place, atol=0.01)
        assert torch.allclose(pixels[1, :, 10], 5 * place, atol=0.01)
    u = torch.tensor([[[1.0, 0.0, 0.5, 0.5, 0.5, 0.5]]])
    pixels = prepare_images([ramp()], 20, u)[0, 0]
    assert pixels[0].mean() > pixels[1].mean() + 0.01  # the first draw moves along columns, the second along rows


def jitter_by_hand(pixels, brightness, contrast, saturation, turns):
    """Return pixels [h, w, 3] after brightness, contrast about each channel's mean, then chroma scaled and turned in
    YIQ, one after another."""
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    x = pixels + brightness
    x = (x - x.mean((0, 1))) * contrast + x.mean((0, 1))
    y, i, q = np.moveaxis(x @ yiq.T, -1, 0)
    chroma = (i + 1j * q) * saturation * np.exp(2j * np.pi * turns)
    return np.clip(np.stack([y, chroma.real, chroma.imag], -1) @ np.linalg.inv(yiq).T, 0, 1)


EXTREMES = [[0.5] * i + [end] + [0.5] * (3 - i) for i in range(4) for end in (0.0, 1.0)]  # each draw at its ends


@pytest.mark.parametrize("u", (*EXTREMES, [0.1, 0.8, 0.3, 0.9]))
def test_colours_equal_the_four_operations_one_after_another(u):
    """+-0.2 brightness, 0.8 to 1.2 contrast and saturation, +-0.05 of a turn of hue, on a picture with a cast."""
    pixels = np.random.default_rng(0).uniform(0, 0.6, (8, 8, 3)) * (1.0, 0.5, 0.3) + 0.2
    expected = jitter_by_hand(pixels, 0.4 * u[0] - 0.2, 0.8 + 0.4 * u[1], 0.8 + 0.4 * u[2], 0.1 * u[3] - 0.05)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()  # [1, 3, 8, 8]
    jittered = colour_jitter(batch, torch.tensor([u], dtype=torch.float32))
    assert np.allclose(jittered[0].permute(1, 2, 0), expected, atol=1e-4)
