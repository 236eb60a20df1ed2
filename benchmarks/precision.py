"""How far kdrl's fast paths and the library's plain ones are from float64, in float32, bfloat16 and autocast.

    python benchmarks/precision.py [--threads 2] [--quick] [--only update]

`head`: log-prob, entropy and reverse KL (nats) from hidden states and weights, and their gradients: kdrl's chunked head
against logits in the format that are widened afterwards. `update`: the written tokens' log-probs and the gradient of
their mean in all weights: packed with quick layers, padded with quick layers, and the library's model padded.
`engine`: log-probs of sampled tokens against the library's model on the finished text. Errors are against float64 with
the same (rounded) weights: greatest and root mean square, in nats, or of gradients over the greatest and the root mean
square of the exact one. Models are random, scaled so that distributions are far from uniform. Writes
benchmarks/results/precision.json.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SEED, begin, chosen, make, save, sized, token_prompts
from torch import Tensor, nn

from kdrl.batch import Response, Rollouts
from kdrl.engines import TorchEngine
from kdrl.models import LoadedModel, head_of
from kdrl.models.packing import micro_batches, wanted_states
from kdrl.models.quick import library_layers
from kdrl.objectives.head import Head, score_tokens
from kdrl.objectives.logspace import relative_entropy
from kdrl.tasks import Problem

FORMATS = ("float32", "bfloat16", "autocast")
MODELS = {"0.3M, vocabulary 50": ("0.3M", 50), "1M, vocabulary 4,096": ("1M", 4096)}
HEADS = {"vocabulary 50": 50, "vocabulary 4,096": 4096, "vocabulary 32,000": 32_000}
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 4, 4, 48, 24
TOKENS, WIDTH = 256, 256
Results = dict[str, Tensor]


def errors(found: Results, exact: Results) -> dict[str, dict[str, float]]:
    """Greatest and root mean square error of each quantity."""
    out = {}
    for name, want in exact.items():
        apart, relative = (found[name].double() - want).abs(), "gradient" in name
        rms, most = float(apart.square().mean().sqrt()), float(apart.max())
        if relative:
            rms, most = rms / float(want.square().mean().sqrt()), most / float(want.abs().max())
        out[name] = {"max": float(f"{most:.3g}"), "rms": float(f"{rms:.3g}")}
    return out


def casting(form: str) -> AbstractContextManager[Any]:
    """The format's autocast."""
    return torch.autocast("cpu", torch.bfloat16) if form == "autocast" else nullcontext()


def head_results(form: str, way: str, inputs: Sequence[Tensor], targets_N: Tensor) -> Results:
    """Values and gradients of one way; `inputs` are hidden states and weights of student and teacher."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
    teacher_hidden, teacher_weight = inputs[2:]
    with casting(form):
        if way == "kdrl":
            teacher = Head(teacher_weight)
            scores = score_tokens(
                Head(weight),
                hidden,
                targets_N,
                entropy=True,
                comparisons=[lambda q, part: relative_entropy(q, teacher.logp(teacher_hidden[part]))],
                chunk_tokens=TOKENS // 4,
            )
            assert scores.entropy_N is not None
            values = [scores.logp_N, scores.entropy_N, scores.losses_N[0]]
        else:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            logq = nn.functional.linear(hidden, weight).to(wide).log_softmax(-1)
            logp = nn.functional.linear(teacher_hidden, teacher_weight).to(wide).log_softmax(-1)
            logp_N = logq.gather(-1, targets_N[:, None])[:, 0]
            values = [logp_N, -(logq.exp() * logq).sum(-1), (logq.exp() * (logq - logp)).sum(-1)]
        torch.stack(values).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    names = ("log-prob", "entropy", "reverse KL", "gradient of hidden states", "gradient of weights")
    return dict(zip(names, [*(x.detach() for x in values), hidden.grad, weight.grad], strict=True))


def head_case(vocabulary: int, form: str) -> dict[str, Any]:
    """The chunked head and plain logits."""
    random = torch.Generator().manual_seed(SEED)
    shapes, scales = [(TOKENS, WIDTH), (vocabulary, WIDTH)] * 2, [1.0, 2.5 / math.sqrt(WIDTH)] * 2
    form_ = torch.bfloat16 if form == "bfloat16" else torch.float32
    inputs = [(torch.randn(*s, generator=random) * c).to(form_) for s, c in zip(shapes, scales, strict=True)]
    targets_N = torch.randint(vocabulary, (TOKENS,), generator=random)
    exact = head_results("float64", "library", [x.double() for x in inputs], targets_N)
    return {way: errors(head_results(form, way, inputs, targets_N), exact) for way in ("kdrl", "library")}


def model_of(name: str, form: str) -> tuple[LoadedModel, LoadedModel]:
    """A model in a format, and the same weights in float64."""
    size, vocabulary = MODELS[name]
    loaded = make(sized(size, vocabulary, **({"autocast": "bfloat16"} if form == "autocast" else {})), trainable=True)
    with torch.no_grad():
        for key, weight in loaded.model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12.0 if "emb" in key else 4.0)
    if form == "bfloat16":
        loaded.model.to(torch.bfloat16)
    exact = copy.copy(loaded)
    # Its norms are the quick ones: the library's are float32 whatever the weights are.
    exact.model, exact.config = copy.deepcopy(loaded.model).double(), loaded.config.model_copy()
    if form == "autocast":
        exact.config = exact.config.model_copy(update={"autocast": None})
    return loaded, exact


def texts(loaded: LoadedModel) -> Rollouts:
    """Random responses, a group a prompt, lengths from half to all."""
    random = torch.Generator().manual_seed(SEED)
    problem, responses = Problem("p", "", ""), []
    for group, prompt in enumerate(token_prompts(loaded, PROMPTS, PROMPT_TOKENS // 2, PROMPT_TOKENS)):
        for n in range(GROUP):
            count = NEW_TOKENS - n * NEW_TOKENS // (2 * GROUP)
            own = torch.randint(2, loaded.vocab_size, (count,), generator=random).tolist()
            responses.append(Response(problem, group, prompt, own, "student", True, ""))
    return Rollouts.of(responses)


def packed_logp(loaded: LoadedModel, rollouts: Rollouts, *, padded: bool) -> Tensor:
    """Log-probs of the responses' tokens as kdrl's update has them, `[N]`."""
    rows, pieces = range(rollouts.rows), []
    for micro in micro_batches(loaded, rollouts, rows, rollouts.trained_N, 1 << 14, padded=padded):
        assert bool(micro.segments) != padded
        scores = score_tokens(head_of(loaded), wanted_states(loaded, micro), rollouts.tokens_N[micro.index_M])
        pieces.append((micro.index_M, scores.logp_N))
    index = torch.cat([i for i, _ in pieces])
    return torch.cat([logp for _, logp in pieces])[index.argsort()]


def library_logp(loaded: LoadedModel, rollouts: Rollouts) -> Tensor:
    """The same from the model's own logits, padded on the right."""
    found = [r.prompt_ids + r.token_ids for r in rollouts.responses]
    width = max(map(len, found))
    ids = torch.tensor([row + [loaded.pad_id] * (width - len(row)) for row in found])
    mask = torch.arange(width) < torch.tensor(list(map(len, found)))[:, None]
    with loaded.autocast():
        logits = loaded.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = logits[..., : loaded.vocab_size].to(wide).log_softmax(-1)
    spans = [(len(r.prompt_ids) - 1, torch.tensor(r.token_ids)[:, None]) for r in rollouts.responses]
    return torch.cat([logp[b, at : at + len(own)].gather(-1, own)[:, 0] for b, (at, own) in enumerate(spans)])


def with_gradient(loaded: LoadedModel, way: Callable[[], Tensor]) -> Results:
    """Log-probs, and the gradient of their mean in all weights as one vector."""
    loaded.model.zero_grad()
    logp_N = way()
    logp_N.mean().backward()
    grads = [p.grad.double().flatten() for p in loaded.model.parameters() if p.grad is not None]
    return {"log-prob": logp_N.detach(), "gradient": torch.cat(grads)}


def update_case(name: str, form: str) -> dict[str, Any]:
    """Packed, padded, and the library's model."""
    loaded, exact = model_of(name, form)
    rollouts = texts(loaded)
    want = with_gradient(exact, lambda: library_logp(exact, rollouts))
    found = {
        "kdrl": with_gradient(loaded, lambda: packed_logp(loaded, rollouts, padded=False)),
        "quick layers, padded": with_gradient(loaded, lambda: packed_logp(loaded, rollouts, padded=True)),
    }
    with library_layers(loaded.model):
        found["library"] = with_gradient(loaded, lambda: library_logp(loaded, rollouts))
    return {way: errors(each, want) for way, each in found.items()}


@torch.no_grad()
def engine_case(name: str, form: str) -> dict[str, Any]:
    """What the engine says of the tokens that it drew."""
    loaded, exact = model_of(name, form)
    prompts = token_prompts(loaded, PROMPTS, PROMPT_TOKENS // 2, PROMPT_TOKENS)
    written = TorchEngine(loaded, 64).generate(prompts, samples=GROUP, max_new_tokens=NEW_TOKENS, seed=SEED)
    responses = [
        Response(Problem("p", "", ""), group, list(prompt), sample.token_ids, "student", True, "", logp=sample.logp)
        for group, (prompt, samples) in enumerate(zip(prompts, written, strict=True))
        for sample in samples
    ]
    rollouts = Rollouts.of(responses)
    want = {"log-prob": library_logp(exact, rollouts)}
    found = {"kdrl": {"log-prob": torch.tensor([x for r in responses for x in r.logp or []])}}
    with library_layers(loaded.model):
        found["library"] = {"log-prob": library_logp(loaded, rollouts)}
    return {way: errors(each, want) for way, each in found.items()}


def every_case() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names, and what measures each."""
    for form in FORMATS:
        for name, vocabulary in HEADS.items():
            yield f"head, {name}, {form}", lambda v=vocabulary, f=form: head_case(v, f)
        for name in MODELS:
            yield f"update, {name}, {form}", lambda n=name, f=form: update_case(n, f)
            yield f"engine, {name}, {form}", lambda n=name, f=form: engine_case(n, f)


def main() -> None:
    """Run the cases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="few cases, to see that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "precision.json", help="cases of other names in it are kept"
    )
    options = parser.parse_args()
    begin(options)
    cases, found = dict(every_case()), []
    for name in chosen(list(cases), options):
        found.append({"case": name, "errors": cases[name]()})
        print(name)
        for way, each in found[-1]["errors"].items():
            print(f"  {way}: " + "; ".join(f"{what} {e['max']:.1e} ({e['rms']:.1e})" for what, e in each.items()))
    save(options, found)


if __name__ == "__main__":
    main()
