"""The student writes: on-policy responses, alone or with privileged context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl.batch import Response
from kdrl.engines.base import Engine
from kdrl.models import LoadedModel, encode_prompt
from kdrl.sources.base import Request, Source
from kdrl.tasks import Problem
from kdrl.tasks.base import Prompt, rewritten


def decoded(student: LoadedModel, token_ids: Sequence[int]) -> str:
    """The text of a response."""
    return str(student.tokenizer.decode(list(token_ids), skip_special_tokens=True))


class StudentSource(Source):
    """`samples` responses a problem from the present policy, all prompts of the step at once."""

    def __init__(self, engine: Engine, student: LoadedModel, samples: int, **sampling: Any) -> None:
        self.engine, self.student, self.samples, self.sampling = engine, student, samples, sampling

    def write(self, request: Request) -> list[Response]:
        """Responses group by group, with the log-probs they were sampled at."""
        prompts = [encode_prompt(self.student, problem.prompt) for problem in request.problems]
        written = self.engine.generate(prompts, samples=self.samples, seed=request.seed, **self.sampling)
        request.out.generated += sum(map(len, written))
        return [
            Response(
                problem,
                group,
                prompt,
                sample.token_ids,
                "student",
                sample.ended,
                decoded(self.student, sample.token_ids),
                logp=sample.logp,
            )
            for problem, group, prompt, samples in zip(request.problems, request.groups, prompts, written, strict=True)
            for sample in samples
        ]


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
        written = self.inner.engine.generate(
            prompts, samples=self.inner.samples, seed=request.seed, **self.inner.sampling
        )
        request.out.generated += sum(map(len, written))
        return [
            Response(
                problem,
                group,
                encode_prompt(student, problem.prompt),
                sample.token_ids,
                "privileged",
                sample.ended,
                decoded(student, sample.token_ids),
                privileged_ids=prompt,
            )
            for problem, group, prompt, samples in zip(request.problems, request.groups, prompts, written, strict=True)
            for sample in samples
        ]
