"""Feeds damaged files to the record reader and to the loader of run directories; pytest runs a few hundred inputs.

    python tests/fuzz.py --inputs 100000 --seed 0    # about 10 minutes on one core
    python tests/fuzz.py --inputs 1 --first 4711     # that input alone

Every input is a valid file (a shard of two episodes; config.json, dataset_statistics.json or model.safetensors of a
tiny run) after some mutations, drawn from the seed and the input's number alone. Allowed are success, ValueError and
FileNotFoundError. Anything else is printed with the command that repeats it, and the exit status is 1: another
exception, more than 5 s of CPU, Python allocations for a shard beyond 64 times its size plus 256 KiB, or a process
whose memory, torch's included, grows by more than 16 times the size of a run plus 128 MiB, which its masks may take.
"""

import copy
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import normalise
import rlds
from index import Feature, IndexWriter, read_index

SECONDS = 5  # of CPU time, allowed for one input
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # files that no disk has to keep
FEATURES = {
    "steps/observation/image": Feature("image", "uint8", (8, 8, 3)),
    "steps/observation/tensor": Feature("image", "uint8", (2, 2, 3)),
    "steps/action": Feature("number", "float32", (2,)),
    "steps/is_first": Feature("number", "bool", ()),
    "steps/language_instruction": Feature("text", "str", ()),
    "steps/anything": Feature("text", "bytes", ()),
    "episode_metadata/seed": Feature("number", "int64", ()),
    "episode_metadata/file_path": Feature("text", "str", ()),
    "episode_metadata/state": Feature("number", "float64", (None,)),
}
SIZES = (-1, 0, 1, 2, 3, 64, 100, 256, 1000, 10_000, 10**5, 10**6, 2**31, 2**63, 10**30)
HUGE = b"\xff" * 9 + b"\x01"  # the largest varint


@dataclass
class Config:
    inputs: int = 100_000
    """mutated inputs; one in ten is a run directory, the rest are shards"""
    seed: int = 0
    """of the mutations"""
    first: int = 0
    """number of the first input"""


# ----------------------------------------------------------------------------------------------------------------------
# Valid files


def varint(number):
    """Return an integer >= 0 as a protobuf varint."""
    parts = [number >> shift & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([part | 0x80 for part in parts[:-1]] + parts[-1:])


def length_delimited(number, content):
    """Return some bytes as a length-delimited protobuf field with this number."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features):
    """Return the serialized tf.train.Example of {name: list of bytes, f32 array or int array}."""
    entries = []
    for name, value in features.items():
        if isinstance(value, list):
            feature = length_delimited(1, b"".join(length_delimited(1, part) for part in value))
        elif value.dtype.kind == "f":
            feature = length_delimited(2, length_delimited(1, value.astype("<f4").tobytes()))
        else:
            numbers = b"".join(varint(int(n) & (1 << 64) - 1) for n in value.ravel())
            feature = length_delimited(3, length_delimited(1, numbers))
        entry = length_delimited(1, name.encode()) + length_delimited(2, feature)
        entries.append(length_delimited(1, entry))
    return length_delimited(1, b"".join(entries))


def record(payload, length=None):
    """Return a TFRecord with right checksums. length: what its header states instead of the payload's own length."""
    header = struct.pack("<Q", len(payload) if length is None else length)
    header_crc, payload_crc = (struct.pack("<I", rlds.masked_crc(part)) for part in (header, payload))
    return header + header_crc + payload + payload_crc


def episode(steps=3):
    """Return the features of an episode as `FEATURES` has them."""
    return {
        "steps/observation/image": [bytes(range(20 + n)) for n in range(steps)],
        "steps/observation/tensor": [bytes(range(12)) for n in range(steps)],
        "steps/action": np.arange(2 * steps, dtype=np.float32),
        "steps/is_first": np.arange(steps) == 0,
        "steps/language_instruction": [b"put the bowl on the plate"] * steps,
        "steps/anything": [b"\xff"] * steps,
        "episode_metadata/seed": np.array([-5]),
        "episode_metadata/file_path": [b"made"],
        "episode_metadata/state": [np.arange(5.0).tobytes()],
    }


PAYLOADS = [example(episode(steps)) for steps in (0, 1, 3, 3)]


def write_run(folder, several=False):
    """Write a run of the tiny model with random weights, as far as loading reads it; several: of two embodiments."""
    import model
    from checkpoint import trainable_tensors
    from dataspec import PRESETS, to_dict
    from files import save_tensors, write_json
    from lora import base_hash

    embodiments = (("libero", 7, 8, 1), ("other", 3, 2, 1)) if several else ()
    config = model.ModelConfig("la_cond", "tiny", 1, 32, 24, 2, 7, 8, code_dim=8, gate=1.0, embodiments=embodiments)
    vla = model.VLA(config)
    column = {name: [0.5] * 7 for name in ("mean", "std", "min", "max", "q01", "q99")}
    stats = {"action": column | {"mask": [True] * 6 + [False]}, "proprio": column, "num_transitions": 9}
    entry = {"name": "made", "embodiment": "libero", "statistics": normalise.statistics_hash(stats)}
    entry |= {"cameras": {"image": {}}, "image_sides": [0], "spec": to_dict(PRESETS["libero"])}
    save_tensors(folder / "model.safetensors", trainable_tensors(vla))
    write_json(folder / "dataset_statistics.json", {"made": stats})
    config = {"model": asdict(vla.config), "base_hash": base_hash(vla), "data": [entry]}
    write_json(folder / "config.json", config)


# ----------------------------------------------------------------------------------------------------------------------
# Mutations


def damage_bytes(rng, content):
    """Return some bytes after one to four mutations: bits, bytes, lengths, spans removed, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        size = rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(8)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size]
        elif kind == 5:
            content[at : at + rng.choice((0, 1, 10))] = HUGE
        elif kind == 6:
            content[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**40, 2**63, 2**64 - 1, len(content))))
        else:
            content[at : at + 1] = rng.choice((b"\x00", b"\xff", b"\x80" * 20, b"\x0a\x00", b'"', b"[", b"}", b"1e999"))
    return bytes(content)


def damaged_shard(rng):
    """Return the bytes of a damaged shard; in half of the cases its checksums are right."""
    payloads = rng.choices(PAYLOADS, k=2)
    if rng.random() < 0.5:
        return damage_bytes(rng, b"".join(map(record, payloads)))
    if rng.random() < 0.3:  # features exchanged as a whole
        features = episode(2)
        features[rng.choice(list(features))] = rng.choice(list(episode(rng.randrange(4)).values()))
        return record(example(features)) + record(payloads[0])
    length = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)) if rng.random() < 0.1 else None
    return record(payloads[0]) + record(damage_bytes(rng, payloads[1]), length)


def wrong_value(rng):
    """Return a JSON value that is not what it should be."""
    numbers = (-1, 0, 1, 3, 1000, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"))
    others = (None, True, "", "no such backbone", "\0", "F32", "tiny", [], [[]], {}, [1, 2**62], ["a", 1], {"a": 1})
    return rng.choice(numbers) if rng.random() < 0.6 else copy.deepcopy(rng.choice(others))


def damage_json(rng, content):
    """Return a copy of a JSON value in which one to three entries, at any depth, are exchanged, removed or added."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and rng.random() < 0.9:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = wrong_value(rng)
            break
        if isinstance(node, dict) and rng.random() < 0.1:
            node[rng.choice(("extra", "", "text_length"))] = wrong_value(rng)
    return content


def damaged_run(rng, files):
    """Return {name: content} of a run directory of which one file is damaged; files: that of a valid one."""
    name = rng.choice(list(files))
    if rng.random() < 0.02:
        return {n: content for n, content in files.items() if n != name}
    if name == "model.safetensors":
        (size,) = struct.unpack("<Q", files[name][:8])
        header = files[name][8 : 8 + size]
        rest = files[name][8 + size :]
        if rng.random() < 0.5:
            return files | {name: damage_bytes(rng, files[name][: 8 + size]) + rest}
        if rng.random() < 0.2:
            return files | {name: files[name][: rng.randrange(len(files[name]))]}
        header = json.dumps(damage_json(rng, json.loads(header))).encode()
        return files | {name: struct.pack("<Q", len(header)) + header + rest}
    if rng.random() < 0.3:
        return files | {name: damage_bytes(rng, files[name])}
    if name == "config.json" and rng.random() < 0.4:
        config = json.loads(files[name])
        sizes = [key for key, value in config["model"].items() if type(value) is int]
        config["model"] |= {key: rng.choice(SIZES) for key in rng.sample(sizes, rng.randint(1, 2))}
        return files | {name: json.dumps(config).encode()}
    changed = {name: damage_json(rng, json.loads(files[name]))}
    if name == "dataset_statistics.json" and rng.random() < 0.5 and isinstance(changed[name].get("made"), dict):
        changed["config.json"] = json.loads(files["config.json"])
        # the hash matches
        changed["config.json"]["data"][0]["statistics"] = normalise.statistics_hash(changed[name]["made"])
    return files | {name: json.dumps(content).encode() for name, content in changed.items()}


# ----------------------------------------------------------------------------------------------------------------------
# One input after another


class Hang(BaseException):
    """Raised by the timer; no loader catches it."""


def raise_hang(*_):
    """Raise `Hang`: the handler of the timer's signal."""
    raise Hang(f"more than {SECONDS} s of CPU")


def check_call(function, objects, memory):
    """Return what is wrong with calling `function`, as text, or "".

    Wrong is an exception that is not allowed, more than `SECONDS` of CPU time, more than `objects` bytes of Python
    objects (if they are traced), or a process that grows by more than `memory` bytes beyond its peak so far.
    """
    before = peak_memory()
    traced = tracemalloc.is_tracing()
    if traced:
        tracemalloc.reset_peak()
        objects += tracemalloc.get_traced_memory()[0]
    signal.signal(signal.SIGPROF, raise_hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        function()
    except (ValueError, FileNotFoundError):
        pass
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error!s:.300}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if traced and tracemalloc.get_traced_memory()[1] > objects:
        return f"{tracemalloc.get_traced_memory()[1]} bytes of Python objects"
    growth = peak_memory() - before
    return f"the process grows by {growth} bytes" if growth > memory else ""


def peak_memory():
    """Return the most bytes that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def read_shard(path):
    """Read a shard to its end, as `data.py --check` does; then raise the first error, as indexing does."""
    errors = []

    def on_fault(fault, warning=False):
        if not warning:
            errors.append(fault)

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        writer = IndexWriter(Path(folder) / "index")
        rlds.scan_shards({path: 2}, FEATURES, b"", writer, on_fault)
        contents = read_index(writer.folder)
        for column in contents["columns"].values():
            assert len(column[:]) == contents["starts"][-1]
    if errors:
        raise errors[0]


def fuzz_shards(numbers, seed):
    """Return [(number, finding)] of the damaged shards with these numbers."""
    findings = []
    tracemalloc.start()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "shard"
        for number in numbers:
            path.write_bytes(damaged_shard(random.Random(f"{seed} {number}")))
            size = path.stat().st_size
            findings.append((number, check_call(lambda: read_shard(path), 64 * size + (256 << 10), 128 << 20)))
    tracemalloc.stop()
    return [(number, finding) for number, finding in findings if finding]


def fuzz_runs(numbers, seed):
    """Return [(number, finding)] of the damaged run directories with these numbers."""
    from policy import Policy

    findings = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        folder = Path(folder)
        runs = []
        for several in (False, True):
            write_run(folder, several)
            runs.append({path.name: path.read_bytes() for path in folder.iterdir()})
            Policy(folder, device="cpu")  # what is imported and cached takes no input's memory
        for number in numbers:
            damaged = damaged_run(random.Random(f"{seed} {number}"), runs[number // 10 % 2])
            for path in folder.iterdir():
                path.unlink()
            for name, content in damaged.items():
                (folder / name).write_bytes(content)
            memory = 16 * sum(map(len, damaged.values())) + (128 << 20)
            findings.append((number, check_call(lambda: Policy(folder, device="cpu"), 0, memory)))
    return [(number, finding) for number, finding in findings if finding]


def main():
    """Print findings and speed; exit with status 1 if there is a finding."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the name of a backbone can be damaged too
    config = tyro.cli(Config, description=__doc__)
    started = time.perf_counter()
    numbers = range(config.first, config.first + config.inputs)
    findings = fuzz_shards([n for n in numbers if n % 10], config.seed)
    findings += fuzz_runs([n for n in numbers if n % 10 == 0], config.seed)
    seconds = time.perf_counter() - started
    for number, finding in findings:
        print(f"python tests/fuzz.py --inputs 1 --seed {config.seed} --first {number}    # {finding}")
    count = len(findings)
    print(f"{config.inputs} inputs, {count} findings, {seconds:.0f} s, {config.inputs / seconds:.0f} inputs/s")
    raise SystemExit(int(count > 0))


if __name__ == "__main__":
    main()
