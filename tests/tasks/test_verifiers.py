"""The verifiers themselves, extraction before them, and the shaping of rewards after them."""

from __future__ import annotations

from typing import Any

import pytest

from kdrl.errors import UserError
from kdrl.tasks import Problem, ResponseInfo, TaskConfig
from kdrl.tasks.config import OverlongConfig
from kdrl.tasks.scoring import build_scorer, overlong_penalty, shaped

PROBLEM = {"id": "x", "prompt": "?"}


def config(**section: Any) -> TaskConfig:
    return TaskConfig.model_validate({"path": "unread.jsonl", **section})


def score(response: str, answer: Any, **section: Any) -> float:
    return build_scorer(config(**section))(response, Problem("x", "?", answer))[0]


@pytest.mark.parametrize(
    ("verifier", "response", "answer", "right"),
    [
        ("exact", " a  b\n", "a b", True),
        ("exact", "A b", "a b", False),
        ({"name": "exact", "settings": {"ignore_case": True}}, "A b", "a b", True),
        ("exact", "4", 4, True),
        ("exact", "", "", False),
        ("numeric", "so it is 1,000.0.", "1000", True),
        ("numeric", "a half: 1/2", 0.5, True),
        ("numeric", "$72", "72", True),
        ("numeric", "12345678901", "12345678902", False),
        ("numeric", "3.14", "3.1416", False),
        ({"name": "numeric", "settings": {"tolerance": 0.01}}, "3.14", "3.1416", True),
        ({"name": "numeric", "settings": {"tolerance": 0.01}}, "-3.14", "3.1416", False),
        ("numeric", "1e999999999", "1", False),
        ("numeric", "1/0", "1", False),
        ("numeric", "no number", "1", False),
        ("math", "so $x = \\frac{1}{2}$", "0.5", True),
        ("math", "\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True),
        ("math", "\\boxed{3}", "\\frac{1}{2}", False),
        ("math", "the answer is 72.", "72", True),
        ("regex", "it is (a+b)!", "(a+b)", True),
        ("regex", "it is a+b", "(a+b)", False),
        ({"name": "regex", "settings": {"pattern": "= {answer}$"}}, "1 + 1 = 2", "2", True),
        ({"name": "regex", "settings": {"pattern": "= {answer}$"}}, "1 + 1 = 22", "2", False),
        ({"name": "regex", "settings": {"escape": False}}, "colour", "colou?r", True),
    ],
)
def test_built_in_verifiers(verifier: Any, response: str, answer: Any, right: bool) -> None:
    assert score(response, answer, verifier=verifier) == float(right)


def test_reasoning_is_removed_before_extraction() -> None:
    assert score("<think>maybe 7</think> 8", "7", verifier="numeric") == 0.0
    assert score("<think>maybe 7</think> 8", "8", verifier="numeric") == 1.0
    assert score("<think>it is 8", "8", verifier="numeric") == 0.0, "cut off before an answer"
    assert score("<think>it is 8", "8", verifier="numeric", reasoning_tag=None) == 1.0


def test_an_answer_that_is_not_found_scores_nothing() -> None:
    assert score("42", "42", extract="boxed") == 0.0
    assert score("\\boxed{42}", "42", extract="boxed") == 1.0
    assert score("<answer>42</answer>", "42", extract={"tag": "answer"}) == 1.0


def test_a_reference_that_no_verifier_can_read_is_an_error_and_no_wrong_answer() -> None:
    with pytest.raises(ValueError, match="'many' is no number"):
        score("1", "many", verifier="numeric")


@pytest.mark.parametrize("result", [1.5, -0.1, float("nan")])
def test_a_result_that_is_no_score_is_an_error(result: float) -> None:
    scorer = build_scorer(config())
    broken = type(scorer)(lambda response, problem: result, scorer.extraction, None, None)
    with pytest.raises(ValueError, match="not a score between 0 and 1"):
        broken("x", Problem("x", "?", "x"))


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"verifier": "exakt"}, "did you mean 'exact'"),
        ({"verifier": {"name": "numeric", "settings": {"tolerence": 1}}}, "'tolerence'; did you mean 'tolerance'"),
        ({"verifier": {"name": "math", "settings": {"x": 1}}}, "it has none"),
        ({"verifier": "reasoning_gym"}, "task.name is another task"),
        ({"verifier": "no_such_module:f"}, "'no_such_module' is not found"),
        ({"verifier": "json:lods"}, "json has no 'lods'; did you mean 'loads'"),
        ({"extract": {"regex": "("}}, "task.extract.regex: .* is not a regular expression"),
        ({"rewards": {"format": {"pattern": "["}}}, "task.rewards.format.pattern: .* is not a regular expression"),
    ],
)
def test_bad_sections_have_their_sentence(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_scorer(config(**section))


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1.0)]
)
def test_overlong_penalty_by_hand(tokens: int, penalty: float) -> None:
    info = ResponseInfo(tokens, tokens == 100, 100)
    assert overlong_penalty(info, OverlongConfig(buffer=20)) == pytest.approx(penalty)
    assert overlong_penalty(info, OverlongConfig(buffer=20, penalty=0.4)) == pytest.approx(0.4 * penalty)


def test_overlong_buffer_beyond_the_limit_is_refused() -> None:
    with pytest.raises(UserError, match="buffer is 20 tokens, the response limit only 10"):
        overlong_penalty(ResponseInfo(1, False, 10), OverlongConfig(buffer=20))


def test_rewards_add_up() -> None:
    made = config(rewards={"format": {"pattern": "<a>.*</a>$", "bonus": 0.2}, "overlong": {"buffer": 10}})
    scorer, problem = build_scorer(made), Problem("x", "?", "<a>1\n</a>")
    for response, value, form in (("<a>1\n</a>", 1.0, True), ("<a>2</a>", 0.0, True), ("1", 0.0, False)):
        assert scorer(response, problem) == (value, form, "")
        assert shaped(value, form, ResponseInfo(95, False, 100), made) == pytest.approx(value + 0.2 * form - 0.5)
