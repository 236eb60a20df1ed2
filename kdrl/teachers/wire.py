"""What goes between this process and a teacher's server: connections, what failed, and how it is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kdrl.errors import UserError
from kdrl.teachers.served_config import ServedConfig

CONNECT_S = 10.0


class UnreachableError(Exception):
    """Nothing listens there, or what listened is gone."""


class UnusableError(Exception):
    """An answer that another try may better: an internal error, a time-out, broken JSON, the wrong shape."""


class SlowError(UnusableError):
    """No answer in time: the replica may hang, so others are asked first."""


class AbsentError(UserError):
    """Status 404: the model, or the path, is not there."""


@dataclass
class Replica:
    """One server and when to try it again; `known` since it was examined, `refused` for the rest of the run.

    `context` are the tokens that it reads at most, where it says so.
    """

    url: str
    failures: int = 0
    not_before: float = 0.0
    why: str = ""
    known: bool = True
    busy: bool = False
    refused: bool = False
    context: int | None = None

    def ready(self, now: float) -> bool:
        """Whether it may be asked, or examined."""
        return not self.refused and not self.busy and self.not_before <= now


@dataclass
class Traffic:
    """What went over the wire so far: bytes of bodies, requests with an answer that was used, and repetitions."""

    sent: int = 0
    received: int = 0
    requests: int = 0
    repeated: int = 0


@dataclass
class Connections:
    """One thread's open connections, closed from another thread when the run is stopped."""

    timeout: float
    open: dict[str, http.client.HTTPConnection] = field(default_factory=dict)

    def to(self, url: str) -> http.client.HTTPConnection:
        """The open connection to a server, made where there is none; raises what http.client does."""
        if url not in self.open:
            parts = urlsplit(url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.netloc, timeout=min(CONNECT_S, self.timeout))
            connection.connect()
            connection.sock.settimeout(self.timeout)
            self.open[url] = connection
        return self.open[url]

    def drop(self, url: str) -> None:
        """Close one."""
        found = self.open.pop(url, None)
        if found is not None:
            found.close()

    def cut(self) -> None:
        """End what waits on any of them, from whatever thread."""
        for connection in list(self.open.values()):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


def key_header(config: ServedConfig) -> dict[str, str]:
    """The header that holds the server's key; raises UserError where the environment does not."""
    if config.key_env is None:
        return {}
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise UserError(
            f"teacher.served.key_env names the environment variable {config.key_env}, which is not set; put the "
            f"server's API key into it, as in `export {config.key_env}=...`."
        )
    return {"Authorization": f"Bearer {key}"}


def unused_proxy() -> str:
    """What to know where the environment names a proxy and no server answers."""
    named = next((name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY") if _environment(name)), None)
    return f" (The proxy that {named} names is not used: the server must be reachable directly.)" if named else ""


def _environment(name: str) -> str:
    return os.environ.get(name, "") or os.environ.get(name.lower(), "")


def reason(error: Exception) -> str:
    """A failure of the network in few words."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text)[:200]


def message(data: bytes) -> str:
    """What a server says of an error, in OpenAI's form or another."""
    try:
        answer = json.loads(data)
        inner = answer.get("error", answer)
        found = inner.get("message", answer) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        found = data.decode("utf-8", "replace")
    return " ".join(str(found).split())[:400] or "nothing said"
