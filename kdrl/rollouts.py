"""From problems to verified rollouts of one step: who writes, what is resampled, what is filtered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.objectives.schedules import Moment
from kdrl.seeds import derive
from kdrl.sources.base import Collected, Judge, Request, Source, restore_to, state_of
from kdrl.tasks import Problem

__all__ = ["Collected", "Collector"]

SAMPLED = ("student", "mixed")


class Collector:
    """Writes a step's responses and has them verified; the data position and what the source keeps are its state.

    `wanted(responses)` says, for DAPO's dynamic sampling (2503.14476), whether a group of equal rewards is still
    wanted by some term, as all-wrong groups are by a distillation term. `privileged` writes for groups that failed.
    """

    def __init__(
        self,
        source: Source,
        next_problem: Callable[[int], Problem],
        judge: Judge,
        *,
        prompts: int,
        rounds: int,
        seed: int,
        device: str,
        privileged: Source | None = None,
    ) -> None:
        self.source, self.next_problem, self.judge, self.privileged = source, next_problem, judge, privileged
        self.prompts, self.rounds, self.seed, self.device = prompts, rounds, seed, device
        self.position = 0

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the source keeps from step to step."""
        return state_of(self.source)

    def restore(self, position: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a position in the data and what `state` gave there."""
        self.position = position
        restore_to(self.source, values, tensors)

    def _request(self, count: int, group: int, seed: int, moment: Moment, out: Collected) -> Request:
        positions = tuple(range(self.position, self.position + count))
        self.position += count
        problems = [self.next_problem(position) for position in positions]
        return Request.of(problems, group, seed, positions=positions, moment=moment, out=out)

    def collect(self, moment: Moment, wanted: Callable[[Rollouts], set[int]]) -> Collected:
        """Responses of one step with their verdicts."""
        out = self.begin(moment, wanted)
        self.settle(out)
        return out

    def settle(self, out: Collected) -> None:
        """Wait for the verdicts that are still to come."""
        self.judge(out.responses, out)

    def begin(self, moment: Moment, wanted: Callable[[Rollouts], set[int]]) -> Collected:
        """Responses of one step, being verified; with dynamic sampling, until `prompts` groups have a signal.

        What resamples or writes for failed groups waits for verdicts here; `settle` waits for the rest.
        """
        out = Collected()
        step, group, useful = moment.step, 0, 0
        for turn in range(self.rounds + 1):
            seed = derive(self.seed, "rollout", step, turn)
            request = self._request(self.prompts - useful, group, seed, moment, out)
            fresh = self.source.write(request)
            self.judge.send(fresh)
            # Gold and teacher text is not sampled from the policy: another round would not change its rewards.
            if not self.rounds or not any(r.origin in SAMPLED for r in fresh):
                out.responses = fresh
                break
            self.judge(fresh, out)
            useful += self._keep_useful(fresh, wanted, out, last=turn == self.rounds)
            group += len(request.problems)
            if useful >= self.prompts:
                break
        if self.privileged is not None:
            self.judge(out.responses, out)
            out.responses += self._privileged(self.privileged, out, moment)
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
        if self.privileged is not None:
            # Groups with no right answer are what the privileged student is for.
            kept |= rewards.keys() - {r.group for r in fresh if r.correct}
        if last and not kept and not out.responses:
            # A step must hold something: equal rewards then give no gradient, which is the truth.
            kept = set(rewards)
        out.responses += [r for r in fresh if r.group in kept]
        out.dropped_groups += len(rewards) - len(kept)
        return len(mixed)

    def _privileged(self, privileged: Source, out: Collected, moment: Moment) -> list[Response]:
        solved = {r.group for r in out.responses if r.correct}
        failed = {r.group: r.problem for r in out.responses if r.group not in solved}
        if not failed:
            return []
        # Groups of their own: a mask or an advantage of the student's group must not see them.
        free = 1 + max(r.group for r in out.responses)
        seed = derive(self.seed, "privileged", moment.step)
        tried = privileged.write(Request.of(list(failed.values()), free, seed, moment=moment, out=out))
        self.judge(tried, out)
        kept = [r for r in tried if r.correct]
        out.tell("privileged_right", len(kept), len(tried))
        return kept
