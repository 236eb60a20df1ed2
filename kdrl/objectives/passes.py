"""One differentiable pass over a head in chunks: scalars forward, and backward the gradient of each chunk's logits.

Forward keeps three numbers a token. Backward makes a chunk's logits again, turns them into their own gradient in place,
and adds its product with the hidden states to one float32 sum, rounded once. Only comparisons go through autograd, and
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
    """What a pass is over; `comparisons` see the log-probs of one slice of `parts` at a time."""

    head: Head
    targets_N: Tensor
    temperature: float
    comparisons: tuple[Comparison, ...]
    parts: Sequence[slice]

    def logits(self, head: Head, hidden_CD: Tensor) -> Tensor:
        """Logits at the temperature, without gradient."""
        with torch.no_grad():
            logits_CV = head.logits(hidden_CD)
            return logits_CV if self.temperature == 1.0 else logits_CV.div_(self.temperature)


def run(work: Pass, hidden_ND: Tensor) -> tuple[Tensor, ...]:
    """Log-probs of the targets, entropies, and what each comparison gives, of all tokens."""
    tracked = torch.is_grad_enabled()
    pieces: list[tuple[Tensor, ...]] = []
    rows: list[Rows] = []
    # Tensors that comparisons read and that are trained too, in the order in which they are met.
    closed: dict[int, Tensor] = {}
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for part in work.parts:
            logits_CV = work.logits(work.head, hidden_ND[part])
            found = read_rows(logits_CV)
            rows.append(found)
            logp_C = found.logp(logits_CV, work.targets_N[part])
            losses: list[Tensor] = []
            if work.comparisons:
                found.normalise_(logits_CV)
                losses = [compare(logits_CV, part) for compare in work.comparisons]
            closed |= {id(leaf): leaf for leaf in _leaves(losses)}
            pieces.append((logp_C, found.entropy_C, *(loss.detach().clone() for loss in losses)))
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    inputs = (hidden_ND, *work.head.tensors, *closed.values())
    if not tracked or not any(tensor.requires_grad for tensor in inputs):
        return tuple(columns)
    return _Graph.apply(work, rows, columns, *inputs)  # type: ignore[no-any-return]


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
    def forward(ctx: Any, work: Pass, rows: list[Rows], columns: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.work, ctx.rows = work, rows
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        work: Pass = ctx.work
        sums = _Sums(work, ctx.saved_tensors, ctx.needs_input_grad[3:])
        with torch.autocast(sums.hidden_ND.device.type, enabled=False):
            for part, rows in zip(work.parts, ctx.rows, strict=True):
                pulls = [None if g is None else g[part] for g in upstream]
                sums.add_chunk(part, rows, pulls[0], pulls[1], pulls[2:])
        return (None, None, None, *sums.rounded())


class _Sums:
    """Gradients of a pass's inputs while its chunks are added up."""

    def __init__(self, work: Pass, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        count = 1 + len(work.head.tensors)
        self.work, self.inputs, self.hidden_ND = work, inputs, inputs[0]
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

    def add_chunk(
        self, part: slice, rows: Rows, logp_C: Tensor | None, entropy_C: Tensor | None, losses: Sequence[Tensor | None]
    ) -> None:
        """Add what a chunk contributes, given the upstream gradients of its numbers."""
        work, head, hidden_CD = self.work, self.head, self.hidden_ND[part]
        logits_CV = work.logits(head, hidden_CD)
        slope_CV = None
        if head.softcap is not None:
            slope_CV = (logits_CV * (work.temperature / head.softcap)).square_().neg_().add_(1.0)
        more_CV, compared = None, any(g is not None for g in losses)
        if compared:
            more_CV = self._through_comparisons(rows.normalise_(logits_CV), part, losses)
        pulls = Pulls(work.targets_N[part], logp_C, entropy_C, more_CV)
        gradient_CV = gradient_(logits_CV, rows, pulls, normalised=compared)
        del more_CV, pulls
        if slope_CV is not None:
            gradient_CV.mul_(slope_CV)
        if (factor := head.scale / work.temperature) != 1.0:
            gradient_CV.mul_(factor)
        self._add_products(gradient_CV, hidden_CD, part)

    def _through_comparisons(self, logq_CV: Tensor, part: slice, losses: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of log-probs; that of what comparisons read beside them is added up."""
        with torch.enable_grad():
            leaf_CV = logq_CV.detach().requires_grad_()
            pairs = [
                (compare(leaf_CV, part), upstream)
                for compare, upstream in zip(self.work.comparisons, losses, strict=True)
                if upstream is not None
            ]
            pairs = [(value, upstream) for value, upstream in pairs if value.requires_grad]
        if not pairs:
            return None
        values, pulls = zip(*pairs, strict=True)
        inputs = [leaf_CV, *self.closed]
        more_CV, *found = torch.autograd.grad(values, inputs, pulls, retain_graph=bool(self.closed), allow_unused=True)
        for total, gradient in zip(self.of_closed, found, strict=True):
            if total is not None and gradient is not None:
                total += gradient
        return more_CV

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
