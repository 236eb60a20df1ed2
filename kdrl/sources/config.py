"""How a recipe says who writes the responses."""

from __future__ import annotations

from string import Formatter
from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from kdrl.config import Config
from kdrl.errors import nearest

KINDS = ("student", "gold", "teacher", "mixture", "privileged")
SHOWN = ("prompt", "answer", "solution")


def _check_template(template: str) -> None:
    """Raise ValueError for a privileged prompt that cannot be filled in."""
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the privileged template {template!r} is no format string: {error}") from None
    if unknown := sorted(names - set(SHOWN)):
        raise ValueError(f"the privileged template names {{{unknown[0]}}}{nearest(unknown[0], SHOWN)}")
    if not names & {"answer", "solution"}:
        raise ValueError("the privileged template shows nothing privileged: it needs {answer} or {solution}")


class SourceConfig(Config):
    """`student`, `gold`, `teacher`, `{mixture: share}` or `{privileged: {template: ...}}`."""

    kind: Literal["student", "gold", "teacher", "mixture", "privileged"] = "student"
    """`privileged`: the student, and for groups with no right answer also the student with privileged context."""
    share: float | None = Field(default=None, ge=0.0, le=1.0)
    """mixture: probability that a step's responses are the student's; the coin is tossed per step (GKD, 2306.13649)."""
    other: Literal["gold", "teacher"] = "gold"
    """mixture: who writes the other steps."""
    template: str | None = None
    """privileged: the prompt with what the student may see, over {prompt}, {answer} and {solution}."""
    samples: int | None = Field(default=None, ge=1)
    """privileged: responses per prompt before the filter to right ones; default: rollout.group."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"kind": raw}
        if isinstance(raw, dict) and raw and "kind" not in raw:
            key = next(iter(raw))
            if len(raw) != 1 or key not in ("mixture", "privileged"):
                raise ValueError(f"a source is one of {', '.join(KINDS)}, not {raw!r}")
            value = raw[key]
            inner = value if isinstance(value, dict) else {"share": value}
            return {"kind": key, **inner}
        return raw

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if (self.kind == "mixture") != (self.share is not None):
            raise ValueError("a mixture needs the student's share, as in {mixture: 0.5}")
        if (self.kind == "privileged") != (self.template is not None):
            raise ValueError(
                'a privileged source needs its prompt: {privileged: {template: "{prompt}\\nAnswer: {answer}"}}'
            )
        if self.template is not None:
            _check_template(self.template)
        if self.kind != "privileged" and self.samples is not None:
            raise ValueError("samples belongs to a privileged source; rollout.group says how many the others write")
        if self.kind != "mixture" and "other" in self.model_fields_set:
            raise ValueError("other belongs to a mixture: {mixture: {share: 0.5, other: teacher}}")
        return self

    @property
    def origins(self) -> tuple[str, ...]:
        """Whose responses a step can hold."""
        return {
            "mixture": ("student", self.other),
            "privileged": ("student", "privileged"),
        }.get(self.kind, (self.kind,))

    @model_serializer
    def _write(self) -> Any:
        if self.kind == "mixture":
            return {"mixture": {"share": self.share, "other": self.other}}
        if self.kind == "privileged":
            inner = {"template": self.template}
            return {"privileged": inner if self.samples is None else {**inner, "samples": self.samples}}
        return self.kind
