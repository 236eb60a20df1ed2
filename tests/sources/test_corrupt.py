"""Gold text with refilled tokens: how many, which, from which distribution, and what is never touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines.toys import toy
from tiny import problem

from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.schedules import Schedule
from kdrl.sources.base import Request
from kdrl.sources.corrupt import CorruptSource
from kdrl.sources.text import GoldSource

from .scripted import judge

SOLUTION = "1+2=3;4-5=6;7+8"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return toy(sharp=5.0)


def corrupt(model: LoadedModel, share: Any, pick: str = "random", limit: int = 40, budget: int = 64) -> CorruptSource:
    gold = GoldSource(model, limit)
    return CorruptSource(gold, model, judge(), Schedule(share), pick, temperature=1.0, budget=budget)


def laws(model: LoadedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model.model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits[:, : model.vocab_size].softmax(-1)


def test_gold_stays_beside_its_corruption_in_one_group(model: LoadedModel):
    problems = [problem(str(i), f"{i}=", solution=SOLUTION[i:]) for i in range(3)]
    ask = Request.of(problems, 4, 1)
    responses = corrupt(model, 0.5).write(ask)
    assert [(r.group, r.origin) for r in responses] == [(g, o) for g in (4, 5, 6) for o in ("gold", "corrupt")]
    for gold, bad in zip(responses[::2], responses[1::2], strict=True):
        assert gold.text == gold.problem.solution
        assert gold.correct
        assert gold.judged
        assert not bad.correct, "the verdict of the corrupted text is asked for"
        assert bad.judged
        assert len(bad.token_ids) == len(gold.token_ids)
        assert bad.token_ids[-1] == model.eos_ids[0]
        assert model.eos_ids[0] not in bad.token_ids[:-1]
        assert bad.ended
        assert bad.text == model.tokenizer.decode(bad.token_ids, skip_special_tokens=True)
    assert 0.0 < ask.out.numbers()["source/changed_tokens"] <= 0.5
    assert ask.out.generated == 6


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_refilled_tokens_follow_the_student_after_the_gold_prefix(model: LoadedModel, share: float):
    """Counts at every place: chosen with the share, and then the student's law without the end token."""
    one, rounds = problem(solution=SOLUTION[:6]), 3000
    problems = [one] * 100
    found = [
        r.token_ids
        for n in range(rounds // 100)
        for r in corrupt(model, share, budget=4096).write(Request.of(problems, 0, n))
        if r.origin == "corrupt"
    ]
    gold = model.tokenizer(one.solution or "", add_special_tokens=False)["input_ids"]
    assert isinstance(gold, list)
    law_TV = laws(model, encode_prompt(model, one.prompt), [*gold, model.eos_ids[0]])
    law_TV[:, list(model.eos_ids)] = 0.0
    law_TV /= law_TV.sum(-1, keepdim=True)
    chosen = round(share * 6) / 6
    for t in range(6):
        want_V = chosen * law_TV[t] + (1 - chosen) * torch.nn.functional.one_hot(torch.tensor(gold[t]), len(law_TV[t]))
        seen_V = torch.bincount(torch.tensor([ids[t] for ids in found]), minlength=len(want_V))
        slack_V = 5 * (rounds * want_V * (1 - want_V)).clamp(min=0).sqrt() + 1e-3
        assert bool(((seen_V - rounds * want_V).abs() <= slack_V + 3 * (want_V > 0)).all())


@pytest.mark.parametrize("pick", ["hard", "easy"])
def test_hard_and_easy_follow_the_students_entropy(model: LoadedModel, pick: str):
    one = problem(solution=SOLUTION)
    gold = model.tokenizer(SOLUTION, add_special_tokens=False)["input_ids"]
    assert isinstance(gold, list)
    law_TV = laws(model, encode_prompt(model, one.prompt), [*gold, 1])[: len(gold)]
    entropy_T = -(law_TV * law_TV.log()).sum(-1)
    order = entropy_T.argsort(descending=pick == "hard").tolist()
    places = set(order[: round(0.4 * len(gold))])
    changed: set[int] = set()
    for seed in range(60):
        bad = corrupt(model, 0.4, pick).write(Request.of([one], 0, seed))[1]
        changed |= {t for t, (a, b) in enumerate(zip(bad.token_ids, gold, strict=False)) if a != b}
    assert changed <= places
    assert len(changed) > len(places) // 2


def test_untrained_tokens_and_cut_text_are_respected(model: LoadedModel):
    one = problem(solution=SOLUTION, untrained_spans=((0, 4),))
    for seed in range(10):
        gold, bad = corrupt(model, 1.0, limit=8).write(Request.of([one], 0, seed))
        assert bad.token_ids[:4] == gold.token_ids[:4]
        assert bad.trained == gold.trained
        assert not bad.ended
        assert len(bad.token_ids) == 8


def test_draws_follow_the_seed_and_not_the_micro_batches(model: LoadedModel):
    problems = [problem(str(i), f"{i}=", solution=SOLUTION[i:]) for i in range(4)]

    def ids(seed: int, budget: int) -> list[list[int]]:
        return [r.token_ids for r in corrupt(model, 0.6, budget=budget).write(Request.of(problems, 0, seed))]

    assert ids(1, 4096) == ids(1, 20)
    assert ids(1, 4096) != ids(2, 4096)
