"""What every script shares: processes, devices, learning rate, optimizer groups, the log.

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
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tracking import Tracker

# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices


@dataclass
class Ranks:
    """This process among all: its rank, their number, its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


def init_distributed(timeout=600, batch=None):
    """Join the process group if torchrun started this process, and choose its device; return `Ranks`.

    The device is a GPU when there is one. On a CPU one thread is used unless OMP_NUM_THREADS says otherwise.
    timeout: seconds that a process waits for the others.
    batch: samples to share. On the CPUs of one machine processes without an equal share end: torchrun's `auto` works.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # or processes of a killed torchrun would meet those of the next one
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # tiny models gain little from more, and lose much when a core is busy
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL sends objects, as all_gather_object's, from the current device
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in bf16, as the action head
    elif batch and os.environ.get("GROUP_WORLD_SIZE") == "1":
        started, world = world, most_sharing(batch, world)
        if rank >= world:
            sys.exit()
        if world < started:
            print0(f"{world} of {started} processes train: more of them cannot share a batch of {batch} equally")
    if world > 1:
        _join_group("nccl" if cuda else "gloo", rank, world, timedelta(seconds=timeout))
    return Ranks(rank, world, device)


def most_sharing(batch, world):
    """Return how many of `world` processes, at most, can share a batch equally."""
    return max(number for number in range(1, world + 1) if batch % number == 0)


def _join_group(backend, rank, world, timeout):
    """Create the process group, and let all nodes agree how often torchrun has restarted them."""
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else torchrun's store says where the killed ranks listened
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    counts = [None] * world  # each node's torchrun counts the restarts that it began
    dist.all_gather_object(counts, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(max(counts))


def shutdown_distributed():
    """Leave the process group. Call it when everything sent has arrived."""
    if dist.is_initialized():
        time.sleep(0.5)  # gloo's threads take the GIL to release the last tensors; destroying them first would hang
        dist.destroy_process_group()


def die_with_parent():
    """Let the kernel kill this process when the one that started it ends; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def all_sum(tensor):
    """Add up `tensor` over all processes, in place, and return it. NCCL takes tensors of this process's GPU alone."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """Return the mean of `tensor`, which is overwritten, over all processes."""
    return all_sum(tensor) / (dist.get_world_size() if dist.is_initialized() else 1)


def broadcast(tensor):
    """Overwrite `tensor` with the first process's, and return it."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def broadcast_object(value):
    """Return the first process's value, of any type that pickles."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def distribute(module, ranks):
    """Wrap `module` in DDP when there are several processes. Its buffers are alike on all and are not sent."""
    if ranks.world == 1:
        return module
    names = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return DistributedDataParallel(module, gradient_as_bucket_view=True)  # no second copy of the gradients


def to_device(batch, device):
    """Move the tensors of a batch (a dict, list or tensor) to `device`; strings stay."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list):
        return [to_device(value, device) for value in batch]
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


def autocast(device, half=False):
    """Return the context in which large matrices multiply: bf16 on a GPU, or with `half` on any device, else f32.

    What is trained, losses and codebooks stay in f32 (their products in TF32).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=half or device.type == "cuda")


def print0(*values, **options):
    """Print, on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*values, **options, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Data workers and signals


def catch_signals():
    """Return an event that is set once SIGTERM comes, as from a scheduler, or Ctrl-C. A second Ctrl-C ends at once."""
    received = threading.Event()

    def stop(*_):
        received.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if int(os.environ.get("RANK", 0)) == 0:
            os.write(2, b"\nStopping: a save comes first. Ctrl-C ends at once.\n")  # print may be at work already

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return received


def init_worker(number):
    """Let a data worker ignore SIGTERM and Ctrl-C, which all get: the last updates before the save need batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


def choose_workers(count, cuda):
    """Return how many data workers each process has; for a negative count 2, or none where every core trains.

    A core that trains gains nothing from a second process, and batches need not be sent from one to the other.
    """
    if count >= 0:
        return count
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 2 if cuda or processes < len(os.sched_getaffinity(0)) else 0


def worker_options(count, timeout):
    """Return DataLoader's arguments about its `count` processes, which are forked; timeout in seconds."""
    limits = {"num_workers": count, "timeout": timeout if count else 0}
    return limits | {"worker_init_fn": init_worker, "multiprocessing_context": "fork" if count else None}


def report_worker_failures(train):
    """Decorate train(config, ...) so that its error says what to do when a data worker or a process dies or hangs."""

    @functools.wraps(train)
    def run(config, *rest):
        try:
            return train(config, *rest)
        except BaseException as error:
            if "DataLoader" in str(error) or "Timed out waiting" in str(error):
                raise RuntimeError(
                    f"{error}\nA data worker (--num-workers is {config.num_workers}) or another process died, perhaps "
                    f"for lack of memory, or hangs (--timeout is {config.timeout} s). Continue from the last save: "
                    "--resume."
                ) from error
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for worker in multiprocessing.active_children():  # an exception that something keeps keeps them, too
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or DataLoader raises at the deaths that follow
                worker.kill()  # one that hangs, or ignores SIGTERM, would keep this process from ending

    return run


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation


def learning_rate(step, steps, peak, schedule, warmup_ratio=0.0, decay_every=10_000):
    """Return the learning rate of update `step` (from 0) out of `steps`: linear warm-up, then

    constant: peak; step: halved every `decay_every` updates (the paper's); cosine: down to 1 % of the peak.
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
    """Return AdamW's groups of the trainable parameters: matrices decay; vectors, queries and codebooks do not."""
    decayed, undecayed = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or "queries" in name or "codebook" in name
            (undecayed if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


class MovingAverage:
    """An exponential moving average of the weights that are trained; it is less noisy than the last weights.

    After update n (from 0): average <- d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)), so that the
    random numbers of the start are soon forgotten. With decay 0 nothing is kept, and all methods do nothing.
    """

    def __init__(self, module, decay):
        self.decay = decay
        self.weights = {name: p for name, p in module.named_parameters() if decay and p.requires_grad}
        self.tensors = {name: weight.detach().clone() for name, weight in self.weights.items()}  # {name: average}

    @torch.no_grad()
    def update(self, step):
        """Let the average follow the weights after update `step`."""
        if self.decay:
            follow = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            follow(list(self.tensors.values()), list(self.weights.values()), step)

    @contextlib.contextmanager
    def in_place(self):
        """Put the average in the place of the weights for a while."""
        kept = [weight.detach().clone() for weight in self.weights.values()]
        self._copy_to_weights(self.tensors.values())
        yield
        self._copy_to_weights(kept)

    @torch.no_grad()
    def _copy_to_weights(self, tensors):
        for weight, tensor in zip(self.weights.values(), tensors):
            weight.copy_(tensor)


# ----------------------------------------------------------------------------------------------------------------------
# The log of a run


class Log:
    """One JSON object per line in `<folder>/log.jsonl`, and wandb on request. Does nothing on ranks but the first.

    `first_step`: entries of this step and later ones are removed (they are trained again after a resume).
    """

    def __init__(self, folder, main=True, first_step=0, wandb_project="", config=None):
        self.file = None
        self.tracker = Tracker(folder, wandb_project if main else "", config)
        self.waiting = b""  # lines that a full disk did not take yet
        if not main:
            return
        self.file = open(Path(folder) / "log.jsonl", "a+b", buffering=0)
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        kept = itertools.takewhile(lambda line: _is_whole_entry_before(line, first_step), lines)
        self.file.truncate(sum(map(len, kept)))

    def write(self, **entry):
        """Append one line. A full disk is a warning; the line then waits in memory."""
        if self.file:
            self.waiting += (json.dumps(entry) + "\n").encode()
            try:
                self.flush()
            except OSError as error:
                print(f"WARNING: {self.file.name}: {error}; lines wait in memory", file=sys.stderr, flush=True)
        self.tracker.log(entry)

    def flush(self):
        """Write what waits. Raise OSError when the disk is full."""
        while self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def sync(self):
        """Wait until every line is on the disk. Raise OSError when the disk is full."""
        self.flush()
        os.fsync(self.file.fileno())

    def close(self):
        """Write what waits and close file and wandb run."""
        if self.file:
            self.flush()
            self.file.close()
        self.tracker.finish()


def _is_whole_entry_before(line, step):
    """Return whether a line of a log is complete and of a step before `step`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, TypeError, KeyError):
        return False


class Meter:
    """Training speed in samples/s over the last 50 updates."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def tick(self, samples):
        """Note that an update of `samples` samples is done; return samples/s."""
        self.times = [*self.times, time.perf_counter()][-51:]  # between which lie 50 updates
        return samples * (len(self.times) - 1) / (self.times[-1] - self.times[0])
