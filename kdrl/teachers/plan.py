"""What self-teachers, fake quantisation and prepared teachers need of memory, from the models' shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

from kdrl.checks import self_terms
from kdrl.memory import Item, Phase, chunk_bytes
from kdrl.model_shape import ModelShape, activation_bytes
from kdrl.objectives.objective import Objective
from kdrl.recipe import Recipe
from kdrl.teachers.prepare import PREPARATIONS

_BYTES = {"float32": 4, "bfloat16": 2}


def teacher_items(
    recipe: Recipe,
    objective: Objective,
    student: ModelShape,
    teacher: ModelShape | None,
    trainable: int,
    tokens: int,
    max_length: int,
    device: str,
) -> tuple[Item, ...]:
    """The parts of a plan; `trainable` parameters of the student, micro-batches of `tokens` tokens."""
    found = [*_quantised(recipe, student)]
    if self_terms(objective):
        found += _self_teacher(recipe, student, trainable)
    if teacher is not None:
        found += _prepared(recipe, teacher, tokens, max_length, device)
    return tuple(found)


def _quantised(recipe: Recipe, student: ModelShape) -> Iterator[Item]:
    if recipe.student.quantise is None:
        return
    weights = student.parameters - student.vocabulary * student.width
    size = _BYTES[recipe.student.dtype]
    sizes: tuple[tuple[Phase, int], ...] = (("rollout", 2 if recipe.student.autocast else size), ("update", size))
    for phase, each in sizes:
        yield Item("rounded weights", weights * each, phase, f"{weights:,} weights of linear layers x {each} B")


def _self_teacher(recipe: Recipe, student: ModelShape, trainable: int) -> Iterator[Item]:
    kind, size = recipe.self_teacher.kind, _BYTES[recipe.student.dtype]
    each = {"live": 0, "ema": 4, "past": size, "initial": 0 if recipe.student.lora else size}[kind]
    yield Item("self-teacher weights", trainable * each, "always", f"{kind}: {trainable:,} x {each} B")
    if kind in ("live", "ema"):
        head = student.vocabulary * student.width
        yield Item("self-teacher head", head * size, "update", f"a copy for the step: {head:,} x {size} B")


def _prepared(recipe: Recipe, teacher: ModelShape, tokens: int, max_length: int, device: str) -> Iterator[Item]:
    section = recipe.teacher
    if section is None or section.prepare is None:
        return
    kind = PREPARATIONS.get(section.prepare.name)
    if not kind.fits(section.prepare.config):
        return
    if kind.through_teacher:
        size = 2 if section.autocast else _BYTES[section.dtype]
        layer = activation_bytes(teacher, size, size)
        kept = tokens * teacher.layers * layer
        why = f"{tokens:,} tokens x {teacher.layers} layers x {layer:,} B"
        yield Item("teacher activations", kept, "prepare", why)
    hidden = 3 * 4 * tokens * teacher.width
    yield Item("hidden states", hidden, "prepare", f"{tokens:,} tokens x {teacher.width:,} x 3 x 4 B")
    yield Item("logits chunk", chunk_bytes(tokens, teacher.vocabulary), "prepare", "bare, adapted and student logits")
