"""A function that the user names in a recipe: `module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from kdrl.errors import UserError, nearest


def is_reference(name: str) -> bool:
    """Whether a name points into a module or file and is not one of a registry."""
    return ":" in name


def load_function(reference: str, what: str) -> Callable[..., Any]:
    """The callable that `reference` names; `what` is the option, for errors.

    Modules are looked for where Python looks and in the working directory. Raises UserError.
    """
    home, _, name = reference.rpartition(":")
    module = _from_file(Path(home), what) if home.endswith(".py") else _from_name(home, what)
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"{what}: {home} has no {name!r}{nearest(name, [n for n in vars(module) if n[:1] != '_'])}")
    if not callable(function):
        raise UserError(f"{what}: {reference} is a {type(function).__name__}, not a function.")
    return function


def _from_name(home: str, what: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(home)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (home, home.split(".")[0])
        why = "is not found from here" if missing else f"cannot be imported ({type(error).__name__}: {error})"
        raise UserError(f"{what}: the module {home!r} {why}.") from error


def _from_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{what}: there is no file {path}.")
    name = f"kdrl_user_{path.stem}"
    held = sys.modules.get(name)
    if held is not None and held.__file__ == str(path.resolve()):
        return held
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{what}: {path} cannot be run ({type(error).__name__}: {error}).") from error
    # A worker process cannot import this module by name, so its functions travel whole.
    cloudpickle.register_pickle_by_value(module)
    return module
