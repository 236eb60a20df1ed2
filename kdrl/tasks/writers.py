"""Writers of worked solutions for cheap reasoning-gym tasks."""

from __future__ import annotations

import ast
import math
import random
from decimal import Decimal
from typing import Any

from kdrl.tasks.solutions import Item, Solution, register_solution

_OPERATORS: dict[type[ast.operator], tuple[str, Any]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.Div: ("/", lambda a, b: a // b),
}


def _expression(item: Item) -> str:
    """The expression of an item, from its metadata or, in a data file, its column `expression`."""
    return str((item.get("metadata") or item)["expression"])


def _mistaken(value: Decimal, draw: random.Random) -> Decimal:
    """A plausible wrong result: off by one to three, by ten, or with the sign lost."""
    near = [value + delta for delta in (-3, -2, -1, 1, 2, 3, -10, 10)]
    return draw.choice([*near, -value] if value else near)


class _Trace:
    """Text that grows step by step, with at most one wrong result."""

    def __init__(self, wrong_step: int | None, draw: random.Random | None) -> None:
        self.text, self._wrong_step, self._draw, self._step = "", wrong_step, draw, 0
        self._context_end: int | None = None

    def result(self, value: Decimal) -> Decimal:
        """Write a step's result, wrong where the trace is to go wrong; returns what was written."""
        wrong = self._draw is not None and self._step == self._wrong_step
        if wrong:
            assert self._draw is not None
            value = _mistaken(value, self._draw)
        self.text += _shown(value)
        self._step += 1
        if wrong:
            self._context_end = len(self.text)
        return value

    def solution(self) -> Solution:
        """The text, with everything up to and including the wrong result as context only."""
        return Solution(self.text, () if self._context_end is None else ((0, self._context_end),))


def _shown(value: Decimal) -> str:
    return format(value, "f")


def _chain(item: Item, corrupt: random.Random | None, step: str, between: str, last: str) -> Solution:
    """A sum worked from left to right; `step` holds {a} {sign} {b}, `last` {answer}."""
    terms = _expression(item).split()
    steps = list(zip(terms[1::2], terms[2::2], strict=True))
    # The last result is the answer and no intermediate one, so a sum of two terms stays as it is.
    wrong_step = corrupt.randrange(len(steps) - 1) if corrupt is not None and len(steps) > 1 else None
    trace, total = _Trace(wrong_step, corrupt), Decimal(terms[0])
    for sign, term in steps:
        trace.text += step.format(a=_shown(total), sign=sign, b=term)
        total = trace.result(total + Decimal(term) if sign == "+" else total - Decimal(term))
        trace.text += between
    trace.text = trace.text[: len(trace.text) - len(between)] + last.format(answer=_shown(total))
    return trace.solution()


@register_solution("chain_sum")
def chain_sum(item: Item, /, *, corrupt: random.Random | None = None) -> Solution:
    """`4-5=-1;-1+3=2;2-4=-2#-2`: for character tokenizers, answer after `#`; also decimal_chain_sum."""
    return _chain(item, corrupt, "{a}{sign}{b}=", ";", "#{answer}")


@register_solution("chain_sum_spoken")
def chain_sum_spoken(item: Item, /, *, corrupt: random.Random | None = None) -> Solution:
    """One step a line, `4 - 5 = -1`, then `The answer is -2`: for chat models; also decimal_chain_sum."""
    return _chain(item, corrupt, "{a} {sign} {b} = ", "\n", "\nThe answer is {answer}")


@register_solution("basic_arithmetic")
def basic_arithmetic(item: Item, /) -> str:
    """One operation a line, then `The answer is ...`; `/` rounds down, as the task has it."""
    lines: list[str] = []
    answer = _work(ast.parse(_expression(item).strip(), mode="eval").body, lines)
    return "\n".join([*lines, f"The answer is {answer}"])


def _work(node: ast.expr, lines: list[str]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_work(operand, lines)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _work(left, lines), _work(right, lines)
            sign, apply = _OPERATORS[type(op)]
            result = apply(a, b)
            lines.append(f"{a} {sign} {b} = {result}")
            return result
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def _euclid(a: int, b: int, lines: list[str]) -> int:
    while b:
        lines.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return a


@register_solution("gcd")
def gcd(item: Item, /) -> str:
    """Euclid's remainders, one a line, then `The answer is ...`; more than two numbers are taken one after another."""
    lines: list[str] = []
    first, *rest = item["metadata"]["numbers"]
    for number in rest:
        first = _euclid(first, number, lines)
    return "\n".join([*lines, f"The answer is {first}"])


@register_solution("lcm")
def lcm(item: Item, /) -> str:
    """Euclid's remainders and the product over the divisor, then `The answer is ...`."""
    lines: list[str] = []
    first, *rest = item["metadata"]["numbers"]
    for number in rest:
        divisor = _euclid(first, number, lines)
        lines.append(f"{first} * {number} / {divisor} = {math.lcm(first, number)}")
        first = math.lcm(first, number)
    return "\n".join([*lines, f"The answer is {first}"])


@register_solution("spell_backward")
def spell_backward(item: Item, /) -> str:
    """The letters one by one, then in reverse, then the word: `s u n; n u s; nus` (`extract: {after: "; "}`)."""
    word = item["metadata"]["word"]
    return f"{' '.join(word)}; {' '.join(word[::-1])}; {word[::-1]}"


@register_solution("answer")
def answer(item: Item, /) -> str:
    """Nothing but the answer."""
    return str(item["answer"])
