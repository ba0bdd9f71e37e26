"""Measure on held-out episodes whether latent actions are good enough to train a policy on.

    python probe.py --data data/libero_tiny --lam runs/lam                            # image-based latent actions
    python probe.py --data data/libero_tiny --tokenizer data/libero_tiny/tokenizer    # action tokenizer; or both

Prints the numbers and writes probe.json, probe.png (charts) and, for an image-based model, codes.png: examples of what
each code stands for.

    codes in use     at each code position, and their perplexity: the number of equally frequent codes that would vary
                     as much. Few of many mean a collapsed codebook; 12 of 16 are good.
    reconstruction   squared error of the predicted later frame / that of showing the current frame again: 0.8 and less
                     are good. The same with the codes of a random other step measures what the decoder predicts without
                     them (much, in a fixed scene); good codes are clearly better than that.
    R2 of actions    how well ridge regression predicts each action dimension, averaged over the next chunk: from the
                     vectors z before quantisation, from the codes (one-hot), and from both in shuffled order, which
                     must give about 0. R2 is the share of the squared error of always predicting the mean of the
                     training episodes that the regression removes; 0.5 and more, where the arm moves a lot, are good.
    transfer         the code of one episode decoded on a frame of a different one: how often is the predicted change
                     closer to the change that the code came from than that of a random code? 0.5 is chance; 1 is out of
                     reach, since objects lie elsewhere in the other episode.
    tokenizer error  root mean square difference between recorded and decoded actions in the units of the data, as they
                     are stored (LIBERO: 1 is 5 cm, or 0.5 rad, per step; gripper -1 open, 1 closed), and the spread of
                     that dimension.

Held-out episodes are those that `train_latent.py` held out: the split is made again from the settings stored with the
model. The regression is fitted on the other episodes, its strength chosen there for each dimension by cross-validation
over whole episodes. The task-irrelevant codes of a stage 2 and the text of a stage 1 are those of the frame that is
decoded on. Leaves out probes of single code positions and non-linear ones.

Axes: n steps measured, B batch, H chunk steps, A action size, P codes per step, K codebook size, d inputs of a
regression, N patches of a frame, F features of a patch, G ridge strengths.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

from batches import chunk_steps
from common import init_distributed
from data import open_dataset
from files import check_writable, git_commit, make_folder, read_json, write_json
from index import CACHE, episode_steps, later_steps, split_episodes
from label import label_episodes
from latent import camera_name, check_frames, fingerprint, load_lam, load_tokenizer, stack_texts, text_states
from normalise import unstandardise
from quantiser import code_counts, code_usage

BATCH = 64  # frames, pairs and chunks computed at once
MAX_DECODED = 2048  # held-out steps, at most, on which the decoder is measured
FOLDS = 5  # of the cross-validation
STRENGTHS = 10.0 ** np.arange(-6, 4)  # of the ridge penalty, in units of an input's variance
EXAMPLES = 3  # frame pairs of each code in codes.png


@dataclass
class Config:
    """Settings of `python probe.py`."""

    data: Path
    """folder of a data set that the models were trained on"""
    lam: Path | None = None
    """folder of a model that `train_latent.py lam` trained"""
    tokenizer: Path | None = None
    """folder of a model that `train_latent.py tokenizer` trained"""
    position: int = 0
    """code position that codes.png shows"""
    max_episodes: int = 300
    """at most so many episodes are encoded, the held-out ones first"""
    out: Path | None = None
    """folder for probe.json, probe.png and codes.png; default: that of the lam, else of the tokenizer"""
    cache: Path = CACHE
    """where indices are kept"""
    spec: str = ""
    """description of the data: a JSON file or the name of a preset (default: spec.json next to it, or what fits)"""


# ----------------------------------------------------------------------------------------------------------------------
# Which episodes, which steps


def held_out(path, dataset, max_episodes):
    """Return (training episodes, held-out episodes), together at most max_episodes, as the model in `path` was trained.

    Raise ValueError when it was trained on other data, or when the split leaves nothing to fit or to measure.
    """
    config = read_json(path / "config.json")
    training = config["training"]
    trained_on = {entry["fingerprint"]: entry["name"] for entry in config["data"]}
    if dataset.fingerprint not in trained_on:
        raise ValueError(
            f"{path} was not trained on {dataset.directory} but on {', '.join(trained_on.values())}, so its held-out "
            "episodes are unknown. Give --data what it was trained on, or train: "
            f"python train_latent.py {config['kind']}"
        )
    fitted, held = split_episodes(dataset, training["val_fraction"], training["seed"])
    if not len(held) or len(fitted) < 2:
        raise ValueError(
            f"{path}: val_fraction {training['val_fraction']} holds {len(held)} of {len(fitted) + len(held)} episodes "
            "out; it takes 1, and 2 to fit. Train it again with --val-fraction 0.1, or on more episodes."
        )
    held = evenly_spaced(held, max_episodes - 2)
    return evenly_spaced(fitted, max_episodes - len(held)), held


def evenly_spaced(items, count):
    """Return at most `count` of an array's items, evenly spread over it."""
    if len(items) <= count:
        return items
    return items[np.linspace(0, len(items) - 1, count).astype(int)]


def episodes_of(dataset, steps):
    """Return the episode of each of some steps, i64 like `steps`."""
    return np.searchsorted(dataset.starts, steps, "right") - 1


def action_chunks(read, steps):
    """Return the actions f32 [n, H, A] at `steps` i64 [n, H]. read: a data set's function (i64 [m]) -> f32 [m, A]"""
    return read(steps.ravel()).reshape(*steps.shape, -1)


def mean_actions(dataset, steps, chunk):
    """Return f64 [n, A]: the mean action over the chunk of each of `steps` i64 [n] within its episode, as stored."""
    chunks, valid = chunk_steps(dataset.starts, steps, chunk)
    actions = action_chunks(dataset.stored_action, chunks)
    return (actions * valid[..., None]).sum(1, dtype=np.float64) / valid.sum(1)[:, None]


def dimension_names(dataset):
    """Return the names of the dimensions of a data set's action: those of its description, else numbers."""
    return dataset.spec.action_names or [f"action {number}" for number in range(dataset.action_size)]


# ----------------------------------------------------------------------------------------------------------------------
# Ridge regression


def ridge(x, y):
    """Fit y f64 [n, A] linearly to x [n, d], inputs standardised.

    Returns the function x [m, d] -> predictions [G, m, A], for each of STRENGTHS.
    """
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)  # an input that is constant here gets no weight
    z = (x - mean) / scale
    values, axes = np.linalg.eigh(z.T @ z / len(z))  # [d], [d, d]
    target = axes.T @ (z.T @ (y - y.mean(0)) / len(z))  # [d, A]
    weights = np.stack([axes @ (target / (values + strength)[:, None]) for strength in STRENGTHS])  # [G, d, A]

    def predict(x):
        return (x - mean) / scale @ weights + y.mean(0)

    return predict


def best_strengths(x, y, episodes):
    """Return i64 [A]: for each dimension of y [n, A] the number of the strength that predicts left-out episodes best.

    x: [n, d]; episodes: i64 [n]. Whole episodes are left out, every FOLDS-th at a time: neighbouring steps are alike.
    """
    folds = np.unique(episodes, return_inverse=True)[1] % FOLDS
    errors = np.zeros((len(STRENGTHS), y.shape[1]))
    for fold in np.unique(folds):
        left_out = folds == fold
        predict = ridge(x[~left_out], y[~left_out])
        errors += np.square(predict(x[left_out]) - y[left_out]).sum(1)
    return errors.argmin(0)


def r_squared(predicted, y, reference):
    """Return [A]: 1 - squared error / that of always predicting `reference` [A], for y [n, A].

    It is nan where the reference is exact.
    """
    spread = np.square(y - reference).sum(0)
    spread = np.where(spread > 1e-12 * len(y), spread, np.nan)
    return 1 - np.square(predicted - y).sum(0) / spread


def probe(x, y, episodes, fitted, held):
    """Return R2 [A] on the episodes `held` of a ridge regression from x [S, d] to y [S, A] on the episodes `fitted`.

    episodes: i64 [S], of every step.
    """
    fit = np.isin(episodes, fitted)
    measured = np.isin(episodes, held)
    chosen = best_strengths(x[fit], y[fit], episodes[fit])
    predicted = ridge(x[fit], y[fit])(x[measured])  # [G, n, A]
    predicted = predicted[chosen, :, np.arange(y.shape[1])].T  # [n, A]
    return r_squared(predicted, y[measured], y[fit].mean(0))


# ----------------------------------------------------------------------------------------------------------------------
# What the decoder makes of the codes


def reconstruction(batches):
    """Return mean squared errors of the decoder: {"error", "copy_error", "ratio", "other_ratio"}.

    batches: of (prediction, prediction with other steps' codes, frame, later frame), [B, N, F] each. copy_error is that
    of showing the frame again; the ratios are the errors of the two predictions / copy_error, None where that is 0.
    """
    errors, count = [], 0
    for predicted, predicted_other, frame, later in batches:
        errors.append([F.mse_loss(x, later) * len(later) for x in (predicted, predicted_other, frame)])
        count += len(later)
    error, other_error, copy_error = (float(sum(column)) for column in zip(*errors, strict=True))
    ratio = error / copy_error if copy_error else None
    other_ratio = other_error / copy_error if copy_error else None
    return {"error": error / count, "copy_error": copy_error / count, "ratio": ratio, "other_ratio": other_ratio}


def transfer(batches):
    """Return how often a code decoded on a different episode's frame predicts its own change better than a random code.

    batches: of (change that the codes decode to there, change that random codes decode to, change where the codes come
    from, [B, N, F] each; bool [B], whether the two codes differ). Equal codes are left out, a draw counts half. Returns
    a share in [0, 1], and 0.5 when nothing is left.
    """
    wins = []
    for own, other, true_change, differ in batches:
        own_error = (own - true_change).square().mean((1, 2))
        other_error = (other - true_change).square().mean((1, 2))
        wins.append(((torch.sign(other_error - own_error) + 1) / 2)[differ])
    wins = torch.cat(wins)
    return float(wins.mean()) if len(wins) else 0.5


def other_episode_rows(episodes, rng):
    """Return i64 [n]: for each row a random row of a different episode. episodes: i64 [n]"""
    return np.array([rng.choice(np.flatnonzero(episodes != episode)) for episode in episodes])


class FramePairDecoder:
    """Encodes the frame pairs of a data set with an image-based model and decodes codes on its frames."""

    def __init__(self, model, dataset, texts):
        """texts: {instruction: states} for a model of stage 1, else None."""
        self.model = model
        self.dataset = dataset
        self.camera = camera_name(model.sizes, dataset)
        self.texts = texts
        self.device = model.patch_up.weight.device

    def features(self, steps):
        """Return the patch features f32 [B, N, F] of the frames at `steps` i64 [B]."""
        frames = [self.model.features.resize(self.dataset.image(self.camera, step)) for step in steps]
        return self.model.features(torch.from_numpy(np.stack(frames)).to(self.device))

    def text(self, steps):
        """Return (states [B, n, width], mask bool [B, n]) of the instructions at `steps`, or () without texts."""
        if self.texts is None:
            return ()
        return stack_texts([self.texts[self.dataset.instruction(step)] for step in steps], self.device)

    def encode(self, steps):
        """Return (features of the frames, of those delta later, codes i64 [B, P] of each set, text) at `steps`."""
        a = self.features(steps)
        b = self.features(later_steps(self.dataset, steps, self.model.sizes.delta))
        text = self.text(steps)
        vectors = self.model.vectors(a, b, *text)
        codes = [code_set.quantiser.nearest(c) for code_set, c in zip(self.model.code_sets, vectors, strict=True)]
        return a, b, codes, text

    def decode(self, a, codes, text):
        """Return the later frame's features [B, N, F] that codes of each set predict from features a of a frame."""
        quantised = [code_set.quantiser.codebook[c] for code_set, c in zip(self.model.code_sets, codes, strict=True)]
        return self.model.predict(a, quantised, *text)


def decode_measures(decoder, steps):
    """Return {"reconstruction", "transfer"} at `steps` i64 [n]; transfer is None when all steps are of one episode."""
    steps = evenly_spaced(steps, MAX_DECODED)
    rng = np.random.default_rng(0)
    episodes = episodes_of(decoder.dataset, steps)
    mixed = rng.permutation(len(steps))  # the step whose codes replace the own ones
    several = len(np.unique(episodes)) > 1
    if several:
        target = other_episode_rows(episodes, rng)  # the step on whose frame the codes are decoded
        other = other_episode_rows(episodes, rng)  # the step of the random code

    def exported_codes(rows):
        return decoder.encode(steps[rows])[2][0]

    reconstructed, transferred = [], []
    for start in range(0, len(steps), BATCH):
        rows = slice(start, start + BATCH)
        a, b, codes, text = decoder.encode(steps[rows])
        predicted = decoder.decode(a, codes, text)
        predicted_other = decoder.decode(a, [exported_codes(mixed[rows]), *codes[1:]], text)
        reconstructed.append((predicted, predicted_other, a, b))
        if several:
            target_frame, _, target_codes, target_text = decoder.encode(steps[target[rows]])
            other_codes = exported_codes(other[rows])
            own_change, other_change = (
                decoder.decode(target_frame, [exported, *target_codes[1:]], target_text) - target_frame
                for exported in (codes[0], other_codes)
            )
            transferred.append((own_change, other_change, b - a, (codes[0] != other_codes).any(1)))
    return {
        "reconstruction": reconstruction(reconstructed),
        "transfer": transfer(transferred) if several else None,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The two models


def codebook_usage(codes, num_codes):
    """Return {"num_codes", "usage", "perplexity"} of codes i64 [n, P], the latter two as lists with P entries."""
    used, perplexity = code_usage(code_counts(codes, num_codes))
    return {"num_codes": num_codes, "usage": used.tolist(), "perplexity": perplexity.tolist()}


def probe_lam(model, dataset, config, split, out):
    """Return the report on the image-based model and draw codes.png in the folder `out`. split: from `held_out`"""
    fitted, held = split
    chunk = read_json(config.lam / "config.json")["training"]["chunk"]
    texts = text_states(model.sizes.text, dataset.instructions()) if model.sizes.stage == 1 else None
    both = np.concatenate([fitted, held])
    both_steps, steps = episode_steps(dataset, both), episode_steps(dataset, held)
    codes, vectors = map(torch.cat, zip(*label_episodes(dataset, model, both, BATCH, texts), strict=True))
    codes = codes.long()
    measured = codes[-len(steps) :]
    report = {
        "model": str(config.lam),
        "fingerprint": fingerprint(config.lam),
        "stage": model.sizes.stage,
        "delta": model.sizes.delta,
        "chunk": chunk,
        "held_out_episodes": held.tolist(),
        "steps": len(steps),
    }
    report |= codebook_usage(measured, model.num_codes)
    report |= decode_measures(FramePairDecoder(model, dataset, texts), steps)
    actions = None
    if dataset.action_size:
        actions = mean_actions(dataset, both_steps, chunk)
        scores = probe_actions(codes, vectors, actions, episodes_of(dataset, both_steps), split, model)
        report["dimensions"] = dimension_names(dataset)
        report["r2"] = {name: [None if np.isnan(r2) else float(r2) for r2 in row] for name, row in scores.items()}
        actions = actions[-len(steps) :]
    examples = code_examples(dataset, steps, measured[:, config.position].numpy(), model.sizes.delta)
    draw_codes(dataset, model.sizes, examples, actions, out / "codes.png")
    return report


def probe_actions(codes, vectors, actions, episodes, split, model):
    """Return {inputs: R2 [A]} of `probe` from z and from the codes, each also in shuffled order.

    codes: i64 [n, P]; vectors: f16 [n, P, d]; actions: f64 [n, A]; episodes: i64 [n]; split: from `held_out`.
    """
    vectors = vectors.flatten(1).double().numpy()  # [n, P d]
    one_hot = np.eye(model.num_codes)[codes].reshape(len(codes), -1)  # [n, P K]
    shuffled = np.random.default_rng(0).permutation(len(codes))
    inputs = {
        "z": vectors,
        "codes": one_hot,
        "shuffled z": vectors[shuffled],
        "shuffled codes": one_hot[shuffled],
    }
    return {name: probe(x, actions, episodes, *split) for name, x in inputs.items()}


def physical_error(decoded, actions, valid):
    """Return the root mean square error [A] of decoded actions [n, H, A] over the valid steps (bool [n, H])."""
    return np.sqrt(np.square(decoded - actions)[valid].mean(0, dtype=np.float64))


def embodiment_number(model, dataset, path):
    """Return the number of a data set's embodiment in the tokenizer in `path`. Raise ValueError if it does not fit."""
    names = list(model.config.get("embodiments", [dataset.spec.embodiment]))
    name = dataset.spec.embodiment
    if name not in names or model.action_sizes[names.index(name)] != dataset.action_size:
        sizes = dict(zip(names, model.action_sizes))
        raise ValueError(
            f"{path} codes actions of the sizes {sizes}, but {dataset.name}, as described by {dataset.source}, has "
            f"{dataset.action_size} of {name}. Describe it as in the training: --spec"
        )
    return names.index(name)


def probe_tokenizer(model, dataset, config, split):
    """Return the report on the action tokenizer; errors in the units of the data. split: from `held_out`"""
    held = split[1]
    embodiment = torch.tensor(embodiment_number(model, dataset, config.tokenizer))
    steps = episode_steps(dataset, held)
    chunks, valid = chunk_steps(dataset.starts, steps, model.config["chunk"])
    normalised = torch.from_numpy(action_chunks(dataset.normalised_action, chunks))
    valid_steps = torch.from_numpy(valid)
    normalised = F.pad(normalised, (0, max(model.action_sizes) - dataset.action_size))
    codes, decoded = [], []  # [B, H] and [B, H, A] each
    for batch, batch_valid in zip(normalised.split(BATCH), valid_steps.split(BATCH), strict=True):
        number = embodiment.expand(len(batch))
        codes.append(model.encode(batch, batch_valid, number)[0])
        decoded.append(model.decode(codes[-1], number)[..., : dataset.action_size])
    codes = torch.cat(codes)
    decoded = dataset.action_normaliser.unnormalise(torch.cat(decoded).numpy())
    decoded = unstandardise(decoded, dataset.spec.grippers)
    actions = action_chunks(dataset.stored_action, chunks)
    report = {
        "model": str(config.tokenizer),
        "fingerprint": fingerprint(config.tokenizer),
        "steps": len(steps),
        "held_out_episodes": held.tolist(),
    }
    report |= codebook_usage(codes[valid_steps][:, None], model.num_codes)
    report["dimensions"] = dimension_names(dataset)
    report["error"] = physical_error(decoded, actions, valid).tolist()
    report["spread"] = actions[valid].std(0, dtype=np.float64).tolist()
    return report


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def spread_over_episodes(episodes, count, rng):
    """Return up to `count` random rows, of different episodes as far as there are. episodes: i64 [n]"""
    order = rng.permutation(len(episodes))
    first = order[np.unique(episodes[order], return_index=True)[1]]  # one row of each episode
    return np.concatenate([rng.permutation(first), np.setdiff1d(order, first)])[:count]


def code_examples(dataset, steps, codes, delta):
    """Return [(code, its rows i64 [k], pairs [(step, step delta later)])], the most frequent code first.

    steps i64 [n] and their codes i64 [n]; the pairs are of different episodes as far as there are.
    """
    rng = np.random.default_rng(0)
    later = later_steps(dataset, steps, delta)
    episodes = episodes_of(dataset, steps)
    counts = np.bincount(codes)
    examples = []
    for code in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        rows = np.flatnonzero(codes == code)
        shown = rows[spread_over_episodes(episodes[rows], EXAMPLES, rng)]
        examples.append((int(code), rows, list(zip(steps[shown].tolist(), later[shown].tolist()))))
    return examples


def draw_codes(dataset, sizes, examples, actions, path):
    """Draw `code_examples`. actions: [n, A], the mean of each measured step's next chunk, or None."""
    height = (len(examples) + 1) // 2
    total = sum(len(rows) for _, rows, _ in examples)
    camera = camera_name(sizes, dataset)
    names = dimension_names(dataset)
    shown = sorted({0, 1, 2, *(gripper.index for gripper in dataset.spec.grippers)})
    figure = Figure(figsize=(22, 1.65 * height + 1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.11)  # more room between pairs than within one
    grid = figure.subplots(height, 2 * EXAMPLES, squeeze=False).reshape(-1, EXAMPLES)
    for cell in grid.flat:
        cell.set(xticks=[], yticks=[], frame_on=False)
    for cells, (code, rows, pairs) in zip(grid, examples):
        for cell, pair in zip(cells, pairs):
            a, b = (dataset.image(camera, step) for step in pair)
            gap = np.full_like(a[:, :2], 255)
            cell.imshow(np.concatenate([a, gap, b], 1))
        label = [f"code {code}", f"{100 * len(rows) / total:.0f} % of steps"]
        if actions is not None:
            mean = actions[rows].mean(0)
            label += [f"{names[number]} {mean[number]:+.2f}" for number in shown if number < len(mean)]
        cells[0].set_ylabel("\n".join(label), rotation=0, ha="right", va="center", fontsize=11)
    figure.suptitle(
        f"Each pair: a frame, and the frame {sizes.delta} steps later (or the episode's last). Each code is shown with "
        "three pairs that carry it and the mean of the next actions over all its steps.\nAll episodes were held out "
        "from training. Codes are good if the pairs of one code show one kind of change, those of the next a different "
        "one.",
        fontsize=13,
    )
    figure.savefig(path, dpi=70)


def draw_bars(axes, names, values):
    """Draw a group of bars for each of `names`, with one of each of values {label: [number; None or nan: no bar]}."""
    width = 0.8 / len(values)
    for number, (label, heights) in enumerate(values.items()):
        positions = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
        bars = axes.bar(positions, np.array(heights, float), width, label=label)
        texts = [f"{height:g}" if height else "" for height in np.round(bars.datavalues, 2)]
        axes.bar_label(bars, texts, fontsize=7, padding=1)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=8, ncols=2, loc="upper right")


def draw_usage(axes, title, names, report):
    """Draw how many codes are in use and how evenly, a group of bars for each code position of `names`."""
    num_codes = report["num_codes"]
    label = "perplexity: number of equally frequent codes that vary as much"
    draw_bars(axes, names, {"codes in use": report["usage"], label: report["perplexity"]})
    axes.axhline(num_codes, color="grey", linestyle="--")
    axes.set(title=f"{title}: how much of the codebook is in use?", ylabel=f"codes, of {num_codes}")
    axes.set(xlim=(-1, len(names)), ylim=(0, 1.25 * num_codes), yticks=np.linspace(0, num_codes, 5))


def draw_lam(upper, lower, report):
    """Draw the charts of the image-based model: usage, and how well its latent actions predict the actions."""
    positions = [f"position {number}" for number in range(len(report["usage"]))]
    draw_usage(upper, "Image-based latent actions", positions, report)
    if "r2" not in report:
        lower.text(0.5, 0.5, "This data has no actions to compare with.", ha="center")
        return
    draw_bars(lower, report["dimensions"], report["r2"])
    lower.set(
        title=f"How well do they predict the next {report['chunk']} actions? (z: before quantisation; shuffled: 0)",
        ylabel="R2 (1: exactly, 0: as the training mean)",
        ylim=(-0.3, 1.3),
    )


def draw_tokenizer(upper, lower, report):
    """Draw the charts of the action tokenizer: usage, and the share of each action dimension that decoding loses."""
    draw_usage(upper, "Action tokenizer", ["all steps"], report)
    error, spread = np.array(report["error"]), np.array(report["spread"])
    names = [
        f"{name}\n{lost:.3f} of {whole:.3f}"
        for name, lost, whole in zip(report["dimensions"], error, spread, strict=True)
    ]
    draw_bars(lower, names, {"error / spread": error / np.where(spread > 0, spread, np.nan)})
    lower.set(
        title="What do decoded actions lose? (0: nothing, 1: everything)",
        ylabel="error / spread",
        xlabel="error of spread, in the units of the data",
        ylim=(0, 1.3),
    )


def draw_charts(report, path):
    """Draw a column of two charts for each model in the report."""
    models = [(name, draw) for name, draw in (("lam", draw_lam), ("tokenizer", draw_tokenizer)) if name in report]
    figure = Figure(figsize=(9 * len(models), 8), layout="constrained")
    for axes, (name, draw) in zip(figure.subplots(2, len(models), squeeze=False).T, models, strict=True):
        draw(*axes, report[name])
    figure.suptitle(f"{report['data']}: held-out episodes")
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# The printed report


def format_number(value):
    """Return a number with three digits after the point, "-" for None."""
    return "-" if value is None else f"{value:.3f}"


def format_table(names, rows):
    """Return text: a column for each of `names`, a line for each of rows {label: [values]}."""
    lines = [["", *names]]
    for label, values in rows.items():
        lines.append([label, *map(format_number, values)])
    return "\n".join(f"    {line[0]:15}" + "".join(f"{cell:>12}" for cell in line[1:]) for line in lines)


def print_usage(title, report):
    """Print what was measured, and the codes in use."""
    episodes = len(report["held_out_episodes"])
    print(f"\n{title} {report['model']}: {report['steps']} steps of {episodes} held-out episodes")
    used = " ".join(map(str, report["usage"]))
    perplexity = " ".join(f"{value:.1f}" for value in report["perplexity"])
    print(f"  codes in use: {used} of {report['num_codes']}, perplexity {perplexity}")


def print_report(report):
    """Print the parts of the report that there are."""
    if "lam" in report:
        part = report["lam"]
        print_usage("image-based latent actions", part)
        own, other = (format_number(part["reconstruction"][name]) for name in ("ratio", "other_ratio"))
        print(f"  reconstruction: {own} of the error of copying the frame; with the codes of other steps {other}")
        print(f"  transfer to another episode's frame: {format_number(part['transfer'])} (chance 0.5)")
        if "r2" in part:
            table = format_table(part["dimensions"], part["r2"])
            print(f"  R2 of the mean of the next {part['chunk']} actions:\n{table}")
    if "tokenizer" in report:
        part = report["tokenizer"]
        print_usage("action tokenizer", part)
        table = format_table(part["dimensions"], {"error (rms)": part["error"], "spread (std)": part["spread"]})
        print(f"  error in the units of the data:\n{table}")


@torch.no_grad()
def main(config):
    """Measure, draw, write and print; return the report. Raise ValueError or FileNotFoundError before it computes."""
    if not (config.lam or config.tokenizer):
        raise ValueError("say which model to probe: --lam DIR, --tokenizer DIR or both")
    if config.position and not config.lam:
        raise ValueError(f"position is {config.position}, but there are code positions only with --lam")
    if config.max_episodes < 3:
        raise ValueError(f"max_episodes is {config.max_episodes}; it takes 3, 2 to fit and 1 to measure")
    out = config.out or config.lam or config.tokenizer
    check_writable(out, "--out")
    device = init_distributed().device
    dataset = open_dataset(config.data, config.cache, config.spec)
    lam = load_lam(config.lam).to(device) if config.lam else None
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if lam:
        check_frames(lam.sizes, dataset)
    splits = {path: held_out(path, dataset, config.max_episodes) for path in (config.lam, config.tokenizer) if path}
    if lam and not 0 <= config.position < lam.sizes.codes_per_step:
        raise ValueError(f"position is {config.position}; {config.lam} has 0 to {lam.sizes.codes_per_step - 1}")
    make_folder(out, "--out")
    report = {
        "data": dataset.name,
        "data_fingerprint": dataset.fingerprint,
        "command": sys.argv,
        "commit": git_commit(),
    }
    if lam:
        report["lam"] = probe_lam(lam, dataset, config, splits[config.lam], out)
    if tokenizer:
        report["tokenizer"] = probe_tokenizer(tokenizer, dataset, config, splits[config.tokenizer])
    write_json(out / "probe.json", report)
    draw_charts(report, out / "probe.png")
    print_report(report)
    print(f"\nwritten to {out}: probe.json, probe.png" + (", codes.png" if lam else ""))
    return report


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
