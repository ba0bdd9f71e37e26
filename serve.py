"""Serve a trained run over a websocket, to robots and to other projects' benchmarks.

    python serve.py runs/NAME                           # openpi's protocol: what openpi-client and most robots speak
    python serve.py runs/NAME --protocol vla-eval       # for `vla-eval run`: played with LIBERO

Requests that come together are answered as one batch of one size, compiled before the first connection is accepted.
GET /health answers when the server is ready. A message that is malformed, too large or of the wrong shape gets an error
and disturbs nobody else. docs/serving.md has a command for each client.

openpi: the server speaks first and sends its metadata; then each message is one observation, a MessagePack map with
"observation/<camera>", "observation/state" and "prompt", and the answer is {"actions": f32 [H, A], "server_timing"}.
vla-eval: the client speaks first; see `VlaEval`.

Axes: H chunk steps, A action size.
"""

import asyncio
import http
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import msgpack
import numpy as np
import tyro
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from execution import Execution
from files import at_least
from policy import GRIPPERS, Policy

KINDS = "biuf"  # of numpy arrays in messages: numbers
MOST_FAULTS = 20  # faulty messages in a row after which a connection is closed


@dataclass
class Config:
    """Settings of `python serve.py`."""

    run: tyro.conf.Positional[str]
    """folder of a trained run, or a Hub repository owner/name"""
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    """what the clients speak"""
    host: str = "127.0.0.1"
    """address to listen at: this machine alone; 0.0.0.0 for all, without any password"""
    port: int = 8000
    """port to listen at, 0 for any free one"""
    gripper: Literal["", *GRIPPERS] = ""
    """convention of the gripper in the answers (default: data's for openpi, robosuite's for vla-eval with LIBERO)"""
    execute: int = 0
    """vla-eval: actions of each chunk that are executed before the policy is asked again (default: all)"""
    average_chunks: bool = False
    """vla-eval: with a small --execute, execute the mean of the chunks that overlap"""
    images: tuple[str, ...] = ()
    """names of the images in messages, in the order of the policy's cameras
    (default: openpi's observation/<camera>, vla-eval's agentview and wrist)"""
    batch: int = 8
    """observations answered at once; smaller batches are padded to it"""
    wait: float = 0.002
    """seconds to wait for more observations before a batch that is not full is answered"""
    text_length: int = 0
    """tokens reserved for an instruction with its request; longer ones are refused (default: 64, or training's)"""
    max_message: float = 32.0
    """largest message in MB"""
    max_clients: int = 64
    """connections at a time; more are turned away"""
    data: str = ""
    """data set whose statistics to use, by name (needed only when the run was trained on several)"""
    backbone: str = ""
    """where the pretrained backbone lies now, if it was moved"""
    device: str = ""
    """cuda or cpu (default: the GPU when there is one)"""


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def check_config(config):
    """Raise ValueError naming the setting and the value of what cannot work, before anything is loaded."""
    at_least(config, {"batch": 1, "max_clients": 1})
    if config.protocol == "openpi" and (config.execute or config.average_chunks):
        raise ValueError("execute and average_chunks have no effect with openpi, whose clients get whole chunks")


def choose_gripper(config, spec):
    """Return the convention of the gripper in the answers. Raise ValueError where a benchmark's is not known.

    spec: `DataSpec` of the policy's data.
    """
    if config.gripper or config.protocol == "openpi" or not spec.grippers:
        return config.gripper or "data"
    if spec.embodiment == "libero":
        return "robosuite"
    stored = "; ".join(f"open {gripper.open:g}, closed {gripper.closed:g}" for gripper in spec.grippers)
    raise ValueError(
        f"benchmarks of vla-eval differ in what opens a gripper, and which will call a policy of {spec.embodiment} is "
        f"not known: give --gripper data ({stored}; right for CALVIN's and RoboTwin's own data) or --gripper robosuite "
        "(open -1, closed 1)"
    )


class Batcher:
    """Answers observations that come together as one batch, always on the one thread that loaded the policy."""

    def __init__(self, config):
        """Load the policy and compile it. Raise as `Policy`."""
        self.config = config
        self.answered = 0
        self.queue = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1, "policy")  # CUDA graphs belong to a thread
        self.policy = self.thread.submit(self._load).result()
        self.gripper = choose_gripper(config, self.policy.spec)

    def _load(self):
        config = self.config
        policy = Policy(
            config.run, data=config.data, device=config.device, batch=config.batch, backbone=config.backbone
        )
        policy.reserve_text(config.text_length or 64)
        policy.warm_up()
        return policy

    async def ask(self, observation):
        """Return the actions f32 [H, A] of an observation. Raise ValueError for one that is faulty."""
        prepared = await asyncio.to_thread(self._prepare, observation)
        answer = asyncio.get_running_loop().create_future()
        await self.queue.put((prepared, answer))
        return await answer

    def _prepare(self, observation):
        prepared = self.policy.prepare(observation)
        tokens = self.policy.tokens_needed([observation["instruction"]])
        if tokens > self.policy.text_length:
            raise ValueError(
                f"the instruction takes {tokens} tokens with its request, but {self.policy.text_length} are reserved: "
                "start the server with a larger --text-length"
            )
        return prepared

    async def run(self):
        """Answer what is asked, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            deadline = loop.time() + self.config.wait
            while len(batch) < self.config.batch and (left := deadline - loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self.queue.get(), left))
                except TimeoutError:
                    break
            prepared, answers = zip(*batch)
            try:
                chunks = await loop.run_in_executor(self.thread, self.policy.act, list(prepared), self.gripper)
            except Exception as error:  # of the GPU, say: those who asked get the error, and the server goes on
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            self.answered += len(batch)
            for answer, chunk in zip(answers, chunks):
                if not answer.done():  # its client has gone
                    answer.set_result(chunk)

    def metadata(self):
        """Return what a client may want to know, of plain values."""
        policy = self.policy
        known = {
            "run": str(self.config.run),
            "variant": policy.run_config["train"]["variant"],
            "data": policy.name,
            "cameras": policy.cameras,
            "chunk": policy.chunk,
            "gripper": self.gripper,
            "instructions": policy.data_entry["instructions"],
            "action": {name: policy.stats["action"][name] for name in ("min", "max", "mean", "std")},
        }
        if policy.state:
            known["state"] = {name: policy.stats["proprio"][name] for name in ("min", "max", "mean", "std")}
        return known


# ----------------------------------------------------------------------------------------------------------------------
# Protocols


def pick(message, cameras, names, state, text):
    """Return the `Policy`'s observation in a message.

    names: of the images of the cameras; state, text: of the others. Raise ValueError for what is missing.
    """
    wanted = [*names, state, text]
    if missing := [name for name in wanted if name not in message]:
        raise ValueError(f"the message has no {', '.join(missing)}, but {', '.join(map(str, message)) or 'nothing'}")
    images = {camera: message[name] for camera, name in zip(cameras, names)}
    return {"images": images, "state": message[state], "instruction": message[text]}


def image_names(config, policy, default):
    """Return what messages call the images of the policy's cameras. Raise ValueError unless each has its own name."""
    names = list(config.images or default)
    if len(set(names)) != len(policy.cameras) or len(names) != len(policy.cameras):
        raise ValueError(
            f"the policy's cameras {', '.join(policy.cameras)} are called {', '.join(names)} in messages; name each "
            "once with --images"
        )
    return names


class OpenPi:
    """openpi's protocol (github.com/Physical-Intelligence/openpi): the server speaks first.

    Arrays are {b"__ndarray__": True, b"data": bytes, b"dtype": "|u1", b"shape": [...]}. An error is a text message.
    """

    def __init__(self, batcher, config):
        self.batcher = batcher
        self.names = image_names(config, batcher.policy, [f"observation/{name}" for name in batcher.policy.cameras])

    def greeting(self):
        """Return the first message."""
        return msgpack.packb(self.batcher.metadata())

    async def answer(self, data):
        """Return the answer to one message. Raise ValueError for a faulty one."""
        started = time.monotonic()
        message = unpack_openpi(data)
        cameras = self.batcher.policy.cameras
        state = "observation/state" if self.batcher.policy.state else "prompt"
        actions = await self.batcher.ask(pick(message, cameras, self.names, state, "prompt"))
        timing = {"infer_ms": 1000 * (time.monotonic() - started)}
        return msgpack.packb({"actions": actions, "server_timing": timing}, default=pack_openpi)

    def fault(self, data, error):
        """Return the message that says to a client what was wrong."""
        return f"{type(error).__name__}: {error}"


def pack_openpi(value):
    """Return an array as openpi's map, for MessagePack."""
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def unpack_openpi(data):
    """Return the map in a message. Raise ValueError where there is none, or an array is not one of numbers."""

    def unpack(value):
        if b"__ndarray__" in value:
            return make_array(value[b"data"], value[b"dtype"], value[b"shape"])
        if b"__npgeneric__" in value:
            return np.dtype(value[b"dtype"]).type(value[b"data"])
        return value

    message = msgpack.unpackb(data, object_hook=unpack)
    if not isinstance(message, dict):
        raise ValueError(f"the message is a {type(message).__name__}, not a map")
    return message


def make_array(data, dtype, shape):
    """Return the array in a message. Raise ValueError for one that is not of numbers, or of another size."""
    kind = np.dtype(dtype)
    if kind.kind not in KINDS:
        raise ValueError(f"an array is {dtype}; it must hold numbers")
    return np.frombuffer(data, kind).reshape(shape)


class VlaEval:
    """The protocol of vla-eval (its package `vla_eval` en- and decodes the messages): the client speaks first.

    The answer to its greeting asks the benchmark for the wrist image, the state, and rotation vectors as robosuite
    computes them (`quat_no_antipodal`), and says what the actions mean. Each observation gets one action; the policy is
    asked when those of the last chunk are used up.
    """

    def __init__(self, batcher, config):
        from vla_eval.protocol import messages

        self.messages = messages
        self.batcher = batcher
        policy = batcher.policy
        views = ["wrist" if "wrist" in camera else "agentview" for camera in policy.cameras]
        self.names = image_names(config, policy, views)
        self.execution = Execution(policy.chunk, config.execute, config.average_chunks)

    def greeting(self):
        """Return the first message: none."""

    async def answer(self, data):
        """Return the answer to one message, None if it has none. Raise ValueError for a faulty one."""
        message = await asyncio.to_thread(self.messages.unpack_message, data)
        kinds = self.messages.MessageType
        if not isinstance(message.payload, dict):
            raise ValueError(f"the payload is a {type(message.payload).__name__}, not a map")
        if message.type == kinds.HELLO:
            return self._pack(kinds.HELLO, self.messages.make_hello_payload(**self._introduction()), message.seq)
        if message.type == kinds.EPISODE_START:
            self.execution.reset()
        if message.type == kinds.OBSERVATION:
            return self._pack(kinds.ACTION, {"actions": await self._next_action(message.payload)}, message.seq)

    async def _next_action(self, payload):
        if payload.get("episode_restart"):  # CALVIN: the next instruction of a sequence
            self.execution.reset()
        if self.execution.due:
            images = payload.get("images")
            if not isinstance(images, dict):
                raise ValueError(f"the observation has no map of images, but {', '.join(map(str, payload))}")
            policy = self.batcher.policy
            state = "task_description"
            if policy.state:
                state = "joint_state" if "joint_state" in payload else "states"  # the former is RoboTwin's name
            observation = pick(images | payload, policy.cameras, self.names, state, "task_description")
            self.execution.add(await self.batcher.ask(observation))
        return self.execution.next()

    def fault(self, data, error):
        """Return the message that says to a client what was wrong."""
        try:
            number = self.messages.unpack_message(data).seq
        except Exception:  # not even that can be read
            number = 0
        return self._pack(self.messages.MessageType.ERROR, {"error": f"{type(error).__name__}: {error}"}, number)

    def _pack(self, kind, payload, number):
        return self.messages.pack_message(self.messages.Message(kind, payload, number))

    def _introduction(self):
        """Return what the greeting says of this server."""
        from vla_eval import specs

        policy = self.batcher.policy
        shown = {"language": specs.LANGUAGE} | {name: specs.IMAGE_RGB for name in self.names}
        params = {"send_wrist_image": len(self.names) > 1}
        if policy.state:
            params |= {"send_state": True, "quat_no_antipodal": True}
        said = {"model_server": "latent-actions", "capabilities": {}, "observation_params": params}
        if policy.spec.embodiment == "libero":
            shown |= {"state": specs.STATE_EEF_POS_AA_GRIP} if policy.state else {}
            acted = {"position": specs.POSITION_DELTA, "rotation": specs.ROTATION_AA}
            acted["gripper"] = specs.GRIPPER_CLOSE_POS
            said["action_spec"] = {name: spec.to_dict() for name, spec in acted.items()}
        return said | {"observation_spec": {name: spec.to_dict() for name, spec in shown.items()}}


PROTOCOLS = {"openpi": OpenPi, "vla-eval": VlaEval}


# ----------------------------------------------------------------------------------------------------------------------
# Connections


async def talk(connection, protocol):
    """Answer the messages of one client until it leaves, or sends nothing but faulty ones."""
    faults = 0
    try:
        if greeting := protocol.greeting():
            await connection.send(greeting)
        async for data in connection:
            try:
                if isinstance(data, str):
                    raise ValueError(f"the message is the text {data[:80]!r}, not bytes")
                answer = await protocol.answer(data)
                faults = 0
            except ConnectionClosed:
                raise
            except Exception as error:  # whatever a client may send
                faults += 1
                print(f"{connection.remote_address}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
                answer = protocol.fault(data, error)
            if answer is not None:
                await connection.send(answer)
            if faults >= MOST_FAULTS:
                await connection.close(1008, f"{faults} faulty messages in a row")
                return
    except ConnectionClosed:  # in the middle of a message, or one that is too large: the client knows why
        pass


async def listen(config, batcher, ready=None):
    """Serve until SIGINT or SIGTERM. ready: function(port), called when connections are accepted."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    clients = set()

    async def handle(connection):
        clients.add(connection)
        try:
            await talk(connection, PROTOCOLS[config.protocol](batcher, config))
        finally:
            clients.discard(connection)

    def before(connection, request):
        if request.path.startswith("/health"):
            text = json.dumps({"status": "ok", "clients": len(clients), "answered": batcher.answered})
            return connection.respond(http.HTTPStatus.OK, text + "\n")
        if len(clients) >= config.max_clients:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, f"{len(clients)} clients are served already\n"
            )
        return None

    PROTOCOLS[config.protocol](batcher, config)  # raises what each connection's would
    working = asyncio.create_task(batcher.run())
    limits = dict(max_size=int(config.max_message * 1e6), compression=None, process_request=before)
    # Clients that compile or render do not answer for a while: wait for them, but not for ever.
    async with serve(handle, config.host, config.port, ping_interval=60, ping_timeout=600, **limits) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"serving {config.run} with {config.protocol}'s protocol at ws://{config.host}:{port}", flush=True)
        if ready:
            ready(port)
        await stop.wait()
        print(f"stopped after {batcher.answered} answers", flush=True)
    working.cancel()


def main(config):
    """Load a run and serve it."""
    check_config(config)
    asyncio.run(serve_run(config))


async def serve_run(config, ready=None):
    """Serve within a running loop; see `listen`."""
    await listen(config, Batcher(config), ready)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
