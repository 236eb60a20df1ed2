"""The coin of a mixture: per step or per problem, constant or moving."""

from __future__ import annotations

import pytest

from kdrl.objectives.schedules import Schedule
from kdrl.sources.mixture import MixtureSource

from .scripted import Script, request


def mixture(share: object, per_sample: bool, seed: int = 0) -> MixtureSource:
    return MixtureSource(Script("student"), Script("gold", 1), Schedule(share), per_sample=per_sample, seed=seed)


def within(mine: int, tosses: int, share: float) -> bool:
    """Five standard deviations of a binomial."""
    return abs(mine - share * tosses) <= 5 * (tosses * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_share_holds(share: float, per_sample: bool):
    source, steps = mixture(share, per_sample), 400
    groups = [{r.group: r.origin for r in source.write(request(step, steps))} | {"step": step} for step in range(steps)]
    origins = [[g[i] for i in range(3)] for g in groups]  # type: ignore[index]
    if per_sample:
        flat = [origin for step in origins for origin in step]
        assert within(flat.count("student"), len(flat), share)
        if 0 < share < 1:
            assert any(len(set(step)) == 2 for step in origins), "problems of one step differ"
    else:
        assert all(len(set(step)) == 1 for step in origins)
        assert within(sum(step[0] == "student" for step in origins), steps, share)


def test_a_problem_has_one_writer_and_groups_stay_in_order():
    source = mixture(0.5, per_sample=True)
    for step in range(20):
        responses = source.write(request(step, count=6))
        assert [r.group for r in responses] == sorted(r.group for r in responses)
        for group in range(6):
            mine = [r.origin for r in responses if r.group == group]
            assert mine in (["student"] * 2, ["gold"])
        assert {r.group: r.problem.id for r in responses} == {i: str(step * 6 + i) for i in range(6)}


def test_coins_follow_seed_and_step_alone():
    def tosses(seed: int) -> list[list[str]]:
        source = mixture(0.5, True, seed)
        return [[r.origin for r in source.write(request(step))] for step in range(30)]

    assert tosses(1) == tosses(1)
    assert tosses(1) != tosses(2)
    late = mixture(0.5, True, 1)
    assert [[r.origin for r in late.write(request(step))] for step in range(20, 30)] == tosses(1)[20:]


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_share_that_moves(per_sample: bool):
    source, steps = mixture({"linear": {"from": 0.0, "to": 1.0}}, per_sample), 600
    mine = [sum(r.origin == "student" for r in source.write(request(s, steps))) / 6 for s in range(steps)]
    thirds = [sum(mine[a : a + 200]) / 200 for a in (0, 200, 400)]
    assert thirds[0] < 0.3 < thirds[1] < 0.7 < thirds[2]
