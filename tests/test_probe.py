"""probe.py: each measure against an example made by hand, then the command as a user runs it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import common
import label
import latent
import normalise
import probe
import train_latent
from data import open_dataset
from index import episode_steps, later_steps, split_episodes

ONE = common.Ranks(0, 1, torch.device("cpu"))

# ----------------------------------------------------------------------------------------------------------------------
# Ridge regression


def step_episodes(index):
    """Return the episode of every step, i64 [S]."""
    return np.repeat(np.arange(index.num_episodes), np.diff(index.starts))


@pytest.fixture(scope="module")
def linear():
    """x [400, 5], its linear map y [400, 3] whose last dimension is constant, and the episode of each step, 20 each."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) * [1, 10, 100, 1e-3, 0] + 7
    y = x @ rng.normal(size=(5, 3)) / [1, 10, 1] + [5, -3, 0]
    y[:, 2] = 0.3
    return x, y, np.repeat(np.arange(20), 20)


def test_ridge_finds_a_linear_map_and_nothing_in_shuffled_inputs(linear):
    """R2 is 1, nan for a constant dimension, and about 0 for shuffled inputs."""
    x, y, episodes = linear
    r2 = probe.probe(x, y, episodes, fitted=range(15), held=range(15, 20))
    assert r2[:2] == pytest.approx([1, 1], abs=1e-6) and np.isnan(r2[2])
    shuffled = x[np.random.default_rng(1).permutation(400)]
    assert np.abs(probe.probe(shuffled, y, episodes, range(15), range(15, 20))[:2]).max() < 0.1


def test_ridge_equals_its_normal_equations(linear):
    """Solved directly, with inputs standardised and the constant one left out."""
    x, y, _ = linear
    z, strength = (x[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0), probe.STRENGTHS[7]
    weights = np.linalg.solve(z.T @ z + 400 * strength * np.eye(4), z.T @ (y - y.mean(0)))
    assert np.allclose(probe.ridge(x, y)(x)[7], z @ weights + y.mean(0))


def test_strength_is_chosen_on_whole_episodes_and_per_dimension():
    """Inputs that identify the episode predict its own steps alone, so for them a strong penalty is chosen."""
    rng = np.random.default_rng(0)
    episodes = np.repeat(np.arange(30), 10)
    signal = rng.normal(size=(300, 1))
    x = np.concatenate([signal, rng.normal(size=(30, 40))[episodes]], 1)
    y = np.concatenate([signal, rng.normal(size=(30, 1))[episodes]], 1)
    own, foreign = probe.STRENGTHS[probe.best_strengths(x, y, episodes)]
    assert own <= 0.1 and foreign >= 1
    within = probe.best_strengths(x, y, np.arange(300))  # every step an episode of its own
    assert probe.STRENGTHS[within[1]] < 0.1


def test_held_out_episodes_are_scored_and_not_fitted(linear):
    """Where the held-out episodes follow the opposite map, the fitted map is far worse than the mean."""
    x, y, episodes = linear
    opposite = np.where(episodes[:, None] < 15, y, 2 * y[episodes < 15].mean(0) - y)
    assert probe.probe(x, opposite, episodes, range(15), range(15, 20))[:2] == pytest.approx([-3, -3], abs=1e-4)


def test_r_squared_by_hand():
    """Against two references, and nan where the reference is exact."""
    y, predicted = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [1.0], [3.0]])
    assert probe.r_squared(predicted, y, np.array([1.0])) == pytest.approx([0])
    assert probe.r_squared(predicted, y, np.array([3.0])) == pytest.approx([1 - 2 / 14])
    assert np.isnan(probe.r_squared(y, np.ones((3, 1)), np.array([1.0])))


# ----------------------------------------------------------------------------------------------------------------------
# Codes and what is decoded from them


def test_usage_by_hand():
    """Two codes in equal shares at one position, a single code at the other."""
    codes = torch.tensor([[0, 3], [1, 3], [0, 3], [1, 3]])
    usage = probe.codebook_usage(codes, 4)
    assert (usage["num_codes"], usage["usage"]) == (4, [2, 1]) and usage["perplexity"] == pytest.approx([2, 1])


SHIFT = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])  # what each of three codes adds to every patch


def decoded_changes(codes, others, scale=1.0, wrong=0):
    """Return one batch of `transfer`: scale x the changes SHIFT of the codes and of the others, and exactly SHIFT.

    wrong: number that is added to both kinds of codes before they are decoded.
    """
    codes, others = torch.tensor(codes), torch.tensor(others)
    shown = ((codes + wrong) % 3, (others + wrong) % 3, codes)
    own, other, change = (SHIFT[c][:, None].expand(-1, 5, -1) for c in shown)
    return [(scale * own, scale * other, change, codes != others)]


def test_transfer_is_1_where_the_code_decides_and_half_where_it_does_not_matter():
    """It is 0 where the code decodes to a wrong change; equal codes do not count."""
    assert probe.transfer(decoded_changes([0, 1, 2, 0], [1, 2, 0, 2])) == 1.0
    assert probe.transfer(decoded_changes([0, 1, 2, 0], [1, 2, 0, 2], scale=0)) == 0.5
    assert probe.transfer(decoded_changes([0, 1], [2, 0], wrong=1)) == 0.0
    assert probe.transfer(decoded_changes([0, 1, 2, 2], [1, 1, 2, 2])) == 1.0
    assert probe.transfer(decoded_changes([1, 1], [1, 1])) == 0.5


def test_reconstruction_by_hand():
    """Over two batches of different sizes."""
    a = torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]], [[5.0, 5.0]]])
    b = a + torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[3.0, 0.0]]])
    predicted, predicted_other = a + SHIFT[1], a - SHIFT[1]
    parts = (slice(0, 2), slice(2, 3))
    measured = probe.reconstruction([(predicted[part], predicted_other[part], a[part], b[part]) for part in parts])
    assert (measured["error"], measured["copy_error"]) == (pytest.approx(4 / 6), pytest.approx(11 / 6))
    assert measured["ratio"] == pytest.approx(4 / 11) and measured["other_ratio"] == pytest.approx((4 + 4 + 16) / 11)


def test_other_rows_are_of_a_different_episode():
    """And vary."""
    episodes = np.repeat([3, 5, 9], [10, 1, 20])
    rows = probe.other_episode_rows(episodes, np.random.default_rng(0))
    assert (episodes[rows] != episodes).all() and len(np.unique(rows)) > 8


def test_tokenizer_error_by_hand():
    """Of three valid steps; the fourth is far off and does not count."""
    actions = np.zeros((2, 2, 3), np.float32)
    decoded = actions + np.array([[[3, 0, 0.5], [1, 0, 0.5]], [[0, 4, 0.5], [9, 9, 9]]], np.float32)
    valid = np.array([[True, True], [True, False]])
    assert probe.physical_error(decoded, actions, valid) == pytest.approx([(10 / 3) ** 0.5, (16 / 3) ** 0.5, 0.5])


def test_examples_come_from_different_episodes_first():
    """Then from any, as many as there are."""
    episodes = np.array([1, 1, 1, 1, 4, 1, 7])
    rows = probe.spread_over_episodes(episodes, 5, np.random.default_rng(0))
    assert sorted(episodes[rows[:3]]) == [1, 4, 7] and len(set(rows)) == 5
    assert sorted(probe.spread_over_episodes(episodes, 9, np.random.default_rng(0))) == list(range(7))


# ----------------------------------------------------------------------------------------------------------------------
# Steps of a data set


def test_chunks_and_later_frames_stay_in_their_episode(index, dataset):
    """Near its end, chunks are shorter and the later frame is the last one."""
    start, end = index.starts[2:4]
    assert later_steps(index, np.array([start, end - 3, end - 1]), 2).tolist() == [start + 2, end - 1, end - 1]
    means, stored = probe.mean_actions(dataset, np.arange(len(dataset)), 4), index.columns["action"]
    for step, last in ((start, start + 4), (end - 2, end), (end - 1, end)):
        assert np.allclose(means[step], stored[step:last].mean(0), atol=1e-6)
    steps, valid = batches.chunk_steps(dataset.starts, np.array([end - 2]), 4)
    assert steps.tolist() == [[end - 2] + [end - 1] * 3] and valid.tolist() == [[True, True, False, False]]
    assert probe.episodes_of(dataset, np.array([start - 1, start, end - 1, end])).tolist() == [1, 2, 2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# The command


SMALL = dict(max_steps=2, global_batch_size=8, val_fraction=0.25, image_size=24, width=16, delta=6)


@pytest.fixture(scope="module")
def stages(rlds, cache, tmp_path_factory):
    """Folders of both stages of an image-based model, trained on `rlds` for two updates, a quarter held out."""
    one, two = (tmp_path_factory.mktemp("probe") / name for name in ("one", "two"))
    first = train_latent.LamTraining(data=[rlds], out=one, cache=cache, stage=1, **SMALL)
    train_latent.train(first, ONE)
    train_latent.train(replace(first, out=two, stage=2, init_from=one), ONE)
    return one, two


@pytest.fixture(scope="module")
def lam(stages):
    """Folder of the second stage."""
    return stages[1]


def test_the_command(rlds, cache, dataset, lam, tokenizer, tmp_path, script_here):
    """It prints every part, writes the pictures, and reports what a regression here on labels made here gives."""
    out = tmp_path / "out"
    flags = ("--data", rlds, "--cache", cache, "--lam", lam, "--tokenizer", tokenizer, "--out", out)
    done = script_here("probe.py", *flags)
    assert done.code == 0, done.text
    for part in ("codes in use", "reconstruction", "transfer", "shuffled codes", "error (rms)", "gripper"):
        assert part in done.text
    for name, least in (("probe.png", (1200, 600)), ("codes.png", (1000, 150))):
        picture = Image.open(out / name)
        assert picture.width >= least[0] and picture.height >= least[1] and picture.convert("L").getextrema()[0] < 50
    report = json.loads((out / "probe.json").read_text())
    tokens = report["tokenizer"]
    assert len(tokens["error"]) == len(tokens["spread"]) == 7 and tokens["spread"][3] == 0
    assert_report_of_lam(report["lam"], dataset, lam)


def assert_report_of_lam(report, dataset, lam):
    """Fail unless the report on the model in the folder `lam` has all parts and the R2 of its labels."""
    split = split_episodes(dataset, 0.25, 0)
    held_out = split[1]
    assert report["fingerprint"] == latent.fingerprint(lam) and report["stage"] == 2
    assert report["held_out_episodes"] == held_out.tolist()
    assert report["steps"] == len(episode_steps(dataset, held_out))
    assert len(report["usage"]) == len(report["perplexity"]) == 4
    assert report["reconstruction"].keys() == {"error", "copy_error", "ratio", "other_ratio"}
    assert 0 <= report["transfer"] <= 1
    r2 = report["r2"]
    assert r2.keys() == {"z", "codes", "shuffled z", "shuffled codes"}
    assert all(len(row) == 7 and row[3] is None and row[0] <= 1 for row in r2.values())  # [3] never moves
    both = np.concatenate(split)
    labels = label.label_episodes(dataset, latent.load_lam(lam), both)
    codes, vectors = map(torch.cat, zip(*labels, strict=True))
    steps = episode_steps(dataset, both)
    actions, episodes = probe.mean_actions(dataset, steps, 8), step_episodes(dataset)[steps]
    one_hot = torch.nn.functional.one_hot(codes.long(), 16).flatten(1).double().numpy()
    for name, x in (("z", vectors.flatten(1).double().numpy()), ("codes", one_hot)):
        expected = probe.probe(x, actions, episodes, *split)
        assert np.allclose(r2[name][:3], expected[:3]), name
        assert not np.allclose(r2["shuffled " + name][:3], expected[:3]), name


@torch.no_grad()
@pytest.mark.parametrize("stage", (1, 2))
def test_decoder_gives_what_the_model_gives_for_single_pairs(dataset, stages, stage):
    """Features, codes of each set and the prediction with the instruction's text (stage 1)."""
    steps = np.arange(*dataset.starts[1:3])[::4]
    texts = latent.text_states("words", dataset.instructions())
    model = latent.load_lam(stages[stage - 1])
    torch.nn.init.normal_(model.out.weight, std=0.01)  # two updates hardly change what the decoder predicts
    decoder = probe.FramePairDecoder(model, dataset, texts if stage == 1 else None)
    a, b, codes, text = decoder.encode(steps)
    predicted = decoder.decode(a, codes, text)
    assert len(codes) == stage and len(text) == (2 if stage == 1 else 0)
    for row, step in enumerate(steps):
        pair = []
        for shown in (step, min(step + 6, dataset.starts[2] - 1)):
            frame = model.features.resize(dataset.image("image", shown))
            pair.append(model.features(torch.from_numpy(frame.copy())[None]))
        own_text = [texts[dataset.instruction(step)][None], torch.ones(1, 6, dtype=torch.bool)] if stage == 1 else []
        vectors = model.vectors(*pair, *own_text)
        own_codes = [s.quantiser.nearest(c) for s, c in zip(model.code_sets, vectors, strict=True)]
        assert all(torch.equal(c[row], own[0]) for c, own in zip(codes, own_codes, strict=True))
        quantised = [s.quantiser.codebook[c] for s, c in zip(model.code_sets, own_codes)]
        assert torch.allclose(predicted[row], model.predict(pair[0], quantised, *own_text)[0], atol=1e-5)
        assert torch.equal(b[row], pair[1][0])


@torch.no_grad()
def test_measures_of_the_decoder_equal_those_of_single_steps(dataset, lam):
    """Each code is decoded with the irrelevant codes of the frame that it is decoded on."""
    model = latent.load_lam(lam)
    torch.nn.init.normal_(model.out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    decoder = probe.FramePairDecoder(model, dataset, None)
    steps = np.arange(dataset.starts[3])
    measured = probe.decode_measures(decoder, steps)
    singles = [decoder.encode(np.array([step])) for step in steps]
    episodes, rng = step_episodes(dataset)[steps], np.random.default_rng(0)
    mixed = rng.permutation(len(steps))
    target = probe.other_episode_rows(episodes, rng)
    other = probe.other_episode_rows(episodes, rng)
    errors, other_errors, wins = [], [], []
    for step, (a, b, codes, text) in enumerate(singles):
        predicted_other = decoder.decode(a, [singles[mixed[step]][2][0], *codes[1:]], text)
        errors.append((decoder.decode(a, codes, text) - b).square().mean().item())
        other_errors.append((predicted_other - b).square().mean().item())
        frame, _, target_codes, target_text = singles[target[step]]
        other_codes = singles[other[step]][2][0]
        own_error, other_error = (
            (decoder.decode(frame, [c, *target_codes[1:]], target_text) - frame - (b - a)).square().mean().item()
            for c in (codes[0], other_codes)
        )
        if not torch.equal(codes[0], other_codes):
            wins.append((np.sign(other_error - own_error) + 1) / 2)
    copy_error = measured["reconstruction"]["copy_error"]
    assert measured["reconstruction"]["error"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert measured["reconstruction"]["other_ratio"] == pytest.approx(np.mean(other_errors) / copy_error, rel=1e-6)
    assert np.mean(errors) != pytest.approx(np.mean(other_errors), rel=1e-4)
    assert measured["transfer"] == pytest.approx(np.mean(wins), abs=1e-6)


def test_probes_use_the_right_inputs(index, dataset):
    """Vectors that hold the actions predict them, random ones do not, and neither do shuffled ones."""
    actions, episodes = probe.mean_actions(dataset, np.arange(len(dataset)), 8), step_episodes(index)
    fitted, held_out = split_episodes(index, 0.25, 0)
    rng = np.random.default_rng(0)
    moving = [0, 1, 2, 4, 5, 6]
    exact, noise = np.tile(actions, 4), rng.normal(size=(len(index), 20))
    for x, least, most in ((exact, 1 - 1e-4, 1), (exact[rng.permutation(len(index))], -1, 0.3), (noise, -1, 0.3)):
        r2 = probe.probe(x, actions, episodes, fitted, held_out)[moving]
        assert least <= r2.min() and r2.max() <= most


def test_tokenizer_is_measured_in_the_units_of_the_data(index, dataset, rlds, tokenizer):
    """Against the samples of training, one at a time; the gripper is -1 open and 1 closed, as it is stored."""
    model, split = latent.load_tokenizer(tokenizer), probe.held_out(tokenizer, dataset, 300)
    report = probe.probe_tokenizer(model, dataset, probe.Config(rlds, tokenizer=tokenizer), split)
    stored = np.asarray(index.columns["action"])
    normaliser = normalise.Normaliser(dataset.stats["action"])
    chunks = batches.ActionChunks([dataset], [["image"]], 8)
    errors = []
    for step in episode_steps(index, split[1]):
        sample = chunks.sample(0, step)
        codes, _ = model.encode(sample["actions"][None], sample["valid"][None])
        count = int(sample["valid"].sum())
        decoded = normaliser.unnormalise(model.decode(codes)[0].numpy())
        decoded[:, 6] = 1 - 2 * decoded[:, 6]
        errors.append((decoded[:count] - stored[step : step + count]) ** 2)
    assert report["error"] == pytest.approx(np.sqrt(np.concatenate(errors).mean(0)), rel=1e-4)
    assert report["steps"] == len(errors)
    assert report["spread"][6] > 0.9 and report["dimensions"] == dataset.spec.action_names


def test_data_of_a_mixture_is_measured_with_its_own_description(rlds, rlds_latents, cache, tmp_path):
    """The second of two embodiments: its dimensions, in stored units; with another description nothing is measured."""
    spec = tmp_path / "spec.json"
    content = {"embodiment": "five", "cameras": {"front": "observation/image"}, "action": ["action[2:7]"]}
    content["grippers"] = [{"index": 4, "open": -1, "closed": 1}]
    spec.write_text(json.dumps(content))
    settings = dict(data=[rlds, rlds_latents], spec=("libero", str(spec)), cache=cache, max_steps=1)
    settings |= dict(global_batch_size=8, val_fraction=0.25)
    tokenizer, lam = tmp_path / "tokenizer", tmp_path / "lam"
    train_latent.train(train_latent.TokenizerTraining(out=tokenizer, num_codes=8, code_dim=8, **settings), ONE)
    train_latent.train(train_latent.LamTraining(out=lam, image_size=24, width=16, delta=6, **settings), ONE)
    config = probe.Config(rlds_latents, lam, tokenizer, out=tmp_path / "out", cache=cache, spec=str(spec))
    report = probe.main(config)
    assert report["lam"]["dimensions"] == report["tokenizer"]["dimensions"] == [f"action {n}" for n in range(5)]
    assert len(report["lam"]["r2"]["z"]) == 5
    dataset = open_dataset(rlds_latents, cache, str(spec))
    _, held_out = split_episodes(dataset, 0.25, 0)
    steps, valid = batches.chunk_steps(dataset.starts, episode_steps(dataset, held_out), 8)
    spread = dataset.stored_action(steps[valid]).std(0)
    assert report["tokenizer"]["spread"] == pytest.approx(spread.tolist(), rel=1e-4) and spread[4] > 0.9
    first = probe.main(probe.Config(rlds, None, tokenizer, out=tmp_path / "out", cache=cache))
    assert len(first["tokenizer"]["error"]) == 7
    content["embodiment"] = "six"
    spec.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="sizes {'libero': 7, 'five': 5}, but released, .*spec.json, has 5 of six"):
        probe.main(replace(config, lam=None))


def test_video_without_actions_has_no_regression_but_all_the_rest(video, cache, tmp_path):
    """Reconstruction, usage and both pictures."""
    folder = tmp_path / "lam"
    config = train_latent.LamTraining(data=[video], out=folder, cache=cache, **SMALL | dict(val_fraction=0.4))
    train_latent.train(config, ONE)
    report = probe.main(probe.Config(video, folder, cache=cache))["lam"]
    assert "r2" not in report and report["reconstruction"]["error"] > 0 and len(report["usage"]) == 4
    assert (folder / "codes.png").exists() and (folder / "probe.png").exists()


def copy_with_settings(folder, out, **settings):
    """Copy a model's folder to `out` with other training settings in its config.json; return `out`."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    config["training"] |= settings
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_single_held_out_episode_has_no_transfer(rlds, cache, tmp_path, lam):
    """There is no frame of a different episode."""
    folder = copy_with_settings(lam, tmp_path / "lam", val_fraction=0.1)
    report = probe.main(probe.Config(rlds, folder, cache=cache))
    assert report["lam"]["transfer"] is None and (folder / "codes.png").exists()


def test_bad_input_is_refused_with_a_remedy(rlds, rlds_latents, cache, lam, tokenizer, tmp_path):
    """Before anything is written."""

    def refused(error, match, data=rlds, **flags):
        with pytest.raises(error, match=match):
            probe.main(probe.Config(data, cache=cache, out=tmp_path / "out", **flags))

    refused(ValueError, "which model to probe: --lam")
    refused(ValueError, "max_episodes is 2; it takes 3", lam=lam, max_episodes=2)
    refused(ValueError, "not trained on .*released.* but on made.*train_latent.py lam", rlds_latents, lam=lam)
    refused(ValueError, "not trained on .*released.*train_latent.py tokenizer", rlds_latents, tokenizer=tokenizer)
    refused(ValueError, "position is 4; .* has 0 to 3", lam=lam, position=4)
    refused(FileNotFoundError, "no config.json.*train_latent.py lam", lam=tmp_path)
    without = copy_with_settings(lam, tmp_path / "all", val_fraction=0.0)
    refused(ValueError, "holds 0 of 8 episodes out.*--val-fraction 0.1", lam=without)
    refused(ValueError, "and 2 to fit", lam=copy_with_settings(lam, tmp_path / "few", val_fraction=0.99))
    assert not (tmp_path / "out").exists()


def test_held_out_is_what_training_held_out(lam, index, tmp_path):
    """By the model's own seed; with a limit held-out ones come first, and others are spread over all."""
    all_fitted, all_held = probe.held_out(lam, index, 300)
    fitted, held = probe.held_out(lam, index, 4)
    assert held.tolist() == all_held.tolist() and fitted.tolist() == all_fitted[[0, -1]].tolist()
    fitted, held = probe.held_out(lam, index, 3)
    assert (len(fitted), len(held)) == (2, 1)
    split = probe.held_out(copy_with_settings(lam, tmp_path / "other", seed=3), index, 300)
    for episodes, expected in zip(split, split_episodes(index, 0.25, 3), strict=True):
        assert episodes.tolist() == expected.tolist()


def test_examples_of_codes_are_pairs_delta_apart(index):
    """Each code's rows, the most frequent first, and pairs of its steps that stay in their episode."""
    steps = np.arange(*index.starts[[2, 5]])
    codes = np.arange(len(steps)) % 3
    codes[-9:] = 2
    examples = probe.code_examples(index, steps, codes, 4)
    assert [code for code, *_ in examples] in ([2, 0, 1], [2, 1, 0])
    for code, rows, pairs in examples:
        assert rows.tolist() == np.flatnonzero(codes == code).tolist() and len(pairs) == 3
        assert len({index.episode_of(a) for a, _ in pairs}) == 3
        for a, b in pairs:
            end = index.starts[np.searchsorted(index.starts, a, "right")] - 1
            assert codes[a - steps[0]] == code and b == min(a + 4, end)
