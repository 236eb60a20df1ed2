"""What a recipe cannot serve is refused before anything is loaded, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import raw_recipe, with_teacher

from kdrl.checks import build_objective
from kdrl.errors import UserError
from kdrl.recipe import Recipe, load_recipe
from kdrl.score_checks import reads_rewards, warnings_of


def made(world: Path, entries: list[dict[str, Any]], **change: Any) -> Recipe:
    return load_recipe(raw_recipe(world, objective=entries, **with_teacher(world), **change))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"policy_gradient": {"scale": "max_p"}}], "compares whole distributions"),
        ([{"distill": {"support": {"token": "k2"}, "scale": "entropy_p"}}], "compares whole distributions"),
        ([{"policy_gradient": {"scale": "log_ratio"}}], "asks the teacher, and this term has none"),
        ([{"distill": {"weight": {"balance": {}}}}], "has only one of them"),
        ([{"policy_gradient": {"weight": {"target_kl": {"target": 0.1}}}}], "no term asks a teacher"),
        ([{"distill": {"weight": {"on_rise": {}}}}], "set evaluate.every"),
        ([{"distill": {"weight": {"taid": {"metric": "loss/distil"}}}}], "the terms are called distill"),
        ([{"distill": {"support": {"token": "k2"}, "weight": {"taid": {}}}}], "follow loss/distill"),
        ([{"policy_gradient": {"weight": {"calibrated": {}}}}], "measured on distributions"),
        ([{"distill": {"divergence": {"jsd": {"linear": {"from": 0.5, "to": 2.5}}}}}], "at step"),
        ([{"distill": {"mask": {"score": "max_p"}}}], "masks are chosen before the teacher is asked"),
    ],
    ids=str,
)
def test_refused_with_its_reason(world: Path, entries: list[dict[str, Any]], says: str):
    with pytest.raises(UserError, match=says):
        made(world, entries)


def test_a_source_that_no_term_reads_is_refused(world: Path):
    with pytest.raises(UserError, match="writes student responses, and no term of the objective reads them"):
        made(world, [{"distill": {"on": ["teacher"]}}], source={"mixture": {"share": 0.5, "other": "teacher"}})


def test_only_a_lone_renormalised_top_k_is_warned_of(world: Path):
    both = {"distill": {"support": {"topk": {"k": 4, "rest": "renormalise"}}}}
    assert "may grow freely" in warnings_of(build_objective(made(world, [both])))[0]
    assert not warnings_of(build_objective(made(world, [both, {"distill": {}}])))
    assert not warnings_of(build_objective(made(world, [{"distill": {"support": {"topk": 4}}}])))


def test_scores_of_rewards_ask_for_verdicts(world: Path):
    terms = build_objective(
        made(
            world,
            [
                {"distill": {"scale": {"affine": {"of": "group_rate", "scale": -1, "offset": 1}}}},
                {"distill": {"mask": {"score": {"one_minus": {"of": "correct"}}}}},
                {"distill": {"scale": "position"}},
            ],
        )
    ).terms
    assert [reads_rewards(term) for term in terms] == [True, True, False]
