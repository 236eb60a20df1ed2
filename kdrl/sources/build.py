"""From a recipe's source to the object that writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrl.limits import SparingEngine, SparingJoint
from kdrl.models import LoadedModel
from kdrl.sources import kinds
from kdrl.sources.base import Judge, Source
from kdrl.sources.buffer import BufferSource
from kdrl.sources.config import SourceConfig, SourceSettings
from kdrl.sources.corrupt import CorruptSource
from kdrl.sources.filtered import FilteredSource
from kdrl.sources.groups import TogetherSource
from kdrl.sources.joint import MixedSource, SpeculativeSource
from kdrl.sources.keep import Filtered
from kdrl.sources.mixture import MixtureSource
from kdrl.sources.served import ServedSource
from kdrl.sources.student import PrivilegedSource, StudentSource
from kdrl.sources.text import GoldSource, TeacherSource
from kdrl.sources.traces import TraceBook, TraceSource
from kdrl.tasks import Problem
from kdrl.tasks.base import ProblemStream
from kdrl.teachers.served import ServedTeacher

TEACHER_TEXT = "teacher_text.jsonl"


@dataclass
class Writers:
    """What sources are built from: models, the student's engine, how to sample, and where a run keeps its files.

    `group` are the responses per problem, `sampling` what every engine takes, `stream` the task's training problems;
    the teacher is a model here or `served`.
    """

    engine: SparingEngine
    student: LoadedModel
    teacher: LoadedModel | None
    judge: Judge
    stream: ProblemStream
    run_dir: Path
    seed: int
    group: int
    sampling: dict[str, Any]
    budget: int
    served: ServedTeacher | None = None
    _books: dict[str, TraceBook] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """Most tokens of a response."""
        return self.sampling["max_new_tokens"]

    @property
    def temperature(self) -> float:
        """The policy's."""
        return self.sampling["temperature"]

    def problems(self, config: SourceConfig) -> ProblemStream:
        """Where a recipe's problems come from: the task, or the file of traces."""
        settings = config.settings.source.settings if isinstance(config.settings, Filtered) else config.settings
        if isinstance(settings, kinds.Traces):
            return self.book(settings.path).stream(settings.take, self.seed)
        return self.stream

    def book(self, path: str) -> TraceBook:
        """A file of traces, read once."""
        if path not in self._books:
            self._books[path] = TraceBook.read(path, self._known)
        return self._books[path]

    def _known(self) -> dict[str, Problem]:
        size = self.stream.size
        return {} if size is None else {p.id: p for p in (self.stream[i] for i in range(size))}

    def source(self, config: SourceConfig) -> Source:
        """The writer of a recipe's source."""
        return _BUILD[type(config.settings)](self, config.settings)

    def privileged(self, config: SourceConfig) -> Source | None:
        """Who writes for groups that failed, where the source has it."""
        settings = config.settings
        if not isinstance(settings, kinds.Privileged):
            return None
        return PrivilegedSource(self.student_source(settings.samples), settings.template)

    def student_source(self, samples: int | None = None) -> StudentSource:
        """The student, `group` responses a problem or as many as asked."""
        return StudentSource(self.engine, self.student, samples or self.group, self.judge, **self.sampling)

    def teacher_source(self, samples: int | None = None) -> TeacherSource:
        """The teacher with its store."""
        if self.served is not None:
            store = self.run_dir / TEACHER_TEXT
            return ServedSource(self.served, self.student, store, samples or self.group, self.sampling)
        engine = SparingEngine(self._teacher, self.engine.limit, filtered_ok=True)
        store = self.run_dir / TEACHER_TEXT
        return TeacherSource(engine, self.student, store, samples or self.group, self.sampling)

    def fixed(self, name: str) -> Source:
        """Gold or teacher text."""
        return self.teacher_source() if name == "teacher" else GoldSource(self.student, self.limit)

    @property
    def joint(self) -> dict[str, Any]:
        """What every source of two models takes."""
        teacher = SparingEngine(self._teacher, self.engine.limit)
        plain = {k: v for k, v in self.sampling.items() if k not in ("top_p", "top_k")}
        parts = {"engine": SparingJoint(self.engine, teacher), "student": self.student, "samples": self.group}
        return {**parts, "judge": self.judge, **plain}

    @property
    def _teacher(self) -> LoadedModel:
        assert self.teacher is not None
        return self.teacher


def _mixture(to: Writers, s: kinds.Mixture) -> Source:
    per_sample = s.per == "sample"
    return MixtureSource(to.student_source(), to.fixed(s.other), s.share, per_sample=per_sample, seed=to.seed)


def _buffer(to: Writers, s: kinds.Buffer) -> Source:
    return BufferSource(
        to.student_source(),
        to.fixed(s.other),
        s.share,
        s.size,
        samples=to.group,
        model=to.student,
        judge=to.judge,
        next_problem=to.stream.__getitem__,
        seed=to.seed,
    )


def _corrupt(to: Writers, s: kinds.Corrupt) -> Source:
    gold = GoldSource(to.student, to.limit)
    return CorruptSource(gold, to.student, to.judge, s.share, s.pick, temperature=to.temperature, budget=to.budget)


def _guided(to: Writers, s: kinds.Guided) -> Source:
    if s.traces is None:
        traces: Source = to.teacher_source(s.teacher)
    else:
        traces = TraceSource(to.book(s.traces), to.student, to.limit, "right", s.teacher)
    return TogetherSource(to.student_source(to.group - s.teacher), traces)


def _filtered(to: Writers, s: Filtered) -> Source:
    return FilteredSource(
        to.source(s.source),
        s.keep,
        to.judge,
        to.student,
        tries=s.tries,
        prober=to.student_source() if "student_rate" in s.scores else None,
        teacher=to.teacher,
        temperature=to.temperature,
        budget=to.budget,
    )


_BUILD: dict[type[SourceSettings], Callable[[Writers, Any], Source]] = {
    kinds.Student: lambda to, s: to.student_source(),
    kinds.Privileged: lambda to, s: to.student_source(),
    kinds.Gold: lambda to, s: to.fixed("gold"),
    kinds.Teacher: lambda to, s: to.teacher_source(),
    kinds.Mixture: _mixture,
    kinds.Buffer: _buffer,
    kinds.Speculative: lambda to, s: SpeculativeSource(**to.joint, k=s.k),
    kinds.Mixed: lambda to, s: MixedSource(**to.joint, share=s.share, weights=s.weights),
    kinds.Corrupt: _corrupt,
    kinds.Pair: lambda to, s: TogetherSource(to.fixed(s.chosen), to.student_source()),
    kinds.Guided: _guided,
    kinds.Traces: lambda to, s: TraceSource(to.book(s.path), to.student, to.limit, s.take),
    Filtered: _filtered,
}
