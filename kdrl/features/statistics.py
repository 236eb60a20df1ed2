"""Means of the teacher's features over one optimizer step, added up in float64 so that its split does not matter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrl.features.config import FeatureConfig

# Of the mean variance: keeps directions without variance from being blown up.
_FLOOR = 1e-5


@dataclass(frozen=True)
class Means:
    """What `normalise` or `nd` needs of one layer: mean `[D]`, a scaling, or centres `[U, D]` of sorted labels."""

    mean_D: Tensor
    scaling: Tensor | None = None
    labels_U: Tensor | None = None
    centres_UD: Tensor | None = None

    def normalised(self, teacher_TD: Tensor) -> Tensor:
        """Mean 0 and variance 1 in each dimension, or whitened (the covariance's inverse symmetric root)."""
        assert self.scaling is not None
        centred_TD = teacher_TD.double() - self.mean_D
        scaled_TD = centred_TD @ self.scaling if self.scaling.ndim == 2 else centred_TD * self.scaling
        return scaled_TD.to(teacher_TD.dtype)

    def centre(self, label_T: Tensor) -> Tensor:
        """The centre `[T, D]` that each token of these labels is drawn to."""
        if self.centres_UD is None or self.labels_U is None:
            return self.mean_D.expand(len(label_T), -1)
        return self.centres_UD[torch.searchsorted(self.labels_U, label_T)]


@dataclass
class _Sums:
    """Running sums of one layer, in float64."""

    count: int = 0
    sum_D: Tensor | None = None
    square: Tensor | None = None
    by_label: dict[int, tuple[int, Tensor]] = field(default_factory=dict)


class Statistics:
    """Sums of one term's teacher features over the kept tokens of an optimizer step, for each of its layer pairs."""

    def __init__(self, config: FeatureConfig, pairs: int) -> None:
        self.config = config
        self._sums = [_Sums() for _ in range(pairs)]
        self._done: dict[int, Means] = {}

    def add(self, pair: int, teacher_TD: Tensor, label_T: Tensor) -> None:
        """Count these tokens in."""
        if not len(teacher_TD):
            return
        sums, wide_TD = self._sums[pair], teacher_TD.double()
        sums.count += len(wide_TD)
        sums.sum_D = _plus(sums.sum_D, wide_TD.sum(0))
        if self.config.normalise == "batch":
            sums.square = _plus(sums.square, wide_TD.square().sum(0))
        elif self.config.normalise == "whiten":
            sums.square = _plus(sums.square, wide_TD.T @ wide_TD)
        elif self.config.loss.centre == "label":
            for label in label_T.unique().tolist():
                mine_TD = wide_TD[label_T == label]
                count, sum_D = sums.by_label.get(label, (0, torch.zeros_like(wide_TD[0])))
                sums.by_label[label] = (count + len(mine_TD), sum_D + mine_TD.sum(0))

    def of(self, pair: int) -> Means:
        """The means over all tokens counted in."""
        if pair not in self._done:
            self._done[pair] = self._means(self._sums[pair])
        return self._done[pair]

    def _means(self, sums: _Sums) -> Means:
        assert sums.sum_D is not None
        mean_D = sums.sum_D / sums.count
        if self.config.normalise == "batch":
            assert sums.square is not None
            variance_D = (sums.square / sums.count - mean_D.square()).clamp(min=0.0)
            return Means(mean_D, (variance_D + _FLOOR * variance_D.mean()).clamp(min=1e-30).rsqrt())
        if self.config.normalise == "whiten":
            assert sums.square is not None
            covariance_DD = sums.square / sums.count - mean_D[:, None] * mean_D
            values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
            values_D = values_D.clamp(min=0.0)
            root_D = (values_D + _FLOOR * values_D.mean()).clamp(min=1e-30).rsqrt()
            return Means(mean_D, vectors_DD * root_D @ vectors_DD.T)
        if self.config.loss.centre == "batch":
            return Means(mean_D)
        labels = sorted(sums.by_label)
        centres_UD = torch.stack([sums.by_label[label][1] / sums.by_label[label][0] for label in labels])
        return Means(mean_D, labels_U=torch.tensor(labels, device=mean_D.device), centres_UD=centres_UD)


def _plus(held: Tensor | None, more: Tensor) -> Tensor:
    return more if held is None else held + more
