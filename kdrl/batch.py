"""Rollouts of one step as flat tokens, and their split into padded micro-batches by a token budget.

N counts response tokens of the whole step, row by row; a micro-batch holds whole responses, so a term can average over
a response. Padding is on the right, where a causal model cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdrl.tasks import Problem

# Who wrote a response: the present student; the data; the teacher; the student with privileged context; an earlier
# student (replayed); student and teacher in turns; their mixture; gold text with some tokens refilled by the student.
Origin = Literal["student", "gold", "teacher", "privileged", "buffer", "speculative", "mixed", "corrupt"]


@dataclass
class Response:
    """One response to one problem; `token_ids` include the end-of-sequence token when it `ended`.

    `logp` are the student's own log-probs when it was written, `importance` weights of its tokens where another policy
    sampled them, `privileged_ids` the prompt that a self-teacher reads; `judged` says that the verdict is known, and
    `feedback` is what the verifier said beside it.
    """

    problem: Problem
    group: int
    prompt_ids: list[int]
    token_ids: list[int]
    origin: Origin
    ended: bool
    text: str
    logp: list[float] | None = None
    importance: list[float] | None = None
    trained: list[bool] | None = None
    privileged_ids: list[int] | None = None
    reward: float = 0.0
    correct: bool = False
    status: str = "ok"
    judged: bool = False
    feedback: str | None = None


@dataclass(frozen=True)
class Rollouts:
    """A step's responses and their flat tensors: `[N]` per response token, `[B]` per response."""

    responses: tuple[Response, ...]
    tokens_N: Tensor
    row_N: Tensor
    last_N: Tensor
    trained_N: Tensor
    importance_N: Tensor
    reward_B: Tensor
    correct_B: Tensor
    group_B: Tensor
    truncated_B: Tensor
    offsets: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, responses: Sequence[Response], device: torch.device | str = "cpu") -> Rollouts:
        """Flatten responses (each of at least one token) in their order."""
        lengths = [len(r.token_ids) for r in responses]
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        last = torch.zeros(offsets[-1], dtype=torch.bool)
        last[[end - 1 for end, r in zip(offsets[1:], responses, strict=True) if r.ended]] = True
        trained = [flag for r in responses for flag in (r.trained or [True] * len(r.token_ids))]
        importance = [weight for r in responses for weight in (r.importance or [1.0] * len(r.token_ids))]
        rows = torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(lengths, dtype=torch.long))

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            responses=tuple(responses),
            tokens_N=column([t for r in responses for t in r.token_ids], torch.long),
            row_N=rows.to(device),
            last_N=last.to(device),
            trained_N=column(trained, torch.bool),
            importance_N=column(importance, torch.float32),
            reward_B=column([r.reward for r in responses], torch.float32),
            correct_B=column([r.correct for r in responses], torch.bool),
            group_B=column([r.group for r in responses], torch.long),
            truncated_B=column([not r.ended for r in responses], torch.bool),
            offsets=tuple(offsets),
        )

    @property
    def rows(self) -> int:
        """Number of responses B."""
        return len(self.responses)

    @property
    def tokens(self) -> int:
        """Number of response tokens N."""
        return self.offsets[-1]

    def origin_N(self, origins: Sequence[str]) -> Tensor:
        """Tokens of responses that one of `origins` wrote, bool `[N]`."""
        mine = torch.tensor([r.origin in origins for r in self.responses], device=self.row_N.device)
        return mine[self.row_N] if self.rows else self.row_N.bool()

    def span(self, row: int) -> tuple[int, int]:
        """First and past-the-last token index of a response."""
        return self.offsets[row], self.offsets[row + 1]


@dataclass(frozen=True)
class MicroBatch:
    """Whole responses laid out for one forward pass, and where the wanted tokens' predictions stand.

    `index_M` are positions in the step's N tokens; `place_M` the flat B*L positions whose hidden state predicts them;
    `row_M` the response within this micro-batch.
    """

    rows: tuple[int, ...]
    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    index_M: Tensor
    place_M: Tensor
    row_M: Tensor


def _length(response: Response, privileged: bool) -> int:
    prompt = response.privileged_ids if privileged else response.prompt_ids
    return len(prompt or ()) + len(response.token_ids) - 1


def pack_rows(rollouts: Rollouts, rows: Sequence[int], budget: int, *, privileged: bool = False) -> list[list[int]]:
    """Group rows by length so that rows x longest stays within `budget` tokens; a longer single row stands alone."""
    ordered = sorted(rows, key=lambda row: (_length(rollouts.responses[row], privileged), row))
    packs: list[list[int]] = []
    for row in ordered:
        length = _length(rollouts.responses[row], privileged)
        if packs and length * (len(packs[-1]) + 1) <= budget:
            packs[-1].append(row)
        else:
            packs.append([row])
    return packs


def lay_out(
    rollouts: Rollouts, rows: Sequence[int], wanted_N: Tensor, pad_id: int, *, privileged: bool = False
) -> MicroBatch:
    """Pad `rows` on the right into one batch; `wanted_N` says which response tokens will be scored.

    With `privileged` the prompt is the one with the privileged context.
    """
    device = rollouts.tokens_N.device
    responses = [rollouts.responses[row] for row in rows]
    longest = max(_length(r, privileged) for r in responses)
    ids, mask, index, place, local = [], [], [], [], []
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        prompt = (response.privileged_ids if privileged else response.prompt_ids) or []
        # The last token is never an input: nothing is predicted from it.
        text = prompt + response.token_ids[:-1]
        ids.append(text + [pad_id] * (longest - len(text)))
        mask.append([1] * len(text) + [0] * (longest - len(text)))
        start, end = rollouts.span(row)
        chosen = wanted_N[start:end].nonzero().squeeze(1)
        index.append(chosen + start)
        place.append(chosen + (i * longest + len(prompt) - 1))
        local.append(torch.full_like(chosen, i))
    ids_BL, mask_BL = (torch.tensor(x, dtype=torch.long, device=device) for x in (ids, mask))
    return MicroBatch(tuple(rows), ids_BL, mask_BL, torch.cat(index), torch.cat(place), torch.cat(local))
