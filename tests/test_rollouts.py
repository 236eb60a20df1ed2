"""Who writes a step's responses, what is resampled and what is kept; with scripted writers and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tiny import problem

from kdrl.batch import Origin, Response, Rollouts
from kdrl.rollouts import Collected, Collector
from kdrl.sources.config import SourceConfig
from kdrl.tasks import Problem
from kdrl.tasks.base import Verdict


class Script:
    """Writes two responses a problem; the text holds the problem's number and the response's."""

    def __init__(self, origin: Origin) -> None:
        self.origin: Origin = origin
        self.calls: list[tuple[list[str], int, int]] = []

    def write(self, problems: Sequence[Problem], first_group: int, seed: int) -> list[Response]:
        self.calls.append(([p.id for p in problems], first_group, seed))
        return [
            Response(p, first_group + i, [1], [2, 3], self.origin, True, f"{p.id}/{self.origin}/{j}")
            for i, p in enumerate(problems)
            for j in range(2)
        ]


class Pool:
    """Says what `verdicts` says of a text; counts what it was asked."""

    def __init__(self, verdict: Callable[[str], bool]) -> None:
        self.verdict = verdict
        self.asked: list[str] = []

    def score(self, items: Sequence[tuple[str, Problem, Any]]) -> list[Verdict]:
        self.asked += [text for text, _, _ in items]
        return [Verdict(float(self.verdict(text)), self.verdict(text), "ok") for text, _, _ in items]


def mixed_if(useful: set[int]) -> Callable[[str], bool]:
    """Right answers: the first response of the problems in `useful`."""

    def verdict(text: str) -> bool:
        number, _, response = text.split("/")
        return int(number) in useful and response == "0"

    return verdict


def collector(
    verdict: Callable[[str], bool],
    source: Any = "student",
    prompts: int = 3,
    rounds: int = 0,
    origins: Sequence[Origin] = ("student",),
    seed: int = 0,
) -> Collector:
    pool: Any = Pool(verdict)
    return Collector(
        SourceConfig.model_validate(source),
        {origin: Script(origin) for origin in origins},
        lambda index: problem(str(index)),
        pool,
        prompts=prompts,
        rounds=rounds,
        max_tokens=8,
        seed=seed,
        device="cpu",
    )


def nobody(rollouts: Rollouts) -> set[int]:
    return set()


def numbers(out: Collected) -> list[int]:
    return sorted({int(r.problem.id) for r in out.responses})


def test_without_dynamic_sampling_everything_stays():
    one = collector(mixed_if({1}))
    assert numbers(one.collect(0, nobody)) == [0, 1, 2]
    assert numbers(one.collect(1, nobody)) == [3, 4, 5]
    assert one.position == 6


def test_groups_of_equal_rewards_are_replaced_until_the_step_is_full():
    one = collector(mixed_if({1, 3, 7, 9, 10, 11}), rounds=9)
    out = one.collect(0, nobody)
    # 0 1 2, then two more: 3 4, then one at a time: 5, 6, 7.
    assert numbers(out) == [1, 3, 7]
    assert (out.dropped_groups, out.generated, one.position) == (5, 16, 8)
    assert len({r.group for r in out.responses}) == 3
    script: Any = one.sources["student"]
    assert len({seed for _, _, seed in script.calls}) == 5, "every round draws its own samples"
    assert numbers(one.collect(1, nobody)) == [9, 10, 11]


def test_rounds_are_bounded_and_a_hopeless_step_still_holds_something():
    one = collector(mixed_if(set()), rounds=4)
    out = one.collect(0, nobody)
    script: Any = one.sources["student"]
    assert len(script.calls) == 5
    assert one.position == 15
    assert numbers(out) == [12, 13, 14], "the last round is kept: no gradient, which is the truth"


def test_groups_that_another_term_wants_are_kept_beside_the_full_step():
    def all_wrong(rollouts: Rollouts) -> set[int]:
        right = {r.group for r in rollouts.responses if r.correct}
        return {r.group for r in rollouts.responses} - right

    one = collector(mixed_if({1, 3, 5}), rounds=9)
    out = one.collect(0, all_wrong)
    assert numbers(out) == [0, 1, 2, 3, 4, 5], "all-wrong groups stay, but do not count as useful"
    assert out.dropped_groups == 0

    everything = collector(lambda text: int(text.split("/")[0]) % 2 == 0 or text.endswith("/0"), rounds=9)
    out = everything.collect(0, all_wrong)
    assert all(n % 2 for n in numbers(out)), "groups that are all right teach neither term"


def test_a_restored_position_goes_on_with_the_same_problems():
    verdict = mixed_if({0, 2, 3, 6, 8, 9, 12, 13, 15})
    whole = collector(verdict, rounds=5)
    wanted = [[r.text for r in whole.collect(step, nobody).responses] for step in range(3)]
    for cut in (1, 2):
        first, second = collector(verdict, rounds=5), collector(verdict, rounds=5)
        for step in range(cut):
            first.collect(step, nobody)
        second.position = first.position
        got = [[r.text for r in second.collect(step, nobody).responses] for step in range(cut, 3)]
        assert got == wanted[cut:]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("other", ["gold", "teacher"])
def test_a_mixtures_coin_is_fair_and_is_tossed_per_step(share: float, other: Origin):
    steps = 600
    one = collector(lambda text: False, {"mixture": {"share": share, "other": other}}, 1, 0, ("student", other))
    writers = [one.collect(step, nobody).responses for step in range(steps)]
    assert all(len({r.origin for r in step}) == 1 for step in writers)
    mine = sum(step[0].origin == "student" for step in writers)
    # Five standard deviations of a binomial.
    assert abs(mine - share * steps) <= 5 * (steps * share * (1 - share)) ** 0.5
    again = collector(lambda text: False, {"mixture": {"share": share, "other": other}}, 1, 0, ("student", other))
    assert [again.collect(step, nobody).responses[0].origin for step in range(50)] == [
        step[0].origin for step in writers[:50]
    ]


def test_the_coin_depends_on_the_seed():
    tosses = [
        [
            collector(lambda text: False, {"mixture": 0.5}, 1, 0, ("student", "gold"), seed).collect(k, nobody)
            for k in range(40)
        ]
        for seed in (0, 1)
    ]
    a, b = ([c.responses[0].origin for c in run] for run in tosses)
    assert a != b


def test_gold_text_is_not_verified_and_the_teachers_is():
    gold = collector(lambda text: False, "gold", origins=("gold",))
    gold.collect(0, nobody)
    teacher = collector(lambda text: True, "teacher", origins=("teacher",))
    out = teacher.collect(0, nobody)
    pools: list[Any] = [gold.pool, teacher.pool]
    assert [len(p.asked) for p in pools] == [0, 6]
    assert all(r.correct and r.reward == 1 for r in out.responses)
    assert out.statuses == {"ok": 6}


def test_dynamic_sampling_does_not_write_gold_text_again_and_again():
    """A gold step's rewards are all 1; more rounds would only burn problems."""
    one = collector(lambda text: False, {"mixture": 0.0}, 3, 8, ("student", "gold"))
    out = one.collect(0, nobody)
    assert (numbers(out), one.position, out.dropped_groups) == ([0, 1, 2], 3, 0)


PRIVILEGED = {"privileged": {"template": "{prompt}{answer}"}}


def test_privileged_answers_are_kept_where_right_and_only_for_failed_groups():
    """Group 0 is solved; 1 and 2 fail, and of their privileged answers the second of 1 and both of 2 are right."""

    def verdict(text: str) -> bool:
        number, origin, response = text.split("/")
        if origin == "student":
            return (number, response) == ("0", "1")
        return number == "2" or (number, response) == ("1", "1")

    one = collector(verdict, PRIVILEGED, origins=("student", "privileged"))
    out = one.collect(0, nobody)
    script: Any = one.sources["privileged"]
    assert [ids for ids, _, _ in script.calls] == [["1", "2"]]
    extra = [r for r in out.responses if r.origin == "privileged"]
    assert [r.text for r in extra] == ["1/privileged/1", "2/privileged/0", "2/privileged/1"]
    own = {r.group for r in out.responses if r.origin == "student"}
    assert not own & {r.group for r in extra}, "the student's advantages must not see them"
    assert len({r.group for r in extra}) == 2
    assert out.privileged_tried == 4


def test_the_privileged_student_is_not_asked_when_all_groups_are_solved():
    one = collector(lambda text: True, PRIVILEGED, origins=("student", "privileged"))
    one.collect(0, nobody)
    script: Any = one.sources["privileged"]
    assert script.calls == []


def test_dynamic_sampling_keeps_failed_groups_for_the_privileged_student():
    def verdict(text: str) -> bool:
        number, origin, response = text.split("/")
        return origin == "privileged" or (int(number) >= 3 and response == "0")

    one = collector(verdict, PRIVILEGED, rounds=5, origins=("student", "privileged"))
    out = one.collect(0, nobody)
    assert numbers(out) == [0, 1, 2, 3, 4, 5]
    assert {r.problem.id for r in out.responses if r.origin == "privileged"} == {"0", "1", "2"}
