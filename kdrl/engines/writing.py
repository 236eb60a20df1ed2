"""Choosing token after token for many responses, with no more rows at a time than asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.engines.base import Sample
from kdrl.engines.decoding import Grows
from kdrl.engines.sampling import StopStrings

# Steps between two looks at how many rows are still alive: a look makes a GPU wait.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_GPU = 8
# Dropping finished rows copies the cache, which costs about this many steps of the rows that stay.
_COMPACTION_STEPS = 0.5
# Letting waiting prompts in costs about this many steps of all rows, whatever their number.
_REFILL_STEPS = 1.0

# fn(hidden, uniforms [B, ...]) -> tokens [B] and float data about each, [B, ...].
Chooser = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
# fn(prompts) -> rows that begin with them.
Start = Callable[[Sequence[Sequence[int]]], Grows]
# fn(number of the response, its tokens, the chooser's data about each, whether it ended by itself)
Tell = Callable[[int, list[int], list[Any], bool], None]


@dataclass(frozen=True)
class Written:
    """Finished responses: tokens `[R, T]`, the chooser's data `[R, T, ...]`, lengths, and which ended by themselves."""

    token_RT: Tensor
    data_RT: Tensor
    length_R: Tensor
    ended_R: Tensor

    def rows(self) -> Iterator[tuple[list[int], list[Any], bool]]:
        """Tokens, data and end of each response."""
        columns = (self.token_RT.tolist(), self.data_RT.tolist())
        for token, data, n, ended in zip(*columns, self.length_R.tolist(), self.ended_R.tolist(), strict=True):
            yield token[:n], data[:n], ended

    def samples(self) -> list[Sample]:
        """One Sample a response, where the data are log-probs."""
        return [Sample(token, logp, ended) for token, logp, ended in self.rows()]


class Writer:
    """Writes R responses, `max_rows` at a time, each until it ends or has as many tokens as uniforms `[R, T, ...]`.

    `tell` is called once for each response, at the first look after it was finished.
    """

    def __init__(
        self,
        start: Start,
        uniform_RT: Tensor,
        eos_ids: Sequence[int],
        choose: Chooser,
        stops: StopStrings | None,
        tell: Tell | None = None,
    ) -> None:
        self._start, self._choose, self._stops, self._tell = start, choose, stops, tell
        self._told: set[int] = set()
        self._count, self._steps = uniform_RT.shape[:2]
        self._uniform_RT, self._eos_ids = uniform_RT, tuple(eos_ids)
        self._data_RT: Tensor | None = None

    def write(self, prompts: Sequence[Sequence[int]], max_rows: int, refill: bool) -> Written:
        """Responses to R prompts; with `refill` no prompt may be longer than one before it."""
        waiting = list(range(self._count))
        # Rows that cannot be refilled go in as few waves as fit, of nearly equal size.
        size = max_rows if refill else -(-self._count // -(-self._count // max_rows))
        while waiting:
            rows = self._start([prompts[i] for i in waiting[:size]])
            if self._data_RT is None:
                self._prepare(rows.device)
            slot_B = torch.tensor(waiting[:size], device=rows.device)
            waiting = waiting[size:]
            self._run(rows, slot_B, waiting if refill else [], prompts)
            del rows  # before the next ones are made: two caches need not live at once
        return self._written(slice(None))

    def _written(self, which: slice | list[int]) -> Written:
        assert self._data_RT is not None
        columns = (self._token_RT[which, : self._steps], self._data_RT[which, : self._steps])
        return Written(*columns, self._length_R[which], self._ended_R[which])

    def _prepare(self, device: torch.device) -> None:
        # One more column than steps: where finished rows write until they are dropped.
        self._token_RT = torch.zeros(self._count, self._steps + 1, dtype=torch.long, device=device)
        self._data_RT = torch.zeros(0, device=device)
        self._uniform_RT = self._uniform_RT.to(device)
        self._length_R = torch.zeros(self._count, dtype=torch.long, device=device)
        self._ended_R = torch.zeros(self._count, dtype=torch.bool, device=device)
        self._eos_E = torch.tensor(self._eos_ids, device=device)

    def _run(self, rows: Grows, slot_B: Tensor, queue: list[int], prompts: Sequence[Sequence[int]]) -> None:
        """Write until all rows are finished and nothing of the queue is left; takes from the queue."""
        look_every = _LOOK_EVERY.get(rows.device.type, _LOOK_EVERY_GPU)
        time_B = torch.zeros_like(slot_B)
        alive_B = torch.ones_like(slot_B, dtype=torch.bool)
        wasted, turn, newest = 0, 0, 0
        while True:
            token_B, over_B = self._place(rows, slot_B, time_B)
            alive_B = alive_B & ~over_B
            time_B = torch.where(alive_B, time_B + 1, self._steps)
            turn += 1
            # The rows that came last are over by then; a step more could pass the model's context.
            if turn % look_every == 0 or turn == newest + self._steps:
                alive = int(alive_B.sum())
                if self._tell is not None and alive < len(slot_B):
                    self._tell_finished(self._tell, slot_B[~alive_B].tolist())
                if alive == 0 and not queue:
                    return
                # Like renting until the rent has paid the price: act once the dead rows have cost as much.
                wasted += (len(slot_B) - alive) * look_every
                if queue and (alive == 0 or wasted > _REFILL_STEPS * len(slot_B)):
                    # Finished rows need no token; those that go on must have it before others join them.
                    wasted, newest = 0, turn
                    rows.step(token_B)
                    slot_B, time_B, alive_B = self._refill(rows, slot_B, time_B, alive_B, queue, prompts)
                    continue
                if not queue and rows.plan.compact and wasted > _COMPACTION_STEPS * alive:
                    wasted = 0
                    keep_B = _even(alive_B)
                    rows.keep(keep_B)
                    slot_B, time_B, alive_B, token_B = (x[keep_B] for x in (slot_B, time_B, alive_B, token_B))
            rows.step(token_B)

    def _tell_finished(self, tell: Tell, slots: Sequence[int]) -> None:
        fresh = [slot for slot in slots if slot not in self._told]
        self._told.update(fresh)
        if fresh:
            for slot, row in zip(fresh, self._written(fresh).rows(), strict=True):
                tell(slot, *row)

    def _place(self, rows: Grows, slot_B: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """Choose and store a token for each row; the tokens, and which rows are over with it."""
        uniform_B = self._uniform_RT[slot_B, time_B.clamp(max=self._steps - 1)]
        token_B, data_B = self._choose(rows.hidden_BD, uniform_B)
        if self._data_RT is None or not self._data_RT.numel():
            self._data_RT = data_B.new_zeros(*self._token_RT.shape, *data_B.shape[1:])
        self._token_RT[slot_B, time_B] = token_B
        self._data_RT[slot_B, time_B] = data_B
        ended_B = (token_B[:, None] == self._eos_E).any(-1)
        if self._stops is not None:
            ended_B |= self._stopped(self._stops, slot_B, time_B)
        going_B = time_B < self._steps
        self._length_R.index_add_(0, slot_B, going_B.long())
        self._ended_R[slot_B] |= ended_B & going_B
        return token_B, ended_B | (time_B + 1 >= self._steps)

    def _stopped(self, stops: StopStrings, slot_B: Tensor, time_B: Tensor) -> Tensor:
        back_W = torch.arange(1 - stops.window, 1, device=slot_B.device)
        place_BW = time_B[:, None] + back_W
        recent_BW = self._token_RT[slot_B[:, None], place_BW.clamp(min=0)].tolist()
        early = (place_BW < 0).sum(-1).tolist()
        hits = stops.hits([tokens[skip:] for tokens, skip in zip(recent_BW, early, strict=True)])
        return torch.tensor(hits, device=slot_B.device)

    def _refill(
        self,
        rows: Grows,
        slot_B: Tensor,
        time_B: Tensor,
        alive_B: Tensor,
        queue: list[int],
        prompts: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give the places of finished rows to waiting prompts."""
        free_F = (~alive_B).nonzero()[: len(queue), 0]
        taken = queue[: len(free_F)]
        del queue[: len(free_F)]
        rows.refill(free_F, [prompts[i] for i in taken])
        slot_B, time_B, alive_B = slot_B.clone(), time_B.clone(), alive_B.clone()
        slot_B[free_F] = torch.tensor(taken, device=slot_B.device)
        time_B[free_F], alive_B[free_F] = 0, True
        return slot_B, time_B, alive_B


def _even(alive_B: Tensor) -> Tensor:
    """Rows that go on, and so many finished ones that their number is a multiple of 8: oneDNN keeps code by shape."""
    order_B = alive_B.to(torch.uint8).argsort(descending=True, stable=True)
    count = int(alive_B.sum())
    return order_B[: count + -count % 8].sort().values
