"""What bench.py counts and compares must be right; how fast things are is not asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import bench


@pytest.fixture
def small(tmp_path):
    """`--size` of a small Qwen3-VL whose head reads no layer that deepstack adds to, trained by LoRA."""
    text, vision = bench.like_qwen(64, 128, 8, 4, 2, 16, bench.SMALL | dict(hidden_size=64, num_heads=4))
    path = tmp_path / "config.json"
    text["vocab_size"] = 600
    path.write_text(json.dumps({"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}))
    return bench.Train(size=str(path), image_size=64, batch=2, precision="fp32", device="cpu")


def test_flop_count_is_torchs(small):
    """All matrix products of a step, forward and backward, but those of 3 x 3 colours in augmentation."""
    vla = bench.random_vla(small)
    counted = {part: found.sum() for part, found in bench.count_flops(vla, 2).items()}
    assert {"vision", "language", "LoRA", "head", "attention"} == counted.keys()
    more = {torch.ops.aten.addmm_: lambda to, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch's counter lacks it
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        vla(bench.random_batch(vla, 2))["loss"].backward()
    kinds = ("aten.mm", "aten.addmm", "aten.addmm_")
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in kinds)
    assert sum(counted.values()) - counted["attention"] == pytest.approx(products, rel=1e-6)


def test_both_ways_compute_the_same(small):
    """transformers' own forward, which bench.py compares with, gives our actions from the same weights."""
    ways = [bench.make_way(small, name)[0] for name in ("ours", "plain")]
    assert bench.disagreement(ways[0], bench.Plain(ways[1]), bench.random_batch(ways[0], 2, draws=False)) < 1e-5


def test_memory_formula_counts_what_autograd_keeps():
    """Four layers that keep what they return, and one product outside of them; checkpointed, inputs and one layer's."""

    class Layers:
        def _through(self, function, x):
            return function(x)

    layers, x, y = Layers(), torch.ones(100, requires_grad=True), torch.ones(100)

    def run():
        out = x
        for _ in range(4):
            out = layers._through(torch.exp, out)  # keeps its 400 bytes of output, nothing else
        return out * y  # keeps y

    assert tuple(bench.kept_bytes(layers, run)) == (4 * 400 + 400, 400 + 4 * 400 + 400)
