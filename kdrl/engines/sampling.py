"""From hidden states to tokens: float32 head, inverse CDF on uniforms drawn up front, top-k, top-p, stop strings."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl.errors import UserError
from kdrl.seeds import derive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl.objectives.head import Head

# A head of up to so many weights is packed, a copy of it, for about so many rows.
_PACKED, _ROWS = 1 << 26, 64


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a number above 0 and at most 1 (1 keeps every token).")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 (keep every token) or a positive number.")

    @property
    def filtered(self) -> bool:
        """Whether samples come from another distribution than the policy."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


class Sampler:
    """Chooses tokens for the last position of every row, from float32 logits.

    Low-precision logits would round the policy itself (0.06 nats at a logit of 16 in bfloat16). On a CPU the head is
    widened once for all steps; on a GPU its factors are multiplied as they are and summed in float32.
    """

    def __init__(self, head: Head, options: SamplingOptions) -> None:
        self._wide = head.weight_VD.device.type == "cpu"
        head = head.map(lambda factor: factor.detach().float() if self._wide else factor.detach())
        self._head = head.packed(_ROWS) if head.weight_VD.numel() <= _PACKED else head
        self._options = options

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits [R, V] over the tokenizer's vocabulary, before temperature."""
        return self._head.logits(hidden_RD.float() if self._wide else hidden_RD)

    def _tempered(self, hidden_RD: Tensor) -> Tensor:
        logits_RV = self.logits(hidden_RD)
        if self._options.temperature not in (0.0, 1.0):
            logits_RV /= self._options.temperature
        return logits_RV

    def probabilities(self, hidden_RD: Tensor) -> Tensor:
        """The unfiltered policy [R, V] at the temperature (at 1 for greedy)."""
        return torch.softmax(self._tempered(hidden_RD), -1)

    def __call__(self, hidden_RD: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
        """Token [R] and its log-probability [R] under the unfiltered policy at the temperature."""
        options = self._options
        logits_RV = self._tempered(hidden_RD)
        prob_RV = torch.softmax(logits_RV, -1)
        if options.temperature == 0:
            token_R1 = logits_RV.argmax(-1, keepdim=True)
        elif options.filtered:
            token_R1 = _filtered_draw(prob_RV, uniform_R[:, None], options)
        else:
            token_R1 = inverse_cdf(prob_RV, uniform_R[:, None])
        return token_R1[:, 0], prob_RV.gather(-1, token_R1)[:, 0].log_()


def inverse_cdf(prob_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """Index [R, 1] drawn from each row of weights (any sum); one of zero weight is never drawn.

    The draw is the first index whose cumulative weight exceeds u times the row's sum. Rounding may lift that product
    to the sum itself, beyond the last index, so it is held just below.
    """
    cumulative_RV = prob_RV.cumsum(-1)
    total_R1 = cumulative_RV[:, -1:]
    target_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, target_R1, right=True)


def _filtered_draw(prob_RV: Tensor, uniform_R1: Tensor, options: SamplingOptions) -> Tensor:
    """Top-k first, then top-p among what is left, as transformers orders them; the most probable token always stays."""
    keep = min(options.top_k or prob_RV.shape[-1], prob_RV.shape[-1])
    kept_RK, index_RK = prob_RV.topk(keep, sorted=True) if options.top_k else prob_RV.sort(descending=True, stable=True)
    if options.top_p < 1:
        before_RK = kept_RK.cumsum(-1)
        limit_R1 = before_RK[:, -1:] * options.top_p
        kept_RK = kept_RK.masked_fill(before_RK - kept_RK >= limit_R1, 0.0)
    return index_RK.gather(-1, inverse_cdf(kept_RK, uniform_R1))


def prompt_keys(prompts: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
    """A hash of each prompt's tokens, and which occurrence of that prompt it is."""
    seen: dict[str, int] = {}
    found = []
    for prompt in prompts:
        key = hashlib.sha256(array("q", prompt).tobytes()).hexdigest()
        seen[key] = seen.get(key, -1) + 1
        found.append((key, seen[key]))
    return found


def draw_uniforms(prompts: Sequence[Sequence[int]], samples: int, length: int, seed: int) -> Tensor:
    """Uniforms [prompt, sample, position] in [0, 1), float32, a function of (seed, prompt tokens, sample) alone.

    So a sample does not depend on where its prompt stands, on the other prompts, or on how many rows run at a time.
    The n-th occurrence of a repeated prompt has draws of its own.
    """
    uniform = torch.empty(len(prompts), samples, length)
    generator = torch.Generator()
    for i, (key, occurrence) in enumerate(prompt_keys(prompts)):
        for j in range(samples):
            generator.manual_seed(derive(seed, "samples", key, occurrence, j))
            torch.rand(length, generator=generator, out=uniform[i, j])
    return uniform


class StopStrings:
    """Finds the rows whose response just came to hold a stop string; only likely rows are decoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], vocab_size: int) -> None:
        if isinstance(stop, str) or not all(stop):
            raise UserError("stop takes a list of strings that are not empty.")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # A token gives at least a byte; the margin is for tokens that decode to nothing at the edge of the window.
        self._window = max(len(s.encode()) for s in stop) + 4
        last = {s[-1] for s in stop}
        texts = tokenizer.batch_decode([[i] for i in range(vocab_size)])
        # A token that completes a stop string holds its last character, or a part of it ("\ufffd") if it spans tokens.
        self._likely = {i for i, text in enumerate(texts) if "\ufffd" in text or any(c in text for c in last)}

    def hits(self, recent: Sequence[Sequence[int]]) -> list[bool]:
        """For each row, whether a stop string stands in the decoded text of its last tokens."""
        found = []
        for tokens in recent:
            if tokens[-1] not in self._likely:
                found.append(False)
                continue
            text = str(self._tokenizer.decode(list(tokens[-self._window :])))
            found.append(any(s in text for s in self._stop))
        return found

    @property
    def window(self) -> int:
        """How many of the newest tokens `hits` wants to see."""
        return self._window
