"""table.py: the table of results says what was played, pairs by seed and start, and says what is missing."""

import json

import table
from eval_helpers import record, write


def finish(folder, name, successes):
    """Write a finished evaluation of a run, one trial for each of `successes`."""
    write(folder / f"{name}.jsonl", [record(seed, success) for seed, success in enumerate(successes)])
    (folder / f"{name}.json").write_text("{}")


def test_table_by_hand(tmp_path, capsys):
    """Two variants and seeds: counts, Wilson's interval over both seeds, the paired difference, one control."""
    config = table.Config(tmp_path, ("baseline", "la_align"), (0, 1), trials=4, control_trials=2, print_only=True)
    for variant, seed, successes in (
        ("baseline", 0, [1, 1, 0, 1]),
        ("baseline", 1, [1, 0, 1, 1]),
        ("la_align", 0, [1, 1, 1, 1]),
    ):
        folder = tmp_path / f"{variant}-{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"commit": "abc"}))
        finish(folder, "table-eval-4", map(bool, successes))
    finish(tmp_path / "la_align-0", "table-blind-2", [False, True])
    assert table.main(config) == 1 + 5 + 4
    text = (tmp_path / "table.md").read_text()
    assert text + "\n" == capsys.readouterr().out
    baseline, aligned = (line for line in text.splitlines() if line.startswith("| `"))
    assert baseline.startswith("| `baseline` | 3/4 | 3/4 | 6/8 = 75.0% | 40.9 to 92.9 % |  | missing |")
    assert aligned.startswith("| `la_align` | 4/4 | missing | 4/4 = 100.0% | 51.0 to 100.0 % | +25.0 (")
    assert ", p = 1 | 1/2 | missing | missing | missing | missing |" in aligned
    assert "Trained at abc" in text and "INCOMPLETE: 10 cells are missing." in text


def test_unfinished_evaluations_do_not_count(tmp_path):
    """Trials without the summary that an evaluation writes at its end are not in the table."""
    config = table.Config(tmp_path, ("baseline",), (0,), trials=2)
    (tmp_path / "baseline-0").mkdir()
    write(tmp_path / "baseline-0" / "table-eval-2.jsonl", [record(0, True)])
    assert table.outcomes(config, "baseline") == {}
