"""Who scores the tokens of a response."""

from __future__ import annotations

from kdrl.teachers.base import Evidence, Need, Teacher
from kdrl.teachers.local import LocalTeacher, ReferenceTeacher, SelfTeacher

__all__ = ["Evidence", "LocalTeacher", "Need", "ReferenceTeacher", "SelfTeacher", "Teacher"]
