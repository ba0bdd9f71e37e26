"""Samples and labels of latent models: small data sets by hand, grippers, several embodiments, video, many steps."""

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import label
import latent
import train_latent
from batches import Source
from data import Dataset
from dataspec import DataSpec, Gripper
from index import Feature, Index, Texts
from rlds import RldsIndex

SIZES = dict(image_size=24, patch_size=6, width=32, num_blocks=1, code_dim=8, delta=3)


@pytest.fixture(autouse=True)
def seed():
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


def make_lam(stage=0, text_size=0, **options):
    """Return an untrained image-based model in evaluation mode with random codes."""
    torch.manual_seed(0)
    sizes = latent.LamSizes(**SIZES, stage=stage, centre=False)
    model = latent.LatentActionModel(sizes, text_size, **options)
    torch.manual_seed(1)  # whatever the options
    for code_set in model.code_sets:
        code_set.quantiser.set_codebook(0.5 * torch.randn(16, 8))
    return model.eval()


@pytest.fixture(scope="module")
def lam():
    """A model without text whose codes lie on encoder outputs."""
    model = make_lam()
    model.codes.quantiser.updates.zero_()
    model.train()({"frames": torch.randint(0, 255, (16, 2, 24, 24, 3), dtype=torch.uint8)})
    return model.eval()


@pytest.fixture(scope="module")
def first_stage():
    """A model of stage 1."""
    return make_lam(stage=1, text_size=64)


# ----------------------------------------------------------------------------------------------------------------------
# Samples and labels of a small data set


@pytest.fixture
def make_two(tmp_path):
    """Function (columns and description to be changed) -> a data set of two episodes, of 10 and 7 steps, of JPEGs."""
    rng = np.random.default_rng(0)
    places, offset = [], 0
    with open(tmp_path / "shard", "wb") as shard:
        for _ in range(17):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
            shard.write(buffer.getvalue())
            places.append((0, offset, len(buffer.getvalue())))
            offset = shard.tell()
    features = {
        "image": Feature("image", "uint8", (24, 24, 3)),
        "action": Feature("number", "float32", (2,)),
        "text": Feature("text", "str", ()),
    }
    action = rng.uniform(-1, 1, (17, 2)).astype(np.float32)

    def make(action=action, texts=("a",) * 10 + ("b",) * 7, starts=(0, 10, 17), **changes):
        unique = sorted(set(texts))
        index = RldsIndex(
            name="two",
            directory=tmp_path,
            cache=tmp_path / "nowhere",
            fingerprint="0123",
            starts=np.array(starts),
            features=features,
            columns={"action": action},
            texts={"text": Texts(unique, np.array([unique.index(text) for text in texts]))},
            shards=[tmp_path / "shard"],
            images={"image": np.array(places)},
        )
        spec = DataSpec("arm", cameras={"image": "image"}, action=["action"], instruction="text")
        return Dataset(index, replace(spec, **changes))

    return make


@pytest.fixture
def two(make_two):
    """The data set of two episodes."""
    return make_two()


def labels_of(dataset, model, batch_size):
    """Return the codes and c of the two episodes of `two`."""
    return [torch.cat(part) for part in zip(*label.label_episodes(dataset, model, range(2), batch_size), strict=True)]


def test_labels_do_not_depend_on_the_batch_size(lam, two):
    """They are those of each pair alone, whose later frame is never of the next episode."""
    (codes, vectors), (codes_3, vectors_3) = (labels_of(two, lam, batch_size) for batch_size in (64, 3))
    assert torch.equal(codes, codes_3) and torch.allclose(vectors, vectors_3, atol=1e-2)
    assert len(torch.unique(codes, dim=0)) > 8
    for step, later in ((0, 3), (6, 9), (8, 9), (9, 9), (10, 13), (16, 16)):
        a, b = (lam.features(torch.from_numpy(two.image("image", s).copy())[None]) for s in (step, later))
        expected, _ = lam.encode(a, b)
        assert torch.equal(codes[step].long(), expected[0]), step


def vectors_of_pair(model, dataset, step, later, text):
    """Return c [P, d] of a pair of frames with the states [n, width] of an instruction."""
    frames = torch.from_numpy(np.stack([dataset.image("image", shown) for shown in (step, later)]))
    with torch.no_grad():
        a, b = model.features(frames)[:, None]
        return model.vectors(a, b, text[None], torch.ones(1, len(text), dtype=torch.bool))[0][0]


def test_first_stage_labels_with_the_instruction_of_each_episode(first_stage, two):
    """The second episode's labels are made with its own instruction, also when it is labelled alone."""
    texts = latent.text_states("words", two.instructions())
    expected, wrong = (vectors_of_pair(first_stage, two, 10, 13, texts[instruction]) for instruction in "ba")
    assert not torch.allclose(expected, wrong, atol=1e-2)
    _, (_, second) = label.label_episodes(two, first_stage, [0, 1], texts=texts)
    ((_, alone),) = label.label_episodes(two, first_stage, [1], texts=texts)
    for vectors in (second, alone):
        assert torch.allclose(vectors[0].float(), expected, atol=1e-2)


def test_first_stage_labels_with_the_instruction_of_each_step(first_stage, make_two):
    """Of several lengths, an empty one too, within one episode and one batch."""
    words = ["a", "", "b c", "a"] * 4 + ["d"]
    dataset = make_two(texts=words)
    texts = latent.text_states("words", dataset.instructions())
    (_, first), (_, second) = label.label_episodes(dataset, first_stage, range(2), texts=texts)
    vectors = torch.cat([first, second]).float()
    for step, later in ((0, 3), (1, 4), (2, 5), (16, 16)):
        expected = vectors_of_pair(first_stage, dataset, step, later, texts[words[step]])
        assert torch.allclose(vectors[step], expected, atol=1e-2), step


def test_frame_pairs(two, make_two, lam):
    """Frames delta apart within the episode, normalised actions, the weight of labelled steps, padded instructions."""
    pairs = train_latent.FramePairs([two], lam, chunk=2, action_fraction=1.0)
    for step, later in ((0, 3), (7, 9), (9, 9), (10, 13), (15, 16)):
        for frame, shown in zip(pairs.sample(0, step)["frames"], (step, later), strict=True):
            assert np.array_equal(frame, two.image("image", shown)), step
    assert np.array_equal(pairs.sample(0, 3)["actions"], two.normalised_action([3, 4]))
    assert pairs.sample(0, 9)["valid"].tolist() == [True, False]
    pairs = train_latent.FramePairs([two], lam, chunk=2, action_fraction=0.5)
    weights = [pairs.sample(0, step)["weight"].item() for step in range(17)]
    assert set(weights) == {0.0, 2.0}
    unlabelled = pairs.sample(0, weights.index(0.0))
    assert (unlabelled["actions"] == 0).all() and not unlabelled["valid"].any()
    texts = latent.text_states("words", ["a", "b c"])
    changed = make_two(texts=["a"] * 10 + ["b c"] * 7)
    sample = train_latent.FramePairs([changed], lam, texts).sample(0, 3)
    assert sample["text_mask"].tolist() == [True, False] and torch.equal(sample["text"][0], texts["a"][0])
    assert sample.keys() == {"frames", "text", "text_mask"}


def test_videos_that_cannot_be_learned_from_are_refused(two, make_two, lam):
    """Without the camera, or with no two frames delta apart."""
    with pytest.raises(ValueError, match="camera is 'image', but two has .*front"):
        latent.check_frames(replace(lam.sizes, camera="image"), make_two(cameras={"front": "image"}))
    latent.check_frames(lam.sizes, make_two(cameras={"front": "image"}))
    latent.check_frames(replace(lam.sizes, delta=9), two)
    with pytest.raises(ValueError, match="delta is 10, but the longest episode of two has 10 frames"):
        latent.check_frames(replace(lam.sizes, delta=10), two)


def test_actions_that_are_not_finite_are_refused(make_two):
    """With step, episode and dimension."""
    action = np.zeros((17, 2), np.float32)
    action[12, 1] = np.nan
    with pytest.raises(ValueError, match="action of two is nan at step 2 of episode 1, dimension 1"):
        make_two(action).stats  # noqa: B018


def test_an_episode_of_one_frame_is_paired_with_itself(make_two, lam):
    """In a data set with longer ones it trains and gets labels: those of no change."""
    dataset = make_two(starts=(0, 16, 17))
    pairs = train_latent.FramePairs([dataset], lam, chunk=2, action_fraction=0.05)
    first, second = pairs.sample(0, 16)["frames"]
    assert torch.equal(first, second)
    _, (codes, _) = label.label_episodes(dataset, lam, range(2))
    a = lam.features(first[None])
    assert torch.equal(codes.long(), lam.encode(a, a)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Grippers, embodiments and video


class ArrayIndex(Index):
    """A data set in memory, whose images are functions of the step."""

    def read_image(self, path, step):
        """Return one colour and a line that moves with the step; a different one for each path."""
        pixels = np.full((24, 24, 3), 10 * len(path), np.uint8)
        pixels[step % 24] = 250
        return pixels

    def file_of(self, step):
        """Return where the data set would lie."""
        return self.directory


def make_data(name, action, steps=None, length=20, **spec):
    """Return a data set in memory of episodes of `length` steps. action: f32 [S, A], or None for video of `steps`."""
    steps = steps or len(action)
    features = {path: Feature("image", "uint8", (24, 24, 3)) for path in ("front", "side view")}
    columns = {}
    parts = []
    if action is not None:
        features["action"] = Feature("number", "float32", action.shape[1:])
        columns["action"] = action
        parts = ["action"]
    starts = np.append(np.arange(0, steps, length), steps)
    index = ArrayIndex(name, Path("nowhere"), Path("nowhere"), name, starts, features, columns)
    return Dataset(index, DataSpec(**dict(embodiment=name, cameras={"main": "front"}, action=parts) | spec))


def random_actions(steps, size, seed=0):
    """Return smooth actions f32 [steps, size]."""
    phase, speed = np.random.default_rng(seed).uniform(0.1, 1, (2, size))
    return np.sin(6 * phase + speed * np.arange(steps)[:, None]).astype(np.float32)


GRIPPERS = ((-1.0, 1.0), (1.0, 0.0), (0.08, 0.0))  # stored values of open and closed; the last is a width in metres


def with_gripper(opened, closed):
    """Return a data set of two motions and a gripper, which opens and closes, also half-way."""
    motion = random_actions(80, 2)
    opening = np.resize([0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 0.5], 80)[:, None]
    action = np.concatenate([motion, closed + opening * (opened - closed)], 1).astype(np.float32)
    return make_data("arm", action, grippers=[Gripper(2, opened, closed)])


def test_a_gripper_trains_to_the_same_targets_however_it_is_stored():
    """As -1/1, 1/0 and a width in metres: the same samples for both models, and the same losses of two updates."""
    targets, losses = [], []
    for opened, closed in GRIPPERS:
        dataset = with_gripper(opened, closed)
        chunks = train_latent.MaskedChunks([dataset], 8)
        pairs = train_latent.FramePairs([dataset], make_lam(), chunk=8, action_fraction=1.0)
        assert all(torch.equal(chunks[k]["actions"], pairs.sample(*pairs.place(k))["actions"]) for k in range(5))
        targets.append(torch.stack([chunks.sample(0, step)["actions"] for step in range(80)]))
        torch.manual_seed(0)
        models = latent.ActionTokenizer(8, 3, num_codes=8, dim=16), make_lam(chunk=8, action_sizes=[3])
        losses.append([])
        for model, samples in zip(models, (chunks, pairs)):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
            for update in range(2):
                batch = default_collate([samples[16 * update + k] for k in range(16)])
                loss = model.train()(batch)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    assert set(np.unique(targets[0][..., 2])) == {0.0, 0.25, 0.5, 1.0}
    for other, other_losses in zip(targets[1:], losses[1:]):
        assert torch.allclose(other, targets[0], atol=1e-6)
        assert other_losses == pytest.approx(losses[0], rel=1e-4)


@pytest.fixture(scope="module")
def mixture():
    """Two data sets of 5 and 2 action dimensions and video, each an embodiment of its own."""
    five = make_data("five", random_actions(100, 5), cameras={"left": "front"})
    two = make_data("pair", random_actions(60, 2, seed=1), cameras={"top": "side view", "left": "front"})
    video = make_data("film", None, steps=80, cameras={"left": "front"}, text="pour the water")
    return five, video, two


def test_actions_are_padded_to_the_largest_and_numbered_by_embodiment(mixture):
    """In order of first appearance, without video; each normalised by the statistics of its own data set."""
    five, video, two = mixture
    for samples in (
        train_latent.MaskedChunks([two, five], 4),
        train_latent.FramePairs([two, video, five], make_lam(), chunk=4, action_fraction=1.0),
    ):
        number = len(samples.datasets) - 1
        first, last = samples.sample(0, 7), samples.sample(number, 18)
        assert (first["embodiment"], last["embodiment"]) == (0, 1)
        assert first["actions"].shape == last["actions"].shape == (4, 5)
        assert np.array_equal(first["actions"][:, :2], two.normalised_action(np.arange(7, 11)))
        assert (first["actions"][:, 2:] == 0).all()
        assert last["valid"].tolist() == [True, True, False, False]
        assert np.array_equal(last["actions"][:2], five.normalised_action([18, 19]))


def alone(model, number):
    """Return the tokenizer of one embodiment with the coder and the codebook of a tokenizer of several."""
    coder = model.coders[number]
    single = latent.ActionTokenizer(4, coder.action_size, num_codes=16, dim=16)
    names = single.state_dict().keys()
    tensors = {name: t for name, t in coder.state_dict().items() if name in names}
    tensors |= {f"quantiser.{name}": t for name, t in model.quantiser.state_dict().items()}
    single.load_state_dict(tensors)
    return single.eval()


def test_tokenizer_of_two_embodiments_has_the_losses_and_gradients_of_each_alone(mixture):
    """Weighted by their shares of the batch; codes and decoded actions are those of each alone."""
    five, _, two = mixture
    sizes = {"five": 5, "pair": 2}
    model = latent.ActionTokenizer(4, 5, num_codes=16, dim=16, embodiments=sizes)
    model.quantiser.set_codebook(0.3 * torch.randn(16, 16))
    assert model.action_sizes == [5, 2] and model.config["embodiments"] == sizes
    samples = train_latent.MaskedChunks([five, two], 4)
    places = [(0, 3), (1, 7), (0, 38), (0, 50), (1, 19), (0, 61)]
    batch = default_collate([samples.sample(*place) | {"masked": torch.arange(4) % 3 == 0} for place in places])
    together = model.eval()(batch)
    together["loss"].backward()
    expected = dict.fromkeys(("loss", "reconstruction_loss", "quantisation_loss", "consistency_loss"), 0.0)
    codes, decoded = [None] * 6, [None] * 6
    for number, size in enumerate(model.action_sizes):
        rows = batch["embodiment"] == number
        single = alone(model, number)
        own = {name: x[rows] for name, x in batch.items() if name != "embodiment"}
        own["actions"] = own["actions"][..., :size]
        losses = single(own)
        losses["loss"].backward()
        for name in expected:
            expected[name] += losses[name].item() * len(own["valid"]) / len(places)
        gradient = single.project.weight.grad * len(own["valid"]) / len(places)
        assert torch.allclose(model.coders[number].project.weight.grad, gradient, atol=1e-6)
        for row, code in zip(np.flatnonzero(rows), single.encode(own["actions"], own["valid"])[0]):
            codes[row] = code
            decoded[row] = torch.nn.functional.pad(single.decode(code[None])[0], (0, 5 - size))
    for name, value in expected.items():
        assert together[name].item() == pytest.approx(value, rel=1e-5), name
    own_codes, _ = model.encode(batch["actions"], batch["valid"], batch["embodiment"])
    assert torch.equal(own_codes, torch.stack(codes))
    assert torch.allclose(model.decode(own_codes, batch["embodiment"]), torch.stack(decoded), atol=1e-6)


def test_tokenizer_of_one_embodiment_keeps_its_names():
    """On disk: no name of an embodiment, none of a further coder."""
    model = latent.ActionTokenizer(8, 7, num_codes=16, dim=16)
    assert model.config == {"chunk": 8, "action_size": 7, "num_codes": 16, "dim": 16} and model.action_sizes == [7]
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"project", "convs", "blocks", "decoder", "quantiser"}


def test_tokenizer_of_two_embodiments_is_refitted_and_compared_for_each(mixture):
    """The codebook lies among the latents of both; a line for each embodiment of each part."""
    five, _, two = mixture
    model = latent.ActionTokenizer(4, 5, num_codes=16, dim=16, embodiments={"five": 5, "pair": 2}).eval()
    samples = train_latent.MaskedChunks([five, two], 4)
    model.refit(samples)
    batch = default_collate([samples[k] for k in range(160)])
    with torch.no_grad():
        _, vectors = model.encode(batch["actions"], batch["valid"], batch["embodiment"])
    assert torch.equal(model.quantiser.codebook, latent.kmeans(vectors[batch["valid"]], 16))
    lines = train_latent.format_kmeans_comparison(model, {"training": samples}).splitlines()
    assert [line.split(":")[0] for line in lines] == ["On training of five", "On training of pair"]


def test_action_head_of_two_embodiments_has_the_loss_of_each_alone(mixture):
    """Weighted by their shares of the batch; video has no part in it."""
    five, video, two = mixture
    model = make_lam(chunk=4, action_sizes=[5, 2])
    samples = train_latent.FramePairs([five, video, two], model, chunk=4, action_fraction=1.0)
    places = [(0, 3), (1, 7), (2, 38), (0, 50), (1, 19), (2, 18)]
    batch = default_collate([samples.sample(*place) for place in places])
    assert batch["weight"].tolist() == pytest.approx([1.5, 0, 1.5, 1.5, 0, 1.5])  # 160 of 240 steps have actions
    losses = model(batch)
    expected = 0.0
    for number, size, rows in ((0, 5, [0, 3]), (1, 2, [2, 5])):
        head = latent.ChunkHead(8, 4, [size])
        head.hidden.load_state_dict(model.action_head.hidden.state_dict())
        head.outs[0].load_state_dict(model.action_head.outs[number].state_dict())
        model_alone = make_lam(chunk=4, action_sizes=[size])
        model_alone.action_head = head
        own = {name: x[rows] for name, x in batch.items() if name != "embodiment"}
        own["actions"] = own["actions"][..., :size]
        expected += model_alone(own)["action_loss"] * 2 / 6
    assert losses["action_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    filmed = model({name: x[[1, 4]] for name, x in batch.items()})
    assert filmed["action_loss"] == 0 and filmed["loss"] > 0
    filmed["loss"].backward()
    assert all(p.grad is not None for p in model.action_head.parameters())  # as DistributedDataParallel needs


def test_share_of_labelled_steps_is_that_asked_for_and_video_does_not_change_the_scale(mixture):
    """A pure function of seed, data set and step; weights are 1 on average, with video and without."""
    five, video, _ = mixture
    long = make_data("long", random_actions(3000, 2))

    def weights(datasets, sources=None, seed=0):
        pairs = train_latent.FramePairs(
            datasets, make_lam(), chunk=4, action_fraction=0.2, seed=seed, sources=sources, cache_bytes=0
        )
        return torch.stack([pairs.sample(0, step)["weight"] for step in range(2000)])

    alone = weights([long])
    assert set(alone.tolist()) == {0.0, 5.0} and alone.mean() == pytest.approx(1, abs=0.1)
    sources = [Source(0, np.arange(120)), Source(1, np.arange(4), weight=3.0)]
    with_video = weights([long, video], sources)
    assert torch.equal(with_video > 0, alone > 0)
    assert with_video.max() == pytest.approx((2400 + 240) / 2400 * 5)
    assert (weights([long], [Source(0, np.arange(150), labelled=False), Source(0, np.arange(2))]) == 0).all()
    assert not torch.equal(weights([long], seed=1), alone)


def test_the_main_camera_is_that_of_each_description(mixture):
    """Unless one is named, which all data sets must have."""
    five, _, two = mixture
    model = make_lam()
    pairs = train_latent.FramePairs([five, two], model)
    assert np.array_equal(pairs.sample(1, 3)["frames"][0], two.image("top", 3))
    assert np.array_equal(pairs.sample(0, 3)["frames"][0], five.image("left", 3))
    model.sizes = replace(model.sizes, camera="left")
    pairs = train_latent.FramePairs([five, two], model)
    assert np.array_equal(pairs.sample(1, 3)["frames"][0], two.image("left", 3))
    model.sizes = replace(model.sizes, camera="top")
    with pytest.raises(ValueError, match=r"camera is 'top', but five has \['left'\]"):
        train_latent.FramePairs([five, two], model)


def test_memory_of_the_samples_does_not_grow_with_the_data(lam):
    """Streams over 20 million steps are made and read within 2 MB."""
    rows = np.linspace(-1, 1, 1000, dtype=np.float32)
    action = np.lib.stride_tricks.as_strided(rows, (20_000_000, 2), (0, 4))  # one row, shown again and again
    dataset = make_data("large", action, length=1000)
    small = make_data("small", random_actions(100, 2))
    dataset.stats = small.stats
    for samples in (
        lambda: train_latent.MaskedChunks([dataset], 8),
        lambda: train_latent.FramePairs([dataset], lam, chunk=8, action_fraction=0.5, cache_bytes=0),
    ):
        tracemalloc.start()
        made = samples()
        items = [made[position] for position in range(0, 10**9, 10**8)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(items) == 10 and peak < 2e6
