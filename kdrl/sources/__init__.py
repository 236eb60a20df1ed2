"""Who writes the responses of a step."""

from __future__ import annotations

from kdrl.sources.config import SourceConfig

__all__ = ["SourceConfig"]
