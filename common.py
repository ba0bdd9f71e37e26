"""What every script shares: processes, learning rate, optimizer groups, logs, checkpoints.

Runs unchanged as `python script.py` (one process) and under `torchrun` (any number of processes and nodes).
"""

import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass
class Ranks:
    """This process among all: rank of world, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0


def start_ranks():
    """Joins the process group when torchrun started us; otherwise one process. Uses a GPU when there is one.

    On a CPU one thread is used unless OMP_NUM_THREADS says otherwise.
    """
    rank, local, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    cuda = torch.cuda.is_available()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # tiny models gain little from more, and lose much when a core is busy
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world, device)


def stop_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(tensor):
    """Sum of `tensor` over all processes, in place; the tensor itself with one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """Mean of `tensor` over all processes; with one process the tensor's own values."""
    return all_sum(tensor) / (dist.get_world_size() if dist.is_initialized() else 1)


def print0(*words, **options):
    """print, on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, **options, flush=True)


def commit():
    """The git commit of this code, with '+' when files differ from it; 'unknown' without git or outside a checkout."""
    if not shutil.which("git"):
        return "unknown"
    run = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)  # noqa: E731
    head = run("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if run("status", "--porcelain", "--untracked-files=no").stdout else "")


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation


def learning_rate(step, steps, peak, schedule, warmup_ratio=0.0, decay_every=10_000):
    """Learning rate of `step` (from 0) out of `steps`: linear warm-up, then

    constant: peak; step: halved every `decay_every` steps (the paper's); cosine: down to 1 % of the peak.
    """
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    if schedule == "step":
        return peak * 0.5 ** (step // decay_every)
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
    raise ValueError(f"lr_scheduler is '{schedule}'; choose constant, step or cosine")


def parameter_groups(module, weight_decay):
    """AdamW groups over the trainable parameters: matrices decay; vectors (norms, biases, gates) and queries do not."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "queries" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


# ----------------------------------------------------------------------------------------------------------------------
# Runs on disk


def new_directory(path):
    """Creates the folder of a run. Raises FileExistsError if something is there already: no run is ever overwritten."""
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(
            f"output folder {path} exists and is not empty. Choose another --out, or continue it with --resume."
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def plain(config):
    """A config dataclass as plain JSON values (paths become strings)."""
    return json.loads(json.dumps(asdict(config), default=str))


def write_text(path, text):
    """Writes under a temporary name, then renames: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path, content):
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_tensors(path, tensors, **info):
    """safetensors under a temporary name, then renamed. `info` becomes the file's metadata, as strings."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
        temporary,
        {k: str(v) for k, v in info.items()},
    )
    temporary.chmod(0o644)  # safetensors writes files that only their owner may read
    temporary.replace(path)


def load_tensors(path):
    """(tensors, metadata) of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def trainable_tensors(module):
    """{name: tensor} of what training changes: trainable parameters and persistent buffers."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trainable(module, tensors, source):
    """Puts back what `trainable_tensors` returned.

    Raises ValueError listing what is missing, unknown or of another shape.
    """
    expected = trainable_tensors(module)
    wrong = [f"missing {n}" for n in expected.keys() - tensors.keys()] + [
        f"unknown {n}" for n in tensors.keys() - expected.keys()
    ]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)}, the model's is {tuple(expected[n].shape)}"
        for n in expected.keys() & tensors.keys()
        if tensors[n].shape != expected[n].shape
    ]
    if wrong:
        raise ValueError(
            f"{source} does not fit this model: "
            + "; ".join(sorted(wrong)[:8])
            + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        )
    module.load_state_dict(tensors, strict=False)


def optimizer_tensors(optimizer):
    """{"<number>.<name>": tensor}: AdamW's moments and step counts, flat, so that safetensors holds them."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{name}": tensor for number, entry in state.items() for name, tensor in entry.items()}


def load_optimizer(optimizer, tensors):
    """Puts back what `optimizer_tensors` returned."""
    state = {}
    for key, tensor in tensors.items():
        _, number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Log:
    """One JSON object per line in `<folder>/log.jsonl`, and wandb on request. Does nothing on ranks but the first.

    `first_step`: entries of this step and later ones are cut off (they are trained again after a resume).
    """

    def __init__(self, folder, main=True, first_step=0, wandb_project="", config=None):
        self.file = self.wandb = None
        if not main:
            return
        path = Path(folder) / "log.jsonl"
        kept = (
            [line for line in path.read_text().splitlines() if json.loads(line)["step"] < first_step]
            if path.exists()
            else []
        )
        path.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", buffering=1)
        if wandb_project:
            import wandb  # slow to import, and most runs do without

            self.wandb = wandb.init(project=wandb_project, name=Path(folder).name, config=config)

    def write(self, **entry):
        if self.file:
            self.file.write(json.dumps(entry) + "\n")
        if self.wandb:
            self.wandb.log(entry, step=entry["step"])

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


class Meter:
    """samples/s over the last `window` steps."""

    def __init__(self, window=50):
        self.window, self.times = window, [time.perf_counter()]

    def tick(self, samples):
        """Call once per step of `samples` samples; returns samples/s."""
        self.times = [*self.times, time.perf_counter()][-self.window - 1 :]
        return samples * (len(self.times) - 1) / (self.times[-1] - self.times[0])
