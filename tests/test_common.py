"""common.py: which GPUs are refused, and a log that a resumed run can continue."""

import json

import pytest

import common


def test_gpu_without_bf16_is_refused():
    """By its compute capability: Turing is refused, Ampere and newer pass."""
    with pytest.raises(ValueError, match="the GPU Tesla T4 has compute capability 7.5, and bf16 needs 8.0"):
        common.check_bf16_support("Tesla T4", (7, 5))
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        common.check_bf16_support("newer", capability)


@pytest.mark.parametrize("end", ('{"step": 3}\n{"step": 4, "lo', '{"step": 2}', "\0\0\0\n", "5\n", "{}\n", ""))
def test_log_is_cut_back(end, tmp_path):
    """To the step of the save, also when its last line is half-written."""
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n' + end)
    log = common.Log(tmp_path, first_step=3)
    log.write(step=3)
    log.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == [0, 1, 3]
