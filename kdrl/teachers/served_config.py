"""How a recipe describes a teacher on a server. No torch import: a recipe is checked before anything is loaded."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from kdrl.config import Config


def plain_url(url: str) -> str:
    """A server's address without a path's end such as `/v1`; raises ValueError for what is no address."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no server's address; write it as http://HOST:PORT")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"{url!r} holds more than an address; write http://HOST:PORT, and name a key by key_env")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


class ServedConfig(Config):
    """A teacher behind vLLM's OpenAI-compatible server, or one that speaks as it does; an address alone is urls."""

    urls: tuple[str, ...] = Field(min_length=1)
    """Addresses such as http://127.0.0.1:8000; several are replicas of one model."""
    model: str | None = None
    """The model's name on the server; default: the only one that it serves."""
    api: Literal["tokens", "completions", "chat"] = "tokens"
    """`tokens`: token ids in and out, prompt log-probs (vLLM); `completions` and `chat`: an API of text alone, which
    may write (source teacher), tokenised by the student's tokenizer, and never scores."""
    top_k: int | None = Field(default=None, ge=1)
    """Most of the teacher's likeliest tokens that terms may ask; default: as many as they ask."""
    concurrency: int = Field(default=8, ge=1)
    """Requests under way at once, over all replicas."""
    batch: int = Field(default=4, ge=1)
    """Responses scored by one request."""
    timeout_s: float = Field(default=60.0, gt=0.0)
    """Seconds without an answer after which a request is sent again."""
    retries: int = Field(default=5, ge=0)
    """How often a request that got no usable answer from a living server is repeated."""
    backoff_s: float = Field(default=0.5, gt=0.0)
    """First pause before a repetition; each further one is twice as long, up to 10 s."""
    wait_s: float = Field(default=600.0, ge=0.0)
    """How long a step waits for a server to come back when none answers."""
    key_env: str | None = None
    """Environment variable that holds the server's API key."""
    parity: int = Field(default=4, ge=0)
    """Responses that every replica scores as a local forward pass does, or where `teacher.model` has no weights at
    hand as the first replica does; 0: none."""
    tolerance: float = Field(default=0.05, gt=0.0)
    """Largest mean difference of a token's log-prob, in nats, in that comparison."""

    @model_validator(mode="before")
    @classmethod
    def _address(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"urls": [raw]}
        if not isinstance(raw, dict | ServedConfig):
            raise ValueError(f"write it as {{urls: [http://HOST:8000]}}, or one address alone, not {raw!r}")
        return raw

    @field_validator("urls")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(plain_url(url) for url in urls)
        if len(set(found)) < len(found):
            raise ValueError("an address stands twice in urls; a replica is another server")
        return found

    @model_validator(mode="after")
    def _check(self) -> ServedConfig:
        given = [name for name in ("top_k", "batch", "parity", "tolerance") if name in self.model_fields_set]
        if self.text_only and given:
            raise ValueError(f"{given[0]} belongs to scoring, which api {self.api} cannot; leave it out")
        return self

    @property
    def text_only(self) -> bool:
        """Whether the server gives no log-probs of a prompt."""
        return self.api != "tokens"
