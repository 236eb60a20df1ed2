"""What a self-teacher reads that the student does not: answer, solution, feedback, or a sibling that got it right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl.batch import Response
from kdrl.tasks.base import Problem, Prompt, rewritten
from kdrl.teachers.config import fields_of


def feedback_of(response: Response) -> str | None:
    """The verifier's own words about a response, else a sentence of verdict and right answer; None if not verified."""
    if not response.judged:
        return None
    if response.feedback is not None:
        return response.feedback
    if response.correct:
        return "This attempt is right."
    what = "is wrong" if response.ended else "was cut at the length limit"
    return _sentence(response.problem, what)


def _sentence(problem: Problem, what: str) -> str:
    return f"This attempt {what}. The right answer is {problem.answer}."


def assumed_context(template: str, problem: Problem) -> Prompt:
    """What a problem's context is before anything has been written: no sibling, and kdrl's own words as feedback."""
    shown = {"answer": problem.answer, "solution": problem.solution, "sibling": ""}
    shown["feedback"] = _sentence(problem, "was cut at the length limit")
    return rewritten(problem.prompt, lambda text: template.format(prompt=text, **shown))


def sibling_of(response: Response, responses: Sequence[Response]) -> str | None:
    """The text of the first other right response of the same group, None where there is none."""
    return next(
        (r.text for r in responses if r is not response and r.group == response.group and r.judged and r.correct), None
    )


def context_prompt(template: str, response: Response, responses: Sequence[Response]) -> Prompt | None:
    """The prompt that the self-teacher reads for a response of a step, None where a part of the template is missing.

    In a chat the template stands for the last message, whose text is {prompt}.
    """
    problem = response.problem
    found: dict[str, Any] = {
        "answer": problem.answer,
        "solution": problem.solution,
        "feedback": feedback_of(response),
        "sibling": sibling_of(response, responses),
    }
    if any(found[name] is None for name in fields_of(template) - {"prompt"}):
        return None
    return rewritten(problem.prompt, lambda text: template.format(prompt=text, **found))
