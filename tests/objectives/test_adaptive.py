"""Scalars with a memory: each against numbers run by hand, and the memory that a run keeps of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from kdrl.objectives.adaptive import ADAPTIVE, followed
from kdrl.objectives.distill import DistillConfig
from kdrl.objectives.schedules import Memory, Moment, Schedule, schedules_in


def run(spec: Any, found: Sequence[float | None], total: int = 100, metric: str | None = None) -> list[float]:
    """Values at steps 0, 1, ... of a scalar that meets these metrics after each step; None is a step without one."""
    schedule = Schedule(spec)
    assert schedule.adaptive is not None
    memory = Memory({"x": schedule}, {"x": schedule.adaptive.begin()})
    name = metric or schedule.adaptive.metric
    values = [schedule.at(Moment(0, total, memory))]
    for step, number in enumerate(found):
        memory.update({name: number, "other": 1.0}, step, total)
        values.append(schedule.at(Moment(step + 1, total, memory)))
    return values


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_taid_by_hand():
    """delta = (L_prev - L)/L_prev, mu = .99 mu + .01 delta, t = min(end, max(line, t + alpha sigmoid(mu) (1 - t)))."""
    spec = {"taid": {"start": 0.4, "alpha": 0.05, "decay": 0.9}}
    t1 = 0.4 + 0.6 * 1 / 100  # 101 steps: the line alone, there is no loss before the first
    mu2 = 0.1 * (2.0 - 1.5) / 2.0
    t2 = t1 + 0.05 * sigmoid(mu2) * (1 - t1)
    mu3 = 0.9 * mu2 + 0.1 * (1.5 - 3.0) / 1.5
    t3 = t2 + 0.05 * sigmoid(mu3) * (1 - t2)
    assert t2 > 0.4 + 0.6 * 2 / 100
    assert run(spec, [2.0, 1.5, 3.0], 101) == pytest.approx([0.4, t1, t2, t3], abs=1e-12)


def test_taid_never_falls_behind_the_line_and_ends_at_its_end():
    for losses in ([1.0] * 20, [2.0**-i for i in range(20)], [2.0**i for i in range(20)]):
        values = run({"taid": {"start": 0.2, "end": 0.9}}, losses, 21)
        assert all(v >= 0.2 + 0.7 * i / 20 - 1e-12 for i, v in enumerate(values))
        assert values == sorted(values)
        assert values[-1] == pytest.approx(0.9)
    falling, rising = (run({"taid": {"alpha": 0.3, "decay": 0.0}}, losses, 1000) for losses in
                       ([2.0**-i for i in range(10)], [2.0**i for i in range(10)]))  # fmt: skip
    assert falling[-1] > rising[-1] > 0.4


def test_taid_with_a_loss_of_zero_stays_a_number():
    values = run({"taid": {}}, [0.0, 0.0, 1e-300, 1.0], 10)
    assert all(math.isfinite(v) for v in values)


def test_on_rise_by_hand():
    """DistiLLM's replay share: +.1 when the validation loss is margin above the stored one, which only then moves."""
    spec = {"on_rise": {"start": 0.2, "by": 0.3, "margin": 0.1, "cap": 0.9}}
    found = [1.0, 1.05, 1.2, 1.25, None, 0.5, 1.31, 1.5, 9.0]
    #        stored,  -,  up,   -,   -,   -,   up,  up,  up
    expected = [0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5, 0.8, 0.9, 0.9]
    assert run(spec, found) == pytest.approx(expected)


def test_calibrated_is_measured_once_and_not_before():
    values = run({"calibrated": {}}, [0.3, 0.8])
    assert math.isnan(values[0])
    assert values[1:] == [0.3, 0.3]
    assert run({"calibrated": {"complement": True}}, [0.3])[1] == pytest.approx(0.7)


def test_trend_by_hand():
    """AdaKD: x (1 - sigma) once the running mean has fallen by eps of the anchor, x (1 + sigma) once it rose."""
    spec = {"trend": {"start": 0.5, "sigma": 0.1, "decay": 0.5, "eps": 0.1}}
    found = [1.0, 0.9, 0.7, 0.825, 1.5, 1.5]
    # mean:    1, .95, .825 (fell: anchor .825), .825, 1.1625 (rose: anchor), 1.33125 (rose)
    expected = [0.5, 0.5, 0.5, 0.45, 0.45, 0.495, 0.5445]
    assert run(spec, found) == pytest.approx(expected)


def test_trend_stays_between_floor_and_cap():
    assert run({"trend": {"decay": 0.0}}, [2.0**-i for i in range(200)])[-1] == pytest.approx(0.1)
    assert run({"trend": {"decay": 0.0, "start": 0.9}}, [2.0**i for i in range(9)])[-1] == 1.0


def test_target_kl_by_hand():
    spec = {"target_kl": {"target": 0.5, "rate": 0.1, "clip": 0.2}}
    # errors: +.1, clipped +.2, clipped -.2, 0
    expected = [1.0, 1.01, 1.01 * 1.02, 1.01 * 1.02 * 0.98, 1.01 * 1.02 * 0.98]
    assert run(spec, [0.55, 5.0, 0.0, 0.5]) == pytest.approx(expected)


def test_target_kl_holds_a_plant_at_its_target():
    """KL falls with the weight as 1/weight: the controller must find the weight 1/target."""
    schedule = Schedule({"target_kl": {"target": 0.25}})
    memory = Memory({"x": schedule}, {"x": schedule.adaptive.begin() if schedule.adaptive else {}})
    for step in range(400):
        memory.update({"kl_teacher": 1.0 / schedule.at(Moment(step, 400, memory))}, step, 400)
    assert schedule.at(Moment(400, 400, memory)) == pytest.approx(4.0, rel=1e-3)


def test_balance_by_hand():
    spec = {"balance": {"ratio": 2.0, "rate": 0.5, "start": 3.0}}
    expected = [3.0, 3.0 * (2 / 8) ** 0.5, 3.0 * (2 / 8) ** 0.5, 3.0 * (2 / 8) ** 0.5 * (2 / 0.5) ** 0.5]
    assert run(spec, [8.0, None, 0.5]) == pytest.approx(expected)
    assert run(spec, [0.0, math.inf, math.nan]) == [3.0] * 4


def test_balance_holds_a_ratio_that_is_linear_in_the_weight():
    schedule = Schedule({"balance": {"ratio": 0.3}})
    memory = Memory({"x": schedule}, {"x": {"value": 1.0}})
    for step in range(60):
        memory.update({"kd_rl_norm_ratio": 40.0 * schedule.at(Moment(step, 60, memory))}, step, 60)
    assert 40.0 * schedule.at(Moment(60, 60, memory)) == pytest.approx(0.3, rel=1e-4)


def test_every_kind_is_run_by_hand_above():
    assert set(ADAPTIVE) == {"taid", "on_rise", "calibrated", "trend", "target_kl", "balance"}


def test_the_metric_may_be_another_and_a_bad_number_changes_nothing():
    spec = {"target_kl": {"target": 1.0, "metric": "loss/mine"}}
    values = run(spec, [2.0, math.nan, math.inf, None], metric="loss/mine")
    assert values == pytest.approx([1.0, 1.02, 1.02, 1.02, 1.02])
    assert run(spec, [2.0], metric="kl_teacher") == [1.0, 1.0]
    config = Schedule(spec).adaptive
    assert config is not None
    assert followed(config, {"loss/mine": "high"}) is None
    assert followed(config, {}) is None


def test_a_warm_up_multiplies_one_with_a_memory_too():
    assert run({"target_kl": {"target": 1.0}, "warmup": 2}, [2.0, 2.0]) == pytest.approx([0.5, 1.02, 1.02**2])


def test_without_a_memory_it_stands_at_its_start():
    assert Schedule({"taid": {"start": 0.3}})(50, 100) == 0.3
    assert math.isnan(Schedule({"calibrated": {}})(0, 1))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"target_kl": {}}, r"target_kl\.target"),
        ({"target_kl": {"target": -1}}, "greater than 0"),
        ({"taid": {"decay": 1.0}}, "less than 1"),
        ({"taid": {"strat": 0.4}}, "strat"),
        ({"trend": {"sigma": 1.5}}, "less than 1"),
        ({"balance": {"ratio": 0}}, "greater than 0"),
        ({"calibrated": {"batches": 0}}, "greater than or equal to 1"),
        ({"tiad": {}}, "did you mean 'taid'"),
        ({"on_rise": {"margin": -0.1}}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(spec: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Schedule(spec)
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate({"weight": spec})


# ---------------------------------------------------------------- memory

TAID = {"taid": {"start": 0.4}}
CONFIG = {
    "weight": {"target_kl": {"target": 0.5}},
    "scale": {"above": {"of": "max_p", "value": {"trend": {}}}},
    "divergence": {
        "arms": [
            {"of": "r||q", "weight": {"linear": {"from": 1, "to": 0}}},
            {"of": "q||r", "gate": {"affine": {"of": "max_p", "scale": {"balance": {}}}}},
        ],
        "assistant": {"a": 1, "share": TAID},
    },
    "target": {"teacher_temperature": {"on_rise": {}}},
}
PATHS = {
    "weight",
    "scale.value",
    "divergence.arms.1.gate.scale",
    "divergence.assistant.share",
    "target.teacher_temperature",
}


def without_dots(path: str) -> str:
    return ".".join(part for part in path.split(".") if part)


def test_the_memory_finds_every_scalar_by_its_place():
    memory = Memory.within(DistillConfig.model_validate(CONFIG))
    assert {without_dots(path) for path in memory.schedules} == PATHS
    assert memory.follows("kd_rl_norm_ratio")
    assert memory.follows("eval/loss")
    assert not memory.follows("eval/accuracy")
    assert len(list(schedules_in(DistillConfig.model_validate(CONFIG)))) > len(PATHS)


def test_two_scalars_of_one_kind_have_a_memory_each():
    spec = {
        "weight": {"target_kl": {"target": 0.5}},
        "divergence": {"jsd": {"target_kl": {"target": 4.0, "start": 0.5}}},
    }
    config = DistillConfig.model_validate(spec)
    memory = Memory.within(config)
    memory.update({"kl_teacher": 1.0}, 0, 10)
    moment = Moment(1, 10, memory)
    assert config.weight.at(moment) == pytest.approx(1.02)
    assert config.divergence.beta is not None
    assert config.divergence.beta.at(moment) == pytest.approx(0.5 * 0.98)


def test_states_survive_json_and_go_on_as_if_never_stopped():
    rows = [{"kl_teacher": 1.0 / (1 + i), "divergence/distill": 2.0 / (1 + i), "eval/loss": i / 2,
             "kd_rl_norm_ratio": 1.5} for i in range(8)]  # fmt: skip
    whole = Memory.within(DistillConfig.model_validate(CONFIG))
    first = Memory.within(DistillConfig.model_validate(CONFIG))
    for step, row in enumerate(rows):
        whole.update(row, step, 8)
        if step < 4:
            first.update(row, step, 8)
    resumed = Memory.within(DistillConfig.model_validate(CONFIG))
    resumed.states = json.loads(json.dumps(first.states))
    for step, row in enumerate(rows[4:], 4):
        resumed.update(row, step, 8)
    assert resumed.states == whole.states
    moved = {path for path, state in whole.states.items() if state != Memory.within(
        DistillConfig.model_validate(CONFIG)).states[path]}  # fmt: skip
    assert len(moved) == len(PATHS), "every one of them moved"


def test_a_schedule_of_another_recipe_is_refused_and_does_not_stand_still():
    memory = Memory.within(DistillConfig.model_validate(CONFIG))
    with pytest.raises(TypeError, match="not of this run's recipe"):
        Schedule({"target_kl": {"target": 0.5}}).at(Moment(1, 10, memory))


def test_a_rise_of_exactly_the_margin_counts():
    rise = Schedule({"on_rise": {"margin": 0.5}}).adaptive
    assert rise is not None
    state = rise.update(rise.begin(), 1.0, 0, 10)
    assert rise.update(state, 1.5, 1, 10)["value"] == 0.1
    assert rise.update(state, 1.4375, 1, 10)["value"] == 0.0
