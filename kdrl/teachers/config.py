"""How a recipe describes a teacher that the student is itself, and one that is adapted between the student's steps."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainSerializer, PlainValidator, model_serializer, model_validator

from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.models.config import TeacherModelConfig
from kdrl.objectives.base import ScheduleField
from kdrl.objectives.schedules import Schedule
from kdrl.teachers.cache_config import CacheConfig
from kdrl.teachers.prepare import Prepare, read_prepare, write_prepare
from kdrl.teachers.served_config import ServedConfig

SHOWN = ("prompt", "answer", "solution", "feedback", "sibling")
"""What a context template may name."""


def fields_of(template: str) -> set[str]:
    """The names in a format string; raises ValueError for one that is broken or shows nothing new."""
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the context {template!r} is no format string: {error}") from None
    if unknown := sorted(names - set(SHOWN)):
        raise ValueError(f"the context names {{{unknown[0]}}}{nearest(unknown[0], SHOWN)}")
    if not names - {"prompt"}:
        raise ValueError(
            "the context shows the self-teacher nothing that the student does not see; it needs {answer}, {solution}, "
            "{feedback} or {sibling}"
        )
    return names


class SelfTeacherConfig(Config):
    """Which student `distill.teacher: self` asks, and what it reads beside the prompt."""

    kind: Literal["live", "ema", "past", "initial"] = "live"
    """`live`: as it is now; `ema`: a running mean of it; `past`: a copy of some steps ago (PS-KD); `initial`: as
    training found it, in full precision under student.quantise (BitDistiller)."""
    rate: ScheduleField = Field(default_factory=lambda: Schedule(0.05))
    """ema: mean <- (1 - rate) mean + rate student after each optimizer step (SDPO: 0.05)."""
    every: int | None = Field(default=None, ge=1)
    """past: the copy is taken anew after every n training steps; until the first it is the initial student."""
    context: str | None = None
    """The self-teacher's prompt over {prompt}, {answer}, {solution}, {feedback} and {sibling} (a right response of
    the same group); a response for which one of them is missing is not scored. null: the student's own prompt."""

    @model_validator(mode="after")
    def _check(self) -> SelfTeacherConfig:
        if (self.kind == "past") != (self.every is not None):
            raise ValueError("`every` belongs to kind past, and past needs it, as in {kind: past, every: 100}")
        if self.kind != "ema" and "rate" in self.model_fields_set:
            raise ValueError(f"rate is the step of a running mean; kind {self.kind} has none, kind ema does")
        if self.context is not None:
            fields_of(self.context)
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> dict[str, Any]:
        # A resolved recipe must read back.
        dropped = {"rate"} if self.kind != "ema" else set()
        return {key: value for key, value in handler(self).items() if key not in dropped}

    @property
    def shows(self) -> set[str]:
        """The names in the context, empty without one."""
        return set() if self.context is None else fields_of(self.context)

    @property
    def needs_verdicts(self) -> bool:
        """Whether the context is known only after the responses have been verified."""
        return bool(self.shows & {"feedback", "sibling"})


PrepareField = Annotated[Prepare, PlainValidator(read_prepare), PlainSerializer(write_prepare)]


class TeacherConfig(TeacherModelConfig):
    """The model that scores or writes."""

    others: ClassVar[tuple[str, ...]] = ("route", "average", "best")

    prepare: PrepareField | None = None
    """What is learned around the frozen teacher before each step, as in {soft_prompt: {tokens: 7, lr: 5.0e-5}}."""
    served: ServedConfig | None = None
    """The teacher is on a server, as in {urls: [http://HOST:8000]} or http://HOST:8000 alone; `model` then names its
    tokenizer, and weights for the parity check where they are at hand."""
    cache: CacheConfig | None = None
    """A folder of `kdrl cache-teacher`, whose scores are read with no teacher in memory (`model` then names its
    tokenizer); or {path: FOLDER, write: true, kind: topk, k: 64}: the teacher scores what the folder lacks."""
    offload: bool = False
    """Keep the weights in main memory but while it scores (CUDA only): slower, and room for rollouts and update."""

    @model_validator(mode="after")
    def _elsewhere(self) -> TeacherConfig:
        away = self.served is not None or self.reads_cache
        if self.offload and (away or self.prepare is not None):
            other = "`served`" if self.served is not None else "`cache`" if away else "`prepare`"
            raise ValueError(f"`offload` moves weights in and out that only score here; remove it, or {other}")
        if self.load is not None and away:
            raise ValueError("`load` is for weights in this process, and this teacher's are not; remove it")
        if self.served is not None and self.prepare is not None:
            raise ValueError("`prepare` adapts a teacher in this process, and a served one is elsewhere; remove one")
        if self.cache is not None and self.prepare is not None:
            raise ValueError("`prepare` changes what a teacher answers, and a cache holds what it answered; remove one")
        if self.reads_cache and self.served is not None:
            raise ValueError("a cache that is read needs no server; remove `served`, or set cache.write: true")
        return self

    @property
    def reads_cache(self) -> bool:
        """Whether stored scores stand in for the teacher, which is then not loaded."""
        return self.cache is not None and not self.cache.write
