"""Who scores the tokens of a response."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdrl.teachers.config import SelfTeacherConfig, TeacherConfig
from kdrl.teachers.experts import Experts
from kdrl.teachers.output_adapter import OutputAdapter
from kdrl.teachers.prepare import PREPARATIONS, Preparation, PreparationConfig, Views, register_preparation
from kdrl.teachers.soft_prompt import SoftPrompt

if TYPE_CHECKING:
    from kdrl.teachers.base import Evidence, Need, Teacher
    from kdrl.teachers.local import LocalTeacher, ReferenceTeacher
    from kdrl.teachers.own import SelfTeacher
    from kdrl.teachers.prepared import PreparedTeacher

# A recipe is read without transformers; what needs it is imported on first use.
_HOME = {
    "Evidence": "base",
    "LocalTeacher": "local",
    "Need": "base",
    "PreparedTeacher": "prepared",
    "ReferenceTeacher": "local",
    "SelfTeacher": "own",
    "Teacher": "base",
}

__all__ = [
    "PREPARATIONS",
    "Evidence",
    "Experts",
    "LocalTeacher",
    "Need",
    "OutputAdapter",
    "Preparation",
    "PreparationConfig",
    "PreparedTeacher",
    "ReferenceTeacher",
    "SelfTeacher",
    "SelfTeacherConfig",
    "SoftPrompt",
    "Teacher",
    "TeacherConfig",
    "Views",
    "register_preparation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdrl.teachers' has no attribute {name!r}")
    return getattr(import_module(f"kdrl.teachers.{_HOME[name]}"), name)
