"""What a trainer keeps up with beside the student: its own teacher, teachers that are fitted to it, and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.checkpoint import Loaded
from kdrl.errors import UserError
from kdrl.objectives.objective import Active
from kdrl.objectives.schedules import Moment
from kdrl.teachers.base import Teacher
from kdrl.teachers.own import SelfTeacher
from kdrl.teachers.prepared import PreparedTeacher
from kdrl.vocab.teacher import VocabTeacher


class Companion(Protocol):
    """Something that changes with the steps and so belongs into a checkpoint."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by name; none of them shares memory with the student."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Its plain values, as JSON."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go back to what the two gave."""
        ...


@dataclass(frozen=True)
class Beside:
    """The teachers of a run that move with the student."""

    teachers: Mapping[str, Teacher]

    @property
    def own(self) -> SelfTeacher | None:
        """The student as its own teacher, where a term asks it."""
        return next((t for t in self.teachers.values() if isinstance(t, SelfTeacher)), None)

    @property
    def prepared(self) -> dict[str, PreparedTeacher]:
        """Teachers that are fitted to the student before each update."""
        return {name: t for name, t in self.teachers.items() if isinstance(t, PreparedTeacher)}

    @property
    def other(self) -> dict[str, VocabTeacher]:
        """Teachers that read a response in tokens of their own."""
        return {name: t for name, t in self.teachers.items() if isinstance(t, VocabTeacher)}

    @property
    def companions(self) -> dict[str, Companion]:
        """Everything with a state, by its name in a checkpoint."""
        found: dict[str, Companion] = {f"prepared_{name}": t for name, t in self.prepared.items()}
        return found if self.own is None else found | {"self_teacher": self.own}

    @property
    def late(self) -> set[str]:
        """Teachers that cannot be asked before the verdicts: they read some, or are fitted first."""
        waits = self.own is not None and self.own.config.needs_verdicts
        return {*self.prepared, *(["self"] if waits else [])}

    def narrowed(self, active: Sequence[Active], rollouts: Rollouts) -> list[Active]:
        """The terms; those that ask the self-teacher only where it has a prompt to read, which is filled in here.

        Those that ask a teacher of another tokenizer only where its tokens stand for the student's.
        """
        other = self.other
        active = [other[a.teacher].narrowed(a, rollouts) if a.teacher in other else a for a in active]
        if self.own is None:
            return active
        self.own.dress(rollouts.responses)
        reach_N = self.own.reach_N(rollouts)
        return [
            replace(a, eligible_N=a.eligible_N & reach_N, keep_N=a.keep_N & reach_N) if a.teacher == "self" else a
            for a in active
        ]

    def prepare(
        self, active: Sequence[Active], rollouts: Rollouts, temperature: float, moment: Moment
    ) -> dict[str, Any]:
        """Fit teachers to the student on the tokens that terms ask them for; metrics of the step."""
        row: dict[str, Any] = {}
        for name, teacher in self.prepared.items():
            asking = [a.keep_N for a in active if a.teacher == name]
            if asking:
                row |= teacher.prepare(rollouts, torch.stack(asking).any(0), temperature, moment)
        return row

    def numbers(self, responses: Sequence[Response]) -> dict[str, float]:
        """The share of a step's responses that the self-teacher had no prompt for; how well tokens were aligned."""
        row = {
            "/".join(["vocabulary", *([name] if len(self.other) > 1 else []), key]): value
            for name, teacher in self.other.items()
            for key, value in teacher.numbers().items()
        }
        if self.own is None:
            return row
        return row | {"without_context": sum(r.privileged_ids is None for r in responses) / max(1, len(responses))}

    def warnings(self) -> list[str]:
        """What is to be said of the last step, each once in a run."""
        return [f"{name}: {said}" for name, teacher in self.other.items() if (said := teacher.warning())]

    def after_update(self, moment: Moment) -> None:
        """After an optimizer step that was applied."""
        if self.own is not None:
            self.own.after_update(moment)

    def after_step(self, done: int) -> None:
        """After `done` training steps."""
        if self.own is not None:
            self.own.after_step(done)

    def save(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """States as JSON by name, and groups of tensors for a checkpoint."""
        found = self.companions
        groups = {name: dict(companion.tensors()) for name, companion in found.items()}
        return {name: dict(c.state()) for name, c in found.items()}, {n: group for n, group in groups.items() if group}

    def restore(self, saved: Loaded) -> None:
        """Go back to a checkpoint; raises UserError when it is of another recipe."""
        for name, companion in self.companions.items():
            if name not in saved.state["beside"]:
                raise UserError(f"{saved.path} holds no {name}; resume with the recipe that the run was started with.")
            companion.restore(saved.tensors.get(name, {}), saved.state["beside"][name])
