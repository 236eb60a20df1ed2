"""Prompts with checkable answers: where they come from, how they are split, and who judges a response."""

from __future__ import annotations

from kdrl.tasks import writers as _writers  # registers the worked solutions
from kdrl.tasks.base import Problem, ProblemStream, ResponseInfo, Task, Verdict, take
from kdrl.tasks.build import build_task, register_task
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.pool import VerifierPool
from kdrl.tasks.solutions import Solution, register_solution
from kdrl.tasks.verifiers import register_verifier

__all__ = [
    "Problem",
    "ProblemStream",
    "ResponseInfo",
    "Solution",
    "Task",
    "TaskConfig",
    "Verdict",
    "VerifierPool",
    "build_task",
    "register_solution",
    "register_task",
    "register_verifier",
    "take",
]

del _writers
