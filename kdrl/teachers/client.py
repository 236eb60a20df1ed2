"""Requests to replicas of one server: many at a time, repeated where that may help, answered in the order asked.

A replica that cannot be reached is left alone for a while and tried again; pauses double and hold no chance, so a run
does the same each time. Proxies that the environment names are not used: most teachers are on this machine or the next,
which a proxy cannot reach. Left out: streaming.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kdrl.errors import RunError, UserError
from kdrl.teachers.served_config import ServedConfig

log = logging.getLogger("kdrl")
T = TypeVar("T")

LONGEST_PAUSE_S = 10.0
CONNECT_S = 10.0
_DOWN = (502, 503, 504)
_AGAIN = (408, 425, 429, 500)


class UnreachableError(Exception):
    """Nothing listens there, or what listened is gone."""


class UnusableError(Exception):
    """An answer that another try may better: an internal error, a time-out, broken JSON, the wrong shape."""


class SlowError(UnusableError):
    """No answer in time: the replica may hang, so others are asked first."""


@dataclass
class Replica:
    """One server and when to try it again."""

    url: str
    failures: int = 0
    not_before: float = 0.0
    why: str = ""


@dataclass
class Traffic:
    """What went over the wire so far: bytes of bodies, requests with an answer that was used, and repetitions."""

    sent: int = 0
    received: int = 0
    requests: int = 0
    repeated: int = 0


@dataclass
class _Connections:
    """One thread's open connections, closed from another thread when the run is stopped."""

    timeout: float
    open: dict[str, http.client.HTTPConnection] = field(default_factory=dict)

    def to(self, url: str) -> http.client.HTTPConnection:
        if url not in self.open:
            parts = urlsplit(url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.netloc, timeout=min(CONNECT_S, self.timeout))
            connection.connect()
            connection.sock.settimeout(self.timeout)
            self.open[url] = connection
        return self.open[url]

    def drop(self, url: str) -> None:
        found = self.open.pop(url, None)
        if found is not None:
            found.close()

    def cut(self) -> None:
        for connection in list(self.open.values()):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


class Client:
    """Speaks JSON with the replicas of a ServedConfig."""

    def __init__(self, config: ServedConfig) -> None:
        self.config = config
        self.replicas = [Replica(url) for url in config.urls]
        self.traffic = Traffic()
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"} | _key_header(config)
        self._lock = threading.Lock()
        self._silent_since: float | None = None

    def ask_each(self, path: str) -> dict[str, Any]:
        """What every replica that lives answers to a GET; raises UserError when none does."""
        found = {}
        connections = _Connections(min(10.0, self.config.timeout_s))
        try:
            for replica in self.replicas:
                try:
                    found[replica.url] = self._exchange(replica, connections, path, None, lambda answer: answer)
                except (UnreachableError, UnusableError) as error:
                    replica.why = str(error)
        finally:
            for url in self.config.urls:
                connections.drop(url)
        if not found:
            told = "; ".join(f"{r.url}: {r.why}" for r in self.replicas)
            raise UserError(
                f"no teacher server answers ({told}). Start one with `kdrl serve-teacher MODEL`, or mend "
                f"teacher.served.urls.{_unused_proxy()}"
            )
        return found

    def ask(self, path: str, body: Any, read: Callable[[Any], T]) -> T:
        """One request, repeated as `map` does."""
        return self.map(path, [body], lambda answer, index: read(answer))[0]

    def map(self, path: str, bodies: Sequence[Any], read: Callable[[Any, int], T]) -> list[T]:
        """`read(answer, index)` of each body's answer, in order; `read` raises UnusableError for another try.

        Raises UserError where a server refuses a request and RunError when it goes on failing or none answers any more.
        """
        if not bodies:
            return []
        stop, mine = threading.Event(), threading.local()
        all_connections: list[_Connections] = []

        def work(index: int) -> T:
            if not hasattr(mine, "connections"):
                mine.connections = _Connections(self.config.timeout_s)
                all_connections.append(mine.connections)
            return self._deliver(index, mine.connections, path, bodies[index], lambda a: read(a, index), stop)

        workers = min(self.config.concurrency, len(bodies))
        with ThreadPoolExecutor(workers, thread_name_prefix="teacher") as pool:
            futures: list[Future[T]] = [pool.submit(work, index) for index in range(len(bodies))]
            try:
                # The first to fail ends it, not the first in order, which may still wait.
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                # Also for a Ctrl-C: no thread may go on waiting for a server.
                stop.set()
                for future in futures:
                    future.cancel()
                for connections in all_connections:
                    connections.cut()
                raise
            finally:
                pool.shutdown()
                for connections in all_connections:
                    for url in list(connections.open):
                        connections.drop(url)

    def _deliver(
        self,
        index: int,
        connections: _Connections,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        stop: threading.Event,
    ) -> T:
        payload = json.dumps(body, separators=(",", ":")).encode()
        failures = turn = 0
        while True:
            replica = self._next(index + turn)
            if replica is None:
                self._wait(stop)
                continue
            try:
                answer = self._exchange(replica, connections, path, payload, read)
            except UnreachableError as error:
                if not stop.is_set():
                    self._set_aside(replica, str(error))
            except UnusableError as error:
                if isinstance(error, SlowError):
                    self._set_aside(replica, str(error))
                failures, turn = failures + 1, turn + 1
                if failures > self.config.retries:
                    raise RunError(
                        f"the teacher server {replica.url} gave no usable answer in {failures} tries ({error}). Look "
                        "at its log; then go on with `kdrl train --resume RUN` from the last checkpoint."
                    ) from None
                self._pause(self._length(failures), stop)
            else:
                self._answered(replica)
                return answer
            if stop.is_set():
                raise RunError("the teacher was asked no further.")
            with self._lock:
                self.traffic.repeated += 1

    def _exchange(
        self,
        replica: Replica,
        connections: _Connections,
        path: str,
        payload: bytes | None,
        read: Callable[[Any], T],
    ) -> T:
        """One request and its answer."""
        try:
            connection = connections.to(replica.url)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnreachableError(_reason(error)) from None
        try:
            method = "GET" if payload is None else "POST"
            connection.request(method, urlsplit(replica.url).path + path, payload, self._headers)
            response = connection.getresponse()
            data, status = response.read(), response.status
        except TimeoutError:
            connections.drop(replica.url)
            raise SlowError(f"no answer within {self.config.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            connections.drop(replica.url)
            raise UnreachableError(_reason(error)) from None
        with self._lock:
            self.traffic.sent += len(payload or b"")
            self.traffic.received += len(data)
            self.traffic.requests += status == 200
        if status != 200:
            connections.drop(replica.url)
            self._raise_for(replica, path, status, data)
        try:
            return read(json.loads(data))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UnusableError(f"an answer that is not what was asked for ({_reason(error)})") from None

    def _raise_for(self, replica: Replica, path: str, status: int, data: bytes) -> None:
        told = _message(data)
        if status in _DOWN:
            raise UnreachableError(f"status {status}")
        if status in _AGAIN:
            raise UnusableError(f"status {status}: {told}")
        if status in (401, 403):
            named = self.config.key_env
            key = f"the key in {named} is not accepted" if named else "it wants a key: set teacher.served.key_env"
            raise UserError(f"the teacher server {replica.url} refuses access (status {status}); {key}.")
        raise UserError(f"the teacher server {replica.url} refuses {path} (status {status}): {told}")

    def _next(self, turn: int) -> Replica | None:
        """The replica whose turn it is, or the next one that is not set aside."""
        now = time.monotonic()
        count = len(self.replicas)
        ordered = [self.replicas[(turn + i) % count] for i in range(count)]
        return next((r for r in ordered if r.not_before <= now), None)

    def _set_aside(self, replica: Replica, why: str) -> None:
        with self._lock:
            replica.failures += 1
            replica.not_before = time.monotonic() + self._length(replica.failures)
            replica.why = why
            if self._silent_since is None and all(r.failures for r in self.replicas):
                self._silent_since = time.monotonic()
                told = "; ".join(f"{r.url}: {r.why}" for r in self.replicas)
                log.warning("no teacher server answers (%s); waiting up to %g s", told, self.config.wait_s)

    def _answered(self, replica: Replica) -> None:
        with self._lock:
            if self._silent_since is not None:
                log.warning("the teacher server %s answers again", replica.url)
            replica.failures, replica.not_before, self._silent_since = 0, 0.0, None

    def _wait(self, stop: threading.Event) -> None:
        """Until a replica is to be tried again; raises RunError when none has answered for too long."""
        now = time.monotonic()
        since = self._silent_since
        if since is not None and now - since > self.config.wait_s:
            told = "; ".join(f"{r.url}: {r.why}" for r in self.replicas)
            raise RunError(
                f"no teacher server has answered for {now - since:.0f} s ({told}). The run stands as at its last "
                "checkpoint: start the server again and go on with `kdrl train --resume RUN`, or allow a longer "
                "teacher.served.wait_s."
            )
        self._pause(max(0.01, min(r.not_before for r in self.replicas) - now), stop)

    def _length(self, failures: int) -> float:
        return min(LONGEST_PAUSE_S, self.config.backoff_s * 2.0 ** min(failures - 1, 20))

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        if stop.wait(seconds):
            raise RunError("the teacher was asked no further.")


def _key_header(config: ServedConfig) -> dict[str, str]:
    if config.key_env is None:
        return {}
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise UserError(
            f"teacher.served.key_env names the environment variable {config.key_env}, which is not set; put the "
            f"server's API key into it, as in `export {config.key_env}=...`."
        )
    return {"Authorization": f"Bearer {key}"}


def _unused_proxy() -> str:
    """What to know where the environment names a proxy and no server answers."""
    named = next((name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY") if _environment(name)), None)
    return f" (The proxy that {named} names is not used: the server must be reachable directly.)" if named else ""


def _environment(name: str) -> str:
    return os.environ.get(name, "") or os.environ.get(name.lower(), "")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text)[:200]


def _message(data: bytes) -> str:
    """What a server says of an error, in OpenAI's form or another."""
    try:
        answer = json.loads(data)
        inner = answer.get("error", answer)
        found = inner.get("message", answer) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        found = data.decode("utf-8", "replace")
    return " ".join(str(found).split())[:400] or "nothing said"
