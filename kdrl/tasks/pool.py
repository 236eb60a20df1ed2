"""Verifiers in worker processes: one that hangs, crashes or prints costs its own response and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType, TracebackType
from typing import Any, Self

import cloudpickle
from pebble import ProcessExpired, ProcessPool

from kdrl.errors import UserError
from kdrl.tasks import worker
from kdrl.tasks.base import Problem, ResponseInfo, Verdict
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.scoring import build_scorer, shaped

log = logging.getLogger(__name__)
_launching = threading.Lock()


class _Process(SpawnProcess):
    """A spawned process that does not run the caller's script again.

    Spawning imports the parent's main module, which would train twice in a script without a __main__ guard, and load
    torch in every worker. cloudpickle sends what is defined there by value, so the worker needs no main module.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _launching:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            # A Ctrl-C while the worker imports would print its traceback; it inherits the mask and ignores it later.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process  # type: ignore[assignment]


class VerifierPool:
    """Scores responses in `workers` processes; a verification that runs longer than `timeout_s` is stopped.

    Only the verifier's own time counts: neither the wait for a free worker nor its start. `counts` holds how many were
    scored by status (ok, timeout, crash, printed). A response may be sent before its verdict is asked for; a verdict
    belongs to the text and the problem that were sent. A context manager; defaults come from the recipe. Not to be
    shared between threads. Raises UserError for a verifier that cannot be built or loaded.
    """

    def __init__(self, task_config: TaskConfig, workers: int | None = None, timeout_s: float | None = None) -> None:
        self.config = task_config
        self.timeout_s = timeout_s if timeout_s is not None else task_config.verifier.timeout_s
        self.counts: dict[str, int] = {"ok": 0, "timeout": 0, "crash": 0, "printed": 0}
        self.scorer = build_scorer(task_config)
        # By id and text; the problem is kept so that no other one can be given its id.
        self._sent: dict[tuple[int, str], list[tuple[Problem, Future[worker.Outcome]]]] = {}
        self._pool = ProcessPool(
            max_workers=workers if workers is not None else task_config.verifier.workers,
            initializer=worker.start,
            initargs=(list(sys.path), cloudpickle.dumps(self.scorer), os.getpid()),
            context=_Context(),  # type: ignore[arg-type]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, busy or not."""
        self._pool.stop()
        self._pool.join()

    def answer(self, response: str) -> str | None:
        """The part of a response that the verifier is given (for majority votes); None where there is none."""
        return self.scorer.answer(response)

    def send(self, response: str, problem: Problem) -> None:
        """Have a response verified from now on, for a `score` to come."""
        self._keep(response, problem, self._schedule(response, problem))

    def send_only(self, items: Sequence[tuple[str, Problem]]) -> None:
        """Have just these verified from now on: what is missing is sent, and what was sent of others cancelled."""
        futures = [self._claim(*item) for item in items]
        dropped, self._sent = self._sent, {}
        for _, future in (each for sent in dropped.values() for each in sent):
            future.cancel()
        for item, future in zip(items, futures, strict=True):
            self._keep(*item, future)

    def score(self, items: Sequence[tuple[str, Problem, ResponseInfo]]) -> list[Verdict]:
        """One verdict an item, in order, as soon as all are known; what was not sent yet is sent."""
        futures = [self._claim(response, problem) for response, problem, _ in items]
        return [self._verdict(future, *item) for future, item in zip(futures, items, strict=True)]

    def _keep(self, response: str, problem: Problem, future: Future[worker.Outcome]) -> None:
        self._sent.setdefault((id(problem), response), []).append((problem, future))

    def _claim(self, response: str, problem: Problem) -> Future[worker.Outcome]:
        """What was sent of a response and is claimed by nobody else, or is sent now."""
        sent = self._sent.pop((id(problem), response), [])
        if not sent:
            return self._schedule(response, problem)
        if sent[1:]:
            self._sent[id(problem), response] = sent[1:]
        return sent[0][1]

    def _schedule(self, response: str, problem: Problem) -> Future[worker.Outcome]:
        payload = cloudpickle.dumps((response, problem))
        return self._pool.schedule(worker.verify, args=(payload,), timeout=self.timeout_s)

    def _verdict(self, future: Future[worker.Outcome], response: str, problem: Problem, info: ResponseInfo) -> Verdict:
        status, score, formed, why = self._outcome(future)
        if status == "broken":
            raise UserError(f"the verifier cannot be loaded in a worker process: {why}.")
        if status != "ok" and not self.counts[status]:
            log.warning(
                "the verifier's status is %r for a response to problem %s (%s): it scores 0, and so does every further "
                "one; they are counted and not named again.",
                status,
                problem.id,
                why,
            )
        self.counts[status] += 1
        feedback = (why or None) if status == "ok" else None
        return Verdict(shaped(score, formed, info, self.config), score == 1.0, status, feedback)

    def _outcome(self, future: Future[worker.Outcome]) -> worker.Outcome:
        try:
            return future.result()
        except TimeoutError:
            return "timeout", 0.0, False, f"it ran longer than {self.timeout_s:g} s"
        except ProcessExpired as error:
            return "crash", 0.0, False, f"its process ended with status {error.exitcode}"
