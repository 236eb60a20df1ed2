"""What feature terms need of memory, from the models' shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

from kdrl.errors import UserError
from kdrl.features.config import FeatureConfig
from kdrl.features.projectors import projector_parameters, size_of, sizes_of
from kdrl.memory import Item
from kdrl.model_shape import ModelShape
from kdrl.objectives.objective import Objective

# Float32 tables of tokens by keys alive at once: scores and softmax of both models, their difference, a gradient.
_TABLES = 6


def feature_items(
    objective: Objective, student: ModelShape, teacher: ModelShape | None, tokens: int, max_length: int
) -> tuple[Item, ...]:
    """The parts of a plan for an objective's feature terms, with micro-batches of `tokens` tokens.

    Raises UserError, naming the setting, where the models' shapes do not fit a term.
    """
    if teacher is None:
        return ()
    return tuple(
        item
        for name, term in zip(objective.names, objective.terms, strict=True)
        if isinstance(term.config, FeatureConfig)
        for item in _items(name, term.config, student, teacher, tokens, max_length)
    )


def _items(
    name: str, config: FeatureConfig, student: ModelShape, teacher: ModelShape, tokens: int, max_length: int
) -> Iterator[Item]:
    try:
        pairs, sizes = sizes_of(config, student, teacher)
    except ValueError as error:
        raise UserError(f"objective.{name}.{error}") from None
    count = projector_parameters(config, sizes)
    if count:
        yield Item(f"{name}: projectors", 12 * count, "always", f"{count:,} weights and AdamW's moments x 4 B")
        for phase in ("update", "optimizer step"):
            yield Item(f"{name}: projector gradients", 4 * count, phase, f"{count:,} x 4 B")
    if config.of.is_map and not config.of.relation:
        heads = sum(s + t for s, t in sizes[:1])
        table = _TABLES * 4 * heads * max_length**2
        yield Item(f"{name}: attention maps", table, "update", f"one response: {heads} heads x {max_length}^2 x 4 B")
        kept = sum(len(t) for _, t in pairs) * (teacher.query_width + 2 * teacher.kv_width)
        yield Item(
            f"{name}: teacher's queries, keys", 4 * tokens * kept, "update", f"{tokens:,} tokens x {kept:,} x 4 B"
        )
        return
    widths = sum(3 * size_of(config, student) + 3 * size_of(config, teacher) for _ in pairs)
    yield Item(f"{name}: vectors", 4 * tokens * widths, "update", f"{tokens:,} tokens x {widths:,} x 4 B")
    if config.of.relation or config.loss.kind in ("infonce", "mi_alpha", "sinkhorn"):
        table = _TABLES * 4 * config.of.heads * max_length**2
        yield Item(f"{name}: relations", table, "update", f"one response: {config.of.heads} x {max_length}^2 x 4 B")
    if config.normalise == "whiten":
        square = 8 * (2 * len(pairs) + 1) * size_of(config, teacher) ** 2
        yield Item(
            f"{name}: covariance", square, "update", f"{2 * len(pairs) + 1} x {size_of(config, teacher):,}^2 x 8 B"
        )
