"""Is a latent action model good enough to train a policy on? Measured on the episodes that it never saw.

    python probe.py --data data/libero_tiny --lam runs/lam                            # image-based latent actions
    python probe.py --data data/libero_tiny --tokenizer data/libero_tiny/tokenizer    # action tokenizer; or both

Prints the numbers and writes probe.json, probe.png (charts) and, of an image-based model, codes.png: examples of what
each code stands for.

    codes in use     of each code position, and their perplexity: as varied as so many equally frequent codes. Few of
                     many means a collapsed codebook; 12 of 16 are good.
    reconstruction   squared error of the predicted later frame / that of showing the current frame again: 0.8 and less
                     are good. The same with the codes of another step says what the decoder guesses without them (a
                     fixed scene lets it guess much); codes that say something are clearly better than that.
    R2 of actions    how well ridge regression tells each action dimension, averaged over the next chunk: from the
                     vectors z before quantisation, from the codes (one-hot), and from both in shuffled order, which
                     must give about 0. It is the share that is removed of the squared error of always answering the
                     mean of the training episodes; 0.5 and more, where the arm moves a lot, are good.
    transfer         the code of one episode decoded on a frame of another: how often is the predicted change closer to
                     the change that the code came from than when another code is decoded there? 0.5 is chance; 1 is
                     out of reach, since objects lie elsewhere in the other episode.
    tokenizer error  root mean square difference between recorded and decoded actions in the units of the data (LIBERO:
                     1 is 5 cm, or 0.5 rad, per step; gripper 1 open, 0 closed), and the spread of that dimension.

Held out is what `latent.py` held out: the split is made again from the settings stored with the model. The regression
is fitted on the other episodes, its strength chosen there per dimension by cross-validation over whole episodes.
The task-irrelevant codes of a stage 2 are those of the frame that is decoded on; text, of a stage 1, likewise.

Axes: S steps of a data set, n steps measured, B batch, H chunk steps, A action size, P codes per step, K codebook
size, d inputs of a regression, N patches of a frame, F features of a patch, G ridge strengths.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

from common import commit, start_ranks, write_json
from data import (
    CACHE,
    later,
    normalise,
    open_index,
    split_episodes,
    standardise,
    statistics,
    steps_of,
    unnormalise,
)
from latent import (
    code_counts,
    code_usage,
    fingerprint,
    label_episodes,
    load_lam,
    load_tokenizer,
    pad_text,
    text_states,
)

BATCH = 64  # frames, pairs and chunks computed at once
DECODED = 2048  # held-out steps, at most, on which the decoder is measured
FOLDS = 5  # of the cross-validation
STRENGTHS = 10.0 ** np.arange(-6, 4)  # of the ridge penalty, in units of an input's variance
EXAMPLES = 3  # frame pairs of each code in codes.png
DIMENSIONS = ["x", "y", "z", "rotation x", "rotation y", "rotation z", "gripper"]  # LIBERO's actions


@dataclass
class Config:
    data: Path
    """folder of an RLDS data set that the models were trained on"""
    lam: Path | None = None
    """folder of a model that `latent.py lam` trained"""
    tokenizer: Path | None = None
    """folder of a model that `latent.py tokenizer` trained"""
    position: int = 0
    """code position that codes.png shows"""
    max_episodes: int = 300
    """at most so many episodes are encoded, the held-out ones first"""
    out: Path | None = None
    """folder for probe.json, probe.png and codes.png; default: that of the lam, else of the tokenizer"""
    cache: Path = CACHE
    """where indices are kept"""


# ----------------------------------------------------------------------------------------------------------------------
# Which episodes, which steps


def held_out(path, index, most):
    """(training episodes, held-out episodes), at most `most` of both, of the model in `path` as `latent.py` trained it.

    Raises ValueError when its data was another, or when the split leaves nothing to fit or to measure.
    """
    config = json.loads((path / "config.json").read_text())
    training, known = config["training"], {entry["fingerprint"]: entry["name"] for entry in config["data"]}
    if index.fingerprint not in known:
        raise ValueError(
            f"{path} was not trained on {index.directory} but on {', '.join(known.values())}, so what it never saw is "
            f"unknown. Give --data what it was trained on, or train: python latent.py {config['kind']}"
        )
    fitted, held = split_episodes(index, training["val_fraction"], training["seed"])
    if not len(held) or len(fitted) < 2:
        raise ValueError(
            f"{path}: val_fraction {training['val_fraction']} holds {len(held)} of {len(fitted) + len(held)} episodes "
            "out; it takes 1, and 2 to fit. Train it again with --val-fraction 0.1, or on more episodes."
        )
    held = spread(held, most - 2)
    return spread(fitted, most - len(held)), held


def spread(rows, most):
    """At most `most` of some rows, evenly over them."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def episodes_of(index):
    """i64 [S]: the episode of every step."""
    return np.repeat(np.arange(len(index.starts) - 1), np.diff(index.starts))


def action_chunks(index, steps, chunk):
    """The `chunk` actions from each of some steps on: f32 [n, H, A] in the units of the data; valid bool [n, H]."""
    rows, last = steps[:, None] + np.arange(chunk), later(index, steps, len(index))[:, None]
    return standardise(index.columns["action"][np.minimum(rows, last)]), rows <= last


def mean_actions(index, chunk):
    """f64 [S, A]: of every step, the mean of the actions of its chunk within the episode, in the units of the data."""
    actions, valid = action_chunks(index, np.arange(len(index)), chunk)
    return (actions * valid[..., None]).sum(1, dtype=np.float64) / valid.sum(1)[:, None]


def dimensions(size):
    """Names of the action's dimensions."""
    return DIMENSIONS if size == len(DIMENSIONS) else [f"action {n}" for n in range(size)]


# ----------------------------------------------------------------------------------------------------------------------
# Ridge regression


def ridge(x, y):
    """Fits y f64 [n, A] linearly to x [n, d], inputs standardised. Returns the function x [m, d] -> [G, m, A]: the
    predictions with each of STRENGTHS."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)  # an input that is constant here gets no weight
    z = (x - mean) / scale
    values, axes = np.linalg.eigh(z.T @ z / len(z))  # [d], [d, d]
    target = axes.T @ (z.T @ (y - y.mean(0)) / len(z))  # [d, A]
    weights = np.stack([axes @ (target / (values + strength)[:, None]) for strength in STRENGTHS])  # [G, d, A]
    return lambda new: (new - mean) / scale @ weights + y.mean(0)


def best_strengths(x, y, episodes):
    """i64 [A]: for each dimension of y [n, A] the row of STRENGTHS with the least squared error on left-out episodes.

    episodes: i64 [n]; whole episodes are left out, every FOLDS-th at a time, since neighbouring steps are alike.
    """
    fold = np.unique(episodes, return_inverse=True)[1] % FOLDS
    errors = np.zeros((len(STRENGTHS), y.shape[1]))
    for number in np.unique(fold):
        out = fold == number
        errors += np.square(ridge(x[~out], y[~out])(x[out]) - y[out]).sum(1)
    return errors.argmin(0)


def r_squared(predicted, y, guess):
    """[A]: 1 - squared error / that of always answering `guess` [A], of y [n, A]; nan where the guess is exact."""
    spread = np.square(y - guess).sum(0)
    spread = np.where(spread > 1e-12 * len(y), spread, np.nan)
    return 1 - np.square(predicted - y).sum(0) / spread


def probe(x, y, episodes, fitted, held):
    """R2 [A] on the episodes `held` of the ridge regression from x [S, d] to y [S, A] fitted on the episodes `fitted`.

    episodes: i64 [S], of every step.
    """
    a, b = np.isin(episodes, fitted), np.isin(episodes, held)
    chosen = best_strengths(x[a], y[a], episodes[a])
    predicted = ridge(x[a], y[a])(x[b])[chosen, :, np.arange(y.shape[1])].T  # [n, A]
    return r_squared(predicted, y[b], y[a].mean(0))


# ----------------------------------------------------------------------------------------------------------------------
# What the decoder makes of the codes


def reconstruction(parts):
    """Mean squared errors of batches (prediction, the same with other steps' codes, frame, later frame) [B, N, F].

    {"error", "copy_error" of showing the frame again, "ratio" of the two, "other_ratio": that of the other codes}
    """
    rows = [[*(F.mse_loss(x, b) * len(b) for x in (guess, other, a)), len(b)] for guess, other, a, b in parts]
    error, other, copied, count = (float(sum(column)) for column in zip(*rows, strict=True))
    ratios = {"ratio": error / copied if copied else None, "other_ratio": other / copied if copied else None}
    return {"error": error / count, "copy_error": copied / count} | ratios


def transfer(parts):
    """How often, in [0, 1], a code decoded on another episode's frame predicts its own change better than another code.

    parts: batches of (change [B, N, F] that the codes decode to there, that another code decodes to, the change where
    the codes come from, bool [B]: do the codes differ). Equal codes are left out, a draw counts half; 0.5 of nothing.
    """
    wins = []
    for own, other, change, differ in parts:
        errors = [(decoded - change).square().mean((1, 2)) for decoded in (own, other)]
        wins.append(((torch.sign(errors[1] - errors[0]) + 1) / 2)[differ])
    wins = torch.cat(wins)
    return float(wins.mean()) if len(wins) else 0.5


def elsewhere(episodes, rng):
    """i64 [n]: for each row a random row of another episode. episodes: i64 [n]"""
    return np.array([rng.choice(np.flatnonzero(episodes != episode)) for episode in episodes])


class Scenes:
    """Frame pairs of a data set as an image-based model sees them, and what it decodes there."""

    def __init__(self, model, index, texts):
        self.model, self.index, self.texts = model, index, texts

    def features(self, steps):
        """f32 [B, N, F]"""
        frames = [self.model.features.read(self.index.image(self.model.sizes.camera, step)) for step in steps]
        return self.model.features(torch.from_numpy(np.stack(frames)).to(self.model.patch_up.weight.device))

    def text(self, steps):
        """Of a stage 1: the instruction's states [B, n, width] and which are real [B, n]; else nothing."""
        if self.texts is None:
            return ()
        states = [self.texts[self.index.instructions[episode]] for episode in episodes_of(self.index)[steps]]
        padded = zip(*(pad_text(state, max(map(len, states))) for state in states), strict=True)
        return tuple(torch.stack(part).to(self.model.patch_up.weight.device) for part in padded)

    def at(self, steps):
        """(features of the frames, of those delta later, codes i64 [B, P] of each set, text) at `steps`."""
        a, b = self.features(steps), self.features(later(self.index, steps, self.model.sizes.delta))
        text = self.text(steps)
        vectors = self.model.vectors(a, b, *text)
        return a, b, [part.quantiser.nearest(c) for part, c in zip(self.model.sets, vectors, strict=True)], text

    def decode(self, a, codes, text):
        """The later frame's features [B, N, F] that codes of each set predict from those of a frame."""
        quantised = [part.quantiser.codebook[c] for part, c in zip(self.model.sets, codes, strict=True)]
        return self.model.predict(a, quantised, *text)


def decode_measures(scenes, steps):
    """{"reconstruction", "transfer"} at `steps` [n]; transfer is None when all steps are of one episode."""
    steps, rng, pairs, swaps = spread(steps, DECODED), np.random.default_rng(0), [], []
    episodes, mixed = episodes_of(scenes.index)[steps], rng.permutation(len(steps))
    several = len(np.unique(episodes)) > 1
    target, other = (elsewhere(episodes, rng) if several else None for _ in range(2))
    exported = lambda rows: scenes.at(steps[rows])[2][0]  # noqa: E731
    for rows in (slice(at, at + BATCH) for at in range(0, len(steps), BATCH)):
        a, b, codes, text = scenes.at(steps[rows])
        guess, without = (scenes.decode(a, [c, *codes[1:]], text) for c in (codes[0], exported(mixed[rows])))
        pairs.append((guess, without, a, b))
        if several:
            frame, _, theirs, words = scenes.at(steps[target[rows]])
            others = exported(other[rows])
            own, another = (scenes.decode(frame, [c, *theirs[1:]], words) - frame for c in (codes[0], others))
            swaps.append((own, another, b - a, (codes[0] != others).any(1)))
    return {"reconstruction": reconstruction(pairs), "transfer": transfer(swaps) if several else None}


# ----------------------------------------------------------------------------------------------------------------------
# The two models


def usage(codes, num_codes):
    """{"num_codes", "usage", "perplexity"} of codes i64 [n, P], the latter two per position."""
    used, perplexity = code_usage(code_counts(codes, num_codes))
    return {"num_codes": num_codes, "usage": used.tolist(), "perplexity": perplexity.tolist()}


def probe_lam(model, index, config, split, out):
    """What the report says about the image-based model; draws codes.png in the folder `out`. split: from `held_out`"""
    fitted, held = split
    chunk = json.loads((config.lam / "config.json").read_text())["training"]["chunk"]
    texts = text_states(model.sizes.text, index.instructions) if model.sizes.stage == 1 else None
    both, steps = np.concatenate([fitted, held]), steps_of(index, held)
    codes, vectors = map(torch.cat, zip(*label_episodes(index, model, both, BATCH, texts), strict=True))
    codes, vectors, measured = codes.long(), vectors.flatten(1).double().numpy(), codes[-len(steps) :].long()
    episodes = episodes_of(index)[steps_of(index, both)]
    about = {"model": str(config.lam), "fingerprint": fingerprint(config.lam), "stage": model.sizes.stage}
    about |= {"delta": model.sizes.delta, "chunk": chunk, "held_out_episodes": held.tolist(), "steps": len(steps)}
    about |= usage(measured, model.num_codes) | decode_measures(Scenes(model, index, texts), steps)
    actions = mean_actions(index, chunk) if "action" in index.columns else None
    if actions is not None:
        hot = np.eye(model.num_codes)[codes].reshape(len(codes), -1)  # [n, P K]
        shuffled = np.random.default_rng(0).permutation(len(codes))
        inputs = {"z": vectors, "codes": hot, "shuffled z": vectors[shuffled], "shuffled codes": hot[shuffled]}
        wanted = actions[steps_of(index, both)]
        scores = {name: probe(x, wanted, episodes, fitted, held) for name, x in inputs.items()}
        about["dimensions"] = dimensions(actions.shape[1])
        about["r2"] = {name: [None if np.isnan(v) else float(v) for v in row] for name, row in scores.items()}
        actions = actions[steps]
    found = code_examples(index, steps, measured[:, config.position].numpy(), model.sizes.delta)
    draw_codes(index, model.sizes, found, actions, out / "codes.png")
    return about


def physical_error(decoded, actions, valid):
    """Root mean square error [A] of decoded actions [n, H, A] over the valid steps (bool [n, H]); in their units."""
    return np.sqrt(np.square(decoded - actions)[valid].mean(0, dtype=np.float64))


def probe_tokenizer(model, index, config, split):
    """What the report says about the action tokenizer; errors against the actions as stored. split: from `held_out`"""
    held, stats = split[1], statistics(index)
    steps = steps_of(index, held)
    actions, valid = action_chunks(index, steps, model.config["chunk"])
    wanted = torch.from_numpy(normalise(actions, stats["action"])), torch.from_numpy(valid)
    codes = torch.cat([model.encode(*part)[0] for part in zip(*(whole.split(BATCH) for whole in wanted), strict=True)])
    decoded = torch.cat([model.decode(part) for part in codes.split(BATCH)]).numpy()  # [n, H, A]
    error = physical_error(unnormalise(decoded, stats["action"]), actions, valid)
    about = {"model": str(config.tokenizer), "fingerprint": fingerprint(config.tokenizer), "steps": len(steps)}
    about |= {"held_out_episodes": held.tolist()} | usage(codes[wanted[1]][:, None], model.num_codes)
    about |= {"dimensions": dimensions(actions.shape[2]), "error": error.tolist()}
    return about | {"spread": actions[valid].std(0, dtype=np.float64).tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and words


def examples(episodes, count, rng):
    """Up to `count` random rows, of different episodes as far as there are. episodes: i64 [n]"""
    order = rng.permutation(len(episodes))
    first = order[np.unique(episodes[order], return_index=True)[1]]  # one row of each episode
    return np.concatenate([rng.permutation(first), np.setdiff1d(order, first)])[:count]


def code_examples(index, steps, codes, delta):
    """[(code, its rows i64 [k], pairs [(step, step delta later)])], the most frequent code first.

    steps i64 [n] and their codes i64 [n]; the pairs are of different episodes as far as there are.
    """
    rng, ahead, count = np.random.default_rng(0), later(index, steps, delta), np.bincount(codes)
    found = []
    for code in np.argsort(-count, kind="stable")[: np.count_nonzero(count)]:
        rows = np.flatnonzero(codes == code)
        shown = rows[examples(episodes_of(index)[steps[rows]], EXAMPLES, rng)]
        found.append((int(code), rows, list(zip(steps[shown].tolist(), ahead[shown].tolist()))))
    return found


def draw_codes(index, sizes, found, actions, path):
    """A picture of `code_examples`; actions: [n, A], of each of its steps the mean of the next chunk, or None."""
    height, total = (len(found) + 1) // 2, sum(len(rows) for _, rows, _ in found)
    figure = Figure(figsize=(22, 1.65 * height + 1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.11)  # more room between pairs than within one
    grid = figure.subplots(height, 2 * EXAMPLES, squeeze=False).reshape(-1, EXAMPLES)
    for cell in grid.flat:
        cell.set(xticks=[], yticks=[], frame_on=False)
    for line, (code, rows, pairs) in zip(grid, found):
        for cell, pair in zip(line, pairs):
            a, b = (index.image(sizes.camera, step) for step in pair)
            cell.imshow(np.concatenate([a, np.full_like(a[:, :2], 255), b], 1))
        label = [f"code {code}", f"{100 * len(rows) / total:.0f} % of steps"]
        if actions is not None:
            mean, names = actions[rows].mean(0), dimensions(actions.shape[1])
            label += [f"{names[n]} {mean[n]:+.2f}" for n in sorted({0, 1, 2, len(mean) - 1}) if n < len(mean)]
        line[0].set_ylabel("\n".join(label), rotation=0, ha="right", va="center", fontsize=11)
    figure.suptitle(
        f"Each pair: a frame, and the frame {sizes.delta} steps later (or the episode's last). The three pairs beside "
        "a code carry it; below its name, the mean of the next actions of all its steps.\nTraining saw none of these "
        "episodes. Codes are good if one kind of change runs through the pairs of a code, another through the next.",
        fontsize=13,
    )
    figure.savefig(path, dpi=70)


def bars(axes, names, rows):
    """A group of bars for each of `names`, a bar in it for each of rows {label: [values; None or nan: no bar]}."""
    width = 0.8 / len(rows)
    for number, (label, values) in enumerate(rows.items()):
        at = np.arange(len(names)) + (number - (len(rows) - 1) / 2) * width
        drawn = axes.bar(at, np.array(values, float), width, label=label)
        axes.bar_label(drawn, [f"{v:g}" if v else "" for v in np.round(drawn.datavalues, 2)], fontsize=7, padding=1)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=8, ncols=2, loc="upper right")


def draw_usage(axes, kind, names, found):
    """Bars of how many codes are in use and how evenly, a group for each code position of `names`."""
    label, most = "perplexity: as varied as so many equally frequent codes", found["num_codes"]
    bars(axes, names, {"codes in use": found["usage"], label: found["perplexity"]})
    axes.axhline(most, color="grey", linestyle="--")
    axes.set(title=f"{kind}: how much of the codebook is in use?", ylabel=f"codes, of {most}")
    axes.set(xlim=(-1, len(names)), ylim=(0, 1.25 * most), yticks=np.linspace(0, most, 5))


def draw_lam(upper, lower, found):
    """Charts of the image-based model: usage, and what its latent actions tell about the actions."""
    draw_usage(upper, "Image-based latent actions", [f"position {n}" for n in range(len(found["usage"]))], found)
    if "r2" not in found:
        lower.text(0.5, 0.5, "This data has no actions to compare with.", ha="center")
        return
    bars(lower, found["dimensions"], found["r2"])
    title = (
        f"How well do they tell the next {found['chunk']} actions? (z: before rounding to codes; shuffled must give 0)"
    )
    lower.set(title=title, ylabel="R2 (1: exactly, 0: as the training mean)", ylim=(-0.3, 1.3))


def draw_tokenizer(upper, lower, found):
    """Charts of the action tokenizer: usage, and the share of each action dimension that decoding loses."""
    draw_usage(upper, "Action tokenizer", ["all steps"], found)
    error, spread = np.array(found["error"]), np.array(found["spread"])
    rows = zip(found["dimensions"], error, spread, strict=True)
    names = [f"{name}\n{lost:.3f} of {whole:.3f}" for name, lost, whole in rows]
    bars(lower, names, {"error / spread": error / np.where(spread > 0, spread, np.nan)})
    lower.set(title="What do decoded actions lose? (0: nothing, 1: everything)", ylim=(0, 1.3))
    lower.set(ylabel="error / spread", xlabel="error of spread, in the units of the data")


def draw_charts(report, path):
    """A column of two charts for each model in the report."""
    models = [(name, draw) for name, draw in (("lam", draw_lam), ("tokenizer", draw_tokenizer)) if name in report]
    figure = Figure(figsize=(9 * len(models), 8), layout="constrained")
    for axes, (name, draw) in zip(figure.subplots(2, len(models), squeeze=False).T, models, strict=True):
        draw(*axes, report[name])
    figure.suptitle(f"{report['data']}: episodes that the models never saw")
    figure.savefig(path, dpi=100)


def digits(value):
    return "-" if value is None else f"{value:.3f}"


def table(names, rows):
    """Text: a column for each of `names`, a line for each of rows {label: [values]}."""
    lines = [["", *names], *([label, *map(digits, values)] for label, values in rows.items())]
    return "\n".join(f"    {line[0]:15}" + "".join(f"{cell:>12}" for cell in line[1:]) for line in lines)


def print_usage(kind, found):
    print(f"\n{kind} {found['model']}: {found['steps']} steps of {len(found['held_out_episodes'])} held-out episodes")
    used, varied = " ".join(map(str, found["usage"])), " ".join(f"{value:.1f}" for value in found["perplexity"])
    print(f"  codes in use: {used} of {found['num_codes']}, perplexity {varied}")


def print_report(report):
    if found := report.get("lam"):
        print_usage("image-based latent actions", found)
        own, other = (digits(found["reconstruction"][name]) for name in ("ratio", "other_ratio"))
        print(f"  reconstruction: {own} of the error of copying the frame; with the codes of other steps {other}")
        print(f"  transfer to another episode's frame: {digits(found['transfer'])} (chance 0.5)")
        if "r2" in found:
            print(f"  R2 of the mean of the next {found['chunk']} actions:\n{table(found['dimensions'], found['r2'])}")
    if found := report.get("tokenizer"):
        print_usage("action tokenizer", found)
        rows = {"error (rms)": found["error"], "spread (std)": found["spread"]}
        print(f"  error in the units of the data:\n{table(found['dimensions'], rows)}")


@torch.no_grad()
def main(config):
    """Measures, draws and writes; returns the report. Raises ValueError or FileNotFoundError before it computes."""
    if not (config.lam or config.tokenizer):
        raise ValueError("say which model to probe: --lam DIR, --tokenizer DIR or both")
    if config.max_episodes < 3:
        raise ValueError(f"max_episodes is {config.max_episodes}; it takes 3, 2 to fit and 1 to measure")
    device, index = start_ranks().device, open_index(config.data, config.cache)
    lam = config.lam and load_lam(config.lam).to(device)
    tokenizer = config.tokenizer and load_tokenizer(config.tokenizer)
    splits = {path: held_out(path, index, config.max_episodes) for path in (config.lam, config.tokenizer) if path}
    if lam and not 0 <= config.position < lam.sizes.codes_per_step:
        raise ValueError(f"position is {config.position}; {config.lam} has 0 to {lam.sizes.codes_per_step - 1}")
    out = config.out or config.lam or config.tokenizer
    out.mkdir(parents=True, exist_ok=True)
    report = {"data": index.name, "data_fingerprint": index.fingerprint, "command": sys.argv, "commit": commit()}
    if lam:
        report["lam"] = probe_lam(lam, index, config, splits[config.lam], out)
    if tokenizer:
        report["tokenizer"] = probe_tokenizer(tokenizer, index, config, splits[config.tokenizer])
    write_json(out / "probe.json", report)
    draw_charts(report, out / "probe.png")
    print_report(report)
    print(f"\nwritten to {out}: probe.json, probe.png" + (", codes.png" if lam else ""))
    return report


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
