"""bench.py: what it counts and compares must be right; how fast things are is not asserted."""

import json
from pathlib import Path

import bench
import bench_helpers
import bench_model
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import model


@pytest.fixture
def config(tmp_path):
    """Return the settings of a small Qwen3-VL whose head reads no layer that deepstack adds to, trained by LoRA."""
    vision = bench_helpers.SMALL | dict(hidden_size=64, num_heads=4)
    text, vision = bench_helpers.qwen_settings(64, 128, 8, 4, 2, 16, vision)
    path = tmp_path / "config.json"
    text["vocab_size"] = 600
    path.write_text(json.dumps({"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}))
    return bench_model.TrainConfig(size=str(path), image_size=64, batch=2, precision="fp32", device="cpu")


def test_flop_count_is_torchs(config):
    """All matrix products of a step, forward and backward, but those of 3 x 3 colours in augmentation."""
    vla = bench_helpers.random_vla(config)
    counted = {part: flops.sum() for part, flops in bench_helpers.count_flops(vla, 2).items()}
    assert {"vision", "language", "LoRA", "head", "attention"} == counted.keys()

    def addmm_flop(target, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    missing = {torch.ops.aten.addmm_: addmm_flop}  # in torch's counter
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        vla(bench_helpers.random_batch(vla, 2))["loss"].backward()
    kinds = ("aten.mm", "aten.addmm", "aten.addmm_")
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in kinds)
    assert sum(counted.values()) - counted["attention"] == pytest.approx(products, rel=1e-6)


def test_both_implementations_compute_the_same(config):
    """transformers' own forward, which bench.py compares with, gives our actions from the same weights."""
    vla, _ = bench_model.build_losses(config, "this code")
    reference_vla, _ = bench_model.build_losses(config, "transformers")
    batch = bench_helpers.random_batch(vla, 2, draws=False)
    reference = bench_helpers.TransformersForward(reference_vla)
    assert bench_helpers.relative_difference(vla, reference, batch) < 1e-5


@pytest.fixture
def restored_precision(monkeypatch):
    """Undo `set_precision` after a test."""
    monkeypatch.setattr(model, "autocast", model.autocast)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize("precision, dtype", (("bf16", torch.bfloat16), ("fp32", torch.float32)))
def test_precision_reaches_the_model(precision, dtype, config):
    """A backbone of f32 weights multiplies in the precision that was asked for, on a CPU too."""
    config.tuning = "full"
    config.precision = precision
    bench_helpers.set_precision(config)
    vla = bench_helpers.random_vla(config)
    dtypes = []
    vla.backbone.qwen.visual.merger.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    vla.predict(bench_helpers.random_batch(vla, 1))
    assert dtypes == [dtype]


def test_memory_formula_counts_what_autograd_keeps():
    """Four layers that keep what they return, and one product outside of them; checkpointed, inputs and one layer's."""

    class Layers:
        """A backbone of four layers that keep their 400 bytes of output each, nothing else."""

        def _run_layer(self, function, x):
            return function(x)

    layers = Layers()
    x = torch.ones(100, requires_grad=True)
    y = torch.ones(100)

    def run():
        out = x
        for _ in range(4):
            out = layers._run_layer(torch.exp, out)
        return out * y  # keeps y

    assert tuple(bench_model.saved_bytes(layers, run)) == (4 * 400 + 400, 400 + 4 * 400 + 400)


def test_every_layer_of_the_backbone_passes_the_memory_formula(config):
    """With checkpointing a step keeps far less: the formula sees the layers of the model's own backbone."""
    vla = bench_helpers.random_vla(config, empty=True)

    def run():
        # without augmentation, whose colour matrices would be cached without contents
        vla(bench_helpers.random_batch(vla, 2, draws=False))

    kept, checkpointed = bench_model.saved_bytes(vla.backbone, run)
    assert 0 < checkpointed < 0.5 * kept


@pytest.mark.usefixtures("restored_precision")
def test_memory_table_of_the_docs():
    """What the real 2B model keeps, counted at its true size, is what docs/training.md says: samples and TFLOP."""
    table = bench_model.bench_memory(bench_model.MemoryConfig(size="2b"))
    assert (round(table["frozen"] / 1e6), round(table["trained"] / 1e6)) == (2128, 445)
    plain, checkpointed = (row["samples"].values() for row in table["rows"].values())
    text = (ROOT / "docs/training.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Qwen3-VL-2B | LoRA |"))
    assert row.endswith(f"| {' | '.join(f'{n} ({m})' for n, m in zip(plain, checkpointed))} |")
    assert f"A step is {table['flop_a_sample'] / 1e12:.2f} TFLOP a sample for the 2B model" in text


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize(("size", "published"), [("2b", 2.128e9), ("4b", 4.438e9), ("8b", 8.767e9)])
def test_real_sizes_have_the_parameters_of_the_releases(size, published):
    """Those of the backbone; the output matrix, which the 8B model has of its own, is never built here."""
    vla = bench_model.random_vla(bench_model.MemoryConfig(size=size, tuning="frozen", device="cpu"), empty=True)
    vocabulary, width = vla.backbone.qwen.language_model.embed_tokens.weight.shape
    count = sum(parameter.numel() for parameter in vla.backbone.qwen.parameters())
    assert round((count + (vocabulary * width if size == "8b" else 0)) / 1e6) == round(published / 1e6)


def test_modes_of_the_command_line():
    """Those that the first lines of bench.py list, each with a config of its own and a file for its table."""
    listed = {line.split()[2] for line in bench.__doc__.splitlines() if line.startswith("    python tests/bench.py")}
    assert bench.MODES.keys() == listed
    tables = {mode: config_class.out for mode, (config_class, _) in bench.MODES.items()}
    assert tables == {mode: Path(f"bench-{mode}.json") for mode in bench.MODES}
