"""kdrl: post-train reasoning language models by unified knowledge distillation and reinforcement learning."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrl.evaluation import evaluate
    from kdrl.objectives.api import divergence
    from kdrl.objectives.blocks import register_block_loss
    from kdrl.objectives.masks import register_mask
    from kdrl.objectives.schedules import register_schedule
    from kdrl.objectives.scores import register_score
    from kdrl.objectives.terms import register_term
    from kdrl.recipe import load_recipe
    from kdrl.run import train
    from kdrl.tasks import Problem, register_task
    from kdrl.tasks.verifiers import register_verifier
    from kdrl.teachers.prepare import register_preparation

__version__ = "0.1.0"

# oneDNN keeps code and scratch of a thousand shapes of products, and lengths make ever new ones: a small run's memory
# doubles within a hundred steps. A tenth costs about 4 % of such a run's time. Read when torch is imported.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

# Imported on first use: a verifier worker or `kdrl --help` must not pay for torch.
_HOME = {
    "train": "kdrl.run",
    "evaluate": "kdrl.evaluation",
    "divergence": "kdrl.objectives.api",
    "register_preparation": "kdrl.teachers.prepare",
    "register_block_loss": "kdrl.objectives.blocks",
    "register_mask": "kdrl.objectives.masks",
    "register_schedule": "kdrl.objectives.schedules",
    "register_score": "kdrl.objectives.scores",
    "register_term": "kdrl.objectives.terms",
    "load_recipe": "kdrl.recipe",
    "Problem": "kdrl.tasks",
    "register_task": "kdrl.tasks",
    "register_verifier": "kdrl.tasks.verifiers",
}

__all__ = [
    "Problem",
    "divergence",
    "evaluate",
    "load_recipe",
    "register_block_loss",
    "register_mask",
    "register_preparation",
    "register_schedule",
    "register_score",
    "register_task",
    "register_term",
    "register_verifier",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdrl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
