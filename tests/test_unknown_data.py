"""Folders given as --data: what is found beside a data set, and what a folder is that holds none that can be read."""

import json
import re
import shutil
from pathlib import Path

import pytest
from data_helpers import copy_rlds

import data
import prepare
import targets
import train

# ----------------------------------------------------------------------------------------------------------------------
# What lies beside a data set


@pytest.mark.parametrize("given", ("made", "made/1.0.0", "made/1.0.0/.", ".", "..", "link"))
@pytest.mark.parametrize("where", ("made", "made/1.0.0"))
def test_version_folder_finds_what_lies_beside(given, where, rlds, labels, tokenizer, tmp_path, monkeypatch):
    """Labels, tokenizer, description and the expert's outcomes lie in the folder of the data set or of its version, and
    either is given, however it is written; its name stays the same."""
    copy_rlds(rlds, tmp_path)
    spec = {"embodiment": "mine", "cameras": {"image": "observation/image"}, "action": ["action"]}
    shutil.copy(labels, tmp_path / where / "labels.safetensors")
    shutil.copytree(tokenizer, tmp_path / where / "tokenizer")
    (tmp_path / where / "spec.json").write_text(json.dumps(spec))
    (tmp_path / where / "expert.json").write_text(json.dumps({"evaluation": [{"task": 8}]}))
    (tmp_path / "link").symlink_to(tmp_path / "made")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.0.0").symlink_to(tmp_path / "made" / "1.0.0")
    monkeypatch.chdir(tmp_path / {".": "made/1.0.0", "..": "made/1.0.0"}.get(given, ""))
    path = Path(given)
    assert data.open_index(tmp_path / "other", tmp_path / "cache").name == "other"
    dataset = data.open_dataset(path, tmp_path / "cache")
    assert dataset.name == "made" and dataset.spec.embodiment == "mine"
    assert targets.label_path(dataset, path).read_bytes() == labels.read_bytes()
    assert (dataset.find_beside("tokenizer") / "config.json").exists()
    assert prepare.describe_data(dataset, ["image"], [0])["expert"] == [{"task": 8}]


def test_missing_tokenizer_is_made_beside_the_data(rlds, cache, train_config, tmp_path):
    """Not inside the folder of its version; and the expert of a neighbour is none of the data set's."""
    with pytest.raises(FileNotFoundError, match=re.escape(f"and {rlds}/tokenizer does not exist. Make it: ")):
        train.main(train_config(tmp_path / "run", variant="la_tok", tokenizer="", data=(rlds / "1.0.0",)))
    flat = shutil.copytree(rlds / "1.0.0", tmp_path / "flat")
    (tmp_path / "expert.json").write_text("{}")
    assert data.open_dataset(flat, cache).find_beside("expert.json") == flat / "expert.json"
