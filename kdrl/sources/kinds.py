"""The kinds of source and their settings."""

from __future__ import annotations

from string import Formatter
from typing import Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from kdrl.batch import Origin
from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.objectives.base import ScheduleField
from kdrl.sources.config import SOURCES, SourceConfig, SourceSettings, check_share
from kdrl.sources.scores import RESPONSE_SCORES

SHOWN = ("prompt", "answer", "solution")


@SOURCES.add("student")
class Student(SourceSettings):
    """On-policy responses, rollout.group a problem."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The student alone."""
        return ("student",)

    @property
    def resamples(self) -> bool:
        """Every round draws new samples."""
        return True


@SOURCES.add("gold")
class Gold(SourceSettings):
    """The worked solution of each problem."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The data alone."""
        return ("gold",)


@SOURCES.add("teacher")
class Teacher(SourceSettings):
    """The teacher's responses, rollout.group a problem, written once and stored (SeqKD, 1606.07947)."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The teacher alone."""
        return ("teacher",)

    @property
    def asks_teacher(self) -> bool:
        """It writes."""
        return True


class _Fixed(SourceSettings):
    """A source that falls back on fixed data."""

    other: Literal["gold", "teacher"] = "gold"
    """Who writes the fixed data."""

    @property
    def asks_teacher(self) -> bool:
        """Where the fixed data is its text."""
        return self.other == "teacher"


@SOURCES.add("mixture")
class Mixture(_Fixed):
    """The student with a probability, fixed data otherwise (GKD, 2306.13649)."""

    alone: ClassVar[str | None] = "share"
    alone_mapping: ClassVar[bool] = True
    share: ScheduleField
    """Probability that the student writes: a number or a schedule."""
    per: Literal["batch", "sample"] = "batch"
    """One coin per step, as GKD's authors, or one per problem."""

    @model_validator(mode="after")
    def _check(self) -> Mixture:
        check_share("mixture.share", self.share)
        return self

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The student and the other."""
        return ("student", self.other)

    @property
    def resamples(self) -> bool:
        """A step that is the student's; with a coin per problem fixed groups would be thrown away for ever."""
        return self.per == "batch"


@SOURCES.add("privileged")
class Privileged(SourceSettings):
    """The student, and for groups with no right answer also the student with privileged context (HDPO, 2603.23871)."""

    alone: ClassVar[str | None] = "template"
    template: str
    """The prompt with what the student may see, over {prompt}, {answer} and {solution}."""
    samples: int | None = Field(default=None, ge=1)
    """Responses per prompt before the filter to right ones; default: rollout.group."""

    @model_validator(mode="after")
    def _check(self) -> Privileged:
        check_template(self.template)
        return self

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The student with and without the context."""
        return ("student", "privileged")

    @property
    def judges(self) -> bool:
        """Failed groups are what it is for."""
        return True

    @property
    def resamples(self) -> bool:
        """As the student alone."""
        return True


def check_template(template: str) -> None:
    """Raise ValueError for a privileged prompt that cannot be filled in."""
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the privileged template {template!r} is no format string: {error}") from None
    if unknown := sorted(names - set(SHOWN)):
        raise ValueError(f"the privileged template names {{{unknown[0]}}}{nearest(unknown[0], SHOWN)}")
    if not names & {"answer", "solution"}:
        raise ValueError("the privileged template shows nothing privileged: it needs {answer} or {solution}")


@SOURCES.add("buffer")
class Buffer(_Fixed):
    """New samples, replayed ones or fixed data, by one draw per step (DistiLLM, 2402.03898)."""

    alone: ClassVar[str | None] = "share"
    alone_mapping: ClassVar[bool] = True
    share: ScheduleField
    """phi, the share of steps on the student's text: a number or a schedule such as {on_rise: {}}."""
    size: int = Field(default=1000, ge=1)
    """Responses that the buffer holds; a full one forgets its oldest."""

    @model_validator(mode="after")
    def _check(self) -> Buffer:
        check_share("buffer.share", self.share)
        return self

    @property
    def origins(self) -> tuple[Origin, ...]:
        """All three."""
        return ("student", "buffer", self.other)


@SOURCES.add("speculative")
class Speculative(SourceSettings):
    """The student proposes each token, the teacher replaces those outside its top-k (SKD, 2410.11325)."""

    alone: ClassVar[str | None] = "k"
    k: int = Field(ge=1)
    """A proposal among the teacher's k likeliest tokens stays; 25 in the paper's replications."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Both in turns."""
        return ("speculative",)

    @property
    def asks_teacher(self) -> bool:
        """It writes along."""
        return True

    @property
    def joint(self) -> bool:
        """Both write."""
        return True


@SOURCES.add("mixed")
class Mixed(SourceSettings):
    """Every token from a p_teacher + (1 - a) q_student, with importance weights (MiniLLM, 2306.08543)."""

    alone: ClassVar[str | None] = "share"
    alone_mapping: ClassVar[bool] = True
    share: ScheduleField
    """a, the teacher's share of every token's distribution; 0.2 in MiniLLM."""
    weights: Literal["token", "prefix", "sequence", "none"] = "token"
    """q/mixture of the token alone (MiniLLM: low variance, right for the next token given its prefix, biased because
    the prefix is the mixture's); its product over the prefix (unbiased for losses of prefix and token); the product
    over the whole response (unbiased for outcome rewards too, highest variance); or none."""

    @model_validator(mode="after")
    def _check(self) -> Mixed:
        check_share("mixed.share", self.share)
        return self

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Their mixture."""
        return ("mixed",)

    @property
    def weighted(self) -> tuple[Origin, ...]:
        """Unless weights are switched off."""
        return () if self.weights == "none" else ("mixed",)

    @property
    def asks_teacher(self) -> bool:
        """It writes along."""
        return True

    @property
    def resamples(self) -> bool:
        """Every round draws new samples."""
        return True

    @property
    def joint(self) -> bool:
        """Both write."""
        return True


@SOURCES.add("corrupt")
class Corrupt(SourceSettings):
    """Gold text, and a copy with a share of its tokens refilled by the student (KID, 2410.11371)."""

    alone: ClassVar[str | None] = "share"
    alone_mapping: ClassVar[bool] = True
    share: ScheduleField
    """Share of the trained tokens that are refilled."""
    pick: Literal["random", "hard", "easy"] = "random"
    """Which: at random, or where the student's entropy is highest or lowest."""

    @model_validator(mode="after")
    def _check(self) -> Corrupt:
        check_share("corrupt.share", self.share)
        return self

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The text before and after."""
        return ("gold", "corrupt")


@SOURCES.add("pair")
class Pair(SourceSettings):
    """Two writers' responses to every problem in one group (DistiLLM-2, DPKD, PLaD)."""

    alone: ClassVar[str | None] = "chosen"
    chosen: Literal["teacher", "gold"] = "teacher"
    """Who writes the better ones."""
    rejected: Literal["student"] = "student"
    """Who writes the others."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Both."""
        return (self.chosen, self.rejected)

    @property
    def asks_teacher(self) -> bool:
        """Where it writes."""
        return self.chosen == "teacher"


@SOURCES.add("guided")
class Guided(SourceSettings):
    """Student rollouts and a few teacher traces in the same group (LUFFY, 2504.14945)."""

    alone: ClassVar[str | None] = "teacher"
    teacher: int = Field(default=1, ge=1)
    """Teacher responses per group; the student writes rollout.group less as many."""
    traces: str | None = None
    """A file of `kdrl generate` to take them from; default: the teacher of the recipe writes them once."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Both."""
        return ("student", "teacher")

    @property
    def asks_teacher(self) -> bool:
        """Unless its traces are stored already."""
        return self.traces is None

    @property
    def resamples(self) -> bool:
        """The student's part is new in every round."""
        return True


@SOURCES.add("traces")
class Traces(SourceSettings):
    """Stored responses, right and wrong, of a file of `kdrl generate` (REDI, 2505.24850)."""

    alone: ClassVar[str | None] = "path"
    path: str
    """JSON lines with prompt (or id), response, and reward and correct where they are known already."""
    take: Literal["all", "right", "wrong", "pair"] = "all"
    """Which traces of a problem: all, the right or the wrong ones, or one of each, drawn anew every time."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Stored text counts as the teacher's."""
        return ("teacher",)


class Keep(Config):
    """`right`, `wrong`, or `{score: NAME, above|below: x}`, `{score: NAME, top|bottom: share}`, `{..., best: n}`."""

    score: str
    """A score of responses: reward, correct, length, student_logp, teacher_logp, group_rate, student_rate."""
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
        return self.source.settings.asks_teacher or "teacher_logp" in self.scores

    @property
    def judges(self) -> bool:
        """Where a filter reads verdicts."""
        return bool(self.scores - {"length", "student_logp", "teacher_logp"})

    @property
    def joint(self) -> bool:
        """As the source inside."""
        return self.source.settings.joint
