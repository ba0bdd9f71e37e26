"""bf16: what is trained, its optimizer and every loss stay in fp32, and the numbers stay near those of fp32.

On a CPU, where bf16 is emulated; a GPU chooses it by itself (common.autocast).
"""

from dataclasses import replace

import pytest
import torch
from model_helpers import batch_for, small_config

import common
import latent
from latent import ActionTokenizer, LamSizes, LatentActionModel
from model import VARIANTS, VLA


def train_step(module, batch):
    """Run a training step; return its losses, gradients and optimizer."""
    optimizer = torch.optim.AdamW(common.parameter_groups(module, 1e-4), lr=1e-4)
    losses = module(batch)
    losses["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    optimizer.step()
    return losses, gradients, optimizer


def check_types(module, losses, gradients, optimizer):
    """Losses, gradients, trained weights and moments are fp32 and finite."""
    scalars = [value for value in losses.values() if torch.is_tensor(value) and value.is_floating_point()]
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    trained = [p for p in module.parameters() if p.requires_grad]
    assert scalars and gradients and state
    for tensor in (*scalars, *gradients.values(), *trained, *state):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()


@pytest.mark.parametrize("continuous", (False, True))
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_on_a_backbone_in_bf16(variant, continuous, checkpoint):
    """With LoRA on frozen bf16 weights: losses within 2 %, gradients within 10 % of their norm in fp32 on the same
    weights."""
    continuous = continuous and VARIANTS[variant].loss == "codes"
    base = str(checkpoint(torch.bfloat16))
    config = replace(small_config(variant), backbone=base, lora_rank=4, continuous=continuous, action_loss="l2")
    results = []
    for half in (True, False):
        torch.manual_seed(0)
        vla = VLA(config)  # weights in fp32 hold the numbers of the bf16 file
        for name, parameter in vla.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)  # else the update is 0
        if half:
            for parameter in vla.backbone.qwen.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        results.append(train_step(vla, batch_for(vla)))
        check_types(vla, *results[-1])
    (losses, gradients, _), (expected, expected_gradients, _) = results
    for name in ("loss", "action_loss", "latent_loss"):
        if name in losses:
            assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.02), name
    difference = torch.cat([(gradients[n] - g).flatten() for n, g in expected_gradients.items()]).norm()
    assert 0 < difference < 0.1 * torch.cat([g.flatten() for g in expected_gradients.values()]).norm()


def bf16_on_the_cpu(device, half=False):
    """Stand in for `common.autocast` as it is on a GPU."""
    return torch.autocast(device.type, torch.bfloat16)


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_latent_action_model_in_bf16(stage, monkeypatch):
    """Products in bf16, codes and losses in fp32; the reconstruction loss within 2 %."""
    sizes = LamSizes(stage=stage, width=32, num_blocks=1, heads=2, image_size=24, patch_size=6, code_dim=8)
    rng = torch.Generator().manual_seed(0)
    batch = {"frames": torch.randint(0, 256, (8, 2, 24, 24, 3), generator=rng, dtype=torch.uint8)}
    if stage == 1:
        batch |= {"text": torch.rand(8, 5, 12, generator=rng), "text_mask": torch.ones(8, 5, dtype=torch.bool)}
    losses = []
    for half in (True, False):
        if half:
            monkeypatch.setattr(latent, "autocast", bf16_on_the_cpu)
        else:
            monkeypatch.undo()
        torch.manual_seed(0)
        lam = LatentActionModel(sizes, 12 if stage == 1 else 0)
        torch.nn.init.normal_(lam.out.weight, std=0.1)  # it starts at 0, whatever comes before
        types = set()
        lam.out.register_forward_hook(lambda module, inputs, output, types=types: types.add(output.dtype))
        results = train_step(lam, batch)
        check_types(lam, *results)
        assert types == {torch.bfloat16 if half else torch.float32}
        losses.append(results[0]["reconstruction_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_action_tokenizer_never_leaves_fp32():
    """Its codes must not depend on the device: no product is in bf16, also within autocast."""
    tokenizer = ActionTokenizer(8, 7, 16, 8)
    rng = torch.Generator().manual_seed(0)
    batch = {"actions": torch.rand(8, 8, 7, generator=rng) * 2 - 1, "valid": torch.ones(8, 8, dtype=torch.bool)}
    batch["masked"] = torch.rand(8, 8, generator=rng) < 0.3
    check_types(tokenizer, *train_step(tokenizer, batch))
