"""Who writes the responses of a step."""

from __future__ import annotations

from kdrl.sources import kinds
from kdrl.sources.config import SOURCES, SourceConfig, SourceSettings
from kdrl.sources.keep import Keep

__all__ = ["SOURCES", "Keep", "SourceConfig", "SourceSettings", "kinds"]
