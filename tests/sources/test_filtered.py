"""Filters: what is kept, what is tried again, what is skipped and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engines.toys import full_logp, toy
from tiny import problem

from kdrl.batch import Response
from kdrl.models import LoadedModel
from kdrl.sources.config import SourceConfig
from kdrl.sources.filtered import FilteredSource, keep
from kdrl.sources.keep import Filtered, Keep
from kdrl.sources.scores import RESPONSE_SCORES, Scoring

from .scripted import Script, judge, request


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return toy()


def rules_of(spec: Any) -> tuple[Keep, ...]:
    settings = SourceConfig.model_validate({"filtered": {"keep": spec}}).settings
    assert isinstance(settings, Filtered)
    return settings.keep


def filtered(
    model: LoadedModel, spec: Any, verdict: Callable[[str], bool], tries: int = 1, samples: int = 2
) -> FilteredSource:
    return FilteredSource(
        Script("student", samples), rules_of(spec), judge(verdict), model, tries=tries, prober=Script("student", 4)
    )


def texts(responses: Sequence[Response]) -> list[str]:
    return ["/".join(r.text.split("/")[:3:2]) for r in responses]


def first_right(text: str) -> bool:
    """The first response of problems 0 and 2."""
    number, _, sample, _ = text.split("/")
    return number in ("0", "2") and sample == "0"


@pytest.mark.parametrize(
    ("spec", "kept", "skipped"),
    [
        ("right", ["0/0", "2/0"], 1),
        ("wrong", ["0/1", "1/0", "1/1", "2/1"], 0),
        ({"score": "reward", "above": 0.5}, ["0/0", "2/0"], 1),
        ({"score": "group_rate", "above": 0.0, "below": 1.0}, ["0/0", "0/1", "2/0", "2/1"], 1),
        ({"score": "correct", "best": 1}, ["0/0", "1/0", "2/0"], 0),
        ({"score": "correct", "top": 0.34}, ["0/0", "0/1", "2/0"], 1),
        ({"score": "correct", "bottom": 0.5}, ["0/1", "1/0", "1/1"], 1),
        ([{"score": "group_rate", "above": 0.0}, "wrong"], ["0/1", "2/1"], 1),
    ],
)
def test_what_is_kept_and_what_is_skipped(model: LoadedModel, spec: Any, kept: list[str], skipped: int):
    ask = request()
    found = filtered(model, spec, first_right).write(ask)
    assert texts(found) == kept
    assert ask.out.numbers() == {"source/kept": len(kept) / 6, "source/skipped_problems": float(skipped)}
    assert ask.out.generated == 6


def test_problems_with_nothing_left_are_tried_again_with_new_draws(model: LoadedModel):
    """Problem 1 passes at its third try, problem 3 of the next step never."""
    seeds: list[str] = []

    def verdict(text: str) -> bool:
        number, _, _, seed = text.split("/")
        seeds.extend([seed] if seed not in seeds else [])
        return {"0": True, "1": len(seeds) > 2, "2": True}[number]

    source, ask = filtered(model, "right", verdict, tries=5), request()
    found = source.write(ask)
    script: Any = source.inner
    assert [[p.id for p in call.problems] for call in script.calls] == [["0", "1", "2"], ["1"], ["1"]]
    assert len({call.seed for call in script.calls}) == 3
    assert [r.group for r in found] == [0, 0, 1, 1, 2, 2]
    assert {r.group: r.problem.id for r in found} == {0: "0", 1: "1", 2: "2"}
    assert ask.out.numbers() == {"source/kept": 6 / 10, "source/skipped_problems": 0.0}

    hopeless, ask = filtered(model, "right", lambda text: False, tries=4), request()
    assert hopeless.write(ask) == []
    assert ask.out.numbers() == {"source/kept": 0.0, "source/skipped_problems": 3.0}
    assert ask.out.generated == 24


def test_problems_that_the_student_solves_are_dropped(model: LoadedModel):
    """DED: student_rate asks the student itself, with samples that are not kept."""

    def verdict(text: str) -> bool:
        number, _, sample, _ = text.split("/")
        return int(sample) < {"0": 4, "1": 2, "2": 0}[number]

    source, ask = filtered(model, {"score": "student_rate", "below": 0.75}, verdict), request()
    assert texts(source.write(ask)) == ["1/0", "1/1", "2/0", "2/1"]
    prober: Any = source.prober
    assert prober.calls[0].seed != ask.seed
    assert ask.out.generated == 6 + 12


def responses_of(model: LoadedModel) -> list[Response]:
    draw = torch.Generator().manual_seed(0)
    return [
        Response(problem(), 0, [3, 4], torch.randint(2, 15, (n,), generator=draw).tolist(), "student", False, "")
        for n in (1, 6, 3, 9)
    ]


def test_mean_log_probs_are_those_of_a_plain_forward(model: LoadedModel):
    teacher, responses = toy(seed=5), responses_of(model)
    scoring = Scoring(responses, model, teacher, temperature=0.8, budget=12)
    for name, asked in (("student_logp", model), ("teacher_logp", teacher)):
        want = [float(full_logp(asked, r.prompt_ids, r.token_ids, 0.8).mean()) for r in responses]
        assert RESPONSE_SCORES.get(name)(scoring) == pytest.approx(want, abs=1e-4)
    assert RESPONSE_SCORES.get("length")(scoring) == [1.0, 6.0, 3.0, 9.0]


def test_a_gap_of_log_probs_is_highest_where_the_student_lags_most(model: LoadedModel):
    """ACID: of equal responses the teacher's own gain decides, and the score asks a teacher but no verdict."""
    teacher, responses = toy(seed=5), responses_of(model)
    found = RESPONSE_SCORES.get("logp_gap")(Scoring(responses, model, teacher, budget=12))
    loss = {
        asked: [-float(full_logp(m, r.prompt_ids, r.token_ids, 1.0).mean()) for r in responses]
        for asked, m in (("student", model), ("teacher", teacher))
    }
    assert found == pytest.approx([s - t for s, t in zip(loss["student"], loss["teacher"], strict=True)], abs=1e-4)
    settings = SourceConfig.model_validate({"filtered": {"source": "gold", "keep": {"score": "logp_gap", "top": 0.5}}})
    assert settings.settings.asks_teacher
    assert not settings.settings.judges


def test_of_equal_scores_the_earlier_is_kept(model: LoadedModel):
    responses = responses_of(model)
    (top,) = rules_of({"score": "length", "top": 0.5})
    assert keep(top, responses, [1.0, 1.0, 1.0, 1.0]) == responses[:2]
    (bottom,) = rules_of({"score": "length", "bottom": 0.3})
    assert keep(bottom, responses, [1.0, 0.0, 0.0, 1.0]) == responses[1:3]
    (best,) = rules_of({"score": "length", "best": 1})
    assert keep(best, responses, [0.0, 2.0, 2.0, 1.0]) == responses[1:2]
