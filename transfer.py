"""Start a policy from another run's weights: latent actions on video first, then actions, is two commands.

python train.py --variant la_direct --data-fraction 0 --rest video --max-steps 3000 --labels FILE --out runs/video
python train.py --variant la_direct --episodes 5 --max-steps 2000 --labels FILE --init-from runs/video
"""

from pathlib import Path

import torch

from checkpoint import trainable_tensors
from files import load_tensors, read_json
from lora import base_hash, lora_layers

PARTS = {"backbone": "backbone", "queries": "placeholders", "head": "head", "latent_head": "latent head"}


@torch.no_grad()
def start_from(vla, run, description):
    """Overwrite what is trained in `vla` by the run's weights of the same names and shapes; return what was taken.

    The backbone must fit as a whole; placeholders, action head and latent head are taken tensor by tensor. The layers
    for state and actions belong to an embodiment: they are taken only where the data sets of both runs have the same
    embodiments in the same order. description: what config.json will hold of this run. Return a text that says, for
    each part, how many tensors were taken, names those that were not, and says where variant or latent targets differ,
    and where held-out episodes are not new to the weights. Raise FileNotFoundError or ValueError when `run` is no
    trained run, or one of a different backbone, tuning, set of LoRA layers or scale of theirs.
    """
    run = Path(run)
    if not (run / "model.safetensors").exists():
        raise FileNotFoundError(f"init_from: {run} has no model.safetensors, so it is not a run that train.py saved")
    tensors, _ = load_tensors(run / "model.safetensors")
    content = read_json(run / "config.json")
    if content.get("base_hash") != base_hash(vla):
        raise ValueError(
            f"init_from: {run} was trained on a different backbone than {vla.config.backbone}, or on other parts of it"
        )
    alpha = content["model"]["lora_alpha"]
    if lora_layers(vla) and alpha != vla.config.lora_alpha:
        raise ValueError(
            f"init_from: {run} has lora_alpha {alpha}, this run {vla.config.lora_alpha}: its low-rank updates would be "
            "scaled differently"
        )
    theirs, ours = (
        list(dict.fromkeys(entry.get("embodiment", "libero") for entry in each["data"]))
        for each in (content, description)
    )
    taken = {part: [0, 0] for part in PARTS}  # part -> tensors taken, tensors
    left = []
    for name, own in trainable_tensors(vla).items():
        part = name.split(".")[0]
        taken[part][1] += 1
        other = tensors.get(name)
        of_a_robot = name.startswith(("head.proprio.", "head.out."))
        if other is None or other.shape != own.shape or (of_a_robot and theirs != ours):
            left.append(f"{name} {list(own.shape)} (there: {list(other.shape) if other is not None else 'none'})")
            continue
        own.copy_(other)
        taken[part][0] += 1
    if taken["backbone"][0] < taken["backbone"][1]:
        unfit = [entry for entry in left if entry.startswith("backbone")]
        raise ValueError(f"init_from: the backbone of {run} does not fit: {', '.join(unfit[:3])}")
    counts = ", ".join(f"{PARTS[part]} {some} of {of}" for part, (some, of) in taken.items() if of)
    rest = f"; left as they were: {', '.join(left)}" if left else ""
    notes = compare_runs(content, description)
    note = f" ({', '.join(notes)})" if notes else ""
    return f"weights of {run}{note}: {counts} tensors{rest}"


def compare_runs(first, second):
    """Return texts on what a reader must know of a run whose weights another starts from. Both: of config.json."""
    notes = []
    if first["model"]["variant"] != second["model"]["variant"]:
        notes.append(f"a {first['model']['variant']}")
    targets, others = ({target["fingerprint"] for target in run.get("targets", [])} for run in (second, first))
    if targets and others and targets != others:
        notes.append("trained on other latent targets")
    shared = {entry["fingerprint"] for entry in first["data"]} & {entry["fingerprint"] for entry in second["data"]}
    if shared and any(first["train"][name] != second["train"][name] for name in ("val_fraction", "seed")):
        notes.append("trained on episodes that are held out here: its --val-fraction and --seed are others")
    return notes
