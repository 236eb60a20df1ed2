"""What every engine takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """One response: its tokens, with the end token when one was written, and each token's log-probability in nats.

    `logp` is under the unfiltered policy at the stated temperature (at 1 for greedy). `ended` is False for a response
    that was cut at the token limit; it is True after an end token or a stop string.
    """

    token_ids: list[int]
    logp: list[float]
    ended: bool


class Engine(Protocol):
    """Writes responses to prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        seed: int,
        done: Callable[[int, int, Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """Samples [prompt][sample]; the same seed gives the same samples whatever else is in the batch.

        `done(prompt, sample, written)` is called once for each sample, as early as the engine knows that it is whole,
        and again for those that are written anew because memory ran out; it changes no sample.
        """
        ...
