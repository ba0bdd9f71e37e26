"""common.py: the moving average of weights, data workers, a log that can be continued."""

import json

import pytest
import torch
from torch import nn

import common


@pytest.mark.parametrize("end", ('{"step": 3}\n{"step": 4, "lo', '{"step": 2}', "\0\0\0\n", "5\n", "{}\n", ""))
def test_log_is_cut_back(end, tmp_path):
    """To the step of the save, also when its last line is half-written."""
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n' + end)
    log = common.Log(tmp_path, first_step=3)
    log.write(step=3)
    log.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == [0, 1, 3]


def test_average_follows_the_weights():
    """With the decay of its update, (1 + n) / (10 + n) up to the one that was given; what is frozen is left out."""
    module = nn.Linear(1, 1, bias=True)
    module.bias.requires_grad_(False)
    average = common.MovingAverage(module, 0.5)
    expected = module.weight.item()
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)):
        module.weight.data.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert decay == 0.5 and average.tensors.keys() == {"weight"}
    assert average.tensors["weight"].item() == pytest.approx(expected)
    with average.in_place():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 512.0


def test_no_average_changes_nothing():
    """With decay 0 nothing is kept and the weights stay."""
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    average = common.MovingAverage(module, 0.0)
    average.update(0)
    with average.in_place():
        assert torch.equal(module.weight, before)
    assert average.tensors == {}


def test_workers_use_cores_that_do_not_train(monkeypatch):
    """None where as many processes train as there are cores, two otherwise and beside a GPU; a number that was asked
    for is kept."""
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda process: {0, 1})
    for processes, cuda, expected in ((1, False, 2), (2, False, 0), (2, True, 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert common.choose_workers(-1, cuda) == expected and common.choose_workers(3, cuda) == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert common.choose_workers(-1, False) == 2
