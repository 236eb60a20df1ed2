"""Two models write one response: in lockstep, each with a key-value cache of its own, one token a step for both.

What the student proposes and the teacher replaces (SKD), and sampling from a mixture of both (MiniLLM). Left out:
proposals of several tokens at once, and models with different tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.engines.decoding import Plan, Rows
from kdrl.engines.sampling import Sampler, SamplingOptions, StopStrings, draw_uniforms, inverse_cdf
from kdrl.engines.torch_engine import TorchEngine, falling, writable
from kdrl.engines.writing import Writer
from kdrl.models.heads import head_of
from kdrl.models.loading import LoadedModel
from kdrl.seeds import derive


@dataclass(frozen=True)
class JointSample:
    """One response: tokens, the student's log-prob of each in nats, and a number a token that the rule gives."""

    token_ids: list[int]
    logp: list[float]
    told: list[float]
    ended: bool

    @classmethod
    def of(cls, token_ids: list[int], pairs: list[Any], ended: bool) -> JointSample:
        """From tokens and what was chosen with each: log-prob and number."""
        return cls(token_ids, [p[0] for p in pairs], [p[1] for p in pairs], ended)


# fn(student [R, V], teacher [R, V], uniforms [R, 2]) -> tokens [R] and what to tell of each [R].
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def speculative(k: int) -> Rule:
    """The student proposes; a proposal less likely than the teacher's k-th token becomes a sample of the teacher.

    That sample is from the teacher's whole distribution, not from its top k (SKD, 2410.11325, says no more than `a
    teacher sample`). Tells 1 for a replaced token. Tokens as likely as the k-th count as in.
    """

    def rule(student_RV: Tensor, teacher_RV: Tensor, uniform_R2: Tensor) -> tuple[Tensor, Tensor]:
        token_R1 = inverse_cdf(student_RV, uniform_R2[:, :1])
        least_R1 = teacher_RV.topk(min(k, teacher_RV.shape[-1])).values[:, -1:]
        outside_R1 = teacher_RV.gather(-1, token_R1) < least_R1
        token_R1 = torch.where(outside_R1, inverse_cdf(teacher_RV, uniform_R2[:, 1:]), token_R1)
        return token_R1[:, 0], outside_R1[:, 0].to(student_RV.dtype)

    return rule


def mixed(share: float) -> Rule:
    """Tokens from share p_teacher + (1 - share) q_student; tells the log-prob of each under that mixture."""

    def rule(student_RV: Tensor, teacher_RV: Tensor, uniform_R2: Tensor) -> tuple[Tensor, Tensor]:
        mixture_RV = share * teacher_RV + (1.0 - share) * student_RV
        token_R1 = inverse_cdf(mixture_RV, uniform_R2[:, :1])
        return token_R1[:, 0], mixture_RV.gather(-1, token_R1)[:, 0].log()

    return rule


class _JointRows:
    """The same rows in both models; what the next token is chosen from is a pair of hidden states."""

    def __init__(self, engines: Sequence[TorchEngine], prompts: Sequence[Sequence[int]], steps: int) -> None:
        self.device = engines[0].loaded.device
        self._models = [engine.loaded for engine in engines]
        plans = [engine.plan for engine in engines]
        self.plan = Plan(compact=all(p.compact for p in plans), refill=all(p.refill for p in plans))
        self._rows: list[Rows] = []
        for engine in engines:
            with engine.loaded.autocast():
                self._rows.append(Rows(engine.loaded, prompts, steps, engine.plan))

    @property
    def hidden_BD(self) -> list[Tensor]:
        return [rows.hidden_BD for rows in self._rows]

    def step(self, token_B: Tensor) -> None:
        for loaded, rows in zip(self._models, self._rows, strict=True):
            with loaded.autocast():
                rows.step(token_B)

    def keep(self, keep_B: Tensor) -> None:
        for rows in self._rows:
            rows.keep(keep_B)

    def refill(self, rows: Tensor, prompts: Sequence[Sequence[int]]) -> None:
        for loaded, each in zip(self._models, self._rows, strict=True):
            with loaded.autocast():
                each.refill(rows, prompts)


class JointEngine:
    """Writes with student and teacher together, at most as many rows at a time as the student's engine."""

    def __init__(self, student: TorchEngine, teacher: TorchEngine) -> None:
        self._engines = (student, teacher)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rule: Rule,
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        seed: int,
        done: Callable[[int, int, JointSample], None] | None = None,
    ) -> list[list[JointSample]]:
        """Samples [prompt][sample], both models at one temperature; a response ends at an end token of either.

        The student's draws are those it would have alone, so a rule that never asks the teacher gives its samples;
        `done` is called as by every engine.
        Raises UserError as `TorchEngine.generate`, for either model.
        """
        options = SamplingOptions(temperature)
        models: list[LoadedModel] = [engine.loaded for engine in self._engines]
        for engine in self._engines:
            engine.check(prompts, samples, max_new_tokens, options)
        shape = (prompts, samples, max_new_tokens)
        uniform = torch.stack([draw_uniforms(*shape, seed), draw_uniforms(*shape, derive(seed, "teacher"))], -1)
        eos_ids = sorted({eos for loaded in models for eos in loaded.eos_ids})
        order = falling(prompts)
        with writable(*models):
            student = models[0]
            stops = StopStrings(student.tokenizer, stop, student.vocab_size) if stop else None
            choose = _chooser(rule, [Sampler(head_of(loaded), options) for loaded in models])

            def start(texts: Sequence[Sequence[int]]) -> _JointRows:
                return _JointRows(self._engines, texts, max_new_tokens)

            def tell(row: int, *written: Any) -> None:
                assert done is not None
                done(order[row // samples], row % samples, JointSample.of(*written))

            told = None if done is None else tell
            writer = Writer(start, uniform[order].flatten(0, 1), eos_ids, choose, stops, told)
            texts = [prompts[i] for i in order for _ in range(samples)]
            refill = all(engine.plan.refill for engine in self._engines)
            written = writer.write(texts, self._engines[0].max_rows, refill).rows() if texts else iter(())
            found = [JointSample.of(*row) for row in written]
        place = {i: n * samples for n, i in enumerate(order)}
        return [[found[place[i] + j] for j in range(samples)] for i in range(len(prompts))]


def _chooser(rule: Rule, samplers: Sequence[Sampler]) -> Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]:
    def choose(hidden: list[Tensor], uniform_R2: Tensor) -> tuple[Tensor, Tensor]:
        student_RV, teacher_RV = (sampler.probabilities(h) for sampler, h in zip(samplers, hidden, strict=True))
        token_R, told_R = rule(student_RV, teacher_RV, uniform_R2)
        logp_R = student_RV.gather(-1, token_R[:, None])[:, 0].log()
        return token_R, torch.stack([logp_R, told_R], -1)

    return choose
