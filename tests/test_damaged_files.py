"""Run directories that were damaged or made to harm, and a few inputs of the fuzzer (fuzz.py)."""

import json
import os
import pickle
import re

import fuzz
import huggingface_hub
import pytest
import torch

from files import write_json
from normalise import statistics_hash
from policy import Policy, load_vla


def test_pickle_in_a_run_is_not_executed(tmp_path):
    """Weights that are a pickle: refused, and what it would have run has not run."""
    fuzz.write_run(tmp_path)
    Policy(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for write in (pickle.dump, torch.save):
        with open(tmp_path / "model.safetensors", "wb") as file:
            write(Evil(), file)
        with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors is damaged"):
            Policy(tmp_path)
    assert not (tmp_path / "executed").exists()


ABSURD_SIZES = {
    "chunk": 10**6,
    "action_size": 10**6,
    "proprio_size": 10**6,
    "codes_per_step": 10**6,
    "num_codes": 10**6,
    "code_dim": 10**6,
    "head_width": 10_240,
    "text_length": 10**4,
    "cameras": 10**4,
    "image_size": 32 * 10**4,
}


@pytest.mark.parametrize("name, size", ABSURD_SIZES.items())
def test_absurd_size_is_refused(name, size, tmp_path):
    """Before anything of that size is built."""
    fuzz.write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"][name] = size
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=f"config.json asks for more than the .*{name}={size}|the prompt would take"):
        load_vla(tmp_path)


EMBODIMENTS = (
    ["libero", 10**9, 8, 1],
    ["libero", 7, -8, 1],
    ["libero", 7, 8, 2],
    ["libero", 7],
    ["libero", "7", 8, 1],
    7,
)


@pytest.mark.parametrize("entry", EMBODIMENTS)
def test_absurd_embodiment_is_refused(entry, tmp_path):
    """Sizes larger than the largest, negative, or missing."""
    fuzz.write_run(tmp_path, several=True)
    Policy(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["embodiments"][0] = entry
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"embodiments hold .* in config.json. Put the run's own file back"):
        Policy(tmp_path)


WRONG_CONFIGS = {
    "not JSON": (lambda c: "{", "config.json is no JSON: "),
    "not an object": (lambda c: [c], "config.json holds .*, not an object"),
    "too deep": (lambda c: json.loads("[" * 900 + "]" * 900), "config.json .*not an object"),
    "no model": (lambda c: {n: v for n, v in c.items() if n != "model"}, "cannot be loaded: KeyError..model"),
    "unknown": (lambda c: {**c, "model": {**c["model"], "depth": 3}}, "cannot be loaded: TypeError.*depth"),
    "type": (lambda c: {**c, "model": {**c["model"], "chunk": "2"}}, "chunk is '2' in config.json"),
    "negative": (lambda c: {**c, "model": {**c["model"], "chunk": -2}}, "chunk is -2 in config.json"),
    "no backbone": (lambda c: {**c, "model": {**c["model"], "backbone": "no such"}}, "cannot be loaded: .*no such"),
    "no hash": (lambda c: {n: v for n, v in c.items() if n != "base_hash"}, "cannot be loaded: KeyError..base_hash"),
    "wrong spec": (
        lambda c: {**c, "data": [{**c["data"][0], "spec": {"embodiment": "x", "grippers": [3]}}]},
        "config.json: grippers is .3.; it must hold for each gripper",
    ),
    "no data": (lambda c: {**c, "data": []}, "config.json says nothing of 'made'"),
}


@pytest.mark.parametrize("fault", WRONG_CONFIGS)
def test_wrong_config_is_refused(fault, tmp_path):
    """The folder, what is wrong, and what to do."""
    fuzz.write_run(tmp_path)
    change, message = WRONG_CONFIGS[fault]
    config = change(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        Policy(tmp_path)
    assert fault == "wrong spec" or re.search("[Pp]ut .* back", str(error.value))


def test_statistics_from_elsewhere_are_refused(tmp_path):
    """The file, the data set, and what to do."""
    fuzz.write_run(tmp_path)
    stats = json.loads((tmp_path / "dataset_statistics.json").read_text())
    stats["made"]["action"]["q99"][0] += 0.1
    write_json(tmp_path / "dataset_statistics.json", stats)
    with pytest.raises(ValueError, match="dataset_statistics.json holds other statistics of 'made' .* own file back"):
        Policy(tmp_path)


WRONG_STATISTICS = {
    "none": lambda stats: None,
    "no quantile": lambda stats: {**stats, "action": {n: v for n, v in stats["action"].items() if n != "q99"}},
    "a text": lambda stats: {**stats, "action": {**stats["action"], "low": ["x"] * 7}},
    "other sizes": lambda stats: {**stats, "action": {**stats["action"], "max": [1.0] * 6}},
    "a number": lambda stats: {**stats, "proprio": 3.0},
}


@pytest.mark.parametrize("fault", WRONG_STATISTICS)
def test_statistics_that_are_none_are_refused(fault, tmp_path):
    """Although the run's hash is theirs."""
    fuzz.write_run(tmp_path)
    stats = WRONG_STATISTICS[fault](json.loads((tmp_path / "dataset_statistics.json").read_text())["made"])
    write_json(tmp_path / "dataset_statistics.json", {"made": stats})
    config = json.loads((tmp_path / "config.json").read_text())
    if stats:
        config["data"][0]["statistics"] = statistics_hash(stats)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="are no statistics of .* Put the run's own file back"):
        Policy(tmp_path)


def test_few_hundred_inputs_of_the_fuzzer(monkeypatch):
    """Damaged shards and run directories: nothing but the errors that are documented, in bounds of time and memory."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fuzz.fuzz_shards(range(300), 1) == []
    assert fuzz.fuzz_runs(range(30), 1) == []
