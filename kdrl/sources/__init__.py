"""Who writes the responses of a step."""

from __future__ import annotations

from kdrl.sources.config import SOURCES, SourceConfig, SourceSettings
from kdrl.sources.kinds import Keep

__all__ = ["SOURCES", "Keep", "SourceConfig", "SourceSettings"]
