"""Validation errors turned into sentences that name the dotted key and the nearest right one."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kdrl.config import Config
from kdrl.errors import nearest


def explain_validation(error: ValidationError, root: type[BaseModel], prefix: str) -> list[str]:
    """One sentence per problem; a key that is missing comes after one that may be it, mistyped."""
    lines = []
    problems = error.errors()
    for problem in sorted(problems, key=lambda each: each["type"] == "missing"):
        if _other_member(problem["loc"], [each["loc"] for each in problems]):
            continue
        where = (prefix + ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part))).rstrip(".")
        kind = problem["type"]
        if kind == "extra_forbidden":
            lines.append(_unknown(where, problem["loc"], root, prefix))
        elif kind == "missing":
            lines.append(f"{where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            given = "" if kind == "value_error" else f" (given: {_short(problem.get('input'))})"
            lines.append(f"{where}: {message}{given}" if where else f"{message}{given}")
    return list(dict.fromkeys(lines))


def _other_member(loc: tuple[Any, ...], all_locs: list[tuple[Any, ...]]) -> bool:
    """Whether this is a member of a union that the value is plainly not: it went further with another member."""
    place = len(loc) - 1
    return place >= 0 and _is_union_tag(loc[-1]) and any(o[:place] == loc[:-1] and len(o) > len(loc) for o in all_locs)


def _is_union_tag(part: Any) -> bool:
    # pydantic adds the tried member of a union, as in student.model.NewModel.layers or function-plain[...].
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "dict") or part in _names(Config))


def _names(kind: type[BaseModel]) -> set[str]:
    return {kind.__name__}.union(*(_names(each) for each in kind.__subclasses__()))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(where: str, loc: tuple[Any, ...], root: type[BaseModel], prefix: str) -> str:
    key = str(loc[-1])
    section: type[BaseModel] | None = root
    for part in loc[:-1]:
        # The place in a list names no field: what follows is a key of the list's items.
        if section is not None and not isinstance(part, int) and not _is_union_tag(part):
            section = _child(section, str(part))
    others = section.others if section is not None and issubclass(section, Config) else ()
    elsewhere = [path for path in _paths(root) if path.split(".")[-1] == key]
    if elsewhere and not difflib.get_close_matches(key, others, n=1):
        return f"{where} is no recipe key; did you mean {prefix}{min(elsewhere, key=lambda path: path.count('.'))}?"
    known = [*section.model_fields, *others] if section is not None else [p for p in _paths(root) if "." not in p]
    return f"{where} is no recipe key{nearest(key, known)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    options = [annotation, *get_args(annotation)]
    options += [inner for o in options for inner in get_args(o)]
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]


def _child(section: type[BaseModel], part: str) -> type[BaseModel] | None:
    field = section.model_fields.get(part)
    models = _models(field.annotation) if field is not None else []
    return models[0] if models else None


def _paths(root: type[BaseModel], prefix: str = "", depth: int = 0) -> list[str]:
    found = []
    for name, field in root.model_fields.items():
        found.append(prefix + name)
        if depth < 3:
            for model in _models(field.annotation):
                found += _paths(model, f"{prefix}{name}.", depth + 1)
    return found
