"""The student writes: on-policy responses, alone or with privileged context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl.batch import Response
from kdrl.engines.base import Engine
from kdrl.models import LoadedModel, encode_prompt
from kdrl.tasks import Problem


class StudentSource:
    """`samples` responses a problem from the present policy, all prompts of the step at once."""

    def __init__(self, engine: Engine, student: LoadedModel, samples: int, **sampling: Any) -> None:
        self.engine, self.student, self.samples, self.sampling = engine, student, samples, sampling

    def write(self, problems: Sequence[Problem], first_group: int, seed: int) -> list[Response]:
        """Responses group by group, with the log-probs they were sampled at."""
        prompts = [encode_prompt(self.student, problem.prompt) for problem in problems]
        written = self.engine.generate(prompts, samples=self.samples, seed=seed, **self.sampling)
        return [
            Response(
                problem,
                first_group + i,
                prompt,
                sample.token_ids,
                "student",
                sample.ended,
                str(self.student.tokenizer.decode(sample.token_ids, skip_special_tokens=True)),
                logp=sample.logp,
            )
            for i, (problem, prompt, samples) in enumerate(zip(problems, prompts, written, strict=True))
            for sample in samples
        ]


def privileged_prompt(problem: Problem, template: str) -> Any:
    """The problem's prompt rewritten by `template`; in a chat it replaces the last message."""

    def fill(plain: Any) -> str:
        return template.format(prompt=plain, answer=problem.answer, solution=problem.solution or problem.answer)

    if isinstance(problem.prompt, str):
        return fill(problem.prompt)
    *before, last = problem.prompt
    return [*before, {**last, "content": fill(last["content"])}]


class PrivilegedSource:
    """The student reading the answer or solution, to be filtered to right responses (HDPO, 2603.23871).

    Its responses are trained on under the ordinary prompt; the privileged prompt is kept for the self-teacher.
    """

    def __init__(self, inner: StudentSource, template: str) -> None:
        self.inner, self.template = inner, template

    def write(self, problems: Sequence[Problem], first_group: int, seed: int) -> list[Response]:
        """Responses to the privileged prompts; `prompt_ids` are the ordinary ones."""
        student = self.inner.student
        prompts = [encode_prompt(student, privileged_prompt(problem, self.template)) for problem in problems]
        written = self.inner.engine.generate(prompts, samples=self.inner.samples, seed=seed, **self.inner.sampling)
        return [
            Response(
                problem,
                first_group + i,
                encode_prompt(student, problem.prompt),
                sample.token_ids,
                "privileged",
                sample.ended,
                str(student.tokenizer.decode(sample.token_ids, skip_special_tokens=True)),
                privileged_ids=prompt,
            )
            for i, (problem, prompt, samples) in enumerate(zip(problems, prompts, written, strict=True))
            for sample in samples
        ]
