"""Student and teacher models: their recipe section, loading, prompts, the head, and the final folder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdrl.models.config import LoraConfig, ModelConfig, NewModel, NewTokenizer, TeacherModelConfig

if TYPE_CHECKING:
    from kdrl.models.heads import decoder_of, head_of, hidden_states
    from kdrl.models.loading import LoadedModel, load_model
    from kdrl.models.prompts import encode_prompt
    from kdrl.models.saving import save_final

# A recipe is read and checked without torch; what needs it is imported on first use.
_HOME = {
    "LoadedModel": "loading",
    "load_model": "loading",
    "decoder_of": "heads",
    "head_of": "heads",
    "hidden_states": "heads",
    "encode_prompt": "prompts",
    "save_final": "saving",
}

__all__ = [
    "LoadedModel",
    "LoraConfig",
    "ModelConfig",
    "NewModel",
    "NewTokenizer",
    "TeacherModelConfig",
    "decoder_of",
    "encode_prompt",
    "head_of",
    "hidden_states",
    "load_model",
    "save_final",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdrl.models' has no attribute {name!r}")
    return getattr(import_module(f"kdrl.models.{_HOME[name]}"), name)
