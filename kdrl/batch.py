"""Rollouts of one step as flat tokens, and their split into micro-batches by a token budget.

N counts response tokens of the whole step, row by row; a micro-batch holds all wanted tokens of its responses, so a
term can average over a response. Packed, it is one row of tokens in which a prompt stands once for all its responses;
padded, a response a row, with padding on the right, where a causal model cannot see it. What stands after a response's
last wanted token is left out of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
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
        """Flatten responses in their order; raises ValueError for one without a token."""
        lengths = [len(r.token_ids) for r in responses]
        if 0 in lengths:
            raise ValueError(f"response {lengths.index(0)} of {len(lengths)} has no token, so nothing could be scored")
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

    def take_verdicts(self) -> None:
        """Read rewards and verdicts that the responses were given since this was made of them."""
        for values_B, found in ((self.reward_B, "reward"), (self.correct_B, "correct")):
            values_B.copy_(torch.tensor([getattr(r, found) for r in self.responses], dtype=values_B.dtype))

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
class Segment:
    """Consecutive tokens of a packed row that see themselves causally, and all of segment number `parent`."""

    start: int
    length: int
    parent: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Responses laid out for one forward pass, and where the wanted tokens' predictions stand.

    `index_M` are positions in the step's N tokens; `place_M` the flat B*L positions whose hidden state predicts them;
    `row_M` the response within this micro-batch; `longest` tokens that one response is read with. A packed one has
    `segments`, and B is 1.
    """

    rows: tuple[int, ...]
    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    index_M: Tensor
    place_M: Tensor
    row_M: Tensor
    longest: int
    segments: tuple[Segment, ...] = ()

    @property
    def cost(self) -> int:
        """Tokens as a budget counts them; half of that as a budget splits it, unless it is one response."""
        parents = [(self.segments[s.parent].length, s.length) for s in self.segments if s.parent is not None]
        return self.input_ids_BL.numel() + int(_COPY * sum(map(sum, parents)))


# Where attention takes a mask, keys and values of a shared prompt are copied for each response: this part of what a
# token costs in a layer.
_COPY = 1 / 8


@dataclass
class LaidOut:
    """The micro-batch that was laid out last: tokens as a budget counts them, and responses."""

    tokens: int = 0
    rows: int = 0


_LAST: ContextVar[LaidOut | None] = ContextVar("_LAST", default=None)


@contextmanager
def last_layout() -> Iterator[LaidOut]:
    """Know, while inside, which micro-batch is at work, whoever made it of whatever texts."""
    found = LaidOut()
    before = _LAST.set(found)
    try:
        yield found
    finally:
        _LAST.reset(before)


def read_lengths(rollouts: Rollouts, wanted_N: Tensor) -> list[int | None]:
    """How many tokens of each response are read to predict its last wanted one; None where none is wanted."""
    ends = wanted_N.cpu().nonzero().squeeze(1)
    last_B = torch.full((rollouts.rows,), -1).scatter_reduce_(0, rollouts.row_N.cpu()[ends], ends, "amax")
    pairs = zip(last_B.tolist(), rollouts.offsets, strict=False)
    return [None if last < 0 else last - start for last, start in pairs]


def _prompt(response: Response, privileged: bool) -> list[int]:
    return (response.privileged_ids if privileged else response.prompt_ids) or []


def longest_read(rollouts: Rollouts, rows: Sequence[int], wanted_N: Tensor, *, privileged: bool = False) -> int:
    """The most tokens that one of `rows` is read with, prompt included."""
    read = read_lengths(rollouts, wanted_N)
    pairs = ((rollouts.responses[row], read[row]) for row in rows)
    return max((len(_prompt(r, privileged)) + n for r, n in pairs if n is not None), default=0)


def pack_rows(
    rollouts: Rollouts,
    rows: Sequence[int],
    wanted_N: Tensor,
    budget: int,
    *,
    packed: bool = False,
    privileged: bool = False,
) -> list[list[int]]:
    """Group the rows with a wanted token by length, `budget` tokens at a time; a longer single row stands alone.

    A budget counts rows x longest, or packed a prompt once for its rows and an eighth more of what each row attends to.
    Rows of one prompt stay together where they fit.
    """
    read = read_lengths(rollouts, wanted_N)
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row in rows:
        length = read[row]
        if length is not None:
            prompt = _prompt(rollouts.responses[row], privileged)
            groups.setdefault(tuple(prompt), []).append((length, row))
    for members in groups.values():
        members.sort()
    if packed:
        return _packs(groups, budget)
    ordered = sorted((len(prompt) + length, row) for prompt, members in groups.items() for length, row in members)
    packs: list[list[int]] = []
    for length, row in ordered:
        if packs and length * (len(packs[-1]) + 1) <= budget:
            packs[-1].append(row)
        else:
            packs.append([row])
    return packs


def _packs(groups: dict[tuple[int, ...], list[tuple[int, int]]], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0.0
    for prompt, members in sorted(groups.items(), key=lambda item: (len(item[0]) + item[1][-1][0], item[1])):
        while members:
            costs = [len(prompt) + n for n in accumulate(length for length, _ in members)]
            more = [_COPY * (cost + (n - 1) * len(prompt)) for n, cost in enumerate(costs, start=1)]
            costs = [costs[0], *(a + b for a, b in zip(costs[1:], more[1:], strict=True))]
            if costs[-1] > room:
                packs.append([])
                room = budget
            count = max(1, sum(cost <= room for cost in costs))
            packs[-1] += [row for _, row in members[:count]]
            room -= costs[count - 1]
            members = members[count:]
    return packs


@dataclass
class _Form:
    """Token ids of a layout, and of each response the place of its prompt's last token and of its own first."""

    ids: list[list[int]]
    prompt_end: list[int]
    own_start: list[int]
    segments: list[Segment] = field(default_factory=list)


def lay_out(
    rollouts: Rollouts,
    rows: Sequence[int],
    wanted_N: Tensor,
    pad_id: int,
    *,
    packed: bool = False,
    privileged: bool = False,
) -> MicroBatch:
    """Put `rows` into one batch, packed or padded; `wanted_N` says which response tokens will be scored.

    With `privileged` the prompt is the one with the privileged context.
    """
    device = rollouts.tokens_N.device
    read = read_lengths(rollouts, wanted_N)
    responses = [rollouts.responses[row] for row in rows]
    texts = [(_prompt(r, privileged), r.token_ids[: read[row] or 0]) for row, r in zip(rows, responses, strict=True)]
    longest = max(len(prompt) + len(own) for prompt, own in texts)
    form = _packed(texts, pad_id) if packed else _padded(texts, longest, pad_id)
    lengths = torch.tensor([len(row) for row in form.ids])
    width = max(map(len, form.ids))
    ids_BL = torch.tensor([row + [pad_id] * (width - len(row)) for row in form.ids])
    mask_BL = (torch.arange(width) < lengths[:, None]).long()

    spans = [torch.arange(*rollouts.span(row)) for row in rows]
    row_M = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(span) for span in spans]))
    index_M, offset_M = torch.cat(spans), torch.cat([torch.arange(len(span)) for span in spans])
    kept_M = wanted_N.cpu()[index_M]
    index_M, offset_M, row_M = index_M[kept_M], offset_M[kept_M], row_M[kept_M]
    end_B, own_B = torch.tensor(form.prompt_end), torch.tensor(form.own_start)
    place_M = torch.where(offset_M == 0, end_B[row_M], own_B[row_M] + offset_M - 1)
    ids_BL, mask_BL, index_M, place_M, row_M = (x.to(device) for x in (ids_BL, mask_BL, index_M, place_M, row_M))
    micro = MicroBatch(tuple(rows), ids_BL, mask_BL, index_M, place_M, row_M, longest, tuple(form.segments))
    if (last := _LAST.get()) is not None:
        last.tokens, last.rows = micro.cost, len(rows)
    return micro


def _padded(texts: Sequence[tuple[list[int], list[int]]], longest: int, pad_id: int) -> _Form:
    starts = [i * longest + len(prompt) for i, (prompt, _) in enumerate(texts)]
    return _Form([prompt + own for prompt, own in texts], [start - 1 for start in starts], starts)


def _packed(texts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> _Form:
    """Prompts of several responses, then whole responses with a prompt of their own, then those of shared prompts."""
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(texts):
        sharing.setdefault(tuple(prompt), []).append(i)
    shared = sorted((key for key, members in sharing.items() if len(members) > 1), key=len)
    alone = sorted((m[0] for m in sharing.values() if len(m) == 1), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    form = _Form([[]], [0] * len(texts), [0] * len(texts))
    (row,) = form.ids

    def add(tokens: Sequence[int], parent: int | None = None) -> int:
        form.segments.append(Segment(len(row), len(tokens), parent))
        row.extend(tokens)
        return form.segments[-1].start

    ends = [add(key) + len(key) - 1 for key in shared]
    for i in alone:
        prompt, own = texts[i]
        form.own_start[i] = add(prompt + own) + len(prompt)
        form.prompt_end[i] = form.own_start[i] - 1
    for number, (key, end) in enumerate(zip(shared, ends, strict=True)):
        for i in sorted(sharing[key], key=lambda i: len(texts[i][1])):
            form.prompt_end[i] = end
            if texts[i][1]:
                form.own_start[i] = add(texts[i][1], number)
    if filler := -len(row) % _even(len(row)):
        add([pad_id] * filler)
    return form


def _even(tokens: int) -> int:
    """What a packed row's length is made a multiple of: at most a thirty-second of it, so that few lengths come up.

    oneDNN keeps code and scratch for every shape of a product: with ever new lengths a run's memory grows for hours.
    """
    return 1 << max(0, tokens.bit_length() - 6)
