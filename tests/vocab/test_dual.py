"""Dual-space distillation: few-line references with two tokenizers, the plain divergence with one, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import assert_near, flat, gradient, objective_of, toy
from torch import Tensor

from kdrl.batch import Response
from kdrl.models import LoadedModel, head_of, hidden_states
from kdrl.objectives import head
from kdrl.objectives.base import TERMS
from kdrl.teachers import LocalTeacher
from kdrl.update import Scored, Tally, Updater
from kdrl.vocab.spaces import Spaces, make_spaces

from .pairs import model_of, scored, teacher_of, written
from .test_terms import reading, same_responses

T = 1.7


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return model_of("byte-level", 1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return model_of("characters", 2, hidden_size=24)


def spaces_of(student: LoadedModel, teacher: LoadedModel, entry: dict[str, Any], seed: int = 5) -> Spaces:
    found = make_spaces(objective_of([entry]), student, {"teacher": teacher}, seed)
    assert found is not None
    return found


def slopes(student: LoadedModel, found: Scored, spaces: Spaces, budget: int = 4096) -> tuple[float, Tensor, Tensor]:
    """Loss, the student's gradient, that of the projectors."""
    updater = Updater(student, budget)
    updater.attach(spaces)
    updater.clear()
    value = updater.accumulate(found, range(found.rollouts.rows))
    both = [
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
        for group in (updater.parameters, updater.projectors)
    ]
    updater.clear()
    return value, both[0], both[1]


def agreement(student: LoadedModel, found: Scored, spaces: Spaces) -> float:
    """What the metrics say; the gradients of the projectors are left in place."""
    updater, tally = Updater(student, 4096), Tally()
    updater.attach(spaces)
    updater.clear()
    updater.accumulate(found, range(found.rollouts.rows), tally)
    return tally.counts["dual_distill/agreement"]


def taught(student: LoadedModel, found: Scored, spaces: Spaces) -> Spaces:
    """Projectors trained until they predict some of the labels: what `agree` keeps must be something."""
    parameters = list(spaces.named_parameters.values())
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(300):
        if agreement(student, found, spaces) > 0.3:
            break
        optimizer.step()
    updater = Updater(student, 1)
    updater.attach(spaces)
    updater.clear()
    assert 0.3 < agreement(student, found, spaces) < 1.0
    updater.clear()
    return spaces


# --- references ---


def states(loaded: LoadedModel, prompt: list[int], ids: list[int]) -> Tensor:
    """Hidden states `[T, D]` that predict a response's tokens."""
    batch = torch.tensor([prompt + ids])
    return hidden_states(loaded, batch, torch.ones_like(batch))[0, len(prompt) - 1 : -1]


def weights_of(loaded: LoadedModel) -> Tensor:
    return head_of(loaded).weight_VD[: loaded.vocab_size]


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = (p_logits / T).log_softmax(-1), (q_logits / T).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def exact(student: LoadedModel, teacher: LoadedModel, r: Response, spaces: Spaces, entry: dict[str, Any]) -> Tensor:
    prompt, ids, groups = reading(student, teacher, r)
    mine, theirs = states(student, r.prompt_ids, r.token_ids), states(teacher, prompt, ids).detach()
    pairs = [(a[0], b[0]) for a, b in groups if len(a) == len(b) == 1]
    (space,) = (live.space for live in spaces.live.values())
    h_s, h_t = mine[[a for a, _ in pairs]], theirs[[b for _, b in pairs]]
    y = torch.tensor([r.token_ids[a] for a, _ in pairs])
    p = h_t @ weights_of(teacher).T
    if entry.get("label") == "teacher":
        pair = teacher_of(student, teacher).vocabularies
        texts = [pair.theirs.of_id.get(int(i)) or b"" for i in p.argmax(-1)]
        ends = p.argmax(-1) == teacher.eos_ids[0]
        found = [student.eos_ids[0] if e else pair.mine.by_bytes.get(t, -1) for e, t in zip(ends, texts, strict=True)]
        y = torch.tensor(found)
    u = space.to_student(h_t) @ weights_of(student).detach().T
    ce = -u.log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0] * (y >= 0)
    use = (u.argmax(-1) == y) if entry.get("agree") else (y >= 0)
    in_student = kl(u.detach(), h_s @ weights_of(student).T) * use
    return ce + in_student + kl(p, space.to_teacher(h_s) @ weights_of(teacher).T)


def attended(student: LoadedModel, teacher: LoadedModel, r: Response, spaces: Spaces, sigma: list[Tensor]) -> Tensor:
    prompt, ids, _ = reading(student, teacher, r)
    h_s, h_t = states(student, r.prompt_ids, r.token_ids), states(teacher, prompt, ids).detach()
    (space,) = (live.space for live in spaces.live.values())
    e_s, e_t = (m.model.get_input_embeddings().weight.detach() for m in (student, teacher))
    y, z = torch.tensor(r.token_ids), torch.tensor(ids)
    query = space.query(torch.cat([e_s[[r.prompt_ids[-1], *r.token_ids[:-1]]], e_s[y]], -1))  # type: ignore[misc]
    key = torch.cat([e_t[[prompt[-1], *ids[:-1]]], e_t[z]], -1) / sigma[0]
    score = query @ key.T / math.sqrt(2 * h_t.shape[-1])
    u = score.softmax(-1) @ space.to_student(h_t / sigma[2] + e_t[z] / sigma[1]) @ weights_of(student).detach().T
    v = score.T.softmax(-1) @ space.to_teacher(h_s) @ weights_of(teacher).T
    ce = -u.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    in_student = kl(u.detach(), h_s @ weights_of(student).T) * (u.argmax(-1) == y)
    return ce + in_student + kl(h_t @ weights_of(teacher).T, v).sum() / len(y)


def deviations(student: LoadedModel, teacher: LoadedModel, responses: list[Response]) -> list[Tensor]:
    e_t = teacher.model.get_input_embeddings().weight.detach()
    found = [reading(student, teacher, r) for r in responses]
    targets = torch.cat([e_t[ids] for _, ids, _ in found])
    inputs = torch.cat([e_t[[prompt[-1], *ids[:-1]]] for prompt, ids, _ in found])
    hidden = torch.cat([states(teacher, prompt, ids).detach() for prompt, ids, _ in found])
    return [torch.cat([inputs, targets], -1).std(), targets.std(), hidden.std()]


ENTRIES: dict[str, dict[str, Any]] = {
    "dskd": {"temperature": T},
    "dskd-v2": {"temperature": T, "label": "teacher", "agree": True, "start": "heads"},
    "dskd-cma": {"temperature": T, "align": "attention", "agree": True},
}


def check(student: LoadedModel, found: Scored, spaces: Spaces, loss: Callable[[], Tensor]) -> None:
    value, mine, beside = slopes(student, found, spaces)
    want = loss()
    assert value == pytest.approx(float(want.detach()), rel=1e-5)
    parameters = list(spaces.named_parameters.values())
    want.backward()
    assert_near(mine, flat(Updater(student, 1)))
    assert_near(beside, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    for p in parameters:
        p.grad = None


@pytest.mark.parametrize("name", ["dskd", "dskd-v2"])
def test_exact_alignment_against_a_reference(name: str, student: LoadedModel, teacher: LoadedModel):
    entry = {"dual_distill": ENTRIES[name]}
    spaces, responses = spaces_of(student, teacher, entry), written(student)
    found = scored(student, teacher_of(student, teacher), responses, [entry])
    if "agree" in ENTRIES[name]:
        taught(student, found, spaces)

    def loss() -> Tensor:
        return torch.cat([exact(student, teacher, r, spaces, ENTRIES[name]) for r in responses]).mean()

    check(student, found, spaces, loss)


def test_cross_model_attention_against_a_reference(student: LoadedModel, teacher: LoadedModel):
    entry = {"dual_distill": ENTRIES["dskd-cma"]}
    spaces, responses = spaces_of(student, teacher, entry), written(student)
    found = scored(student, teacher_of(student, teacher), responses, [entry])
    taught(student, found, spaces)
    sigma = deviations(student, teacher, responses)

    def loss() -> Tensor:
        return torch.cat([attended(student, teacher, r, spaces, sigma) for r in responses]).mean()

    check(student, found, spaces, loss)


# --- properties ---


def test_with_one_tokenizer_and_identities_it_is_the_plain_divergence():
    """Once in each space, but for the student's head, which only its own space reads."""
    mine, theirs = toy(1, trainable=True, tie_embeddings=False), toy(2, tie_embeddings=False)
    theirs.model.get_output_embeddings().weight.data.copy_(mine.model.get_output_embeddings().weight.data)
    responses = same_responses(mine)
    entry = {"dual_distill": {"temperature": 1.0, "start": "heads"}}
    spaces = spaces_of(mine, theirs, entry)
    for name, weight in spaces.named_parameters.items():
        want = torch.zeros_like(weight) if name.endswith("bias") else torch.eye(len(weight)).to(weight)
        assert (weight - want).abs().max() < 1e-9
    found = scored(mine, teacher_of(mine, theirs), responses, [entry])
    plain = scored(mine, LocalTeacher(theirs, 4096), responses, [{"distill": {"divergence": "forward_kl"}}])
    times = [torch.full((p.numel(),), 1.0 if "lm_head" in name else 2.0) for name, p in mine.model.named_parameters()]
    assert_near(slopes(mine, found, spaces)[1], torch.cat(times) * gradient(mine, plain))


@pytest.mark.parametrize("name", ENTRIES)
def test_gradients_reach_the_student_and_every_projector(name: str, student: LoadedModel, teacher: LoadedModel):
    entry = {"dual_distill": ENTRIES[name] | {"agree": False}}
    spaces = spaces_of(student, teacher, entry)
    found = scored(student, teacher_of(student, teacher), written(student), [entry])
    _, mine, _ = slopes(student, found, spaces)
    assert float(mine.norm()) > 0
    updater = Updater(student, 4096)
    updater.attach(spaces)
    updater.accumulate(found, range(found.rollouts.rows))
    for key, p in spaces.named_parameters.items():
        assert p.grad is not None, key
        assert float(p.grad.norm()) > 0, key
    updater.clear()
    assert all(p.grad is None for p in spaces.named_parameters.values())


def test_agreement_is_the_share_of_tokens_that_the_projected_teacher_predicts(
    student: LoadedModel, teacher: LoadedModel
):
    entry = {"dual_distill": {"label": "teacher", "start": "heads"}}
    responses = written(student)
    twin = model_of("byte-level", 1)
    found = scored(student, teacher_of(student, twin), responses, [entry])
    assert agreement(student, found, spaces_of(student, twin, entry)) == 1.0
    entry = {"dual_distill": {}}
    found = scored(student, teacher_of(student, teacher), responses, [entry])
    spaces = taught(student, found, spaces_of(student, teacher, entry))
    right = total = 0
    for r in responses:
        prompt, ids, groups = reading(student, teacher, r)
        pairs = [(a[0], b[0]) for a, b in groups if len(a) == len(b) == 1]
        (space,) = (live.space for live in spaces.live.values())
        u = space.to_student(states(teacher, prompt, ids)[[b for _, b in pairs]]) @ weights_of(student).T
        y = torch.tensor([r.token_ids[a] for a, _ in pairs], dtype=torch.long)
        right, total = right + int((u.argmax(-1) == y).sum()), total + len(y)
    assert agreement(student, found, spaces) == pytest.approx(right / total)
    assert 0 < right < total


@pytest.mark.parametrize("name", ENTRIES)
def test_splitting_padding_and_head_chunks_leave_the_gradient(
    name: str, student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    entry = {"dual_distill": {**ENTRIES[name], "mask": {"top_entropy": 0.7}, "scale": "label_p"}}
    spaces = spaces_of(student, teacher, entry)
    found = scored(student, teacher_of(student, teacher), written(student), [entry])
    if "agree" in ENTRIES[name]:
        taught(student, found, spaces)
    whole = slopes(student, found, spaces)
    for budget in (1, 70):
        split = slopes(student, found, spaces, budget)
        assert_near(split[1], whole[1])
        assert_near(split[2], whole[2])
    cut = head.chunks
    monkeypatch.setattr(head, "chunks", lambda tokens, vocab, size=None, starts=None: cut(tokens, vocab, 3, starts))
    split = slopes(student, found, spaces, 70)
    assert_near(split[1], whole[1])
    assert_near(split[2], whole[2])


def test_a_term_beside_it_changes_nothing(student: LoadedModel, teacher: LoadedModel):
    entries = [{"dual_distill": ENTRIES["dskd"]}, {"overlap_distill": {}}]
    spaces, pair, responses = spaces_of(student, teacher, entries[0]), teacher_of(student, teacher), written(student)
    alone = slopes(student, scored(student, pair, responses, entries[:1]), spaces)[1]
    other = gradient(student, scored(student, pair, responses, entries[1:]))
    assert_near(slopes(student, scored(student, pair, responses, entries), spaces)[1], alone + other)


def test_the_same_seed_gives_the_same_projectors(student: LoadedModel, teacher: LoadedModel):
    entry = {"dual_distill": ENTRIES["dskd-cma"]}
    one, again, other = (spaces_of(student, teacher, entry, seed).named_parameters for seed in (1, 1, 2))
    assert list(one) == [
        f"dual_distill.{layer}.{key}" for layer in ("to_student", "to_teacher", "query") for key in ("weight", "bias")
    ]
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["dual_distill.query.weight"], other["dual_distill.query.weight"])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"divergence": "rank"}, "no ranks"),
        ({"align": "attention", "label": "teacher"}, "needs align: exact"),
        ({"scale": "entropy_p"}, "over different tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(given: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        TERMS.get("dual_distill").Config.model_validate(given)
