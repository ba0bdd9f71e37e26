"""What every script shares: processes, learning rate, optimizer groups, logs, checkpoints.

Runs unchanged as `python script.py` (one process) and under `torchrun` (any number of processes and nodes).
"""

import contextlib
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Ranks:
    """This process among all: rank of world, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0


def start_ranks(timeout=600):
    """Joins the process group when torchrun started us; otherwise one process. Uses a GPU when there is one.

    On a CPU one thread is used unless OMP_NUM_THREADS says otherwise. timeout: seconds that a process waits for others.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # who starts a killed torchrun again must not meet us
    rank, local, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    cuda = torch.cuda.is_available()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # tiny models gain little from more, and lose much when a core is busy
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in bf16, as the action head
    if world > 1:
        wait, alone = timedelta(seconds=timeout), os.environ.get("GROUP_WORLD_SIZE") == "1"
        store, *_ = next(dist.rendezvous("env://", timeout=wait))
        if alone:  # or, after a restart, torchrun's store tells where the killed ranks listened
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=wait)
        counts = [None] * world  # of restarts: each node's torchrun counts those that it began
        dist.all_gather_object(counts, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(max(counts))
    return Ranks(rank, world, device)


def die_with_parent():
    """Lets the kernel kill this process when the one that started it ends; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def stop_ranks():
    """Leaves the process group. Call it when everything sent has arrived."""
    if dist.is_initialized():
        time.sleep(0.5)  # gloo's threads take the GIL to let go of the last tensors; destroying them first would hang
        dist.destroy_process_group()


def all_sum(tensor):
    """Sum of `tensor` over all processes, in place; the tensor itself with one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """Mean of `tensor` over all processes; with one process the tensor's own values."""
    return all_sum(tensor) / (dist.get_world_size() if dist.is_initialized() else 1)


def broadcast(tensor):
    """The first process's `tensor`, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def agreed(value):
    """The first process's value, whatever it is."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def distribute(module, ranks):
    """`module` as it is trained on all processes. Its buffers are the same on all and are not sent around."""
    if ranks.world == 1:
        return module
    names = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return DistributedDataParallel(module)


def note_sigterm():
    """An event that is set once SIGTERM comes: a scheduler wants its machine back."""
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    return came


def begin_worker(number):
    """A data worker ignores SIGTERM, which schedulers send to all: the last batches before the save need it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()


def data_workers(count, timeout):
    """DataLoader's arguments about its `count` processes."""
    return {"num_workers": count, "timeout": timeout if count else 0, "worker_init_fn": begin_worker}


def explained(train):
    """Decorates train(config, ...): says what to do when a data worker or another process dies or hangs."""

    @functools.wraps(train)
    def run(config, *rest):
        try:
            return train(config, *rest)
        except BaseException as error:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or DataLoader raises at the deaths that follow
            for worker in multiprocessing.active_children():
                worker.kill()  # one that hangs, or ignores SIGTERM, would keep this process from ending
            if "DataLoader" in str(error) or "Timed out waiting" in str(error):
                raise RuntimeError(
                    f"{error}\nA data worker (--num-workers is {config.num_workers}) or another process died, short of "
                    f"memory perhaps, or hangs (--timeout is {config.timeout} s). Go on from the last save: --resume."
                ) from error
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return run


def to_device(batch, device):
    """Moves a batch's tensors; lists of tensors too. Words stay."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list):
        return [to_device(value, device) for value in batch]
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


def autocast(device, half=False):
    """The precision of everything large: bf16 on a GPU, or with `half` anywhere, else f32. What is trained, losses and
    codebooks stay f32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half or device.type == "cuda")


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
    """AdamW groups over the trainable parameters: matrices decay; vectors, queries and codebooks do not."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or "queries" in name or "codebook" in name
            (plain if free else decayed).append(parameter)
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


def fsync(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to. What was written becomes `path` once it is on the disk; after an error it goes."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A reader, also after a crash, sees the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file when there is none."""
    try:
        found = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}. Put the right file back.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r:.80}, not an object. Put the right file back.")
    return found


def write_json(path, content):
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def checksum(tensors, info):
    """CRC-32 over metadata and the names, dtypes, shapes and bytes of contiguous tensors on the CPU, as hex digits."""
    lines = [*sorted(info.items())]
    for name, tensor in sorted(tensors.items()):
        lines += [name, tensor.dtype, *tensor.shape, zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())]
    return f"{zlib.crc32(repr(lines).encode()):08x}"


def save_tensors(path, tensors, **info):
    """safetensors, written like `write_text`. `info` becomes the file's metadata, as strings, beside a checksum.

    Raises OSError when it cannot be written; what was there before stays.
    """
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    info = {k: str(v) for k, v in info.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, info | {"checksum": checksum(tensors, info)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read


def load_tensors(path):
    """(tensors, metadata) of a safetensors file. Raises ValueError when it is damaged, if it has a checksum."""
    try:
        with safe_open(path, "pt") as file:
            tensors, info = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    stored = info.pop("checksum", None)
    if stored and stored != (found := checksum(tensors, info)):
        raise ValueError(f"{path} is damaged: its checksum is {found}, but {stored} when it was written")
    return tensors, info


def trainable_tensors(module):
    """{name: tensor} of what training changes: trainable parameters and persistent buffers."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trainable(module, tensors, source):
    """Puts back what `trainable_tensors` returned; raises as `load_tensors_into`."""
    load_tensors_into(module, trainable_tensors(module), tensors, source)


def load_tensors_into(module, expected, tensors, source):
    """Loads `tensors` into `module`, which must be those of `expected` (a part of its state) by name and shape.

    Raises ValueError listing what is missing, unknown or of another shape.
    """
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


def checkpoints(run):
    """{step: file} of what `save_training` wrote, the newest first."""
    found = {path.stem.removeprefix("training-"): path for path in Path(run).glob("training-*.safetensors")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int, reverse=True)}


def save_training(run, module, optimizer, step, weights, log, keep, last):
    """training-<step>.safetensors: all that continuing after `step` steps needs, the `keep` newest of which stay; and
    `weights` as model.safetensors.

    A write that fails leaves what there was, and a warning; after the `last` step: raises OSError.
    """
    try:
        log.sync()  # or a crash could leave a save that is ahead of its log
        tensors = trainable_tensors(module) | optimizer_tensors(optimizer)
        save_tensors(Path(run) / f"training-{step}.safetensors", tensors, step=step)
        save_tensors(Path(run) / "model.safetensors", weights, step=step)
        found = checkpoints(run)
        for old in found.keys() - [s for s in found if s <= step][:keep]:  # later ones were found damaged
            found[old].unlink()
    except OSError as error:
        good = next(iter(checkpoints(run).values()), "none")
        message = f"step {step} could not be saved: {error}. The last good save: {good}. Make room on the disk"
        if last:
            raise OSError(f"{message}, then go on with --resume.") from error
        print(f"WARNING: {message}; training goes on.", file=sys.stderr, flush=True)


def newest(saves):
    """(step, tensors) of the newest of `checkpoints` that is not damaged. Raises ValueError when all are."""
    for step, path in saves.items():
        try:
            return step, load_tensors(path)[0]
        except ValueError as error:
            print(f"WARNING: {error}. Trying the save before it.", file=sys.stderr, flush=True)
    raise ValueError(f"every save is damaged: {', '.join(map(str, saves.values()))}. Train again, with another --out.")


def restore_training(run, module, optimizer):
    """The number of steps done by the newest save of `run` that is whole, as the first process finds; puts its weights
    and optimizer back. Raises ValueError when all are damaged."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    step, tensors = newest(checkpoints(run)) if main else (0, None)
    step = agreed(step)
    path = Path(run) / f"training-{step}.safetensors"
    tensors = tensors if main else load_tensors(path)[0]
    moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    load_trainable(module, tensors, path)
    load_optimizer(optimizer, moments)
    return step


def prepare_run(run, resume, main, description, key, free):
    """Creates the folder of a run with its config.json, or checks that a run to be resumed had the same settings.

    description: what config.json is to hold: the settings under `key`, of which `free` may differ, and lists "data" and
    "targets" of entries with a fingerprint. resume: also set when torchrun has restarted us. Returns whether there is
    something to resume. Raises ValueError naming what differs.
    """
    run = Path(run)
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if resume and main:
        for unfinished in run.glob("*.tmp"):
            unfinished.unlink()
    if resume and agreed(len(checkpoints(run))):
        before = json.loads((run / "config.json").read_text())
        changed = {
            k: (before[key].get(k), v)
            for k, v in description[key].items()
            if before[key].get(k) != v and k not in free
        }
        for name in ("data", "targets"):
            ours, theirs = ([entry["fingerprint"] for entry in d[name]] for d in (description, before))
            changed |= {} if ours == theirs else {f"contents of the {name}": (theirs, ours)}
        if changed:
            raise ValueError(
                f"{run} was trained with other settings: "
                + ", ".join(f"{k} {a} (now {b})" for k, (a, b) in changed.items())
            )
        return True
    if main:
        config = run / "config.json"
        unfinished = resume and config.exists() and not (run / "model.safetensors").exists()
        ours = unfinished and key in json.loads(config.read_text())
        run.mkdir(exist_ok=True) if ours else new_directory(run)
        write_json(config, description)
    return False


class Log:
    """One JSON object per line in `<folder>/log.jsonl`, and wandb on request. Does nothing on ranks but the first.

    `first_step`: entries of this step and later ones are cut off (they are trained again after a resume).
    """

    def __init__(self, folder, main=True, first_step=0, wandb_project="", config=None):
        self.file = self.wandb = None
        if not main:
            return
        self.waiting, self.file = b"", open(Path(folder) / "log.jsonl", "a+b", buffering=0)
        self.file.seek(0)
        kept = itertools.takewhile(lambda line: _is_before(line, first_step), self.file.read().splitlines(True))
        self.file.truncate(sum(map(len, kept)))
        if wandb_project:
            import wandb  # slow to import, and most runs do without

            self.wandb = wandb.init(project=wandb_project, name=Path(folder).name, config=config)

    def write(self, **entry):
        if self.file:
            self.waiting += (json.dumps(entry) + "\n").encode()
            try:
                self.flush()
            except OSError as error:
                print(f"WARNING: {self.file.name}: {error}; lines wait in memory", file=sys.stderr, flush=True)
        if self.wandb:
            self.wandb.log(entry, step=entry["step"])

    def flush(self):
        """Raises OSError when the disk is full; what could not be written waits."""
        while self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def sync(self):
        """Waits until every line is on the disk. Raises as `flush`."""
        self.flush()
        os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.flush()
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def _is_before(line, step):
    """Whether a line of a log is whole and of a step before `step`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, TypeError, KeyError):
        return False


class Meter:
    """samples/s over the last `window` steps."""

    def __init__(self, window=50):
        self.window, self.times = window, [time.perf_counter()]

    def tick(self, samples):
        """Call once per step of `samples` samples; returns samples/s."""
        self.times = [*self.times, time.perf_counter()][-self.window - 1 :]
        return samples * (len(self.times) - 1) / (self.times[-1] - self.times[0])
