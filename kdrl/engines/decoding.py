"""One wave of rows through the model: prefill, steps, and the rows that leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdrl.engines.attention import fast_attention
from kdrl.engines.base import Sample
from kdrl.engines.cache import new_cache, select_rows
from kdrl.engines.sampling import StopStrings
from kdrl.models.heads import accepts, causal_lm, decoder_of
from kdrl.models.loading import LoadedModel

# Steps between two looks at how many rows are still alive: a look makes a GPU wait.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_GPU = 8
# Dropping finished rows copies the cache, which costs about this many steps of the rows that stay.
_COMPACTION_STEPS = 0.5


@dataclass(frozen=True)
class Plan:
    """Which shortcuts a model's decode steps take; all off is the plain way that every architecture knows."""

    roomy_cache: bool = False
    ready_mask: bool = False
    single_query: bool = False

    @staticmethod
    def fastest(loaded: LoadedModel) -> Plan:
        """Every shortcut that can be right for the architecture; the engine checks the result before use."""
        config: Any = text_config(loaded)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        plain = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
        sdpa = config._attn_implementation == "sdpa"
        exact = causal_lm(loaded.model).dtype == torch.float32 and loaded.config.autocast is None
        return Plan(True, ready_mask=plain and sdpa, single_query=sdpa and exact and loaded.device.type == "cpu")


def text_config(loaded: LoadedModel) -> Any:
    """The transformers configuration of the language part."""
    lm: Any = causal_lm(loaded.model)
    return lm.config.get_text_config()


class Rows:
    """Rows of a batch that grow by a token a step; each distinct prompt is run once and repeated for its rows."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], steps: int, plan: Plan) -> None:
        self._decoder: Any = decoder_of(loaded.model)
        self._has_positions = accepts(type(self._decoder), "position_ids")
        self._config, self._pad, self._plan = text_config(loaded), loaded.pad_id, plan
        self.device = self._device = loaded.device
        self._steps = steps
        self._width = self._written = max(map(len, prompts))
        self._cache = new_cache(self._config, self._width + steps, plan.roomy_cache)
        self.hidden_BD = self._prefill(prompts)

    def step(self, token_B: Tensor) -> None:
        """Append a token to every row; `hidden_BD` then belongs to it."""
        self._written += 1
        self._position_B1 = self._position_B1 + 1
        mask = None if self._mask is None else self._mask[..., : self._written]
        with fast_attention(self._config, self._plan.single_query):
            self.hidden_BD = self._forward(token_B[:, None], mask, self._position_B1)[:, -1]

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but the named ones."""
        select_rows(self._cache, keep_B)
        if self._mask is not None:
            self._mask, self._position_B1 = self._mask[keep_B], self._position_B1[keep_B]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        index = {key: n for n, key in enumerate(dict.fromkeys(map(tuple, prompts)))}
        parent_B = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self._device)
        padded = len({len(key) for key in index}) > 1
        if not padded:
            ids = torch.tensor(list(index), device=self._device)
            positions = torch.arange(self._width, device=self._device)[None]
            hidden_PLD = self._forward(ids, None, positions)
            self._mask, self._position_B1 = None, positions[:, -1:]
        else:
            ids = torch.tensor(
                [[self._pad] * (self._width - len(key)) + list(key) for key in index], device=self._device
            )
            start_P1 = torch.tensor([[self._width - len(key)] for key in index], device=self._device)
            mask = torch.arange(self._width + self._steps, device=self._device) >= start_P1
            positions = (torch.arange(self._width, device=self._device) - start_P1).clamp(min=0)
            hidden_PLD = self._forward(ids, mask[:, : self._width].long(), positions)
            self._mask, self._position_B1 = self._step_mask(mask[parent_B]), positions[parent_B, -1:]
        select_rows(self._cache, parent_B)
        return hidden_PLD[:, -1][parent_B]

    def _step_mask(self, mask_BL: Tensor) -> Tensor:
        if not self._plan.ready_mask:
            return mask_BL.long()
        if not self._plan.single_query:
            return mask_BL[:, None, None]
        # Additive, so that a step adds it to its scores as it is.
        zero = torch.zeros((), device=self._device)
        return torch.where(mask_BL, zero, torch.finfo(zero.dtype).min)[:, None, None]

    def _forward(self, ids_BL: Tensor, mask: Tensor | None, position_BL: Tensor) -> Tensor:
        given = {"position_ids": position_BL} if self._has_positions else {}
        out = self._decoder(input_ids=ids_BL, attention_mask=mask, past_key_values=self._cache, use_cache=True, **given)
        return out.last_hidden_state


class Grows(Protocol):
    """Rows that one model, or several in step, continue by a token at a time."""

    device: torch.device

    @property
    def hidden_BD(self) -> Any:
        """What the next token is chosen from."""
        ...

    def step(self, token_B: Tensor) -> None:
        """Append a token to every row."""
        ...

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but the named ones."""
        ...


# fn(hidden, uniforms [B, ...]) -> tokens [B] and float data about each, [B, ...].
Chooser = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Written:
    """Finished rows: tokens `[T, R]`, the chooser's data `[T, R, ...]`, lengths, and which rows ended by themselves."""

    token_TR: Tensor
    data_TR: Tensor
    length_R: Tensor
    ended_R: Tensor

    def rows(self) -> Iterator[tuple[list[int], list[Any], bool]]:
        """Tokens, data and end of each row."""
        columns = (self.token_TR.T.tolist(), self.data_TR.transpose(0, 1).tolist())
        for token, data, n, ended in zip(*columns, self.length_R.tolist(), self.ended_R.tolist(), strict=True):
            yield token[:n], data[:n], ended

    def samples(self) -> list[Sample]:
        """One Sample a row, where the data are log-probs."""
        return [Sample(token, logp, ended) for token, logp, ended in self.rows()]


def write_rows(
    rows: Grows, uniform_BT: Tensor, eos_ids: Sequence[int], choose: Chooser, stops: StopStrings | None
) -> Written:
    """Choose tokens until every row has ended or has as many as uniforms `[B, T, ...]`."""
    device = rows.device
    count, steps = uniform_BT.shape[:2]
    uniform_TB = uniform_BT.transpose(0, 1).contiguous().to(device)
    token_TR = torch.zeros(steps, count, dtype=torch.long, device=device)
    data_TR: Tensor | None = None
    length_R = torch.zeros(count, dtype=torch.long, device=device)
    ended_R = torch.zeros(count, dtype=torch.bool, device=device)
    slot_B, alive_B = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    eos_E = torch.tensor(tuple(eos_ids), device=device)
    look_every = _LOOK_EVERY.get(device.type, _LOOK_EVERY_GPU)
    wasted = 0
    for t in range(steps):
        token_B, data_B = choose(rows.hidden_BD, uniform_TB[t])
        if data_TR is None:
            data_TR = data_B.new_zeros(steps, count, *data_B.shape[1:])
        token_TR[t].index_copy_(0, slot_B, token_B)
        data_TR[t].index_copy_(0, slot_B, data_B)
        length_R.index_add_(0, slot_B, alive_B.long())
        over_B = (token_B[:, None] == eos_E).any(-1)
        if stops is not None:
            hits = stops.hits(token_TR[max(0, t + 1 - stops.window) : t + 1, slot_B].tolist())
            over_B |= torch.tensor(hits, device=device)
        alive_B = alive_B & ~over_B
        ended_R.index_copy_(0, slot_B, ~alive_B)
        if t + 1 == steps:
            break
        if (t + 1) % look_every == 0:
            alive = int(alive_B.sum())
            if alive == 0:
                break
            # Like renting until the rent has paid the price: compact once the dead rows have cost as much.
            wasted += (len(slot_B) - alive) * look_every
            if wasted > _COMPACTION_STEPS * alive:
                wasted = 0
                keep_B = alive_B.nonzero()[:, 0]
                rows.keep(keep_B)
                slot_B, alive_B, token_B = slot_B[keep_B], alive_B[keep_B], token_B[keep_B]
                uniform_TB = uniform_TB[:, keep_B]
        rows.step(token_B)
    assert data_TR is not None
    return Written(token_TR, data_TR, length_R, ended_R)
