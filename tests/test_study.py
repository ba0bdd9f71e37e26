"""study.py and report.py: which cells there are, that interruptions and shards change nothing, and the statistics."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import printed
from eval_helpers import record, write
from warm import wait_for

import prepare
import report
import study
import train
from common import Ranks
from files import locate_tensors, save_tensors
from model import VARIANTS

SHIPPED = study.DATA / "labels.safetensors"


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


def test_pooled_scatter_by_hand():
    """The variance of seeds and the rest, as shares of the variance of all values, over tables of two seeds and more;
    fewer degrees of freedom for those that are compared with the same group; a table alone gives what it gives without
    pooling."""
    values = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])  # MS_seeds 6, MS_rest 0, variance 34 / 6
    still = np.array([[0.0, 3.0], [3.0, 0.0]])  # MS_seeds 0, MS_rest 9, variance 9 / 4
    both = [values, still, values[:1]]
    shares = ((6 / 3 - 9 / 2) / (34 / 6 + 9 / 4), 9 / (34 / 6 + 9 / 4))
    assert report.pool_scatter(both) == pytest.approx((*shares, 2))
    assert report.pool_scatter(both, ["a", "a", "a"]) == pytest.approx((*shares, 2 / 1.25))
    assert report.pool_scatter(both, ["a", "b", "a"]) == pytest.approx((*shares, 2))
    assert report.pool_scatter([values[:1]]) == (0, 0, 0)
    alone = report.crossed_mean(values)
    assert report.crossed_mean(values, report.pool_scatter([values])) == alone
    mean, error, freedom = report.crossed_mean(values, (4 / (34 / 6), 0.0, 9.0))  # MS_seeds 12, of 9 degrees
    assert (mean, error) == pytest.approx((4, np.sqrt(26 / 6))) and freedom == pytest.approx(26**2 / (144 / 9 + 98))


def test_pooled_scatter_finds_more_and_stays_honest():
    """Eight policies against a baseline, three seeds: of seven equal ones at most 7 % have p < 0.05 in 60 studies, and
    the one that is better by 20 points has it at least half again as often as when it is judged by its own seeds."""
    rng = np.random.default_rng(5)
    equal, better, judged_alone = [], [], []
    for _ in range(60):
        starts = 0.1 * rng.normal(size=(1, 40))
        tables = [
            (rng.uniform(size=(3, 40)) < rate + 0.08 * rng.normal(size=(3, 1)) + starts).astype(float)
            for rate in [0.5] * 8 + [0.7]
        ]
        scatter = report.pool_scatter([table - tables[0] for table in tables[1:]], [0] * 8)
        ps = [report.difference_interval(tables[0], table, scatter)[3] for table in tables[1:]]
        equal += [p < 0.05 for p in ps[:-1]]
        better.append(ps[-1] < 0.05)
        judged_alone.append(report.difference_interval(tables[0], tables[-1])[3] < 0.05)
    assert np.mean(equal) <= 0.07 and np.mean(better) > 1.5 * np.mean(judged_alone)


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


def test_groups_with_different_numbers_of_starts_are_pooled():
    """Of 5 groups with 40 starts and 15 with 10, of one rate, at least 90 % of the intervals of the former hold it;
    were the mean squares of seeds pooled, which grow with the starts, 86 % would."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(100):
        tables = [simulate(rng, 3, 0.15, 0.0)[:, : 40 if number < 5 else 10] for number in range(20)]
        scatter = report.pool_scatter(tables)
        intervals = [report.rate_interval(table, scatter) for table in tables[:5]]
        covered += [low <= 0.7 <= high for _, low, high in intervals]
    assert np.mean(covered) >= 0.9


def test_groups_that_share_their_seeds_do_not_say_more_of_seeds():
    """By hand; and of 8 groups whose seeds vary alike, at least 91 % of the intervals hold the rate: were they taken
    for groups with seeds of their own, 87 % would."""
    a, b = (np.array([[1.0, 1], [2, 2], [3, 3]]) * scale for scale in (1, 2))  # deviations -1, 0, 1 and -2, 0, 2
    assert report.seed_correlation([a, b]) == pytest.approx(((1 + 2) ** 2 * 2 - 10) / 10)
    assert report.seed_correlation([a, b[::-1]]) == report.seed_correlation([a]) == 0
    gap = np.vstack([a[:2], [[np.nan, np.nan]]])  # deviations -1 / 2, 1 / 2
    assert report.seed_correlation([gap, a]) == pytest.approx((1.5**2 + 0.5**2 + 1 - 2.5) / 2.5)
    rng = np.random.default_rng(1)
    covered, as_if_apart = [], []
    for _ in range(100):
        rates = 0.6 + 0.15 * rng.normal(size=(3, 1)) + 0.1 * rng.normal(size=(1, 100))
        tables = [(rng.uniform(size=(3, 100)) < rates).astype(float) for _ in range(8)]
        correlation = report.seed_correlation(tables)
        for found, options in ((covered, (["all"] * 8, correlation)), (as_if_apart, ())):
            scatter = report.pool_scatter(tables, *options)
            intervals = [report.rate_interval(table, scatter) for table in tables[:3]]
            found += [low <= 0.6 <= high for _, low, high in intervals]
    assert np.mean(covered) >= 0.91 and np.mean(as_if_apart) < 0.88, (np.mean(covered), np.mean(as_if_apart))


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
    assert report.holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.01, 0.04, 0.03], 5) == pytest.approx([0.05, 0.12, 0.12])
    always = np.ones((3, 4))
    assert report.difference_interval(1 - always, always)[3] == 0.25  # three seeds agree, whatever the starts
    apart = np.array([[1.0, np.nan, 1, np.nan], [np.nan, 1, np.nan, 1]])
    assert report.difference_interval(1 - apart, apart)[3] is None  # the seeds have no start in common


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def test_presets_name_each_cell_once_and_their_options_exist(tmp_path):
    """No two cells share a folder; every command is one that train.py and eval.py understand."""
    import eval as evaluation
    from prepare import check_config

    for preset in study.PRESETS:
        cells = study.make_cells(config(tmp_path, preset))
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells[: len(cells) // 3]:  # the first seed's
            for words in study.commands(config(tmp_path, preset), cell):
                if words[1] == str(study.ROOT / "train.py"):
                    check_config(tyro.cli(train.Config, args=words[2:]), 1)
                else:
                    tyro.cli(evaluation.Config, args=words[2:])


def test_shards_are_the_whole(tmp_path):
    """1/2 and 2/2 have each cell once, whatever the preset; a wrong shard is refused."""
    whole = [cell.name for cell in study.make_cells(config(tmp_path, "fewshot"))]
    parts = [cell.name for part in ("1/2", "2/2") for cell in study.make_cells(config(tmp_path, "fewshot", shard=part))]
    assert sorted(parts) == sorted(whole) and len(whole) == 87
    assert study.main(config(tmp_path / "x", "ablations", shard="2/5", report_only=True)) == 0
    assert "INCOMPLETE: 42 of 42 cells are missing" in (tmp_path / "x" / "report.md").read_text()
    with pytest.raises(ValueError, match="shard is '3/2'"):
        study.make_cells(config(tmp_path, shard="3/2"))


def test_settings_that_make_cells_something_else_are_refused(tmp_path):
    """What the cells set themselves, however it is written; unknown variants, a seed twice, long tasks without data.
    Cells of other settings are not in the report; where they lie, and what starts them, makes no difference."""
    for expected, changes in (
        ("train has --max-steps, which the cells set themselves", {"train": "--max_steps 7"}),
        ("train has --latent-weight, which", {"preset": "ablations", "train": "--latent-weight=0.5"}),
        ("train has --epochs, which", {"train": "--num-workers 2 --epochs 3"}),
        ("evaluate has --trials", {"evaluate": "--trials=3"}),
        ("variants has la_typo", {"variants": ("la_typo",)}),
        (r"seeds are .0, 0.; give some, each once", {"seeds": (0, 0)}),
        ("jobs is 0", {"jobs": 0}),
        ("steps is -1; it must be at least 0", {"steps": -1}),
        ("data is data/libero_tiny, whose tasks are short", {"preset": "long"}),
        ("fewshot takes actions away, and labels of a", {"preset": "fewshot", "variants": ("la_cond",)}),
        ("video takes actions away, and labels of a", {"preset": "video"}),
        ("labels.safetensors the model saw actions: yes.", {"preset": "video", "train": f"--labels={SHIPPED}"}),
    ):
        with pytest.raises(ValueError, match=expected):
            study.main(config(tmp_path, **changes))
    settings = config(tmp_path, seeds=(0,))
    cell = study.make_cells(settings)[0]
    study.cell_file(settings, cell).parent.mkdir()
    made = json.dumps({"made": study.made_of(settings, cell)})
    study.cell_file(settings, cell).write_text(made)
    for same in ({}, {"launch": "torchrun"}, {"out": tmp_path / ".." / tmp_path.name}, {"jobs": 2}):
        assert study.read_cell(replace(settings, **same), cell)
    for other in ({"train": "--centre"}, {"evaluate": "--widen 0"}, {"trials": 7}, {"data": (tmp_path / "x",)}):
        assert not study.read_cell(replace(settings, **other), cell)
    assert not study.read_cell(settings, study.make_cells(replace(settings, steps=9))[0])
    for labels in ("--labels a b", "--labels=a"):  # which the baseline does not read
        assert study.read_cell(replace(settings, train=labels), cell)
        assert not study.read_cell(replace(settings, train=f"{labels} --centre"), cell)
    learner = study.make_cells(settings)[1]
    assert study.made_of(replace(settings, train="--labels a"), learner) != study.made_of(settings, learner)


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


def test_shares_of_video(tmp_path):
    """The weight of video makes it the share of a batch that the cell's name says; half of it, and none, are cells of
    `fewshot`; each variant's lambda is another than its own."""
    episodes, instructions = study.training_demonstrations(config(tmp_path))
    changes = {"seeds": (4,), "train": "--labels FILE"}
    cells = {cell.name: cell for cell in study.make_cells(config(tmp_path, "video", **changes))}
    for name, share in (("a_quarter", 0.25), ("half", 0.5), ("three_quarters", 0.75)):
        (options,) = cells[f"la_cond-{name}-seed4"].stages
        video = float(options[options.index("--rest-weight") + 1]) * (episodes - 2 * instructions)
        assert video / (video + 2 * instructions) == pytest.approx(share, rel=1e-3)
    twins = {"half": "joint", "no_video": "dropped"}
    fewshot = {cell.name: cell for cell in study.make_cells(config(tmp_path, "fewshot", **changes))}
    for variant in ("la_align", "la_direct", "la_cond"):
        for ours, theirs in twins.items():
            assert cells[f"{variant}-{ours}-seed4"].stages == fewshot[f"{variant}-{theirs}-2-seed4"].stages
        (changed,) = [name for name in cells if name.startswith(f"{variant}-half_lambda")]
        (options,) = cells[changed].stages
        default = VARIANTS[variant].weight
        assert float(options[options.index("--latent-weight") + 1]) in (0.1 * default, 10 * default)
    assert len(cells) == 16


def test_printed_study():
    """The command of docs/study.md gives its labels to all cells, and they are refused in no variant. They are of the
    embedded data, by another model than the labels that were learned with actions."""
    settings = tyro.cli(study.Config, args=printed("python study.py fewshot --out runs/fewshot --jobs 2")[2:])
    study.check_config(settings)
    for cell in study.make_cells(settings):
        for words in study.training_commands(settings, cell):
            trained = tyro.cli(train.Config, args=words[2:])
            prepare.check_config(trained, 1)
            assert trained.labels == (study.DATA / "labels_wrist_without_actions.safetensors",)
    (_, without), (_, shipped) = (locate_tensors(study.ROOT / path) for path in (*trained.labels, SHIPPED))
    assert without["data"] == shipped["data"] and without["lam"] != shipped["lam"]


def test_plan_says_what_is_to_do(tmp_path, capsys):
    """Updates of all trainings that are missing, shared first stages once, and the episodes."""
    settings = config(tmp_path, "fewshot", seeds=(0,), variants=("la_direct",), steps=10, dry_run=True)
    settings.evaluate = "--max-steps 150"  # of eval.py
    settings.train = f"--labels {study.DATA}/labels_wrist_without_actions.safetensors"
    assert study.main(settings) == 0
    # dropped: all, 5 and 2; joint: 5 and 2; first, half as long each: video once, then 5 and 2
    assert "7 of 7 cells to do: 65 updates, 140 episodes of each task" in capsys.readouterr().out
    assert "only la_direct, so p are corrected for fewer comparisons" in study.describe(settings)  # its report says so


def test_controls_are_played_by_the_first_seed(tmp_path):
    """After its evaluation, ten trials each, into files of their own; the other seeds have none."""
    settings = config(tmp_path, "variants", seeds=(4, 5), evaluate="--envs 1")
    first, *_, last = study.make_cells(settings)
    _, played, *controls = study.commands(settings, first)
    assert played[played.index("--trials") + 1] == "50" and len(study.commands(settings, last)) == 2
    assert all(words[words.index("--envs") + 1] == "1" for words in (played, *controls))
    assert [words[-2:] for words in controls][1:3] == [["--black-camera", "image"], ["--black-camera", "wrist_image"]]
    assert {words[words.index("--trials") + 1] for words in controls} == {"10"}
    assert len({words[words.index("--out") + 1] for words in (played, *controls)}) == 1 + len(study.CONTROL_FLAGS)


@pytest.mark.parametrize("jobs", (1, 2, 99))
def test_cells_side_by_side_share_the_cores(tmp_path, monkeypatch, jobs):
    """Two at a time have different cores, all cores together; more at a time than cores have one or any."""
    here = os.sched_getaffinity(0)
    used = []
    waiting = threading.Barrier(min(jobs, 2))

    class Child:
        """What stands for train.py and eval.py: it notes the cores, and fails."""

        def __init__(self, words, **options):
            used.append(os.sched_getaffinity(0))
            waiting.wait(60)

        def wait(self):
            return 1

    monkeypatch.setattr(study, "TRIES", 1)
    monkeypatch.setattr(study.subprocess, "Popen", Child)
    settings = config(tmp_path, seeds=(0,), jobs=jobs)
    assert len(study.run_cells(settings, study.make_cells(settings))) == 2
    assert len(used) == 2 and os.sched_getaffinity(0) == here
    if 1 < jobs <= len(here):
        assert not used[0] & used[1]
    if jobs <= len(here):
        assert used[0] | used[1] == here


def test_together_and_alone(rlds, train_config, tmp_path):
    """Each instruction of the data gets a cell of its own; such a run trains on its episodes alone and is evaluated on
    its task alone. An instruction that no episode has is refused. The policy of all is that of `variants`."""
    cells = study.make_cells(config(tmp_path, "joint", data=(rlds,), variants=("baseline",), seeds=(0,), steps=10))
    trained = {}
    for cell in cells:
        (options,) = cell.stages
        text = options[options.index("--instructions") + 1] if "--instructions" in options else "all"
        trained[cell.group["trained"]] = (text, int(options[options.index("--max-steps") + 1]))
    alone = ["put the bowl on the plate", "put the bowl on the stove"]
    expected = {"together": ("all", 10)}
    for text in alone:
        expected |= {f"{text} alone": (text, 5), f"{text} alone, as long": (text, 10)}
    assert trained == expected
    both = [config(tmp_path, preset, variants=("la_tok",), seeds=(0,)) for preset in ("joint", "variants")]
    together, same = (study.made_of(settings, study.make_cells(settings)[0]) for settings in both)
    assert together == same
    plate = train_config(tmp_path / "run", variant="baseline", instructions=(alone[0],))
    setup = prepare.prepare(plate, Ranks(0, 1, torch.device("cpu")), set())
    (dataset,) = setup.dataset.datasets
    held = [steps for _, steps in setup.held_out]
    found = {dataset.instruction(dataset.starts[e]) for source in setup.dataset.sources for e in source.episodes}
    found |= {dataset.instruction(steps[k]) for steps in held for k in range(len(steps))}
    assert found == {alone[0]}
    entry = setup.description["data"][0]
    assert entry["tasks"] == [8] and entry["instructions"] == [alone[0]]
    with pytest.raises(ValueError, match="no episode has .'fly'.; there are .'put the bowl on the plate'"):
        prepare.prepare(train_config(tmp_path / "x", instructions=("fly",)), Ranks(0, 1, torch.device("cpu")), set())


# ----------------------------------------------------------------------------------------------------------------------
# Reports


@pytest.fixture
def cells():
    """Two variants with 2 and 18 labels, two seeds, of which one is not finished."""
    made = []
    for variant, labelled, rate in (("baseline", 2, 0.4), ("baseline", 18, 0.9), ("la_direct", 2, 0.8)):
        for seed in (0, 1):
            cell = report.Played({"variant": variant, "labelled": labelled}, seed)
            if (variant, seed) == ("la_direct", 1):
                cell.fault = "it crashed"
            else:
                played = [record(start, start < 10 * rate) for start in range(10)] + [record(10, None)]
                cell.trials, cell.losses, cell.commit = report.outcomes(played), [0.5, 0.4], "abc"
                cell.labels, cell.commands = ["f00"], ["python train.py --out OUT/a/run"]
                cell.versions, cell.played_at = {"mujoco": f"3.3.{seed}"}, ["def"][seed:]
            if (variant, labelled, seed) == ("baseline", 2, 0):
                denied = [record(0, True), record(1, False), record(2, None)]
                cell.controls["cameras swapped"] = report.outcomes(denied)
            made.append(cell)
    return made


def test_report_by_hand(cells, tmp_path, capsys):
    """Counts, differences on the seeds that both have, what is missing in the row and at the top, pictures, JSON."""
    preset = SimpleNamespace(
        question="Why?",
        x="labelled",
        panels="",
        compare=(
            report.Comparison({"variant": "baseline"}),
            report.Comparison({"labelled": 2}),
            report.Comparison({"variant": "la_direct"}, {"labelled": (18,)}),
        ),
        controls=("blind", "cameras swapped"),
        notes="Mind the gap.",
    )
    report.write_report(tmp_path, preset, cells, "somewhere; 7 updates")
    text = (tmp_path / "report.md").read_text()
    rows = {line.split("|")[1].strip() + line.split("|")[2].strip(): line for line in text.splitlines() if "=" in line}
    assert list(rows) == ["baseline2", "la_direct2", "baseline18"]
    assert "8/20 = 40.0 %" in rows["baseline2"] and "18/20 = 90.0 %" in rows["baseline18"]
    assert rows["baseline2"].endswith("|  |  |  |  |  |  |") and "minus 2 (points)" in text
    *_, to_baseline, _, to_two, p, _, _, _ = rows["baseline18"].split("|")
    assert to_baseline.strip() == "" and to_two.strip().startswith("+50.0 (") and p.count("(") == 1
    assert "8/10 = 80.0 % INCOMPLETE: seeds 1 are missing" in rows["la_direct2"] and "+40.0 (" in rows["la_direct2"]
    assert ") INCOMPLETE: of seeds 0 |  |" in rows["la_direct2"] and "of seeds" not in rows["baseline18"]
    assert "INCOMPLETE: 2 trials ended in an error" in rows["baseline2"]
    assert "**INCOMPLETE: 1 of 6 cells are missing.**" in text and "Failed: la_direct, 2, seed 1: it crashed" in text
    assert "somewhere; 7 updates" in text and "Mind the gap." in text
    assert "| baseline, 2 | missing | 1/2 |" in text and "| la_direct, 2 | missing | missing |" in text
    assert (
        "Trained at abc; 5 cells." in text
        and "Played with mujoco 3.3.0: 3 cells." in text
        and "Played with mujoco 3.3.1: 2 cells." in text
        and "**Cells were played with different versions of the simulator or of torch.**" in text
        and "Labels and codes of models f00." in text
        and "Evaluated at def, as far as cells say." in text
        and "python train.py --out OUT/" in text
    )
    assert "INCOMPLETE" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == 1 and results["results"][0]["by_seed"] == [0.4, 0.4]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("success.png", "curves.png"))


def test_charts_and_table_are_in_the_order_of_the_preset(cells, tmp_path):
    """Fewest labels first, then as the preset lists panels and variants; the baselines are in all panels."""
    preset = study.PRESETS["fewshot"]
    played = []
    for rest, variant, labelled in (
        ("first", "la_align", 5),  # cells of one chain come together
        ("first", "la_align", 2),
        ("dropped", "baseline", 5),
        ("dropped", "la_align", 5),
        ("dropped", "baseline", 2),
    ):
        group = {"variant": variant, "rest": rest, "labelled": labelled}
        played.append(report.Played(group, 0, cells[0].trials, losses=[0.5, 0.4], data=[]))
    order = [played[2], *played[:2], *played[3:]]
    report.write_report(tmp_path, preset, order, "somewhere")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    names = ["baseline, dropped, 2", "la_align, first, 2"]
    names += ["baseline, dropped, 5", "la_align, dropped, 5", "la_align, first, 5"]
    assert [result["name"] for result in results] == names
    panels = {title: [result["name"] for result in inside] for title, inside in report.arrange(results, preset).items()}
    assert panels == {
        "rest: dropped": [names[0], names[2], names[3]],
        "rest: first": [names[0], names[2], names[1], names[4]],
    }
    assert report.kind_of(results[1]["group"], preset) == "la_align"
    assert report.kind_of({"variant": "la_tok"}, study.PRESETS["variants"]) == "la_tok"


def test_comparisons_of_a_level_are_a_family():
    """Holm's correction counts the comparisons of a column with the same number of labels; what is not among the
    compared groups has none."""
    cells = []
    for number, (variant, labelled, lost) in enumerate(
        [("a", 2, 0), ("b", 2, 9), ("c", 2, 4), ("a", 5, 0), ("b", 5, 9)]
    ):
        for seed in (0, 1):
            cell = report.Played({"variant": variant, "labelled": labelled}, seed)
            cell.trials = report.outcomes(record(start, start >= lost + seed) for start in range(30))
            cells.append(cell)
    compare = (report.Comparison({"variant": "a"}), report.Comparison({"variant": "a"}, {"variant": ("b",)}))
    preset = SimpleNamespace(x="labelled", compare=compare)
    found = {result["name"]: result["differences"] for result in report.analyse(report.group_cells(cells), preset)}
    waiting = report.Played({"variant": "c", "labelled": 5}, 0)
    entries = report.group_cells([*cells, waiting])
    more = {result["name"]: result["differences"] for result in report.analyse(entries, preset)}
    assert more["b, 5"][0]["p_holm"] == pytest.approx(2 * more["b, 5"][0]["p"])  # the other will come
    entries = report.group_cells([*cells[:-1], report.Played(cells[-1].group, cells[-1].seed)])
    early = {result["name"]: result["differences"] for result in report.analyse(entries, preset)}["b, 5"][0]
    assert early["p"] is early["p_holm"] is None and early["ci95"][0] > -1  # one would look until it is small
    assert found["c, 2"][0]["p"] < 1 and found["c, 2"][1] is None and found["a, 2"] == [None, None]
    assert found["b, 2"][0]["p_holm"] == pytest.approx(2 * found["b, 2"][0]["p"])
    for difference in (found["b, 5"][0], found["b, 2"][1], found["b, 5"][1]):
        assert difference["p_holm"] == difference["p"] < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


class Pretended:
    """What stands for the processes of a study: trains and plays nothing, but writes what one would have written.

    faults: what goes wrong with the next trainings, "" for nothing.
    """

    def __init__(self, faults=()):
        self.faults = list(faults)
        self.trained = []
        self.data = "d00"

    def __call__(self, words, **options):
        assert "cwd" not in options  # relative paths of --train and --evaluate are the caller's, as of --out
        out = study.Path(words[words.index("--out") + 1])
        if words[1] == str(study.ROOT / "eval.py"):
            write(out, [record(start, True, trial=start) for start in range(3)])
            return SimpleNamespace(wait=lambda: 0)
        self.trained.append(out)
        fault = self.faults.pop(0) if self.faults else ""
        out.mkdir(exist_ok=True)
        step = 1 if fault == "stopped half way" else words[words.index("--max-steps") + 1]  # it ends well, as at Ctrl-C
        save_tensors(out / "model.safetensors", {"x": torch.zeros(1)}, step=step)
        config = {"commit": "abc", "targets": [{"fingerprint": "f00"}], "data": [{"fingerprint": self.data}]}
        (out / "config.json").write_text(json.dumps(config))
        (out / "log.jsonl").write_text('{"action_loss": 0.5}\n' * 150 + '{"action_loss": 0.3}\n' * 150)
        return SimpleNamespace(wait=lambda: int(fault == "crash"))


def test_interrupted_study_goes_on_and_gives_the_same_report(tmp_path, monkeypatch):
    """Two cells: one training crashes, then ends well but half way, as after Ctrl-C: both are reported and tried again,
    and such a run is never played. The next call does only what is missing; its results are those of an undisturbed
    study, in which trials that nobody asked for do not count."""
    settings = config(tmp_path / "study", seeds=(0,), evaluate="--max-steps 9")
    pretended = Pretended(["", "crash", "stopped half way"])
    monkeypatch.setattr(study.subprocess, "Popen", pretended)
    assert study.main(settings) == 1
    text = (tmp_path / "study" / "report.md").read_text()
    assert (
        "1 of 2 cells are missing" in text and "la_direct, 2, seed 0: train.py ended with status 0, unfinished" in text
    )
    assert len(pretended.trained) == 3
    assert study.main(settings) == 0 and len(pretended.trained) == 4  # from where it was stopped
    assert study.main(settings) == 0 and len(pretended.trained) == 4  # nothing is left to do
    assert study.main(replace(settings, out=tmp_path / "whole")) == 0
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("study", "whole"))
    assert one == other and one["results"][0]["episodes"] == 1  # of the three that were written


def test_finished_cells_travel(tmp_path, monkeypatch):
    """The files in `cells` are all that another machine needs for the same report: nothing is trained or played again,
    controls included, and what it says of commits, labels, losses and commands has no path of this machine."""
    monkeypatch.setattr(study.subprocess, "Popen", pretended := Pretended())
    settings = config(tmp_path / "here", "variants", seeds=(0,), variants=("baseline", "la_tok"), trials=2)
    assert study.main(settings) == 0
    shutil.copytree(tmp_path / "here" / "cells", tmp_path / "there" / "cells")
    assert study.main(replace(settings, out=tmp_path / "there")) == 0 and len(pretended.trained) == 2
    for name in ("report.md", "results.json"):
        text = (tmp_path / "here" / name).read_text()
        assert (tmp_path / "there" / name).read_text() == text and str(tmp_path) not in text
    train_command = "python train.py --variant baseline --max-steps 6000 --seed 0 --data data/libero_tiny --out OUT/"
    assert train_command in (tmp_path / "there" / "report.md").read_text()
    (cell, _) = sorted((tmp_path / "there" / "cells").iterdir())
    played = json.loads(cell.read_text())["played"]
    assert played["losses"] == [0.5, 0.4, 0.3] and played["commit"] == "abc" and played["labels"] == ["f00"]
    assert played["played_at"] == ["c"]
    assert sorted(played["controls"]) == sorted(study.CONTROL_FLAGS) and len(played["trials"]) == 2
    assert str(tmp_path) not in cell.read_text() and sys.executable not in cell.read_text()


def test_cells_of_another_study_count(tmp_path, monkeypatch, capsys):
    """What `variants` trained and played is "as is" in `ablations`, with its trials, in its own group, in files of its
    own. One that lacks a control does not count; where nothing fits, or the data is another, that is an error."""
    monkeypatch.setattr(study.subprocess, "Popen", pretended := Pretended())
    monkeypatch.setattr(study, "open_index", lambda path: SimpleNamespace(fingerprint="d00"))
    known = config(tmp_path / "known", "variants", seeds=(0,), variants=("baseline", "la_tok"), trials=3)
    assert study.main(known) == 0 and len(pretended.trained) == 2
    for path, won in (("baseline-seed0", 1), ("la_tok-seed0", 2)):
        path = tmp_path / "known" / "cells" / f"{path}.json"
        content = json.loads(path.read_text())
        trials = content["played"]["trials"]
        content["played"]["trials"] = {start: number < won for number, start in enumerate(trials)}
        path.write_text(json.dumps(content))
    settings = replace(known, preset="ablations", out=tmp_path / "new", reuse=(tmp_path / "known",))
    capsys.readouterr()
    assert study.main(replace(settings, dry_run=True)) == 0 and not (tmp_path / "new").exists()
    assert "2 of 4 cells to do: 12000 updates" in capsys.readouterr().out
    assert study.main(settings) == 0
    assert f"2 cells come from {tmp_path / 'known'}, trained at abc\n" in capsys.readouterr().out
    names = ["baseline-32_placeholders-seed0", "la_tok-continuous-seed0"]
    assert [path.parent.name for path in pretended.trained[2:]] == names
    assert study.main(replace(settings, reuse=(), report_only=True)) == 0  # it is complete by itself
    rows = json.loads((tmp_path / "new" / "results.json").read_text())["results"]
    assert {row["name"]: row["successes"] for row in rows} == {
        "baseline, as is": 1,
        "baseline, 32 placeholders": 3,
        "la_tok, as is": 2,
        "la_tok, continuous": 3,
    }
    back = replace(known, out=tmp_path / "back", reuse=(tmp_path / "new",))
    for path in (tmp_path / "new" / "cells").iterdir():
        content = json.loads(path.read_text())
        content["played"]["controls"].pop("blind", None)
        path.write_text(json.dumps(content))
    for wrong in (back, replace(settings, out=back.out, steps=9), replace(settings, out=back.out, trials=2)):
        with pytest.raises(
            ValueError, match="reuse has .*, which has no cell with training, evaluation and controls of"
        ):
            study.main(wrong)
    monkeypatch.setattr(study, "open_index", lambda path: SimpleNamespace(fingerprint="other"))
    with pytest.raises(ValueError, match=r"was trained on data \['d00'\]; that here is \['other'\]"):
        study.main(replace(settings, out=back.out))
    assert len(pretended.trained) == 4 and not back.out.exists()


def test_cells_of_several_machines(tmp_path, monkeypatch, capsys):
    """The report has the controls of the first seed alone, whoever played others; a cell that was copied before its
    controls were played says so; other data of the same name is refused; a file of other settings is announced before
    it is made anew; what once went wrong with a cell that is there now is not reported."""
    monkeypatch.setattr(study.subprocess, "Popen", pretended := Pretended())
    first, second = (config(tmp_path / str(seed), "variants", seeds=(seed,), variants=("baseline",)) for seed in (0, 1))
    assert study.main(first) == study.main(second) == 0
    both = replace(first, seeds=(0, 1))
    shutil.copytree(tmp_path / "1" / "cells", tmp_path / "0" / "cells", dirs_exist_ok=True)
    (tmp_path / "0" / "baseline-seed1").mkdir()
    (tmp_path / "0" / "baseline-seed1" / "fault.json").write_text('{"fault": "it crashed"}')
    for path in tmp_path.glob("1/cells/*"):
        content = json.loads(path.read_text())
        content["played"]["controls"]["blind"] = dict.fromkeys(content["played"]["controls"]["blind"], False)
        (tmp_path / "0" / "cells" / path.name).write_text(json.dumps(content))
    assert study.main(both) == 0 and len(pretended.trained) == 2
    text = (tmp_path / "0" / "report.md").read_text()
    assert "| baseline | 3/3 |" in text and "crashed" not in text
    copied = tmp_path / "0" / "cells" / path.name
    copied.write_text(json.dumps(content | {"played": content["played"] | {"controls": {}}}))
    assert study.main(replace(both, seeds=(1, 0))) == 1
    lacking = "lacks blind, main camera black, wrist camera black, cameras swapped, mute, and its run is not here"
    assert lacking in (tmp_path / "0" / "report.md").read_text()
    copied.write_text(json.dumps(content | {"played": content["played"] | {"data": ["other"]}}))
    with pytest.raises(ValueError, match="different data: baseline, seed 0: .'d00'.; baseline, seed 1: .'other'."):
        study.main(both)
    with pytest.raises(ValueError, match="baseline-seed0 is there with other settings: train was , is --centre. Give"):
        study.main(replace(both, train="--centre"))
    shutil.copytree(tmp_path / "1" / "cells", tmp_path / "2" / "cells")  # no run is in the way
    assert study.main(replace(second, out=tmp_path / "2", train="--centre")) == 0 and len(pretended.trained) == 3
    assert "baseline-seed1 is made anew: train was , is --centre" in capsys.readouterr().out


def test_labels_of_different_models_are_refused():
    """Cells whose labels come from different models, though their files have one name, in one group or in two that
    stand in one table; the codes of la_tok are of a model of their own."""

    def make(*groups):
        """Return cells of these (variant, change), each with labels of a model of its own."""
        return [
            report.Played({"variant": variant, "change": change}, seed, {"a": True}, labels=[f"model{seed}"])
            for seed, (variant, change) in enumerate(groups)
        ]

    for second in (("la_direct", "as is"), ("la_direct", "continuous"), ("la_align", "as is")):
        with pytest.raises(ValueError, match=rf"different models \(la_direct: model0; {second[0]}: model1\)"):
            report.check_data(make(("la_direct", "as is"), second))
    report.check_data(make(("la_direct", "as is"), ("la_tok", "as is")))


def test_few_demonstrations_are_refused(tmp_path, rlds):
    """With 5 demonstrations an instruction "all" would be 5, too. A study without a cell is refused as well."""
    with pytest.raises(ValueError, match="data has 7 training episodes of 2 instructions; fewshot keeps"):
        study.main(config(tmp_path, "fewshot", data=(rlds,), train="--labels x"))
    with pytest.raises(ValueError, match="smoke has no cells of la_tok"):
        study.main(config(tmp_path, "smoke", variants=("la_tok",)))
    assert study.main(config(tmp_path, "smoke", seeds=(0,), shard="3/3")) == 0  # of two cells: there is nothing to do


def test_what_cannot_start_is_a_fault(tmp_path):
    """A program that is not there: each cell is reported as failed, and the report is written."""
    settings = config(tmp_path / "study", "smoke", seeds=(0,), launch="no_such_program")
    assert study.main(settings) == 2
    assert "Failed: baseline, 2, seed 0: FileNotFoundError" in (tmp_path / "study" / "report.md").read_text()


def test_one_camera_has_no_controls_of_two(tmp_path):
    """Without the wrist camera neither is it black nor are two exchanged; with it all controls are played."""
    both, one = (study.make_cells(config(tmp_path, "variants", train=text))[0] for text in ("", "--no-use-wrist-image"))
    assert both.controls == tuple(study.CONTROL_FLAGS) and one.controls == ("blind", "main camera black", "mute")


COMMITTED = {
    "variants": printed("python study.py variants --out docs/studies/variants"),
    "fewshot": printed("python study.py fewshot --out docs/studies/fewshot"),
    "ablations": printed("python study.py ablations --out docs/studies/ablations"),
    "video": printed("python study.py video --out docs/studies/video"),
    "joint": printed("python study.py joint --out docs/studies/joint"),
    "long": printed("python study.py long --out docs/studies/long"),
}


@pytest.mark.parametrize("preset", COMMITTED)
def test_committed_report_is_what_its_cells_say(preset, tmp_path):
    """The command of docs/study.md makes the report that lies there."""
    words = COMMITTED[preset]
    settings = tyro.cli(study.Config, args=words[2:])
    committed = study.ROOT / settings.out
    shutil.copytree(committed / "cells", tmp_path / "cells")
    assert study.main(replace(settings, out=tmp_path)) == 0
    assert (tmp_path / "report.md").read_text() == (committed / "report.md").read_text()


def test_readme_has_the_committed_table():
    """README.md shows the success of each variant as the committed report has it, docs/results.md the controls."""
    report = (study.ROOT / "docs/studies/variants/report.md").read_text()
    success, controls = (part for part in report.split("\n\n") if part.startswith("|"))
    assert success in (study.ROOT / "README.md").read_text() and "INCOMPLETE" not in success
    assert controls in (study.ROOT / "docs/results.md").read_text() and "missing" not in controls


def test_findings_quote_the_reports():
    """The table in docs/study.md is that of the committed report; so is each difference with its interval in the text,
    of one of the reports."""
    findings = (study.ROOT / "docs/study.md").read_text().partition("## Findings")[2].partition("## Run it")[0]
    reports = {name: (study.ROOT / f"docs/studies/{name}/report.md").read_text() for name in COMMITTED}
    number = r"[+-][\d.]+"
    difference = rf"{number} \({number} to {number}"
    quoted = re.findall(difference, " ".join(findings.split()))
    assert len(quoted) > 25 and all(any(text in report for report in reports.values()) for text in quoted), quoted
    rows = re.findall(r"^\| `(\w+)`(, half as long)?(?:, (\w+))? \|(.*) \|$", findings, re.M)
    assert len(rows) == 12
    for variant, half, rest, cells in rows:
        cells = [cell.strip() for cell in cells.split("|")]
        for labelled, success, minus_baseline in zip((2, 5, 19), cells[::2], cells[1::2], strict=True):
            played = (
                rf"^\| {variant}{half} \| {rest or 'dropped'} \| {labelled} \| (\S+) = .*? \| .*? \| .*? \| (.*?) \|"
            )
            expected = re.findall(played, reports["fewshot"], re.M) or [("", "")]
            assert (success, minus_baseline) == expected[0], (variant, half, rest, labelled)


def test_only_some_cells_run(tmp_path, monkeypatch):
    """Those whose names match; the report has all. Patterns that match nothing are refused."""
    monkeypatch.setattr(study.subprocess, "Popen", pretended := Pretended())
    settings = config(tmp_path, "ablations", seeds=(0, 1), cells=("*-as_is-seed1", "la_tok-continuous-*"))
    assert study.main(settings) == 0 and len(pretended.trained) == 7
    assert "INCOMPLETE: 21 of 28 cells are missing" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="cells has la_typo, which matches no name"):
        study.main(replace(settings, cells=("la_typo", "*")))


def test_stopped_study_stops_what_it_started(tmp_path):
    """SIGTERM reaches what trains, which may save; nothing else is started, and no cell counts as done. While a cell is
    at work, also after its study was killed, another call leaves it alone."""
    stand_in = tmp_path / "train.py"
    stand_in.write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def stop(*_):\n    (here / 'saved').touch()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    words = [sys.executable, study.__file__, "smoke", "--out", tmp_path / "study", "--seeds", "0"]
    words += ["--launch", f"{sys.executable} {stand_in}"]

    def start():
        """Start a study and wait until it trains."""
        (tmp_path / "started").unlink(missing_ok=True)
        (tmp_path / "saved").unlink(missing_ok=True)
        running = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for((tmp_path / "started").exists)
        return running

    running = start()
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 1 and (tmp_path / "saved").exists()
    assert errors == "Stopped; the same command goes on.\n"
    assert not list(tmp_path.glob("study/cells/*")) and not list((tmp_path / "study").rglob("fault.json"))
    running = start()
    running.kill()
    running.wait()
    done = subprocess.run(list(map(str, words[:-2])) + ["--variants", "baseline"], capture_output=True, text=True)
    assert done.returncode == 1 and "another call of study.py, or what it started, is at this cell" in done.stdout
    subprocess.run(["pkill", "-f", str(stand_in)])
