"""Terms on chunks: the plain path with one tokenizer, few-line references with two, whatever the split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import assert_near, gradient, plain_gradient, toy
from torch import Tensor

from kdrl.batch import Response
from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives import head
from kdrl.objectives.base import TERMS
from kdrl.tasks import Problem
from kdrl.teachers import LocalTeacher
from kdrl.update import Tally, Updater
from kdrl.vocab.terms import sorted_difference

from .pairs import TEXTS, logits_of, model_of, scored, teacher_of, written


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return model_of("byte-level", 1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return model_of("characters", 2)


@pytest.fixture(scope="module")
def other() -> LoadedModel:
    """A teacher that groups differently: its tokens are at times longer than the student's."""
    return model_of("sentencepiece", 3)


def loss_of(student: LoadedModel, found: Any) -> float:
    updater = Updater(student, 4096)
    value = updater.accumulate(found, range(found.rollouts.rows))
    updater.clear()
    return value


# --- one tokenizer: the plain path ---


def same(seed: int, **more: Any) -> LoadedModel:
    return toy(seed, **more)


def same_responses(student: LoadedModel) -> list[Response]:
    out = []
    for i, text in enumerate(["12;3#", "7", "abc+1-2"]):
        problem = Problem(f"p{i}", "1+2=", "3")
        ids = student.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, student.eos_ids[0]] if i % 2 == 0 else ids
        prompt = encode_prompt(student, problem.prompt)
        out.append(Response(problem, i, prompt, ids, "student", i % 2 == 0, text))
        out[-1].logp = [0.1 * (j - 2) for j in range(len(ids))]
    return out


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_chunks_of_one_tokenizer_are_the_plain_path(estimator: str, stale: bool):
    mine, theirs = same(1, trainable=True), same(2)
    responses = same_responses(mine)
    for share in ("chunk", "token"):
        chunk = {"chunk_kl": {"estimator": estimator, "share": share, "clamp": 3.0}}
        found = scored(mine, teacher_of(mine, theirs), responses, [chunk], stale=stale)
        plain = {"distill": {"divergence": "reverse_kl", "support": {"token": estimator}, "clamp": 3.0}}
        want = scored(mine, LocalTeacher(theirs, 4096), responses, [plain], stale=stale)
        assert_near(gradient(mine, found), gradient(mine, want))
        assert loss_of(mine, found) == pytest.approx(loss_of(mine, want), rel=1e-5)


def test_one_token_chunks_at_tau_one_are_the_target_part_of_dkd():
    """Identity 15, both sides through kdrl."""
    mine, theirs = same(1, trainable=True), same(2)
    responses = same_responses(mine)
    found = scored(mine, teacher_of(mine, theirs), responses, [{"chunk_distill": {"tau": 1.0}}])
    plain = {"distill": {"divergence": "forward_kl", "target": {"decouple": {"label": 1.0, "rest": 0.0}}}}
    want = scored(mine, LocalTeacher(theirs, 4096), responses, [plain])
    assert loss_of(mine, found) == pytest.approx(loss_of(mine, want), rel=1e-5)
    assert_near(gradient(mine, found), gradient(mine, want))


def test_overlap_of_one_tokenizer_is_the_whole_vocabulary():
    mine, theirs = same(1, trainable=True), same(2)
    responses = same_responses(mine)
    # <pad> stands for no text, so the two differ by its mass alone.
    found = scored(mine, teacher_of(mine, theirs), responses, [{"overlap_distill": {"divergence": "forward_kl"}}])
    leaves = [logits_of(mine, r.prompt_ids, r.token_ids)[:, 1:].log_softmax(-1) for r in responses]
    targets = [logits_of(theirs, r.prompt_ids, r.token_ids)[:, 1:].log_softmax(-1) for r in responses]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(targets, leaves, strict=True)]).mean()
    assert loss_of(mine, found) == pytest.approx(float(kl.detach()), rel=1e-5)


# --- two tokenizers: references in a few lines of float64 ---


@dataclass
class Chunk:
    """One chunk as a reference sees it: log-probs of its written tokens, and of all tokens at its first."""

    mine: Tensor
    theirs: Tensor
    all_mine: Tensor
    all_theirs: Tensor
    single: bool


def cut_by_hand(mine: list[bytes], theirs: list[bytes]) -> list[tuple[list[int], list[int]]]:
    """Walk both lists, always on the side that is behind, and close where both have come equally far."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = a = b = 0
    group: tuple[list[int], list[int]] = ([], [])
    while i < len(mine) or j < len(theirs):
        if a <= b and i < len(mine):
            group[0].append(i)
            a += len(mine[i])
            i += 1
        else:
            group[1].append(j)
            b += len(theirs[j])
            j += 1
        if a == b and group[0] and group[1]:
            out.append(group)
            group = ([], [])
    return out


def reading(student: LoadedModel, teacher: LoadedModel, r: Response) -> tuple[list[int], list[int], list[Any]]:
    """The teacher's prompt and tokens of a response, and its chunks."""
    pair = teacher_of(student, teacher).vocabularies
    ids, pieces = pair.theirs.encode(r.text.encode())
    bare = r.token_ids[:-1] if r.ended else r.token_ids
    groups = cut_by_hand([p or b"" for p in pair.mine.of(bare)], pieces)
    if r.ended:
        groups.append(([len(bare)], [len(ids)]))
        ids = [*ids, teacher.eos_ids[0]]
    return encode_prompt(teacher, r.problem.prompt), ids, groups


def chunks_of(student: LoadedModel, teacher: LoadedModel, responses: list[Response]) -> list[Chunk]:
    out = []
    for r in responses:
        prompt, ids, groups = reading(student, teacher, r)
        logq = logits_of(student, r.prompt_ids, r.token_ids)
        with torch.no_grad():
            logp = logits_of(teacher, prompt, ids)
        for a, b in groups:
            out.append(
                Chunk(
                    logq[a, [r.token_ids[i] for i in a]],
                    logp[b, [ids[j] for j in b]],
                    logq[a[0]],
                    logp[b[0]],
                    len(a) == len(b) == 1,
                )
            )
    return out


def alm(c: Chunk, tau: float = 100.0) -> Tensor:
    a, b = c.theirs.sum() / tau, c.mine.sum() / tau
    value = -(a.exp() * b + (1 - a.exp()) * torch.log(1 - b.exp()))
    # kdrl's is the divergence: less by the teacher's own entropy.
    return value + a.exp() * a + (1 - a.exp()) * torch.log(1 - a.exp())


def surprisals(c: Chunk) -> Tensor:
    a, b = -c.theirs.sum(), -c.mine.sum()
    return a * torch.log(a / b) - a + b


def alm_tv(c: Chunk) -> Tensor:
    return (c.theirs.sum() / 5).exp().sub((c.mine.sum() / 5).exp()).abs()


def uld(c: Chunk) -> Tensor:
    q, p = c.all_mine.exp().sort(descending=True).values, c.all_theirs.exp().sort(descending=True).values
    size = max(len(p), len(q))
    q, p = (torch.cat([x, x.new_zeros(size - len(x))]) for x in (q, p))
    return (q - p).abs().sum()


def shared(student: LoadedModel, teacher: LoadedModel) -> tuple[list[int], list[int]]:
    """Tokens whose text both have, from what the tokenizers decode."""
    pair = teacher_of(student, teacher).vocabularies
    theirs = {pair.theirs.of_id[i]: i for i in sorted(pair.theirs.of_id, reverse=True) if pair.theirs.of_id[i]}
    mine = {pair.mine.of_id[i]: i for i in sorted(pair.mine.of_id, reverse=True) if pair.mine.of_id[i]}
    both = [(mine[t], theirs[t]) for t in mine if t in theirs]
    both.append((student.eos_ids[0], teacher.eos_ids[0]))
    return [a for a, _ in both], [b for _, b in both]


def overlap(student: LoadedModel, teacher: LoadedModel) -> Callable[[Chunk], Tensor]:
    a, b = shared(student, teacher)

    def loss(c: Chunk) -> Tensor:
        q, p = c.all_mine[a].softmax(-1), c.all_theirs[b].softmax(-1)
        return (q * (q.log() - p.log())).sum()

    return loss


def gold(student: LoadedModel, teacher: LoadedModel) -> Callable[[Chunk], Tensor]:
    a, b = shared(student, teacher)

    def loss(c: Chunk) -> Tensor:
        q, p = c.all_mine.exp() * c.mine[1:].exp().prod(), c.all_theirs.exp() * c.theirs[1:].exp().prod()
        m = (q[a] + p[b]) / 2
        jsd = 0.5 * (p[b] * (p[b] / m).log()).sum() + 0.5 * (q[a] * (q[a] / m).log()).sum()
        rest_q = np.setdiff1d(np.arange(len(q)), a)
        rest_p = np.setdiff1d(np.arange(len(p)), b)
        sorted_q, sorted_p = q[rest_q].sort(descending=True).values, p[rest_p].sort(descending=True).values
        size = max(len(rest_q), len(rest_p))
        pad = torch.nn.functional.pad
        rest = (pad(sorted_q, (0, size - len(rest_q))) - pad(sorted_p, (0, size - len(rest_p)))).abs().sum()
        share = len(b) / len(p)
        return share * jsd + (1 - share) * rest

    return loss


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "alm": ({"chunk_distill": {}}, alm),
    "alm-limit": ({"chunk_distill": {"tau": "inf"}}, surprisals),
    "alm-tv": ({"chunk_distill": {"tau": 5.0, "divergence": "tv"}}, alm_tv),
    "uld": ({"sorted_distill": {}}, uld),
    "overlap": ({"overlap_distill": {"divergence": "reverse_kl"}}, overlap),
    "gold": ({"group_distill": {}}, gold),
}


@pytest.mark.parametrize("who", ["teacher", "other"])
@pytest.mark.parametrize("name", CASES)
def test_against_a_reference(name: str, who: str, student: LoadedModel, request: pytest.FixtureRequest):
    theirs: LoadedModel = request.getfixturevalue(who)
    entry, reference = CASES[name]
    responses = written(student)
    if name in ("overlap", "gold"):
        reference = reference(student, theirs)
    chunks = [c for c in chunks_of(student, theirs, responses) if name != "overlap" or c.single]
    assert any(not c.single for c in chunks) or name == "overlap"
    loss = torch.stack([reference(c) for c in chunks]).mean()
    found = scored(student, teacher_of(student, theirs), responses, [entry])
    assert loss_of(student, found) == pytest.approx(float(loss.detach()), rel=1e-5)
    want = plain_gradient(student, lambda: loss)
    assert_near(gradient(student, found), want)


@pytest.mark.parametrize("share", ["chunk", "token"])
def test_every_token_of_a_chunk_carries_the_chunks_log_ratio(share: str, student: LoadedModel, teacher: LoadedModel):
    responses = written(student)
    chunks = chunks_of(student, teacher, responses)
    total, count = torch.zeros((), dtype=torch.float64), sum(len(c.mine) for c in chunks)
    for c in chunks:
        ratio = (c.theirs.sum() - c.mine.sum()).detach()
        ratio = ratio / len(c.mine) if share == "token" else ratio
        total = total - ratio * c.mine.sum() / count
    entry = {"chunk_kl": {"estimator": "k1", "clamp": None, "share": share}}
    found = scored(student, teacher_of(student, teacher), responses, [entry])
    want = plain_gradient(student, lambda: total)
    assert_near(gradient(student, found), want)


def test_the_limit_of_tau(student: LoadedModel, teacher: LoadedModel):
    responses, pair = written(student), teacher_of(student, teacher)
    limit = scored(student, pair, responses, [{"chunk_distill": {"tau": "inf"}}])
    near = scored(student, pair, responses, [{"chunk_distill": {"tau": 1.0e6, "weight": 1.0e6}}])
    assert loss_of(student, near) == pytest.approx(loss_of(student, limit), rel=1e-3)


def test_the_same_model_has_nothing_to_learn(student: LoadedModel):
    twin = model_of("byte-level", 1)
    responses, pair = written(student), teacher_of(student, twin)
    for entry in ({"chunk_distill": {}}, {"overlap_distill": {}}, {"sorted_distill": {}}, {"chunk_kl": {}}):
        found = scored(student, pair, responses, [entry])
        assert abs(loss_of(student, found)) < 1e-6


def test_sorted_profiles_are_blind_to_which_token_is_likely():
    """Identity 16."""
    p = torch.rand(5, 9, dtype=torch.float64).softmax(-1)
    order = torch.randperm(9)
    assert float(sorted_difference(p, p[:, order]).abs().max()) == 0.0
    assert float(sorted_difference(p, torch.rand(5, 12, dtype=torch.float64).softmax(-1)).min()) > 0.0


def test_only_the_largest_entries():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]])
    assert float(sorted_difference(p, q, 2)) == pytest.approx(0.1 + 0.2)
    assert float(sorted_difference(p, q, 4)) == pytest.approx(0.1 + 0.2 + 0.1 + 0.1)


ENTRIES: dict[str, dict[str, Any]] = {
    "chunk_kl": {"estimator": "k2"},
    "chunk_distill": {"tau": 10.0},
    "overlap_distill": {"divergence": {"jsd": 0.3}},
    "sorted_distill": {"merge": True},
    "group_distill": {},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_splitting_padding_and_head_chunks_leave_the_gradient(
    name: str, student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    mask = {"top_entropy": 0.7} if name in ("chunk_kl", "sorted_distill") else "all"
    entry = {name: {**ENTRIES[name], "mask": mask, "scale": "label_p"}}
    responses, pair = written(student), teacher_of(student, teacher)
    found = scored(student, pair, responses, [entry], stale=name == "chunk_kl")
    whole = gradient(student, found)
    assert_near(gradient(student, found, budget=1), whole)
    assert_near(gradient(student, found, budget=70), whole)
    cut = head.chunks
    monkeypatch.setattr(head, "chunks", lambda tokens, vocab, size, starts: cut(tokens, vocab, 3, starts))
    assert_near(gradient(student, found, budget=70), whole)


def test_a_term_beside_it_changes_nothing(student: LoadedModel, teacher: LoadedModel):
    responses, pair = written(student), teacher_of(student, teacher)
    alone = {name: scored(student, pair, responses, [{name: given}]) for name, given in ENTRIES.items()}
    both = scored(student, pair, responses, [{name: given} for name, given in ENTRIES.items()])
    total = torch.stack([gradient(student, each) for each in alone.values()]).sum(0)
    assert_near(gradient(student, both), total)


def test_masses_on_the_shared_tokens_are_reported(student: LoadedModel, teacher: LoadedModel):
    found = scored(student, teacher_of(student, teacher), written(student), [{"overlap_distill": {}}])
    tally = Tally()
    updater = Updater(student, 4096)
    updater.accumulate(found, range(found.rollouts.rows), tally)
    updater.clear()
    _, mass_p, mass_q, count = tally.divergence["overlap_distill"]
    assert 0.5 < mass_p / count <= 1.0
    assert 0.0 < mass_q / count < 1.0


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"overlap_distill": {"divergence": "rank"}}, "no ranks and no gates"),
        ({"chunk_distill": {"divergence": {"pair": ["teacher", "student"]}}}, "a chunk is one outcome"),
        ({"chunk_distill": {"tau": 0.0}}, "above 0"),
        ({"chunk_distill": {"tau": "inf", "divergence": "reverse_kl"}}, "limit of forward_kl"),
        ({"group_distill": {"divergence": "tv"}}, "unnormalised"),
        ({"chunk_kl": {"scale": "entropy_p"}}, "over different tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(entry: dict[str, Any], reason: str):
    ((name, given),) = entry.items()
    with pytest.raises(ValidationError, match=reason):
        TERMS.get(name).Config.model_validate(given)


def test_texts_are_what_they_should_be(student: LoadedModel, teacher: LoadedModel):
    sizes = [len(c.mine) for c in chunks_of(student, teacher, written(student))]
    others = [len(c.theirs) for c in chunks_of(student, teacher, written(student))]
    assert max(others) > 1
    assert len(sizes) > len(TEXTS)
