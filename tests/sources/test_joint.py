"""Two models at one response: what is replaced, what is drawn, and which weights make it the student's again."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from engines.toys import toy
from tiny import problem

from kdrl.engines import TorchEngine, writing
from kdrl.engines.joint import JointEngine, JointSample, mixed, speculative
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.schedules import Schedule
from kdrl.sources.base import Request
from kdrl.sources.joint import MixedSource, SpeculativeSource, importance_weights

PROMPTS = ["1+2=", "34-5+6=", "7="]


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return toy("qwen3", seed=1, sharp=6.0)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return toy("llama", seed=2, sharp=6.0)


@pytest.fixture(scope="module")
def engine(student: LoadedModel, teacher: LoadedModel) -> JointEngine:
    return JointEngine(TorchEngine(student, 64), TorchEngine(teacher, 64))


def logp(loaded: LoadedModel, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs `[T, V]` from the model's own logits, one row, no cache."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits[:, : loaded.vocab_size].double() / temperature, -1)


def rows(student: LoadedModel, out: list[list[JointSample]]) -> list[tuple[list[int], JointSample]]:
    return [(encode_prompt(student, text), s) for text, samples in zip(PROMPTS, out, strict=True) for s in samples]


def written(engine: JointEngine, student: LoadedModel, rule: Any, **more: Any) -> list[list[JointSample]]:
    ask: dict[str, Any] = {"samples": 12, "max_new_tokens": 20, "seed": 5} | more
    return engine.generate([encode_prompt(student, text) for text in PROMPTS], rule, **ask)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 3])
def test_exactly_the_proposals_outside_the_teachers_top_k_are_replaced(
    engine: JointEngine, student: LoadedModel, teacher: LoadedModel, k: int, temperature: float
):
    """A kept token is the student's own draw and in the top k; a replaced one had a draw outside of it."""
    out = written(engine, student, speculative(k), temperature=temperature)
    alone = TorchEngine(student, 64)
    kept = replaced = 0
    for prompt, sample in rows(student, out):
        p_TV = logp(teacher, prompt, sample.token_ids, temperature)
        q_TV = logp(student, prompt, sample.token_ids, temperature)
        top_TK = p_TV.topk(k).indices.tolist()
        for t, (token, told) in enumerate(zip(sample.token_ids, sample.told, strict=True)):
            if told:
                replaced += 1
            else:
                kept += 1
                assert token in top_TK[t]
            assert sample.logp[t] == pytest.approx(float(q_TV[t, token]), abs=1e-4)
    assert kept > 50
    assert replaced > 50
    # Up to the first replacement a response is what the student writes alone, and there its own draw was outside.
    ask = {"samples": 12, "max_new_tokens": 20, "seed": 5, "temperature": temperature}
    own = alone.generate([encode_prompt(student, text) for text in PROMPTS], **ask)
    flat = [sample for samples in own for sample in samples]
    for (prompt, sample), free in zip(rows(student, out), flat, strict=True):
        first = next((t for t, told in enumerate(sample.told) if told), len(sample.told))
        assert sample.token_ids[:first] == free.token_ids[:first]
        if first < len(sample.told):
            top = logp(teacher, prompt, [*sample.token_ids[:first], 0], temperature)[-1].topk(k).indices.tolist()
            assert free.token_ids[first] not in top


def test_with_the_whole_vocabulary_it_is_the_students_own_sampling(engine: JointEngine, student: LoadedModel):
    out = written(engine, student, speculative(student.vocab_size))
    prompts = [encode_prompt(student, text) for text in PROMPTS]
    own = TorchEngine(student, 64).generate(prompts, samples=12, max_new_tokens=20, seed=5)
    for a, b in zip(itertools.chain(*out), itertools.chain(*own), strict=True):
        assert (a.token_ids, a.ended, sum(a.told)) == (b.token_ids, b.ended, 0.0)
        assert a.logp == pytest.approx(b.logp, abs=1e-5)


@pytest.mark.parametrize(("pays", "look"), [(0.0, 1), (1e9, 1), (0.5, 8)])
def test_compaction_and_waves_change_no_sample(
    engine: JointEngine,
    student: LoadedModel,
    teacher: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    pays: float,
    look: int,
):
    want = written(engine, student, speculative(3), max_new_tokens=40)
    monkeypatch.setattr(writing, "_COMPACTION_STEPS", pays)
    monkeypatch.setattr(writing, "_LOOK_EVERY", {"cpu": look})
    small = JointEngine(TorchEngine(student, 5), TorchEngine(teacher, 5))
    found = written(small, student, speculative(3), max_new_tokens=40)
    for a, b in zip(itertools.chain(*found), itertools.chain(*want), strict=True):
        assert (a.token_ids, a.told, a.ended) == (b.token_ids, b.told, b.ended)
    assert any(s.ended and len(s.token_ids) < 20 for s in itertools.chain(*want))


def texts_of(loaded: LoadedModel, length: int) -> list[tuple[int, ...]]:
    """Every whole response of at most `length` tokens."""
    eos, vocabulary = loaded.eos_ids[0], range(loaded.vocab_size)
    texts = [t for n in range(1, length + 1) for t in itertools.product(vocabulary, repeat=n)]
    return [t for t in texts if eos not in t[:-1] and (len(t) == length or t[-1] == eos)]


def chi_square(seen: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float]) -> None:
    """Counts against a law, at 99.99 %."""
    count, statistic, cells = sum(seen.values()), 0.0, 0
    for text, probability in law.items():
        if count * probability >= 5:
            statistic += (seen.get(text, 0) - count * probability) ** 2 / (count * probability)
            cells += 1
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-4)
    assert cells > 10
    assert statistic < cells + 3.72 * (2 * cells) ** 0.5


def law_of(
    student: LoadedModel, teacher: LoadedModel, prompt: list[int], length: int, step: Any
) -> dict[tuple[int, ...], float]:
    """Probability of every response when each token follows `step(q_V, p_V)`."""
    law = {}
    for text in texts_of(student, length):
        q_TV, p_TV = (logp(m, prompt, list(text)).exp() for m in (student, teacher))
        each = [float(step(q, p)[token]) for q, p, token in zip(q_TV, p_TV, text, strict=True)]
        law[text] = math.prod(each)
    return law


def count(samples: list[JointSample]) -> dict[tuple[int, ...], int]:
    seen: dict[tuple[int, ...], int] = {}
    for sample in samples:
        seen[tuple(sample.token_ids)] = seen.get(tuple(sample.token_ids), 0) + 1
    return seen


@pytest.fixture(scope="module")
def small() -> tuple[LoadedModel, LoadedModel, JointEngine]:
    pair = (toy("qwen3", sharp=5.0, characters="01="), toy("qwen3", sharp=5.0, seed=9, characters="01="))
    return (*pair, JointEngine(TorchEngine(pair[0], 4000), TorchEngine(pair[1], 4000)))


def test_mixed_samples_follow_the_mixture(small: tuple[LoadedModel, LoadedModel, JointEngine]):
    student, teacher, engine = small
    prompt = encode_prompt(student, "0=")
    drawn = engine.generate([prompt], mixed(0.3), samples=6000, max_new_tokens=2, seed=1)[0]
    law = law_of(student, teacher, prompt, 2, lambda q, p: 0.3 * p + 0.7 * q)
    chi_square(count(drawn), law)
    for sample in drawn[:20]:
        assert math.exp(sum(sample.told)) == pytest.approx(law[tuple(sample.token_ids)], rel=1e-3)


def test_speculative_samples_follow_their_law(small: tuple[LoadedModel, LoadedModel, JointEngine]):
    """q inside the teacher's top k, plus the rejected mass spread as the plain teacher, not as its top k."""

    def step(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        inside = torch.zeros_like(q)
        inside[p.topk(2).indices] = 1.0
        return q * inside + (1.0 - (q * inside).sum()) * p

    student, teacher, engine = small
    prompt = encode_prompt(student, "0=")
    drawn = engine.generate([prompt], speculative(2), samples=6000, max_new_tokens=2, seed=1)[0]
    chi_square(count(drawn), law_of(student, teacher, prompt, 2, step))


def test_a_mixture_without_the_teacher_is_the_student(engine: JointEngine, student: LoadedModel):
    out = written(engine, student, mixed(0.0))
    prompts = [encode_prompt(student, text) for text in PROMPTS]
    own = TorchEngine(student, 64).generate(prompts, samples=12, max_new_tokens=20, seed=5)
    for a, b in zip(itertools.chain(*out), itertools.chain(*own), strict=True):
        assert a.token_ids == b.token_ids
        assert importance_weights("token", a.logp, a.told) == pytest.approx([1.0] * len(a.logp), abs=1e-5)


class Enumerated:
    """Random next-token laws of student q, teacher p over V tokens after every prefix, float64; token 0 ends."""

    def __init__(self, vocabulary: int = 3, length: int = 3, share: float = 0.4) -> None:
        draw = torch.Generator().manual_seed(0)
        self.length, self.share = length, share
        self.q: dict[tuple[int, ...], torch.Tensor] = {}
        self.p: dict[tuple[int, ...], torch.Tensor] = {}
        prefixes: list[tuple[int, ...]] = [()]
        self.whole: list[tuple[int, ...]] = []
        for _ in range(length):
            for prefix in prefixes:
                for law in (self.q, self.p):
                    law[prefix] = torch.randn(vocabulary, generator=draw).double().mul(1.5).softmax(-1)
            longer = [(*prefix, v) for prefix in prefixes for v in range(vocabulary)]
            self.whole += [t for t in longer if t[-1] == 0 or len(t) == length]
            prefixes = [t for t in longer if t[-1] != 0 and len(t) < length]

    def log_probs(self, text: tuple[int, ...]) -> tuple[list[float], list[float]]:
        """Of each token under the student and under the mixture."""
        a = self.share
        q = [float(self.q[text[:t]][v]) for t, v in enumerate(text)]
        m = [a * float(self.p[text[:t]][v]) + (1 - a) * float(self.q[text[:t]][v]) for t, v in enumerate(text)]
        return [math.log(x) for x in q], [math.log(x) for x in m]

    def expect(self, kind: str | None, loss: Any) -> float:
        """Expected sum over tokens of weight x loss: under the student (None), or weighted under the mixture."""
        total = 0.0
        for text in self.whole:
            logq, logm = self.log_probs(text)
            weights = [1.0] * len(text) if kind is None else importance_weights(kind, logq, logm) or [1.0] * len(text)
            law = math.exp(sum(logq if kind is None else logm))
            total += law * sum(w * loss(text, t) for t, w in enumerate(weights))
        return total


def of_the_token(text: tuple[int, ...], t: int) -> float:
    """Any function of prefix and token."""
    return math.sin(1.0 + sum((i + 1) * (v + 2) for i, v in enumerate(text[: t + 1])))


def of_the_outcome(text: tuple[int, ...], t: int) -> float:
    """A token's score times a reward of the whole response."""
    return of_the_token(text, t) * math.cos(sum((i + 2) * v for i, v in enumerate(text)))


def test_prefix_weights_are_unbiased_for_losses_of_prefix_and_token():
    world = Enumerated()
    assert world.expect("prefix", of_the_token) == pytest.approx(world.expect(None, of_the_token), abs=1e-12)


def test_sequence_weights_are_unbiased_for_losses_of_the_whole_response():
    world = Enumerated()
    for loss in (of_the_token, of_the_outcome):
        assert world.expect("sequence", loss) == pytest.approx(world.expect(None, loss), abs=1e-12)
    assert abs(world.expect("prefix", of_the_outcome) - world.expect(None, of_the_outcome)) > 1e-3, (
        "an outcome depends on what follows the token, which the prefix does not reweight"
    )


def test_token_weights_are_right_given_the_prefix_alone():
    world = Enumerated()
    a = world.share
    for prefix, q in world.q.items():
        m = a * world.p[prefix] + (1 - a) * q
        values = torch.tensor([of_the_token((*prefix, v), len(prefix)) for v in range(len(q))], dtype=torch.float64)
        assert float((m * (q / m) * values).sum()) == pytest.approx(float((q * values).sum()), abs=1e-12)
    first = world.expect("token", lambda text, t: of_the_token(text, t) if t == 0 else 0.0)
    assert first == pytest.approx(world.expect(None, lambda text, t: of_the_token(text, t) * (t == 0)), abs=1e-12)
    assert abs(world.expect("token", of_the_token) - world.expect(None, of_the_token)) > 1e-3, "the stated bias"


def test_no_weights_are_none_and_a_token_weight_is_bounded():
    logq, logm = Enumerated(share=0.2).log_probs((1, 2, 1))
    assert importance_weights("none", logq, logm) is None
    assert max(importance_weights("token", logq, logm) or []) <= 1 / 0.8 + 1e-12
    whole = importance_weights("sequence", logq, logm) or []
    assert whole == pytest.approx([math.exp(sum(logq) - sum(logm))] * 3)
    assert (importance_weights("prefix", logq, logm) or [])[-1] == pytest.approx(whole[0])
    assert importance_weights("token", [-math.inf, -1.0], [-2.0, -1.0]) == [0.0, 1.0]


def sources(engine: JointEngine, student: LoadedModel) -> list[Any]:
    sampling = {"max_new_tokens": 12, "temperature": 1.0, "stop": ()}
    return [
        SpeculativeSource(engine, student, 4, k=2, **sampling),
        MixedSource(engine, student, 4, share=Schedule(0.5), weights="token", **sampling),
    ]


def test_responses_say_who_wrote_them_and_what_was_replaced(engine: JointEngine, student: LoadedModel):
    problems = [problem(str(i), text) for i, text in enumerate(PROMPTS)]
    for source, origin in zip(sources(engine, student), ("speculative", "mixed"), strict=True):
        request = Request.of(problems, 7, 3)
        responses = source.write(request)
        assert [r.group for r in responses] == [7] * 4 + [8] * 4 + [9] * 4
        assert {r.origin for r in responses} == {origin}
        assert all(r.logp is None for r in responses)
        assert request.out.generated == 12
        numbers = request.out.numbers()
        if origin == "speculative":
            assert 0.0 < numbers["source/replaced"] < 1.0
            assert all(r.importance is None for r in responses)
        else:
            weights = [w for r in responses for w in r.importance or ()]
            assert [len(r.importance or ()) for r in responses] == [len(r.token_ids) for r in responses]
            assert numbers["source/importance"] == pytest.approx(sum(weights) / len(weights))
            assert max(weights) <= 2.0 + 1e-4


def test_the_share_may_move(engine: JointEngine, student: LoadedModel):
    sampling = {"max_new_tokens": 12, "temperature": 1.0, "stop": ()}
    share = Schedule({"switch": {"at": 0, "before": 0.5, "after": 0.0}})
    source = MixedSource(engine, student, 4, share=share, weights="token", **sampling)
    weights = [w for r in source.write(Request.of([problem()])) for w in r.importance or ()]
    assert weights == pytest.approx([1.0] * len(weights), abs=1e-5)


def test_requests_that_do_not_fit_either_model_are_refused(engine: JointEngine, student: LoadedModel):
    with pytest.raises(UserError, match="context of 128"):
        written(engine, student, speculative(2), max_new_tokens=200)


def test_autocast_of_one_model_leaves_the_other_in_float32():
    student, teacher = toy("qwen3", sharp=6.0), toy("qwen3", sharp=6.0, seed=4)
    teacher.config = teacher.config.model_copy(update={"autocast": "bfloat16"})
    engine = JointEngine(TorchEngine(student, 64), TorchEngine(teacher, 64))
    for prompt, sample in rows(student, written(engine, student, speculative(3))):
        want = logp(student, prompt, sample.token_ids)
        assert sample.logp == pytest.approx(
            want.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].tolist(), abs=2e-4
        )
    assert not any(p.requires_grad for p in teacher.model.parameters())
