"""Stored traces: what a file may hold, what is taken from it, and errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engines.toys import toy
from tiny import problem

from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.sources.base import Request
from kdrl.sources.traces import TraceBook, TraceSource
from kdrl.tasks import Problem
from kdrl.tasks.base import problem_id


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return toy()


def row(prompt: str, response: str, right: bool, **more: Any) -> dict[str, Any]:
    return {"id": problem_id(prompt), "prompt": prompt, "answer": "3", "response": response, "reward": float(right)} | {
        "correct": right,
        "tokens": len(response),
        **more,
    }


ROWS = [
    row("1+2=", "3", True),
    row("1+2=", "4", False, reward=-0.5),
    row("2+2=", "4", True),
    row("1+2=", "5", False),
    row("3+2=", "=+", False, ended=False),
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def nothing() -> Mapping[str, Problem]:
    return {}


@pytest.fixture
def book(tmp_path: Path) -> TraceBook:
    return TraceBook.read(write(tmp_path / "t.jsonl", ROWS), nothing)


def test_traces_come_with_their_verdicts_in_the_group_of_their_problem(book: TraceBook, model: LoadedModel):
    problems = list(book.problems.values())
    responses = TraceSource(book, model, 8, "all").write(Request.of(problems, 3))
    assert [(r.group, r.text, r.reward, r.correct) for r in responses] == [
        (3, "3", 1.0, True),
        (3, "4", -0.5, False),
        (3, "5", 0.0, False),
        (4, "4", 1.0, True),
        (5, "=+", 0.0, False),
    ]
    for r in responses:
        assert (r.origin, r.judged, r.logp) == ("teacher", True, None)
        assert r.prompt_ids == encode_prompt(model, r.problem.prompt)
        assert r.ended == (r.token_ids[-1] in model.eos_ids) == (r.text != "=+")
        assert model.tokenizer.decode(r.token_ids, skip_special_tokens=True) == r.text


@pytest.mark.parametrize(("take", "prompts"), [("all", 3), ("right", 2), ("wrong", 2), ("pair", 1)])
def test_the_stream_holds_the_problems_that_have_what_is_taken(book: TraceBook, take: Any, prompts: int):
    stream = book.stream(take, 0)
    assert stream.size == prompts
    assert sum(stream.skipped.values()) == 3 - prompts
    epochs = [[stream[e * prompts + i].id for i in range(prompts)] for e in range(5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)


def test_a_pair_is_one_right_and_one_wrong_and_is_drawn_anew(book: TraceBook, model: LoadedModel):
    source, one = TraceSource(book, model, 8, "pair"), book.stream("pair", 0)[0]
    seen = set()
    for seed in range(40):
        right, wrong = source.write(Request.of([one], 2, seed))
        assert (right.group, wrong.group) == (2, 2)
        assert (right.correct, wrong.correct) == (True, False)
        seen.add((right.text, wrong.text))
    assert seen == {("3", "4"), ("3", "5")}


def test_at_most_so_many_and_none_for_a_problem_without(book: TraceBook, model: LoadedModel):
    ask = Request.of([*book.problems.values(), problem("elsewhere", "9=")])
    responses = TraceSource(book, model, 8, "right", 1).write(ask)
    assert [r.text for r in responses] == ["3", "4"]
    assert ask.out.numbers() == {"source/without_trace": 2.0}
    wrong = TraceSource(book, model, 8, "wrong", 1)
    drawn = {tuple(r.text for r in wrong.write(Request.of([*book.problems.values()][:1], 0, s))) for s in range(30)}
    assert drawn == {("4",), ("5",)}


def test_a_line_with_an_id_alone_is_looked_up_in_the_task(tmp_path: Path, model: LoadedModel):
    known = problem("abc", "8+1=", answer="9")
    path = write(tmp_path / "t.jsonl", [{"id": "abc", "response": "9", "correct": True}])
    book = TraceBook.read(path, lambda: {"abc": known})
    assert list(book.problems.values()) == [known]
    (response,) = TraceSource(book, model, 8, "all").write(Request.of([known]))
    assert (response.text, response.reward) == ("9", 1.0)
    with pytest.raises(UserError, match=r"t\.jsonl:1: the task has no problem of id 'abc'"):
        TraceBook.read(path, nothing)


def test_prompts_may_be_messages(tmp_path: Path):
    chat = [{"role": "user", "content": "1+2="}]
    book = TraceBook.read(write(tmp_path / "t.jsonl", [{"prompt": chat, "response": "3", "correct": True}]), nothing)
    assert list(book.problems) == [problem_id("1+2=")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "1=", "response": "1", "corr', r"t\.jsonl:3: not a JSON object .*the file may be cut off"),
        ("[1]", r"t\.jsonl:3: expected a JSON object"),
        ('{"prompt": "1=", "correct": true}', r"t\.jsonl:3: a trace needs its response"),
        ('{"prompt": "1=", "response": "1"}', r"t\.jsonl:3: a trace needs `correct`"),
        ('{"prompt": "1=", "response": "1", "correct": 1}', r"t\.jsonl:3: a trace needs `correct`"),
        ('{"prompt": "1=", "response": "1", "correct": true, "reward": "x"}', r"t\.jsonl:3: a trace's reward"),
        ('{"response": "1", "correct": true}', r"t\.jsonl:3: a trace needs its prompt"),
        ('{"prompt": 7, "response": "1", "correct": true}', r"t\.jsonl:3: a trace's prompt is text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, words: str):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS[:2]) + line)
    with pytest.raises(UserError, match=words):
        TraceBook.read(str(path), nothing)


def test_files_without_what_is_wanted_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        TraceBook.read(str(tmp_path / "none.jsonl"), nothing)
    with pytest.raises(UserError, match="holds no traces"):
        TraceBook.read(write(tmp_path / "e.jsonl", []), nothing)
    book = TraceBook.read(write(tmp_path / "t.jsonl", ROWS[2:3]), nothing)
    with pytest.raises(UserError, match=r"no problem of .* has a right and a wrong trace"):
        book.stream("pair", 0)
