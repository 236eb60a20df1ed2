"""ALM looking ahead: outcomes debiased by what begins after them, and joined until that is likely."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import assert_near, gradient, objective_of, plain_gradient
from torch import Tensor

from kdrl.batch import Response
from kdrl.errors import UserError
from kdrl.models import LoadedModel
from kdrl.objectives import head
from kdrl.objectives.base import TERMS
from kdrl.vocab.likelihood import ChunkDistill, ChunkDistillConfig

from .pairs import logits_of, model_of, scored, teacher_of, written
from .test_terms import loss_of, reading


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return model_of("byte-level", 1, trainable=True)


@pytest.fixture(scope="module", params=["characters", "sentencepiece"])
def teacher(request: pytest.FixtureRequest) -> LoadedModel:
    return model_of(request.param, 2)


def begin(loaded: LoadedModel, pieces: Any) -> list[int]:
    """Tokens with a space, tab or newline in front, and special ones."""
    found = (pieces.of_id.get(i) for i in range(loaded.vocab_size))
    return [i for i, piece in enumerate(found) if piece is None or piece.startswith((b" ", b"\n", b"\t"))]


def outcomes(
    student: LoadedModel, teacher: LoadedModel, r: Response, threshold: float, debias: bool
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs of each outcome of one response under teacher and student."""
    pair = teacher_of(student, teacher).vocabularies
    prompt, ids, groups = reading(student, teacher, r)
    q = logits_of(student, r.prompt_ids, r.token_ids)
    p = logits_of(teacher, prompt, ids).detach()
    out, now = [], [q.new_zeros(()), q.new_zeros(())]
    for i, (a, b) in enumerate(groups):
        now = [now[0] + p[b, [ids[j] for j in b]].sum(), now[1] + q[a, [r.token_ids[j] for j in a]].sum()]
        if i + 1 == len(groups):
            out.append((now[0], now[1]))
            break
        (c, *_), (d, *_) = groups[i + 1]
        space_p = p[d, begin(teacher, pair.theirs)].logsumexp(-1)
        space_q = q[c, begin(student, pair.mine)].logsumexp(-1)
        if space_p.exp() > threshold:
            out.append((now[0] + space_p * debias, now[1] + space_q * debias))
            now = [q.new_zeros(()), q.new_zeros(())]
    return out


@pytest.mark.parametrize("threshold", [None, 0.0735, 0.5])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("tau", [2.0, "inf"])
def test_against_a_reference(
    debias: bool, threshold: float | None, tau: Any, student: LoadedModel, teacher: LoadedModel
):
    responses = written(student)
    pairs = [x for r in responses for x in outcomes(student, teacher, r, threshold or 0.0, debias)]
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    if tau == "inf":
        losses = -a * torch.log(a / b) + a - b
    else:
        p, q = (a / tau).exp(), (b / tau).exp()
        losses = p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
    entry = {"chunk_distill": {"tau": tau, "debias": debias, "threshold": threshold, "reduce": "sum"}}
    found = scored(student, teacher_of(student, teacher, spaces=True), responses, [entry])
    kept = int(found.active[0].keep_N.sum())
    if threshold:
        assert len(pairs) < kept, "else nothing was joined"
    assert loss_of(student, found) == pytest.approx(float(losses.sum().detach()), rel=1e-5)
    assert_near(gradient(student, found), plain_gradient(student, lambda: losses.sum()))


@pytest.mark.parametrize("entry", [{"debias": True}, {"threshold": 0.05}, {"debias": True, "threshold": 0.05}], ids=str)
def test_splitting_and_other_terms_leave_the_gradient(
    entry: dict[str, Any], student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    given = {"chunk_distill": {"tau": 5.0, "scale": "label_p", "mask": {"top_entropy": 0.7}, **entry}}
    pair, responses = teacher_of(student, teacher, spaces=True), written(student)
    found = scored(student, pair, responses, [given])
    whole = gradient(student, found)
    assert_near(gradient(student, found, budget=1), whole)
    assert_near(gradient(student, found, budget=70), whole)
    cut = head.chunks
    monkeypatch.setattr(head, "chunks", lambda tokens, vocab, size, starts: cut(tokens, vocab, 3, starts))
    assert_near(gradient(student, found, budget=70), whole)
    monkeypatch.undo()
    # A term on tokens that are in no chunk must not stand between two chunks, nor join them.
    beside = scored(student, pair, responses, [given, {"cross_entropy": {"on": ["student"]}}])
    alone = scored(student, pair, responses, [{"cross_entropy": {"on": ["student"]}}])
    assert_near(gradient(student, beside), whole + gradient(student, alone))


def test_what_is_in_no_chunk_parts_the_outcomes(student: LoadedModel):
    """Two chunks with an untrained token between them are not neighbours, whatever the threshold."""
    teacher = model_of("characters", 2)
    (response,) = written(student, ["the answer is 43."])
    response.trained = [i != 3 for i in range(len(response.token_ids))]
    pair = teacher_of(student, teacher, spaces=True)
    found = scored(student, pair, [response], [{"chunk_distill": {"threshold": 0.999, "reduce": "sum", "tau": 1.0}}])
    evidence = found.evidence["teacher"]
    inside = evidence.columns["chunk_size"] > 0
    assert not bool(inside[3])
    halves = [range(3), range(4, len(inside))]
    logq = logits_of(student, response.prompt_ids, response.token_ids).gather(
        -1, torch.tensor(response.token_ids)[:, None]
    )[:, 0]
    want = 0.0
    for half in halves:
        p, q = (math.exp(sum(float(x[i].detach()) for i in half)) for x in (evidence.logp_N, logq))
        want += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert loss_of(student, found) == pytest.approx(want, rel=1e-5)


def test_the_same_model_has_nothing_to_learn(student: LoadedModel):
    twin = model_of("byte-level", 1)
    entry = {"chunk_distill": {"debias": True, "threshold": 0.1}}
    found = scored(student, teacher_of(student, twin, spaces=True), written(student), [entry])
    assert abs(loss_of(student, found)) < 1e-6


def test_looking_ahead_needs_the_distribution():
    plain, ahead = (ChunkDistill(ChunkDistillConfig.model_validate(x)) for x in ({}, {"debias": True}))
    assert (plain.needs.teacher, ahead.needs.teacher) == ("token", "distribution")
    assert plain.compared is ahead.compared is False
    with pytest.raises(ValidationError, match="less than 1"):
        TERMS.get("chunk_distill").Config.model_validate({"threshold": 1.0})


def test_only_a_local_teacher_can_be_asked(student: LoadedModel):
    from kdrl.pairing import check_gives
    from kdrl.teachers.base import Gives

    with pytest.raises(UserError, match=r"objective\.chunk_distill reads more"):
        check_gives("teacher", Gives(distribution=False), objective_of([{"chunk_distill": {"debias": True}}]))
    check_gives("teacher", Gives(distribution=False), objective_of([{"chunk_distill": {}}]))
