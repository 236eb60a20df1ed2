"""All terms of an objective: importing this module makes every built-in one known by its name."""

from __future__ import annotations

from kdrl.features.term import FeatureTerm
from kdrl.objectives.base import TERMS, Needs, ScheduleField, Term, TermConfig, TokenView, register_term
from kdrl.objectives.blocks import BatchDistill, BatchDistillConfig, register_block_loss
from kdrl.objectives.distill import Distill, DistillConfig
from kdrl.objectives.likelihood import CrossEntropy, EntropyBonus, ReferenceKL, ReferenceKLConfig
from kdrl.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig, TeacherAnchor
from kdrl.objectives.preference import Preference, PreferenceConfig
from kdrl.objectives.returns import SequenceKL, SequenceKLConfig
from kdrl.vocab.dual import DualDistill
from kdrl.vocab.likelihood import ChunkDistill
from kdrl.vocab.multilevel import MultilevelDistill
from kdrl.vocab.terms import ChunkKL, GroupDistill, OverlapDistill, SortedDistill, VocabTerm

__all__ = [
    "TERMS",
    "BatchDistill",
    "BatchDistillConfig",
    "ChunkDistill",
    "ChunkKL",
    "CrossEntropy",
    "Distill",
    "DistillConfig",
    "DualDistill",
    "EntropyBonus",
    "FeatureTerm",
    "GroupDistill",
    "MultilevelDistill",
    "Needs",
    "OverlapDistill",
    "PolicyGradient",
    "PolicyGradientConfig",
    "Preference",
    "PreferenceConfig",
    "ReferenceKL",
    "ReferenceKLConfig",
    "ScheduleField",
    "SequenceKL",
    "SequenceKLConfig",
    "SortedDistill",
    "TeacherAnchor",
    "Term",
    "TermConfig",
    "TokenView",
    "VocabTerm",
    "register_block_loss",
    "register_term",
]
