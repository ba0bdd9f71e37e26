"""docs/tour.md: its commands, in the simulator of one point."""

import shutil

import pytest
import tyro
from conftest import ROOT, printed

import eval as evaluation


@pytest.fixture
def play(line, run, tmp_path):
    """Function (command) that evaluates a copy of the session's run as it says; `folder` is the copy."""
    folder = shutil.copytree(run.folder, tmp_path / "run")

    def evaluate(command):
        words = [word.replace("RUN/eval", f"{folder}/eval-line").replace("RUN", str(folder)) for word in command]
        small = ["--simulator", "line", "--suite", "line", "--trials", "1", "--envs", "1"]
        arguments = words[2:] + small * ("--compare" not in words)
        return evaluation.main(tyro.cli(evaluation.Config, args=arguments))

    evaluate.folder = folder
    return evaluate


def test_tour(play, capsys):
    """Failures have contact sheets, each camera can be black, the comparison has all three, and so has the card."""
    summary = play(printed("python eval.py RUN --video failures"))
    failed = [task["task"] for task in summary["suites"][0]["tasks"] if not task["successes"]]
    sheets = sorted(path.name for path in (play.folder / "eval-line").glob("*.png"))
    assert failed and sheets == [f"line-task{task}.png" for task in failed]
    shutil.copy(play.folder / "eval-line.jsonl", play.folder / "eval.jsonl")  # the name of results in LIBERO
    play(printed("python eval.py RUN --trials 10 --black-camera image"))
    play(printed("python eval.py RUN --trials 10 --black-camera wrist_image"))
    capsys.readouterr()
    play(printed("python eval.py --compare RUN RUN/eval-black-camera-image.jsonl"))
    assert "C  " in capsys.readouterr().out and (play.folder / "compare.png").exists()
    assert "| the image of `wrist_image` is black |" in (play.folder / "README.md").read_text()


def test_pictures_are_small():
    """Together less than 400 kB."""
    pictures = list((ROOT / "docs/pictures").iterdir())
    assert len(pictures) == 3 and sum(path.stat().st_size for path in pictures) < 400_000
