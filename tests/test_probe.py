"""probe.py: each measure against an example made by hand, then the command as a user runs it."""

import ast
import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import latent
import probe

ONE = common.Ranks(0, 1, torch.device("cpu"))

# ----------------------------------------------------------------------------------------------------------------------
# Ridge regression


@pytest.fixture(scope="module")
def linear():
    """x [400, 5], its linear map y [400, 3] whose last dimension is constant, and the episode of each step, 20 each."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) * [1, 10, 100, 1e-3, 0] + 7
    y = x @ rng.normal(size=(5, 3)) / [1, 10, 1] + [5, -3, 0]
    y[:, 2] = 0.3
    return x, y, np.repeat(np.arange(20), 20)


def test_ridge_finds_a_linear_map_and_nothing_in_shuffled_inputs(linear):
    x, y, episodes = linear
    found = probe.probe(x, y, episodes, fitted=range(15), held=range(15, 20))
    assert found[:2] == pytest.approx([1, 1], abs=1e-6) and np.isnan(found[2])
    shuffled = x[np.random.default_rng(1).permutation(400)]
    assert np.abs(probe.probe(shuffled, y, episodes, range(15), range(15, 20))[:2]).max() < 0.1


def test_ridge_equals_its_normal_equations(linear):
    x, y, _ = linear
    z, strength = (x[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0), probe.STRENGTHS[7]
    weights = np.linalg.solve(z.T @ z + 400 * strength * np.eye(4), z.T @ (y - y.mean(0)))
    assert np.allclose(probe.ridge(x, y)(x)[7], z @ weights + y.mean(0))


def test_strength_is_chosen_on_whole_episodes_and_per_dimension():
    """Inputs that name the episode predict its own steps and no other's: only a strong penalty survives that."""
    rng, episodes = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    signal = rng.normal(size=(300, 1))
    x = np.concatenate([signal, rng.normal(size=(30, 40))[episodes]], 1)
    y = np.concatenate([signal, rng.normal(size=(30, 1))[episodes]], 1)
    own, foreign = probe.STRENGTHS[probe.best_strengths(x, y, episodes)]
    assert own <= 0.1 and foreign >= 1
    within = probe.best_strengths(x, y, np.arange(300))  # every step an episode of its own
    assert probe.STRENGTHS[within[1]] < 0.1


def test_held_out_episodes_are_scored_and_not_fitted(linear):
    """Where the held-out episodes follow the opposite map, what was fitted elsewhere is far worse than a guess."""
    x, y, episodes = linear
    opposite = np.where(episodes[:, None] < 15, y, 2 * y[episodes < 15].mean(0) - y)
    assert probe.probe(x, opposite, episodes, range(15), range(15, 20))[:2] == pytest.approx([-3, -3], abs=1e-4)


def test_r_squared_by_hand():
    y, predicted = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [1.0], [3.0]])
    assert probe.r_squared(predicted, y, np.array([1.0])) == pytest.approx([0])
    assert probe.r_squared(predicted, y, np.array([3.0])) == pytest.approx([1 - 2 / 14])
    assert np.isnan(probe.r_squared(y, np.ones((3, 1)), np.array([1.0])))


# ----------------------------------------------------------------------------------------------------------------------
# Codes and what is decoded from them


def test_usage_by_hand():
    codes = torch.tensor([[0, 3], [1, 3], [0, 3], [1, 3]])
    found = probe.usage(codes, 4)
    assert (found["num_codes"], found["usage"]) == (4, [2, 1]) and found["perplexity"] == pytest.approx([2, 1])


SHIFT = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])  # what each of three codes adds to every patch


def swap(codes, others, by=1.0, wrong=0):
    """One batch: the change that each code decodes to, `by` x SHIFT, that of another code, and exactly SHIFT."""
    codes, others = torch.tensor(codes), torch.tensor(others)
    decoded = ((codes + wrong) % 3, (others + wrong) % 3, codes)
    own, other, change = (SHIFT[c][:, None].expand(-1, 5, -1) for c in decoded)
    return [(by * own, by * other, change, codes != others)]


def test_transfer_is_1_where_the_code_decides_and_half_where_it_does_not_matter():
    assert probe.transfer(swap([0, 1, 2, 0], [1, 2, 0, 2])) == 1.0
    assert probe.transfer(swap([0, 1, 2, 0], [1, 2, 0, 2], by=0)) == 0.5
    assert probe.transfer(swap([0, 1], [2, 0], wrong=1)) == 0.0
    assert probe.transfer(swap([0, 1, 2, 2], [1, 1, 2, 2])) == 1.0  # equal codes do not count
    assert probe.transfer(swap([1, 1], [1, 1])) == 0.5


def test_reconstruction_by_hand():
    a = torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]], [[5.0, 5.0]]])
    b = a + torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[3.0, 0.0]]])
    guess, other = a + SHIFT[1], a - SHIFT[1]
    found = probe.reconstruction([(x[:2], y[:2], a[:2], b[:2]) for x, y in [(guess, other)]]
                                 + [(x[2:], y[2:], a[2:], b[2:]) for x, y in [(guess, other)]])  # fmt: skip
    assert (found["error"], found["copy_error"]) == (pytest.approx(4 / 6), pytest.approx(11 / 6))
    assert found["ratio"] == pytest.approx(4 / 11) and found["other_ratio"] == pytest.approx((4 + 4 + 16) / 11)


def test_elsewhere_is_in_another_episode():
    episodes = np.repeat([3, 5, 9], [10, 1, 20])
    found = probe.elsewhere(episodes, np.random.default_rng(0))
    assert (episodes[found] != episodes).all() and len(np.unique(found)) > 8


def test_tokenizer_error_by_hand():
    actions = np.zeros((2, 2, 3), np.float32)
    decoded = actions + np.array([[[3, 0, 0.5], [1, 0, 0.5]], [[0, 4, 0.5], [9, 9, 9]]], np.float32)
    valid = np.array([[True, True], [True, False]])
    assert probe.physical_error(decoded, actions, valid) == pytest.approx([(10 / 3) ** 0.5, (16 / 3) ** 0.5, 0.5])


def test_examples_come_from_different_episodes_first():
    episodes = np.array([1, 1, 1, 1, 4, 1, 7])
    found = probe.examples(episodes, 5, np.random.default_rng(0))
    assert sorted(episodes[found[:3]]) == [1, 4, 7] and len(set(found)) == 5
    assert sorted(probe.examples(episodes, 9, np.random.default_rng(0))) == list(range(7))


# ----------------------------------------------------------------------------------------------------------------------
# Steps of a data set


def test_chunks_and_later_frames_stay_in_their_episode(index):
    start, end = index.starts[2:4]
    assert data.later(index, np.array([start, end - 3, end - 1]), 2).tolist() == [start + 2, end - 1, end - 1]
    means, stored = probe.mean_actions(index, 4), data.standardise(index.columns["action"])
    for step, last in ((start, start + 4), (end - 2, end), (end - 1, end)):
        assert np.allclose(means[step], stored[step:last].mean(0), atol=1e-6)
    _, valid = probe.action_chunks(index, np.array([end - 2]), 4)
    assert valid.tolist() == [[True, True, False, False]]


# ----------------------------------------------------------------------------------------------------------------------
# The command


SMALL = dict(max_steps=2, global_batch_size=8, val_fraction=0.25, image_size=24, width=16, delta=6)


@pytest.fixture(scope="module")
def stages(rlds, cache, tmp_path_factory):
    """Folders of both stages of an image-based model, trained on `rlds` for two steps, a quarter held out."""
    one, two = (tmp_path_factory.mktemp("probe") / name for name in ("one", "two"))
    latent.train(latent.Lam(data=[rlds], out=one, cache=cache, stage=1, **SMALL), ONE)
    latent.train(latent.Lam(data=[rlds], out=two, cache=cache, stage=2, init_from=one, **SMALL), ONE)
    return one, two


@pytest.fixture(scope="module")
def lam(stages):
    """Folder of the second stage."""
    return stages[1]


def test_the_command(rlds, cache, index, lam, tokenizer, tmp_path, script):
    flags = ("--data", rlds, "--cache", cache, "--lam", lam, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    done = script("probe.py", *flags)
    assert done.code == 0, done.text
    for words in ("codes in use", "reconstruction", "transfer", "shuffled codes", "error (rms)", "gripper"):
        assert words in done.text
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    lam_part, tokens = report["lam"], report["tokenizer"]
    _, held = data.split_episodes(index, 0.25, 0)
    assert lam_part["held_out_episodes"] == held.tolist() and lam_part["steps"] == len(data.steps_of(index, held))
    assert len(lam_part["usage"]) == len(lam_part["perplexity"]) == 4
    assert (
        lam_part["reconstruction"].keys() == {"error", "copy_error", "ratio", "other_ratio"}
        and 0 <= lam_part["transfer"] <= 1
    )
    assert lam_part["r2"].keys() == {"z", "codes", "shuffled z", "shuffled codes"}
    assert all(len(row) == 7 and row[3] is None and row[0] <= 1 for row in lam_part["r2"].values())  # [3] never moves
    both = data.split_episodes(index, 0.25, 0)
    parts = latent.label_episodes(index, latent.load_lam(lam), np.concatenate(both))
    codes, vectors = map(torch.cat, zip(*parts, strict=True))
    steps, actions = data.steps_of(index, np.concatenate(both)), probe.mean_actions(index, 8)
    hot = torch.nn.functional.one_hot(codes.long(), 16).flatten(1).double().numpy()
    for name, x in (("z", vectors.flatten(1).double().numpy()), ("codes", hot)):
        expected = probe.probe(x, actions[steps], probe.episodes_of(index)[steps], *both)
        assert np.allclose(lam_part["r2"][name][:3], expected[:3]), name
        assert not np.allclose(lam_part["r2"]["shuffled " + name][:3], expected[:3]), name
    assert lam_part["fingerprint"] == latent.fingerprint(lam) and lam_part["stage"] == 2
    assert len(tokens["error"]) == len(tokens["spread"]) == 7 and tokens["spread"][3] == 0
    for name, least in (("probe.png", (1200, 600)), ("codes.png", (1000, 150))):
        picture = Image.open(tmp_path / "out" / name)
        assert picture.width >= least[0] and picture.height >= least[1] and picture.convert("L").getextrema()[0] < 50


@torch.no_grad()
def test_scenes_show_each_code_on_the_frame_with_its_own_irrelevant_codes_and_text(index, stages):
    """What both stages decode, one step at a time, from the model itself; reconstruction and transfer follow."""
    steps, texts = np.arange(*index.starts[1:3])[::4], latent.text_states("words", index.instructions)
    for folder, words in zip(stages, (texts, None), strict=True):
        model = latent.load_lam(folder)
        torch.nn.init.normal_(model.out.weight, std=0.01)  # two steps of training hardly reach the decoder
        scenes = probe.Scenes(model, index, words)
        a, b, codes, text = scenes.at(steps)
        assert len(codes) == model.sizes.stage and len(text) == (2 if words else 0)
        for row, step in enumerate(steps):
            pair = [torch.from_numpy(model.features.read(index.image("image", s)).copy())[None]
                    for s in (step, min(step + 6, index.starts[2] - 1))]  # fmt: skip
            ours = [texts[index.instructions[1]][None], torch.ones(1, 6, dtype=torch.bool)] if words else []
            frame, target = map(model.features, pair)
            found = [s.quantiser.nearest(c) for s, c in zip(model.sets, model.vectors(frame, target, *ours))]
            assert all(torch.equal(c[row], own[0]) for c, own in zip(codes, found, strict=True))
            guess = model.predict(frame, [s.quantiser.codebook[c] for s, c in zip(model.sets, found)], *ours)
            assert torch.allclose(scenes.decode(a, codes, text)[row], guess[0], atol=1e-5)
            assert torch.equal(b[row], target[0])
    steps = np.arange(index.starts[3])
    found = probe.decode_measures(scenes, steps)
    every, episodes = [scenes.at(np.array([step])) for step in steps], probe.episodes_of(index)[steps]
    rng = np.random.default_rng(0)
    mixed, target, other = rng.permutation(len(steps)), probe.elsewhere(episodes, rng), probe.elsewhere(episodes, rng)
    errors, others, wins = [], [], []
    for step, (a, b, codes, text) in enumerate(every):
        without = scenes.decode(a, [every[mixed[step]][2][0], *codes[1:]], text)
        errors.append((scenes.decode(a, codes, text) - b).square().mean().item())
        others.append((without - b).square().mean().item())
        frame, _, theirs, words = every[target[step]]
        own, another = (
            (scenes.decode(frame, [c, *theirs[1:]], words) - frame - (b - a)).square().mean().item()
            for c in (codes[0], every[other[step]][2][0])
        )
        if not torch.equal(codes[0], every[other[step]][2][0]):
            wins.append((np.sign(another - own) + 1) / 2)
    copied = found["reconstruction"]["copy_error"]
    assert found["reconstruction"]["error"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert found["reconstruction"]["other_ratio"] == pytest.approx(np.mean(others) / copied, rel=1e-6)
    assert np.mean(errors) != pytest.approx(np.mean(others), rel=1e-4)
    assert found["transfer"] == pytest.approx(np.mean(wins), abs=1e-6)


def test_probes_read_the_right_inputs(index):
    """Vectors that are the answer explain it all, random ones nothing, and neither does when shuffled."""
    actions, episodes, rng = probe.mean_actions(index, 8), probe.episodes_of(index), np.random.default_rng(0)
    fitted, held = data.split_episodes(index, 0.25, 0)
    moving = [0, 1, 2, 4, 5, 6]
    answers, noise = np.tile(actions, 4), rng.normal(size=(len(index), 20))
    for x, least, most in ((answers, 1 - 1e-4, 1), (answers[rng.permutation(len(index))], -1, 0.3), (noise, -1, 0.3)):
        found = probe.probe(x, actions, episodes, fitted, held)[moving]
        assert least <= found.min() and found.max() <= most


def test_tokenizer_is_measured_in_the_units_of_the_data(index, rlds, tokenizer):
    """Against the samples of training, one at a time."""
    model, split = latent.load_tokenizer(tokenizer), probe.held_out(tokenizer, index, 300)
    found = probe.probe_tokenizer(model, index, probe.Config(rlds, tokenizer=tokenizer), split)
    stored, stats = data.standardise(index.columns["action"]), data.statistics(index)
    chunks, errors = data.Chunks([index], [stats], [], 8), []
    for step in data.steps_of(index, split[1]):
        sample = chunks.sample(0, step)
        codes, _ = model.encode(sample["actions"][None], sample["valid"][None])
        count = int(sample["valid"].sum())
        decoded = data.unnormalise(model.decode(codes)[0].numpy(), stats["action"])
        errors.append((decoded[:count] - stored[step : step + count]) ** 2)
    assert found["error"] == pytest.approx(np.sqrt(np.concatenate(errors).mean(0)), rel=1e-4)
    assert found["steps"] == len(errors)


def test_video_without_actions_has_no_probe_but_all_the_rest(video, cache, tmp_path):
    latent.train(latent.Lam(data=[video], out=tmp_path / "lam", cache=cache, **SMALL | dict(val_fraction=0.4)), ONE)
    report = probe.main(probe.Config(video, tmp_path / "lam", cache=cache))["lam"]
    assert "r2" not in report and report["reconstruction"]["error"] > 0 and len(report["usage"]) == 4
    assert (tmp_path / "lam" / "codes.png").exists() and (tmp_path / "lam" / "probe.png").exists()


def changed(folder, out, part="training", **values):
    """A copy of a model's folder whose config says that it was trained otherwise."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    config[part] |= values
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_single_held_out_episode_has_no_transfer(rlds, cache, tmp_path, lam):
    folder = changed(lam, tmp_path / "lam", val_fraction=0.1)
    report = probe.main(probe.Config(rlds, folder, cache=cache))
    assert report["lam"]["transfer"] is None and (folder / "codes.png").exists()


def test_every_setting_is_read():
    nodes = ast.walk(ast.parse(open(probe.__file__).read()))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "config"}
    assert {field.name for field in fields(probe.Config)} <= read


def test_bad_input_is_refused_with_a_remedy(rlds, rlds_latents, cache, lam, tokenizer, tmp_path):
    def refused(kind, match, data=rlds, **flags):
        with pytest.raises(kind, match=match):
            probe.main(probe.Config(data, cache=cache, out=tmp_path / "out", **flags))

    refused(ValueError, "which model to probe: --lam")
    refused(ValueError, "max_episodes is 2; it takes 3", lam=lam, max_episodes=2)
    refused(ValueError, "not trained on .*released.* but on made.*latent.py lam", rlds_latents, lam=lam)
    refused(ValueError, "not trained on .*released.*latent.py tokenizer", rlds_latents, tokenizer=tokenizer)
    refused(ValueError, "position is 4; .* has 0 to 3", lam=lam, position=4)
    refused(FileNotFoundError, "no config.json.*latent.py lam", lam=tmp_path)
    without = changed(lam, tmp_path / "all", val_fraction=0.0)
    refused(ValueError, "holds 0 of 8 episodes out.*--val-fraction 0.1", lam=without)
    refused(ValueError, "and 2 to fit", lam=changed(lam, tmp_path / "few", val_fraction=0.99))
    assert not (tmp_path / "out").exists()


def test_held_out_is_what_training_held_out(lam, index, tmp_path):
    """By the model's own seed; with a limit held-out ones come first, and others from everywhere."""
    fitted, held = probe.held_out(lam, index, 4)
    whole, apart = probe.held_out(lam, index, 300)
    assert held.tolist() == apart.tolist() and fitted.tolist() == whole[[0, -1]].tolist()
    fitted, held = probe.held_out(lam, index, 3)
    assert (len(fitted), len(held)) == (2, 1)
    other = probe.held_out(changed(lam, tmp_path / "other", seed=3), index, 300)
    for found, expected in zip(other, data.split_episodes(index, 0.25, 3), strict=True):
        assert found.tolist() == expected.tolist()


def test_examples_of_codes_are_pairs_delta_apart(index):
    """Each code's rows, the most frequent first, and pairs of its steps that stay in their episode."""
    steps, codes = np.arange(*index.starts[[2, 5]]), np.arange(np.diff(index.starts[[2, 5]])[0]) % 3
    codes[-9:] = 2
    found = probe.code_examples(index, steps, codes, 4)
    assert [code for code, *_ in found] == [2, 0, 1] or [code for code, *_ in found] == [2, 1, 0]
    for code, rows, pairs in found:
        assert rows.tolist() == np.flatnonzero(codes == code).tolist() and len(pairs) == 3
        assert len({int(probe.episodes_of(index)[a]) for a, _ in pairs}) == 3
        for a, b in pairs:
            end = index.starts[np.searchsorted(index.starts, a, "right")] - 1
            assert codes[a - steps[0]] == code and b == min(a + 4, end)
