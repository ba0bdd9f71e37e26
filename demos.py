"""Record demonstrations in LIBERO with a scripted expert and write them as an RLDS data set.

    python demos.py --suite libero_goal --task-ids 1 4 8 --widen 0.06 --out data/my_demos   # 20 CPU seconds an episode
    python demos.py --suite libero_object --episodes 5 --dry-run         # only check the expert, write nothing

The data set has exactly the features of openvla/modified_libero_rlds, and in `episode_metadata` what an exact replay
needs: `Sim(suite, task).restore(seed, state)`, then the recorded actions. An interrupted first command continues when
it is started again. Left out: tasks with drawers, knobs or pushing.

Axes: n, m points; k points of a path.
"""

import io
import json
import multiprocessing
import os
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from images import encode_image
from rollout import TRIALS
from sim import CAMERAS, GRID, MAX_STEPS, Sim, instructions, versions

TIP = 0.005  # m, the fingertips end this far below the grip site
OPEN = -1.0  # the last value of an action
CLOSE = 1.0
RIM_DEPTH = 0.02  # m, bowls and mugs are held this far below their rim
WIDEST = 0.074  # m, widest part that fits between the open fingers
MARGIN = 0.02  # m, kept above obstacles while travelling
DROP = 0.01  # m, height of the release above the support
SHARD_BYTES = 8_000_000  # of staged data per shard, roughly

# ----------------------------------------------------------------------------------------------------------------------
# The expert


def tops(points):
    """Return the highest point of each GRID cell, f64 [m, 3], which is all that matters to what passes above.

    points: f64 [n, 3].
    """
    points = points[np.argsort(-points[:, 2])]
    _, first = np.unique(np.round(points[:, :2] / GRID).astype(int), axis=0, return_index=True)
    return points[first]


def half_turn(angle):
    """Wrap an angle to [-pi/2, pi/2): a parallel gripper is the same after half a turn."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2


class Expert:
    """A controller that picks and places what the task's goal names, from the simulator's privileged state.

    Closed loop: every action is computed from where things are now, so it recovers from disturbances and picks again
    after a slip. Lengths in m, angles in rad, world frame.
    """

    def __init__(self, sim):
        self.sim = sim

    def reset(self):
        """Plan anew; call after every start() or restore().

        Raise ValueError for a goal that is not to pick and place.
        """
        self.goal = self.sim.world.parsed_problem["goal_state"]
        if odd := [state for state in self.goal if len(state) != 3 or state[0] not in ("on", "in")]:
            raise ValueError(f"the expert only picks and places; {self.sim.suite} task {self.sim.task} is {odd[0]}")
        closing = self.sim.gripper()[1][:, 0]
        self.yaw = np.arctan2(closing[1], closing[0])
        self.plan = self._task()

    def act(self):
        """Return the next action, f32 [7]."""
        return next(self.plan)

    def _task(self):
        """Yield actions that carry what is not yet where the goal wants it, then hold still."""
        while True:
            for relation in self.goal:
                if not self.sim.world._eval_predicate(relation):
                    yield from self.carry(*relation[1:])
            yield self.servo(self.grip_position(), self.yaw, OPEN)

    # Measurements

    def grip_position(self):
        """Return the position of the grip site, f64 [3]."""
        return self.sim.gripper()[0]

    def yaw_error(self, yaw):
        """Return the signed rotation that remains until the fingers close along yaw."""
        closing = self.sim.gripper()[1][:, 0]
        return half_turn(yaw - np.arctan2(closing[1], closing[0]))

    def obstacles(self, *without):
        """Return the points of all objects and fixtures but the named ones, f64 [n, 3]."""
        return np.concatenate([self.sim.points(name) for name in self.sim.world.obj_body_id if name not in without])

    # Control

    def servo(self, goal, yaw, grip):
        """Return the action that moves the grip site towards goal, upright and turned to yaw, f32 [7]."""
        tilt = np.cross(self.sim.gripper()[1][:, 2], [0, 0, -1])
        move = np.clip(25 * (goal - self.grip_position()), -1, 1)
        rotate = np.clip(2.5 * (0.6 * tilt + [0, 0, self.yaw_error(yaw)]), -1, 1)
        return np.concatenate([move, rotate, [grip]]).astype(np.float32)

    def steer(self, goal, tall, offset, hang, radius):
        """Return a waypoint on the way to goal, f64 [3]: up and over the obstacles, then down a funnel.

        tall: f64 [m, 3], tops of the obstacles. offset: xy from the grip site to the middle of what must not touch
        them, hang: its depth below the site, radius: its half width.
        """
        here = self.grip_position()
        far = np.linalg.norm(goal[:2] - here[:2])
        path = np.linspace(here[:2], goal[:2], int(far / GRID) + 2)  # [k, 2]
        tall = tall[tall[:, 2] + hang + MARGIN > min(goal[2], here[2])]  # [m, 3]
        near = np.linalg.norm(path[:, None] + offset - tall[:, :2], axis=-1) < radius  # [k, m]
        need = np.where(near, tall[:, 2], -np.inf).max(1, initial=-np.inf) + hang + MARGIN  # [k]
        need[np.linalg.norm(path - goal[:2], axis=1) < 0.03] = -np.inf  # the funnel's part
        blocked = np.flatnonzero(need > here[2] + 0.01)
        ahead = path[max(blocked[0] - 1, 0)] if len(blocked) else goal[:2]
        funnel = goal[2] + np.clip(2.5 * (far - 0.012), 0, 0.08)
        return np.append(ahead, max(funnel, need.max()))

    # Primitives: generators of actions

    def carry(self, name, target):
        """Pick up an object and put it on or into the target; end early after a slip."""
        place, self.yaw = self.grasp(name)
        yield from self.reach(place - self.sim.position(name), name)
        yield from self.close()
        if (yield from self.bring(name, target)):
            yield from self.release()

    def reach(self, grip, name):
        """Bring the open fingers around the object; grip: vector from its middle to the grip site, f64 [3]."""
        tall = tops(self.obstacles())
        for _ in range(150):
            goal = self.sim.position(name) + grip
            error = np.abs(goal - self.grip_position())
            if np.linalg.norm(error[:2]) < 0.008 and error[2] < 0.006 and abs(self.yaw_error(self.yaw)) < 0.12:
                return
            yield self.servo(self.steer(goal, tall, 0, TIP, 0.04), self.yaw, OPEN)

    def close(self):
        """Close until the fingers stop."""
        here = self.grip_position()
        before = np.inf
        for step in range(14):
            yield self.servo(here, self.yaw, CLOSE)
            if step > 3 and before - self.sim.gripper()[2] < 0.003:
                return
            before = self.sim.gripper()[2]

    def bring(self, name, target):
        """Carry the held object over the target and down to it; return False as soon as it has slipped, else True."""
        tall = tops(self.obstacles(name))
        aim = self.aim(target)
        held = self.sim.position(name) - self.grip_position()
        for _ in range(200):
            grip_position = self.grip_position()
            points = self.sim.points(name)
            shift = self.sim.position(name) - grip_position
            if np.linalg.norm(shift - held) > 0.03:
                return False
            hang = grip_position[2] - points[:, 2].min()
            middle = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
            radius = np.linalg.norm(points[:, :2] - middle, axis=1).max()
            goal = aim + [-shift[0], -shift[1], hang]
            if np.linalg.norm(goal[:2] - grip_position[:2]) < 0.015 and grip_position[2] - goal[2] < 0.01:
                return True
            yield self.servo(self.steer(goal, tall, middle - grip_position[:2], hang, radius), self.yaw, CLOSE)
        return True

    def release(self):
        """Open the fingers, then go up."""
        here = self.grip_position()
        for step in range(16):
            yield self.servo(here + [0, 0, 0.1 * (step > 4)], self.yaw, OPEN)

    # Where to hold and where to put

    def aim(self, target):
        """Return where the lowest point of what is put on the target goes, f64 [3]."""
        world = self.sim.world
        centre = world.object_states_dict[target].get_geom_state()["pos"]
        site = world.object_sites_dict.get(target)
        body = site.parent_name if site else target
        points = self.sim.points(body) if body in world.obj_body_id else centre[None]
        under = points[np.linalg.norm(points[:, :2] - centre[:2], axis=1) < 0.025]
        height = under[:, 2].max() if len(under) else centre[2]
        return np.append(centre[:2], height + DROP)

    def grasp(self, name):
        """Return (place, yaw) of the best grasp: grip site position, f64 [3], and angle of the closing axis."""
        points = self.sim.points(name)
        hollow = any(word in name for word in ("bowl", "mug"))
        options = rim_grasps(points) if hollow else body_grasps(points)
        others = self.obstacles(name)
        others = others[np.linalg.norm(others[:, :2] - points[:, :2].mean(0), axis=1) < 0.25]

        def total_cost(option):
            place, yaw, cost = option
            return cost + abs(self.yaw_error(yaw)) + clearance_cost(others, place, yaw)

        place, yaw, _ = min(options, key=total_cost)
        return place, yaw


def rim_grasps(points):
    """Return [(place [3], yaw, cost)] on the rim of a bowl or mug, preferring the robot's left side of it.

    points: f64 [n, 3], those of the object.
    """
    middle = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
    z = points[:, 2].max() - RIM_DEPTH
    wall = points[np.abs(points[:, 2] - z) < 0.007][:, :2] - middle  # [n, 2]
    angle = np.arctan2(wall[:, 1], wall[:, 0])
    options = []
    for yaw in np.deg2rad(np.arange(-180, 180, 5)):
        here = np.cos(angle - yaw) > 0.98
        if here.any():
            out = np.linalg.norm(wall[here], axis=1).mean() * np.array([np.cos(yaw), np.sin(yaw)])
            options.append((np.append(middle + out, z), yaw, 0.5 * (np.sin(yaw) < 0)))
    return options


def body_grasps(points):
    """Return [(place [3], yaw, cost)] across a box, bottle or can, near the top of tall ones.

    points: f64 [n, 3], those of the object.
    """
    low = points[:, 2].min()
    high = points[:, 2].max()
    z = high - 0.03 if high - low > 0.06 else (low + high) / 2
    part = points[np.abs(points[:, 2] - z) < 0.012][:, :2]  # [n, 2]
    options = []
    for yaw in np.deg2rad(np.arange(-90, 90, 5)):
        turned = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        extent = part @ turned  # [n, 2] along, across
        width = np.ptp(extent[:, 0])
        place = turned @ (extent.min(0) + extent.max(0)) / 2
        options.append((np.append(place, z), yaw, 20 * width + 100 * (width > WIDEST)))
    return options


def clearance_cost(others, place, yaw):
    """Return the cost of obstacles within the open fingers and the hand at a grasp, at most 10.

    others: f64 [n, 3], points of the obstacles; place: f64 [3].
    """
    out = np.abs((others[:, :2] - place[:2]) @ [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    above = others[:, 2] - place[2]
    fingers = (out[:, 0] > 0.035) & (out[:, 0] < 0.065) & (out[:, 1] < 0.018) & (above > -0.008)
    hand = (out[:, 0] < 0.11) & (out[:, 1] < 0.04) & (above > 0.085)
    return min(10, 2 * np.count_nonzero(fingers | hand))


# ----------------------------------------------------------------------------------------------------------------------
# Recording


@dataclass
class Config:
    """Settings of `python demos.py`."""

    suite: str = "libero_goal"
    """LIBERO suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90"""
    task_ids: list[int] = field(default_factory=list)
    """tasks of the suite; empty: all of them"""
    episodes: int = 20
    """successful episodes per task"""
    image_size: int = 96
    """side of the stored images in pixels"""
    jpeg_quality: int = 85
    """JPEG quality of the stored images, 1 to 95"""
    widen: float = 0.0
    """half-width in m of the square in which the handled object's start is drawn; 0: official starts"""
    seed: int = 10_000
    """attempt j of task k has the seed `seed + 10000 k + j`; seeds below 10000 are for evaluation"""
    out: Path = Path("data/demos")
    """folder of the data set; its name is the data set's name"""
    trials: int = TRIALS
    """evaluation's starts per task on which the expert is tried at the end; eval.py prints its success"""
    procs: int = os.cpu_count() or 1
    """worker processes, each with its own simulator"""
    dry_run: bool = False
    """only roll the expert out on evaluation's starts, seeds 0 to episodes - 1, and print its success"""


SHAPING = ("suite", "widen", "seed", "image_size", "jpeg_quality")  # the fields that shape an episode


def check(config):
    """Raise ValueError or FileExistsError for what cannot work, before anything is built or written."""
    if config.suite not in MAX_STEPS:
        raise ValueError(f"suite={config.suite!r} is unknown; choose one of {', '.join(MAX_STEPS)}")
    count = len(instructions(config.suite))
    if bad := [task for task in config.task_ids if not 0 <= task < count]:
        raise ValueError(f"task_ids={bad}: {config.suite} has tasks 0 to {count - 1}")
    for name, low, high in [
        ("episodes", 1, 3000),
        ("image_size", 8, 256),
        ("jpeg_quality", 1, 95),
        ("widen", 0, 0.5),
        ("trials", 1, 10_000),
        ("procs", 1, 1024),
        ("seed", 10_000, 2**31),
    ]:
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name}={getattr(config, name)} is outside {low} to {high}")
    unused = ("out", "seed", "image_size", "jpeg_quality", "trials")
    if given := [name for name in unused if config.dry_run and getattr(config, name) != getattr(Config(), name)]:
        raise ValueError(f"{', '.join(given)} cannot be used with dry_run, which writes nothing")
    if not config.dry_run and config.out.exists():
        raise FileExistsError(f"out={config.out} exists; choose another folder or remove it")
    if not config.dry_run:
        from files import check_writable  # with torch, which the worker processes do without

        check_writable(config.out, "--out")


def disturb(sim, expert, rng):
    """Follow the expert for some steps, then drift off its path, so that the recording shows how to recover.

    Nothing of this is recorded.
    """
    for _ in range(rng.integers(0, 16)):
        action = expert.act()
        if action[6] == CLOSE:
            break
        sim.step(action)
    drift = rng.uniform([-1, -1, -0.3, -0.4, -0.4, -0.4], [1, 1, 1, 0.4, 0.4, 0.4])
    for _ in range(rng.integers(3, 9)):
        sim.step(np.append(drift, OPEN))


def record(sim, seed, config):
    """Return one episode of the expert, {"seed", "state", "steps"}, or None when it failed.

    state: the simulator state at its first step, f64 [n]. steps: observations with actions; the image of a step, as
    JPEG bytes u8 [n], is what the cameras saw before its action.
    """
    expert = Expert(sim)
    rng = np.random.default_rng([seed, 1])
    sim.start(seed, config.widen)
    expert.reset()
    if rng.random() < 0.5:
        disturb(sim, expert, rng)
    state = sim.state()
    sim.restore(seed, state)
    expert.reset()
    steps = []
    for _ in range(MAX_STEPS[sim.suite]):
        step = sim.observe()
        for camera in CAMERAS:
            jpeg = encode_image(step[camera], config.image_size, quality=config.jpeg_quality)
            step[camera] = np.frombuffer(jpeg, np.uint8)
        step["action"] = expert.act()
        steps.append(step)
        if sim.step(step["action"], render=True):
            return {"seed": seed, "state": state, "steps": steps}
    return None


def succeeds(sim, seed, widen):
    """Return whether the expert solves the start that evaluation uses for `seed`; no frame is drawn."""
    expert = Expert(sim)
    sim.start(seed, widen, render=False)
    expert.reset()
    return any(sim.step(expert.act()) for _ in range(MAX_STEPS[sim.suite]))


OPENED = {}  # (suite, task) -> this process's simulator; at most one


def open_sim(suite, task):
    """Return the simulator of a task, which stays open for the next attempt."""
    if (suite, task) not in OPENED:
        while OPENED:
            OPENED.popitem()[1].close()
        OPENED[suite, task] = Sim(suite, task)
    return OPENED[suite, task]


def attempt(job):
    """Run attempt j of a task in a worker process and save its result in the staging folder.

    job: (config, task, j). Return (task, j, whether it succeeded). In a dry run the expert is tried on evaluation's
    start j.
    """
    config, task, j = job
    sim = open_sim(config.suite, task)
    if config.dry_run:
        return task, j, succeeds(sim, j, config.widen)
    episode = record(sim, config.seed + 10_000 * task + j, config)
    save_attempt(staging(config) / f"{task}_{j}.npz", episode)
    return task, j, episode is not None


def run_attempts(pool, jobs):
    """Yield what `attempt` returns for each of the jobs, as they end. Raise RuntimeError when a process dies."""
    attempts = []
    try:
        for job in jobs:
            attempts.append(pool.submit(attempt, job))  # raises, too, once a process has died
        for ended in as_completed(attempts):
            yield ended.result()
    except BrokenProcessPool as error:
        text = "a simulator process died, of too little memory, perhaps; the same command goes on"
        raise RuntimeError(text) from error
    finally:
        for waiting in attempts:  # after Ctrl-C
            waiting.cancel()


def next_attempts(config, tasks, done):
    """Return the next attempts [(config, task, j)]: as many as a task lacks successes, whatever the number of workers.

    done: {(task, j): success}. Raise RuntimeError when the expert fails too often.
    """
    jobs = []
    for task in tasks:
        tried = {j: success for (k, j), success in done.items() if k == task}
        solved = sum(tried.values())
        lacking = config.episodes - (len(tried) if config.dry_run else solved)
        if lacking > 0 and len(tried) >= 3 * config.episodes + 10:
            raise RuntimeError(
                f"{config.suite} task {task}: the expert solved only {solved} of {len(tried)} attempts; "
                f"leave it out of task_ids or reduce widen={config.widen}"
            )
        jobs += [(config, task, j) for j in range(len(tried) + lacking) if j not in tried][: max(lacking, 0)]
    return jobs


def collect(config, tasks, done, pool):
    """Run attempts until every task has its episodes; return `done`, {(task, j): success}, with them."""
    from tqdm import tqdm

    with tqdm(total=config.episodes * len(tasks), initial=sum(done.values()), unit="episode") as bar:
        while jobs := next_attempts(config, tasks, done):
            for task, j, success in run_attempts(pool, jobs):
                done[task, j] = success
                bar.update(success or config.dry_run)
    return done


def try_expert(config, tasks, pool):
    """Return the expert's outcomes on evaluation's starts, which eval.py prints next to a policy's.

    They are [{"task", "seed", "widen", "success"}].
    """
    dry = replace(config, dry_run=True)
    results = run_attempts(pool, [(dry, task, seed) for task in tasks for seed in range(config.trials)])
    return [
        {"task": task, "seed": seed, "widen": config.widen, "success": bool(success)}
        for task, seed, success in sorted(results)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Staging: one file per attempt, so that an interrupted run can continue


def staging(config):
    """Return the folder of the finished attempts, next to that of the data set."""
    return config.out.with_name(config.out.name + ".staging")


def resume(config):
    """Make the staging folder, or accept one that was made with the same settings; return {(task, j): success}.

    Raise ValueError when it was made with other settings.
    """
    note = staging(config) / "settings.json"
    settings = {name: getattr(config, name) for name in SHAPING}
    note.parent.mkdir(parents=True, exist_ok=True)
    if not note.exists():
        note.write_text(json.dumps(settings))
    if json.loads(note.read_text()) != settings:
        raise ValueError(f"{note.parent} holds episodes of other settings ({note.read_text()}); remove it or use those")
    done = {}
    for path in note.parent.glob("*.npz"):
        with np.load(path) as arrays:
            done[tuple(map(int, path.stem.split("_")))] = bool(arrays["length"])
    return done


def save_attempt(path, episode):
    """Write one attempt's episode (see `record`) to a temporary file, then rename it.

    A failed attempt has length 0 and nothing else.
    """
    arrays = {"length": 0}
    if episode:
        steps = episode["steps"]
        arrays = {"length": len(steps), "seed": episode["seed"], "start": episode["state"]}
        for key in ("state", "joint_state", "action"):
            arrays[key] = np.stack([step[key] for step in steps])
        for key in CAMERAS:
            arrays[key] = np.concatenate([step[key] for step in steps])  # JPEG files, end to end
            arrays[key + "_ends"] = np.cumsum([len(step[key]) for step in steps])
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez(file, **arrays)
    os.replace(path.with_suffix(".part"), path)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def features(size):
    """Return the features of modified_libero_rlds with images of size x size, and what a replay needs."""
    from tensorflow_datasets.core import features as f

    image = f.Image(shape=(size, size, 3), dtype=np.uint8, encoding_format="jpeg")
    vector = {n: f.Tensor(shape=(n,), dtype=np.float32) for n in (7, 8)}
    observation = {"image": image, "wrist_image": image, "state": vector[8], "joint_state": vector[7]}
    step = {
        "observation": f.FeaturesDict(observation),
        "action": vector[7],
        "language_instruction": f.Text(),
        "is_first": f.Scalar(np.bool_),
        "is_last": f.Scalar(np.bool_),
        "is_terminal": f.Scalar(np.bool_),
        "reward": f.Scalar(np.float32),
        "discount": f.Scalar(np.float32),
    }
    metadata = {
        "file_path": f.Text(),
        "suite": f.Text(),
        "task": f.Scalar(np.int64),
        "seed": f.Scalar(np.int64),
        "widen": f.Scalar(np.float32),
        "state": f.Tensor(shape=(None,), dtype=np.float64, encoding=f.Encoding.BYTES),  # float_list would round
    }
    return f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": f.FeaturesDict(metadata)})


def example(path, config):
    """Return a staged episode as tensorflow-datasets takes it, see `features`."""
    task = int(path.stem.split("_")[0])
    text = instructions(config.suite)[task]
    with np.load(path) as file:
        arrays = dict(file)
    for key in CAMERAS:
        arrays[key] = [io.BytesIO(part.tobytes()) for part in np.split(arrays[key], arrays[key + "_ends"][:-1])]
    last = int(arrays["length"]) - 1
    steps = [
        {
            "observation": {key: arrays[key][t] for key in (*CAMERAS, "state", "joint_state")},
            "action": arrays["action"][t],
            "language_instruction": text,
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last,
            "reward": float(t == last),
            "discount": 1.0,
        }
        for t in range(last + 1)
    ]
    metadata = {
        "file_path": f"{config.suite}/{text.replace(' ', '_')}/seed_{arrays['seed']}",
        "suite": config.suite,
        "task": task,
        "seed": int(arrays["seed"]),
        "widen": config.widen,
        "state": arrays["start"],
    }
    return {"steps": steps, "episode_metadata": metadata}


def chosen(config, tasks, done):
    """Return the sorted (task, j) of the first `episodes` successes of each task: an earlier call may have more."""
    return [
        key
        for task in sorted(tasks)
        for key in sorted(key for key, success in done.items() if success and key[0] == task)[: config.episodes]
    ]


def write(config, episodes, folder):
    """Write the staged episodes [(task, j)] as the data set folder/name/1.0.0.

    Call it in a process of its own: in one that has loaded TensorFlow, Mesa's EGL crashes.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted write
    paths = [staging(config) / f"{task}_{j}.npz" for task, j in episodes]
    shards = min(len(paths), 1 + sum(path.stat().st_size for path in paths) // SHARD_BYTES)
    tfds.dataset_builders.store_as_tfds_dataset(
        name=config.out.name,
        version="1.0.0",
        features=features(config.image_size),
        split_datasets={"train": ((path.stem, example(path, config)) for path in paths)},
        data_dir=str(folder),
        download_config=tfds.download.DownloadConfig(num_shards=shards),
    )


def report(config, tasks, done):
    """Print and return the expert's success per task, {task: {"instruction", "attempts", "successes", ...}}."""
    table = {}
    for task in tasks:
        tried = [success for (k, _), success in done.items() if k == task]
        table[task] = {
            "instruction": instructions(config.suite)[task],
            "attempts": len(tried),
            "successes": sum(tried),
            "success_rate": sum(tried) / len(tried),
        }
        print(f"{config.suite} {task}: {sum(tried)} of {len(tried)}  {table[task]['instruction']}")
    return table


def main(config):
    """Collect episodes, write them next to the staged ones, and move the finished data set to its place."""
    check(config)
    tasks = config.task_ids or list(range(len(instructions(config.suite))))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(config.procs, len(tasks) * max(config.episodes, config.trials)), context) as pool:
        done = collect(config, tasks, {} if config.dry_run else resume(config), pool)
        table = report(config, tasks, done)
        if config.dry_run:
            return
        note = {name: getattr(config, name) for name in SHAPING} | {"versions": versions(), "tasks": table}
        note["evaluation"] = try_expert(config, tasks, pool)
    episodes = chosen(config, tasks, done)
    with ProcessPoolExecutor(1, context) as pool:
        pool.submit(write, config, episodes, staging(config) / "rlds").result()
    folder = staging(config) / "rlds" / config.out.name
    (folder / "expert.json").write_text(json.dumps(note, indent=1) + "\n")
    os.replace(folder, config.out)
    shutil.rmtree(staging(config))
    size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    command = shlex.join(["python", "data.py", str(config.out)])
    print(f"{config.out}: {len(episodes)} episodes, {size / 1e6:.1f} MB. Next: {command}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
