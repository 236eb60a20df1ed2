"""Feature terms at work: what is kept from the passes of student and teacher, projected and compared token by token.

The student's features come from the pass that the other terms use; the teacher passes each micro-batch once for all
feature terms, and once more for each optimizer step where a term needs its means. Left out: caching the teacher's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from kdrl.batch import MicroBatch, Rollouts
from kdrl.errors import UserError
from kdrl.features.config import FeatureConfig
from kdrl.features.losses import (
    RESPONSE_LOSSES,
    TOKEN_LOSSES,
    map_loss,
    norm_and_direction,
    relation_loss,
)
from kdrl.features.projectors import Pair, make_projectors, sizes_of
from kdrl.features.statistics import Means, Statistics
from kdrl.model_shape import ModelShape
from kdrl.models import LoadedModel
from kdrl.models.features import Kept, Tap, Wanted
from kdrl.models.heads import causal_lm
from kdrl.models.packing import at_places, micro_batches, packs, wanted_states
from kdrl.objectives.objective import Active, Objective

# Features that stand at a token wherever it stands in the batch.
_PACKED = {"hidden", "embedding", "attention_output"}


@dataclass(frozen=True)
class Side:
    """One model's pass over a micro-batch: what was kept, and its last hidden state at the wanted tokens, `[M, D]`."""

    kept: Kept
    last_MD: Tensor
    layers: int
    micro: MicroBatch

    def vectors(self, config: FeatureConfig, layer: int, pick_T: Tensor) -> Tensor:
        """Features `[T, D]` of the tokens that `pick_T` marks among the M, in float32 or better."""
        kind = config.of.kind
        if kind in ("hidden", "embedding") and layer == self.layers:
            return _wide(self.last_MD[pick_T])
        if kind in ("hidden", "embedding"):
            found_BLD = self.kept.hidden[layer]
        elif kind == "attention_output":
            found_BLD = self.kept.output[layer]
        else:
            found_BLD = self.kept.attention[layer].vectors(kind)
        return _wide(at_places(found_BLD, self.micro.place_M[pick_T]))

    def scores(self, layers: Sequence[int], row: int, place_T: Tensor) -> tuple[Tensor, Tensor]:
        """Attention scores `[heads of all layers, T, L]` of one row, and the keys that all of them see."""
        found = [self.kept.attention[layer].scores(row, place_T) for layer in layers]
        seen_TL = found[0][1]
        for _, more_TL in found[1:]:
            seen_TL = seen_TL & more_TL
        return torch.cat([scores for scores, _ in found]), seen_TL


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wanted(config: FeatureConfig, layers: Sequence[int], count: int) -> Wanted:
    kind, found = config.of.kind, frozenset(layers)
    if kind in ("hidden", "embedding"):
        return Wanted(hidden=found - {count})
    return Wanted(output=found) if kind == "attention_output" else Wanted(attention=found)


@dataclass(frozen=True)
class _Live:
    """One term with its layer pairs and projectors."""

    config: FeatureConfig
    pairs: list[Pair]
    projectors: nn.ModuleList

    def projector(self, pair: int) -> nn.Module | None:
        if not self.projectors:
            return None
        return self.projectors[0 if self.config.projector.shared else pair]


class Features:
    """The feature terms of an objective, with teacher and projectors; raises UserError where the models do not fit.

    Projector parameters are called `feature.<name>`, or `feature.0.<name>` where there are several such terms.
    """

    def __init__(
        self, objective: Objective, student: LoadedModel, teacher: LoadedModel, budget: int, seed: int
    ) -> None:
        configs = {
            name: term.config
            for name, term in zip(objective.names, objective.terms, strict=True)
            if isinstance(term.config, FeatureConfig)
        }
        self.teacher, self.budget = teacher, budget
        inside = {c.of.kind for c in configs.values()} - {"hidden", "embedding"}
        self.taps = [Tap(model, attention=bool(inside)) for model in (student, teacher)]
        shapes = [ModelShape.from_model(causal_lm(model)) for model in (student, teacher)]
        dtype = torch.promote_types(next(student.model.parameters()).dtype, torch.float32)
        self.live: dict[str, _Live] = {}
        for name, config in configs.items():
            try:
                pairs, sizes = sizes_of(config, *shapes)
            except ValueError as error:
                raise UserError(f"objective.{name}.{error}") from None
            made = make_projectors(config, sizes, seed, name).to(student.device, dtype)
            self.live[name] = _Live(config, pairs, made)
        self._statistics: dict[str, Statistics] = {}

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every projector's parameters by the name they have in a checkpoint."""
        return {f"{name}.{key}": p for name, live in self.live.items() for key, p in live.projectors.named_parameters()}

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the projectors: no weight decay, `lr_scale` times the student's rate."""
        scales: dict[float, list[nn.Parameter]] = {}
        for live in self.live.values():
            scales.setdefault(live.config.projector.lr_scale, []).extend(live.projectors.parameters())
        return [
            {"params": params, "weight_decay": 0.0, "lr_scale": scale} for scale, params in scales.items() if params
        ]

    def padded(self, active: Sequence[Active], rollouts: Rollouts) -> bool:
        """Whether these terms need a response a row: attention is watched in rows; the teacher reads the same batch."""
        kinds = {self.live[a.name].config.of.kind for a in active if a.name in self.live}
        longest = max((len(r.prompt_ids) + len(r.token_ids) for r in rollouts.responses), default=0)
        return bool(kinds) and (not kinds <= _PACKED or not packs(self.teacher, longest))

    def _layers(self, names: Sequence[str], side: int) -> Wanted:
        wanted = Wanted()
        for name in names:
            live = self.live[name]
            layers = [layer for pair in live.pairs for layer in pair[side]]
            wanted |= _wanted(live.config, layers, self.taps[side].layers)
        return wanted

    @contextlib.contextmanager
    def watch(self, active: Sequence[Active]) -> Iterator[Kept]:
        """While inside, the student's one forward pass leaves what these terms compare."""
        with self.taps[0].watch(self._layers([a.name for a in active], 0)) as kept:
            yield kept

    @torch.no_grad()
    def _teach(self, names: Sequence[str], micro: MicroBatch) -> Side:
        tap = self.taps[1]
        with tap.watch(self._layers(names, 1)) as kept:
            last_MD = wanted_states(self.teacher, micro)
        return Side(kept, last_MD, tap.layers, micro)

    @torch.no_grad()
    def prepare(self, active: Sequence[Active], rollouts: Rollouts, rows: Sequence[int]) -> None:
        """Take the teacher's means over the `rows` of one optimizer step, for the terms that need them."""
        asking = [a for a in active if a.name in self.live and self.live[a.name].config.teacher_statistics]
        self._statistics = {a.name: Statistics(self.live[a.name].config, len(self.live[a.name].pairs)) for a in asking}
        if not asking:
            return
        keep_N = torch.stack([a.keep_N for a in asking]).any(0)
        padded = self.padded(asking, rollouts)
        for micro in micro_batches(self.teacher, rollouts, rows, keep_N, self.budget, padded=padded):
            side = self._teach([a.name for a in asking], micro)
            for each in asking:
                live = self.live[each.name]
                pick_T = each.keep_N[micro.index_M].nonzero().squeeze(1)
                label_T = rollouts.tokens_N[micro.index_M[pick_T]]
                for i, (_, teacher) in enumerate(live.pairs):
                    self._statistics[each.name].add(i, side.vectors(live.config, teacher[0], pick_T), label_T)

    def losses(
        self, active: Sequence[Active], kept: Kept, last_MD: Tensor, micro: MicroBatch, rollouts: Rollouts
    ) -> dict[str, Tensor]:
        """Each term's loss per token of the micro-batch, `[M]`, zero where its mask keeps none."""
        if not active:
            return {}
        sides = (Side(kept, last_MD, self.taps[0].layers, micro), self._teach([a.name for a in active], micro))
        found = {}
        with torch.autocast(last_MD.device.type, enabled=False), parametrize.cached():
            for each in active:
                live = self.live[each.name]
                pick_T = each.keep_N[micro.index_M].nonzero().squeeze(1)
                loss_M = torch.zeros(len(micro.index_M), dtype=_wide(last_MD).dtype, device=last_MD.device)
                if len(pick_T):
                    compare = self._maps if live.config.of.kind in ("attention", "attention_scores") else self._vectors
                    label_T = rollouts.tokens_N[micro.index_M[pick_T]]
                    parts = [compare(each.name, i, sides, pick_T, label_T) for i in range(len(live.pairs))]
                    loss_M = loss_M.index_put((pick_T,), torch.stack(parts).mean(0).to(loss_M.dtype))
                found[each.name] = loss_M
        return found

    def _vectors(self, name: str, pair: int, sides: tuple[Side, Side], pick_T: Tensor, label_T: Tensor) -> Tensor:
        live = self.live[name]
        config, ((student,), (teacher,)) = live.config, live.pairs[pair]
        student_TD = sides[0].vectors(config, student, pick_T)
        teacher_TD = sides[1].vectors(config, teacher, pick_T).to(student_TD.dtype)
        project = live.projector(pair)
        student_TD = student_TD if project is None else project(student_TD)
        kind = config.loss.kind
        if kind == "nd":
            return norm_and_direction(student_TD, teacher_TD, self._means(name, pair).centre(label_T).to(teacher_TD))
        if config.normalise != "none" or config.bits is not None:
            means = self._means(name, pair) if config.teacher_statistics else None
            teacher_TD = transform(config, teacher_TD, means)
        if kind in TOKEN_LOSSES and not config.of.relation:
            return TOKEN_LOSSES[kind](student_TD, teacher_TD, config.loss)

        def one(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
            if config.of.relation:
                return relation_loss(student_TD, teacher_TD, config.of, config.loss)
            return RESPONSE_LOSSES[kind](student_TD, teacher_TD, config.loss)

        row_T = sides[0].micro.row_M[pick_T]
        counts = row_T.unique_consecutive(return_counts=True)[1].tolist()
        cut = zip(student_TD.split(counts), teacher_TD.split(counts), strict=True)
        return torch.cat([_recomputed(one, s, t) for s, t in cut])

    def _means(self, name: str, pair: int) -> Means:
        return self._statistics[name].of(pair)

    def _maps(self, name: str, pair: int, sides: tuple[Side, Side], pick_T: Tensor, label_T: Tensor) -> Tensor:
        live, micro = self.live[name], sides[0].micro
        config, layers = live.config, live.pairs[pair]
        project = live.projector(pair)
        length = micro.input_ids_BL.shape[1]

        def one(row: int, place_T: Tensor) -> Tensor:
            # Keys after the last query are seen by none of them: padding among them.
            used = int(place_T[-1]) + 1
            (student_HTL, seen_TL), (teacher_HTL, also_TL) = (
                side.scores(at, row, place_T) for side, at in zip(sides, layers, strict=True)
            )
            student_HTL = student_HTL[..., :used] if project is None else project(student_HTL[..., :used])
            counted_TL = (seen_TL & also_TL)[:, :used]
            teacher_HTL = teacher_HTL[..., :used].to(student_HTL.dtype)
            softmax = config.of.kind == "attention"
            return map_loss(student_HTL, teacher_HTL, counted_TL, config.loss, softmax=softmax)

        found = []
        row_T = micro.row_M[pick_T]
        for row in row_T.unique_consecutive().tolist():
            place_T = micro.place_M[pick_T[row_T == row]] - row * length
            found.append(_recomputed(one, row, place_T))
        return torch.cat(found)


def _recomputed(function: Any, *given: Any) -> Tensor:
    """One response at a time, recomputed in the backward pass: tables of tokens by tokens are never all held."""
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


def transform(config: FeatureConfig, teacher_TD: Tensor, means: Means | None) -> Tensor:
    """The teacher's vectors normalised and rounded as the term asks."""
    if config.normalise == "token":
        teacher_TD = nn.functional.layer_norm(teacher_TD, teacher_TD.shape[-1:])
    elif means is not None:
        teacher_TD = means.normalised(teacher_TD)
    if config.bits is not None:
        steps = 2 ** (config.bits - 1) - 1
        largest_T = teacher_TD.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        teacher_TD = (teacher_TD / largest_T * steps).round() * largest_T / steps
    return teacher_TD


def make_features(
    objective: Objective, student: LoadedModel, teacher: LoadedModel | None, budget: int, seed: int
) -> Features | None:
    """The objective's feature terms at work, or None where it has none; UserError without a teacher."""
    if not any(term.needs.features for term in objective.terms):
        return None
    if teacher is None:
        raise UserError("a feature term needs a teacher whose inside can be read; add teacher.model=PATH_OR_ID.")
    return Features(objective, student, teacher, budget, seed)
