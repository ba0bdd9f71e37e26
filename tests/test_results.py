"""results.py: known statistics, the result file, tables and comparisons."""

import pytest
from eval_helpers import open_results, record, write
from PIL import Image

import eval as evaluation
import results

# ----------------------------------------------------------------------------------------------------------------------
# Statistics


KNOWN = (
    (0, 20, 0.0, 0.1611),
    (18, 20, 0.6990, 0.9721),
    (10, 20, 0.2993, 0.7007),
    (20, 20, 0.8389, 1.0),
    (0, 0, 0.0, 1.0),
)


@pytest.mark.parametrize("successes, episodes, low, high", KNOWN)
def test_wilson_against_known_values(successes, episodes, low, high):
    """95 % score intervals to four digits, symmetric under exchange of success and failure."""
    assert results.wilson(successes, episodes) == pytest.approx((low, high), abs=1e-4)
    assert results.wilson(episodes - successes, episodes) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def outcomes(only_first, only_second, both=7, neither=4):
    """Return two lists of outcomes with these numbers of pairs."""
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return first, second


@pytest.mark.parametrize(
    "only_first, only_second, p",
    ((0, 0, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 6, 2 / 64), (2, 12, 2 * 106 / 2**14)),
)
def test_mcnemar_against_the_binomial(only_first, only_second, p):
    """Exact two-sided p from the discordant pairs; concordant ones do not count."""
    assert results.mcnemar(*outcomes(only_first, only_second)) == pytest.approx(p)


def test_paired_difference_by_hand():
    """2 pairs lost, 8 won, 10 equal. With 0.5 more in each cell: 6 of 22, variance (11 - 36 / 22) / 22^2."""
    centre, half = 6 / 22, 1.959964 * (11 - 36 / 22) ** 0.5 / 22
    difference = results.paired_difference(*outcomes(2, 8, 6, 4))
    assert difference == pytest.approx((6 / 20, centre - half, centre + half))
    assert results.paired_difference(*outcomes(0, 0, 3, 0)) == pytest.approx((0, -0.392, 0.392), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The result file


def test_cut_line_is_dropped_and_the_rest_continues(tmp_path):
    """What a kill left half-written is played again; trials stay, in order. One evaluation per file."""
    path = tmp_path / "eval.jsonl"
    first = open_results(path)
    with pytest.raises(RuntimeError, match="another evaluation is writing .*eval.jsonl"):
        open_results(path)
    for seed in (3, 1):
        first.add(record(seed, True))
    first.file.write('{"suite": "libero')
    first.file.close()
    second = open_results(path)
    assert [trial["seed"] for trial in second.trials] == [3, 1]
    second.add(record(2, None))
    second.close()
    assert [trial["seed"] for trial in results.read_trials(path)] == [1, 2, 3]
    with pytest.raises(ValueError, match="eval.json; its name must end in .jsonl"):
        open_results(tmp_path / "eval.json")


def test_results_of_something_else_are_refused(tmp_path):
    """Other weights, other versions, a line that is no trial, a trial that is there twice."""
    path = tmp_path / "eval.jsonl"
    open_results(path).add(record(0, True))
    with pytest.raises(ValueError, match="eval.jsonl has other results .model was m, is n.: choose another --out"):
        open_results(path, {"model": "n"})
    path.write_text(path.read_text().replace("3.3.2", "3.4.1"))
    with pytest.raises(ValueError, match="mujoco was 3.4.1, is 3.3.2"):
        open_results(path)
    write(path, [record(0, True), record(0, False)])
    with pytest.raises(ValueError, match=r"holds 1 trials twice, the first is \('libero_goal', 1, 0, 0.06\)"):
        results.read_trials(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a result"):
        results.read_trials(path)


# ----------------------------------------------------------------------------------------------------------------------
# Reports and comparison


def test_errors_count_neither_way(capsys):
    """Two successes, a failure, an error: 2 of 3, and the error is printed."""
    trials = [record(0, True), record(1, True), record(2, False), record(3, None)]
    summary = results.summarise(trials, {})
    (suite,) = summary["suites"]
    assert (suite["successes"], suite["episodes"], suite["errors"]) == (2, 3, 1) and summary["mean_of_suites"] == 2 / 3
    assert suite["ci95"] == results.wilson(2, 3)
    results.print_table(summary)
    assert "2/3    66.7 %   20.8 to  93.9 %  1 ERRORS, counted neither way" in capsys.readouterr().out


def test_mean_of_suites_weighs_suites_alike(capsys):
    """1 of 4 and 1 of 1 are 62.5 %, not 2 of 5."""
    trials = [record(seed, seed == 0) for seed in range(4)] + [record(0, True, suite="libero_object", widen=0.0)]
    summary = results.summarise(trials, {})
    assert summary["mean_of_suites"] == 0.625
    results.print_table(summary)
    assert "mean of the above: 62.5 %" in capsys.readouterr().out


def test_expert_is_counted_on_the_same_starts_only():
    """Same suite, task, seed and width."""
    kinds = [(1, 0, 0.06, True), (1, 1, 0.06, False), (1, 2, 0.06, True), (8, 0, 0.06, True), (1, 0, 0.0, True)]
    known = [dict(zip(("task", "seed", "widen", "success"), kind)) for kind in kinds]
    entry = {"suite": "libero_goal", "expert": known}
    trials = [record(0, True), record(1, True), record(2, True, task=8)]
    assert results.expert_successes(entry, trials) == {"expert_successes": 1, "expert_episodes": 2}
    assert results.expert_successes(entry | {"suite": "libero_object"}, trials)["expert_episodes"] == 0


def test_compare_prints_paired_results_and_draws_them(tmp_path, capsys):
    """9 of 10 against 1 of 10 with no pair won by the second: p = 2 / 2^8. Another shares four starts."""
    write(tmp_path / "a" / "eval.jsonl", [record(s, s < 9) for s in range(10)])
    second = write(tmp_path / "b.jsonl", [record(s, s < 1) for s in range(10)])
    third = write(tmp_path / "c.jsonl", [record(s, None if s == 6 else True) for s in range(5, 13)])
    evaluation.main(evaluation.Config(compare=(tmp_path / "a", second, third)))
    text = capsys.readouterr().out
    assert text.count("put it there") == 1 and "2/4    50.0 %" not in text and "3/4    75.0 %" in text
    assert "compared on the 4 trials that all have; they have 10, 10, 8\n" in text and "put it there" in text
    evaluation.main(evaluation.Config(compare=(tmp_path / "a", second)))
    text = capsys.readouterr().out
    a, b = text[text.index("\nall\n") :].splitlines()[2:4]
    assert a.split() == ["A", "9/10", "90.0", "%", "59.6", "to", "98.2", "%"]
    assert "1/10   10.0 %    1.8 to  40.4 %   minus A:  -80.0 (-97.9 to -35.4), p = 0.0078" in b and b.endswith("8")
    assert "compared on" not in text
    assert Image.open(tmp_path / "a" / "compare.png").size[0] > 500
    kinds = [record(0, True), record(0, False, widen=0.0), record(0, False, suite="libero_object", widen=0.0)]
    both = write(tmp_path / "d.jsonl", kinds)
    results.compare((both, both))
    parts = capsys.readouterr().out.split("\n\n")
    for start in ("libero_goal, starts widened by 0.06 m: ", "libero_goal: ", "libero_object: "):
        (part,) = [part for part in parts if part.startswith(f"{start}put it there\n")]
        assert ("1/1" in part) == ("widened" in start)


def test_compare_refuses_other_starts(tmp_path):
    """Other seeds or another width cannot be paired; a run that was never evaluated is named."""
    first = write(tmp_path / "a.jsonl", [record(0, True)])
    for different in (record(1, True), record(0, True, widen=0.0)):
        other = write(tmp_path / "b.jsonl", [different])
        with pytest.raises(ValueError, match="different starts"):
            results.compare((first, other))
    with pytest.raises(ValueError, match="empty.jsonl has no result yet"):
        results.compare((first, write(tmp_path / "empty.jsonl", [])))
    with pytest.raises(FileNotFoundError, match="eval.jsonl does not exist; make it with python eval.py"):
        results.compare((first, tmp_path))
