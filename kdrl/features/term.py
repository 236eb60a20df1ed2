"""The feature term: what it needs, and its loss, which the updater computes from one pass of student and teacher."""

from __future__ import annotations

from torch import Tensor

from kdrl.features.config import FeatureConfig
from kdrl.objectives.base import TERMS, Needs, Term, TokenView


@TERMS.add("feature")
class FeatureTerm(Term[FeatureConfig]):
    """Difference of hidden states, attention maps or relations between student and teacher at every kept token."""

    name, family, Config = "feature", "kd", FeatureConfig

    @property
    def needs(self) -> Needs:
        """The inside of student and teacher; no log-probs."""
        return Needs(features=True)

    def loss(self, view: TokenView) -> Tensor:
        """The mean over layer pairs."""
        assert view.divergence_N is not None
        return view.divergence_N
