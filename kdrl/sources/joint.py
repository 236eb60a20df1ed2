"""Student and teacher write together: in turns (SKD), or from the mixture of their distributions (MiniLLM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from kdrl.batch import Origin, Response
from kdrl.engines.joint import JointEngine, JointSample, Rule, mixed, speculative
from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.schedules import Schedule
from kdrl.sources.base import Judge, Request, Source
from kdrl.sources.student import reader

Weigh = Callable[[JointSample], list[float] | None]


class _JointSource(Source):
    """`samples` responses a problem by a rule of both models; they hold no `logp`, for the policy did not sample."""

    origin: Origin

    def __init__(
        self, engine: JointEngine, student: LoadedModel, samples: int, judge: Judge | None = None, **sampling: Any
    ) -> None:
        self.engine, self.student, self.samples, self.sampling = engine, student, samples, sampling
        self.judge = judge or Judge(None, 0)

    def _write(
        self, request: Request, rule: Rule, weigh: Weigh = lambda sample: None
    ) -> tuple[list[Response], list[JointSample]]:
        prompts = [encode_prompt(self.student, problem.prompt) for problem in request.problems]
        read = reader(self.student)
        done = self.judge.listener(request.problems, read)
        written = self.engine.generate(
            prompts, rule, samples=self.samples, seed=request.seed, done=done, **self.sampling
        )
        request.out.generated += sum(map(len, written))
        responses = [
            Response(
                problem,
                group,
                prompt,
                sample.token_ids,
                self.origin,
                sample.ended,
                read(sample.token_ids),
                importance=weigh(sample),
            )
            for problem, group, prompt, samples in zip(request.problems, request.groups, prompts, written, strict=True)
            for sample in samples
        ]
        return responses, [sample for samples in written for sample in samples]


class SpeculativeSource(_JointSource):
    """The student's text with a teacher sample for every proposal outside the teacher's top `k` (SKD, 2410.11325).

    The teacher samples from its whole distribution, which may again give a token outside its top k.
    """

    origin: Origin = "speculative"

    def __init__(self, engine: JointEngine, student: LoadedModel, samples: int, k: int, **sampling: Any) -> None:
        super().__init__(engine, student, samples, **sampling)
        self.rule = speculative(k)

    def write(self, request: Request) -> list[Response]:
        """Responses group by group; tells the share of replaced tokens."""
        responses, samples = self._write(request, self.rule)
        request.out.tell("replaced", sum(sum(s.told) for s in samples), sum(len(s.told) for s in samples))
        return responses


class MixedSource(_JointSource):
    """Every token from a p_teacher + (1 - a) q_student (MiniLLM, 2306.08543), with importance weights q/mixture.

    See `importance_weights` for what each kind of weight makes unbiased.
    """

    origin: Origin = "mixed"

    def __init__(
        self, engine: JointEngine, student: LoadedModel, samples: int, share: Schedule, weights: str, **sampling: Any
    ) -> None:
        super().__init__(engine, student, samples, **sampling)
        self.share, self.weights = share, weights

    def write(self, request: Request) -> list[Response]:
        """Responses group by group; tells their mean weight, which is 1 in expectation for `token` and `prefix`."""
        # A share that follows a metric may leave the unit interval, and probabilities must not.
        rule = mixed(min(1.0, max(0.0, self.share.at(request.moment))))
        responses, _ = self._write(request, rule, lambda s: importance_weights(self.weights, s.logp, s.told))
        weights = [w for r in responses for w in r.importance or ()]
        request.out.tell("importance", sum(weights), len(weights))
        return responses


def importance_weights(kind: str, logq: Sequence[float], logm: Sequence[float]) -> list[float] | None:
    """Weights of a response's tokens from their log-probs under student q and sampling mixture m.

    `token`: q/m of the token. Given its prefix the token is then reweighted exactly, at most by 1/(1-a); the bias that
    remains is that prefixes (and whatever follows the token) keep the mixture's distribution (MiniLLM, 2306.08543).
    `prefix`: the product up to and with the token; unbiased for losses that depend on prefix and token.
    `sequence`: the product over the whole response on each token; unbiased for any loss, outcome rewards included.
    `none`: None.
    """
    if kind == "none":
        return None
    ratios = [q - m for q, m in zip(logq, logm, strict=True)]
    if kind == "token":
        return [math.exp(x) for x in ratios]
    products = [math.exp(min(x, 700.0)) for x in accumulate(ratios)]
    return products if kind == "prefix" else [products[-1]] * len(products)
