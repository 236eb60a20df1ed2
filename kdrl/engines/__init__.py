"""How text is written: `torch` is embedded and runs any transformers causal LM that has a key-value cache."""

from __future__ import annotations

from kdrl.engines.base import Engine, Sample
from kdrl.engines.torch_engine import TorchEngine

__all__ = ["Engine", "Sample", "TorchEngine"]
