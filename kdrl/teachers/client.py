"""Requests to replicas of one server: many at a time, repeated where that may help, answered in the order asked.

A replica that cannot be reached is left alone for a while and tried again; pauses double and hold no chance, so a run
does the same each time. One that was away may have come back with another model: it is examined before it is used.
Proxies that the environment names are not used: most teachers are on this machine or the next, which a proxy cannot
reach. Left out: streaming; noticing that a server was replaced while nothing was asked of it, unless its model's name
is another.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kdrl.errors import RunError, UserError
from kdrl.teachers.served_config import ServedConfig
from kdrl.teachers.wire import (
    AbsentError,
    Connections,
    Replica,
    SlowError,
    Traffic,
    UnreachableError,
    UnusableError,
    key_header,
    message,
    reason,
    unused_proxy,
)

log = logging.getLogger("kdrl")
T = TypeVar("T")

LONGEST_PAUSE_S = 10.0
_DOWN = (502, 503, 504)
_AGAIN = (408, 425, 429, 500)


class Client:
    """Speaks JSON with the replicas of a ServedConfig.

    `examine` is given a client of one replica that was away, and raises UserError where it is not to be used.
    """

    def __init__(self, config: ServedConfig) -> None:
        self.config = config
        self.replicas = [Replica(url) for url in config.urls]
        self.traffic = Traffic()
        self.examine: Callable[[Client], None] | None = None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"} | key_header(config)
        self._lock = threading.Lock()
        self._silent_since: float | None = None
        self._examining: list[Client] = []
        self._under_way: list[tuple[threading.Event, list[Connections]]] = []
        self._closed = False

    def alone(self, url: str, wait_s: float) -> Client:
        """A client of one replica, which waits so long for it; its traffic is counted here."""
        found = Client(self.config.model_copy(update={"urls": (url,), "wait_s": wait_s}))
        found.traffic, found._lock = self.traffic, self._lock
        found.replicas[0].context = next(r.context for r in self.replicas if r.url == url)
        return found

    def lost(self, url: str, why: str) -> None:
        """A replica that no longer answers is examined when it does."""
        self._set_aside(next(r for r in self.replicas if r.url == url), why)

    def ask_each(self, path: str) -> dict[str, Any]:
        """What every replica that lives answers to a GET; raises UserError when none does."""
        found = self.answers(path)
        if not found:
            told = "; ".join(f"{r.url}: {r.why}" for r in self.replicas)
            raise UserError(
                f"no teacher server answers ({told}). Start one with `kdrl serve-teacher MODEL`, or mend "
                f"teacher.served.urls.{unused_proxy()}"
            )
        return found

    def answers(self, path: str) -> dict[str, Any]:
        """What every replica that lives answers to a GET; the others are examined when they do."""
        found = {}
        connections = Connections(min(10.0, self.config.timeout_s))
        try:
            for replica in self.replicas:
                try:
                    found[replica.url] = self._exchange(replica, connections, path, None, lambda answer: answer)
                except (UnreachableError, UnusableError) as error:
                    replica.known, replica.why = False, str(error)
        finally:
            for url in self.config.urls:
                connections.drop(url)
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
        all_connections: list[Connections] = []
        if self._closed:
            raise RunError("the teacher was asked no further.")
        under_way = (stop, all_connections)
        self._under_way.append(under_way)

        def work(index: int) -> T:
            if not hasattr(mine, "connections"):
                mine.connections = Connections(self.config.timeout_s)
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
                for each in list(self._examining):
                    each._close()
                raise
            finally:
                pool.shutdown()
                self._under_way.remove(under_way)
                for connections in all_connections:
                    for url in list(connections.open):
                        connections.drop(url)

    def _close(self) -> None:
        self._closed = True
        for stop, all_connections in list(self._under_way):
            stop.set()
            for connections in all_connections:
                connections.cut()

    def _deliver(
        self,
        index: int,
        connections: Connections,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        stop: threading.Event,
    ) -> T:
        payload = json.dumps(body, separators=(",", ":")).encode()
        failures = turn = 0
        while True:
            if stop.is_set():
                raise RunError("the teacher was asked no further.")
            replica, unknown = self._next(index + turn)
            if replica is None:
                self._wait(stop)
                continue
            try:
                if unknown and not self._admit(replica):
                    continue
                answer = self._exchange(replica, connections, path, payload, read)
            except AbsentError as error:
                self._refuse(replica, str(error), error)
                continue
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
            with self._lock:
                self.traffic.repeated += 1

    def _exchange(
        self,
        replica: Replica,
        connections: Connections,
        path: str,
        payload: bytes | None,
        read: Callable[[Any], T],
    ) -> T:
        """One request and its answer."""
        try:
            connection = connections.to(replica.url)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnreachableError(reason(error)) from None
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
            raise UnreachableError(reason(error)) from None
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
            raise UnusableError(f"an answer that is not what was asked for ({reason(error)})") from None

    def _raise_for(self, replica: Replica, path: str, status: int, data: bytes) -> None:
        told = message(data)
        if status in _DOWN:
            raise UnreachableError(f"status {status}")
        if status in _AGAIN:
            raise UnusableError(f"status {status}: {told}")
        if status in (401, 403):
            named = self.config.key_env
            key = f"the key in {named} is not accepted" if named else "it wants a key: set teacher.served.key_env"
            raise UserError(f"the teacher server {replica.url} refuses access (status {status}); {key}.")
        kind = AbsentError if status == 404 else UserError
        raise kind(f"the teacher server {replica.url} refuses {path} (status {status}): {told}")

    def _next(self, turn: int) -> tuple[Replica | None, bool]:
        """The replica whose turn it is, or the next that may be asked; and whether the caller must examine it."""
        now, count = time.monotonic(), len(self.replicas)
        with self._lock:
            ordered = [self.replicas[(turn + i) % count] for i in range(count)]
            found = next((r for r in ordered if r.ready(now)), None)
            unknown = found is not None and not found.known and self.examine is not None
            if found is not None and unknown:
                found.busy = True
        return found, unknown

    def _admit(self, replica: Replica) -> bool:
        """Whether a replica that was away may be used; raises UserError when it may not and no other is left."""
        assert self.examine is not None
        alone = self.alone(replica.url, 0.0)
        self._examining.append(alone)
        try:
            self.examine(alone)
        except UserError as error:
            told = f"what answers there after it was away will not do: {error}"
            ended = f"{told} Start the right server and go on with `kdrl train --resume RUN`."
            self._refuse(replica, told, UserError(f"the teacher server {replica.url}: {ended}"))
            return False
        except RunError as error:
            raise UnreachableError(alone.replicas[0].why or str(error)) from None
        else:
            replica.known = True
            return True
        finally:
            self._examining.remove(alone)
            replica.busy = False

    def _refuse(self, replica: Replica, why: str, error: UserError) -> None:
        """Leave a replica out for the rest of the run; the error is raised when no other is left."""
        with self._lock:
            again, replica.refused, replica.why = replica.refused, True, why
            if all(r.refused for r in self.replicas):
                raise error
            self._note_silence()
        if not again:
            log.warning("the teacher server %s is left out for the rest of the run: %s", replica.url, why)

    def _set_aside(self, replica: Replica, why: str) -> None:
        with self._lock:
            replica.failures += 1
            replica.not_before = time.monotonic() + self._length(replica.failures)
            replica.known, replica.why = False, why
            self._note_silence()

    def _note_silence(self) -> None:
        if self._silent_since is None and all(r.failures or r.refused for r in self.replicas):
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
        since, examined = self._silent_since, any(r.busy for r in self.replicas)
        if since is not None and not examined and now - since > self.config.wait_s:
            told = "; ".join(f"{r.url}: {r.why}" for r in self.replicas)
            raise RunError(
                f"no teacher server has answered for {now - since:.0f} s ({told}). The run stands as at its last "
                "checkpoint: start the server again and go on with `kdrl train --resume RUN`, or allow a longer "
                "teacher.served.wait_s."
            )
        soonest = min((r.not_before for r in self.replicas if not r.refused), default=now)
        self._pause(max(0.01, soonest - now), stop)

    def _length(self, failures: int) -> float:
        return min(LONGEST_PAUSE_S, self.config.backoff_s * 2.0 ** min(failures - 1, 20))

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        if stop.wait(seconds):
            raise RunError("the teacher was asked no further.")
