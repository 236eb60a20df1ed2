"""The embedded engine: batched sampling from any transformers causal LM, on the weights that are being trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdrl.engines.base import Sample
from kdrl.engines.decoding import Plan, Rows, text_config
from kdrl.engines.sampling import Sampler, SamplingOptions, StopStrings, draw_uniforms
from kdrl.engines.writing import Writer
from kdrl.errors import UserError
from kdrl.models.heads import causal_lm, head_of, hidden_states
from kdrl.models.loading import LoadedModel

# A model is checked once, whatever number of engines write with it.
_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


class TorchEngine:
    """Writes with the model itself, at most `max_rows` responses at a time; see `kdrl.engines.base.Engine`.

    Raises UserError when decoding step by step does not reproduce the model's full forward pass.
    """

    def __init__(self, loaded: LoadedModel, max_rows: int, filtered_ok: bool = False) -> None:
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; the engine needs at least one row.")
        self.loaded, self.max_rows, self._filtered_ok = loaded, max_rows, filtered_ok
        lm = causal_lm(loaded.model)
        if lm not in _PLANS:
            with writing(loaded):
                _PLANS[lm] = _right_plan(loaded)
        self.plan = _PLANS[lm]

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
        """Samples [prompt][sample]; a sample depends on (weights, prompt, seed, sample index), to rounding.

        On a GPU, where rows are looked at every few steps, `done` is told of a sample that much later.
        Raises UserError for options out of range, for top-p or top-k without `filtered_ok` (the samples would not come
        from the policy whose log-probs are returned), and for a prompt and response longer than the model's context.
        """
        options = SamplingOptions(temperature, top_p, top_k)
        self.check(prompts, samples, max_new_tokens, options)
        loaded = self.loaded
        drawn = samples if temperature > 0 else 1  # greedy samples of a prompt are equal
        uniform = draw_uniforms(prompts, drawn, max_new_tokens, seed)
        order = falling(prompts)
        with writing(loaded):
            stops = StopStrings(loaded.tokenizer, stop, loaded.vocab_size) if stop else None

            def start(texts: Sequence[Sequence[int]]) -> Rows:
                return Rows(loaded, texts, max_new_tokens, self.plan)

            def tell(row: int, *written: Any) -> None:
                assert done is not None
                for j in range(row % drawn, samples, drawn):
                    done(order[row // drawn], j, Sample(*written))

            sampler = Sampler(head_of(loaded), options)
            told = None if done is None else tell
            writer = Writer(start, uniform[order].flatten(0, 1), loaded.eos_ids, sampler, stops, told)
            texts = [prompts[i] for i in order for _ in range(drawn)]
            found = writer.write(texts, self.max_rows, self.plan.refill).samples() if texts else []
        place = {i: n * drawn for n, i in enumerate(order)}
        return [[found[place[i] + j % drawn] for j in range(samples)] for i in range(len(prompts))]

    def check(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, options: SamplingOptions
    ) -> None:
        """Raise UserError for a request that `generate` refuses."""
        if samples < 1 or max_new_tokens < 1:
            raise UserError(f"samples is {samples} and max_new_tokens is {max_new_tokens}; both must be at least 1.")
        if options.filtered and not self._filtered_ok:
            raise UserError(
                "top_p and top_k are refused here: samples would not come from the policy that is trained; "
                "sample from the whole distribution, or ask for filtered sampling by name."
            )
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt has no tokens, so there is nothing to continue.")
        limit = getattr(text_config(self.loaded), "max_position_embeddings", None)
        longest = max((len(prompt) for prompt in prompts), default=0)
        if isinstance(limit, int) and longest + max_new_tokens > limit:
            raise UserError(
                f"the longest prompt has {longest} tokens, and with {max_new_tokens} new ones it passes the model's "
                f"context of {limit}; lower max_new_tokens or limit the prompts."
            )


@contextlib.contextmanager
def writing(loaded: LoadedModel) -> Iterator[None]:
    """Eval mode, no gradients and the model's autocast; the mode before is restored."""
    with writable(loaded), loaded.autocast():
        yield


@contextlib.contextmanager
def writable(*models: LoadedModel) -> Iterator[None]:
    """Eval mode and no gradients for models that write together; each forward enters its own model's autocast."""
    casting = any(loaded.config.autocast is not None for loaded in models)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.clear_autocast_cache)  # casts made without gradients must not reach a training forward
        for loaded in models:
            stack.enter_context(_resting(loaded))
        stack.enter_context(torch.no_grad() if casting else torch.inference_mode())
        # The outermost autocast context keeps the casts of those within, which would be made anew at every step.
        stack.enter_context(torch.autocast(models[0].device.type, enabled=False))
        yield


@contextlib.contextmanager
def _resting(loaded: LoadedModel) -> Iterator[None]:
    was_training = loaded.model.training
    casting = loaded.config.autocast is not None
    # Autocast keeps its casts of weights from one step to the next only outside of inference mode, and only of weights
    # that ask for gradients; without that every step casts every weight anew.
    frozen = [p for p in loaded.model.parameters() if casting and p.is_floating_point() and not p.requires_grad]
    loaded.model.eval()
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        loaded.model.train(was_training)


def falling(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the prompts, the longest first: a row can only be given to a prompt that fits where one has been."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def _right_plan(loaded: LoadedModel) -> Plan:
    """The fastest plan whose steps reproduce the model's full forward pass."""
    best = Plan.fastest(loaded)
    plain = replace(best, fused=False, static=False)
    for plan in dict.fromkeys((best, replace(best, static=False), plain, Plan(roomy_cache=True), Plan())):
        try:
            if _reproduces(loaded, plan):
                return plan
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            continue
    raise UserError(
        f"{type(causal_lm(loaded.model)).__name__}: decoding with its key-value cache does not reproduce its full "
        "forward pass, so samples would not come from the policy; this architecture cannot write here."
    )


def _reproduces(loaded: LoadedModel, plan: Plan) -> bool:
    """Compare hidden states (two prompts, a row that leaves, a row that starts anew) with plain forwards."""
    plan = replace(plan, shared=min(plan.shared, 1))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(loaded.vocab_size, (n,), generator=generator).tolist() for n in (6, 8, 3)]
    texts[2] = texts[1][:5] + texts[2]
    prompts = [texts[0][:3], texts[1][:5], texts[2][:5]]
    rows = Rows(loaded, prompts, 4, plan)
    found = [rows.hidden_BD]
    rows.step(torch.tensor([texts[n][len(prompts[n])] for n in range(3)], device=loaded.device))
    rows.keep(torch.tensor([0, 2], device=loaded.device))
    for t in (1, 2):
        rows.step(torch.tensor([texts[n][len(prompts[n]) + t] for n in (0, 2)], device=loaded.device))
    found.append(rows.hidden_BD)
    wanted = [_last_hidden(loaded, prompts), _last_hidden(loaded, [texts[0], texts[2]])]
    if plan.refill:
        rows.refill(torch.tensor([1], device=rows.device), [texts[1][:4]])
        rows.step(torch.tensor([texts[1][0], texts[1][4]], device=rows.device))
        found.append(rows.hidden_BD)
        wanted.append(_last_hidden(loaded, [texts[0] + texts[1][:1], texts[1][:5]]))
    tolerance = 1e-3 if found[0].dtype == torch.float32 and loaded.config.autocast is None else 0.1
    return all(_close(a.float(), b.float(), tolerance) for a, b in zip(found, wanted, strict=True))


def _last_hidden(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    each = [torch.tensor([list(text)], device=loaded.device) for text in texts]
    return torch.cat([hidden_states(loaded.model, ids, torch.ones_like(ids))[:, -1] for ids in each])


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if not bool(wanted.isfinite().all()):
        return True  # broken weights are for the trainer to report
    return bool(((found - wanted).norm(dim=-1) <= tolerance * wanted.norm(dim=-1)).all())
