"""Masks by hand-worked groups, their combinations, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrl.errors import UserError
from kdrl.objectives.masks import MaskContext, check_mask, evaluate_mask, mask_names, reads_entropy, register_mask
from kdrl.objectives.terms import DistillConfig

from .reference import as_tensor, quick

# Group 9: right, wrong. Group 2: wrong, wrong (the second truncated). Group 5: right, right. Rows of a group apart.
GROUP_B = torch.tensor([9, 2, 5, 9, 2, 5])
CORRECT_B = torch.tensor([True, False, True, False, False, True])
TRUNCATED_B = torch.tensor([False, False, False, False, True, False])
ROW_N = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])
ENTROPY_N = as_tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4])
BY_HAND: dict[str, list[int]] = {
    "all": [0, 1, 2, 3, 4, 5],
    "right_response": [0, 2, 5],
    "wrong_response": [1, 3, 4],
    "wrong_group": [1, 4],
    "truncated": [4],
}


def context(**changes: Any) -> MaskContext:
    made = MaskContext(
        correct_B=CORRECT_B,
        reward_B=CORRECT_B.double(),
        group_B=GROUP_B,
        truncated_B=TRUNCATED_B,
        row_N=ROW_N,
        last_N=torch.zeros(8, dtype=torch.bool),
        entropy_N=ENTROPY_N,
    )
    return dataclasses.replace(made, **changes)


def rows_of(spec: Any, **changes: Any) -> list[int]:
    """Responses that `spec` keeps; it must keep or drop each of them whole."""
    kept_N = evaluate_mask(spec, context(**changes))
    assert kept_N.dtype == torch.bool
    assert kept_N.shape == ROW_N.shape
    rows = sorted(set(ROW_N[kept_N].tolist()))
    assert torch.equal(kept_N, torch.isin(ROW_N, torch.tensor(rows)))
    return rows


@pytest.mark.parametrize("name", list(BY_HAND))
def test_each_mask_and_its_complement_by_hand(name: str):
    assert rows_of(name) == BY_HAND[name]
    assert rows_of({"not": name}) == sorted(set(range(6)) - set(BY_HAND[name]))
    assert rows_of({"not": {"not": name}}) == BY_HAND[name]


def test_a_list_is_and_any_is_or():
    assert rows_of(["wrong_response", {"not": "truncated"}]) == [1, 3]
    assert rows_of(["wrong_group", {"not": "truncated"}]) == [1]
    assert rows_of({"any": ["right_response", "truncated"]}) == [0, 2, 4, 5]
    assert rows_of({"any": [["wrong_group", {"not": "truncated"}], "right_response"]}) == [0, 1, 2, 5]
    assert rows_of({"not": {"any": ["right_response", "truncated"]}}) == [1, 3]
    assert rows_of({"not": ["wrong_response", "truncated"]}) == [0, 1, 2, 3, 5]
    assert rows_of(["all"]) == list(range(6))


def test_responses_of_one_token_each_are_not_taken_for_tokens():
    one = context(row_N=torch.tensor([3, 1, 5, 0, 4, 2]), entropy_N=None)
    assert evaluate_mask("right_response", one).tolist() == [False, False, True, True, False, True]


def test_extremes():
    nobody = torch.zeros(6, dtype=torch.bool)
    assert rows_of("wrong_group", correct_B=nobody) == list(range(6))
    assert rows_of("wrong_group", correct_B=~nobody) == []
    assert rows_of("right_response", correct_B=nobody) == []


@pytest.mark.parametrize(
    ("share", "kept"), [(0.25, [2, 6]), (0.5, [0, 2, 4, 6]), (1.0, list(range(8))), (0.125, [2]), (0.01, [])]
)
def test_top_entropy_keeps_the_most_uncertain_share(share: float, kept: list[int]):
    found = evaluate_mask({"top_entropy": share}, context())
    assert found.nonzero().flatten().tolist() == kept
    assert torch.equal(evaluate_mask({"not": {"top_entropy": share}}, context()), ~found)


def test_top_entropy_is_taken_over_all_tokens_before_it_meets_other_masks():
    found = evaluate_mask([{"top_entropy": 0.5}, "wrong_response"], context())
    assert found.nonzero().flatten().tolist() == [2, 4, 6]


@given(order=st.permutations(range(8)), share=st.sampled_from([0.25, 0.5, 0.75]))
@quick
def test_no_mask_looks_at_the_order_of_tokens(order: list[int], share: float):
    for spec in ("wrong_group", ["wrong_response", {"not": "truncated"}], {"top_entropy": share}):
        shuffled = evaluate_mask(spec, context(row_N=ROW_N[order], entropy_N=ENTROPY_N[order]))
        assert torch.equal(shuffled, evaluate_mask(spec, context())[order])


@given(order=st.permutations(range(6)))
@quick
def test_no_mask_looks_at_the_order_of_responses(order: list[int]):
    place = torch.as_tensor(np.argsort(order))
    for spec in BY_HAND:
        moved = context(
            correct_B=CORRECT_B[order],
            reward_B=CORRECT_B[order].double(),
            group_B=GROUP_B[order],
            truncated_B=TRUNCATED_B[order],
            row_N=place[ROW_N],
        )
        assert torch.equal(evaluate_mask(spec, moved), evaluate_mask(spec, context()))


@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8, max_size=8), share=st.sampled_from([0.25, 0.5, 0.75])
)
@quick
def test_top_entropy_keeps_none_below_one_that_it_drops(values: list[float], share: float):
    entropy = as_tensor(values)
    kept = evaluate_mask({"top_entropy": share}, context(entropy_N=entropy))
    assert kept.sum() >= round(8 * share)
    assert kept.all() or entropy[kept].min() >= entropy[~kept].max()


def test_top_entropy_with_ties_does_not_depend_on_the_order_of_rows():
    # The first token of every response to one prompt has the same context, so the same entropy: ties are ordinary.
    entropy, order = as_tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1]), [4, 3, 2, 1, 0, 7, 6, 5]
    plain = evaluate_mask({"top_entropy": 0.25}, context(entropy_N=entropy))
    turned = evaluate_mask({"top_entropy": 0.25}, context(entropy_N=entropy[order], row_N=ROW_N[order]))
    assert torch.equal(turned, plain[order])


def test_top_entropy_without_entropies_says_so():
    with pytest.raises(ValueError, match="needs token entropies"):
        evaluate_mask({"top_entropy": 0.2}, context(entropy_N=None))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("wrong_respons", "did you mean 'wrong_response'"),
        ("right", "did you mean 'right_response'"),
        (["all", "wrong_goup"], "did you mean 'wrong_group'"),
        ({"not": "truncate"}, "did you mean 'truncated'"),
        ({"any": ["all", "al"]}, "did you mean 'all'"),
        ({"top_entrpy": 0.2}, "top_entropy"),
        ({"nott": "all"}, "not"),
        ("top_entropy", "needs a share"),
        ({"top_entropy": 0.0}, "between 0 and 1, not 0.0"),
        ({"top_entropy": 1.5}, "between 0 and 1, not 1.5"),
        ({"top_entropy": True}, "between 0 and 1, not True"),
        ({"top_entropy": "half"}, "between 0 and 1, not 'half'"),
        ({"top_entropy": float("nan")}, "between 0 and 1, not nan"),
        ([], "is no mask"),
        ({"any": []}, "is no mask"),
        ({"any": "all"}, "is no mask"),
        ({}, "is no mask"),
        ({"not": "all", "any": ["all"]}, "is no mask"),
        ({"all": 1}, "is no mask"),
        (None, "is no mask"),
        (3, "is no mask"),
    ],
    ids=str,
)
def test_what_is_no_mask_is_refused_with_the_nearest(spec: Any, says: str):
    with pytest.raises(ValueError, match=says):
        check_mask(spec)
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate({"mask": spec})


def test_names_that_a_mask_mentions():
    assert mask_names({"any": [["wrong_group", {"not": "truncated"}], {"top_entropy": 0.2}]}) == {
        "wrong_group",
        "truncated",
        "top_entropy",
    }
    assert mask_names("all") == {"all"}


def test_masks_of_one_s_own_by_response_and_by_token():
    @register_mask("test_long")
    def long(context: MaskContext) -> torch.Tensor:
        return torch.bincount(context.row_N, minlength=context.rows) > 1

    @register_mask("test_first_half", per="token")
    def first_half(context: MaskContext) -> torch.Tensor:
        return torch.arange(len(context.row_N)) < len(context.row_N) // 2

    check_mask(["test_long", {"not": "test_first_half"}])
    assert rows_of("test_long") == [0, 3]
    assert evaluate_mask("test_first_half", context()).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert evaluate_mask(["test_long", {"not": "test_first_half"}], context()).tolist() == [False] * 4 + [
        True,
        True,
        False,
        False,
    ]


def test_masks_of_one_s_own_with_settings():
    @register_mask("test_shorter")
    def shorter(context: MaskContext, than: int, at_least: int = 1) -> torch.Tensor:
        length = torch.bincount(context.row_N, minlength=context.rows)
        return (length < than) & (length >= at_least)

    assert rows_of({"test_shorter": 2}) == [1, 2, 4, 5]
    assert rows_of({"test_shorter": {"than": 3, "at_least": 2}}) == [0, 3]
    assert rows_of(["wrong_response", {"not": {"test_shorter": {"than": 2}}}]) == [3]
    assert mask_names({"not": {"test_shorter": 2}}) == {"test_shorter"}
    for spec, says in (
        ("test_shorter", "needs than"),
        ({"test_shorter": {"at_least": 2}}, "needs than"),
        ({"test_shorter": {"then": 2}}, "no setting 'then'; did you mean 'than'"),
    ):
        with pytest.raises(ValueError, match=says):
            check_mask(spec)


@pytest.mark.parametrize("per", ["response", "token"])
def test_a_mask_of_one_s_own_that_returns_something_else_is_named(per: Literal["response", "token"]):
    size = 6 if per == "response" else 8
    wrongs: list[Any] = [torch.ones(14 - size).bool(), torch.ones(size), torch.ones(size, 1).bool(), True]
    for number, wrong in enumerate(wrongs):
        name = f"test_wrong_{per}_{number}"
        register_mask(name, per=per)(lambda context, wrong=wrong: wrong)
        with pytest.raises(UserError, match=f"{name}.*one bool per {per}"):
            evaluate_mask(name, context())


def test_which_masks_ask_for_entropies():
    @register_mask("test_unsure", per="token", entropy=True)
    def unsure(context: MaskContext) -> torch.Tensor:
        assert context.entropy_N is not None
        return context.entropy_N > 0.5

    assert evaluate_mask("test_unsure", context()).nonzero().flatten().tolist() == [2, 4, 6]
    assert reads_entropy({"any": ["all", {"not": "test_unsure"}]})
    assert reads_entropy([{"top_entropy": 0.5}, "all"])
    assert not reads_entropy({"any": ["all", {"not": "truncated"}]})


@pytest.mark.parametrize("name", ["not", "any"])
def test_words_that_combine_masks_cannot_name_one(name: str):
    with pytest.raises(UserError, match="combines masks"):
        register_mask(name)(lambda context: context.correct_B)


def test_a_built_in_mask_cannot_be_replaced():
    with pytest.raises(UserError, match="mask 'wrong_group' is built in"):
        register_mask("wrong_group")(lambda context: context.correct_B)
