"""Dotted overrides: `task.path=data.jsonl`, `objective.distill.weight=0.5`, `objective.1.weight=0.5`."""

from __future__ import annotations

from typing import Any

from kdrl.errors import UserError
from kdrl.yamls import load_yaml


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is read as YAML. Raises UserError when there is no `=` or no key."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r} is no override; write key=value, as in steps=100 or task.path=data.jsonl.")
    return key.strip(), load_yaml(value, f"the value of {key.strip()}")


def assign(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key in place; objective entries are reached by term name, or by index where two are of a kind."""
    parts = _by_index(raw, key.split("."))
    node: Any = raw
    for depth, part in enumerate(parts[:-1]):
        trail = ".".join(parts[: depth + 1])
        if isinstance(node, list):
            node = _entry(node, part, trail, where)
            continue
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif isinstance(child, str) and part == "task":
            child = node[part] = {"name": child}
        elif not isinstance(child, dict | list):
            raise UserError(f"{where}: {key} cannot be set, because {trail} is {child!r} and not a mapping.")
        node = child
    if isinstance(node, list):
        raise UserError(f"{where}: {key} needs a setting after the term, as in objective.distill.weight=0.5.")
    node[parts[-1]] = value


def _by_index(raw: dict[str, Any], parts: list[str]) -> list[str]:
    """`objective.distill.1.weight`, as metrics name the second of two, as `objective.2.weight`."""
    entries = raw.get("objective")
    if len(parts) < 3 or parts[0] != "objective" or not parts[2].isdigit() or not isinstance(entries, list):
        return parts
    names = [next(iter(entry)) if isinstance(entry, dict) and entry else entry for entry in entries]
    places = [i for i, name in enumerate(names) if name == parts[1]]
    which = int(parts[2])
    return ["objective", str(places[which]), *parts[3:]] if which < len(places) else parts


def _entry(entries: list[Any], part: str, trail: str, where: str) -> dict[str, Any]:
    names = [next(iter(e)) if isinstance(e, dict) and e else str(e) for e in entries]
    if part.isdigit():
        index = int(part)
        if index >= len(entries):
            raise UserError(f"{where}: {trail} does not exist; the objective has {len(entries)} terms, from 0.")
    else:
        found = [i for i, name in enumerate(names) if name == part]
        if not found:
            raise UserError(f"{where}: {trail} does not exist; the objective's terms are {', '.join(names) or 'none'}.")
        if len(found) > 1:
            choice = " or ".join(f"objective.{i}" for i in found)
            raise UserError(f"{where}: the objective has {len(found)} terms {part!r}; say which one with {choice}.")
        index = found[0]
    if not isinstance(entries[index], dict):
        entries[index] = {entries[index]: {}}
    entry = entries[index]
    name = names[index]
    if entry[name] is None:
        entry[name] = {}
    if not isinstance(entry[name], dict):
        raise UserError(f"{where}: {trail} is {entry[name]!r} and not a mapping of settings.")
    return entry[name]
