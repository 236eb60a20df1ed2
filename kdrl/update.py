"""One optimizer step on a set of responses: micro-batches, the summed loss of all terms, clipping, bad numbers.

Token weights are fixed over the global batch before the first micro-batch, so how it is split changes nothing.
Left out: several processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from kdrl.batch import MicroBatch, Rollouts, lay_out
from kdrl.features.live import Features
from kdrl.models import LoadedModel, head_of
from kdrl.models.packing import micro_batches, wanted_states
from kdrl.objectives.head import Comparison, score_tokens
from kdrl.objectives.objective import Active, reduction, weighted_loss
from kdrl.objectives.terms import PolicyGradient, TokenView
from kdrl.teachers import Evidence
from kdrl.teachers.base import Given
from kdrl.vocab.spaces import Spaces


@dataclass
class Tally:
    """Sums over an update's tokens, for the metrics."""

    loss: dict[str, float] = field(default_factory=dict)
    divergence: dict[str, list[float]] = field(default_factory=dict)
    entropy: float = 0.0
    held: float = 0.0
    policy_tokens: int = 0
    mismatch: float = 0.0
    student_tokens: int = 0
    tokens: int = 0
    counts: dict[str, float] = field(default_factory=dict)

    def add_count(self, name: str, value: float) -> None:
        """Add to a count that a term keeps of an optimizer step."""
        self.counts[name] = self.counts.get(name, 0.0) + value

    def add_loss(self, name: str, value: float) -> None:
        """Add one micro-batch's share of a term's reduced loss."""
        self.loss[name] = self.loss.get(name, 0.0) + value


@dataclass(frozen=True)
class Scored:
    """Everything about a step's rollouts that its updates need."""

    rollouts: Rollouts
    active: Sequence[Active]
    evidence: Mapping[str, Evidence]
    reference: Evidence | None
    old_N: Tensor | None
    sampled_N: Tensor | None
    temperature: float
    data: Mapping[str, Tensor]
    uniform: Mapping[str, Tensor] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)

    def starts(self, index_M: Tensor) -> list[int] | None:
        """Places of a micro-batch where a chunk may begin: those inside no block of any term."""
        if not self.blocks:
            return None
        ids_KM = torch.stack([block_N[index_M] for block_N in self.blocks.values()])
        fresh_M = (ids_KM[:, 1:] != ids_KM[:, :-1]).all(0)
        return [0, *(fresh_M.nonzero().squeeze(1) + 1).tolist()]

    def given(self, active: Active) -> Given:
        """What a term's comparison may know beside the distributions."""
        data = dict(self.data)
        if active.name in self.blocks:
            data["block"] = torch.where(active.keep_N, self.blocks[active.name], -1)
        return Given(
            self.rollouts.tokens_N,
            data,
            self.reference,
            self.uniform.get(active.name),
            self.measured.get(active.name, {}),
            active.moment,
        )


class Updater:
    """Accumulates gradients of the objective on the student, `budget` tokens at a time."""

    def __init__(self, student: LoadedModel, budget: int, features: Features | None = None) -> None:
        self.student = student
        self.budget = budget
        self.features = features
        self.spaces: Spaces | None = None
        self.parameters: list[Parameter] = [p for p in student.model.parameters() if p.requires_grad]
        self.projectors: list[Parameter] = [] if features is None else list(features.named_parameters.values())

    def attach(self, spaces: Spaces | None) -> None:
        """Train the projectors of dual-space terms as well."""
        self.spaces = spaces
        self.projectors += [] if spaces is None else list(spaces.named_parameters.values())

    @property
    def named_parameters(self) -> dict[str, Parameter]:
        """The student's parameters and what is trained beside it, by their names in a checkpoint."""
        each = (part.named_parameters for part in (self.features, self.spaces) if part is not None)
        beside = {name: parameter for found in each for name, parameter in found.items()}
        return dict(self.student.model.named_parameters()) | beside

    @torch.no_grad()
    def score_policy(
        self, rollouts: Rollouts, temperature: float, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of all trained tokens (of `rows`) under the present policy, both `[N]`."""
        logp_N = torch.zeros(rollouts.tokens, device=rollouts.tokens_N.device)
        entropy_N = torch.zeros_like(logp_N)
        head = head_of(self.student)
        rows = range(rollouts.rows) if rows is None else rows
        for micro in micro_batches(self.student, rollouts, rows, rollouts.trained_N, self.budget):
            scores = score_tokens(
                head,
                self._hidden(micro),
                rollouts.tokens_N[micro.index_M],
                temperature=temperature,
                entropy=True,
            )
            assert scores.entropy_N is not None
            logp_N[micro.index_M] = scores.logp_N.to(logp_N.dtype)
            entropy_N[micro.index_M] = scores.entropy_N.to(logp_N.dtype)
        return logp_N, entropy_N

    @torch.no_grad()
    def probe(self, scored: Scored, keep_N: Tensor, comparison: Callable[[Tensor], Comparison]) -> Tensor:
        """One number per kept token `[N]` from student and teacher distributions, without gradient."""
        rollouts = scored.rollouts
        out_N = torch.zeros(rollouts.tokens, device=rollouts.tokens_N.device)
        for micro in micro_batches(self.student, rollouts, range(rollouts.rows), keep_N, self.budget):
            targets_M, compare = rollouts.tokens_N[micro.index_M], comparison(micro.index_M)
            head, hidden_MD = head_of(self.student), self._hidden(micro)
            scores = score_tokens(head, hidden_MD, targets_M, temperature=scored.temperature, comparisons=[compare])
            out_N[micro.index_M] = scores.losses_N[0][:, 0].to(out_N.dtype)
        return out_N

    def _hidden(self, micro: MicroBatch) -> Tensor:
        return wanted_states(self.student, micro)

    def _inside(self, scored: Scored, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass of the student: its hidden states at the wanted tokens, and what some terms make of it."""
        watching = [a for a in scored.active if a.term.needs.features]
        found: dict[str, Tensor] = {}
        if self.features is None or not watching:
            hidden_MD = self._hidden(micro)
        else:
            with self.features.watch(watching) as kept:
                hidden_MD = self._hidden(micro)
            found = self.features.losses(watching, kept, hidden_MD, micro, scored.rollouts)
        projecting = [a for a in scored.active if a.term.needs.projectors]
        if self.spaces is not None and projecting:
            found |= self.spaces.losses(projecting, hidden_MD, micro.index_M, scored)
        return hidden_MD, found

    def accumulate(self, scored: Scored, rows: Sequence[int], tally: Tally | None = None) -> float:
        """Add the gradient of the objective on `rows`, one optimizer step's responses, to the student's; its loss."""
        rollouts = scored.rollouts
        weights = [reduction(active, rollouts, rows) for active in scored.active]
        wanted_N = torch.zeros(rollouts.tokens, dtype=torch.bool, device=rollouts.tokens_N.device)
        for active in scored.active:
            wanted_N |= active.wanted_N(rollouts.row_N, rollouts.rows)
        coupled = self._couple(scored, rows, wanted_N, tally)
        if self.features is not None:
            self.features.prepare(scored.active, rollouts, rows)
        total = 0.0
        padded = self.features is not None and self.features.padded(scored.active, rollouts)
        for micro in micro_batches(self.student, rollouts, rows, wanted_N, self.budget, padded=padded):
            loss = self._loss(scored, micro, weights, coupled, tally)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _couple(self, scored: Scored, rows: Sequence[int], wanted_N: Tensor, tally: Tally | None) -> dict[str, Tensor]:
        """What terms whose responses depend on each other must know of the whole step, `[N]` or `[N, k]` by term."""
        asking = [a for a in scored.active if a.term.couples]
        if not asking:
            return {}
        rollouts = scored.rollouts
        logq_N = self.score_policy(rollouts, scored.temperature, rows)[0]
        # One micro-batch of all rows that is never run: couple sees exactly the view that a loss would.
        micro = lay_out(rollouts, list(rows), wanted_N, self.student.pad_id)
        found = {}
        for active in asking:
            view = _view(scored, active, micro, logq_N[micro.index_M], None, None, None)
            coupled_M = active.term.couple(view).to(logq_N.dtype)
            found[active.name] = logq_N.new_zeros(len(logq_N), *coupled_M.shape[1:])
            found[active.name][micro.index_M] = coupled_M
            if tally is not None:
                for key, value in active.term.count(view).items():
                    tally.add_count(f"{active.name}/{key}", value)
        return found

    def _loss(
        self,
        scored: Scored,
        micro: MicroBatch,
        weights: list[Tensor],
        coupled: Mapping[str, Tensor],
        tally: Tally | None,
    ) -> Tensor:
        reading = [a for a in scored.active if a.term.needs.teacher == "distribution"]
        compared = [a for a in reading if not a.term.needs.projectors]
        targets_M = scored.rollouts.tokens_N[micro.index_M]
        hidden_MD, inside = self._inside(scored, micro)
        scores = score_tokens(
            head_of(self.student),
            hidden_MD,
            targets_M,
            temperature=scored.temperature,
            entropy=True,
            comparisons=[
                scored.evidence[a.teacher or ""].comparison(a.term.compare, micro.index_M, scored.given(a))
                for a in compared
            ],
            starts=scored.starts(micro.index_M),
        )
        found = {a.name: found_M3 for a, found_M3 in zip(compared, scores.losses_N, strict=True)}
        divergences = {name: found_M3[:, 0] for name, found_M3 in found.items()} | inside
        total = scores.logp_N.new_zeros(())
        for active, weight_N in zip(scored.active, weights, strict=True):
            view = _view(
                scored,
                active,
                micro,
                scores.logp_N,
                scores.entropy_N,
                divergences.get(active.name),
                coupled.get(active.name),
            )
            term_loss = weighted_loss(active, view, weight_N[micro.index_M])
            total = total + active.weight * term_loss
            if tally is not None:
                tally.add_loss(active.name, float(term_loss.detach()))
                _tally_policy(tally, active, view)
                _tally_support(tally, active, view, found.get(active.name) if active.term.compared else None)
                if self.spaces is not None and active.name in self.spaces.right:
                    kept = max(1, int((weight_N != 0).sum()))
                    tally.add_count(f"{active.name}/agreement", self.spaces.right[active.name] / kept)
        if tally is not None:
            _tally_tokens(tally, scored, micro, scores.logp_N, scores.entropy_N)
        return total

    def gradients(self) -> list[Tensor | None]:
        """Copies of the accumulated gradients."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]

    def clear(self) -> None:
        """Forget the accumulated gradients."""
        for p in (*self.parameters, *self.projectors):
            p.grad = None

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None, loss: float = 0.0) -> tuple[float, bool]:
        """Clip and apply the gradients; returns their norm and whether they were applied (norm and loss are finite).

        Projectors are clipped apart, so that one fresh from the seed does not shorten the student's step.
        """
        limit = math.inf if clip is None else clip
        norms = [float(torch.nn.utils.clip_grad_norm_(group, limit)) for group in (self.parameters, self.projectors)]
        value = norms[0]
        applied = all(map(math.isfinite, (*norms, loss)))
        if applied:
            optimizer.step()
        self.clear()
        return value, applied


def _columns(scored: Scored, teacher: Evidence | None) -> Mapping[str, Tensor]:
    return scored.data if teacher is None else {**scored.data, **teacher.columns}


def _view(
    scored: Scored,
    active: Active,
    micro: MicroBatch,
    logq_M: Tensor,
    entropy_M: Tensor | None,
    divergence_M: Tensor | None,
    coupled_N: Tensor | None,
) -> TokenView:
    rollouts, index_M = scored.rollouts, micro.index_M
    row_M = rollouts.row_N[index_M]
    teacher = scored.evidence.get(active.teacher or "")
    return TokenView(
        logq_N=logq_M,
        row_N=micro.row_M,
        rows=len(micro.rows),
        last_N=rollouts.last_N[index_M],
        keep_N=active.keep_N[index_M],
        reward_N=rollouts.reward_B[row_M],
        correct_N=rollouts.correct_B[row_M],
        advantage_N=None if active.advantage_B is None else active.advantage_B[row_M],
        old_N=None if scored.old_N is None else scored.old_N[index_M],
        teacher_N=None if teacher is None else teacher.logp_N[index_M],
        reference_N=None if scored.reference is None else scored.reference.logp_N[index_M],
        divergence_N=divergence_M,
        entropy_N=entropy_M,
        group_N=rollouts.group_B[row_M],
        foreign_N=~rollouts.origin_N(("student",))[index_M],
        coupled_N=None if coupled_N is None else coupled_N[index_M],
        data={name: values_N[index_M] for name, values_N in _columns(scored, teacher).items()},
        measured={key: values_N[index_M] for key, values_N in scored.measured.get(active.name, {}).items()},
        moment=active.moment,
    )


@torch.no_grad()
def _tally_policy(tally: Tally, active: Active, view: TokenView) -> None:
    if isinstance(active.term, PolicyGradient):
        held_M = active.term.clipped(view)[1] & view.keep_N
        tally.held += float(held_M.sum())
        tally.policy_tokens += int(view.keep_N.sum())


@torch.no_grad()
def _tally_support(tally: Tally, active: Active, view: TokenView, found_M3: Tensor | None) -> None:
    """Sums of divergence and covered masses over the kept tokens, and their number."""
    if found_M3 is not None:
        kept_M3 = found_M3[view.keep_N].double()
        sums = tally.divergence.setdefault(active.name, [0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate([*kept_M3.sum(0).tolist(), float(len(kept_M3))]):
            sums[i] += value


@torch.no_grad()
def _tally_tokens(tally: Tally, scored: Scored, micro: MicroBatch, logq_M: Tensor, entropy_M: Tensor | None) -> None:
    tally.tokens += len(micro.index_M)
    assert entropy_M is not None
    tally.entropy += float(entropy_M.sum())
    if scored.sampled_N is not None:
        sampled_M = scored.sampled_N[micro.index_M]
        known_M = ~sampled_M.isnan()
        tally.mismatch += float((logq_M - sampled_M)[known_M].abs().sum())
        tally.student_tokens += int(known_M.sum())
