"""Who writes a step's responses, what is resampled and what is kept; with scripted writers and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tiny import problem

from kdrl.batch import Origin, Response, Rollouts
from kdrl.objectives.schedules import Moment
from kdrl.rollouts import Collected, Collector
from kdrl.sources.base import Judge, Request, Source
from kdrl.sources.config import SourceConfig
from kdrl.sources.kinds import Mixture
from kdrl.sources.mixture import MixtureSource
from kdrl.tasks import Problem
from kdrl.tasks.base import Verdict


class Script(Source):
    """Writes two responses a problem; the text holds the problem's number and the response's."""

    def __init__(self, origin: Origin) -> None:
        self.origin: Origin = origin
        self.calls: list[tuple[list[str], int, int]] = []

    def write(self, request: Request) -> list[Response]:
        self.calls.append(([p.id for p in request.problems], request.groups[0], request.seed))
        request.out.generated += 2 * len(request.problems)
        gold = self.origin == "gold"
        return [
            Response(p, group, [1], [2, 3], self.origin, True, f"{p.id}/{self.origin}/{j}", judged=gold)
            for p, group in zip(request.problems, request.groups, strict=True)
            for j in range(2)
        ]


class Pool:
    """Says what `verdicts` says of a text; counts what it was asked."""

    def __init__(self, verdict: Callable[[str], bool]) -> None:
        self.verdict = verdict
        self.asked: list[str] = []

    def send_only(self, items: Sequence[tuple[str, Problem]]) -> None:
        """Nobody works meanwhile."""

    def score(self, items: Sequence[tuple[str, Problem, Any]]) -> list[Verdict]:
        self.asked += [text for text, _, _ in items]
        return [Verdict(float(self.verdict(text)), self.verdict(text), "ok") for text, _, _ in items]


def mixed_if(useful: set[int]) -> Callable[[str], bool]:
    """Right answers: the first response of the problems in `useful`."""

    def verdict(text: str) -> bool:
        number, _, response = text.split("/")
        return int(number) in useful and response == "0"

    return verdict


PRIVILEGED = {"privileged": {"template": "{prompt}{answer}"}}


def scripted(source: Any, seed: int) -> Source:
    """A recipe's source with scripted writers."""
    config = SourceConfig.model_validate(source)
    if not isinstance(config.settings, Mixture):
        return Script("student" if config.kind == "privileged" else config.origins[0])
    other, share = Script(config.settings.other), config.settings.share
    return MixtureSource(Script("student"), other, share, per_sample=config.settings.per == "sample", seed=seed)


def collector(
    verdict: Callable[[str], bool], source: Any = "student", prompts: int = 3, rounds: int = 0, seed: int = 0
) -> Collector:
    pool: Any = Pool(verdict)
    return Collector(
        scripted(source, seed),
        lambda index: problem(str(index)),
        Judge(pool, 8),
        prompts=prompts,
        rounds=rounds,
        seed=seed,
        device="cpu",
        privileged=Script("privileged") if source == PRIVILEGED else None,
    )


def at(step: int) -> Moment:
    return Moment(step, 1000)


def nobody(rollouts: Rollouts) -> set[int]:
    return set()


def numbers(out: Collected) -> list[int]:
    return sorted({int(r.problem.id) for r in out.responses})


def test_without_dynamic_sampling_everything_stays():
    one = collector(mixed_if({1}))
    assert numbers(one.collect(at(0), nobody)) == [0, 1, 2]
    assert numbers(one.collect(at(1), nobody)) == [3, 4, 5]
    assert one.position == 6


def test_groups_of_equal_rewards_are_replaced_until_the_step_is_full():
    one = collector(mixed_if({1, 3, 7, 9, 10, 11}), rounds=9)
    out = one.collect(at(0), nobody)
    # 0 1 2, then two more: 3 4, then one at a time: 5, 6, 7.
    assert numbers(out) == [1, 3, 7]
    assert (out.dropped_groups, out.generated, one.position) == (5, 16, 8)
    assert len({r.group for r in out.responses}) == 3
    script: Any = one.source
    assert len({seed for _, _, seed in script.calls}) == 5, "every round draws its own samples"
    assert numbers(one.collect(at(1), nobody)) == [9, 10, 11]


def test_rounds_are_bounded_and_a_hopeless_step_still_holds_something():
    one = collector(mixed_if(set()), rounds=4)
    out = one.collect(at(0), nobody)
    script: Any = one.source
    assert len(script.calls) == 5
    assert one.position == 15
    assert numbers(out) == [12, 13, 14], "the last round is kept: no gradient, which is the truth"


def test_groups_that_another_term_wants_are_kept_beside_the_full_step():
    def all_wrong(rollouts: Rollouts) -> set[int]:
        right = {r.group for r in rollouts.responses if r.correct}
        return {r.group for r in rollouts.responses} - right

    one = collector(mixed_if({1, 3, 5}), rounds=9)
    out = one.collect(at(0), all_wrong)
    assert numbers(out) == [0, 1, 2, 3, 4, 5], "all-wrong groups stay, but do not count as useful"
    assert out.dropped_groups == 0

    everything = collector(lambda text: int(text.split("/")[0]) % 2 == 0 or text.endswith("/0"), rounds=9)
    out = everything.collect(at(0), all_wrong)
    assert all(n % 2 for n in numbers(out)), "groups that are all right teach neither term"


def test_a_restored_position_goes_on_with_the_same_problems():
    verdict = mixed_if({0, 2, 3, 6, 8, 9, 12, 13, 15})
    whole = collector(verdict, rounds=5)
    wanted = [[r.text for r in whole.collect(at(step), nobody).responses] for step in range(3)]
    for cut in (1, 2):
        first, second = collector(verdict, rounds=5), collector(verdict, rounds=5)
        for step in range(cut):
            first.collect(at(step), nobody)
        second.position = first.position
        got = [[r.text for r in second.collect(at(step), nobody).responses] for step in range(cut, 3)]
        assert got == wanted[cut:]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("other", ["gold", "teacher"])
def test_a_mixtures_coin_is_fair_and_is_tossed_per_step(share: float, other: Origin):
    steps = 600
    one = collector(lambda text: False, {"mixture": {"share": share, "other": other}}, 1, 0)
    writers = [one.collect(at(step), nobody).responses for step in range(steps)]
    assert all(len({r.origin for r in step}) == 1 for step in writers)
    mine = sum(step[0].origin == "student" for step in writers)
    # Five standard deviations of a binomial.
    assert abs(mine - share * steps) <= 5 * (steps * share * (1 - share)) ** 0.5
    again = collector(lambda text: False, {"mixture": {"share": share, "other": other}}, 1, 0)
    assert [again.collect(at(step), nobody).responses[0].origin for step in range(50)] == [
        step[0].origin for step in writers[:50]
    ]


def test_the_coin_depends_on_the_seed():
    tosses = [
        [collector(lambda text: False, {"mixture": 0.5}, 1, 0, seed).collect(at(k), nobody) for k in range(40)]
        for seed in (0, 1)
    ]
    a, b = ([c.responses[0].origin for c in run] for run in tosses)
    assert a != b


def test_gold_text_is_not_verified_and_the_teachers_is():
    gold = collector(lambda text: False, "gold")
    gold.collect(at(0), nobody)
    teacher = collector(lambda text: True, "teacher")
    out = teacher.collect(at(0), nobody)
    pools: list[Any] = [gold.judge.pool, teacher.judge.pool]
    assert [len(p.asked) for p in pools] == [0, 6]
    assert all(r.correct and r.reward == 1 for r in out.responses)
    assert out.statuses == {"ok": 6}


def test_dynamic_sampling_does_not_write_gold_text_again_and_again():
    """A gold step's rewards are all 1; more rounds would only burn problems."""
    one = collector(lambda text: False, {"mixture": 0.0}, 3, 8)
    out = one.collect(at(0), nobody)
    assert (numbers(out), one.position, out.dropped_groups) == ([0, 1, 2], 3, 0)


def test_privileged_answers_are_kept_where_right_and_only_for_failed_groups():
    """Group 0 is solved; 1 and 2 fail, and of their privileged answers the second of 1 and both of 2 are right."""

    def verdict(text: str) -> bool:
        number, origin, response = text.split("/")
        if origin == "student":
            return (number, response) == ("0", "1")
        return number == "2" or (number, response) == ("1", "1")

    one = collector(verdict, PRIVILEGED)
    out = one.collect(at(0), nobody)
    script: Any = one.privileged
    assert [ids for ids, _, _ in script.calls] == [["1", "2"]]
    extra = [r for r in out.responses if r.origin == "privileged"]
    assert [r.text for r in extra] == ["1/privileged/1", "2/privileged/0", "2/privileged/1"]
    own = {r.group for r in out.responses if r.origin == "student"}
    assert not own & {r.group for r in extra}, "the student's advantages must not see them"
    assert len({r.group for r in extra}) == 2
    assert out.numbers() == {"source/privileged_right": 0.75}
    assert out.generated == 6 + 4


def test_the_privileged_student_is_not_asked_when_all_groups_are_solved():
    one = collector(lambda text: True, PRIVILEGED)
    one.collect(at(0), nobody)
    script: Any = one.privileged
    assert script.calls == []


def test_dynamic_sampling_keeps_failed_groups_for_the_privileged_student():
    def verdict(text: str) -> bool:
        number, origin, response = text.split("/")
        return origin == "privileged" or (int(number) >= 3 and response == "0")

    one = collector(verdict, PRIVILEGED, rounds=5)
    out = one.collect(at(0), nobody)
    assert numbers(out) == [0, 1, 2, 3, 4, 5]
    assert {r.problem.id for r in out.responses if r.origin == "privileged"} == {"0", "1", "2"}
