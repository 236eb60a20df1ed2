"""The embedded engine: batched sampling from any transformers causal LM, on the weights that are being trained.

Left out here: refilling freed rows with waiting prompts, and CUDA graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrl.engines.base import Sample
from kdrl.engines.cache import new_cache, select_rows
from kdrl.engines.sampling import Sampler, SamplingOptions, StopStrings, draw_uniforms
from kdrl.errors import UserError
from kdrl.models.heads import accepts, causal_lm, decoder_of, head_of
from kdrl.models.loading import LoadedModel

# Steps between two looks at how many rows are still alive: a look makes a GPU wait.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_GPU = 8
# Dropping finished rows copies the cache, which costs about this many steps of the rows that stay.
_COMPACTION_STEPS = 0.5


class TorchEngine:
    """Writes with the model itself, at most `max_rows` responses at a time; see `kdrl.engines.base.Engine`."""

    def __init__(self, loaded: LoadedModel, max_rows: int, filtered_ok: bool = False) -> None:
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; the engine needs at least one row.")
        self._loaded, self._max_rows, self._filtered_ok = loaded, max_rows, filtered_ok
        self._config = causal_lm(loaded.model).config.get_text_config()  # type: ignore[union-attr, operator]

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
    ) -> list[list[Sample]]:
        """Samples [prompt][sample]; a sample depends on (weights, prompt, seed, sample index), to rounding.

        Raises UserError for options out of range, for top-p or top-k without `filtered_ok` (the samples would not come
        from the policy whose log-probs are returned), and for a prompt and response longer than the model's context.
        """
        options = SamplingOptions(temperature, top_p, top_k)
        self._check(prompts, samples, max_new_tokens, options)
        drawn = samples if temperature > 0 else 1  # greedy samples of a prompt are equal
        uniform = draw_uniforms(prompts, drawn, max_new_tokens, seed)
        rows = [(i, j) for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])) for j in range(drawn)]
        out: dict[tuple[int, int], Sample] = {}
        with self._writing():
            stops = StopStrings(self._loaded.tokenizer, stop, self._loaded.vocab_size) if stop else None
            sampler = Sampler(head_of(self._loaded), options)
            for wave in _waves(rows, self._max_rows):
                uniform_RT = torch.stack([uniform[i, j] for i, j in wave])
                batch = _Batch(self._loaded, self._config, [prompts[i] for i, _ in wave], uniform_RT, sampler, stops)
                out.update(zip(wave, batch.write(), strict=True))
        return [[out[i, j % drawn] for j in range(samples)] for i in range(len(prompts))]

    def _check(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, options: SamplingOptions
    ) -> None:
        if samples < 1 or max_new_tokens < 1:
            raise UserError(f"samples is {samples} and max_new_tokens is {max_new_tokens}; both must be at least 1.")
        if options.filtered and not self._filtered_ok:
            raise UserError(
                "top_p and top_k are refused here: samples would not come from the policy that is trained; "
                "sample from the whole distribution, or ask for filtered sampling by name."
            )
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt has no tokens, so there is nothing to continue.")
        limit = getattr(self._config, "max_position_embeddings", None)
        longest = max((len(prompt) for prompt in prompts), default=0)
        if isinstance(limit, int) and longest + max_new_tokens > limit:
            raise UserError(
                f"the longest prompt has {longest} tokens, and with {max_new_tokens} new ones it passes the model's "
                f"context of {limit}; lower max_new_tokens or limit the prompts."
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Eval and inference mode and the model's autocast; the mode before is restored."""
        model = self._loaded.model
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode(), self._loaded.autocast():
                yield
        finally:
            model.train(was_training)
            torch.clear_autocast_cache()  # casts made in inference mode must not reach a training forward


def _waves(rows: list[tuple[int, int]], max_rows: int) -> list[list[tuple[int, int]]]:
    """Cut rows into as few pieces as fit, of nearly equal size."""
    count = -(-len(rows) // max_rows)
    return [rows[len(rows) * k // count : len(rows) * (k + 1) // count] for k in range(count)]


class _Batch:
    """One wave of rows, from prefill to the last token."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: Any,
        prompts: list[Sequence[int]],
        uniform_RT: Tensor,
        sampler: Sampler,
        stops: StopStrings | None,
    ) -> None:
        self._decoder = decoder_of(loaded.model)
        self._device, self._sampler, self._stops = loaded.device, sampler, stops
        self._prompts = prompts
        self._steps = uniform_RT.shape[1]
        self._uniform_TR = uniform_RT.T.contiguous().to(self._device)
        self._eos = torch.tensor(loaded.eos_ids, device=self._device)
        self._pad = loaded.pad_id
        self._width = max(map(len, prompts))
        self._cache = new_cache(config, self._width + self._steps)
        self._has_positions = accepts(type(self._decoder), "position_ids")
        self._look_every = _LOOK_EVERY.get(self._device.type, _LOOK_EVERY_GPU)

    def write(self) -> list[Sample]:
        """Run the wave; one Sample a row, in the order of the prompts."""
        rows = len(self._prompts)
        token_TR = torch.zeros(self._steps, rows, dtype=torch.long, device=self._device)
        logp_TR = torch.zeros(self._steps, rows, device=self._device)
        length_R = torch.zeros(rows, dtype=torch.long, device=self._device)
        slot_B = torch.arange(rows, device=self._device)
        alive_B = torch.ones(rows, dtype=torch.bool, device=self._device)
        hidden_BD = self._prefill()
        uniform_TB = self._uniform_TR
        wasted = 0
        for t in range(self._steps):
            token_B, logp_B = self._sampler(hidden_BD, uniform_TB[t])
            token_TR[t].index_copy_(0, slot_B, token_B)
            logp_TR[t].index_copy_(0, slot_B, logp_B)
            length_R.index_add_(0, slot_B, alive_B.long())
            alive_B = alive_B & ~self._ended(token_B, token_TR[: t + 1], slot_B)
            if t + 1 == self._steps:
                break
            if (t + 1) % self._look_every == 0:
                alive = int(alive_B.sum())
                if alive == 0:
                    break
                # Like renting until the rent has paid the price: compact once the dead rows have cost as much.
                wasted += (len(slot_B) - alive) * self._look_every
                if wasted > _COMPACTION_STEPS * alive:
                    wasted = 0
                    keep_B = alive_B.nonzero()[:, 0]
                    self._keep(keep_B)
                    slot_B, alive_B, token_B = slot_B[keep_B], alive_B[keep_B], token_B[keep_B]
                    uniform_TB = uniform_TB[:, keep_B]
            hidden_BD = self._step(token_B)
        alive_R = torch.zeros(rows, dtype=torch.bool, device=self._device).index_copy_(0, slot_B, alive_B)
        return _samples(token_TR, logp_TR, length_R, alive_R)

    def _prefill(self) -> Tensor:
        """Run every distinct prompt once, repeat its cache for its rows; hidden states [rows, D] of the last token."""
        index = {key: n for n, key in enumerate(dict.fromkeys(map(tuple, self._prompts)))}
        ids = torch.full((len(index), self._width), self._pad)
        mask = torch.zeros(len(index), self._width, dtype=torch.long)
        for key, n in index.items():
            ids[n, self._width - len(key) :] = torch.tensor(key)
            mask[n, self._width - len(key) :] = 1
        mask = mask.to(self._device)
        padded = len({len(key) for key in index}) > 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden_PLD = self._forward(
            ids.to(self._device), mask if padded else None, positions if padded else positions[:1]
        )
        parent_R = torch.tensor([index[tuple(prompt)] for prompt in self._prompts], device=self._device)
        select_rows(self._cache, parent_R)
        self._position_B1 = (positions if padded else positions[:1])[:, -1:]
        self._mask_BL = None
        if padded:
            self._position_B1 = self._position_B1[parent_R]
            self._mask_BL = torch.cat([mask, mask.new_ones(len(index), self._steps)], 1)[parent_R]
        self._written = self._width
        return hidden_PLD[:, -1][parent_R]

    def _step(self, token_B: Tensor) -> Tensor:
        self._written += 1
        self._position_B1 = self._position_B1 + 1
        mask = None if self._mask_BL is None else self._mask_BL[:, : self._written]
        return self._forward(token_B[:, None], mask, self._position_B1)[:, -1]

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor | None, position_BL: Tensor) -> Tensor:
        given = {"position_ids": position_BL} if self._has_positions else {}
        out = self._decoder(
            input_ids=ids_BL, attention_mask=mask_BL, past_key_values=self._cache, use_cache=True, **given
        )
        return out.last_hidden_state

    def _keep(self, keep_B: Tensor) -> None:
        select_rows(self._cache, keep_B)
        if self._mask_BL is not None:
            self._mask_BL = self._mask_BL[keep_B]
            self._position_B1 = self._position_B1[keep_B]

    def _ended(self, token_B: Tensor, token_TR: Tensor, slot_B: Tensor) -> Tensor:
        ended_B = torch.isin(token_B, self._eos) if len(self._eos) > 1 else token_B == self._eos
        if self._stops is not None:
            recent = token_TR[-self._stops.window :, slot_B].tolist()
            ended_B = ended_B | torch.tensor(self._stops.hits(recent), device=self._device)
        return ended_B


def _samples(token_TR: Tensor, logp_TR: Tensor, length_R: Tensor, alive_R: Tensor) -> list[Sample]:
    tokens, logps = token_TR.T.tolist(), logp_TR.T.tolist()
    rows = zip(tokens, logps, length_R.tolist(), alive_R.tolist(), strict=True)
    return [Sample(token[:n], logp[:n], not alive) for token, logp, n, alive in rows]
