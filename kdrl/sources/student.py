"""The student writes: on-policy responses, alone or with privileged context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from kdrl.batch import Response
from kdrl.engines.base import Engine, Sample
from kdrl.models import LoadedModel, encode_prompt
from kdrl.sources.base import Judge, Request, Source
from kdrl.tasks import Problem
from kdrl.tasks.base import Prompt, rewritten


def decoded(student: LoadedModel, token_ids: Sequence[int]) -> str:
    """The text of a response."""
    return str(student.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def reader(student: LoadedModel) -> Callable[[Sequence[int]], str]:
    """`decoded`, each response once."""
    read = cache(lambda token_ids: decoded(student, token_ids))
    return lambda token_ids: read(tuple(token_ids))


class StudentSource(Source):
    """`samples` responses a problem from the present policy, all prompts of the step at once.

    With a `judge` a response is verified while others are still being written.
    """

    def __init__(
        self, engine: Engine, student: LoadedModel, samples: int, judge: Judge | None = None, **sampling: Any
    ) -> None:
        self.engine, self.student, self.samples, self.sampling = engine, student, samples, sampling
        self.judge = judge or Judge(None, 0)

    def write(self, request: Request) -> list[Response]:
        """Responses group by group, with the log-probs they were sampled at."""
        prompts = [encode_prompt(self.student, problem.prompt) for problem in request.problems]
        return [
            Response(
                request.problems[i],
                request.groups[i],
                prompts[i],
                sample.token_ids,
                "student",
                sample.ended,
                text,
                logp=sample.logp,
            )
            for i, sample, text in self.sample(request, prompts)
        ]

    def sample(self, request: Request, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sample, str]]:
        """Number of the problem, sample and text of each response to the prompts of a request."""
        read = reader(self.student)
        done = self.judge.listener(request.problems, read)
        written = self.engine.generate(prompts, samples=self.samples, seed=request.seed, done=done, **self.sampling)
        request.out.generated += sum(map(len, written))
        return ((i, sample, read(sample.token_ids)) for i, samples in enumerate(written) for sample in samples)


def privileged_prompt(problem: Problem, template: str) -> Prompt:
    """The problem's prompt rewritten by `template`; in a chat it replaces the last message."""

    shown = {"answer": problem.answer, "solution": problem.solution or problem.answer}
    return rewritten(problem.prompt, lambda text: template.format(prompt=text, **shown))


class PrivilegedSource(Source):
    """The student reading the answer or solution, to be filtered to right responses (HDPO, 2603.23871).

    Its responses are trained on under the ordinary prompt; the privileged prompt is kept for the self-teacher.
    """

    def __init__(self, inner: StudentSource, template: str) -> None:
        self.inner, self.template = inner, template

    def write(self, request: Request) -> list[Response]:
        """Responses to the privileged prompts; `prompt_ids` are the ordinary ones."""
        student = self.inner.student
        prompts = [encode_prompt(student, privileged_prompt(problem, self.template)) for problem in request.problems]
        return [
            Response(
                request.problems[i],
                request.groups[i],
                encode_prompt(student, request.problems[i].prompt),
                sample.token_ids,
                "privileged",
                sample.ended,
                text,
                privileged_ids=prompts[i],
            )
            for i, sample, text in self.inner.sample(request, prompts)
        ]
