"""card.py: the model card of a run, and runs on the Hub."""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from conftest import ROOT, printed
from eval_helpers import record
from huggingface_hub.utils import filter_repo_objects

import card
import eval as evaluation
import results
from files import file_hash, read_json, write_json
from policy import Policy, find_run


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the session's run as training left it, without the results of other tests."""
    copy = shutil.copytree(run.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("eval*"))
    card.write_card(copy)
    return copy


def read_card(folder):
    """Return (metadata, text) of a folder's card, as the Hub's own library reads it."""
    read = huggingface_hub.ModelCard.load(folder / "README.md")
    return read.data, read.text


def add_results(folder, name="eval", successes=3, **settings):
    """Write the summary of five trials of one task."""
    entries = [record(seed, seed < successes) for seed in range(5)]
    shared = {"settings": {"model": file_hash(folder / "model.safetensors")} | settings}
    shared |= {
        "versions": {"mujoco": "3.3.2"},
        "commits": ["c"],
        "command": ["/somewhere/eval.py", "/somewhere/runs/x"],
    }
    write_json(folder / f"{name}.json", results.summarise(entries, {}) | shared)


# ----------------------------------------------------------------------------------------------------------------------
# The card


def test_training_writes_a_card(run, folder, cache, rlds):
    """What the run is, how to load it, what it takes and gives; metadata; no path of this machine."""
    assert "# la_align on made" in (run.folder / "README.md").read_text()
    data, text = read_card(folder)
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "latent-actions", "robotics")
    assert {"la_align", "libero"} <= set(data.tags) and data.base_model is None and data.eval_results is None
    for expected in (
        "# la_align on made",
        "`la_align`: action placeholders, latent loss (cosine, weight 1) on image-based latent actions",
        "`made` (8 episodes, ",
        "| updates | 40 of 4 samples, seed 0 |",
        "--variant la_align --data made --cache",
        'policy = Policy("OWNER/NAME")',
        '"images": {"image": image, "wrist_image": wrist_image}, "state": state',
        "| image `wrist_image` | RGB, upright; stored as JPEG of 96 x 96 in training |",
        "| gripper, number 6 | -1 open, 1 closed |",
        "put the bowl on the plate; put the bowl on the stove",
        "![Training](curves.png)",
    ):
        assert expected in text, expected
    whole = (folder / "README.md").read_text()
    for private in (ROOT, Path.home(), cache, rlds.parent, run.folder.parent, folder.parent):
        assert str(private) not in whole, private
    assert not re.search(r"[\s`'\"=]/\w", whole)


def test_paths_of_the_command_are_cut():
    """To their last names when they begin at the root, at home or above; what lies in the project's folder stays."""
    words = [
        "/elsewhere/me/train.py",
        "--data",
        "/elsewhere/big data/set_a",
        "--out=~/runs/b",
        "--spec",
        "../c.json",
        "runs/d",
    ]
    words += [
        "--eval-flags=--cache /elsewhere/me/e --suite f",
        "--backbone",
        "Qwen/Qwen3-VL-2B-Instruct",
        "--data",
        "data/g/",
    ]
    text = card.shown_command(words)
    assert text == (
        "python train.py --data set_a --out=b --spec c.json runs/d '--eval-flags=--cache e --suite f' "
        "--backbone Qwen/Qwen3-VL-2B-Instruct --data data/g/"
    )


def test_base_model_and_data_set_of_the_hub(folder, tmp_path, monkeypatch):
    """They are in the metadata when they have a name there; of a folder the card has the last name alone."""
    config = read_json(folder / "config.json")
    config["data"][0]["name"] = "libero_goal_no_noops"
    config["model"]["backbone"] = "Qwen/Qwen3-VL-2B-Instruct"
    data = card.make_metadata(config)
    assert data.base_model == "Qwen/Qwen3-VL-2B-Instruct" and data.datasets == ["openvla/modified_libero_rlds"]
    assert "`Qwen/Qwen3-VL-2B-Instruct`, lora" in card.describe_backbone(config["model"])
    local = tmp_path / "checkpoints" / "my-qwen"
    local.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(local), "checkpoints/my-qwen"):
        config["model"]["backbone"] = name
        assert card.make_metadata(config).base_model is None
        assert card.describe_backbone(config["model"]) == "`my-qwen`, lora"
        assert 'Policy("OWNER/NAME", backbone="FOLDER OF my-qwen")' in card.usage(config)


def test_results_are_updated_and_the_rest_stays(folder):
    """Success with intervals per task and in all, controls, metadata, not doubled; what people wrote stays."""
    path = folder / "README.md"
    path.write_text(path.read_text().replace("license: apache-2.0", "license: mit") + "\nThanks to all.\n")
    add_results(folder, successes=1)
    card.update_card(folder)
    add_results(folder, successes=3)
    add_results(folder, "eval-black", 2, black_camera="wrist_image")
    add_results(folder, "eval-1of2", 4)
    add_results(folder, "eval-old", 5, model="that of other weights")
    card.update_card(folder)
    data, text = read_card(folder)
    assert data.license == "mit" and text.count("Thanks to all.") == 1 and text.count("## Results") == 1
    assert "| put it there | 3/5 | 60.0 % | 23.1 to 88.2 % |\n| all | 3/5 | 60.0 % | 23.1 to 88.2 % |" in text
    assert "| the image of `wrist_image` is black | LIBERO libero_goal, starts widened by 0.06 m | 2/5 |" in text
    assert "1/5" not in text and "4/5" not in text and "5/5" not in text and "`python eval.py x`" in text
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_value) == ("libero_goal", 0.6)


def test_run_that_saw_no_action_is_no_policy(folder):
    """Of a run on video alone the card and the last line of training say so, instead of failing."""
    config = json.loads((folder / "config.json").read_text())
    entry = config["data"][0]
    config["data"] = [entry | {"spec": entry["spec"] | {"action": [], "grippers": [], "action_names": []}}]
    config["model"]["action_size"] = 0
    assert "it is no policy yet" in card.usage(config)
    assert card.next_command(folder, config).startswith("train a policy from its weights: python train.py --init-from")


def test_every_control_has_words():
    """Those of eval.py that change what is evaluated."""
    assert set(card.CONTROL_TEXTS) == {*evaluation.CONTROLS, *evaluation.EXECUTION}


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run, **changes):
    """Evaluate two trials of a run on the line."""
    flags = dict(simulator="line", suite=("line",), trials=1, envs=1) | changes
    return evaluation.main(evaluation.Config(run=str(run), **flags))


def test_evaluation_updates_the_card(line, folder):
    """Of the run, not with --out; a card that cannot be read is a warning."""
    evaluate(folder, out=folder / "other.jsonl")
    assert "## Results" not in (folder / "README.md").read_text()
    evaluate(folder)
    assert re.search(r"\| push the point to the left \| [01]/1 \|", (folder / "README.md").read_text())


def test_card_that_is_damaged_is_a_warning(line, folder, capsys):
    """The results are there."""
    (folder / "README.md").write_text("---\na: [\n---\n")
    summary = evaluate(folder)
    assert summary["suites"] and "update_card failed" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """Function huggingface_hub.snapshot_download that has one repository, org/name, with all files of the run."""

    def download(name, allow_patterns):
        if name != "org/name":
            raise ValueError("no such repository")
        for path in filter_repo_objects([each.name for each in folder.iterdir()], allow_patterns=allow_patterns):
            (tmp_path / "snapshot").mkdir(exist_ok=True)
            shutil.copy(folder / path, tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_policy_from_the_hub(hub, run):
    """It is the run's; saves are not downloaded; a folder comes before a repository."""
    policy, expected = Policy("org/name"), Policy(run.folder)
    assert all(map(lambda a, b: (a == b).all(), policy.vla.parameters(), expected.vla.parameters()))
    assert not list((hub / "snapshot").glob("training-*"))
    with pytest.raises(FileNotFoundError, match="there is no folder org/other, and the Hub has no such run"):
        find_run("org/other")
    (hub / "org" / "name").mkdir(parents=True)
    assert find_run("org/name") == Path("org/name")


def test_evaluation_of_a_run_on_the_hub(line, hub):
    """Results go to runs/owner--name, where --compare finds them; what was downloaded stays as it is."""
    summary = evaluate("org/name")
    assert summary["run"] == "org/name" and (hub / "runs/org--name/eval-line.json").exists()
    assert not (hub / "snapshot/README.md").exists() and not list((hub / "snapshot").glob("eval*"))


class FakeHub(BaseHTTPRequestHandler):
    """The part of the Hub that uploading small files needs; `files` are those that were committed."""

    files: dict
    url = "https://huggingface.co/OWNER/NAME"

    def do_POST(self):
        """Answer one request."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        answer = {"url": self.url, "name": "OWNER/NAME"}
        if "/preupload/" in self.path:
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"{self.url}/commit/1",
                "commitOid": "1",
                "success": True,
            }
        self.reply(answer)

    def do_GET(self):
        """Answer one request."""
        self.reply({"id": "OWNER/NAME", "sha": "0", "siblings": []})

    def reply(self, answer):
        """Send JSON."""
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


def test_upload_takes_what_a_user_needs(folder):
    """The documented command, against a server that stands in for the Hub: all but what --resume and watch.py need."""
    shutil.copytree(folder, folder / "watch")
    shutil.copytree(folder, folder / "best")
    command = printed("hf upload OWNER/NAME RUN")
    assert shown(command) in (folder / "README.md").read_text()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"files": {}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
    }
    words = [str(folder) if word == "RUN" else word for word in command]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    expected = {"README.md", "config.json", "dataset_statistics.json", "model.safetensors", "log.jsonl", "curves.png"}
    assert set(server.RequestHandlerClass.files) == expected
    assert server.RequestHandlerClass.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def shown(command):
    """Return a command with its patterns in quotes, as the documents have it."""
    return " ".join(f'"{word}"' if "*" in word else word for word in command)
