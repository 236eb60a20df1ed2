"""The kinds of source and their settings, but for the filtered one (`keep`)."""

from __future__ import annotations

from string import Formatter
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kdrl.batch import Origin
from kdrl.errors import nearest
from kdrl.objectives.base import ScheduleField
from kdrl.sources.config import SOURCES, SourceSettings, check_share

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

    @property
    def generates(self) -> bool:
        """It is there already."""
        return False


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
    """A proposal among the teacher's k likeliest tokens stays; 25 in a replication, the paper's value is not known."""

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

    @property
    def generates(self) -> bool:
        """One forward pass is no generation."""
        return False


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
    """JSON lines with prompt (or the id of a problem of the task), response, correct, and maybe reward and ended."""
    take: Literal["all", "right", "wrong", "pair"] = "all"
    """Which traces of a problem: all, the right or the wrong ones, or one of each, drawn anew every time."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Stored text counts as the teacher's."""
        return ("teacher",)

    @property
    def generates(self) -> bool:
        """They are there already."""
        return False
