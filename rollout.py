"""Play episodes in a simulator: the policy's observations, videos, and simulators in processes of their own.

All actions of a chunk are executed before the next observation, as in OpenVLA-OFT's protocol, unless an episode says
otherwise (execution.py). `python rollout.py FD` is what `Process` runs.

A simulator is one file in this folder, named in SIMULATORS of eval.py. Nothing else knows it. LIBERO is sim.py. It has

    CAMERAS                  names of its cameras (those of the data sets that it can evaluate), a tuple or dict
    EMBODIMENT               name of the robot, as the descriptions of data sets call it
    ACTION_SIZE              A, the length of an action
    PROPRIO_SIZE             N, the length of the proprio
    SETTLE_STEPS             steps without motion that objects need to come to rest (for --replay)
    suites()                 {suite: [numbers of the tasks that can be played]}
    tasks(suite)             [names of all tasks of the suite]
    instructions(suite)      [instructions of all tasks of the suite]
    count_starts(suite, task)        starts among which seeds choose where widen is 0; 0: each seed has its own
    step_limit(suite)        number of steps after which a trial has failed
    versions()               {name: version} of all that decides an outcome; results of different versions do not mix
    Sim(suite, task, any_version)    one opened task; any_version: allow versions that are not the benchmark's

and an opened task has

    start(seed, widen, render)       go to the start that belongs to the seed; widen: half-width in m of the square in
                                     which the handled object is placed, 0 for the official place
    restore(seed, state)             go to a recorded simulator state (for --replay), cameras drawn
    step(action, render) -> bool     one step; whether the task is solved. action: f32 [A], a relative motion, then the
                                     gripper (-1 open, +1 close). Cameras need drawing only where render is True
    observe() -> dict                the drawn frames, {camera: u8 [h, w, 3]}; other keys are ignored
    proprio() -> f32 [N]             also where nothing was drawn
    spent                            {name of a part of the work: seconds since the task was opened}
    close()

ValueError from start or restore ends the evaluation, as the episode can never be played; after any other error (of
linear algebra too, which numpy derives from ValueError), a state that is not finite, a crash or a hang the episode is
tried again.

Axes: h, w pixels; H actions of a chunk; T steps of an episode; A values of an action; N values of the proprio.
"""

import contextlib
import importlib
import os
import socket
import struct
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from execution import Execution

TRIALS = 50  # per task, in the field's protocol
READ_LIMIT = 10  # s, for the rest of a message that has begun
HEADER = 44  # pixels, height of the text above a video

# ----------------------------------------------------------------------------------------------------------------------
# One episode


@dataclass(frozen=True, eq=False)
class Episode:
    """One trial, as it is sent to a simulator process."""

    simulator: str
    """module of the simulator"""
    suite: str
    task: int
    seed: int
    """of the start"""
    trial: int
    """number within the evaluation of its task"""
    instruction: str
    """of the task"""
    prompt: str
    """what the policy gets as the instruction"""
    max_steps: int
    """steps after which the trial has failed"""
    widen: float = 0.0
    """half-width in m of the square in which the handled object starts; 0: official"""
    cameras: dict = field(default_factory=dict)
    """camera -> side, or (height, width), of its black images; in the policy's order"""
    chunk: int = 8
    """actions that the policy predicts at once"""
    execute: int = 0
    """how many of them are executed before it is asked again; 0: all"""
    average: bool = False
    """execute the mean of the chunks that overlap"""
    blind: bool = False
    """black images, for which no camera is drawn"""
    black_camera: str = ""
    """a camera whose image alone is black"""
    swap_cameras: bool = False
    """the first two cameras are exchanged"""
    state: np.ndarray | None = None
    """recorded simulator state to begin from instead of the seed's start, f64"""
    actions: np.ndarray | None = None
    """recorded actions to play instead of a policy's, f32 [T, A]"""
    video: str = ""
    """path of the video, if any"""
    video_filter: str = "all"
    """which outcomes get a video: all or failures"""
    any_version: bool = False
    """allow versions of the simulator that are not the benchmark's"""


class CannotStart(Exception):
    """The start of an episode does not exist: it can never be played."""


def make_observation(sim, episode):
    """Return what the policy gets at this moment, with the episode's controls: see `policy.Policy`.

    Raise FloatingPointError when the simulator's state is not finite.
    """
    frames = {} if episode.blind else sim.observe()
    seen = list(episode.cameras)
    if episode.swap_cameras:
        seen[0], seen[1] = seen[1], seen[0]
    images = {}
    for (name, size), other in zip(episode.cameras.items(), seen):
        if episode.blind or name == episode.black_camera:
            images[name] = np.zeros((*np.broadcast_to(size, 2), 3), np.uint8)
        else:
            images[name] = frames[other]
    state = sim.proprio()
    if not np.isfinite(state).all():
        raise FloatingPointError(f"the simulator's state is {state}")
    return {"images": images, "state": state, "instruction": episode.prompt}


def go_to_start(sim, episode, render):
    """Go to the episode's start, recorded or official. render: draw the cameras there.

    Raise CannotStart where the simulator refuses it.
    """
    try:
        if episode.state is None:
            sim.start(episode.seed, episode.widen, render)
        else:
            sim.restore(episode.seed, episode.state)
    except np.linalg.LinAlgError:
        raise
    except ValueError as error:
        raise CannotStart(str(error)) from error


def play(sim, episode, act):
    """Play one episode with a policy; return (success, executed actions).

    act(observation) -> f32 [H, A], see `make_observation`. The cameras are drawn only where the policy gets them.
    """
    render = not episode.blind
    go_to_start(sim, episode, render)
    execution = Execution(episode.chunk, episode.execute, episode.average)
    executed = []
    success = False
    while len(executed) < episode.max_steps and not success:
        if execution.due:
            execution.add(act(make_observation(sim, episode)))
        action = execution.next()
        success = sim.step(action, render=render and execution.due)
        executed.append(action)
    return success, executed


def replay(sim, episode):
    """Play the episode's recorded actions without drawing; return (success, executed actions).

    Objects may come to rest a moment later than in the recording, so after its end the robot stands still for as long
    as settling takes.
    """
    go_to_start(sim, episode, render=False)
    no_motion = np.zeros_like(episode.actions[-1])
    no_motion[-1] = episode.actions[-1][-1]  # the gripper as it was
    executed = []
    for action in [*episode.actions, *[no_motion] * importlib.import_module(episode.simulator).SETTLE_STEPS]:
        executed.append(action)
        if sim.step(action):
            return True, executed
    return False, executed


# ----------------------------------------------------------------------------------------------------------------------
# Videos


def record_video(sim, episode, actions, success, report_alive):
    """Play executed actions again from the same start and write an MP4 (VP9) of every second step, 10 frames a second.

    It shows all cameras side by side under the prompt, the step and the outcome; its last frame stays for a second.
    report_alive() is called after every frame. Raise OSError when the video cannot be written.
    """
    import cv2

    partial = f"{episode.video}.part.mp4"
    go_to_start(sim, episode, render=True)
    height, width, _ = draw_frame(sim, episode, "").shape
    writer = cv2.VideoWriter(partial, cv2.VideoWriter_fourcc(*"vp09"), 10, (width, height))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {partial}")
    for number, action in enumerate(actions):
        last = number + 1 == len(actions)
        if number % 2 and not last:
            sim.step(action)
            continue
        sim.step(action, render=True)
        outcome = ""
        if last:
            outcome = ": success" if success else ": failure"
        picture = draw_frame(sim, episode, f"step {number + 1}{outcome}")
        for _ in range(10 if last else 1):
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))  # OpenCV wants BGR
        report_alive()
    writer.release()
    os.replace(partial, episode.video)


def draw_frame(sim, episode, status):
    """Return the camera frames side by side under the prompt and a line of status, u8 [h + HEADER, sum of w, 3]."""
    observed = sim.observe()
    frames = [Image.fromarray(observed[name]) for name in importlib.import_module(episode.simulator).CAMERAS]
    size = (sum(frame.width for frame in frames), max(frame.height for frame in frames) + HEADER)
    picture = Image.new("RGB", size)
    left = 0
    for frame in frames:
        picture.paste(frame, (left, HEADER))
        left += frame.width
    colour = "white"
    if "success" in status:
        colour = "lime"
    elif "failure" in status:
        colour = "tomato"
    draw = ImageDraw.Draw(picture)
    draw.text((6, 3), episode.prompt or "(no instruction)", "white", ImageFont.load_default(14))
    draw.text((6, 21), status, colour, ImageFont.load_default(14))
    return np.asarray(picture)


def contact_sheets(folder):
    """Write one PNG per task from the videos in `folder`, ten to a column: first, middle and last frame of each."""
    import cv2

    groups = {}
    finished = [path for path in folder.glob("*-seed*.mp4") if path.stem.rsplit("seed", 1)[1].isdigit()]  # not partial
    for path in sorted(finished, key=lambda path: int(path.stem.rsplit("seed", 1)[1])):
        groups.setdefault(path.stem.rsplit("-seed", 1)[0], []).append(path)
    for task, paths in groups.items():
        strips = [_strip(path) for path in paths]
        strips += [np.zeros_like(strips[0])] * (-len(strips) % min(10, len(strips)))
        height = min(10, len(strips))
        columns = [np.concatenate(strips[top : top + height]) for top in range(0, len(strips), height)]
        cv2.imwrite(str(folder / f"{task}.png"), np.concatenate(columns, 1))


def _strip(path):
    """Return the first, middle and last frame of a video side by side at half size, u8 [h / 2, 3 w / 2, 3] BGR."""
    import cv2

    video = cv2.VideoCapture(str(path))
    frames = []
    while (frame := video.read()[1]) is not None:
        frames.append(frame)
    chosen = (frames[0], frames[len(frames) // 2], frames[-1])
    halves = [cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for frame in chosen]
    return np.concatenate(halves, 1)


# ----------------------------------------------------------------------------------------------------------------------
# A simulator in a process of its own


class Process:
    """A simulator process, which may crash or hang without harm to the evaluation. `connection` yields (kind, content):

    ("open", None)                the episode's task is open
    ("observation", observation)  it waits for `act(actions)`
    ("alive", None)               it is recording a video
    ("done", result)              the episode ended: {"success", "steps", "spent"}; it waits for the next
    ("failed", text)              the episode raised an exception; it waits for the next
    ("refused", text)             the episode can never be played (CannotStart), and the process ends
    ("unopened", text)            the task cannot be opened, and the process ends
    """

    def __init__(self):
        self.connection, child_end = Pipe()
        command = [sys.executable, __file__, str(child_end.fileno())]
        self.child = subprocess.Popen(
            command,
            pass_fds=[child_end.fileno()],
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # ctrl-C is for the evaluation alone
        )
        child_end.close()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as handle:  # a read within a message may hang, too
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", READ_LIMIT, 0))

    def play(self, episode):
        """Send an episode to play."""
        self.connection.send(episode)

    def act(self, actions):
        """Send the actions that follow an observation, f32 [H, A]."""
        self.connection.send(actions)

    def exit_reason(self):
        """Return how the process ended, once its connection has broken."""
        try:
            code = self.child.wait(READ_LIMIT)
        except subprocess.TimeoutExpired:
            return "its simulator broke off"
        return f"its simulator died (signal {-code})" if code < 0 else f"its simulator ended (code {code})"

    def kill(self):
        """End the process and close the connection."""
        self.child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver
            self.child.wait(READ_LIMIT)
        self.connection.close()


def serve(connection):
    """Play the episodes that come through the connection until the other end closes it."""
    sim = None
    opened = None  # what `sim` is open for
    while True:
        episode = connection.recv()
        started = time.perf_counter()
        if sim is None or opened != (episode.simulator, episode.suite, episode.task):
            try:
                if sim:
                    sim.close()
                sim = importlib.import_module(episode.simulator).Sim(episode.suite, episode.task, episode.any_version)
            except Exception as error:
                traceback.print_exc()
                connection.send(("unopened", f"{type(error).__name__}: {error}"))
                return
            opened = (episode.simulator, episode.suite, episode.task)
        connection.send(("open", None))
        try:
            connection.send(("done", play_remotely(sim, episode, connection, time.perf_counter() - started)))
        except (EOFError, ConnectionError):
            raise
        except CannotStart as error:
            connection.send(("refused", str(error)))
            return
        except Exception as error:
            traceback.print_exc()
            sim.close()
            sim = None
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def play_remotely(sim, episode, connection, open_seconds):
    """Play one episode, with the policy at the other end of the connection, and record its video if it is to have one.

    Return {"success", "steps", "spent"}; spent: seconds of opening, of waiting for the policy and of the simulator's
    parts.
    """
    before = dict(sim.spent)
    spent = {"open": open_seconds, "wait": 0.0}

    def act(observation):
        sent = time.perf_counter()
        connection.send(("observation", observation))
        actions = connection.recv()
        spent["wait"] += time.perf_counter() - sent
        return actions

    if episode.actions is None:
        success, executed = play(sim, episode, act)
    else:
        success, executed = replay(sim, episode)
    spent |= {name: sim.spent[name] - before[name] for name in before}
    if episode.video and not (success and episode.video_filter == "failures"):
        try:
            record_video(sim, episode, executed, success, lambda: connection.send(("alive", None)))
        except Exception:  # the outcome is worth more than its video
            traceback.print_exc()
    spent = {name: round(seconds, 3) for name, seconds in spent.items()}
    return {"success": success, "steps": len(executed), "spent": spent}


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        pass  # the evaluation ended, or died
