"""From a whole response to a score: reasoning removed, answer extracted, verified; and the shaping of rewards.

`Scorer` is what a worker process runs; it and its verifier travel there by cloudpickle.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kdrl.errors import UserError
from kdrl.tasks.base import Problem, ResponseInfo
from kdrl.tasks.config import ExtractConfig, OverlongConfig, TaskConfig
from kdrl.tasks.extract import extract, without_reasoning
from kdrl.tasks.verifiers import Verifier, build_verifier, prepare, verifier_name


def compiled(pattern: str, option: str) -> re.Pattern[str]:
    """The regular expression; raises UserError for a broken one."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"{option}: {pattern!r} is not a regular expression: {error}.") from error


@dataclass(frozen=True)
class Scorer:
    """(response, problem) -> (verifier score in [0, 1], whether the response has the wanted form, feedback or "")."""

    verifier: Verifier
    extraction: ExtractConfig
    reasoning_tag: str | None
    form: str | None

    def prepare(self) -> None:
        """Load what the verifier imports, before its time counts."""
        prepare(self.verifier)

    def answer(self, response: str) -> str | None:
        """The part of a response that is the answer, None where there is none."""
        if self.reasoning_tag is not None:
            response = without_reasoning(response, self.reasoning_tag)
        return extract(response, self.extraction)

    def __call__(self, response: str, problem: Problem) -> tuple[float, bool, str]:
        """Score one response; raises ValueError when the verifier's result is no score, nor (score, feedback)."""
        formed = self.form is not None and re.search(self.form, response, re.DOTALL) is not None
        answer = self.answer(response)
        if not answer:
            return 0.0, formed, ""
        result = self.verifier(answer, problem)
        given, feedback = result if isinstance(result, tuple) else (result, "")
        score = float(given)
        if not isinstance(feedback, str):
            raise ValueError(f"the verifier's feedback is {feedback!r}, not a text")
        if not (math.isfinite(score) and 0.0 <= score <= 1.0):
            raise ValueError(f"the verifier returned {score}, not a score between 0 and 1")
        return score, formed, feedback


def build_scorer(config: TaskConfig) -> Scorer:
    """The scorer of a recipe; raises UserError."""
    default = ExtractConfig(how="last_number" if verifier_name(config) == "numeric" else "whole")
    extraction = config.extract or default
    if extraction.how == "regex":
        compiled(str(extraction.argument), "task.extract.regex")
    form = config.rewards.format
    if form is not None:
        compiled(form.pattern, "task.rewards.format.pattern")
    return Scorer(build_verifier(config), extraction, config.reasoning_tag, form.pattern if form else None)


def overlong_penalty(info: ResponseInfo, config: OverlongConfig) -> float:
    """Soft over-length punishment in [-penalty, 0], arXiv 2503.14476 eq. 13 with L_max = the response limit.

    Raises UserError when the buffer is longer than the limit.
    """
    if config.buffer > info.max_tokens:
        raise UserError(
            f"task.rewards.overlong.buffer is {config.buffer} tokens, the response limit only {info.max_tokens}; "
            "lower it."
        )
    over = info.tokens - (info.max_tokens - config.buffer)
    return -config.penalty * min(max(over / config.buffer, 0.0), 1.0)


def shaped(score: float, formed: bool, info: ResponseInfo, config: TaskConfig) -> float:
    """The reward: the verifier's score, plus the format bonus, minus the over-length punishment."""
    reward = score
    if config.rewards.format is not None and formed:
        reward += config.rewards.format.bonus
    if config.rewards.overlong is not None:
        reward += overlong_penalty(info, config.rewards.overlong)
    return reward
