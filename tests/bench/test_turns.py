"""The order of turns, and what is made of their seconds."""

from __future__ import annotations

from kdrl.bench.turns import in_turns, ratios, summary, turns


def test_every_other_turn_is_in_the_other_order():
    assert list(turns(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_a_spent_budget_ends_after_the_least_number_of_turns():
    assert [turn for turn, _ in turns(["a"], 9, budget_s=0.0)] == [0, 1]
    assert [turn for turn, _ in turns(["a"], 9, budget_s=0.0, least=1)] == [0]
    assert len(list(turns(["a"], 9, budget_s=1e9))) == 9


def test_warm_calls_are_not_counted():
    calls: list[str] = []
    found = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warm=2)
    assert "".join(calls) == "aabb" + "ab" + "ba"
    assert {name: len(each) for name, each in found.items()} == {"a": 2, "b": 2}


def test_ratios_are_of_the_same_turn():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratios([2.0, 8.0], [1.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}
