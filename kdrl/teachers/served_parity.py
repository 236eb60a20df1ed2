"""Whether the replicas of a served teacher score the student's own samples as a local pass does, and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kdrl.available import available_bytes
from kdrl.batch import Response, Rollouts
from kdrl.engines.base import Engine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt, load_model
from kdrl.seeds import derive
from kdrl.tasks import Problem
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.local import LocalTeacher
from kdrl.teachers.served import ServedTeacher
from kdrl.vocab.teacher import VocabTeacher, Vocabularies

AGREES = "served against "
"""How the note of a parity check that found nothing amiss begins."""
PARITY_TOKENS = 64
PARITY_BUDGET = 4096


@dataclass(frozen=True)
class Plan:
    """What a run will ask of a served teacher: problems to try it on, lengths, temperature, and who writes samples."""

    problems: Sequence[Problem]
    max_new_tokens: int
    temperature: float
    engine: Engine
    seed: int


class Parity:
    """Log-probs that each replica must give of the student's own samples: those of a local pass, or where weights are
    not at hand those of the first replica that is looked at. `skipped` says why nothing is compared.
    """

    def __init__(
        self,
        section: TeacherConfig,
        teacher: ServedTeacher,
        student: LoadedModel,
        plan: Plan,
        own: LoadedModel | None = None,
    ) -> None:
        self.section, self.teacher, self.student, self.plan, self.own = section, teacher, student, plan, own
        self.skipped = ""
        self._rollouts: Rollouts | None = None
        self._want_N: Tensor | None = None
        self._by = "local"

    def begin(self) -> list[str]:
        """Write the samples, and score them here where that can be done; notes say what is not compared."""
        apart = "served and local log-probs are not compared"
        if self.skipped:
            return [f"{apart}: {self.skipped}"]
        rollouts = _written(self.student, self.plan, self.teacher.config.parity)
        if self.own is not None:
            pair = VocabTeacher(self.teacher, Vocabularies(self.student, self.own))
            rollouts = pair.aligned(rollouts).read
        if not rollouts.rows:
            self.skipped = "the teacher can write none of the student's samples"
            return [f"{apart}: {self.skipped}"]
        self._rollouts = rollouts
        why, device = _unweighed(self.section, self.student), self.student.device
        if why is not None:
            return [f"{apart}: {why}"]
        local = LocalTeacher(load_model(self.section, device, trainable=False, seed=self.plan.seed), PARITY_BUDGET)
        self._want_N = local.score(rollouts, rollouts.trained_N, "token", self.plan.temperature).logp_N
        return []

    def look(self, teacher: ServedTeacher) -> list[str]:
        """One replica; raises UserError where it scores otherwise."""
        rollouts = self._rollouts
        if rollouts is None:
            return []
        served_N = teacher.score(rollouts, rollouts.trained_N, "token", self.plan.temperature).logp_N
        if self._want_N is None:
            self._want_N, self._by = served_N, teacher.where
            return []
        difference = (self._want_N - served_N).abs()
        mean, largest = float(difference.mean()), float(difference.max())
        told = f"log-probs of {rollouts.tokens} tokens differ by {mean:.2g} nats on average, {largest:.2g} at most"
        if not mean <= teacher.config.tolerance:
            raise UserError(self._unlike(teacher, told))
        several = len(self.teacher.client.replicas) > 1
        return [f"{AGREES}{self._by}{f' at {teacher.where}' if several else ''}: {told}"]

    def _unlike(self, teacher: ServedTeacher, told: str) -> str:
        bound = f"teacher.served.tolerance is {teacher.config.tolerance:g}"
        if self._by == "local":
            return (
                f"the served teacher {teacher.where} is not the model {self.section.model!r}: {told}, and {bound}. "
                "Serve that checkpoint, in a number format as exact as teacher.dtype, or name the one that is served."
            )
        return (
            f"the served teacher {teacher.where} is not the model that {self._by} serves: {told}, and {bound}. Serve "
            "one checkpoint by both, in one number format."
        )


def _unweighed(section: TeacherConfig, student: LoadedModel) -> str | None:
    """Why no local pass is made, or None where one can be."""
    size, why = _weights(section)
    if why is None and 2 * size > available_bytes(student.device):
        why = f"weights of {size >> 20:,} MiB are large for {student.device}"
    return why


def _weights(section: TeacherConfig) -> tuple[int, str | None]:
    """Bytes of a local checkpoint's weights, or why there is none."""
    if not isinstance(section.model, str):
        return 0, "a new model has no stored weights"
    path = Path(section.model).expanduser()
    if path.is_file():
        return path.stat().st_size, None
    if not path.is_dir():
        return 0, f"{section.model!r} is no local folder"
    patterns = [section.gguf_file] if section.gguf_file else ["*.safetensors", "*.bin"]
    size = sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))
    return size, None if size else f"{section.model!r} holds no weights"


def _written(student: LoadedModel, plan: Plan, count: int) -> Rollouts:
    """The student's own responses to a few problems."""
    problems = plan.problems[:count]
    prompts = [encode_prompt(student, problem.prompt) for problem in problems]
    length = min(plan.max_new_tokens, PARITY_TOKENS)
    samples = plan.engine.generate(prompts, samples=1, max_new_tokens=length, seed=derive(plan.seed, "parity"))
    return Rollouts.of(
        [
            Response(problem, i, prompt, each[0].token_ids, "student", each[0].ended, "")
            for i, (problem, prompt, each) in enumerate(zip(problems, prompts, samples, strict=True))
        ],
        student.device,
    )
