"""A local teacher's evidence against the model's own logits; who is asked for what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import MODEL, copied, made_responses, plain_logp, toy

from kdrl.batch import Rollouts
from kdrl.models import LoraConfig, ModelConfig, NewModel, NewTokenizer, load_model, packing
from kdrl.objectives.objective import token_data
from kdrl.objectives.terms import Distill, DistillConfig
from kdrl.teachers import LocalTeacher, ReferenceTeacher, SelfTeacher
from kdrl.teachers.base import Given


@pytest.fixture(scope="module")
def teacher() -> Any:
    return toy(2)


@pytest.fixture
def rollouts() -> Rollouts:
    return Rollouts.of(made_responses())


def chosen(loaded: Any, rollouts: Rollouts, temperature: float = 1.0) -> torch.Tensor:
    return torch.cat(
        [
            plain_logp(loaded, r.prompt_ids, r.token_ids, temperature).gather(-1, torch.tensor(r.token_ids)[:, None])
            for r in rollouts.responses
        ]
    )[:, 0].detach()


@pytest.mark.parametrize("budget", [1, 70, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_the_models_own(teacher: Any, rollouts: Rollouts, budget: int, temperature: float):
    found = LocalTeacher(teacher, budget).score(rollouts, rollouts.trained_N, "token", temperature)
    want = chosen(teacher, rollouts, temperature).float()
    torch.testing.assert_close(found.logp_N, want, atol=1e-5, rtol=1e-5)
    assert found.calls == rollouts.rows
    assert found.hidden_MD is None


@pytest.mark.parametrize("packed", [True, False])
def test_only_asked_tokens_are_scored_and_only_what_leads_to_them_is_read(
    teacher: Any, rollouts: Rollouts, packed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packing, "packs", lambda *given: packed)
    keep = torch.zeros_like(rollouts.trained_N)
    keep[[0, 2, 9, 40]] = True
    read: list[int] = []
    hook = teacher.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    # A row a pass when padded, so that no padding is among what was read.
    found = LocalTeacher(teacher, 4096 if packed else 1).score(rollouts, keep, "distribution", 1.0)
    hook.remove()
    touched = rollouts.row_N[keep].unique().tolist()
    assert found.calls == len(touched) < rollouts.rows
    prompts, texts = set(), []
    for row in touched:
        response, (start, end) = rollouts.responses[row], rollouts.span(row)
        last = int(keep[start:end].nonzero()[-1])
        texts += response.token_ids[:last]
        texts += [] if packed and response.group in prompts else response.prompt_ids
        prompts.add(response.group)
    assert sorted(read) == sorted(texts)
    assert torch.equal(found.scored_N, keep)
    assert found.hidden_MD is not None
    assert len(found.hidden_MD) == 4
    want = chosen(teacher, rollouts).float()
    torch.testing.assert_close(found.logp_N[keep], want[keep], atol=1e-5, rtol=1e-5)
    assert (found.logp_N[~keep] == 0).all()


def test_nothing_asked_is_nothing_read(teacher: Any, rollouts: Rollouts):
    for need in ("token", "distribution"):
        found = LocalTeacher(teacher, 50).score(rollouts, rollouts.trained_N & False, need, 1.0)  # type: ignore[arg-type]
        assert found.calls == 0
        assert not found.scored_N.any()


@pytest.mark.parametrize("budget", [1, 4096])
def test_a_distribution_is_compared_at_its_own_token(teacher: Any, rollouts: Rollouts, budget: int):
    """Chunks and packs reorder tokens; the comparison must find each one's own teacher distribution."""
    student = toy(1)
    keep = torch.arange(rollouts.tokens) % 3 != 1
    evidence = LocalTeacher(teacher, budget).score(rollouts, keep, "distribution", 1.0)
    term = Distill(DistillConfig.model_validate({"divergence": "forward_kl", "support": "full"}))
    q, p = (
        torch.cat([plain_logp(m, r.prompt_ids, r.token_ids) for r in rollouts.responses]).detach()
        for m in (student, teacher)
    )
    index = torch.randperm(rollouts.tokens, generator=torch.Generator().manual_seed(0))
    compare = evidence.comparison(term.compare, index, Given(rollouts.tokens_N, token_data(rollouts)))
    found = torch.cat([compare(q[index[part]], part) for part in (slice(0, 11), slice(11, rollouts.tokens))])
    want = torch.where(keep, (p.exp() * (p - q)).sum(-1), 0.0)[index]
    torch.testing.assert_close(found[:, 0], want, atol=1e-6, rtol=1e-5)


def test_evidence_without_a_distribution_says_so(teacher: Any, rollouts: Rollouts):
    evidence = LocalTeacher(teacher, 50).score(rollouts, rollouts.trained_N, "token", 1.0)
    with pytest.raises(TypeError, match="no distribution"):
        evidence.logp(torch.arange(2), torch.zeros(2))


def test_the_self_teacher_reads_the_privileged_prompt_and_stays_when_the_student_moves(teacher: Any):
    student = copied(teacher)
    rollouts = Rollouts.of(made_responses(origin="privileged"))
    evidence = SelfTeacher(student, 80).score(rollouts, rollouts.trained_N, "distribution", 1.0)
    want = torch.cat(
        [
            plain_logp(teacher, r.privileged_ids or [], r.token_ids).gather(-1, torch.tensor(r.token_ids)[:, None])
            for r in rollouts.responses
        ]
    )[:, 0]
    torch.testing.assert_close(evidence.logp_N, want.detach().float(), atol=1e-5, rtol=1e-5)
    assert evidence.head is not None
    before = evidence.head.weight_VD.clone()
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(1.0)
    assert torch.equal(evidence.head.weight_VD, before)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4.0)])
def test_the_reference_is_the_student_as_training_found_it(lora: LoraConfig | None, rollouts: Rollouts):
    config = ModelConfig(
        model=NewModel(**MODEL),
        tokenizer=NewTokenizer(characters="".join(chr(48 + i) for i in range(40))),
        lora=lora,
    )
    student = load_model(config, "cpu", trainable=True, seed=0)
    reference = ReferenceTeacher(student, 100)
    start = LocalTeacher(student, 100).score(rollouts, rollouts.trained_N, "token", 1.0).logp_N
    with torch.no_grad():
        for weight in student.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    now = LocalTeacher(student, 100).score(rollouts, rollouts.trained_N, "token", 1.0).logp_N
    assert (now - start).abs().max() > 1e-3
    kept = reference.score(rollouts, rollouts.trained_N, "token", 1.0).logp_N
    torch.testing.assert_close(kept, start, atol=1e-6, rtol=1e-6)
    assert all(p.requires_grad == (lora is None or "lora" in n) for n, p in student.model.named_parameters())
