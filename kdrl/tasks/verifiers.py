"""Verifiers: functions (response, problem) -> score in [0, 1] or bool, on the part of a response that is the answer.

One may return (score, feedback) instead: words about the response that a self-teacher can be shown.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import partial
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.registry import Registry
from kdrl.tasks import reasoning_gym
from kdrl.tasks.base import Problem
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.userfn import is_reference, load_function

Verifier = Callable[[str, Problem], float | tuple[float, str]]

VERIFIERS: Registry[Callable[..., float | tuple[float, str]]] = Registry("verifier")
register_verifier = VERIFIERS.add


@register_verifier("exact")
def exact(response: str, problem: Problem, *, ignore_case: bool = False) -> bool:
    """Equal text, white space at the ends and its amount inside apart."""
    given, wanted = " ".join(response.split()), " ".join(str(problem.answer).split())
    return given.casefold() == wanted.casefold() if ignore_case else given == wanted


@register_verifier("numeric")
def numeric(response: str, problem: Problem, *, tolerance: float = 0.0) -> bool:
    """Equal numbers (1,000 = 1000.0, 1/2 = 0.5), to a relative `tolerance` of the reference; exact at 0."""
    given, wanted = as_number(response), as_number(str(problem.answer))
    if wanted is None:
        raise ValueError(f"the reference answer {problem.answer!r} is no number")
    return given is not None and abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def as_number(text: str) -> Fraction | None:
    """The number that a text is, `$`, `%`, thousands commas, sentence end and a/b understood; None if it is none."""
    plain = re.sub(r"(?<=\d),(?=\d{3})|[$%\s]", "", text.replace("\u2212", "-")).rstrip(".")
    top, slash, bottom = plain.partition("/")
    try:
        parts = [Decimal(part) for part in ([top, bottom] if slash else [top])]
    except InvalidOperation:
        return None
    # An exponent of many digits would take the memory of a number of that many digits.
    if any(not part.is_finite() or abs(part.adjusted()) > 1000 for part in parts):
        return None
    if slash and parts[1] == 0:
        return None
    return Fraction(parts[0]) / Fraction(parts[1]) if slash else Fraction(parts[0])


@register_verifier("math")
def math(response: str, problem: Problem) -> bool:
    """Mathematically equal, by math-verify (LaTeX, expressions, sets); it finds the answer in a whole response."""
    from math_verify import parse, verify

    # Its own time-outs are alarms; the pool stops what takes too long. It would warn that they are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold_text = str(problem.answer)
    gold = parse(gold_text if "$" in gold_text or "\\boxed" in gold_text else f"${gold_text}$", parsing_timeout=0)
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {gold_text!r}")
    given = parse(response, parsing_timeout=0)
    return bool(given) and bool(verify(gold, given, timeout_seconds=0))


@register_verifier("regex")
def regex(response: str, problem: Problem, *, pattern: str = "{answer}", escape: bool = True) -> bool:
    """The response contains `pattern`; `{answer}` in it is the reference, taken literally unless `escape` is false."""
    answer = str(problem.answer)
    return re.search(pattern.replace("{answer}", re.escape(answer) if escape else answer), response) is not None


@register_verifier("reasoning_gym")
def _reasoning_gym(response: str, problem: Problem, *, dataset: str, settings: Mapping[str, Any]) -> bool:
    """Full score by the reasoning-gym task itself."""
    return reasoning_gym.score(response, problem, dataset=dataset, settings=settings)


def prepare(verifier: Verifier) -> None:
    """Load in a worker what a built-in verifier imports on its first call, so that this is not timed as its own."""
    function = verifier.func if isinstance(verifier, partial) else verifier
    if function is math:
        math("1", Problem("", "", "1"))
    elif function is _reasoning_gym and isinstance(verifier, partial):
        reasoning_gym.scoring_dataset(**verifier.keywords)


def verifier_name(config: TaskConfig) -> str:
    """The verifier's name with the default filled in."""
    return config.verifier.name or ("reasoning_gym" if config.kind == "reasoning_gym" else "exact")


def build_verifier(config: TaskConfig) -> Verifier:
    """The verifier of a recipe with its settings bound; raises UserError for unknown names and settings."""
    name, settings = verifier_name(config), config.verifier.settings
    if name == "reasoning_gym":
        if config.kind != "reasoning_gym" or config.dataset is None:
            raise UserError("task.verifier reasoning_gym scores reasoning-gym problems; task.name is another task.")
        if settings:
            raise UserError("task.verifier.settings: the reasoning_gym verifier has no settings.")
        return partial(_reasoning_gym, dataset=config.dataset, settings=config.settings)
    function = load_function(name, "task.verifier.name") if is_reference(name) else VERIFIERS.get(name)
    _check_settings(name, function, settings)
    return partial(function, **settings) if settings else function


def _check_settings(name: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters[2:]]
    for key in settings:
        if key not in known:
            hint = nearest(key, known) if known else "; it has none"
            raise UserError(f"task.verifier.settings: the verifier {name!r} has no setting {key!r}{hint}")
