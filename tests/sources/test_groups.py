"""Pairs and guided groups: two writers, one group, draws of their own."""

from __future__ import annotations

from kdrl.batch import Rollouts
from kdrl.sources.groups import TogetherSource

from .scripted import Script, request


def test_every_group_holds_both_writers_and_the_first_comes_first():
    first, second = Script("teacher", 1), Script("student", 3)
    responses = TogetherSource(first, second).write(request(2))
    rollouts = Rollouts.of(responses)
    for group in range(3):
        mine = [r for r in responses if r.group == group]
        assert [r.origin for r in mine] == ["teacher", "student", "student", "student"]
        assert len({r.problem.id for r in mine}) == 1
    assert rollouts.group_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_writers_do_not_share_their_draws():
    first, second = Script("teacher"), Script("student")
    TogetherSource(first, second).write(request(2))
    assert first.calls[0].seed != second.calls[0].seed
    TogetherSource(first, second).write(request(2))
    assert second.calls[0].seed == second.calls[1].seed
