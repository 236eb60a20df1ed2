"""Contracts 1 to 3 where the gradient is made: on a real Qwen3 in float64, for every kind of term."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import (
    CHARACTERS,
    MODEL,
    assert_near,
    copied,
    gradient,
    made_responses,
    plain_gradient,
    plain_logp,
    score,
    toy,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl.batch import Response, Rollouts, pack_rows
from kdrl.methods import all_methods
from kdrl.models import LoadedModel, ModelConfig, NewModel, NewTokenizer, load_model
from kdrl.objectives import head
from kdrl.objectives.terms import TERMS as TERM_KINDS
from kdrl.objectives.terms import Distill, Term
from kdrl.teachers import LocalTeacher
from kdrl.update import Tally, Updater


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return toy(1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return toy(2)


PG = {"clip": {"low": 0.1, "high": 0.2}}
TERMS: dict[str, dict[str, Any]] = {
    "pg-token": {"policy_gradient": {"ratio": "token", **PG}},
    "pg-dual": {"policy_gradient": {"advantage": "rloo", "clip": {"low": 0.2, "high": 0.2, "dual": 1.1}}},
    "pg-sequence": {"policy_gradient": {"ratio": "sequence", **PG}},
    "pg-none": {"policy_gradient": {"ratio": "none", "advantage": "dr_grpo"}},
    "pg-trrd": {"policy_gradient": {"ratio": {"alpha": 0.4, "clamp": 3.0}, "clip": {"kind": "none"}}},
    "pg-cispo": {"policy_gradient": {"advantage": "batch_std", "clip": {"kind": "cispo", "cap": 1.1}}},
    "full-reverse": {"distill": {"divergence": "reverse_kl", "support": "full"}},
    "full-forward": {"distill": {"divergence": "forward_kl", "support": "full", "skip_eos": True}},
    "full-jsd": {"distill": {"divergence": {"jsd": 0.3}, "support": "full"}},
    "topk": {"distill": {"divergence": "reverse_kl", "support": {"topk": 4}}},
    "k1": {"distill": {"divergence": "reverse_kl", "support": {"token": "k1"}}},
    "k2": {"distill": {"divergence": "reverse_kl", "support": {"token": "k2"}, "clamp": 1.0}},
    "k3": {"distill": {"divergence": "reverse_kl", "support": {"token": "k3"}}},
    "cross-entropy": {"cross_entropy": {"on": ["student"]}},
    "reference": {"reference_kl": {"estimator": "k2"}},
    "entropy": {"entropy": {}},
}
REDUCES = ["token_global", "batch_tokens", "sequence_mean", {"constant": 11.0}, "sum"]
MASKS = ["all", "wrong_response", {"top_entropy": 0.4}, [{"not": "truncated"}, {"top_entropy": 0.7}], "wrong_group"]


def with_settings(entry: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    (name, given), *_ = entry.items()
    return [{name: {**given, **settings}}]


def test_a_response_without_a_token_is_refused():
    """It would mark the last token of the one before as an end."""
    responses = [replace(made_responses()[0], ended=False), replace(made_responses()[0], token_ids=[])]
    with pytest.raises(ValueError, match="response 1 of 2 has no token"):
        Rollouts.of(responses)


@pytest.mark.parametrize("turn", range(len(REDUCES)))
@pytest.mark.parametrize("name", TERMS)
def test_splitting_padding_order_and_chunks_leave_the_gradient(
    name: str, turn: int, student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    # Every reduce meets every term, and over the reduces every mask does too. A group without a right response has no
    # advantage, so that mask would leave the policy gradient nothing.
    mask = MASKS[(turn + list(TERMS).index(name)) % len(MASKS)]
    mask = "right_response" if mask == "wrong_group" and name.startswith("pg") else mask
    entries = with_settings(TERMS[name], reduce=REDUCES[turn], mask=mask)
    responses = made_responses()
    told: dict[str, Any] = {"teacher": teacher, "reference": teacher, "stale": True}
    scored = score(student, responses, entries, **told)
    whole = gradient(student, scored)
    assert whole.norm() > 1e-6, "a test on a gradient of zero proves nothing"

    assert_near(gradient(student, scored, budget=1), whole)
    assert_near(gradient(student, scored, budget=60), whole)
    order = torch.randperm(len(responses), generator=torch.Generator().manual_seed(5)).tolist()
    moved = score(student, [responses[i] for i in order], entries, **told)
    assert_near(gradient(replace(student, pad_id=9), moved, budget=100), whole)
    whole_chunks = head.chunks
    monkeypatch.setattr(head, "chunks", lambda tokens, vocab, size, starts: whole_chunks(tokens, vocab, 3, starts))
    assert_near(gradient(student, scored, budget=60), whole)


def test_micro_batches_really_differ():
    rollouts = Rollouts.of(made_responses())
    wanted_N = rollouts.trained_N
    counts = {
        p: [len(pack_rows(rollouts, range(9), wanted_N, b, packed=p)) for b in (1, 60, 4096)] for p in (False, True)
    }
    assert counts == {False: [9, 4, 1], True: [9, 3, 1]}


def test_optimizer_steps_on_parts_of_a_batch_add_up_under_sum(student: LoadedModel, teacher: LoadedModel):
    scored = score(student, made_responses(), with_settings(TERMS["k2"], reduce="sum"), teacher=teacher)
    parts = gradient(student, scored, rows=[0, 4, 8, 2]) + gradient(student, scored, rows=[1, 3, 5, 6, 7])
    assert_near(parts, gradient(student, scored))


def test_the_reported_loss_does_not_depend_on_the_split(student: LoadedModel, teacher: LoadedModel):
    scored = score(student, made_responses(), [TERMS["pg-token"], TERMS["full-jsd"]], teacher=teacher, stale=True)
    tallies = [Tally(), Tally()]
    for tally, budget in zip(tallies, (1, 4096), strict=True):
        updater = Updater(student, budget)
        updater.accumulate(scored, range(9), tally)
        updater.clear()
    assert tallies[0].loss.keys() == {"policy_gradient", "distill"}
    for name, value in tallies[0].loss.items():
        assert value == pytest.approx(tallies[1].loss[name], rel=1e-5)
    assert tallies[0].held == tallies[1].held > 0


def exact_loss(kind: str, student: LoadedModel, teacher: LoadedModel, responses: list[Response]) -> torch.Tensor:
    """Mean over all tokens, from the models' own logits, one unpadded row at a time."""
    losses = []
    for r in responses:
        q, p = plain_logp(student, r.prompt_ids, r.token_ids), plain_logp(teacher, r.prompt_ids, r.token_ids).detach()
        if kind == "reverse":
            losses.append((q.exp() * (q - p)).sum(-1))
        elif kind == "forward":
            losses.append((p.exp() * (p - q)).sum(-1))
        elif kind == "entropy":
            losses.append((q.exp() * q).sum(-1))
        else:
            chosen = torch.tensor(r.token_ids)[:, None]
            mine, theirs = q.gather(-1, chosen)[:, 0], p.gather(-1, chosen)[:, 0]
            old = mine.detach() + torch.tensor(r.logp)
            rho = (mine.detach() - old).exp()
            losses.append(-rho * (theirs - mine.detach()).clamp(-10, 10) * mine)
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("reverse", {"distill": {"divergence": "reverse_kl", "support": "full"}}),
        ("forward", {"distill": {"divergence": "forward_kl", "support": "full"}}),
        ("entropy", {"entropy": {}}),
        ("token", {"distill": {"support": {"token": "k1"}}}),
        ("token", {"distill": {"support": {"token": "k2"}}}),
        ("token", {"distill": {"support": {"token": "k3"}}}),
        ("token", {"reference_kl": {"estimator": "k3"}}),
    ],
)
def test_gradient_is_that_of_the_models_own_logits(
    kind: str, entry: dict[str, Any], student: LoadedModel, teacher: LoadedModel
):
    """Token terms on stale samples carry sg(pi/pi_old); everything else is the divergence written out."""
    responses = made_responses()
    scored = score(student, responses, [entry], teacher=teacher, reference=teacher, stale=True)
    want = plain_gradient(student, lambda: exact_loss(kind, student, teacher, responses))
    assert_near(gradient(student, scored, budget=50), want)


def test_a_sequences_ratio_counts_its_masked_tokens_too(student: LoadedModel):
    """GSPO's ratio is that of the whole response, also where a token mask keeps only some of its tokens."""
    responses = made_responses()
    entry = {"policy_gradient": {"ratio": "sequence", "clip": {"kind": "none"}, "mask": {"top_entropy": 0.3}}}
    scored = score(student, responses, [entry], stale=True)
    (active,) = scored.active
    assert active.advantage_B is not None
    advantages = active.advantage_B.tolist()

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for row, response in enumerate(responses):
            logp = plain_logp(student, response.prompt_ids, response.token_ids)
            mine = logp.gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]
            old = mine.detach() + torch.tensor(response.logp)
            start, end = scored.rollouts.span(row)
            total = total - (mine - old).mean().exp() * advantages[row] * active.keep_N[start:end].sum()
        return total / active.keep_N.sum()

    assert_near(gradient(student, scored, budget=50), plain_gradient(student, loss))


def test_sampling_temperature_divides_every_distribution(student: LoadedModel, teacher: LoadedModel):
    responses = made_responses()
    scored = score(student, responses, [{"distill": {"support": {"token": "k2"}}}], teacher=teacher, temperature=0.7)

    def loss() -> torch.Tensor:
        losses = []
        for r in responses:
            chosen = torch.tensor(r.token_ids)[:, None]
            q, p = (plain_logp(m, r.prompt_ids, r.token_ids, 0.7).gather(-1, chosen)[:, 0] for m in (student, teacher))
            losses.append(-(p.detach() - q.detach()).clamp(-10, 10) * q)
        return torch.cat(losses).mean()

    want = plain_gradient(student, loss)
    assert_near(gradient(student, scored), want)


def terms_of(name: str) -> list[Term[Any]]:
    """The terms of a method; a scalar that waits for its measurement is given a value."""
    entries = json.loads(json.dumps(all_methods()[name].recipe["objective"]), object_hook=measured)
    return [TERM_KINDS.get(k)(TERM_KINDS.get(k).Config.model_validate(v)) for e in entries for k, v in e.items()]


def measured(spec: dict[str, Any]) -> Any:
    return 0.4 if "calibrated" in spec else spec


def asking_a_teacher() -> list[str]:
    """Methods in which a term asks for scores; terms on hidden states and on chunks have tests of their own."""
    found = {n: [t for t in terms_of(n) if not t.needs.vocabulary] for n in all_methods()}
    return [n for n, terms in found.items() if any(t.needs.teacher or t.needs.reference for t in terms)]


def method_scored(name: str, student: LoadedModel, teacher: LoadedModel, privileged: int = 0) -> Any:
    """The method's terms on responses of every writer that they read, right and wrong ones in each group."""
    terms = [t for t in terms_of(name) if not t.needs.features]
    origins = sorted({origin for t in terms for origin in t.config.on})
    responses = []
    for place, origin in enumerate(origins):
        for r in made_responses(seed=place, origin=origin):
            # Groups hold responses of several writers, as those of a pair do.
            r.privileged_ids = [*r.prompt_ids, privileged + 3]
            responses.append(r)
    entries = [{t.name: t.config.model_dump(mode="json")} for t in terms]
    return score(student, responses, entries, teacher=teacher, reference=toy(5), stale=name == "gspo", step=50)


def test_methods_that_ask_a_teacher_are_found():
    assert len(asking_a_teacher()) > 50
    assert {"opd", "gkd", "kdrl", "kdrl-annealed", "trrd", "srpo", "opd-then-rl", "hdpo"} <= set(asking_a_teacher())


@pytest.mark.parametrize("name", asking_a_teacher())
def test_another_teacher_is_another_gradient(name: str, student: LoadedModel, teacher: LoadedModel):
    """Where the teacher is the student itself, the other teacher is another privileged prompt."""
    one = gradient(student, method_scored(name, student, teacher))
    again = gradient(student, method_scored(name, student, teacher))
    other = gradient(student, method_scored(name, student, toy(3), privileged=1))
    assert bool(one.isfinite().all())
    assert torch.equal(one, again)
    if any(t.needs.teacher for t in terms_of(name)):
        # A weight of 2e-3 beside a policy gradient is small, yet far above rounding.
        assert (one - other).norm() > 1e-5 * one.norm() > 0


@pytest.mark.parametrize("name", [n for n in TERMS if "distill" in TERMS[n]])
def test_a_teacher_equal_to_the_student_teaches_nothing(name: str, student: LoadedModel, teacher: LoadedModel):
    twin, responses = copied(student), made_responses()
    with_other = gradient(student, score(student, responses, [TERMS[name]], teacher=teacher))
    with_itself = gradient(student, score(student, responses, [TERMS[name]], teacher=twin))
    assert with_itself.norm() < 1e-6 * with_other.norm()
    rollouts = Rollouts.of(responses)
    logq_N, _ = Updater(student, 60).score_policy(rollouts, 1.0)
    evidence = LocalTeacher(twin, 300).score(rollouts, rollouts.trained_N, "token", 1.0)
    assert (evidence.logp_N - logq_N).abs().max() < 1e-5


def test_untrained_tokens_get_no_gradient_and_are_context_all_the_same(student: LoadedModel):
    """A gold text whose first half is context: the loss is that of the second half given the first."""
    response = made_responses(origin="gold")[2]
    half = len(response.token_ids) // 2
    response.trained = [i >= half for i in range(len(response.token_ids))]
    scored = score(student, [response], [{"cross_entropy": {}}])

    def loss() -> torch.Tensor:
        logp = plain_logp(student, response.prompt_ids, response.token_ids)
        return -logp.gather(-1, torch.tensor(response.token_ids)[:, None])[half:, 0].mean()

    assert_near(gradient(student, scored), plain_gradient(student, loss))


def test_a_mask_that_keeps_nothing_gives_no_gradient_and_no_number_that_is_none(student: LoadedModel, teacher):
    responses = made_responses()
    for r in responses:
        r.correct = True
    entries = with_settings(TERMS["full-reverse"], mask="wrong_response", reduce="sequence_mean")
    assert gradient(student, score(student, responses, entries, teacher=teacher)).norm() == 0


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("entries", [[TERMS["pg-token"], TERMS["k2"]], [TERMS["full-jsd"]], [TERMS["topk"]]])
def test_no_tensor_holds_every_token_times_the_vocabulary(
    entries: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """Contract 3 over one whole update: old log-probs, teacher, loss and gradient, vocabulary 60 times the width."""

    characters = CHARACTERS + "".join(chr(0x4E00 + i) for i in range(1000))
    config = ModelConfig(model=NewModel(**MODEL), tokenizer=NewTokenizer(characters=characters))
    models = [load_model(config, "cpu", trainable=seed == 1, seed=seed) for seed in (1, 2)]
    responses = made_responses()
    # 16 tokens a chunk: what 16 MiB are for a vocabulary of 250,000.
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", models[0].vocab_size)
    with Largest() as largest:
        scored = score(models[0], responses, entries, teacher=models[1], stale=True)
        found = gradient(models[0], scored)
    assert found.norm() > 0
    trained = sum(len(r.token_ids) for r in responses)
    padded = len(responses) * max(len(r.prompt_ids) + len(r.token_ids) for r in responses)
    assert largest.elements < trained * models[0].vocab_size / 4
    assert largest.elements < padded * models[0].vocab_size / 10


def test_topk_and_full_terms_share_one_pass_and_stay_themselves(student: LoadedModel, teacher: LoadedModel):
    """Two distill terms at once are the sum of each alone: none reads the other's comparison."""
    entries = [
        {"distill": {"divergence": "forward_kl", "support": "full", "mask": "wrong_response"}},
        {"distill": {"divergence": "reverse_kl", "support": {"topk": 3}, "weight": 0.5}},
    ]
    responses = made_responses()
    together = gradient(student, score(student, responses, entries, teacher=teacher))
    alone = [gradient(student, score(student, responses, [e], teacher=teacher)) for e in entries]
    assert_near(together, alone[0] + alone[1])
    assert isinstance(score(student, responses, entries, teacher=teacher).active[0].term, Distill)


def test_an_update_is_skipped_when_the_norm_is_not_finite(student: LoadedModel):
    updater = Updater(student, 64)
    optimizer = torch.optim.AdamW(updater.parameters, lr=1.0)
    before = [p.detach().clone() for p in updater.parameters]
    updater.parameters[0].grad = torch.full_like(updater.parameters[0], torch.nan)
    norm, applied = updater.step(optimizer, None)
    assert not applied
    assert norm != norm
    assert all(torch.equal(a, b) for a, b in zip(before, updater.parameters, strict=True))
    assert updater.parameters[0].grad is None


@pytest.mark.parametrize("name", [name for name in TERMS if name.startswith("pg")])
def test_groups_of_equal_rewards_are_not_run_and_change_nothing(
    name: str, student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    responses = made_responses()
    flat = responses[0].group
    for r in responses:
        r.reward = 1.0 if r.group == flat else r.reward
    scored = score(student, responses, [TERMS[name]], teacher=teacher, stale=True)
    rollouts = scored.rollouts
    rewards = {r.group: {other.reward for other in responses if other.group == r.group} for r in responses}
    idle = {g for g, seen in rewards.items() if len(seen) == 1}
    wanted_N = scored.active[0].wanted_N(rollouts.row_N, rollouts.rows)
    assert flat in idle
    assert set(rollouts.group_B[rollouts.row_N[wanted_N]].tolist()) == rewards.keys() - idle
    short = gradient(student, scored)
    monkeypatch.setattr(type(scored.active[0].term), "idle_at_zero", False)
    assert scored.active[0].wanted_N(rollouts.row_N, rollouts.rows).sum() > wanted_N.sum()
    assert_near(short, gradient(student, scored))
    assert short.norm() > 1e-6


def test_a_step_of_equal_rewards_alone_still_has_a_gradient_of_zero(student: LoadedModel):
    responses = made_responses()
    for r in responses:
        r.reward = 1.0
    scored = score(student, responses, [TERMS["pg-token"]])
    updater = Updater(student, 4096)
    updater.clear()
    updater.accumulate(scored, range(len(responses)))
    # The optimizer's moments go on moving the weights, as they would for any gradient of zero.
    assert all(p.grad is not None and not p.grad.any() for p in updater.parameters)
    updater.clear()
