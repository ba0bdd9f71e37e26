"""Files that are never half written: text, JSON, and tensors with a checksum. Nothing is ever unpickled."""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shlex
import shutil
import struct
import subprocess
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}  # safetensors' names

# ----------------------------------------------------------------------------------------------------------------------
# Files


def fsync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path):
    """Yield a temporary name to write to, which becomes `path` once its contents are on the disk.

    After an error the temporary file is removed and what was at `path` stays.
    """
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically: a reader, also after a crash, sees the old file or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_json(path, content):
    """Write `content` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path):
    """Return the object in a JSON file. Raise ValueError naming the file when it holds none."""
    try:
        content = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}. Put the right file back.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.80}, not an object. Put the right file back.")
    return content


def file_hash(path):
    """Return the first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def to_json(config):
    """Return a config dataclass as a dictionary of JSON values; paths become strings."""
    return json.loads(json.dumps(asdict(config), default=str))


def check_writable(path, option):
    """Raise PermissionError naming the `option` that chooses it unless the file or folder `path` can be written."""
    path = Path(path).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.exists(place))
    if existing != path and not existing.is_dir():
        raise PermissionError(f"{path} cannot be made: {existing} is a file. Choose another place with {option}")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {existing} is read-only. Choose another place with {option}")


def make_folder(path, option):
    """Make a folder unless it is there. Raise PermissionError naming the `option` that chooses it when that fails."""
    check_writable(path, option)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:  # what os.access does not know of
        raise PermissionError(f"{path} cannot be made: {error}. Choose another place with {option}") from error


@contextlib.contextmanager
def locked(path, wait=False):
    """Lock a file that stands for something that one process at a time may do; yield the file.

    wait: until no other process has it. Yield None where another has it. Where the file system knows no locks, warn and
    yield the file unlocked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        yield file if lock(file, wait) else None


def lock(file, wait=False):
    """Lock an open file, and return whether this process has it; wait: as of `locked`.

    Where the file system knows no locks, warn and return True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"WARNING: {file.name} cannot be locked ({error}): let no two processes work on it at a time", flush=True)
    return True


def check_new_folder(path):
    """Raise FileExistsError when the folder of a run holds something, for no run is ever overwritten.

    Raise PermissionError when it cannot be made.
    """
    check_writable(path, "--out")
    path = Path(path)
    if path.is_file() or (path.exists() and any(path.iterdir())):
        raise FileExistsError(
            f"output folder {path} exists and is not empty. Choose another --out, or continue it with --resume."
        )


def resolve_folder(name, known=()):
    """Return the full path of a folder, so that it is found from elsewhere; a name on the Hub, or known, as it is.

    Raise FileNotFoundError for what can only be a folder, and is none.
    """
    if name in known:
        return name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}; give one, or a name on the Hub as OWNER/NAME")
    return name


def shell_command(*words, **options):
    """Return a command line as a shell takes it: words, then each option as --name and its value, or several values.

    True is a flag alone, False one with --no-; an option that is empty or None is left out.
    """
    words = list(map(str, words))
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in ("", None, (), []):
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)


def at_least(config, least):
    """Raise ValueError naming the setting of `config` that is below its `least` value, {name: value}, or no number.

    None, a setting that was not given, passes.
    """
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name} is {value}; it must be at least {low}")


def option_names(text):
    """Return the names of the options in a part of a command line, {"--max-steps", ...}."""
    return {word.partition("=")[0].replace("_", "-") for word in shlex.split(text) if word.startswith("--")}


def git_commit():
    """Return the git commit of this code, with '+' when files differ from it; 'unknown' without git or a checkout."""
    if not shutil.which("git"):
        return "unknown"
    head = _git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return "unknown"
    modified = _git("status", "--porcelain", "--untracked-files=no").stdout
    return head.stdout.strip() + ("+" if modified else "")


def _git(*arguments):
    return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def checksum(tensors, info):
    """Return a CRC-32, as hex digits, over metadata and names, dtypes, shapes and bytes of contiguous CPU tensors."""
    lines = [*sorted(info.items())]
    for name, tensor in sorted(tensors.items()):
        lines += [name, tensor.dtype, *tensor.shape, zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())]
    return f"{zlib.crc32(repr(lines).encode()):08x}"


def save_tensors(path, tensors, **info):
    """Write a safetensors file atomically, with `info` (as strings) and a checksum as its metadata.

    Equal contents are equal bytes. Raise OSError when it cannot be written; what was there before stays.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    info = {name: str(value) for name, value in info.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(tensors, temporary, info | {"checksum": checksum(tensors, info)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        _sort_metadata(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read


def _sort_metadata(path):
    """Sort the metadata of a safetensors file, which stands in random order: equal contents become equal bytes."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def load_tensors(path):
    """Return (tensors, metadata) of a safetensors file. Raise ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            info = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    _check_checksum(path, tensors, info)
    return tensors, info


def read_metadata(path):
    """Return the metadata of a safetensors file, without reading, or checking, its tensors."""
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def saved_step(path):
    """Return the update after which `save_tensors` wrote a file, its `step`; -1 for none, or a damaged one."""
    try:
        return int(load_tensors(path)[1].get("step", -1))
    except (ValueError, OSError):
        return -1


def _check_checksum(path, tensors, info):
    """Take the checksum from a file's metadata and raise ValueError when it is another; other writers store none."""
    stored = info.pop("checksum", None)
    if stored:
        computed = checksum(tensors, info)
        if stored != computed:
            raise ValueError(f"{path} is damaged: its checksum is {computed}, but {stored} when it was written")


def map_tensors(path):
    """Return (tensors, metadata) as `load_tensors`, but tensors are mapped into memory instead of read.

    The file is read once to compare its checksum. Changes to the tensors stay in this process.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack("<Q", mapped[:8])
        header = json.loads(mapped[8 : 8 + length])
        info = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            flat = torch.frombuffer(
                mapped, dtype=dtype, offset=8 + length + start, count=(stop - start) // dtype.itemsize
            )
            tensors[name] = flat.view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    _check_checksum(path, tensors, info)
    mapped.madvise(mmap.MADV_DONTNEED)  # what was read for the checksum leaves memory
    return tensors, info


def locate_tensors(path):
    """Return ({name: (numpy dtype, shape, first byte)}, metadata): where the tensors of a safetensors file lie in it.

    The file is read once to compare its checksum, and raises as `map_tensors`.
    """
    tensors, info = map_tensors(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    places = {}
    for name, tensor in tensors.items():
        start, _ = header[name]["data_offsets"]
        places[name] = tensor.numpy().dtype, tuple(tensor.shape), 8 + length + start
    return places, info
