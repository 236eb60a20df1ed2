"""One differentiable pass over a head in chunks: scalars forward, and backward the gradient of each chunk's logits.

Forward keeps three numbers a token, and the last chunk. Backward begins with that one, makes the logits of every other
again, turns them into their own gradient in place, and adds its product with the hidden states to one float32 sum,
rounded once. Only comparisons go through autograd, and
only from their log-probs on. Left out: second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdrl.objectives.kernels import Pulls, Rows, gradient_, read_rows
from kdrl.objectives.logspace import refuse_second_derivatives
from kdrl.objectives.products import add_columns_by_rows, rows_by_columns, rows_by_rows, wide_of

if TYPE_CHECKING:
    from kdrl.objectives.head import Head

# fn(logq_MV, token slice) -> numbers [M, ...]: one comparison of the student's distribution with a teacher's evidence.
Comparison = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Pass:
    """What a pass is over; `comparisons` see the log-probs of one slice of `parts` at a time.

    The last `keep` chunks wait for the backward pass instead of being made again; it takes the chunks from the last to
    the first, so that one kept chunk is never beside another.
    """

    head: Head
    targets_N: Tensor
    temperature: float
    comparisons: tuple[Comparison, ...]
    parts: Sequence[slice]
    keep: int = 0

    def chunk(self, head: Head, hidden_ND: Tensor, part: slice, rows: Rows | None = None) -> _Chunk:
        """Logits of some tokens at the temperature; log-probs where there are comparisons."""
        with torch.no_grad():
            logits_CV = head.logits(hidden_ND[part])
            if self.temperature != 1.0:
                logits_CV /= self.temperature
            rows = read_rows(logits_CV) if rows is None else rows
            return _Chunk(logits_CV, rows, rows.logp(logits_CV, self.targets_N[part]))


@dataclass
class _Chunk:
    """Logits of a slice of tokens, which become log-probs, and then their own gradient."""

    values_CV: Tensor
    rows: Rows
    logp_C: Tensor
    normalised: bool = False
    losses: Sequence[Tensor | None] = ()

    def compare(self, work: Pass, part: slice, wanted: Sequence[bool], tracked: bool) -> None:
        """Run the comparisons that are wanted."""
        self.rows.normalise_(self.values_CV)
        self.normalised = True
        self.values_CV.requires_grad_(tracked)
        pairs = zip(work.comparisons, wanted, strict=True)
        self.losses = [compare(self.values_CV, part) if want else None for compare, want in pairs]

    def gradient(
        self, work: Pass, part: slice, upstream: Sequence[Tensor | None], closed: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradient of the head's own sum of products, in place, and of what comparisons read beside log-probs."""
        found: Sequence[Tensor | None] = [None] * len(closed)
        more_CV: Tensor | None = None
        values, pulls = [], []
        for loss, pull in zip(self.losses, upstream[2:] if self.losses else (), strict=True):
            if loss is not None and pull is not None and loss.requires_grad:
                values.append(loss)
                pulls.append(pull)
        if values:
            inputs = [self.values_CV, *closed]
            more_CV, *found = torch.autograd.grad(values, inputs, pulls, retain_graph=bool(closed), allow_unused=True)
            del values
        self.losses = ()
        values_CV, softcap, slope_CV = self.values_CV.detach(), work.head.softcap, None
        if softcap is not None:
            slope_CV = self.rows.logits(values_CV) if self.normalised else values_CV.clone()
            slope_CV.mul_(work.temperature / softcap).square_().neg_().add_(1.0)
        given = Pulls(work.targets_N[part], upstream[0], upstream[1], more_CV)
        gradient_(values_CV, self.rows, given, normalised=self.normalised)
        if slope_CV is not None:
            values_CV.mul_(slope_CV)
        if (factor := work.head.scale / work.temperature) != 1.0:
            values_CV.mul_(factor)
        return values_CV, found


def run(work: Pass, hidden_ND: Tensor) -> tuple[Tensor, ...]:
    """Log-probs of the targets, entropies, and what each comparison gives, of all tokens."""
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_ND, *work.head.tensors))
    pieces: list[tuple[Tensor, ...]] = []
    chunks: list[_Chunk | Rows] = []
    # Tensors that comparisons read and that are trained too, in the order in which they are met.
    closed: dict[int, Tensor] = {}
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for place, part in enumerate(work.parts):
            keep = tracked and place >= len(work.parts) - work.keep
            chunk = work.chunk(work.head, hidden_ND, part)
            if work.comparisons:
                chunk.compare(work, part, [True] * len(work.comparisons), keep)
            losses = [loss for loss in chunk.losses if loss is not None]
            closed |= {id(leaf): leaf for leaf in _leaves(losses) if leaf is not chunk.values_CV}
            pieces.append((chunk.logp_C, chunk.rows.entropy_C, *(loss.detach().clone() for loss in losses)))
            chunks.append(chunk if keep else chunk.rows)
            del chunk, losses
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    if not tracked and not closed:
        return tuple(columns)
    return _Graph.apply(work, chunks, columns, hidden_ND, *work.head.tensors, *closed.values())  # type: ignore[no-any-return]


def _leaves(values: Iterable[Tensor]) -> Iterable[Tensor]:
    """The trained tensors that values depend on."""
    values = [value for value in values if value.requires_grad]
    yield from (value for value in values if value.grad_fn is None)
    waiting, seen = [value.grad_fn for value in values], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting.extend(before for before, _ in node.next_functions)


class _Graph(torch.autograd.Function):
    """Gives the columns of a pass their gradient."""

    @staticmethod
    def forward(
        ctx: Any, work: Pass, chunks: list[_Chunk | Rows], columns: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.work, ctx.chunks = work, chunks
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        work: Pass = ctx.work
        sums = _Sums(work, ctx.saved_tensors, ctx.needs_input_grad[3:])
        compared = [g is not None for g in upstream[2:]]
        with torch.autocast(sums.hidden_ND.device.type, enabled=False):
            for place, part in reversed(list(enumerate(work.parts))):
                chunk = ctx.chunks[place]
                if isinstance(chunk, Rows):
                    chunk = work.chunk(sums.head, sums.hidden_ND, part, chunk)
                    if any(compared):
                        with torch.enable_grad():
                            chunk.compare(work, part, compared, True)
                # What is kept becomes the gradient, so another backward pass makes it again.
                ctx.chunks[place] = chunk.rows
                pulls = [None if g is None else g[part] for g in upstream]
                found = chunk.gradient(work, part, pulls, sums.closed)
                del chunk
                sums.add(found, part)
                del found
        return (None, None, None, *sums.rounded())


class _Sums:
    """Gradients of a pass's inputs while its chunks are added up."""

    def __init__(self, work: Pass, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        count = 1 + len(work.head.tensors)
        self.inputs, self.hidden_ND = inputs, inputs[0]
        self.head, self.closed = work.head.with_tensors(inputs[1:count]), list(inputs[count:])
        wide = wide_of(*inputs[:count])
        formats = [inputs[0].dtype, *(wide for _ in inputs[1:count]), *(x.dtype for x in self.closed)]
        self.sums = [
            torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if want else None
            for x, dtype, want in zip(inputs, formats, wanted, strict=True)
        ]
        # By name: of hidden states, weights, bias, the factors of each adapter, and what comparisons read.
        self.of_hidden, self.of_weight, *rest = self.sums
        self.of_bias = None if self.head.bias_V is None else rest.pop(0)
        self.of_factors, self.of_closed = rest[: 2 * len(self.head.adapters)], rest[2 * len(self.head.adapters) :]

    def rounded(self) -> list[Tensor | None]:
        """The sums in the formats of the inputs."""
        return [None if s is None else s.to(x.dtype) for s, x in zip(self.sums, self.inputs, strict=True)]

    def add(self, found: tuple[Tensor, Sequence[Tensor | None]], part: slice) -> None:
        """Add what a chunk contributes."""
        gradient_CV, of_closed = found
        for total, gradient in zip(self.of_closed, of_closed, strict=True):
            if total is not None and gradient is not None:
                total += gradient
        self._add_products(gradient_CV, self.hidden_ND[part], part)

    def _add_products(self, gradient_CV: Tensor, hidden_CD: Tensor, part: slice) -> None:
        rows, of_hidden_CD = self.head.vocab_size, None
        if self.of_hidden is not None:
            of_hidden_CD = rows_by_rows(gradient_CV, self.head.weight_VD[:rows])
        if self.of_weight is not None:
            add_columns_by_rows(self.of_weight[:rows], gradient_CV, hidden_CD)
        if self.of_bias is not None:
            self.of_bias[:rows] += gradient_CV.sum(0)
        for low, of_a_RD, of_b_VR in zip(self.head.adapters, self.of_factors[::2], self.of_factors[1::2], strict=True):
            if of_b_VR is not None:
                inner_CR = rows_by_columns(hidden_CD, low.a_RD) * low.scale
                add_columns_by_rows(of_b_VR[:rows], gradient_CV, inner_CR)
            of_inner_CR = rows_by_rows(gradient_CV, low.b_VR[:rows]) * low.scale
            if of_a_RD is not None:
                add_columns_by_rows(of_a_RD, of_inner_CR, hidden_CD)
            if of_hidden_CD is not None:
                of_hidden_CD += rows_by_rows(of_inner_CR, low.a_RD)
        if self.of_hidden is not None:
            assert of_hidden_CD is not None
            self.of_hidden[part] = of_hidden_CD
