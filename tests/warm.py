"""Scripts in processes of their own that need not import torch and transformers, which takes 4 s of CPU time.

They are forked from a process that has imported both and has done nothing else. And what runs, below which process.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def warm_context():
    """Return the context of `multiprocessing` whose processes have the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.qwen3_vl.modeling_qwen3_vl"])
    return context


@contextlib.contextmanager
def running(words, output, ranks=1):
    """Yield the `Process`es of a script, run as `python WORDS`, or as torchrun starts it on several `ranks`.

    Each is in the project's folder and in a session of its own, which is killed at the end. output: file for what all
    print, errors too.
    """
    environment = dict(os.environ)
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        arguments = [*map(str, words)], output, environment | ({"RANK": str(rank)} if ranks > 1 else {})
        processes.append(warm_context().Process(target=_become, args=arguments))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started
            process.join()


def call_on_ranks(function, ranks, *arguments):
    """Call function(rank, ranks, *arguments) in a process for each of `ranks`; raise what one of them raises."""
    from torch.multiprocessing import start_processes

    warm_context()
    start_processes(function, (ranks, *arguments), nprocs=ranks, start_method="forkserver")


def free_port():
    """Return the number of a TCP port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_running(pid):
    """Return whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid):
    """Return the process ids of a process's children, and theirs."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(child)]
    return found


def wait_for(condition, seconds=120):
    """Return when it holds; fail when it does not within some time."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def _become(words, output, environment):
    """Let this process be that of a script."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
