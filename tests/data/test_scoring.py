"""Losses of given responses against transformers' own, and the edges where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import toy

from data.making import task_file, write
from kdrl.data.inputs import open_inputs
from kdrl.data.rows import Row, load_rows
from kdrl.data.scoring import score_rows
from kdrl.errors import UserError
from kdrl.models import LoadedModel
from kdrl.tasks import Problem

TEXTS = [("1+2=", "3#"), ("a", "1"), ("7+7+9+4=", "7+7=14;14+9=23;23+4=27#27"), ("1+2=", "x y z")]


def row(prompt: str, response: str | None, where: str = "here:1") -> Row:
    return Row(where, {}, Problem("p", prompt, "0"), response)


def library_loss(loaded: LoadedModel, prompt: str, response: str) -> float:
    """Summed by transformers from its own logits and labels, one row, the prompt masked."""
    ids, more = (loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    labels = [-100] * len(ids) + list(more)
    with torch.no_grad():
        loss = loaded.model(torch.tensor([ids + more]), labels=torch.tensor([labels]), use_cache=False).loss
    return float(loss) * len(more)


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_losses_are_those_of_the_library(budget: int):
    loaded = toy(5)
    found = score_rows(loaded, [row(*pair) for pair in TEXTS], budget=budget)
    assert found.tokens == [len(response) for _, response in TEXTS]
    for nats, pair in zip(found.nats, TEXTS, strict=True):
        assert nats == pytest.approx(library_loss(loaded, *pair), rel=1e-5)


def test_the_order_of_the_rows_plays_no_part_and_progress_reaches_the_end():
    loaded, seen = toy(6), []
    rows = [row(*TEXTS[i % 4]) for i in range(10)]
    forward = score_rows(loaded, rows, progress=lambda done, total: seen.append((done, total)))
    backward = score_rows(loaded, rows[::-1], budget=30)
    assert forward.nats == pytest.approx(backward.nats[::-1], rel=1e-6)
    assert seen[-1] == (10, 10)


def test_what_has_no_score():
    loaded = toy(7, max_positions=16)
    found = score_rows(loaded, [row("12", ""), row("12", "3" * 15), row("12", "3" * 16), row("1" * 40, "2")])
    assert [value is None for value in found.nats] == [True, False, True, True]
    assert found.unscored == 3
    with pytest.raises(UserError, match=r"data:7 has no response to score.*task\.columns\.solution"):
        score_rows(loaded, [row("1", None, "data:7")])
    with pytest.raises(UserError, match=r"data:8: the tokenizer cannot write 'Ä'"):
        score_rows(loaded, [row("1", "Ä", "data:8")])


def test_the_response_of_a_row(tmp_path: Path):
    both = {"prompt": "a", "answer": "1", "solution": "s", "response": "r", "text": "t", "where": "mine"}
    data = write(tmp_path / "d.jsonl", [both, {"prompt": "b", "answer": "1", "solution": "s"}])
    rows, held = load_rows(open_inputs(task_file(tmp_path, data)).task)
    assert ([r.response for r in rows], held) == (["r", "s"], [])
    assert rows[0].columns == both, "columns are given back as they were"
    named = open_inputs(data, ["task.columns.solution=text", "task.limit=1"])
    with pytest.raises(UserError, match=r"task\.limit and task\.max_prompt_tokens have no effect"):
        load_rows(named.task)
    write(data, [both])
    rows, _ = load_rows(open_inputs(data, ["task.columns.solution=text"]).task)
    assert rows[0].response == "t"
