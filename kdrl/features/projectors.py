"""Learned maps from the student's features to the teacher's: made from the seed, trained beside the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kdrl.features.config import FeatureConfig, ProjectorSpec, layer_pairs
from kdrl.model_shape import ModelShape
from kdrl.seeds import derive

Pair = tuple[tuple[int, ...], tuple[int, ...]]


class HeadMap(nn.Module):
    """Scores of all teacher heads as mixtures of the student's, one weight each (Align-to-Distill, 2403.01479).

    A 1 x 1 convolution over heads; its bias is left out, since a softmax does not see it.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.mix = nn.Linear(student, teacher, bias=False)

    def forward(self, scores_HTK: Tensor) -> Tensor:
        """Scores `[H_teacher, T, K]` from `[H_student, T, K]`."""
        return torch.einsum("gh,htk->gtk", self.mix.weight, scores_HTK)


def _one(spec: ProjectorSpec, student: int, teacher: int) -> nn.Module:
    if spec.kind == "head_map":
        return HeadMap(student, teacher)
    if spec.kind == "orthogonal":
        plain = nn.Linear(student, teacher, bias=False)
        # Householder reflections: exactly orthonormal rows or columns, whatever the optimizer does (V_kD, 2403.06213).
        return parametrizations.orthogonal(plain, orthogonal_map="householder", use_trivialization=False)
    if spec.kind == "mlp":
        width = spec.width or teacher
        return nn.Sequential(nn.Linear(student, width), nn.GELU(), nn.Linear(width, teacher))
    return nn.Linear(student, teacher)


def make_projectors(config: FeatureConfig, sizes: Sequence[tuple[int, int]], seed: int, name: str) -> nn.ModuleList:
    """A projector for each layer pair of (student size, teacher size), or one for all; none where none is asked.

    The same seed and term name give the same weights; torch's own generator is not touched.
    """
    if config.projector.kind == "none":
        return nn.ModuleList()
    sizes = sizes[:1] if config.projector.shared else sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "projector", name))
        return nn.ModuleList(_one(config.projector, *size) for size in sizes)


def sizes_of(config: FeatureConfig, student: ModelShape, teacher: ModelShape) -> tuple[list[Pair], list[tuple]]:
    """The layer pairs of a term and the sizes (width, or heads) that meet in each; ValueError where they cannot."""
    pairs = layer_pairs(config, student.layers, teacher.layers)
    sizes = [(size_of(config, student) * len(s), size_of(config, teacher) * len(t)) for s, t in pairs]
    kind, what = config.projector.kind, "heads" if config.of.is_map else "dimensions"
    if config.of.relation:
        for who, size in zip(("student", "teacher"), sizes[0], strict=True):
            if size % config.of.heads:
                raise ValueError(f"of: the {who}'s {config.of.kind} of width {size} cannot be cut in {config.of.heads}")
    elif kind == "none" and sizes[0][0] != sizes[0][1]:
        need = "head_map" if config.of.is_map else "linear"
        raise ValueError(
            f"projector: {config.of.kind} has {sizes[0][0]} {what} in the student and {sizes[0][1]} in the teacher; "
            f"set projector: {need}"
        )
    return pairs, sizes


def size_of(config: FeatureConfig, shape: ModelShape) -> int:
    """Width of the vectors that a term compares, or number of attention heads."""
    kind = config.of.kind
    if kind in ("attention", "attention_scores"):
        return shape.heads
    if kind == "queries":
        return shape.query_width
    return shape.kv_width if kind in ("keys", "values") else shape.width


def projector_parameters(config: FeatureConfig, sizes: Sequence[tuple[int, int]]) -> int:
    """How many parameters `make_projectors` will make."""
    spec = config.projector

    def count(student: int, teacher: int) -> int:
        if spec.kind == "mlp":
            width = spec.width or teacher
            return (student + 1) * width + (width + 1) * teacher
        return student * teacher + (teacher if spec.kind == "linear" else 0)

    return 0 if spec.kind == "none" else sum(count(*size) for size in (sizes[:1] if spec.shared else sizes))
