"""batches.py: samples, batches and pixels, against numpy and examples worked by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import change_spec, equal_batches, make_chunks
from torch.utils.data import DataLoader

from batches import (
    AUGMENTATIONS,
    ActionChunks,
    Source,
    StepBatchSampler,
    colour_jitter,
    permute,
    prepare_images,
    round_keys,
)
from data import open_dataset
from index import episode_steps, split_episodes

DRAWS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # augmentation draws of one camera


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_chunk_stops_at_the_end_of_the_episode(dataset):
    """Three steps before an end: three valid steps, then no motion and a held gripper, nothing of the next episode."""
    normalised = dataset.normalised_action(slice(None))
    chunks = make_chunks(dataset)
    end = int(dataset.starts[2])
    item = chunks.sample(0, end - 3)
    assert item["valid"].tolist() == [True] * 3 + [False] * 5
    assert np.array_equal(item["actions"][:3], normalised[end - 3 : end])
    assert (item["actions"][3:, :6] == 0).all() and (item["actions"][3:, 6] == float(normalised[end - 1, 6])).all()
    assert item["text"] == dataset.instruction(end - 1) != dataset.instruction(end)
    after = chunks.sample(0, end)
    assert after["valid"].all() and np.array_equal(after["actions"], normalised[end : end + 8])
    assert after["text"] == dataset.instruction(end)


def test_absolute_targets_repeat_past_the_end(dataset):
    """Dimensions that are absolute targets hold their last value, the others are no motion; all are masked."""
    end = int(dataset.starts[2])
    item = make_chunks(change_spec(dataset, absolute=[0, 2])).sample(0, end - 3)
    last = dataset.normalised_action([end - 1])[0]
    assert not item["valid"][3:].any() and abs(last[0]) > 0.1 and abs(last[1]) > 0.1
    expected = [last[0], 0, last[2], 0, 0, 0, last[6]]
    assert np.array_equal(item["actions"][3:], np.tile(np.float32(expected), (5, 1)))


def test_sample_holds_the_observation_of_its_step(dataset):
    """Cameras in the order asked for, the state normalised."""
    item = make_chunks(dataset, ["wrist_image", "image"]).sample(0, 20)
    assert np.array_equal(item["images"][0], dataset.image("wrist_image", 20))
    assert np.array_equal(item["images"][1], dataset.image("image", 20))
    assert np.array_equal(item["proprio"], dataset.normalised_state([20])[0])
    assert item["action_weight"].tolist() == [1.0] * 7


def first_places(chunks, count):
    """Return (number of the source, step) of the first samples."""
    return [chunks.place(position) for position in range(count)]


def test_epoch_sees_each_sample_once_in_a_new_order(dataset):
    """Two epochs: every step once in each, in different orders; another seed orders differently; same seed alike."""
    chunks = make_chunks(dataset, seed=3)
    n = len(dataset)
    places = first_places(chunks, 2 * n)
    assert chunks.epoch_length == n and sorted(places[:n]) == sorted(places[n:]) == [(0, step) for step in range(n)]
    assert places[:n] != places[n:]
    assert places == first_places(make_chunks(dataset, seed=3), 2 * n)
    assert places != first_places(make_chunks(dataset, seed=4), 2 * n)
    for position in (0, n):
        assert torch.equal(chunks[position]["actions"], chunks.sample(*places[position])["actions"])


def test_shuffle_is_global(dataset):
    """A batch of 32 spans most episodes of both shards, whatever the order on disk."""
    places = first_places(make_chunks(dataset), 96)
    for batch in range(3):
        steps = [step for _, step in places[32 * batch : 32 * batch + 32]]
        assert len(set(np.searchsorted(dataset.starts, steps, "right"))) >= 6


def test_weights_scale_how_often_a_data_set_occurs(dataset):
    """Per epoch: weight 2 gives each step twice, weight 0.5 half of the steps once; 0 is left out, all 0 refused."""
    n = len(dataset)
    episodes = np.arange(8)
    sources = [Source(0, episodes, 2.0), Source(1, episodes, 0.5), Source(1, episodes, 0.0)]
    chunks = ActionChunks([dataset, dataset], [["image"]] * 2, 8, sources=sources)
    count = Counter(first_places(chunks, chunks.epoch_length))
    assert chunks.epoch_length == 2 * n + round(n / 2)
    assert all(count[0, step] == 2 for step in range(n))
    assert sorted(count[1, step] for step in range(n)) == [0] * (n - round(n / 2)) + [1] * round(n / 2)
    with pytest.raises(ValueError, match="no step, or weights of 0"):
        ActionChunks([dataset], [["image"]], 8, sources=[Source(0, episodes, 0.0)])


def test_held_out_episodes_stay_out(dataset):
    """Splits are disjoint, complete and seeded; a training epoch never reads a held-out step."""
    kept, held = split_episodes(dataset, 0.25, seed=0)
    assert len(held) == 2 and sorted([*kept, *held]) == list(range(8))
    assert any(split_episodes(dataset, 0.25, seed)[1].tolist() != held.tolist() for seed in (1, 2, 3))
    assert len(split_episodes(dataset, 0.01, 0)[1]) == 1 and len(split_episodes(dataset, 0.0, 0)[1]) == 0
    chunks = make_chunks(dataset, sources=[Source(0, kept)])
    trained = sorted(step for _, step in first_places(chunks, chunks.epoch_length))
    assert trained == sorted(set(range(len(dataset))) - set(episode_steps(dataset, held)))


def test_video_is_padded_and_does_not_change_the_scale_of_the_loss(dataset, video, cache):
    """Its samples weigh 0 and hold no action; those with actions are divided by their share of an epoch."""
    film = open_dataset(video, cache)
    assert film.action_size == film.state_size == 0 and film.instructions() == [""]
    chunks = ActionChunks([dataset, film], [["image", "wrist_image"], ["image"]], 8)
    share = len(dataset) / (len(dataset) + len(film))
    labelled = chunks.sample(0, 3)
    filmed = chunks.sample(1, 3)
    assert np.allclose(labelled["action_weight"], 1 / share) and (filmed["action_weight"] == 0).all()
    assert filmed["actions"].shape == (8, 7) and filmed["proprio"].shape == (8,) and not filmed["actions"].any()
    assert (labelled["num_cameras"], filmed["num_cameras"]) == (2, 1) and not filmed["images"][1].any()
    assert (labelled["embodiment"], filmed["embodiment"], filmed["source"]) == (0, 1, 1)
    assert chunks.source_names == ["made", "video (video)"]
    places = first_places(chunks, chunks.epoch_length)
    weights = [0.0 if number else 1 / share for number, _ in places]
    assert np.isclose(np.mean(weights), 1)


def test_smaller_actions_are_padded_and_weigh_as_much(dataset):
    """Beside seven dimensions, five are padded with zeros whose weight is 0, and the weights have the same sum."""
    five = change_spec(
        dataset,
        embodiment="five",
        action=["action[0:5]"],
        grippers=[],
        state=["observation/state[2:5]"],
        action_names=[],
    )
    chunks = ActionChunks([dataset, five], [["image"]] * 2, 8)
    item = chunks.sample(1, 10)
    assert np.array_equal(item["actions"][:, :5], five.normalised_action(slice(10, 18)))
    assert (item["actions"][:, 5:] == 0).all() and (item["proprio"][3:] == 0).all()
    assert np.allclose(item["action_weight"], [7 / 5] * 5 + [0, 0])
    assert np.isclose(item["action_weight"].sum(), chunks.sample(0, 10)["action_weight"].sum())
    one = ActionChunks([dataset, five], [["image"]] * 2, 8, sources=[Source(1, np.arange(8))])  # of the other: nothing
    assert one.sample(0, 10)["embodiment"] == 1 and one.sample(0, 10)["num_cameras"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Shuffling without tables

COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100, 255, 256, 257, 1000, 1023, 1024, 1025, 4097)


@pytest.mark.parametrize("count", COUNTS)
def test_permutation_holds_each_number_once(count):
    """For counts about powers of two too; from five numbers on, seeds and epochs have orders of their own."""
    orders = [
        [permute(n, count, round_keys(seed, 0, epoch)) for n in range(count)] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 4:
        assert len(set(map(tuple, orders))) == 4


def test_few_numbers_take_all_their_orders():
    """Two and three numbers come in each order about equally often over the epochs."""
    for count, num_orders in ((2, 2), (3, 6)):
        orders = Counter(tuple(permute(n, count, round_keys(5, 0, e)) for n in range(count)) for e in range(1200))
        assert len(orders) == num_orders and min(orders.values()) > 0.75 * 1200 / num_orders


def test_batches_mix_episodes_as_a_true_shuffle_does():
    """200 batches of 64 from 500 episodes of 37 steps: as many different episodes as numpy's shuffle has."""
    keys = round_keys(0, 0, 0)
    ours = np.array([permute(n, 500 * 37, keys) for n in range(200 * 64)])
    shuffled = np.random.default_rng(0).permutation(500 * 37)[: 200 * 64]
    counts = [np.mean([len(np.unique(batch // 37)) for batch in x.reshape(200, 64)]) for x in (ours, shuffled)]
    assert abs(counts[0] / counts[1] - 1) < 0.01
    assert abs(np.corrcoef(ours[:-1], ours[1:])[0, 1]) < 4 / np.sqrt(len(ours))  # neighbours have nothing to do


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


def test_any_number_of_workers_gives_the_same_batches(dataset):
    """0 and 2 workers: images, actions, texts and augmentation draws; and a later start gives the same later batch."""
    chunks = make_chunks(dataset, ["image", "wrist_image"], seed=5)

    def read(workers, first=0):
        """Return all batches from update `first` on."""
        return list(DataLoader(chunks, batch_sampler=StepBatchSampler(first, 4, 6, 3), num_workers=workers))

    alone = read(0)
    shared = read(2)
    assert len(alone) == len(shared) == 8 and all(map(equal_batches, alone, shared))
    assert all(map(equal_batches, alone[4:], read(0, first=2))) and not equal_batches(alone[0], alone[1])


def test_draws_are_keyed_by_seed_sample_and_camera(dataset):
    """Uniform numbers that no two (seed, sample, camera) share."""
    streams = [make_chunks(dataset, ["image", "wrist_image"], seed=seed) for seed in (0, 1)]
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
    pixels = (prepare_images([ramp().expand(4000, -1, -1, -1)], 40, u)[:, 0] + 1) / 2 * 255
    for channel in (0, 1):
        place = pixels[:, channel].mean((1, 2)) / 5 - 19.5  # of the crop's centre, in input pixels from the image's
        room = 20 * (1 - 0.9**0.5)
        assert place.abs().max() < room + 1e-3 and place.abs().max() > 0.97 * room and place.mean().abs() < 0.03


def test_centre_crop_by_hand():
    """sqrt(0.9) of each edge about the centre: pixel j of 80 shows the ramp at side (j + 1/2 - 40) / 2 + 20 - 1/2."""
    pixels = (prepare_images([ramp()], 80)[0, 0] + 1) / 2 * 255  # [3, 80, 80]
    place = 0.9**0.5 * (torch.arange(80) + 0.5 - 40) / 2 + 20 - 0.5  # in input pixels
    assert torch.allclose(pixels[0], (5 * place).expand(80, 80), atol=1e-3)
    assert torch.allclose(pixels[1], (5 * place)[:, None].expand(80, 80), atol=1e-3)
    assert torch.allclose(pixels[2], torch.tensor(77.0), atol=1e-3)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_larger_images_are_made_smaller_with_a_filter(augmentation):
    """Stripes of one pixel in four become an even grey, not stripes of another width."""
    stripes = torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
    stripes[:, ::4] = 200
    pixels = (prepare_images([stripes], 64, augmentation=augmentation) + 1) / 2 * 255
    assert (pixels[..., 2:-2, :] - 50).abs().max() < 8


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
        pixels = (prepare_images([ramp()], 40, u)[0, 0] + 1) / 2 * 255
        place = (low + 0.9**0.5 * (torch.arange(40) + 0.5) - 0.5).clamp(0, 39)  # the first and the last lie outside
        assert torch.allclose(pixels[0, 10], 5 * place, atol=0.01)
        assert torch.allclose(pixels[1, :, 10], 5 * place, atol=0.01)
    u = torch.tensor([[[1.0, 0.0, 0.5, 0.5, 0.5, 0.5]]])
    pixels = prepare_images([ramp()], 20, u)[0, 0]
    assert pixels[0].mean() > pixels[1].mean() + 0.01  # the first draw moves along columns, the second along rows


def test_shift_by_hand():
    """By whole pixels, up to 1/24 of the side either way and each as often, the edge repeated; the first draw along
    columns, the second along rows; without draws the image as it is, resized where it must be."""
    ramp48 = ramp(48)
    view = prepare_images([ramp48], 48, augmentation="shift")[0, 0]
    assert torch.allclose((view + 1) / 2 * 255, ramp48[0].permute(2, 0, 1).float(), atol=1e-3)
    moved = []
    for draw in (0.0, 0.19, 0.21, 0.5, 0.99):
        u = torch.tensor([[[draw, 0.5, 0.5, 0.5, 0.5, 0.5]]])
        pixels = (prepare_images([ramp48], 48, u, "shift")[0, 0] + 1) / 2 * 255
        moved.append(round(20 - pixels[0, 10, 20].item() / 5))
        columns = (torch.arange(48) - moved[-1]).clamp(0, 47)
        assert torch.allclose(pixels[0, 3], 5.0 * columns, atol=0.01)
        assert torch.allclose(pixels[1, :, 3], 5.0 * torch.arange(48), atol=0.01)
    assert moved == [-2, -2, -1, 0, 2]
    u = torch.tensor([[[0.5, 0.0, 0.5, 0.5, 0.5, 0.5]]])
    assert torch.allclose(
        (prepare_images([ramp48], 48, u, "shift")[0, 0, 1, :5, 0] + 1) / 2 * 255, torch.arange(2.0, 7) * 5
    )
    halved = (prepare_images([ramp48], 24, augmentation="shift")[0, 0] + 1) / 2 * 255
    assert torch.allclose(halved[0, 5, 2:22], 5 * (2 * torch.arange(24.0) + 0.5)[2:22], atol=0.1)


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
