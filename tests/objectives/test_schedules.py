"""Schedules against numbers run by hand at the start, the middle, the end and beyond."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrl.errors import UserError
from kdrl.objectives.schedules import SCHEDULES, Schedule, register_schedule
from kdrl.objectives.terms import DistillConfig

from .reference import quick

# spec, total steps, {step: value}
HAND: list[tuple[Any, int, dict[int, float]]] = [
    (0.3, 10, {0: 0.3, 5: 0.3, 10: 0.3, 99: 0.3}),
    (2, 10, {0: 2.0, 99: 2.0}),
    ({"constant": 0.3}, 10, {0: 0.3, 99: 0.3}),
    ({"constant": {"value": 0.3}}, 10, {0: 0.3, 99: 0.3}),
    ({"constant": 2.0, "warmup": 4}, 10, {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 99: 2.0}),
    ({"linear": {"from": 5e-3, "to": 1e-3, "steps": 80}}, 280, {0: 5e-3, 1: 4.95e-3, 40: 3e-3, 80: 1e-3, 279: 1e-3}),
    ({"linear": {"from": 1.0, "to": 0.0}}, 10, {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0, 20: 0.0}),
    ({"linear": {"from": 1.0, "to": 3.0, "start": 4, "steps": 2}}, 10, {0: 1.0, 4: 1.0, 5: 2.0, 6: 3.0, 99: 3.0}),
    ({"linear": {"from": 1.0, "to": 0.0, "start": 6}}, 10, {0: 1.0, 6: 1.0, 8: 0.5, 10: 0.0}),
    ({"linear": {"from": 4.0, "to": 0.0, "steps": 4}, "warmup": 2}, 10, {0: 2.0, 1: 3.0, 2: 2.0, 4: 0.0, 9: 0.0}),
    ({"cosine": {"from": 1.0, "to": 0.0}}, 4, {0: 1.0, 1: 0.8535533906, 2: 0.5, 3: 0.1464466094, 4: 0.0, 9: 0.0}),
    ({"cosine": {"from": 3.0, "to": 1.0, "steps": 6, "start": 2}}, 99, {0: 3.0, 2: 3.0, 4: 2.5, 5: 2.0, 8: 1.0}),
    ({"wsd": {"peak": 2.0, "warmup": 2, "decay": 4, "floor": 0.4}}, 10,
     {0: 1.0, 1: 2.0, 2: 2.0, 6: 2.0, 7: 1.6, 8: 1.2, 9: 0.8, 10: 0.4}),
    ({"wsd": {"peak": 1.0}}, 20, {0: 1.0, 16: 1.0, 17: 0.75, 18: 0.5, 19: 0.25, 20: 0.0}),
    ({"wsd": {"peak": 1.0, "decay": 0}}, 10, {0: 1.0, 9: 1.0}),
    ({"switch": {"at": 60, "before": 1.0, "after": 0.0}}, 150, {0: 1.0, 59: 1.0, 60: 0.0, 149: 0.0, 999: 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "total", "values"), HAND, ids=[str(case[0]) for case in HAND])
def test_each_kind_by_hand(spec: Any, total: int, values: dict[int, float]):
    schedule = Schedule(spec)
    for step, value in values.items():
        assert schedule(step, total) == pytest.approx(value, abs=1e-9), f"step {step}"
    assert schedule.spec == spec, "a recipe gets back what it said"
    assert schedule == Schedule(spec)
    assert schedule != Schedule(0.123)


def test_wsd_stays_at_its_floor_beyond_the_end():
    schedule = Schedule({"wsd": {"peak": 2.0, "decay": 4, "floor": 0.4}})
    assert [schedule(step, 10) for step in (10, 11, 99)] == pytest.approx([0.4, 0.4, 0.4])


def test_every_built_in_kind_is_run_by_hand_above():
    told = {next(iter(spec)) for spec, _, _ in HAND if isinstance(spec, dict)}
    assert told >= {name for name in SCHEDULES if SCHEDULES.get(name).__module__.startswith("kdrl.")}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@given(ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), total=st.integers(1, 50))
@quick
def test_ramps_stay_between_their_ends_and_never_turn(kind: str, ends: tuple[float, float], total: int):
    schedule = Schedule({kind: {"from": ends[0], "to": ends[1]}})
    values = [schedule(step, total) for step in range(total + 3)]
    rising = ends[1] >= ends[0]
    pairs = list(pairwise(values))
    assert all((b >= a - 1e-12) if rising else (b <= a + 1e-12) for a, b in pairs)
    assert values[0] == pytest.approx(ends[0])
    assert values[-1] == pytest.approx(ends[1])


@given(
    total=st.integers(1, 30), warmup=st.integers(0, 40), decay=st.none() | st.integers(0, 40), step=st.integers(0, 60)
)
@quick
def test_wsd_stays_between_floor_and_peak(total: int, warmup: int, decay: int | None, step: int):
    step = min(step, total)
    settings = {"peak": 1.0, "warmup": warmup, "decay": decay}
    assert -1e-12 <= Schedule({"wsd": settings})(step, total) <= 1.0 + 1e-12


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (None, "a number or a mapping"),
        (True, "a number or a mapping"),
        ("0.1", "is not a number"),
        ("linear", "is not a number"),
        ([1, 2], "is not a number"),
        ({}, "names one kind"),
        ({"warmup": 3}, "names one kind"),
        ({"linear": {"from": 1, "to": 0}, "constant": 1}, "names one kind"),
        ({"liner": {"from": 1, "to": 0}}, "did you mean 'linear'"),
        ({"linear": {"from": 1}}, "linear needs to"),
        ({"linear": {"to": 1}}, "linear needs from"),
        ({"linear": {"from": 1, "to": 0, "step": 3}}, "no setting 'step'; did you mean 'steps'"),
        ({"linear": {"from": "1", "to": 0}}, "linear.from is a number, not '1'"),
        ({"linear": {"from": True, "to": 0}}, "linear.from is a number, not True"),
        ({"linear": 3}, "linear has no setting"),
        ({"switch": {"at": 3, "before": 1}}, "switch needs after"),
        ({1: 2}, "no schedule is called 1"),
        (float("nan"), "number"),
        ({"constant": float("inf")}, "number"),
        ({"constant": None}, "number"),
        ({"linear": {"from": None, "to": 0}}, "number"),
        ({"switch": {"at": None, "before": 1, "after": 0}}, "number"),
        ({"constant": 1, "warmup": -1}, "warmup is a number of steps"),
        ({"constant": 1, "warmup": 1.5}, "warmup is a number of steps"),
        ({"constant": 1, "warmup": True}, "warmup is a number of steps"),
    ],
    ids=str,
)
def test_bad_specs_are_refused_with_a_sentence(spec: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Schedule(spec)
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate({"weight": spec})


def test_optional_settings_may_be_null():
    assert Schedule({"linear": {"from": 1, "to": 0, "steps": None}})(5, 10) == 0.5
    assert Schedule({"wsd": {"peak": 1, "decay": None}})(9, 10) == 0.5


def test_a_schedule_of_one_s_own():
    @register_schedule("test_harmonic")
    def harmonic(step: int, total: int, top: float, slope: float = 1.0) -> float:
        return top / (1 + slope * step)

    assert Schedule({"test_harmonic": {"top": 6.0}})(2, 10) == pytest.approx(2.0)
    assert Schedule({"test_harmonic": {"top": 6.0, "slope": 0.5}, "warmup": 4})(2, 10) == pytest.approx(2.25)
    config = DistillConfig.model_validate({"weight": {"test_harmonic": {"top": 6.0}}})
    assert config.weight(1, 10) == pytest.approx(3.0)
    assert config.model_dump()["weight"] == {"test_harmonic": {"top": 6.0}}
    with pytest.raises(ValueError, match="needs top"):
        Schedule({"test_harmonic": {}})


def test_a_built_in_schedule_cannot_be_replaced():
    with pytest.raises(UserError, match="schedule 'linear' is built in"):
        register_schedule("linear")(lambda step, total: 0.0)
