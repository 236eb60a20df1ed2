"""YAML as people write it: 5e-4 is a number, a key given twice is an error, and errors name file and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kdrl.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a float and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads on, off, yes and no as booleans, and `on` is a recipe key.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML; raises UserError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line} is not YAML: {problem}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file, or the folder of a run, as plain data; raises UserError where it is not there or no mapping."""
    if path.is_dir():
        path = path / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no recipe at {path}; recipes/ holds examples.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {error}") from None
    raw = load_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a recipe: it must be a mapping of keys such as method, student and task.")
    return raw
