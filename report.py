"""The analysis of a study: intervals over starts and training seeds, paired differences, charts, one Markdown report.

Success varies with the start and with the training seed, and all policies play the same starts, so the two are crossed:
outcome = mean + seed + start + rest, a mixed model whose variances are estimated by moments (two-way analysis of
variance), with Student's t at Satterthwaite's degrees of freedom. With three seeds a bootstrap over seeds would be far
too sure, and one group's own scatter of seeds is hardly known, so that is pooled, in units of the variance, over the
groups with as many labels. Groups share their seeds, so their scatter counts as less than that of as many others. Of
one seed the interval speaks of that run alone, and there is no p; nor is there while seeds are missing. Never narrower,
and no p smaller, than what ignores the seeds: Wilson's interval, Agresti and Min's for pairs, McNemar's test.

Axes: S training seeds, N starts.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from curves import read_log
from files import write_json, write_text
from results import markdown_table, mcnemar, paired_difference, trial_key, wilson

SMOOTH = 100  # updates, over which learning curves are averaged
EXPLANATION = """Intervals: 95 %, of a mixed model in which training seeds and starts are crossed, with Student's t; how
much seeds scatter is pooled over the groups{level}; of one seed, which is hollow in the chart, of that run alone.
Differences are between groups that are alike but for what the column's head says, paired by seed and start; in brackets
p after Holm's correction for the comparisons of the column{level}, those that are still missing counted; no p before
all seeds are there."""


@dataclass
class Comparison:
    """What the groups of a study are compared with, in one column of the report."""

    to: dict
    """the parts in which the other group differs, and their values there"""
    among: dict = field(default_factory=dict)
    """only groups whose parts have one of these values are compared: part -> values (default: all)"""


@dataclass
class Played:
    """What a cell of a study has: one policy, and the trials that it played."""

    group: dict
    """what it belongs to, without the seed"""
    seed: int
    """of training"""
    trials: dict = field(default_factory=dict)
    """of `outcomes`; none while the cell is not finished"""
    controls: dict = field(default_factory=dict)
    """control -> `outcomes` with it"""
    losses: list = field(default_factory=list)
    """of `learning_curve`"""
    commit: str = ""
    """of the code that trained it, or several, joined by commas"""
    played_at: list = field(default_factory=list)
    """commits of the code that played its trials; none in older cells"""
    data: list = field(default_factory=list)
    """fingerprints of what it was trained on"""
    labels: list = field(default_factory=list)
    """fingerprints of the models behind its labels and codes"""
    versions: dict = field(default_factory=dict)
    """of what decides the outcome of an episode"""
    commands: list = field(default_factory=list)
    """that made it"""
    fault: str = ""
    """what went wrong at the last try"""


def outcomes(trials):
    """Return {start: success} of records of eval.py; None is an error of the simulator."""
    return {"{} task {} seed {} widen {}".format(*trial_key(trial)): trial["success"] for trial in trials}


def learning_curve(run):
    """Return the action loss of a run's last stage, averaged over each SMOOTH updates, a list."""
    if not (run / "log.jsonl").exists():
        return []
    losses = [entry["action_loss"] for entry in read_log(run) if "action_loss" in entry]
    whole = len(losses) // SMOOTH * SMOOTH
    return np.array(losses[:whole], float).reshape(-1, SMOOTH).mean(1).round(6).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def mean_squares(values):
    """Return the mean squares of values f64 [S, N] for seeds, starts and the rest (two-way analysis of variance)."""
    seeds, starts = values.shape
    of_seeds, of_starts = values.mean(1), values.mean(0)
    rest = values - of_seeds[:, None] - of_starts + values.mean()
    squares = np.square(rest).sum() / ((seeds - 1) * (starts - 1))
    return starts * of_seeds.var(ddof=1), seeds * of_starts.var(ddof=1), squares


def played_by_all(values):
    """Return values f64 [S, N] without the starts that a seed lacks (NaN)."""
    return values[:, np.isfinite(values).all(0)]


def seed_correlation(tables):
    """Return how much seeds have in common, from 0 to 1: the mean correlation of seeds' means between two of the tables
    f64 [S, N]. One seed takes the same demonstrations' actions away from all groups. NaN was not played."""
    played = np.isfinite(tables)
    with np.errstate(invalid="ignore"):
        means = np.nansum(tables, 2) / played.sum(2)  # [tables, S]
    deviations = np.nan_to_num(means - np.nanmean(means, 1, keepdims=True))
    total = np.square(deviations).sum()
    if len(tables) < 2 or not total:
        return 0.0
    shared = np.square(deviations.sum(0)).sum() - total  # over all pairs of tables
    return float(np.clip(shared / (len(tables) - 1) / total, 0, 1))


def pool_scatter(tables, references=None, correlation=0.5):
    """Return (variance of seeds, mean square of the rest, degrees of freedom), pooled over tables f64 [S, N].

    Both are shares of the variance of all values. references: a name for each table; the seeds of tables of one name
    correlate, so their mean squares do by its square, and they count as fewer degrees of freedom (default: none do).
    The default of correlation is that of differences to one group, whose seeds are in all of them. Tables of one seed
    say nothing; (0, 0, 0) when there are no others.
    """
    played = zip(map(played_by_all, tables), references or range(len(tables)))
    kept = [(table, reference) for table, reference in played if min(table.shape) > 1]
    weights = [len(table) - 1 for table, _ in kept]
    variance = sum(weight * table.var() for weight, (table, _) in zip(weights, kept))
    if not variance:
        return 0.0, 0.0, 0.0
    seeds = rest = freedom = 0.0
    for weight, (table, _) in zip(weights, kept):
        ms_seeds, _, ms_rest = mean_squares(table)
        seeds += weight * (ms_seeds - ms_rest) / table.shape[1] / variance
        rest += weight * ms_rest / variance
    for reference in {reference for _, reference in kept}:
        own = [weight for weight, (_, other) in zip(weights, kept) if other == reference]
        freedom += sum(own) / (1 + (len(own) - 1) * correlation**2)
    return float(seeds), float(rest), freedom


def crossed_mean(values, scatter=None):
    """Return (mean, standard error, degrees of freedom) of values f64 [S, N] over random seeds and starts.

    scatter: of `pool_scatter`; default: of these values alone. Starts that a seed lacks are left out for all. The
    squared error is (MS_seeds + MS_starts - MS_rest) / (S N), but at least that of seeds or of starts alone. Of one
    seed, it is that of starts.
    """
    mean = float(np.nanmean(values))
    values = played_by_all(values)
    seeds, starts = values.shape
    if starts < 2:
        return mean, np.inf, 1.0
    mean = float(values.mean())
    if seeds == 1:
        return mean, float(np.sqrt(values.var(ddof=1) / starts)), starts - 1.0
    _, ms_starts, ms_rest = mean_squares(values)
    of_seeds, of_rest, seed_freedom = scatter or pool_scatter([values])
    ms_seeds = max(0.0, starts * of_seeds + of_rest) * values.var()
    total = max(ms_seeds + ms_starts - ms_rest, ms_seeds, ms_starts)
    if not total:
        return mean, 0.0, starts - 1.0
    spread = ms_seeds**2 / seed_freedom + ms_starts**2 / (starts - 1) + ms_rest**2 / ((seeds - 1) * (starts - 1))
    return mean, float(np.sqrt(total / (seeds * starts))), float(max(1.0, total**2 / spread))


def t_distribution(freedom):
    """Return (angles, how probable it is that atan(t / sqrt(freedom)) of Student's t is below each), two arrays."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 40_001)
    density = np.maximum(np.cos(angles), 0) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, below / below[-1]


def t_tail(t, freedom):
    """Return the probability that Student's t exceeds `t`."""
    return float(1 - np.interp(np.arctan(t / np.sqrt(freedom)), *t_distribution(freedom)))


def t_quantile(freedom):
    """Return the t that Student's t exceeds with probability 2.5 %."""
    angles, below = t_distribution(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(0.975, below, angles)))


def rate_interval(outcomes, scatter=None):
    """Return (mean, low, high) of successes f64 [S, N]: the model's 95 % interval, at least as wide as Wilson's.

    scatter: as of `crossed_mean`.
    """
    played = outcomes[np.isfinite(outcomes)]
    _, error, freedom = crossed_mean(outcomes, scatter)
    mean = played.mean()
    low, high = wilson(int(played.sum()), played.size)
    if np.isfinite(error):
        width = t_quantile(freedom) * error
        low, high = max(0.0, min(low, mean - width)), min(1.0, max(high, mean + width))
    return float(mean), float(low), float(high)


def difference_interval(first, second, scatter=None):
    """Return (mean, low, high, p) of second - first, both f64 [S, N], paired by seed and start.

    scatter: as of `crossed_mean`, of differences. p is at least that of McNemar's test; None for one seed, and where
    the seeds share fewer than two starts.
    """
    both = np.isfinite(first) & np.isfinite(second)
    pairs = first[both].astype(bool).tolist(), second[both].astype(bool).tolist()
    mean, low, high = paired_difference(*pairs)
    _, error, freedom = crossed_mean(second - first, scatter)
    p = mcnemar(*pairs)
    if len(first) < 2 or not np.isfinite(error):
        p = None
    elif error:
        p = max(p, min(1.0, 2 * t_tail(abs(mean) / error, freedom)))
    else:
        p = max(p, 0.5 ** (len(first) - 1))  # all seeds agree: the sign test
    if np.isfinite(error):
        width = t_quantile(freedom) * error
        low, high = max(-1.0, min(low, mean - width)), min(1.0, max(high, mean + width))
    return float(mean), float(low), float(high), p


def holm(ps, planned):
    """Return Holm's (1979) adjusted p of each of several comparisons, a list. planned: how many there will be."""
    order = np.argsort(ps)
    adjusted = np.empty(len(ps))
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (planned - rank) * ps[number]))
        adjusted[number] = largest
    return adjusted.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# What the cells have


def group_cells(cells):
    """Return {group as text: {"group", "seeds", "outcomes" f64 [S, N], "missing": seeds, ...}}, in the cells' order.

    cells: list of `Played`. Starts that a cell did not play are NaN, and so are errors of the simulator, which "errors"
    counts.
    """
    found = {}
    for cell in cells:
        entry = found.setdefault(group_name(cell.group), {"group": cell.group, "cells": []})
        entry["cells"].append(cell)
    starts = sorted({start for cell in cells for start in cell.trials})
    for entry in found.values():
        own = entry["cells"]
        rows = [[cell.trials.get(start) for start in starts] for cell in own]
        entry["outcomes"] = np.array(rows, float).reshape(len(rows), len(starts))  # None becomes NaN
        entry["seeds"] = [cell.seed for cell in own]
        entry["missing"] = [cell.seed for cell in own if not cell.trials]
        entry["errors"] = sum(success is None for cell in own for success in cell.trials.values())
        entry["controls"] = {name: count_successes(trials) for cell in own for name, trials in cell.controls.items()}
    return found


def count_successes(trials):
    """Return [successes, episodes] of `outcomes`, without errors of the simulator."""
    known = [success for success in trials.values() if success is not None]
    return [sum(known), len(known)]


def group_name(group):
    """Return a group as text."""
    return ", ".join(str(value) for value in group.values())


def reference_of(entry, entries, comparison):
    """Return the name of the group that a group is compared with; None where there is none."""
    if any(entry["group"][part] not in values for part, values in comparison.among.items()):
        return None
    wanted = entry["group"] | comparison.to
    name = group_name(wanted)
    return name if wanted != entry["group"] and name in entries else None


def pair(entry, other):
    """Return (first, second, seeds): the outcomes of another group and of this one, both f64 [S, N], and their seeds.

    None where the two have no seed in common.
    """
    shared = np.isfinite(entry["outcomes"] + other["outcomes"]).any(1)
    if not shared.any():
        return None
    seeds = [seed for seed, both in zip(entry["seeds"], shared) if both]
    return other["outcomes"][shared], entry["outcomes"][shared], seeds


def pool_by_level(tables, entries, x, references=None):
    """Return {name: `pool_scatter` of the groups with the same value of the part x}.

    tables: {name: f64 [S, N]}; references: of differences, {name: name of the group that it is a difference to}.
    """
    levels = {}
    for name in tables:
        levels.setdefault(entries[name]["group"].get(x), []).append(name)
    pooled = {}
    for names in levels.values():
        if references:
            scatter = pool_scatter([tables[name] for name in names], [references[name] for name in names])
        else:
            correlation = seed_correlation([entries[name]["outcomes"] for name in names])
            scatter = pool_scatter([tables[name] for name in names], ["success"] * len(names), correlation)
        pooled |= dict.fromkeys(names, scatter)
    return pooled


def analyse(entries, preset):
    """Return a list of results of all groups: success with its interval, and a difference for each `preset.compare`.

    A difference is {"to": name, "points", "ci95", "p" and "p_holm" (None: see `difference_interval`, and while seeds
    are missing), "seeds"}. The p of the same comparison are adjusted together, those that are not there yet counted,
    and how seeds scatter is pooled, over the groups with the same `preset.x`.
    """
    tables = {name: entry["outcomes"][np.isfinite(entry["outcomes"]).any(1)] for name, entry in entries.items()}
    tables = {name: table for name, table in tables.items() if len(table)}
    scatters = pool_by_level(tables, entries, preset.x)
    results = {}
    for name, entry in entries.items():
        kept = ("group", "seeds", "missing", "errors", "controls")
        result = {"name": name} | {key: entry[key] for key in kept} | {"differences": [None] * len(preset.compare)}
        if name in tables:
            played = tables[name]
            result |= {"successes": int(np.nansum(played)), "episodes": int(np.isfinite(played).sum())}
            result["success"], *result["ci95"] = rate_interval(played, scatters[name])
            result["by_seed"] = [float(np.nanmean(row)) for row in played]
        results[name] = result
    for number, comparison in enumerate(preset.compare):
        references = {name: reference_of(entry, entries, comparison) for name, entry in entries.items()}
        references = {name: other for name, other in references.items() if other}
        pairs = {name: found for name, other in references.items() if (found := pair(entries[name], entries[other]))}
        differences = {name: second - first for name, (first, second, _) in pairs.items()}
        scatters = pool_by_level(differences, entries, preset.x, references)
        planned = Counter(entries[name]["group"].get(preset.x) for name in references)
        families = {}  # value of x -> differences whose p are adjusted together
        for name, (first, second, seeds) in pairs.items():
            points, low, high, p = difference_interval(first, second, scatters[name])
            p = p if len(seeds) == len(entries[name]["seeds"]) else None  # none before all are there
            to = references[name]
            difference = {"to": to, "points": points, "ci95": [low, high], "p": p, "p_holm": None, "seeds": seeds}
            results[name]["differences"][number] = difference
            if p is not None:
                families.setdefault(entries[name]["group"].get(preset.x), []).append(difference)
        for level, family in families.items():
            for difference, p in zip(family, holm([difference["p"] for difference in family], planned[level])):
                difference["p_holm"] = p
    return list(results.values())


# ----------------------------------------------------------------------------------------------------------------------
# The report


def format_table(results, parts, compare):
    """Return the results as Markdown; what is missing is said in the row itself.

    parts: names of a group's parts; compare: of `Preset`.
    """
    heads = [*parts, "success", "95 % interval", "by seed"]
    for comparison in compare:
        heads += [f"minus {', '.join(map(str, comparison.to.values()))} (points)", "p (Holm)"]
    return markdown_table(heads, [format_row(result, parts) for result in results])


def format_row(result, parts):
    """Return the cells of a group in the table of results."""
    cells = [str(result["group"].get(part, "")) for part in parts]
    missing = ""
    if 0 < len(result["missing"]) < len(result["seeds"]):
        missing = f" INCOMPLETE: seeds {', '.join(map(str, result['missing']))} are missing"
    if result["errors"]:
        missing += f" INCOMPLETE: {result['errors']} trials ended in an error"
    if "success" not in result:
        return [*cells, f"missing{missing}", "", "", *["", ""] * len(result["differences"])]
    cells.append(f"{result['successes']}/{result['episodes']} = {100 * result['success']:.1f} %{missing}")
    cells.append("{:.1f} to {:.1f} %".format(*(100 * end for end in result["ci95"])))
    cells.append(", ".join(f"{100 * rate:.0f}" for rate in result["by_seed"]))
    for difference in result["differences"]:
        if difference is None:
            cells += ["", ""]
            continue
        low, high = (100 * end for end in difference["ci95"])
        shared = difference["seeds"]
        incomplete = (
            f" INCOMPLETE: of seeds {', '.join(map(str, shared))}" if len(shared) < len(result["seeds"]) else ""
        )
        cells.append(f"{100 * difference['points']:+.1f} ({low:+.1f} to {high:+.1f}){incomplete}")
        if difference["p"] is None and incomplete:
            cells.append("")
        elif difference["p"] is None:
            cells.append("one seed" if len(shared) == 1 else "too few common starts")
        else:
            cells.append(f"{difference['p']:.2g} ({difference['p_holm']:.2g})")
    return cells


def format_controls(results, controls):
    """Return a table of the successes with each control as Markdown, of the runs that played them."""
    rows = []
    for result in results:
        counts = [result["controls"].get(control) for control in controls]
        rows.append([result["name"], *("missing" if count is None else "{}/{}".format(*count) for count in counts)])
    return markdown_table(["the first seed's run with", *controls], rows)


def kind_of(group, preset):
    """Return what tells a group from the others of its panel, but for `preset.x`, as text."""
    return ", ".join(str(value) for part, value in group.items() if part not in (preset.panels, preset.x)) or "all"


def arrange(results, preset):
    """Return {title: results} of a chart's panels: one for each value of the part `preset.panels`."""
    panels = {}
    for result in results:
        panels.setdefault(result["group"].get(preset.panels, ""), []).append(result)
    if preset.panels == "rest":  # what trains on the labelled alone is shown everywhere, for comparison
        alone = [result for result in panels.get("dropped", []) if result["group"]["variant"].startswith("baseline")]
        panels = {rest: inside if rest == "dropped" else alone + inside for rest, inside in panels.items()}
    return {f"{preset.panels}: {panel}" if preset.panels else "": inside for panel, inside in panels.items()}


def draw_success(results, preset, path):
    """Draw success with bands: against the preset's x, one line for each kind of policy, or as bars; in panels."""
    from matplotlib.figure import Figure  # slow to import

    shown = [result for result in results if "success" in result]
    panels = arrange(shown, preset)
    kinds = list(dict.fromkeys(kind_of(result["group"], preset) for result in shown))
    widths = [1 if preset.x else len(inside) + 0.5 for inside in panels.values()]
    width = 4.2 * len(panels) if preset.x else max(0.8 * sum(widths), 4.2)
    figure = Figure(figsize=(width + 0.6, 3.8), layout="tight")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)
    for axis, (title, inside) in zip(axes[0], panels.items()):
        axis.set_title(title, fontsize=10)
        if preset.x:
            draw_lines(axis, inside, preset, kinds)
        else:
            draw_bars(axis, inside, preset)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("success")
    figure.savefig(path, dpi=110)


def draw_lines(axis, results, preset, kinds):
    """Draw one line with a band for each kind of policy, in its colour among all `kinds`."""
    for number, kind in enumerate(kinds):
        own = [result for result in results if kind_of(result["group"], preset) == kind]
        if not own:
            continue
        places = [result["group"][preset.x] * 1.015**number for result in own]  # not on top of each other
        rates = np.array([result["success"] for result in own])
        ends = np.array([result["ci95"] for result in own])
        colour = f"C{number}"
        axis.errorbar(places, rates, np.abs(ends - rates[:, None]).T, fmt="o-", color=colour, capsize=3, label=kind)
        axis.fill_between(places, *ends.T, color=colour, alpha=0.12)
        single = [len(result["by_seed"]) == 1 for result in own]
        axis.plot(np.array(places)[single], rates[single], "o", color=colour, markerfacecolor="white", zorder=3)
    axis.set_xscale("log")
    places = sorted({result["group"][preset.x] for result in results})
    axis.set_xlim(places[0] / 1.2, places[-1] * 1.4)
    axis.set_xticks(places, map(str, places), minor=False)
    axis.minorticks_off()
    axis.set_xlabel(f"{preset.x} demonstrations an instruction")
    axis.legend(fontsize=8)


def draw_bars(axis, results, preset):
    """Draw one bar with its interval for each group."""
    names = [kind_of(result["group"], preset) for result in results]
    rates = np.array([result["success"] for result in results])
    ends = np.array([result["ci95"] for result in results]).reshape(-1, 2)
    colours = ["white" if len(result["by_seed"]) == 1 else "C0" for result in results]
    axis.bar(range(len(names)), rates, color=colours, edgecolor="C0", alpha=0.7)
    axis.errorbar(range(len(names)), rates, np.abs(ends - rates[:, None]).T, fmt="none", ecolor="black", capsize=3)
    axis.set_xlim(-0.75, len(names) - 0.25)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)


def draw_curves(results, entries, preset, path):
    """Draw the action loss of each group in training, the mean of its seeds; flat at the end means enough steps.

    Panels and colours are those of `draw_success`; dashes tell the values of the preset's x.
    """
    from matplotlib.figure import Figure  # slow to import

    losses = {name: [cell.losses for cell in entry["cells"] if cell.losses] for name, entry in entries.items()}
    shown = [result for result in results if losses[result["name"]]]
    panels = arrange(shown, preset) or {"": []}
    kinds = dict.fromkeys(kind_of(result["group"], preset) for result in shown)
    levels = dict.fromkeys(result["group"].get(preset.x) for result in shown)
    colours = dict(zip(kinds, cycle(f"C{number}" for number in range(10))))
    dashes = dict(zip(levels, cycle(("-", "--", ":"))))
    figure = Figure(figsize=(max(3.6 * len(panels), 5.4) + 0.6, 3.8), layout="tight")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (title, inside) in zip(axes[0], panels.items()):
        axis.set_title(title, fontsize=10)
        draw_losses(axis, inside, losses, preset, colours, dashes)
    axes[0][0].set_ylabel(f"action loss, mean of {SMOOTH} updates")
    figure.savefig(path, dpi=110)


def draw_losses(axis, results, losses, preset, colours, dashes):
    """Draw the mean of each group's `losses`: a colour for each kind of policy, dashes for each value of preset.x."""
    for result in results:
        curves = losses[result["name"]]
        shortest = min(map(len, curves))
        mean = np.mean([curve[:shortest] for curve in curves], 0)
        style = {"color": colours[kind_of(result["group"], preset)], "ls": dashes[result["group"].get(preset.x)]}
        axis.plot(np.arange(shortest) * SMOOTH, mean, **style)
    for kind in dict.fromkeys(kind_of(result["group"], preset) for result in results):
        axis.plot([], [], color=colours[kind], label=kind)
    for level in dict.fromkeys(result["group"][preset.x] for result in results if preset.x):
        axis.plot([], [], color="black", ls=dashes[level], label=f"{level} {preset.x}")
    if results:
        axis.legend(fontsize=7)
    axis.set(xlabel="updates", yscale="log")
    axis.grid(alpha=0.3)


def write_report(out, preset, cells, setting):
    """Write results.json, success.png, curves.png and report.md into `out`, and print the table.

    preset: a `study.Preset`; cells: list of `Played`, of all shards; setting: a line on what all cells have in common.
    """
    check_data(cells)
    entries = group_cells(cells)
    panels = list(dict.fromkeys(cell.group.get(preset.panels) for cell in cells))
    results = analyse(entries, preset)
    results.sort(
        key=lambda result: (result["group"].get(preset.x, 0), panels.index(result["group"].get(preset.panels)))
    )
    parts = list(dict.fromkeys(part for result in results for part in result["group"]))
    missing = sum(len(result["missing"]) for result in results)
    errors = sum(result["errors"] for result in results)
    lines = [f"# {preset.question}", "", setting, ""]
    if missing:
        lines += [f"**INCOMPLETE: {missing} of {len(cells)} cells are missing.**", ""]
    if errors:
        lines += [f"**INCOMPLETE: {errors} trials ended in an error of the simulator.**", ""]
    lines += [format_table(results, parts, preset.compare), ""]
    if preset.controls:
        lines += [format_controls(results, preset.controls), ""]
    print("\n".join(lines))
    level = f" with the same value of {preset.x}" if preset.x else ""
    lines += [EXPLANATION.format(level=level), "", *([preset.notes, ""] if preset.notes else [])]
    faults = {f"{group_name(cell.group)}, seed {cell.seed}": cell.fault for cell in cells if cell.fault}
    lines += [f"Failed: {name}: {fault}" for name, fault in faults.items()]
    if any("success" in result for result in results):
        draw_success(results, preset, out / "success.png")
        draw_curves(results, entries, preset, out / "curves.png")
        lines += ["![success](success.png)", "", "![action loss](curves.png)", ""]
    lines += provenance([cell for cell in cells if cell.trials])
    write_json(out / "results.json", {"setting": setting, "results": results, "missing": missing, "failed": faults})
    write_text(out / "report.md", "\n".join(lines) + "\n")
    print(f"report: {out / 'report.md'}")


def provenance(cells):
    """Return lines with the commits, labels and versions of finished cells, and the commands of one."""
    commits = sorted({commit for cell in cells for commit in cell.commit.split(", ")})
    played_at = sorted({commit for cell in cells for commit in cell.played_at})
    labels = sorted({fingerprint for cell in cells for fingerprint in cell.labels})
    played = Counter(", ".join(f"{name} {version}" for name, version in cell.versions.items()) for cell in cells)
    lines = [f"Trained at {', '.join(commits) or 'no commit yet'}; {len(cells)} cells."]
    lines += [f"Evaluated at {', '.join(played_at)}, as far as cells say."] if played_at else []
    lines += [f"Labels and codes of models {', '.join(labels)}."] if labels else []
    lines += [f"Played with {versions}: {number} cells." for versions, number in played.items()]
    if len(played) > 1:
        lines += ["**Cells were played with different versions of the simulator or of torch.**"]
    if not cells:
        return lines
    shown = next((cell for cell in cells if cell.labels), cells[0])  # others may name labels that they do not read
    return [*lines, "The commands of one cell:", "", "```text", *shown.commands, "```"]


def check_data(cells):
    """Raise ValueError when finished cells were trained on different data sets of the same names, or on labels of
    different models: image-based ones for all variants but `la_tok`, whose codes are of actions."""
    labels = {}
    for cell in cells:
        if cell.labels:
            kind = "la_tok" if cell.group["variant"] == "la_tok" else "variants with image-based labels"
            labels.setdefault(kind, {}).setdefault(", ".join(cell.labels), cell.group["variant"])
    for kind, models in labels.items():
        if len(models) > 1:
            texts = "; ".join(f"{variant}: {model}" for model, variant in sorted(models.items()))
            raise ValueError(
                f"cells of {kind} were trained on labels of different models ({texts}). Keep those of one in a folder "
                "of their own"
            )
    found = {str(cell.data): f"{group_name(cell.group)}, seed {cell.seed}" for cell in cells if cell.trials}
    if len(found) > 1:
        texts = "; ".join(f"{name}: {data}" for data, name in found.items())
        raise ValueError(f"cells were trained on different data: {texts}. Keep those of one in a folder of their own")
