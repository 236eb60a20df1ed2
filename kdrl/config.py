"""The base of every recipe section: frozen, typed, unknown keys refused, docstrings under fields shown by --help."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen section of a recipe; a string under a field is that field's documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    others: ClassVar[tuple[str, ...]] = ()
    """Keys that another kind of the same section has, which a mistyped one may have meant."""
