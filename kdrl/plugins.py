"""Importing a user's own Python, so that what it registers can be named in a recipe."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import cloudpickle

from kdrl.errors import UserError


def load_plugins(names: Sequence[str], where: str) -> None:
    """Import each module name or run each `.py` path; raises UserError naming the one that fails.

    Modules are looked for where Python looks and in the working directory.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _load_file(Path(name))
            else:
                if (here := str(Path.cwd())) not in sys.path:
                    sys.path.append(here)
                importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"plugin {name!r} of {where} cannot be imported: {type(error).__name__}: {error}"
            ) from error


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"plugin {str(path)!r} does not exist; paths are relative to where kdrl runs.")
    module_name = f"kdrl_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    # A worker process cannot import this module by name, so its verifiers travel whole.
    cloudpickle.register_pickle_by_value(module)
