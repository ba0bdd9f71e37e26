"""serve.py: real clients get the policy's own answers, and no client can disturb another."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from conftest import ROOT, printed
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import serve
from dataspec import PRESETS
from policy import Policy

TEXT = "put the bowl on the plate"
# What openpi-client 0.1.2 sends for an image, a state and a text, and what openpi answers.
SENT = (
    "hLFvYnNlcnZhdGlvbi9pbWFnZYTEC19fbmRhcnJheV9fw8QEZGF0YcQwAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygp"
    "KissLS4vxAVkdHlwZaN8dTHEBXNoYXBlkwQEA7FvYnNlcnZhdGlvbi9zdGF0ZYTEC19fbmRhcnJheV9fw8QEZGF0YcQIAACAPwAAIEDEBWR0eXBl"
    "ozxmNMQFc2hhcGWRAqZwcm9tcHSiZ2+hbstACAAAAAAAAA=="
)
ANSWERED = (
    "gqdhY3Rpb25zhMQLX19uZGFycmF5X1/DxARkYXRhxAgAAIA/AAAAQMQFZHR5cGWjPGY0xAVzaGFwZZIBAq1zZXJ2ZXJfdGltaW5ngahpbmZlcl9t"
    "c8s/+AAAAAAAAA=="
)


class Server:
    """A command of docs/serving.md in a process of its own, on a free port."""

    def __init__(self, run, printed_command, *options):
        words = [str(run.folder) if word == "RUN" else word for word in printed_command[1:]]
        command = [sys.executable, *words, "--port", "0", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        assert "serving" in line, line
        self.port = int(line.rsplit(":", 1)[1])

    @contextlib.contextmanager
    def client(self):
        """Yield (connection of openpi's kind, the greeting)."""
        with connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None) as connection:
            yield connection, msgpack.unpackb(connection.recv())

    def health(self):
        """Return what GET /health says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as reply:
            return json.load(reply)

    def stop(self):
        """End it as ctrl-C does; return (exit status, what else it printed)."""
        self.process.send_signal(signal.SIGINT)
        text = self.process.stdout.read()
        return self.process.wait(20), text


@pytest.fixture(scope="module")
def server(run):
    """A server that speaks openpi's protocol, to three clients at most, in messages of at most 2 MB."""
    made = Server(run, printed("python serve.py RUN"), "--batch", "3", "--max-clients", "3", "--max-message", "2")
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def policy(run):
    """The served policy."""
    made = Policy(run.folder, batch=3)
    made.reserve_text(64)
    return made


def observation(number):
    """Return an observation as a robot sends it, another for each number."""
    rng = np.random.default_rng(number)
    views = {name: rng.integers(0, 256, (60, 60, 3), dtype=np.uint8) for name in ("image", "wrist_image")}
    return {"images": views, "state": rng.uniform(-1, 1, 8).astype(np.float32), "instruction": TEXT}


def message(number, **changes):
    """Return that observation as openpi-client packs it."""
    seen = observation(number)
    values = {f"observation/{name}": image for name, image in seen["images"].items()}
    values |= {"observation/state": seen["state"], "prompt": seen["instruction"]} | changes
    return msgpack.packb({k: v for k, v in values.items() if v is not None}, default=serve.pack_openpi)


def ask(connection, number, **changes):
    """Send an observation; return the actions, or the text of the error."""
    connection.send(message(number, **changes))
    reply = connection.recv(timeout=30)
    return reply if isinstance(reply, str) else serve.unpack_openpi(reply)["actions"]


# ----------------------------------------------------------------------------------------------------------------------
# openpi


def test_messages_are_openpis_bytes():
    """Recorded from its own client: arrays, scalars and text are read; an answer is the same bytes."""
    read = serve.unpack_openpi(base64.b64decode(SENT))
    assert np.array_equal(read["observation/image"], np.arange(48).reshape(4, 4, 3)) and read["prompt"] == "go"
    assert read["observation/image"].dtype == np.uint8 and read["observation/state"].tolist() == [1, 2.5]
    answer = {"actions": np.array([[1, 2]], np.float32), "server_timing": {"infer_ms": 1.5}}
    assert msgpack.packb(answer, default=serve.pack_openpi) == base64.b64decode(ANSWERED)


def test_answers_are_the_policys(server, policy):
    """Two clients at once, each three times: bit for bit what the policy says at the same padded batch."""
    expected = [policy(observation(number)) for number in range(6)]

    def client(numbers):
        with server.client() as (connection, _):
            return [ask(connection, number) for number in numbers]

    with ThreadPoolExecutor(2) as pool:
        answers = [actions for part in pool.map(client, (range(3), range(3, 6))) for actions in part]
    assert all(map(np.array_equal, answers, expected))


def test_greeting_and_health_say_what_is_served(server, policy):
    """Cameras, chunk, instructions and ranges; ready, with the number of answers."""
    with server.client() as (connection, said):
        assert (said["cameras"], said["chunk"], said["gripper"]) == (policy.cameras, 8, "data")
        assert TEXT in said["instructions"] and said["state"]["max"] == policy.stats["proprio"]["max"]
        before = server.health()
        ask(connection, 0)
        after = server.health()
    assert before["status"] == "ok" and before["clients"] == 1 and after["answered"] == before["answered"] + 1


def test_observations_that_come_together_are_one_batch(run):
    """Four clients of a batch of three: two forward passes, each of three."""

    async def four():
        batcher = serve.Batcher(serve.Config(str(run.folder), batch=3, wait=0.5))
        batches, act = [], batcher.policy.act

        def count(prepared, gripper):
            batches.append(len(prepared))
            return act(prepared, gripper)

        batcher.policy.act = count
        running = asyncio.create_task(batcher.run())
        await asyncio.gather(*(batcher.ask(observation(number)) for number in range(4)))
        running.cancel()
        return batches

    assert asyncio.run(four()) == [3, 1]


FAULTS = {
    "no observation/wrist_image, but": {"observation/wrist_image": None},
    "channels first": {"observation/image": np.zeros((3, 60, 60), np.uint8)},
    "floats must lie in": {"observation/image": np.full((60, 60, 3), 9.0)},
    r"the state is float32 \(7,\); it must be 8 numbers": {"observation/state": np.zeros(7, np.float32)},
    "is not finite": {"observation/state": np.full(8, np.nan, np.float32)},
    "instruction is a int": {"prompt": 3},
    "tokens with its request, but 64 are reserved: start the server with a larger --text-length": {
        "prompt": "on " * 99
    },
}


@pytest.mark.parametrize("expected", FAULTS)
def test_faulty_observation_gets_an_error_and_the_next_an_answer(expected, server, policy):
    """The text says what was expected; the connection stays."""
    with server.client() as (connection, _):
        reply = ask(connection, 0, **FAULTS[expected])
        assert isinstance(reply, str) and re.search(expected, reply), reply
        assert np.array_equal(ask(connection, 1), policy(observation(1)))


def test_hostile_clients_disturb_nobody(server, policy):
    """Random bytes, maps that are none, arrays of objects or of the wrong size, text, half a message, one of 100 MB,
    and more clients than there is room for, while another is served as always."""
    expected = policy(observation(2))
    rng = np.random.default_rng(0)
    nasty = [rng.bytes(rng.integers(1, 2000)) for _ in range(12)]
    nasty += [msgpack.packb([1, 2]), b"", msgpack.packb({"a": 1})]
    array = {b"__ndarray__": True, b"data": b"1234", b"dtype": "|u1", b"shape": [5]}
    nasty += [msgpack.packb(array), msgpack.packb(array | {b"dtype": "|O"}), b"\x91" * 3000, "hello", b"one more"]
    with server.client() as (good, _):
        with server.client() as (bad, _):
            for sent in nasty:
                bad.send(sent)
                assert isinstance(bad.recv(timeout=20), str)
            with pytest.raises(ConnectionClosed, match="20 faulty messages in a row"):
                bad.recv(timeout=20)
        assert np.array_equal(ask(good, 2), expected)
        with pytest.raises(ConnectionClosed, match="1009"), server.client() as (large, _):
            large.send(bytes(100_000_000))
            large.recv(timeout=20)
        with server.client() as (half, _):
            half.socket.sendall(b"\x82\xfe\xff\xff1234half of a message")
            assert np.array_equal(ask(good, 2), expected)
            with server.client(), pytest.raises(InvalidStatus, match="503"), server.client():
                pass
            half.socket.shutdown(socket.SHUT_RDWR)
        assert np.array_equal(ask(good, 2), expected)
    deadline = time.monotonic() + 10
    while server.health()["clients"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.health()["clients"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# vla-eval


HARNESS = """
import json, sys
import numpy as np
from vla_eval.api import run
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

make_obs = LIBEROBenchmark.make_obs

def keep(self, *arguments):
    made = make_obs(self, *arguments)
    if not hasattr(self, "kept"):
        np.savez(sys.argv[2], state=made["states"], **made["images"])
    self.kept = True
    return made

LIBEROBenchmark.make_obs = keep
entry = {"benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark", "episodes_per_task": 1, "max_steps": 3}
entry |= {"params": {"suite": "libero_goal", "seed": 0}, "tasks": ["put the bowl on the plate"]}
(result,) = run({"benchmarks": [entry]}, server_url=sys.argv[1], no_save=True, docker=False)
print(json.dumps([[e["steps"], e["metrics"]] for task in result["tasks"] for e in task["episodes"]]))
"""


def test_vla_evals_own_clients(run, policy, sim, tmp_path):
    """Its connection: the greeting asks for wrist image, state and robosuite's rotations; a chunk is handed out action
    by action, anew in a new episode or where one restarts; an error does not end the session. Its LIBERO benchmark:
    three steps, and what it sends first is what this project's simulator shows at the same start. Then ctrl-C."""
    from vla_eval.connection import Connection

    server = Server(run, printed("python serve.py RUN --protocol vla-eval"), "--batch", "3", "--execute", "2")
    url = f"ws://127.0.0.1:{server.port}"

    def seen(number):
        images = observation(number)["images"]
        named = {"agentview": images["image"], "wrist": images["wrist_image"]}
        return {"images": named, "states": observation(number)["state"], "task_description": TEXT}

    async def session():
        async with Connection(url, timeout=30) as connection:
            wanted = connection.server_info["observation_params"]
            await connection.start_episode({"task": {"name": TEXT}})
            taken = [(await connection.act(seen(number)))["actions"] for number in (0, 1, 2)]
            await connection.end_episode({})
            await connection.start_episode({"task": {"name": TEXT}})
            taken.append((await connection.act(seen(3)))["actions"])
            await connection.start_episode({"task": {"name": TEXT}})
            with pytest.raises(Exception, match="the message has no wrist, but"):
                await connection.act({**seen(0), "images": {"agentview": seen(0)["images"]["agentview"]}})
            taken.append((await connection.act(seen(4)))["actions"])
            other = seen(1) | {"episode_restart": True}
            other["joint_state"] = other.pop("states")  # RoboTwin's name
            taken.append((await connection.act(other))["actions"])
            return wanted, taken

    wanted, taken = asyncio.run(session())
    assert wanted == {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
    chunks = {number: policy(observation(number), "robosuite") for number in range(5)}
    expected = [chunks[0][0], chunks[0][1], chunks[2][0], chunks[3][0], chunks[4][0], chunks[1][0]]
    assert all(map(np.array_equal, taken, expected))

    environment = os.environ | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    command = [sys.executable, "-c", HARNESS, url, str(tmp_path / "first.npz")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [[3, {"success": False}]]
    sim.start(0)
    frames = sim.observe()
    with np.load(tmp_path / "first.npz") as first:
        assert np.array_equal(first["agentview"], frames["image"])
        assert np.array_equal(first["wrist"], frames["wrist_image"])
        assert np.allclose(first["state"], sim.proprio(), atol=1e-6)
    with connect(url) as client:
        code, text = server.stop()
        with pytest.raises(ConnectionClosed, match="1001"):
            client.recv(timeout=10)
    assert code == 0 and "stopped after 7 answers" in text


def test_settings_that_cannot_work_are_refused(policy):
    """Before a client connects: no batch, what openpi's clients do not get, images that are not one name a camera."""
    for expected, changes in (
        ("batch is 0", {"batch": 0}),
        ("no effect with openpi", {"execute": 3}),
    ):
        with pytest.raises(ValueError, match=expected):
            serve.check_config(serve.Config("run", **changes))
    for images in (("one",), ("one", "one")):
        with pytest.raises(ValueError, match="image, wrist_image are called one.* in messages; name each"):
            serve.image_names(serve.Config("run", images=images), policy, [])


def test_gripper_of_a_benchmark_is_known_or_asked_for():
    """openpi's clients get the data's, LIBERO robosuite's; of CALVIN's policies (open is 1) nothing is assumed."""

    def chosen(preset, protocol="vla-eval", gripper=""):
        return serve.choose_gripper(serve.Config("run", protocol, gripper=gripper), PRESETS[preset])

    assert chosen("libero") == "robosuite" and chosen("calvin", "openpi") == "data"
    assert chosen("calvin", gripper="data") == "data" and chosen("libero", gripper="data") == "data"
    with pytest.raises(ValueError, match="--gripper data .open 1, closed -1; .* or --gripper robosuite"):
        chosen("calvin")


def test_server_listens_to_this_machine_alone_unless_told():
    """The default address is the loopback's."""
    assert serve.Config("run").host == "127.0.0.1"
