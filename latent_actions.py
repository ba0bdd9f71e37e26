"""`from latent_actions import Policy` in any folder, after `pip install -e . --no-deps` in this one.

Files of this project have names that yours may have, too (data.py, model.py). Imported from here they are parts of this
module (latent_actions.model), and what they import from one another is found here. So neither hides the other.
"""

import builtins
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """Import as usual, but files of this folder as parts of this module."""
    if level or not (FOLDER / f"{name}.py").exists():
        return builtins.__import__(name, globals, locals, fromlist, level)
    return _load(name)


def _load(name):
    """Return the module of a file in this folder. Raise ImportError where it was not copied along."""
    full_name = f"{__name__}.{name}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    path = FOLDER / f"{name}.py"
    if not path.exists():
        raise ImportError(f"there is no {path}: install the project's folder itself, with pip install -e")
    spec = importlib.util.spec_from_file_location(full_name, path)
    module = importlib.util.module_from_spec(spec)
    module.__builtins__ = vars(builtins) | {"__import__": _import}  # what the file's import statements call
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module


Policy = _load("policy").Policy
