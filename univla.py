"""UniVLA's checkpoints (arXiv 2505.06111): the tensors of its latent action model under the names of latent.py.

Reads the Lightning checkpoints of both stages, the DINOv2 inside included. Leaves out the T5 inside: `--text` names it.
To label with such a checkpoint, make it a model folder first:

    python train_latent.py lam --stage 2 --init-from FILE.ckpt --max-steps 0 --no-predict-change --no-centre \\
        --data DIR --out runs/univla --features DINOV2 --image-size 224 --width 768 --num-blocks 12 --heads 12 \\
        --code-dim 128
"""

import pickle
import re

import torch

UNIVLA_SETTINGS = {"heads": 12, "predict_change": False, "centre": False}  # the settings that its tensors do not show
UNIVLA_NAMES = [  # (pattern in its names, replacement), applied in this order
    ("^lam[.]", ""),
    # DINOv2: facebook's names to transformers'
    ("^dino_encoder[.]", "features.net."),
    ("net[.](cls_token|mask_token|register_tokens)", r"net.embeddings.\1"),
    ("net[.]pos_embed", "net.embeddings.position_embeddings"),
    ("net[.]patch_embed[.]proj", "net.embeddings.patch_embeddings.projection"),
    ("net[.]blocks", "net.encoder.layer"),
    ("attn[.]proj", "attention.o_proj"),
    ("ls([12])[.]gamma", r"layer_scale\1.lambda1"),
    ("net[.]norm", "net.layernorm"),
    # encoder and decoder
    ("coder[.]ffn", "coder.embed"),
    ("transformer_blocks", "blocks"),
    ("(spatial|temporal)_attn[.]to_out[.]0", r"\1.out"),
    ("^(.*coder.blocks[.][0-9]+)[.]norm1", r"\1.spatial.norm"),
    ("^(encoder.blocks[.][0-9]+)[.]norm2", r"\1.temporal.norm"),
    ("^(.*coder.blocks[.][0-9]+)[.](norm2|norm3)", r"\1.mlp.0"),
    ("^(.*coder.blocks[.][0-9]+)[.]ffn[.]0", r"\1.mlp.1"),
    ("^(.*coder.blocks[.][0-9]+)[.]ffn[.]3", r"\1.mlp.3"),
    ("^decoder[.]out", "out"),
    ("^lang_proj", "text_up"),
]
UNIVLA_SETS = {  # the same for its sets of codes, by stage
    1: [
        ("^action_latent$", "codes.queries"),
        ("^to_codebook[.]", "codes.project."),
        ("^vq[.]codebook[.]weight", "codes.quantiser.codebook"),
        ("^action_up[.]", "codes.up."),
    ],
    2: [
        ("^action_latent_controllable$", "codes.queries"),
        ("^to_codebook[.]", "codes.project."),
        ("^vq_action[.]codebook[.]weight", "codes.quantiser.codebook"),
        ("^action_up[.]", "codes.up."),
        ("^action_latent$", "irrelevant.queries"),
        ("^to_codebook_uncontrol[.]", "irrelevant.project."),
        ("^vq[.]codebook[.]weight", "irrelevant.quantiser.codebook"),
        ("^action_up_uncontrol[.]", "irrelevant.up."),
    ],
}


def univla_tensors(path):
    """Return {name in `LatentActionModel`: tensor} of a checkpoint file of UniVLA, stage 1 or 2.

    Raise ValueError when the file is damaged or no such checkpoint, or when it holds more than tensors: the message
    says what, and how to save the weights alone.
    """
    state = {name: t for name, t in _load_state(path).items() if "text_encoder" not in name}
    stage = 2 if any("control" in name for name in state) else 1
    tensors = {}
    for name, tensor in state.items():
        for pattern, replacement in UNIVLA_NAMES + UNIVLA_SETS[stage]:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor[0, 0] if name.endswith("queries") else tensor
    for name in [name for name in tensors if ".attn.qkv." in name]:  # DINOv2: one matrix, in transformers three
        for letter, part in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
    for name in [name for name in tensors if "_attn.to_q." in name]:  # encoder and decoder: three matrices, here one
        parts = [name.replace("to_q", f"to_{letter}") for letter in "qkv"]
        if all(part in tensors for part in parts):
            tensors[name.replace("_attn.to_q", ".qkv")] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def _load_state(path):
    """Return the state dict of a Lightning checkpoint. Raise ValueError as `univla_tensors` says."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, KeyError, RuntimeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({error!r}). Copy it again.") from error
    except pickle.UnpicklingError as error:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise ValueError(
            f"{path} holds more than tensors: {', '.join(unsafe)}. Loading that runs code of its author. If you trust "
            f"it, save its weights alone:\n    state = torch.load('{path}', weights_only=False)['state_dict']\n"
            f"    torch.save({{'state_dict': state}}, 'weights.ckpt')\nand give --init-from weights.ckpt"
        ) from error
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"{path} has no 'state_dict', only {list(checkpoint)[:5]}; it must be a Lightning checkpoint of UniVLA"
        )
    return checkpoint["state_dict"]
