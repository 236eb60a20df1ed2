"""What a cache holds of every response token, and how it is made small: the three kinds of stored scores.

Every kind stores the log-prob of the token itself in float32. Left out: entropy coding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrl.errors import UserError
from kdrl.objectives.head import Head, chunks
from kdrl.objectives.logspace import finite
from kdrl.objectives.support import Few, draw_ids
from kdrl.seeds import derive
from kdrl.teachers.base import Evidence, Gives
from kdrl.teachers.cache_bits import bits_for, pack, row_bytes, unpack

Shard = Mapping[str, Tensor]
DEPTH = 50.0
"""Nats below the likeliest token that count as the most."""
LEVELS = 255
STEP, CODE_BITS = 0.01, 12
"""Draws: step of a stored log-prob in nats, and the bits of its number."""


@dataclass(frozen=True)
class Scored:
    """A teacher's evidence of all N tokens of some responses, and what their draws follow from."""

    evidence: Evidence
    lengths: tuple[int, ...]
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Found:
    """What was stored of some tokens M: `hidden_MD`, or `few`."""

    hidden_MD: Tensor | None = None
    few: Few | None = None


class Codec:
    """One kind of scores: from evidence to tensors of a shard, and back for some of its tokens."""

    gives: Gives

    def encode(self, scored: Scored) -> dict[str, Tensor]:
        """Tensors of all tokens, in their order."""
        raise NotImplementedError

    def decode(self, shard: Shard, at_M: Tensor) -> Found:
        """The stored scores of tokens `at_M` of a shard."""
        raise NotImplementedError

    def nothing(self) -> Found:
        """The scores of no token."""
        raise NotImplementedError


def codec_of(settings: Mapping[str, Any], vocab: int, seed: int) -> Codec:
    """The codec of a manifest's settings; draws follow from `seed` and the response alone."""
    if settings["kind"] == "topk":
        return TopK(min(settings["k"], vocab), vocab)
    if settings["kind"] == "draws":
        return Draws(settings["draws"], settings["tau"], vocab, seed)
    return Hidden()


def quantise(logp_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[N, K]` and range float16 `[N]` of log-probs in falling order.

    255 sqrt(depth / range), rounded: depth is nats below the first, range that of the last. An entry at depth d is off
    by at most sqrt(d range) / 255 + range / 260100, so the likely tokens are the exact ones.
    """
    depth_NK = (logp_NK[:, :1] - logp_NK).clamp(0.0, DEPTH)
    # A little more than the last depth, so that rounding to float16 leaves no code above 255.
    range_N = (depth_NK[:, -1] * 1.001).half()
    share_NK = depth_NK / range_N.to(depth_NK.dtype)[:, None].clamp(min=1e-4)
    return (LEVELS * share_NK.clamp(0.0, 1.0).sqrt()).round().to(torch.uint8), range_N


def dequantise(code_NK: Tensor, range_N: Tensor, tail_N: Tensor) -> Tensor:
    """Log-probs float32 `[N, K]`, shifted so that they and the log mass `tail` of all others add up to one."""
    shape_NK = -range_N.float()[:, None] * (code_NK.float() / LEVELS).square()
    head_N = torch.log(-torch.expm1(tail_N.float()))
    return shape_NK - (shape_NK.logsumexp(-1) - head_N)[:, None]


class TopK(Codec):
    """The k likeliest tokens: packed ids, log-probs of 8 bits, and the log mass of all others in float16."""

    def __init__(self, k: int, vocab: int) -> None:
        self.k, self.width = k, bits_for(vocab)
        self.gives = Gives(distribution=False, topk=k)

    def encode(self, scored: Scored) -> dict[str, Tensor]:
        """`ids` uint8 `[N, bytes]`, `code` uint8 `[N, K]`, `range` and `tail` float16 `[N]`, `logp` float32 `[N]`."""
        evidence = scored.evidence
        parts: list[tuple[Tensor, ...]] = []
        for index in _pieces(evidence):
            ids_CK, logp_CK, tail_C = self._likeliest(evidence, index)
            code_CK, range_C = quantise(logp_CK)
            packed = torch.from_numpy(pack(ids_CK.cpu().numpy().astype(np.uint64), self.width))
            parts.append((packed, code_CK.cpu(), range_C.cpu(), tail_C.half().cpu()))
        ids, code, span, tail = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"ids": ids, "code": code, "range": span, "tail": tail, "logp": evidence.logp_N.float().cpu()}

    def _likeliest(self, evidence: Evidence, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and log-probs in falling order, and the log mass of all others."""
        if evidence.few is None:
            logp_CV = _distribution(evidence, index)
            logp_CK, ids_CK = logp_CV.topk(self.k, dim=-1)
            outside_CV = logp_CV.scatter(-1, ids_CK, -torch.inf)
            return ids_CK, finite(logp_CK), outside_CV.logsumexp(-1).clamp(max=-1e-7)
        few = evidence.few.at(evidence.where_N[index])
        if few.weight_NK is not None or few.ids_NK.shape[-1] < self.k:
            raise TypeError(f"the teacher gave fewer than {self.k} likeliest tokens")
        logp_CK = few.logp_NK[:, : self.k]
        tail_C = few.outside(torch.arange(few.ids_NK.shape[-1], device=index.device) < self.k)
        return few.ids_NK[:, : self.k], logp_CK, tail_C.squeeze(-1).clamp(max=-1e-7)

    def decode(self, shard: Shard, at_M: Tensor) -> Found:
        """The likeliest tokens, and the mass of all others."""
        stride = row_bytes(self.k, self.width)
        start = at_M.numpy()[:, None] * (8 * stride) + np.arange(self.k, dtype=np.int64)[None] * self.width
        ids = torch.from_numpy(unpack(shard["ids"].numpy().reshape(-1), start, self.width).astype(np.int64))
        tail_M = shard["tail"][at_M].float()
        logp_MK = dequantise(shard["code"][at_M], shard["range"][at_M], tail_M)
        return Found(few=Few(ids, logp_MK, tail_N=tail_M))

    def nothing(self) -> Found:
        """No row."""
        return Found(few=Few(torch.zeros(0, self.k, dtype=torch.long), torch.zeros(0, self.k), tail_N=torch.zeros(0)))


class Draws(Codec):
    """n draws from p^tau: each distinct token once, with its count and its log-prob to 0.005 nats (RS-KD, 2503.16870).

    A token's entries take ceil(unique x (bits of an id + bits of a count + 12) / 8) bytes.
    """

    def __init__(self, n: int, tau: float, vocab: int, seed: int) -> None:
        self.n, self.tau, self.vocab, self.seed = n, tau, vocab, seed
        self.id_bits, self.count_bits = bits_for(vocab), bits_for(n + 1)
        self.width = self.id_bits + self.count_bits + CODE_BITS
        self.gives = Gives(distribution=False, draws=n)

    def encode(self, scored: Scored) -> dict[str, Tensor]:
        """`unique` uint8 `[N]`, `entries` uint8 (flat), `logp` float32 `[N]`, and where tau is not 1 `norm` `[N]`."""
        uniform_NK = self._uniforms(scored)
        counts, entries, norms = [], [], []
        for index in _pieces(scored.evidence):
            logp_CV = _distribution(scored.evidence, index)
            ids_CK = draw_ids(logp_CV, self.tau, uniform_NK[index.cpu()].to(logp_CV.device))
            unique_C, packed = self._entries(ids_CK.cpu(), logp_CV.gather(-1, ids_CK).cpu())
            counts.append(unique_C)
            entries.append(packed)
            norms.append((self.tau * logp_CV).logsumexp(-1).float().cpu())
        out = {"unique": torch.cat(counts), "entries": torch.cat(entries), "logp": scored.evidence.logp_N.float().cpu()}
        return out if self.tau == 1.0 else out | {"norm": torch.cat(norms)}

    def _uniforms(self, scored: Scored) -> Tensor:
        rows = []
        for key, length in zip(scored.keys, scored.lengths, strict=True):
            generator = torch.Generator().manual_seed(derive(self.seed, "cache", key.hex()))
            rows.append(torch.rand(length, self.n, generator=generator, dtype=torch.float64))
        return torch.cat(rows)

    def _entries(self, ids_CK: Tensor, logp_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct tokens of each row and their packed entries one row after another."""
        ids_CK, order = torch.sort(ids_CK, dim=-1, stable=True)
        new = torch.ones_like(ids_CK, dtype=torch.bool)
        new[:, 1:] = ids_CK[:, 1:] != ids_CK[:, :-1]
        place = new.cumsum(-1) - 1
        count = torch.zeros_like(ids_CK).scatter_add(-1, place, torch.ones_like(ids_CK))
        code = (-logp_CK.gather(-1, order) / STEP).round().clamp(0, (1 << CODE_BITS) - 1).long()
        # Every copy of a token writes the same numbers into its place.
        ids, codes = (torch.zeros_like(ids_CK).scatter(-1, place, x) for x in (ids_CK, code))
        word = (ids << (self.count_bits + CODE_BITS)) | (count << CODE_BITS) | codes
        unique = new.sum(-1)
        packed = pack(word.numpy().astype(np.uint64), self.width)
        used = np.arange(packed.shape[1])[None] < self._sizes(unique).numpy()[:, None]
        return unique.to(torch.uint8), torch.from_numpy(packed[used])

    def _sizes(self, unique: Tensor) -> Tensor:
        return (unique.long() * self.width + 7) // 8

    def decode(self, shard: Shard, at_M: Tensor) -> Found:
        """The draws with weights count / n times p over p^tau-normalised."""
        sizes = self._sizes(shard["unique"])
        unique_M = shard["unique"][at_M].long()
        slots = torch.arange(self.n)
        real = slots[None] < unique_M[:, None]
        start = ((sizes.cumsum(0) - sizes)[at_M] * 8)[:, None] + slots[None] * self.width
        word = unpack(shard["entries"].numpy(), torch.where(real, start, 0).numpy(), self.width).astype(np.int64)
        words = torch.from_numpy(word) * real
        logp = -(words & ((1 << CODE_BITS) - 1)).float() * STEP
        weight = ((words >> CODE_BITS) & ((1 << self.count_bits) - 1)).float() / self.n
        if self.tau != 1.0:
            weight = weight * ((1.0 - self.tau) * logp + shard["norm"][at_M][:, None]).exp()
        return Found(few=Few(words >> (self.count_bits + CODE_BITS), logp, weight))

    def nothing(self) -> Found:
        """No row."""
        empty = torch.zeros(0, self.n)
        return Found(few=Few(empty.long(), empty, empty))


class Hidden(Codec):
    """Last hidden states in bfloat16 where the teacher computes in it, else float16; the head is stored once."""

    gives = Gives()

    def encode(self, scored: Scored) -> dict[str, Tensor]:
        """`hidden` `[N, D]`, `logp` float32 `[N]`; raises UserError for numbers that float16 cannot hold."""
        evidence = scored.evidence
        if evidence.hidden_MD is None:
            raise TypeError("this teacher gives no hidden states")
        hidden_ND = evidence.hidden_MD[evidence.where_N].cpu()
        if hidden_ND.dtype != torch.bfloat16:
            if bool((hidden_ND.abs() > torch.finfo(torch.float16).max).any()):
                raise UserError(
                    "a hidden state of the teacher is larger than float16 can hold; set teacher.dtype=bfloat16, or "
                    "store --kind topk."
                )
            hidden_ND = hidden_ND.half()
        return {"hidden": hidden_ND.contiguous(), "logp": evidence.logp_N.float().cpu()}

    def decode(self, shard: Shard, at_M: Tensor) -> Found:
        """The hidden states, to be read with the stored head."""
        return Found(hidden_MD=shard["hidden"][at_M])

    def nothing(self) -> Found:
        """No row; the head knows the width."""
        return Found(hidden_MD=torch.zeros(0, 0))


def head_tensors(head: Head) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A head as tensors and plain values, without padded rows, adapters merged."""
    head = head.merged()
    tensors = {"weight": head.weight_VD[: head.vocab_size].detach().cpu().contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V[: head.vocab_size].detach().cpu().contiguous()
    return tensors, {"scale": head.scale, "softcap": head.softcap}


def head_from(tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device | str) -> Head:
    """What `head_tensors` gave."""
    bias_V = tensors["bias"].to(device) if "bias" in tensors else None
    return Head(tensors["weight"].to(device), bias_V, values["scale"], values["softcap"])


def together(found: Sequence[Found]) -> Found:
    """The parts one after another; all of one kind."""
    if found[0].hidden_MD is not None:
        return Found(hidden_MD=torch.cat([f.hidden_MD for f in found if f.hidden_MD is not None]))
    few = [f.few for f in found if f.few is not None]
    columns = {
        name: None if getattr(few[0], name) is None else torch.cat([getattr(f, name) for f in few])
        for name in ("weight_NK", "tail_N")
    }
    return Found(few=Few(torch.cat([f.ids_NK for f in few]), torch.cat([f.logp_NK for f in few]), **columns))


def _pieces(evidence: Evidence) -> list[Tensor]:
    """Token indices in pieces whose logits are a chunk."""
    tokens = len(evidence.logp_N)
    vocab = 1 if evidence.head is None else evidence.head.vocab_size
    every = torch.arange(tokens, device=evidence.where_N.device)
    return [every[part] for part in chunks(tokens, vocab, None if evidence.head is not None else 4096)]


def _distribution(evidence: Evidence, index: Tensor) -> Tensor:
    """Log-probs `[C, V]`, float32 or better."""
    if evidence.hidden_MD is None:
        raise TypeError("this teacher gives no distribution to draw from")
    wide = torch.promote_types(evidence.hidden_MD.dtype, torch.float32)
    return evidence.logp(index, torch.empty(0, dtype=wide, device=index.device))
