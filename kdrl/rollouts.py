"""From problems to verified rollouts of one step: who writes, what is resampled, what is filtered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kdrl.batch import Response, Rollouts
from kdrl.seeds import derive
from kdrl.sources.config import SourceConfig
from kdrl.tasks import Problem, ResponseInfo, VerifierPool


class Source(Protocol):
    """Writes responses to problems; groups are numbered from `first_group`."""

    def write(self, problems: Sequence[Problem], first_group: int, seed: int) -> list[Response]:
        """All responses of all problems, group by group."""
        ...


@dataclass
class Collected:
    """A step's responses, and what was thrown away on the way."""

    responses: list[Response]
    generated: int = 0
    dropped_groups: int = 0
    privileged_tried: int = 0
    verify_seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)


class Collector:
    """Writes and verifies a step's responses; the data position is all its state.

    `wanted(responses)` says, for DAPO's dynamic sampling (2503.14476), whether a group of equal rewards is still
    wanted by some term, as all-wrong groups are by a distillation term.
    """

    def __init__(
        self,
        config: SourceConfig,
        sources: dict[str, Source],
        next_problem: Callable[[int], Problem],
        pool: VerifierPool | None,
        *,
        prompts: int,
        rounds: int,
        max_tokens: int,
        seed: int,
        device: str,
    ) -> None:
        self.config, self.sources, self.next_problem, self.pool = config, sources, next_problem, pool
        self.prompts, self.rounds, self.max_tokens, self.seed, self.device = prompts, rounds, max_tokens, seed, device
        self.position = 0

    def _writer(self, step: int) -> str:
        if self.config.kind == "privileged":
            return "student"
        if self.config.kind != "mixture":
            return self.config.kind
        assert self.config.share is not None
        coin = derive(self.seed, "mixture", step) / float(1 << 63)
        return "student" if coin < self.config.share else self.config.other

    def _draw(self, count: int) -> list[Problem]:
        problems = [self.next_problem(self.position + i) for i in range(count)]
        self.position += count
        return problems

    def _verify(self, responses: list[Response], out: Collected) -> None:
        if self.pool is None:
            return
        asked = [r for r in responses if r.origin != "gold"]
        start = time.perf_counter()
        items = [(r.text, r.problem, ResponseInfo(len(r.token_ids), not r.ended, self.max_tokens)) for r in asked]
        for response, verdict in zip(asked, self.pool.score(items), strict=True):
            response.reward, response.correct, response.status = verdict.reward, verdict.correct, verdict.status
            out.statuses[verdict.status] += 1
        out.verify_seconds += time.perf_counter() - start

    def collect(self, step: int, wanted: Callable[[Rollouts], set[int]]) -> Collected:
        """Responses of one step; with dynamic sampling, until `prompts` groups have a signal or the rounds are up."""
        out = Collected([])
        writer = self._writer(step)
        group, useful = 0, 0
        # Gold and teacher text is not sampled from the policy: another round would not change its rewards.
        rounds = self.rounds if writer == "student" else 0
        for turn in range(rounds + 1):
            problems = self._draw(self.prompts - useful)
            fresh = self.sources[writer].write(problems, group, derive(self.seed, "rollout", step, turn))
            out.generated += len(fresh)
            self._verify(fresh, out)
            if rounds == 0:
                out.responses = fresh
                break
            useful += self._keep_useful(fresh, wanted, out, last=turn == rounds)
            group += len(problems)
            if useful >= self.prompts:
                break
        if self.config.kind == "privileged":
            out.responses += self._privileged(out, step)
        return out

    def _keep_useful(
        self, fresh: list[Response], wanted: Callable[[Rollouts], set[int]], out: Collected, *, last: bool
    ) -> int:
        """Keep groups whose rewards differ, and groups that another term wants; count the former."""
        rewards: dict[int, set[float]] = {}
        for response in fresh:
            rewards.setdefault(response.group, set()).add(response.reward)
        mixed = {group for group, seen in rewards.items() if len(seen) > 1}
        kept = mixed | wanted(Rollouts.of(fresh, self.device))
        if self.config.kind == "privileged":
            # Groups with no right answer are what the privileged student is for.
            kept |= rewards.keys() - {r.group for r in fresh if r.correct}
        if last and not kept and not out.responses:
            # A step must hold something: equal rewards then give no gradient, which is the truth.
            kept = set(rewards)
        out.responses += [r for r in fresh if r.group in kept]
        out.dropped_groups += len(rewards) - len(kept)
        return len(mixed)

    def _privileged(self, out: Collected, step: int) -> list[Response]:
        solved = {r.group for r in out.responses if r.correct}
        failed = {r.group: r.problem for r in out.responses if r.group not in solved}
        if not failed:
            return []
        tried = self.sources["privileged"].write(list(failed.values()), 0, derive(self.seed, "privileged", step))
        # Groups of their own: a mask or an advantage of the student's group must not see them.
        free = 1 + max(r.group for r in out.responses)
        for response in tried:
            response.group += free
        self._verify(tried, out)
        out.privileged_tried = len(tried)
        return [r for r in tried if r.correct]
