"""Each published method as data: a name, a citation, a formula and the recipe it stands for; no code path."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from kdrl.config import Config
from kdrl.errors import UserError, nearest
from kdrl.yamls import load_yaml


class Method(Config):
    """One file of this folder."""

    name: str
    """What `method:` says in a recipe."""
    title: str
    """One line."""
    citation: str
    """Authors, year, arXiv id."""
    formula: str
    """What is minimised, in the notation of the docs."""
    recipe: dict[str, Any]
    """The recipe keys that the method stands for, `objective` first."""
    defaults: str
    """Where the numbers come from and how far they can be trusted."""
    unknown: str
    """What is not known of the original, and where this differs from it."""


@lru_cache
def all_methods() -> dict[str, Method]:
    """Every method by name."""
    found = {}
    for entry in sorted(files(__name__).iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            method = Method.model_validate(load_yaml(entry.read_text(encoding="utf-8"), entry.name))
            found[method.name] = method
    return found


def get_method(name: str) -> Method:
    """The method called `name`; raises UserError with the nearest right name."""
    methods = all_methods()
    if name not in methods:
        raise UserError(f"`kdrl methods` lists the methods; none is called {name!r}{nearest(name, methods)}")
    return methods[name]


def expanded(method: Method) -> str:
    """The recipe that a method stands for, as YAML."""
    return yaml.safe_dump(method.recipe, sort_keys=False, default_flow_style=None, width=110).rstrip()
