"""What is trained of a backbone: all of it, low-rank updates (LoRA, arXiv 2106.09685), or nothing.

The updates are peft's, computed inside the last product. A policy merges them into the matrices.
"""

import functools
import hashlib

from torch import nn

from tiny import SIZES


def set_trainable(qwen, config):
    """Make trainable what `config.tuning` says: "full", "lora" or "frozen" ("": lora, and random backbones in full)."""
    tuning = config.tuning or ("full" if config.backbone in SIZES else "lora")
    qwen.requires_grad_(tuning == "full")
    if tuning == "lora":
        add_lora(qwen, config.lora_rank, config.lora_alpha, config.lora_targets)


def add_lora(module, rank, alpha, targets=()):
    """Add trainable low-rank updates to the linear layers of `module` whose last name is in `targets` (default: all).

    Raise ValueError listing the names that there are.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 2 s to import, and the tiny backbone does without

    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    known = sorted({_last_name(name) for name in linear})
    if not set(targets) <= set(known):
        raise ValueError(f"lora_targets are {', '.join(targets)}; the linear layers here are {', '.join(known)}")
    chosen = [name for name in linear if not targets or _last_name(name) in targets]
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), module)
    for _, layer in lora_layers(module):
        layer.forward = functools.partial(_lora_linear, layer)
    for parameter in module.parameters():
        if parameter.requires_grad:  # peft makes them in the base's bf16, where small updates round to nothing
            parameter.data = parameter.data.float()


def _lora_linear(layer, x):
    """Compute W x + s B A x as peft's layer does, but scaled and added inside the last product."""
    rows = x.flatten(0, -2)
    out = layer.base_layer(rows)
    up = layer.lora_B["default"].weight
    out.addmm_(layer.lora_A["default"](rows), up.T.to(out.dtype), alpha=layer.scaling["default"])
    return out.unflatten(0, x.shape[:-1])


def _last_name(name):
    return name.rpartition(".")[2]


def lora_layers(module):
    """Return [(name, layer)] of the linear layers with a low-rank update."""
    return [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")]


def merge_lora(module):
    """Add each low-rank update to its matrix and replace the layer by the plain linear one."""
    for name, layer in lora_layers(module):
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())


def base_hash(module):
    """Return a short hash of the frozen weights (names, shapes, first values): which base a run was trained on.

    The values are hashed in bf16, so that a GPU (base in bf16) and a CPU (in f32) agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        if not tensor.requires_grad:
            values = tensor.detach().flatten()[:1024].bfloat16().float().cpu().numpy()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]
