"""Scalars that move with the step: a number, or `{constant|linear|cosine|wsd|switch: {...}, warmup: n}`.

One with a memory (`taid`, `on_rise`, `calibrated`, `trend`, `target_kl`, `balance`) follows a metric of the run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.objectives.adaptive import ADAPTIVE, Adaptive, State, followed
from kdrl.problems import explain_validation
from kdrl.registry import Registry

# fn(step, total, **settings) -> float, with step counted from 0 and total the steps of the run.
ScheduleFunction = Callable[..., float]
SCHEDULES: Registry[ScheduleFunction] = Registry("schedule")


def register_schedule(name: str) -> Callable[[ScheduleFunction], ScheduleFunction]:
    """Register `fn(step, total, **settings) -> float` as `{name: {settings}}` for any weight or learning rate."""
    return SCHEDULES.add(name)


def _progress(step: int, total: int, steps: int | None, start: int) -> float:
    length = max(1, (total - start) if steps is None else steps)
    return min(1.0, max(0.0, (step - start) / length))


@register_schedule("constant")
def constant(step: int, total: int, value: float) -> float:
    """The same value at every step."""
    return value


@register_schedule("linear")
def linear(step: int, total: int, to: float, steps: int | None = None, start: int = 0, **ends: float) -> float:
    """From `from` to `to` in equal steps over `steps` (default: the rest of the run) after step `start`."""
    return ends["from"] + (to - ends["from"]) * _progress(step, total, steps, start)


@register_schedule("cosine")
def cosine(step: int, total: int, to: float, steps: int | None = None, start: int = 0, **ends: float) -> float:
    """From `from` to `to` along half a cosine over `steps` (default: the rest of the run) after step `start`."""
    fall = (1.0 + math.cos(math.pi * _progress(step, total, steps, start))) / 2.0
    return to + (ends["from"] - to) * fall


@register_schedule("wsd")
def wsd(step: int, total: int, peak: float, warmup: int = 0, decay: int | None = None, floor: float = 0.0) -> float:
    """Warm up to `peak` in `warmup` steps, stay, and fall linearly to `floor` in the last `decay` (default a fifth)."""
    tail = max(1, total // 5 if decay is None else decay)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = min(1.0, max(0.0, (total - step) / tail))
    return floor + (peak * rise - floor) * left


@register_schedule("switch")
def switch(step: int, total: int, at: int, before: float, after: float) -> float:
    """`before` until step `at`, `after` from it on (OPD then RL, 2609.04108)."""
    return before if step < at else after


@dataclass(frozen=True)
class Moment:
    """Where a run stands: the step from 0, the number of steps, and what scalars with a memory have come to."""

    step: int = 0
    total: int = 1
    memory: Memory | None = None


START = Moment()


class Schedule:
    """A scalar of the step, read from a recipe value and written back unchanged.

    Raises ValueError for an unknown kind or setting. A reciprocal or looked-up schedule is left out.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.warmup = 0
        self.adaptive: Adaptive | None = None
        if isinstance(spec, bool) or spec is None:
            raise ValueError(
                f"a schedule is a number or a mapping such as {{linear: {{from: 1, to: 0}}}}, not {spec!r}"
            )
        if isinstance(spec, int | float) and math.isfinite(spec):
            self._function, self._settings = constant, {"value": float(spec)}
            return
        if not isinstance(spec, dict):
            raise ValueError(f"{spec!r} is not a number; a schedule is a number or {{linear: {{from: 1, to: 0}}}}")
        spec = dict(spec)
        self.warmup = spec.pop("warmup", 0)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError("warmup is a number of steps, 0 or more")
        known = [*SCHEDULES, *ADAPTIVE]
        if len(spec) != 1:
            raise ValueError(f"a schedule names one kind, not {list(spec) or 'none'}; kinds: {', '.join(known)}")
        name, settings = next(iter(spec.items()))
        if name in ADAPTIVE:
            self.adaptive = _read_adaptive(name, settings)
        elif name in SCHEDULES:
            self._function = SCHEDULES.get(name)
            self._settings = self._checked(name, settings)
        else:
            raise ValueError(f"no schedule is called {name!r}{nearest(str(name), known)}")

    def _checked(self, name: str, settings: Any) -> dict[str, Any]:
        settings = settings if isinstance(settings, dict) else {"value": settings}
        parameters = list(inspect.signature(self._function).parameters.values())[2:]
        # `from` is a Python keyword, so the ramps take it through **ends.
        named = {p.name if p.kind is not p.VAR_KEYWORD else "from": p for p in parameters}
        for key, value in settings.items():
            if key not in named:
                raise ValueError(f"schedule {name} has no setting {key!r}{nearest(key, named)}")
            left_open = value is None and named[key].default is None
            if not left_open and (
                isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
            ):
                raise ValueError(f"{name}.{key} is a number, not {value!r}")
        missing = [k for k, p in named.items() if p.default is p.empty and k not in settings]
        if missing:
            raise ValueError(f"schedule {name} needs {', '.join(missing)}")
        return settings

    def at(self, moment: Moment) -> float:
        """Its value at a moment of a run; one with a memory is at its start where the run keeps none."""
        rise = min(1.0, (moment.step + 1) / self.warmup) if self.warmup else 1.0
        if self.adaptive is None:
            return rise * float(self._function(moment.step, moment.total, **self._settings))
        state = self.adaptive.begin() if moment.memory is None else moment.memory.of(self)
        return rise * self.adaptive.value(state, moment.step, moment.total)

    def __call__(self, step: int, total: int) -> float:
        """Its value at `step` (from 0) of a run of `total` steps."""
        return self.at(Moment(step, total))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.spec == other.spec

    def __repr__(self) -> str:
        return f"Schedule({self.spec!r})"


def _read_adaptive(name: str, settings: Any) -> Adaptive:
    kind = ADAPTIVE.get(name)
    try:
        return kind.model_validate(settings or {})
    except ValidationError as error:
        raise ValueError("; ".join(explain_validation(error, kind, f"{name}."))) from None


def schedules_in(thing: Any, path: str = "") -> Iterator[tuple[str, Schedule]]:
    """Every schedule inside a configuration with its dotted path, in the order of the fields."""
    if isinstance(thing, Schedule):
        yield path, thing
    elif isinstance(thing, Config):
        for name in type(thing).model_fields:
            yield from schedules_in(getattr(thing, name), f"{path}.{name}" if path else name)
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from schedules_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(thing, list | tuple):
        for i, value in enumerate(thing):
            yield from schedules_in(value, f"{path}.{i}")
    elif hasattr(thing, "parts"):  # a recipe's entry or a score: what holds settings without being a section
        yield from schedules_in(thing.parts(), path)


@dataclass
class Memory:
    """The states of all scalars with a memory, by their place in the recipe."""

    schedules: dict[str, Schedule]
    states: dict[str, State] = field(default_factory=dict)

    @classmethod
    def within(cls, config: Any) -> Memory:
        """At the start of a run of this recipe."""
        found = {path: s for path, s in schedules_in(config) if s.adaptive is not None}
        return cls(found, {path: s.adaptive.begin() for path, s in found.items() if s.adaptive})

    def of(self, schedule: Schedule) -> State:
        """The state of one schedule, which must be of this recipe."""
        for path, mine in self.schedules.items():
            if mine is schedule:
                return self.states[path]
        raise TypeError(f"{schedule!r} is not of this run's recipe: a copy of a configuration has no memory")

    def follows(self, metric: str) -> bool:
        """Whether any of them reads a metric."""
        return any(s.adaptive is not None and s.adaptive.metric == metric for s in self.schedules.values())

    def update(self, row: Mapping[str, Any], step: int, total: int) -> None:
        """Move every scalar whose metric this step's row holds."""
        for path, schedule in self.schedules.items():
            assert schedule.adaptive is not None
            found = followed(schedule.adaptive, row)
            if found is not None:
                self.states[path] = schedule.adaptive.update(self.states[path], found, step, total)
