"""What dual-space terms need of memory, from the models' shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kdrl.memory import Item
from kdrl.model_shape import ModelShape
from kdrl.objectives.objective import Objective
from kdrl.vocab.dual import DualConfig

# Float32 tables of a response's tokens by the teacher's alive at once: scores, both softmaxes, their gradients.
_TABLES = 5


def projector_parameters(config: DualConfig, student: int, teacher: int) -> int:
    """How many parameters the projectors between these widths have."""
    count = 2 * student * teacher + student + teacher
    return count + (4 * student * teacher + 2 * teacher if config.align == "attention" else 0)


def space_items(
    objective: Objective, student: ModelShape, teachers: Mapping[str, ModelShape], tokens: int, max_length: int
) -> tuple[Item, ...]:
    """The parts of a plan for micro-batches of `tokens` tokens; a teacher not in `teachers` has the student's shape."""
    return tuple(
        item
        for name, term in zip(objective.names, objective.terms, strict=True)
        if isinstance(term.config, DualConfig)
        for item in _items(name, term.config, student, teachers.get(term.config.teacher, student), tokens, max_length)
    )


def _items(
    name: str, config: DualConfig, student: ModelShape, teacher: ModelShape, tokens: int, max_length: int
) -> Iterator[Item]:
    count = projector_parameters(config, student.width, teacher.width)
    yield Item(f"{name}: projectors", 12 * count, "always", f"{count:,} weights and AdamW's moments x 4 B")
    yield Item(f"{name}: projector gradients", 4 * count, "update", f"{count:,} x 4 B")
    yield Item(f"{name}: projector gradients", 4 * count, "optimizer step", f"{count:,} x 4 B")
    widths = 3 * (student.width + teacher.width)
    yield Item(f"{name}: vectors", 4 * tokens * widths, "update", f"{tokens:,} tokens x {widths:,} x 4 B")
    if config.align == "attention":
        table = _TABLES * 4 * max_length**2
        yield Item(f"{name}: attention", table, "update", f"one response: {_TABLES} x {max_length}^2 x 4 B")
