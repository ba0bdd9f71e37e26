"""Where a backbone comes from: random weights of a row of `tiny.SIZES`, or a Qwen3-VL checkpoint that fits exactly."""

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.utils import cached_file

from files import read_json, resolve_folder
from tiny import SIZES, tiny_config, tiny_tokenizer


def text_tokenizer(backbone):
    """Return the tokenizer of a row of `tiny.SIZES`, of a Qwen3-VL checkpoint folder or of a hub id.

    Raise ValueError for another kind of checkpoint, or a tokenizer without Qwen3-VL's special tokens or chat template.
    """
    if backbone in SIZES:
        return tiny_tokenizer()
    config = AutoConfig.from_pretrained(resolve_folder(backbone))
    if config.model_type != "qwen3_vl":
        raise ValueError(
            f"backbone {backbone} is a '{config.model_type}' checkpoint; "
            f"give --backbone {' or '.join(SIZES)}, or a Qwen3-VL one (model_type qwen3_vl)"
        )
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        number = getattr(config, name)
        if number not in tokenizer.added_tokens_decoder:
            raise ValueError(
                f"the tokenizer of {backbone} has no special token {number}, the {name} of its config; "
                "put the tokenizer files of the same Qwen3-VL release next to the weights"
            )
    tokenizer.chat_template = tokenizer.chat_template or separate_chat_template(backbone)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {backbone} has no chat template; add the release's chat_template.jinja")
    return tokenizer


def separate_chat_template(backbone):
    """Return the chat template in `chat_template.json` of a release, where older ones keep it; None without."""
    path = cached_file(backbone, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    return read_json(path).get("chat_template") if path else None


def load_qwen(config, device="cpu"):
    """Return (Qwen3VLModel, tokenizer) of `config.backbone`: random weights for a row of `tiny.SIZES`, else pretrained.

    It is on the CPU. A base that stays frozen is bf16 if it will go to a GPU (`device`); what is trained is always f32.
    Raise ValueError when the checkpoint lacks a weight of the model, holds others, or holds one of another shape: it
    would train on random numbers.
    """
    tokenizer = text_tokenizer(config.backbone)
    if config.backbone in SIZES:
        qwen_config = tiny_config(tokenizer, config.backbone)
        return Qwen3VLModel._from_config(qwen_config, attn_implementation="sdpa"), tokenizer
    half = config.tuning != "full" and torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    options = dict(dtype=dtype, attn_implementation="sdpa", ignore_mismatched_sizes=True, output_loading_info=True)
    qwen, info = Qwen3VLModel.from_pretrained(config.backbone, **options)
    check_loaded_weights(config.backbone, info)
    return qwen, tokenizer


def check_loaded_weights(backbone, info):
    """Raise ValueError unless a checkpoint had all weights and no others but those of the language-model head.

    info: transformers' {"missing_keys", "unexpected_keys", "mismatched_keys": (name, shape, shape)}.
    """
    unexpected = [name for name in info["unexpected_keys"] if name != "lm_head.weight"]
    faults = [f"missing {name}" for name in sorted(info["missing_keys"])]
    faults += [f"unknown {name}" for name in sorted(unexpected)]
    faults += [
        f"{name} is {tuple(found)}, the model's is {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if faults:
        more = f"; and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise ValueError(
            f"the weights of backbone {backbone} are not those of its config.json: {'; '.join(faults[:12])}{more}. "
            "Give the folder of a whole Qwen3-VL, with LoRA merged and names as in the release"
        )


def check_bf16_support(name, capability):
    """Raise ValueError for a GPU without bf16, given its name and compute capability (major, minor)."""
    if tuple(capability) < (8, 0):
        raise ValueError(
            f"the GPU {name} has compute capability {capability[0]}.{capability[1]}, and bf16 needs 8.0 (Ampere); "
            "use a newer one, or the CPU with CUDA_VISIBLE_DEVICES="
        )
