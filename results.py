"""Results of evaluations: statistics, the result file, tables and comparisons.

One line of a result file (JSONL) is one trial; a summary (JSON) counts successes per suite and task. Intervals are 95
%: Wilson's score interval for a success rate, Agresti and Min (2005) for a difference of paired rates; p is McNemar's
exact test. `python eval.py --compare RUN ...` prints comparisons.
"""

import json
import math
import os
import textwrap
from collections import Counter

import numpy as np
import torch

from files import check_writable, git_commit, lock, make_folder, shell_command, write_text

# ----------------------------------------------------------------------------------------------------------------------
# Statistics


Z = 1.959964  # of a 95 % interval of the normal distribution


def wilson(successes, episodes):
    """Return the 95 % Wilson score interval of a success rate, (low, high); (0, 1) without episodes."""
    if not episodes:
        return 0.0, 1.0
    rate = successes / episodes
    shrinkage = Z * Z / episodes
    centre = (rate + shrinkage / 2) / (1 + shrinkage)
    half = Z / (1 + shrinkage) * math.sqrt(rate * (1 - rate) / episodes + shrinkage / (4 * episodes))
    return max(0.0, centre - half), min(1.0, centre + half)


def discordant(first, second):
    """Return (pairs that only the first solved, pairs that only the second solved) of two lists of bool."""
    pairs = Counter(zip(map(bool, first), map(bool, second), strict=True))
    return pairs[True, False], pairs[False, True]


def mcnemar(first, second):
    """Return the two-sided p of McNemar's exact test for paired outcomes (lists of bool)."""
    only_first, only_second = discordant(first, second)
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(first, second):
    """Return (difference, low, high): success rate of the second minus the first's, and its 95 % interval.

    Agresti and Min (2005): Wald's interval for paired proportions after adding half a pair to each of the four cells.
    """
    only_first, only_second = discordant(first, second)
    lost = only_first + 0.5
    won = only_second + 0.5
    pairs = len(first) + 2
    centre = (won - lost) / pairs
    half = Z * math.sqrt(won + lost - (won - lost) ** 2 / pairs) / pairs
    return (only_second - only_first) / len(first), max(-1.0, centre - half), min(1.0, centre + half)


# ----------------------------------------------------------------------------------------------------------------------
# The result file


def check_result_path(path):
    """Raise ValueError unless a result file is called .jsonl, PermissionError when it cannot be written."""
    if path.suffix != ".jsonl":
        raise ValueError(f"out is {path}; its name must end in .jsonl (the summary goes to the same name in .json)")
    check_writable(path.parent, "--out")
    check_writable(path, "--out")


class Results:
    """The trials of a result file, one line each. A trial that is in the file already counts as played.

    trials: list of dicts, see `trial_record`; shared: what all of them have in common, as it is now.
    """

    def __init__(self, path, settings, versions):
        """Open or create the file. settings, versions: what all its trials must have been played with, two dicts.

        Raise ValueError when those of the file differ, RuntimeError when another evaluation is writing it, and as
        `check_result_path`.
        """
        check_result_path(path)
        make_folder(path.parent, "--out")
        self.path = path
        self.file = open(path, "a", buffering=1)
        if not lock(self.file):
            raise RuntimeError(f"another evaluation is writing {path}; wait for it, or choose another --out")
        if os.fstat(self.file.fileno()).st_ino != path.stat().st_ino:
            raise RuntimeError(f"another evaluation has just finished {path}; start again")
        versions = versions | {"torch": torch.__version__}
        self.shared = {"settings": settings, "versions": versions, "commit": git_commit()}
        self.trials = read_trials(path)
        for trial in self.trials:
            check_same_settings(path, trial, self.shared)
        text = path.read_text()
        self.file.truncate(len(text[: text.rfind("\n") + 1].encode()))  # an unfinished last line goes

    def add(self, record):
        """Append a trial's record, in the place of one that ended in an error."""
        self.trials = [trial for trial in self.trials if trial_key(trial) != trial_key(record)] + [record | self.shared]
        self.file.write(json.dumps(self.trials[-1]) + "\n")

    def close(self):
        """Sort the file by trial, so that it does not depend on the order or the number of sessions of playing."""
        self.trials.sort(key=trial_key)
        write_text(self.path, "".join(json.dumps(trial) + "\n" for trial in self.trials))
        self.file.close()


def check_same_settings(path, trial, shared):
    """Raise ValueError when a trial was played with settings or versions that differ from the shared ones."""
    stored, current = ({**record["settings"], **record["versions"]} for record in (trial, shared))
    names = [name for name in stored | current if stored.get(name) != current.get(name)]
    names = [name for name in names if name != "text_length"]  # of a call's prompts; it changes rounding
    if names:
        differences = "; ".join(f"{name} was {stored.get(name)}, is {current.get(name)}" for name in names)
        raise ValueError(f"{path} has other results ({differences}): choose another --out, or delete it")


def trial_key(trial):
    """Return what makes two records the same trial: (suite, task, seed, widen)."""
    return trial["suite"], trial["task"], trial["seed"], trial["widen"]


def read_trials(path):
    """Return the trials of a result file, or of several that were concatenated; an unfinished last line is left out.

    A trial that ended in an error and was played again counts once. Raise ValueError when a line is not a trial, or
    when the file holds the outcome of a trial twice.
    """
    trials, twice = {}, []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            trial = json.loads(line)
            key, failed = trial_key(trial), trial["success"] is None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a result: {line[:80]!r}") from error
        if key in trials and not failed and trials[key]["success"] is not None:
            twice.append(key)
        if not failed or key not in trials:
            trials[key] = trial
    if twice:
        raise ValueError(f"{path} holds {len(twice)} trials twice, the first is {twice[0]}; delete one of them")
    return list(trials.values())


def trial_record(episode, result):
    """Return the record of a played episode, without what all trials of a file share."""
    from_episode = ("suite", "task", "instruction", "prompt", "trial", "seed", "widen")
    from_result = ("success", "steps", "reason", "tries", "seconds", "spent")
    return {name: getattr(episode, name) for name in from_episode} | {name: result[name] for name in from_result}


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def tally(trials):
    """Return {"episodes", "successes", "errors", "success_rate", "ci95"} of some trials.

    Errors are trials without an outcome; they count neither as successes nor as failures.
    """
    played = [trial for trial in trials if trial["success"] is not None]
    successes = sum(trial["success"] for trial in played)
    return {
        "episodes": len(played),
        "successes": successes,
        "errors": len(trials) - len(played),
        "success_rate": successes / len(played) if played else None,
        "ci95": wilson(successes, len(played)),
    }


def shard(things, part):
    """Return the part "i/n" of a list, every n-th from the i-th; all of it for "". Raise ValueError for other parts."""
    if not part:
        return things
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard is '{part}'; write it as i/n with i from 1 to n, for example 1/4")
    return things[int(number) - 1 :: int(count)]


def markdown_table(names, rows):
    """Return rows of texts as a Markdown table. names: of the columns."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def group_by(trials, *names):
    """Return {values of these keys: trials}, in order of first appearance."""
    groups = {}
    for trial in trials:
        groups.setdefault(tuple(trial[name] for name in names), []).append(trial)
    return groups


def expert_successes(entry, trials):
    """Return {"expert_successes", "expert_episodes"} of the scripted expert on the same starts.

    entry: what the run's config says of its data; only data of demos.py has the expert's outcomes.
    """
    starts = {trial_key(trial)[1:] for trial in trials if trial["suite"] == entry.get("suite")}
    same = [e for e in entry.get("expert", []) if (e["task"], e["seed"], e["widen"]) in starts]
    return {"expert_successes": sum(e["success"] for e in same), "expert_episodes": len(same)}


def summarise(trials, entry):
    """Return {"suites": counts per suite and task, "mean_of_suites": mean of their success rates}.

    A suite with widened starts and the same without count as two. entry: see `expert_successes`.
    """
    suites = []
    for (suite, widen), group in group_by(trials, "suite", "widen").items():
        tasks = [
            {"task": task, "instruction": part[0]["instruction"], **tally(part), **expert_successes(entry, part)}
            for (task,), part in group_by(group, "task").items()
        ]
        counts = tally(group) | expert_successes(entry, group)
        suites.append({"suite": suite, "widen": widen, **counts, "tasks": tasks})
    rates = [suite["success_rate"] for suite in suites if suite["episodes"]]
    return {"suites": suites, "mean_of_suites": sum(rates) / len(rates) if rates else None}


def format_rate(counts):
    """Return successes, success rate and interval of a `tally` as text."""
    low, high = counts["ci95"]
    rate = f"{100 * counts['success_rate']:5.1f} %" if counts["episodes"] else "   -   "
    return f"{counts['successes']:3d}/{counts['episodes']:<3d} {rate}  {100 * low:5.1f} to {100 * high:5.1f} %"


def print_table(summary):
    """Print success per task and suite with intervals, the expert's where it is known, and errors if there are any."""
    for suite in summary["suites"]:
        lines = [*suite["tasks"], {"instruction": "all tasks", **suite}]
        width = max(len(line["instruction"]) for line in lines)
        print(f"\n{suite['suite']}" + (f", starts widened by {suite['widen']:g} m" if suite["widen"] else ""))
        print(f"{'':{width}}  success          95 % interval" + "    expert" * bool(suite["expert_episodes"]))
        for line in lines:
            text = format_rate(line)
            if line["expert_episodes"]:
                text += f"  {line['expert_successes']}/{line['expert_episodes']}"
            if line["errors"]:
                text += f"  {line['errors']} ERRORS, counted neither way"
            print(f"{line['instruction']:{width}}  {text}")
    if len(summary["suites"]) > 1 and summary["mean_of_suites"] is not None:
        print(f"\nmean of the above: {100 * summary['mean_of_suites']:.1f} %")


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def load_results(path):
    """Return (name, trials) of a run or of a result file, for a comparison.

    Raise FileNotFoundError or ValueError when there is no result.
    """
    file = path / "eval.jsonl" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; make it with {shell_command('python', 'eval.py', path)}")
    trials = read_trials(file)
    if not trials:
        raise ValueError(f"{file} has no result yet")
    return str(path), trials


def common_trials(names, results):
    """Return the trials that all results have and none as an error, in the same order for each result.

    Print their number when some are left out. Raise ValueError when there is none.
    """
    played = [{trial_key(trial): trial for trial in trials if trial["success"] is not None} for trials in results]
    shared = sorted(set.intersection(*map(set, played)))
    if not shared:
        raise ValueError(f"{', '.join(names)} are results of different starts; they cannot be paired")
    counts = [len(trials) for trials in results]
    if set(counts) != {len(shared)}:
        print(f"compared on the {len(shared)} trials that all have; they have {', '.join(map(str, counts))}\n")
    return [[by_key[key] for key in shared] for by_key in played]


def compare(paths):
    """Print results side by side: success, difference to the first paired by trial, McNemar's test; draw a bar chart.

    Raise ValueError when the results have no trial in common.
    """
    names, results = zip(*map(load_results, paths))
    results = common_trials(names, results)
    if len({json.dumps(trial["versions"]) for trials in results for trial in trials}) > 1:
        print("NOTE: these results come from different versions of the simulator or of torch\n")
    letters = [chr(ord("A") + number) for number in range(len(names))]
    for letter, name in zip(letters, names):
        print(f"{letter}  {name}")
    several_suites = len(group_by(results[0], "suite", "widen")) > 1
    groups = []  # (text, the trials of each result)
    for suite, widen, task, text in group_by(results[0], "suite", "widen", "task", "instruction"):
        parts = [
            [t for t in trials if (t["suite"], t["widen"], t["task"]) == (suite, widen, task)] for trials in results
        ]
        place = f"{suite}, starts widened by {widen:g} m: " if widen else f"{suite}: "
        groups.append((f"{place if several_suites else ''}{text}", parts))
    groups.append(("all", results))
    for text, parts in groups:
        print(f"\n{text}")
        for letter, trials in zip(letters, parts):
            print(f"  {letter}  {format_comparison(parts[0], trials)}")
    chart = (paths[0] if paths[0].is_dir() else paths[0].parent) / "compare.png"
    draw_chart(names, groups, chart)
    print("\nintervals: Wilson; of differences, paired by trial: Agresti and Min. p: McNemar's exact test")
    print(f"chart: {chart}")


def format_comparison(first, trials):
    """Return success of some trials as text and, unless they are the first themselves, the difference to those."""
    text = format_rate(tally(trials))
    if trials is first:
        return text
    a, b = ([trial["success"] for trial in part] for part in (first, trials))
    difference, low, high = (100 * x for x in paired_difference(a, b))
    return text + f"   minus A: {difference:+6.1f} ({low:+.1f} to {high:+.1f}), p = {mcnemar(a, b):.2g}"


def draw_chart(names, groups, path):
    """Draw bars of success with Wilson intervals: groups of bars, one bar per result.

    groups: [(text, [trials of each result])].
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(max(6, 1 + 1.6 * len(groups)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        tallies = [tally(parts[number]) for _, parts in groups]
        rates = np.array([100 * counts["success_rate"] for counts in tallies])
        low, high = 100 * np.array([counts["ci95"] for counts in tallies]).T
        centres = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
        axes.bar(centres, rates, width, label=name, yerr=np.clip([rates - low, high - rates], 0, None), capsize=3)
    axes.set_xticks(range(len(groups)), [textwrap.fill(text, 18) for text, _ in groups], fontsize=8)
    axes.set(ylabel="success, % (95 % Wilson interval)", ylim=(0, 105))
    figure.legend(loc="outside upper left", fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
