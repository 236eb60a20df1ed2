"""Scalars that move with the step: a number, or `{constant|linear|cosine|wsd|switch: {...}, warmup: n}`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from kdrl.errors import nearest
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


class Schedule:
    """A scalar of the step, read from a recipe value and written back unchanged.

    Raises ValueError for an unknown kind or setting. A reciprocal, adaptive or looked-up schedule is left out.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.warmup = 0
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
        if len(spec) != 1:
            raise ValueError(f"a schedule names one kind, not {list(spec) or 'none'}; kinds: {', '.join(SCHEDULES)}")
        name, settings = next(iter(spec.items()))
        if name not in SCHEDULES:
            raise ValueError(f"no schedule is called {name!r}{nearest(str(name), SCHEDULES)}")
        self._function = SCHEDULES.get(name)
        self._settings = self._checked(name, settings)

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

    def __call__(self, step: int, total: int) -> float:
        """Its value at `step` (from 0) of a run of `total` steps."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * float(self._function(step, total, **self._settings))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.spec == other.spec

    def __repr__(self) -> str:
        return f"Schedule({self.spec!r})"
