"""What a recipe will do, in words: its terms, and where they deviate from the method that it names."""

from __future__ import annotations

from typing import Any

import yaml

from kdrl.methods import get_method
from kdrl.recipe import Recipe, plain, read_entry
from kdrl.sources.config import SourceConfig


def objective_yaml(recipe: Recipe) -> str:
    """The expanded objective as YAML."""
    entries = [{entry.name: plain(entry.config)} for entry in recipe.objective]
    return yaml.safe_dump({"objective": entries}, sort_keys=False, default_flow_style=None, width=110).rstrip()


def deviations(recipe: Recipe) -> list[str]:
    """Where the recipe differs from the published method: one `key: theirs -> here` a line."""
    if recipe.method is None:
        return []
    published = get_method(recipe.method).recipe
    theirs = [read_entry(entry) for entry in published.get("objective", [])]
    lines: list[str] = []
    if [e.name for e in theirs] != [e.name for e in recipe.objective]:
        lines.append(
            f"objective terms: {', '.join(e.name for e in theirs)} -> {', '.join(e.name for e in recipe.objective)}"
        )
    else:
        for old, new in zip(theirs, recipe.objective, strict=True):
            lines += _differences(f"objective.{new.name}", plain(old.config), plain(new.config))
    here = plain(recipe)
    for key, value in published.items():
        if key == "objective":
            continue
        mine = here.get(key)
        if key == "source":
            value = SourceConfig.model_validate(value).model_dump(mode="json")
        lines += _differences(key, value, _said(value, mine))
    return lines


def _said(published: Any, mine: Any) -> Any:
    """Of a section here, the keys that the method names; on the others it says nothing."""
    if not (isinstance(published, dict) and isinstance(mine, dict)):
        return mine
    return {key: _said(value, mine.get(key)) for key, value in published.items()}


def _differences(prefix: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() & new.keys():
        keys = dict.fromkeys([*old, *new])
        return [line for k in keys for line in _differences(f"{prefix}.{k}", old.get(k), new.get(k))]
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def explain_objective(recipe: Recipe) -> str:
    """Method, citation, expanded objective and deviations, as text."""
    lines = []
    if recipe.method is not None:
        method = get_method(recipe.method)
        lines.append(f"method {method.name}: {method.title} ({method.citation})")
    lines.append(objective_yaml(recipe))
    found = deviations(recipe)
    if found:
        lines.append("deviations from the published method:")
        lines += [f"  {line}" for line in found]
    return "\n".join(lines)
