"""The modes of bench.py that run a policy: train, numerics, memory, infer and ddp.

train and infer compare it with transformers' own forward on the same weights (`bench_helpers.TransformersForward`) in
the same run. bench.py has the commands. Each `bench_*` prints a table and returns what is written as JSON.
Left out: modes without a policy's network (bench.py).
"""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from bench_helpers import (
    Stopwatch,
    TransformersForward,
    VlaConfig,
    count_flops,
    device_name,
    print_flops,
    random_batch,
    random_vla,
    relative_difference,
    set_precision,
    synchronise,
    time_in_turns,
)
from torch._subclasses import FakeTensorMode
from warm import free_port

from common import distribute, init_distributed, parameter_groups, shutdown_distributed
from lora import merge_lora

# ----------------------------------------------------------------------------------------------------------------------
# A training step


@dataclass
class TrainConfig(VlaConfig):
    """A training step against transformers' with the same weights: time by part, samples/s, model FLOP/s, memory."""

    batch: int = 8
    """samples of a step"""
    steps: int = 5
    """steps timed in a row"""
    rounds: int = 3
    """how often both take turns; the median counts"""
    checkpointing: bool = False
    """this code with gradient checkpointing, as train.py --gradient-checkpointing"""
    compile: bool = False
    """this code compiled, as train.py --compile"""
    peak_flops: float = 0.0
    """FLOP/s that MFU relates to (default: 989e12 for bf16 on an H100; elsewhere no MFU unless given)"""
    profile: bool = False
    """print what one step of this code spends its time on"""
    out: Path = Path("bench-train.json")
    """where the table goes"""


PARTS_OF_STEP = ("forward", "backward", "optimizer")
IMPLEMENTATIONS = ("transformers", "this code")


def ignore_lap(name):
    """Measure nothing."""


def train_step(losses, vla, optimizer, lap=ignore_lap):
    """Run train.py's step on one micro-batch.

    losses: function () -> what `VLA.forward` returns; lap: function (name), called after each of `PARTS_OF_STEP`.
    """
    loss = losses()["loss"]
    lap("forward")
    (loss * (1 + 0 * loss.detach())).backward()
    lap("backward")
    optimizer.found_inf = (~torch.nn.utils.clip_grad_norm_(vla.parameters(), 1.0).isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lap("optimizer")


def build_optimizer(vla):
    """Return train.py's optimizer at the paper's setting."""
    return torch.optim.AdamW(parameter_groups(vla, 0.01), lr=1e-4, fused=True)


def build_losses(config, name):
    """Return (VLA, function () -> its losses on one batch) of one of `IMPLEMENTATIONS`; the weights are the same."""
    vla = random_vla(config)
    batch = random_batch(vla, config.batch)
    if name == "this code":
        return vla, functools.partial(vla, batch)
    reference = TransformersForward(vla)
    return vla, functools.partial(reference.losses, reference.inputs(batch), batch)


def apply_options(vla, config):
    """Do to the model what train.py does for --gradient-checkpointing and --compile."""
    vla.backbone.checkpointing = config.checkpointing
    if config.compile:
        vla.forward_pass = torch.compile(vla.forward_pass, fullgraph=True, dynamic=False)


def measure_peak_memory(config, name):
    """Return the peak memory in bytes of two steps of one of `IMPLEMENTATIONS`.

    On a GPU what CUDA allocated, on a CPU by how much this process grew.
    """
    before, _ = resident_memory()
    set_precision(config)
    vla, losses = build_losses(config, name)
    apply_options(vla, config)
    optimizer = build_optimizer(vla)
    for _ in range(2):
        train_step(losses, vla, optimizer)
    if config.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    _, peak = resident_memory()
    return peak - before


def resident_memory():
    """Return (bytes of memory that this process has, the most that it ever had), as Linux counts them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (1024 * int(status[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, peak


def peak_memory(config, name):
    """Return `measure_peak_memory` of a new process with as many threads as this one.

    There glibc gives freed memory back at once, or the holes in its heap would count, which differ from run to run.
    """
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(measure_peak_memory, config, name).result()


def peak_flops(config):
    """Return the device's FLOP/s, 0 where unknown: dense bf16 of an H100 or H200 by its data sheet."""
    if config.peak_flops or not config.device.startswith("cuda") or config.precision != "bf16":
        return config.peak_flops
    return 989e12 if any(name in torch.cuda.get_device_name() for name in ("H100", "H200")) else 0.0


def bench_train(config):
    """Print the FLOP count and one row per implementation; return the rows and their ratios.

    The model FLOP are those of this code's step in both rows: what transformers computes beyond them is no use to the
    model. Memory is taken in a process of its own for each.
    """
    memory = {name: peak_memory(config, name) for name in IMPLEMENTATIONS}
    set_precision(config)
    reference_vla, reference_losses = build_losses(config, "transformers")
    vla, losses = build_losses(config, "this code")
    flops = print_flops(count_flops(vla, config.batch), config.batch)
    difference = relative_difference(vla, TransformersForward(reference_vla), random_batch(vla, 1, draws=False))
    apply_options(vla, config)
    steps = {
        "transformers": functools.partial(train_step, reference_losses, reference_vla, build_optimizer(reference_vla)),
        "this code": functools.partial(train_step, losses, vla, build_optimizer(vla)),
    }
    seconds = time_in_turns(steps, config)
    print_setting(config, vla, f"batch {config.batch}, ")
    print(f"{'':12} {'samples/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'peak GB':>8}   ms: " + "  ".join(PARTS_OF_STEP))
    rows = {}
    for name in IMPLEMENTATIONS:
        watch = Stopwatch(config.device)
        steps[name](watch.lap)
        rows[name] = train_row(config, flops, seconds[name], watch.seconds, memory[name])
        print_train_row(name, rows[name])
    ratio = rows["this code"]["samples_per_s"] / rows["transformers"]["samples_per_s"]
    memory_ratio = memory["this code"] / memory["transformers"]
    print(f"samples/s x {ratio:.2f}, memory x {memory_ratio:.2f}; the actions of the two differ by {difference:.1e}")
    if config.profile:
        print_profile(steps["this code"], config.device)
    return {"rows": rows, "ratio": ratio, "memory_ratio": memory_ratio, "flop": flops, "disagreement": difference}


def print_setting(config, vla, batch=""):
    """Print variant, size, images, tokens, precision and device in one line. batch: a text about the batch, or ""."""
    print(
        f"{config.variant} {config.size}: {batch}{config.images} images of {config.image_size} px, "
        f"{vla.backbone.length} tokens, {config.precision}, {device_name(config.device)}"
    )


def train_row(config, flops, step_seconds, part_seconds, memory):
    """Return one row of the table.

    flops: of a step; step_seconds: of a step in each round; part_seconds: {part of a step: s}; memory: bytes.
    """
    median = float(np.median(step_seconds))
    peak = peak_flops(config)
    return {
        "samples_per_s": config.batch / median,
        "flop_per_s": flops / median,
        "peak_bytes": memory,
        "mfu": flops / median / peak if peak else None,
        "ms": {part: 1000 * seconds for part, seconds in part_seconds.items()},
        "step_seconds": step_seconds,
    }


def print_train_row(name, row):
    """Print one row of the table."""
    mfu = "     -" if row["mfu"] is None else f"{100 * row['mfu']:5.1f}%"
    parts = "  ".join(f"{row['ms'][part]:{len(part)}.0f}" for part in PARTS_OF_STEP)
    flops, memory = row["flop_per_s"] / 1e12, row["peak_bytes"] / 1e9
    print(f"{name:12} {row['samples_per_s']:10.3f} {flops:8.3f} {mfu} {memory:8.2f}       {parts}")


def print_profile(step, device):
    """Print the operations that one step spends most time in and, on a GPU, how often it makes the host wait."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as trace:
        step()
        synchronise(device)
    operations = trace.key_averages()
    print(operations.table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=15))
    if cuda:
        waits = {op.key: op.count for op in operations if op.key.startswith("cuda") and op.key.endswith("Synchronize")}
        print(f"host waits in one step: {waits or 'none'} (one cudaDeviceSynchronize is the profile's own)")


# ----------------------------------------------------------------------------------------------------------------------
# Losses in bf16


@dataclass
class NumericsConfig(VlaConfig):
    """Losses of the same training steps in bf16 and in fp32."""

    batch: int = 8
    """samples of a step"""
    steps: int = 20
    """steps"""
    out: Path = Path("bench-numerics.json")
    """where the table goes"""


def training_losses(config):
    """Return the loss of each of `config.steps` training steps, each on a batch of its own, in `config.precision`."""
    set_precision(config)
    vla = random_vla(config)
    optimizer = build_optimizer(vla)
    losses = []

    def compute(step):
        result = vla(random_batch(vla, config.batch, seed=step))
        losses.append(result["loss"].item())
        return result

    for step in range(config.steps):
        train_step(functools.partial(compute, step), vla, optimizer)
    return losses


def bench_numerics(config):
    """Print the losses of both precisions, from the same weights on the same batches, and by how much they differ."""
    rows = {precision: training_losses(replace(config, precision=precision)) for precision in ("fp32", "bf16")}
    differences = [abs(bf16 / fp32 - 1) for fp32, bf16 in zip(rows["fp32"], rows["bf16"])]
    print(f"{'step':>4} {'fp32':>10} {'bf16':>10} {'apart':>8}")
    for step, (fp32, bf16) in enumerate(zip(rows["fp32"], rows["bf16"])):
        print(f"{step:4} {fp32:10.5f} {bf16:10.5f} {100 * differences[step]:7.3f}%")
    largest = max(differences)
    mean = np.mean(differences)
    print(f"at most {100 * largest:.3f} % apart in {config.steps} steps, on average {100 * mean:.3f} %")
    return {"rows": rows, "largest": largest}


# ----------------------------------------------------------------------------------------------------------------------
# Memory

MEMORY_FORMULA = """\
bytes of a step: 2 a frozen weight (4 in fp32); 16 a trained one (value, gradient, AdamW's two moments),
  18 with its bf16 copy; a sample: what its backward pass keeps. With gradient checkpointing a sample keeps what enters
  each layer, what is kept outside the layers, and one layer's. 10 % of the GPU stay free for kernels and fragments."""


@dataclass
class MemoryConfig(VlaConfig):
    """Samples of a step that fit a GPU: bytes and FLOP counted on tensors without contents, any size on any machine."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """of the frozen weights, and of what is computed with them; trained weights are fp32"""
    gigabytes: tuple[int, ...] = (24, 48, 80)
    """sizes of GPUs"""
    out: Path = Path("bench-memory.json")
    """where the table goes"""


def saved_bytes(backbone, run):
    """Return the bytes kept for the backward pass of run(), which passes `backbone`; nothing is computed.

    Two numbers, i64 [2]: without and with gradient checkpointing.
    """
    storages = {}  # address -> storage, held so that no other one gets its address
    saved = [0]  # bytes outside the layers, then of each layer
    entering = []  # bytes of each layer's input
    layer_now = 0  # place in `saved`

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage
            saved[layer_now] += storage.nbytes()
        return tensor

    def run_layer(layer, *inputs, **named):
        nonlocal layer_now
        saved.append(0)
        entering.append(inputs[-1].nbytes)
        layer_now = len(saved) - 1
        out = layer(*inputs, **named)
        layer_now = 0
        return out

    def unpack(tensor):
        return tensor

    backbone._run_layer = run_layer
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(note, unpack):
        run()
    return np.array([sum(saved), saved[0] + sum(entering) + max(saved[1:])])


def bench_memory(config):
    """Print the formula, its terms and the samples that fit."""
    set_precision(config)
    vla = random_vla(replace(config, device="cpu"), empty=True)
    numbers = {True: 0, False: 0}  # of weights: trained, frozen
    for parameter in vla.parameters():
        numbers[parameter.requires_grad] += parameter.numel()
    trained, frozen = numbers[True], numbers[False]
    half = config.precision == "bf16"
    fixed = frozen * (2 if half else 4) + trained * (18 if half else 16)

    def step(size):
        return vla(random_batch(vla, size))

    with FakeTensorMode(allow_non_fake_inputs=True):
        flops = sum(counted.sum() for counted in count_flops(vla, 1).values())
    three = saved_bytes(vla.backbone, functools.partial(step, 3))
    two = saved_bytes(vla.backbone, functools.partial(step, 2))
    sample = three - two  # what does not grow with the batch cancels
    print(
        f"{MEMORY_FORMULA}\n{config.variant} {config.size}: {frozen / 1e6:.0f} M frozen and {trained / 1e6:.0f} M "
        f"trained weights, {fixed / 1e9:.1f} GB; {config.images} images of {config.image_size} px, "
        f"{vla.backbone.length} tokens, {config.precision}, {flops / 1e12:.2f} TFLOP a sample and step"
    )
    print(f"{'':24} {'GB a sample':>12}" + "".join(f"{f'{size} GB':>8}" for size in config.gigabytes) + "  (samples)")
    rows = {}
    for name, each in zip(("without checkpointing", "gradient checkpointing"), sample):
        fitting = {size: max(0, int((0.9 * size * 1e9 - fixed) / each)) for size in config.gigabytes}
        rows[name] = {"bytes_a_sample": int(each), "samples": fitting}
        print(f"{name:24} {each / 1e9:12.3f}" + "".join(f"{samples:8}" for samples in fitting.values()))
    return {"rows": rows, "fixed_bytes": fixed, "frozen": frozen, "trained": trained, "flop_a_sample": flops}


# ----------------------------------------------------------------------------------------------------------------------
# Inference


@dataclass
class InferConfig(VlaConfig):
    """One chunk of actions: latency at batch 1, throughput at larger ones, against transformers' forward."""

    batches: tuple[int, ...] = (1, 16)
    """observations predicted at once"""
    steps: int = 10
    """calls timed in a row"""
    rounds: int = 3
    """how often both take turns; the median counts"""
    out: Path = Path("bench-infer.json")
    """where the table goes"""


@torch.inference_mode()
def bench_infer(config):
    """Print ms a call and chunks/s of what `Policy` runs, against transformers' forward; LoRA is merged in both.

    This code: from images on the device to actions on the host (on a GPU as CUDA graphs). transformers': without
    labels, on patches that were laid out before.
    """
    set_precision(config)
    vla = random_vla(config).eval()
    reference_vla = random_vla(config).eval()
    merge_lora(vla)
    merge_lora(reference_vla)
    reference = TransformersForward(reference_vla)
    difference = relative_difference(vla, reference, random_batch(vla, 1, draws=False))
    if config.device.startswith("cuda"):
        vla.forward_pass = torch.compile(vla.forward_pass, fullgraph=True, dynamic=False, mode="reduce-overhead")
    print_setting(config, vla)
    print(f"{'':12} {'batch':>6} {'ms a call':>10} {'chunks/s':>10}")
    rows = {}
    for size in config.batches:
        for name, seconds in time_inference(config, vla, reference, size).items():
            median = float(np.median(seconds))
            rows[f"{name} {size}"] = {"ms": 1000 * median, "chunks_per_s": size / median, "call_seconds": seconds}
            print(f"{name:12} {size:6} {1000 * median:10.2f} {size / median:10.2f}")
        ratio = rows[f"this code {size}"]["chunks_per_s"] / rows[f"transformers {size}"]["chunks_per_s"]
        print(f"x {ratio:.2f} at batch {size}")
    print(f"the actions of the two differ by {difference:.1e}")
    return {"rows": rows, "disagreement": difference}


def time_inference(config, vla, reference, size):
    """Return {implementation: [seconds of one call in each round]} for a batch of `size`."""
    batch = random_batch(vla, size, draws=False)
    inputs = {name: value for name, value in reference.inputs(batch).items() if name != "labels"}

    def run_reference():
        return reference.predict(inputs, batch["proprio"])[0].cpu()

    def run_this_code():
        return vla.predict(batch)[0].cpu()

    return time_in_turns({"transformers": run_reference, "this code": run_this_code}, config)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@dataclass
class DdpConfig(VlaConfig):
    """Samples/s of train.py's step on 1 to n processes of this machine, each with a batch of its own."""

    processes: tuple[int, ...] = ()
    """how many processes (default: 1, 2, 4, ... up to the GPUs; on a CPU 1 and 2)"""
    batch: int = 8
    """samples of a step in each process"""
    steps: int = 5
    """steps timed in a row"""
    rounds: int = 3
    """how often; the median counts"""
    out: Path = Path("bench-ddp.json")
    """where the table goes"""


def run_rank(rank, world, port, config, results):
    """Time the steps of one process of `world`; the first puts the seconds of a step in each round into `results`."""
    torchrun = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    ranks = init_distributed()
    config = replace(config, device=str(ranks.device))
    set_precision(config)
    vla = random_vla(config)
    optimizer = build_optimizer(vla)
    batch = random_batch(vla, config.batch)
    ddp = distribute(vla, ranks)
    step = functools.partial(train_step, functools.partial(ddp, batch), vla, optimizer)
    seconds = time_in_turns({"step": step}, config, wall=True)["step"]
    if ranks.main:
        results.put(seconds)
    shutdown_distributed()


def bench_ddp(config):
    """Run the same step in 1 to n processes; print samples/s and what share of n times one process's that is.

    Raise ValueError when there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count() if config.device.startswith("cuda") else 0
    most = gpus or 2
    counts = config.processes or tuple(2**k for k in range(most.bit_length()) if 2**k <= most)
    if gpus and max(counts) > gpus:
        raise ValueError(f"processes is {counts}, but there are {gpus} GPUs: one for each process")
    results = multiprocessing.get_context("spawn").SimpleQueue()
    print(f"{config.variant} {config.size}: batch {config.batch} in each process, {config.precision}")
    print(f"{'processes':>9} {'samples/s':>10} {'of linear':>10}")
    rows = {}
    for count in counts:
        torch.multiprocessing.spawn(run_rank, (count, free_port(), config, results), nprocs=count)
        seconds = results.get()
        samples_per_s = count * config.batch / float(np.median(seconds))
        rows[count] = {"samples_per_s": samples_per_s, "step_seconds": seconds}
        linear = rows[counts[0]]["samples_per_s"] / counts[0] * count
        rows[count]["of_linear"] = samples_per_s / linear
        print(f"{count:9} {samples_per_s:10.2f} {100 * samples_per_s / linear:9.1f}%")
    return {"rows": rows}
