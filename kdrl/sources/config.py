"""How a recipe says who writes the responses: a kind, with its settings where it has any."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, SerializeAsAny, ValidationError, model_serializer, model_validator

from kdrl.batch import Origin
from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.objectives.schedules import Schedule
from kdrl.problems import explain_validation
from kdrl.registry import Registry


class SourceSettings(Config):
    """Settings of one kind of source, and what the rest of a recipe must know of it."""

    alone: ClassVar[str | None] = None
    """The setting that may stand alone, as in {mixture: 0.5}."""
    alone_mapping: ClassVar[bool] = False
    """Whether that setting may be a mapping itself, such as a schedule."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Whose responses a step can hold."""
        raise NotImplementedError

    @property
    def weighted(self) -> tuple[Origin, ...]:
        """Origins whose tokens carry importance weights, so that they stand for the student's own samples."""
        return ()

    @property
    def asks_teacher(self) -> bool:
        """Whether writing needs the teacher model."""
        return False

    @property
    def generates(self) -> bool:
        """Whether a model writes anything."""
        return True

    @property
    def judges(self) -> bool:
        """Whether writing looks at verdicts."""
        return False

    @property
    def resamples(self) -> bool:
        """Whether dynamic sampling can replace a group by another of the same kind."""
        return False

    @property
    def joint(self) -> bool:
        """Whether student and teacher write in turns, which leaves top-p and top-k without a meaning."""
        return False


SOURCES: Registry[type[SourceSettings]] = Registry("source")


def _read_settings(name: str, given: Any) -> SourceSettings:
    if name not in SOURCES:
        raise ValueError(f"no source is called {name!r}{nearest(str(name), SOURCES)}")
    kind = SOURCES.get(name)
    if given is None:
        given = {}
    if not kind.model_fields and given != {}:
        raise ValueError(f"source {name} has no settings; write {name!r} alone")
    settings = isinstance(given, dict) and (not kind.alone_mapping or not given or set(given) & set(kind.model_fields))
    if not settings:
        given = {kind.alone: given}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ValueError("; ".join(explain_validation(error, kind, f"{name}."))) from None


class SourceConfig(Config):
    """A kind's name, `{kind: value}` for its main setting, or `{kind: {setting: value}}`."""

    kind: str = "student"
    """One of the registered kinds."""
    settings: SerializeAsAny[SourceSettings] = Field(default_factory=lambda: SOURCES.get("student")())
    """What the kind takes."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, SourceConfig) or raw == {}:
            return raw
        if isinstance(raw, str):
            return {"kind": raw, "settings": _read_settings(raw, None)}
        if isinstance(raw, dict) and len(raw) == 1:
            name, given = next(iter(raw.items()))
            return {"kind": name, "settings": _read_settings(name, given)}
        raise ValueError(f"a source is one of {', '.join(SOURCES)}, alone or with its settings, not {raw!r}")

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Whose responses a step can hold."""
        return self.settings.origins

    @property
    def template(self) -> str | None:
        """The privileged prompt, where there is one."""
        return getattr(self.settings, "template", None)

    @model_serializer
    def _write(self) -> Any:
        given = {k: v for k, v in self.settings.model_dump(mode="json").items() if v is not None}
        return {self.kind: given} if given else self.kind


def check_share(name: str, share: Schedule, low: float = 0.0) -> None:
    """Raise ValueError for a constant share that is no share; one that moves is checked against the run's length."""
    value = share.spec
    if isinstance(value, int | float) and not low <= value <= 1.0:
        raise ValueError(f"{name} is a share between {low:g} and 1, not {value:g}")
