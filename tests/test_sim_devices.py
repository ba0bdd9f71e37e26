"""sim.py: what it draws with, whatever the environment says of GPUs, OpenGL and the home."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import sim as simulator

NUMBERS = """
import os, sim
with sim.drawing_variables():
    sim.import_robosuite()
    from robosuite.renderers.context.egl_context import EGLGLContext
    EGLGLContext(8, 8, -1).make_current()
    number = os.environ["MUJOCO_EGL_DEVICE_ID"]
print("drew with", os.environ.get("CUDA_VISIBLE_DEVICES"), number, os.environ.get("MUJOCO_EGL_DEVICE_ID"))
"""
NO_LOG = """
import logging, sys
def refuse(event, values):
    if event == "open" and str(values[0]) == "/tmp/robosuite.log":
        raise PermissionError(13, "Permission denied", values[0])
sys.addaudithook(refuse)
import sim
sim.import_robosuite()
import robosuite.utils.log_utils
handlers = [type(handler).__name__ for handler in logging.getLogger("robosuite_logs").handlers]
print(handlers, robosuite.macros.CACHE_NUMBA)
"""


def run_python(code, **variables):
    """Run some code in the project's folder in an environment with these variables; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_EGL_DEVICE_ID"} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    return done.stdout + done.stderr


@pytest.mark.parametrize("visible", ("", "-1", "7", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"))
def test_any_visible_devices_can_draw(visible):
    """CUDA_VISIBLE_DEVICES without a device of EGL: one that works is chosen, and the variable stays as it is."""
    assert f"drew with {visible} 0 None" in run_python(NUMBERS, CUDA_VISIBLE_DEVICES=visible)


@pytest.mark.parametrize(
    "visible, order",
    [
        ("", [0, 1, 2]),
        ("-1", [0, 1, 2]),
        ("2,0", [2, 0, 1]),
        (" 1", [1, 0, 2]),
        ("7,2", [2, 0, 1]),
        ("MIG-1,1", [1, 0, 2]),
    ],
)
def test_visible_devices_come_first(visible, order):
    """Of three, those of CUDA_VISIBLE_DEVICES that exist are tried first; a device of EGL that was named is alone."""
    assert simulator.device_order(3, "", visible) == order
    assert simulator.device_order(3, "1", visible) == [1]


@pytest.mark.parametrize("chosen", ("3", "-1", "GPU-1"))
def test_chosen_device_must_exist(chosen):
    """MUJOCO_EGL_DEVICE_ID that is no device is named, with their number."""
    with pytest.raises(RuntimeError, match=f"MUJOCO_EGL_DEVICE_ID is '{chosen}', but EGL has 3 devices"):
        simulator.device_order(3, chosen, "")


@pytest.mark.parametrize("platform", ("glfw", "glx", "off"))
def test_platform_without_a_way_to_draw_is_refused(platform, monkeypatch):
    """A MUJOCO_GL that robosuite cannot use off-screen; EGL in capitals, or nothing, is EGL."""
    monkeypatch.setenv("MUJOCO_GL", platform)
    with pytest.raises(RuntimeError, match=f"MUJOCO_GL is '{platform}'.* Use MUJOCO_GL=egl"):
        simulator.versions()
    for same in ("EGL", "", " egl"):
        monkeypatch.setenv("MUJOCO_GL", same)
        assert simulator.versions()["MUJOCO_GL"] == "egl"


def test_missing_osmesa_names_its_package():
    """MUJOCO_GL=osmesa without the library."""
    hidden = "import ctypes.util; ctypes.util.find_library = lambda name: None\n"
    shown = run_python(hidden + "import sim; sim.Sim('libero_goal', 8)", MUJOCO_GL="osmesa", LD_LIBRARY_PATH="")
    assert "apt-get install libosmesa6, or use MUJOCO_GL=egl" in shown


def test_log_of_another_user_is_not_opened():
    """robosuite writes no log: one in /tmp may belong to somebody else. Its messages on the terminal stay."""
    assert run_python(NO_LOG).startswith("['StreamHandler'] True")


def test_no_cache_where_nothing_can_be_written():
    """robosuite compiles without a cache where neither its folder nor the home can be written."""
    unwritable = "import os; os.access = lambda path, mode: False\n"
    assert run_python(unwritable + NO_LOG).startswith("['StreamHandler'] False")
