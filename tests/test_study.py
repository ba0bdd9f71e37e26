"""study.py and report.py: which cells there are, that interruptions and shards change nothing, and the statistics."""

import json
import os
import shlex
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_helpers import record, write

import prepare
import report
import study
from common import Ranks


def config(out, preset="smoke", **changes):
    """Return the settings of a study."""
    return study.Config(preset, out, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_mixed_model_by_hand():
    """Two seeds, three starts: the mean squares of the analysis of variance, and what follows from them."""
    values = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    # rows 3 and 5, columns 2, 3 and 7: MS_seeds = 3 * 2 = 6, MS_starts = 2 * 7 = 14, MS_rest = 0
    mean, error, freedom = report.crossed_mean(values)
    assert (mean, error) == pytest.approx((4, np.sqrt(20 / 6))) and freedom == pytest.approx(20**2 / (36 + 196 / 2))
    alone, error, freedom = report.crossed_mean(values[:1])
    assert (alone, error, freedom) == pytest.approx((3, np.sqrt(7 / 3), 2))
    with_gap = np.hstack([values, [[np.nan], [9.0]]])
    assert report.crossed_mean(with_gap) == pytest.approx(report.crossed_mean(values))
    for freedom, t in ((1, 12.706), (2, 4.303), (10, 2.228), (200, 1.972)):  # of every table
        assert report.t_quantile(freedom) == pytest.approx(t, rel=2e-3)


def simulate(rng, seeds, of_seeds, of_starts, rate=0.7):
    """Return outcomes f64 [seeds, 40] of policies with this rate, which varies with seed and start."""
    rates = rate + of_seeds * rng.normal(size=(seeds, 1)) + of_starts * rng.normal(size=(1, 40))
    return (rng.uniform(size=(seeds, 40)) < rates).astype(float)


@pytest.mark.parametrize("seeds", (3, 5))
def test_intervals_cover_what_they_should(seeds):
    """Success of known rate, varying with seed and start: of 300 studies at least 93 % of the intervals hold it; with
    the seeds ignored (Wilson) far fewer do."""
    rng = np.random.default_rng(seeds)
    covered, without_seeds = [], []
    for _ in range(300):
        outcomes = simulate(rng, seeds, 0.12, 0.1)
        _, low, high = report.rate_interval(outcomes)
        covered.append(low <= 0.7 <= high)
        low, high = report.wilson(int(outcomes.sum()), outcomes.size)
        without_seeds.append(low <= 0.7 <= high)
    assert np.mean(covered) >= 0.93 and np.mean(without_seeds) < np.mean(covered) - 0.1


def test_equal_policies_seldom_differ():
    """Two policies of one rate whose seeds vary: p is below 0.05 in at most 7 % of 300 studies; McNemar's alone, which
    ignores the seeds, is in more."""
    rng = np.random.default_rng(0)
    found, without_seeds = [], []
    for _ in range(300):
        first, second = (simulate(rng, 3, 0.12, 0.1) for _ in range(2))
        found.append(report.difference_interval(first, second)[3] < 0.05)
        pairs = (part.astype(bool).ravel().tolist() for part in (first, second))
        without_seeds.append(report.mcnemar(*pairs) < 0.05)
    assert np.mean(found) <= 0.07 and np.mean(without_seeds) > np.mean(found) + 0.1


def test_differences_are_paired_and_corrected():
    """Two policies that differ on the same starts only: the pairs tell them apart. Of one seed there is no p. Holm's by
    hand."""
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.uniform(size=(1, 60)) < 0.5, 3, 0)
    first = (~hard).astype(float)
    second = first.copy()
    second[:, np.flatnonzero(hard[0])[:8]] = 1
    difference, low, high, p = report.difference_interval(first, second)
    assert difference == pytest.approx(8 / 60) and 0 < low < difference < high and p < 0.01
    assert (
        report.difference_interval(first, first)[3] == 1
        and report.difference_interval(first[:1], second[:1])[3] is None
    )
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def test_presets_name_each_cell_once_and_their_options_exist(tmp_path):
    """No two cells share a folder; every command is one that train.py and eval.py understand."""
    import tyro

    import eval as evaluation
    import train
    from prepare import check_config

    for preset in study.PRESETS:
        cells = study.make_cells(config(tmp_path, preset))
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells[: len(cells) // 3]:  # the first seed's
            for words in study.commands(config(tmp_path, preset), cell):
                if words[1] == "train.py":
                    check_config(tyro.cli(train.Config, args=words[2:]), 1)
                else:
                    tyro.cli(evaluation.Config, args=words[2:])


def test_shards_are_the_whole(tmp_path):
    """1/2 and 2/2 have each cell once, whatever the preset; a wrong shard is refused."""
    whole = [cell.name for cell in study.make_cells(config(tmp_path, "fewshot"))]
    parts = [cell.name for part in ("1/2", "2/2") for cell in study.make_cells(config(tmp_path, "fewshot", shard=part))]
    assert sorted(parts) == sorted(whole) and len(whole) == 87
    assert study.main(config(tmp_path / "x", "long", shard="2/5", report_only=True)) == 0
    assert "INCOMPLETE: 15 of 15 cells are missing" in (tmp_path / "x" / "report.md").read_text()
    with pytest.raises(ValueError, match="shard is '3/2'"):
        study.make_cells(config(tmp_path, shard="3/2"))


def test_settings_that_make_cells_something_else_are_refused(tmp_path):
    """What the cells set themselves, unknown variants, a seed twice. Cells of other settings are not in the report."""
    for expected, changes in (
        ("train has --max-steps, which the cells set themselves", {"train": "--max-steps 7"}),
        ("evaluate has --trials", {"evaluate": "--trials=3"}),
        ("variants has la_typo", {"variants": ("la_typo",)}),
        (r"seeds are .0, 0.; give some, each once", {"seeds": (0, 0)}),
        ("jobs is 0", {"jobs": 0}),
    ):
        with pytest.raises(ValueError, match=expected):
            study.main(config(tmp_path, **changes))
    settings, other = config(tmp_path, seeds=(0,)), config(tmp_path, seeds=(0,), steps=9)
    for cell, longer in zip(study.make_cells(settings), study.make_cells(other)):
        folder = study.cell_folder(settings, cell)
        folder.mkdir()
        (folder / "cell.json").write_text(json.dumps({"commands": study.plain(settings, cell)}))
        assert study.finished(settings, cell) and not study.finished(other, longer)


def test_video_first_is_two_commands(tmp_path):
    """The first on video alone, the second on the labelled demonstrations, from the first one's weights."""
    cells = {cell.name: cell for cell in study.make_cells(config(tmp_path, "fewshot", seeds=(3,), steps=7))}
    first, second, played = study.commands(config(tmp_path, "fewshot"), cells["la_direct-first-5-seed3"])
    assert first[first.index("--data-fraction") + 1] == "0" and first[first.index("--rest") + 1] == "video"
    assert second[second.index("--init-from") + 1] == first[first.index("--out") + 1]
    assert second[second.index("--episodes") + 1] == "5" and played[2] == second[second.index("--out") + 1]
    assert {words[words.index("--seed") + 1] for words in (first, second)} == {"3"}
    other, _, _ = study.commands(config(tmp_path, "fewshot"), cells["la_direct-first-2-seed3"])
    assert other == first  # which is trained once: the two cells run one after the other, and are of one shard
    together = [[cell.name for cell in chain] for chain in study.chains(list(cells.values())) if len(chain) > 1]
    assert together == [[f"{v}-first-{n}-seed3" for n in (5, 2)] for v in ("la_align", "la_direct", "la_cond")]
    for part in ("1/2", "2/2"):
        parts = study.make_cells(config(tmp_path, "fewshot", seeds=(3,), steps=7, shard=part))
        names = {cell.name for cell in parts}
        assert all((f"{v}-first-2-seed3" in names) == (f"{v}-first-5-seed3" in names) for v in study.LATENT)


def test_plan_says_what_is_to_do(tmp_path, capsys):
    """Updates of all trainings that are missing, shared first stages once, and the episodes."""
    settings = config(tmp_path, "fewshot", seeds=(0,), variants=("la_direct",), steps=10, dry_run=True)
    assert study.main(settings) == 0
    # dropped: all, 5 and 2; joint, twice as long: 5 and 2; first: video once, then 5 and 2
    assert "7 of 7 cells to do: 100 updates, 140 episodes of each task" in capsys.readouterr().out


def test_controls_are_played_by_the_first_seed(tmp_path):
    """After its evaluation, ten trials each, into files of their own; the other seeds have none."""
    first, *_, last = study.make_cells(config(tmp_path, "variants", seeds=(4, 5)))
    _, played, *controls = study.commands(config(tmp_path, "variants"), first)
    assert played[played.index("--trials") + 1] == "50" and len(study.commands(config(tmp_path, "variants"), last)) == 2
    assert [words[-2:] for words in controls][1:3] == [["--black-camera", "image"], ["--black-camera", "wrist_image"]]
    assert {words[words.index("--trials") + 1] for words in controls} == {"10"}
    assert len({words[words.index("--out") + 1] for words in (played, *controls)}) == 1 + len(study.CONTROLS)


@pytest.mark.parametrize("jobs", (1, 2, 99))
def test_cells_side_by_side_share_the_cores(tmp_path, monkeypatch, jobs):
    """Two at a time have different cores, all cores together; more at a time than cores have one or any."""
    here = os.sched_getaffinity(0)
    used = []
    waiting = threading.Barrier(min(jobs, 2))

    def note(settings, cell):
        waiting.wait(60)
        used.append(os.sched_getaffinity(0))
        return ""

    monkeypatch.setattr(study, "run_cell", note)
    settings = config(tmp_path, seeds=(0,), jobs=jobs)
    assert study.run_cells(settings, study.make_cells(settings)) == {}
    assert len(used) == 2 and os.sched_getaffinity(0) == here
    if 1 < jobs <= len(here):
        assert not used[0] & used[1]
    if jobs <= len(here):
        assert used[0] | used[1] == here


def test_together_and_alone(rlds, train_config, tmp_path):
    """Each instruction of the data gets a cell of its own; such a run trains on its episodes alone and is evaluated on
    its task alone. An instruction that no episode has is refused."""
    cells = study.make_cells(config(tmp_path, "joint", data=(rlds,), variants=("baseline",), seeds=(0,), steps=10))
    alone = [stage[stage.index("--instructions") + 1] for cell in cells for stage in cell.stages if len(stage) > 6]
    assert alone == ["put the bowl on the plate", "put the bowl on the stove"] and len(cells) == 3
    plate = train_config(tmp_path / "run", variant="baseline", instructions=(alone[0],))
    setup = prepare.prepare(plate, Ranks(0, 1, torch.device("cpu")), set())
    (dataset,) = setup.dataset.datasets
    held = [steps for _, steps in setup.held_out]
    told = {dataset.instruction(dataset.starts[e]) for source in setup.dataset.sources for e in source.episodes}
    told |= {dataset.instruction(steps[k]) for steps in held for k in range(len(steps))}
    assert told == {alone[0]}
    entry = setup.description["data"][0]
    assert entry["tasks"] == [8] and entry["instructions"] == [alone[0]]
    with pytest.raises(ValueError, match="no episode is told .'fly'.; there are .'put the bowl on the plate'"):
        prepare.prepare(train_config(tmp_path / "x", instructions=("fly",)), Ranks(0, 1, torch.device("cpu")), set())


# ----------------------------------------------------------------------------------------------------------------------
# Reports


@pytest.fixture
def cells(tmp_path):
    """Two variants with 2 and 18 labels, two seeds, of which one is not finished."""
    made = []
    for variant, labelled, rate in (("baseline", 2, 0.4), ("baseline", 18, 0.9), ("la_direct", 2, 0.8)):
        for seed in (0, 1):
            folder = tmp_path / f"{variant}-{labelled}-{seed}"
            made.append(({"variant": variant, "labelled": labelled}, seed, folder, (variant, seed) != ("la_direct", 1)))
            (folder / "run").mkdir(parents=True)
            (folder / "run" / "config.json").write_text('{"commit": "abc"}')
            (folder / "run" / "log.jsonl").write_text('{"action_loss": 0.5}\n' * 250)
            (folder / "cell.json").write_text(json.dumps({"commands": [f"python train.py --out {folder}/run"]}))
            if (variant, labelled) == ("baseline", 2):
                write(folder / "cameras-swapped.jsonl", [record(start, start == seed) for start in range(3)])
            write(folder / "eval.jsonl", [record(start, start < 10 * rate) for start in range(10)] + [record(10, None)])
    return made


def test_report_by_hand(cells, tmp_path, capsys):
    """Counts, differences on the seeds that both have, what is missing in the row and at the top, pictures, JSON."""
    preset = SimpleNamespace(
        question="Why?",
        x="labelled",
        panels="",
        baseline={"variant": "baseline"},
        controls=("blind", "cameras swapped"),
    )
    report.write_report(tmp_path / "out", preset, cells, {"x": "it crashed"})
    text = (tmp_path / "out" / "report.md").read_text()
    rows = {line.split("|")[1].strip() + line.split("|")[2].strip(): line for line in text.splitlines() if "=" in line}
    assert "8/20 = 40.0 %" in rows["baseline2"] and "18/20 = 90.0 %" in rows["baseline18"]
    assert "8/10 = 80.0 % INCOMPLETE: seeds 1 are missing" in rows["la_direct2"] and "+40.0 (" in rows["la_direct2"]
    assert "one seed" in rows["la_direct2"] and "INCOMPLETE: 2 trials ended in an error" in rows["baseline2"]
    assert "**INCOMPLETE: 1 of 6 cells are missing.**" in text and "Failed: x: it crashed" in text
    assert "| baseline, 2 | missing | 2/6 |" in text and "| la_direct, 2 | missing | missing |" in text
    assert "Trained at abc; 5 cells." in text and "python train.py --out OUT/" in text
    assert "INCOMPLETE" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["missing"] == 1 and results["results"][0]["by_seed"] == [0.4, 0.4]
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in ("success.png", "curves.png"))


def test_killed_study_goes_on_and_gives_the_same_report(rlds, cache, labels, tmp_path, monkeypatch):
    """Two cells of the smoke preset: the second one's evaluation fails at first, which is reported and tried again; the
    next call does only what is missing, and its results are those of a study that was never interrupted."""
    played = []

    def pretend(words, **options):
        """Train for real; play no simulator, but write what one would have written."""
        if words[1] == "eval.py":
            played.append(words[2])
            if "la_direct" in words[2] and len(played) < 4:
                return SimpleNamespace(returncode=1)
            write(tmp_path / "x" / "trials", [])
            out = words[words.index("--out") + 1]
            write(study.Path(out), [record(start, True) for start in range(3)])
        else:
            started.append(shlex.join(words))
        return SimpleNamespace(returncode=0)

    started = []
    monkeypatch.setattr(study.subprocess, "run", pretend)
    settings = config(tmp_path / "study", seeds=(0,))
    assert study.main(settings) == 1  # la_direct failed twice
    before = len(started)
    assert "1 of 2 cells are missing" in (tmp_path / "study" / "report.md").read_text()
    assert study.main(settings) == 0 and len(started) == before + 1
    assert study.main(settings) == 0 and len(started) == before + 1  # nothing is left to do
    whole = config(tmp_path / "whole", seeds=(0,))
    assert study.main(whole) == 0
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("study", "whole"))
    assert one == other
