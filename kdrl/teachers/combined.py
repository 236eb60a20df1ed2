"""How a recipe makes one teacher of several: routed by the problem, averaged, or the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from kdrl.config import Config
from kdrl.problems import explain_validation
from kdrl.teachers.config import TeacherConfig

if TYPE_CHECKING:
    from kdrl.teachers.base import Teacher
    from kdrl.teachers.several import SeveralTeachers

Positive = Annotated[float, Field(gt=0.0)]


class RouteConfig(Config):
    """Each response goes to the teacher of its problem's kind (MOPD, arXiv 2601.02780)."""

    by: str
    """A column of the data, or a key of a generated problem's metadata, such as `domain`."""
    to: dict[str, str] = Field(min_length=1)
    """Value of that column to the name of a teacher, as in {math: A, code: B}."""
    otherwise: str | None = None
    """The teacher of all other values; null refuses a problem with one."""


class AverageConfig(Config):
    """A weighted mean of the teachers' distributions."""

    of: dict[str, Positive] = Field(min_length=2)
    """Teacher to its weight, as in {A: 2, B: 1}; the weights are divided by their sum."""
    space: Literal["probability", "log"] = "probability"
    """`probability`: sum of w p; `log`: p proportional to the product of p^w (a forward KL's or a reverse KL's
    barycentre)."""


class BestConfig(Config):
    """For each response, or each token, one of the teachers by a score."""

    of: tuple[str, ...] = Field(min_length=2)
    """The teachers; at a tie the first."""
    by: Literal["cross_entropy", "confidence"] = "cross_entropy"
    """`cross_entropy`: the one that finds the written tokens likelier; `confidence`: the larger highest probability."""
    per: Literal["response", "token"] = "response"
    """Whether one teacher scores a whole response, by its mean, or each token has its own."""


class CombinedConfig(Config):
    """One teacher made of several of `teachers`: exactly one of the three."""

    route: RouteConfig | None = None
    """By a column of the problem, as in {by: domain, to: {math: A, code: B}, otherwise: A}."""
    average: AverageConfig | None = None
    """A mean of distributions, as in {of: {A: 1, B: 1}, space: probability}."""
    best: BestConfig | None = None
    """The best for each response or token, as in {of: [A, B], by: cross_entropy}."""

    @model_validator(mode="after")
    def _one(self) -> CombinedConfig:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a combined teacher is one of route, average and best")
        return self

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the teachers that it is made of, each once."""
        names: list[str] = []
        if self.route is not None:
            names = [*self.route.to.values(), *([self.route.otherwise] if self.route.otherwise else [])]
        if self.average is not None:
            names = [*self.average.of]
        if self.best is not None:
            names = [*self.best.of]
        return tuple(dict.fromkeys(names))

    def build(self, name: str, teachers: Mapping[str, Teacher]) -> SeveralTeachers:
        """The live teacher; raises UserError when its members cannot give what it needs."""
        from kdrl.teachers.several import AveragedTeacher, BestTeacher, RoutedTeacher

        chosen = {member: teachers[member] for member in self.members}
        if self.route is not None:
            return RoutedTeacher(name, chosen, self.route)
        if self.average is not None:
            return AveragedTeacher(name, chosen, self.average)
        assert self.best is not None
        return BestTeacher(name, chosen, self.best)


WAYS = TeacherConfig.others


def is_combined(raw: Any) -> bool:
    """Whether the raw value of a recipe describes a combination, not a model."""
    return isinstance(raw, Mapping) and bool(raw.keys() & set(WAYS))


def read_teacher(raw: Any) -> TeacherConfig | CombinedConfig:
    """An entry of `teachers` from its recipe form; raises ValueError saying what is wrong."""
    if isinstance(raw, TeacherConfig | CombinedConfig):
        return raw
    kind = CombinedConfig if is_combined(raw) else TeacherConfig
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ValueError("; ".join(explain_validation(error, kind, ""))) from None


def _write_teacher(config: TeacherConfig | CombinedConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


TeacherEntry = Annotated[TeacherConfig | CombinedConfig, PlainValidator(read_teacher), PlainSerializer(_write_teacher)]
