from __future__ import annotations

import pytest

from kdrl.errors import UserError
from kdrl.tasks.config import ExtractConfig
from kdrl.tasks.extract import after_last, extract, in_tag, last_boxed, last_match, last_number, without_reasoning


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("so 5-3=2", "2"),
        ("so it is 5-3", "3"),
        ("x = -3", "-3"),
        ("from (2)-3", "3"),
        ("it costs $1,234.50.", "1234.50"),
        ("-$4 in all", "-4"),
        ("1,2,3", "3"),
        ("a half is 1/2", "1/2"),
        ("only .5 left", ".5"),
        ("1.5e3 metres", "1.5e3"),
        ("minus sign \u22127", "-7"),
        ("12,345,678 people", "12345678"),
        ("version2", "2"),
        ("42%", "42"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} and cut \boxed{\frac{1}{", "7"),
        (r"a set \boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("no box", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_after_regex_and_tag() -> None:
    assert after_last("4-5=-1#-2", "#") == "-2"
    assert after_last("a #### 1\nb\n#### 72\nmore", "####") == "72"
    assert after_last("nothing", "#") is None
    assert last_match("a=1 b=2", r"=(\d)") == "2"
    assert last_match("a=1 b=2", r"[a-z]=\d") == "b=2"
    assert last_match("", r"\d") is None
    assert in_tag("<answer>1</answer> no: <answer> 2 </answer> <answer>3", "answer") == "2"
    assert in_tag("3</answer>", "answer") is None


def test_reasoning_is_not_looked_at() -> None:
    assert without_reasoning("<think>7</think> 8", "think").strip() == "8"
    assert without_reasoning("7</think>8", "think") == "8", "the template may have opened the tag"
    assert without_reasoning("<think>7", "think") == "", "cut off while still reasoning"
    assert without_reasoning("8", "think") == "8"


def test_short_forms_and_their_errors() -> None:
    assert ExtractConfig.model_validate("boxed").how == "boxed"
    how = ExtractConfig.model_validate({"after": "####"})
    assert extract("x #### 3", how) == "3"
    assert ExtractConfig.model_validate(how.model_dump()) == how, "a resolved recipe can be read again"
    with pytest.raises(UserError, match=r"'boxxed'.*did you mean 'boxed'"):
        ExtractConfig.model_validate("boxxed")
    with pytest.raises(UserError, match="needs the text after which"):
        ExtractConfig.model_validate("after")
    with pytest.raises(UserError, match="takes no argument"):
        ExtractConfig.model_validate({"boxed": "x"})
