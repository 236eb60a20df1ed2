"""Which responses a filtered source keeps, as a recipe writes it."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_serializer, model_validator

from kdrl.batch import Origin
from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.sources.config import SOURCES, SourceConfig, SourceSettings
from kdrl.sources.scores import RESPONSE_SCORES


class Keep(Config):
    """`right`, `wrong`, or `{score: NAME, above|below: x}`, `{score: NAME, top|bottom: share}`, `{..., best: n}`."""

    score: str
    """A score of responses: reward, correct, length, student_logp, teacher_logp, logp_gap (teacher less student),
    group_rate, student_rate."""
    above: float | None = None
    """Keep what scores more than this."""
    below: float | None = None
    """Keep what scores less than this."""
    top: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep this share of the step's responses, those with the highest scores."""
    bottom: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep this share of the step's responses, those with the lowest scores."""
    best: int | None = Field(default=None, ge=1)
    """Keep each problem's n highest."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if raw == "right":
            return {"score": "correct", "above": 0.5}
        return {"score": "correct", "below": 0.5} if raw == "wrong" else raw

    @model_validator(mode="after")
    def _check(self) -> Keep:
        if self.score not in RESPONSE_SCORES:
            raise ValueError(f"no response score is called {self.score!r}{nearest(self.score, RESPONSE_SCORES)}")
        rules = [k for k in ("above", "below", "top", "bottom", "best") if getattr(self, k) is not None]
        if not rules:
            raise ValueError("a filter by score needs one of above, below, top, bottom, best")
        if len(rules) > 1 and set(rules) != {"above", "below"}:
            raise ValueError(f"a filter has one rule, not {' and '.join(rules)}; write two filters in a list")
        return self

    @property
    def ranks(self) -> bool:
        """Whether it compares the step's responses with each other."""
        return self.top is not None or self.bottom is not None

    @property
    def whole_groups(self) -> bool:
        """Whether it keeps or drops a problem's responses together."""
        return self.score in ("group_rate", "student_rate") and (self.above is not None or self.below is not None)

    @model_serializer
    def _write(self) -> Any:
        given = {k: getattr(self, k) for k in type(self).model_fields if getattr(self, k) is not None}
        words = {"right": {"score": "correct", "above": 0.5}, "wrong": {"score": "correct", "below": 0.5}}
        return next((word for word, meaning in words.items() if meaning == given), given)


@SOURCES.add("filtered")
class Filtered(SourceSettings):
    """Another source's responses, of which those are kept that pass (rejection sampling; DED, 2508.09883)."""

    alone: ClassVar[str | None] = "keep"
    alone_mapping: ClassVar[bool] = True
    source: SourceConfig = Field(default_factory=SourceConfig)
    """Who writes: student, teacher, gold, speculative, mixed or traces."""
    keep: tuple[Keep, ...]
    """One filter or a list, applied in turn."""
    tries: int = Field(default=1, ge=1)
    """Rounds of writing for problems with nothing left (a source that samples)."""

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "keep" in raw and not isinstance(raw["keep"], list | tuple):
            return {**raw, "keep": [raw["keep"]]}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Filtered:
        kind = self.source.kind
        inner = ("student", "teacher", "gold", "speculative", "mixed", "traces")
        if kind not in inner:
            raise ValueError(f"filtered takes the responses of {', '.join(inner)}, not of {kind}")
        if not self.keep:
            raise ValueError("keep needs a filter: right, wrong, or {score: NAME, above: x}")
        if self.tries > 1 and kind not in ("student", "speculative", "mixed"):
            raise ValueError(f"tries writes again, and the text of {kind} is the same every time; leave tries out")
        if self.tries > 1 and any(rule.ranks for rule in self.keep):
            raise ValueError("tries cannot fill what top and bottom rank over the step; use above, below or best")
        return self

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Those of the source inside."""
        return self.source.origins

    @property
    def weighted(self) -> tuple[Origin, ...]:
        """As the source inside."""
        return self.source.settings.weighted

    @property
    def scores(self) -> set[str]:
        """The scores that its filters read."""
        return {rule.score for rule in self.keep}

    @property
    def asks_teacher(self) -> bool:
        """Where it writes, or scores."""
        return self.source.settings.asks_teacher or bool(self.scores & {"teacher_logp", "logp_gap"})

    @property
    def judges(self) -> bool:
        """Where a filter reads verdicts."""
        return bool(self.scores - {"length", "student_logp", "teacher_logp", "logp_gap"})

    @property
    def joint(self) -> bool:
        """As the source inside."""
        return self.source.settings.joint

    @property
    def generates(self) -> bool:
        """Where the source inside does, or the student is asked."""
        return self.source.settings.generates or "student_rate" in self.scores
