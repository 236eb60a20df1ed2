"""Several teachers as one: routed by the problem, averaged, or the best of them, a chunk of the vocabulary at a time.

Left out: a combination of combinations, and sharing a pass between a combination and a term that asks a member alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.errors import UserError
from kdrl.objectives.head import chunks
from kdrl.objectives.support import Few
from kdrl.teachers.base import Evidence, Gives, Need, Teacher
from kdrl.teachers.checks import place_of
from kdrl.teachers.combined import AverageConfig, BestConfig, RouteConfig
from kdrl.teachers.route import route_of


@dataclass(frozen=True)
class SeveralEvidence(Evidence):
    """Scores of several teachers by name."""

    members: Mapping[str, Evidence] | None = None

    def parts(self, name: str) -> Mapping[str, Evidence]:
        """Each teacher's own scores."""
        return self.members or {}


@dataclass(frozen=True)
class ChosenEvidence(SeveralEvidence):
    """At each token the scores of one of several teachers: `which_N` is its place among them, -1 where not scored."""

    which_N: Tensor | None = None
    all_asked: bool = False

    @property
    def fan(self) -> int:
        """All of them where the choice looks at their scores."""
        return len(self.members or {}) if self.all_asked else 1

    def shares(self) -> dict[str, float]:
        """The share of the scored tokens of each teacher."""
        assert self.which_N is not None
        total = max(1, int((self.which_N >= 0).sum()))
        return {name: int((self.which_N == i).sum()) / total for i, name in enumerate(self.members or {})}

    @torch.no_grad()
    def logp(self, index_C: Tensor, like: Tensor) -> Tensor:
        """Log-probs `[C, V]` of scored tokens, each of its own teacher."""
        assert self.which_N is not None
        out = torch.empty_like(like[: len(index_C)])
        which_C = self.which_N[index_C]
        for place, evidence in enumerate((self.members or {}).values()):
            mine_C = which_C == place
            if bool(mine_C.any()):
                out[mine_C] = evidence.logp(index_C[mine_C], like[mine_C])
        return out


@dataclass(frozen=True)
class AveragedEvidence(SeveralEvidence):
    """A weighted mean of several teachers' distributions, in probability or log space."""

    weights: tuple[float, ...] = ()
    in_logs: bool = False

    @property
    def fan(self) -> int:
        """All of them."""
        return len(self.weights)

    @torch.no_grad()
    def logp(self, index_C: Tensor, like: Tensor) -> Tensor:
        """Log-probs `[C, V]` of scored tokens under the mean."""
        total: Tensor | None = None
        for weight, evidence in zip(self.weights, (self.members or {}).values(), strict=True):
            logp = evidence.logp(index_C, like)
            if self.in_logs:
                total = weight * logp if total is None else total + weight * logp
            else:
                part = logp + torch.tensor(weight, dtype=torch.float64).log().to(logp)
                total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total.log_softmax(-1) if self.in_logs else total


class SeveralTeachers:
    """One teacher made of `teachers` by name; counts a call for each of them."""

    def __init__(self, name: str, teachers: Mapping[str, Teacher]) -> None:
        self.name, self.teachers = name, dict(teachers)
        self.where = place_of(name)

    @property
    def gives(self) -> Gives:
        """What all of them give."""
        all_give = [t.gives for t in self.teachers.values()]
        return Gives(
            all(g.distribution for g in all_give), min(g.topk for g in all_give), min(g.draws for g in all_give)
        )

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the kept tokens."""
        raise NotImplementedError(self.name)

    def _ask_all(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> dict[str, Evidence]:
        return {name: t.score(rollouts, keep_N, need, temperature) for name, t in self.teachers.items()}


class RoutedTeacher(SeveralTeachers):
    """Each response is scored by the teacher of its problem's kind alone."""

    def __init__(self, name: str, teachers: Mapping[str, Teacher], config: RouteConfig) -> None:
        super().__init__(name, teachers)
        self.config = config

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the kept tokens; raises UserError for a problem that no teacher is named for."""
        names = list(self.teachers)
        which_B = [names.index(route_of(self.config, r.problem, self.where)) for r in rollouts.responses]
        which_N = torch.tensor(which_B, device=keep_N.device)[rollouts.row_N]
        found = {
            name: teacher.score(rollouts, keep_N & (which_N == place), need, temperature)
            for place, (name, teacher) in enumerate(self.teachers.items())
        }
        return chosen(found, torch.where(keep_N, which_N, -1), need, temperature)


class AveragedTeacher(SeveralTeachers):
    """The weighted mean of distributions; in log space normalised, so every teacher must give its distribution."""

    def __init__(self, name: str, teachers: Mapping[str, Teacher], config: AverageConfig) -> None:
        super().__init__(name, teachers)
        self.config = config
        total = sum(config.of.values())
        self.weights = tuple(config.of[member] / total for member in self.teachers)
        if config.space == "log" and not self.gives.distribution:
            few = next(n for n, t in self.teachers.items() if not t.gives.distribution)
            raise UserError(
                f"{name} averages log-probabilities, which must be normalised over the vocabulary, and {few} gives "
                "no distribution; set average.space to probability, or use local teachers."
            )

    @property
    def gives(self) -> Gives:
        """Log-probs of tokens, and the distribution where all give it: a mean of top tokens is no top of the mean."""
        return Gives(super().gives.distribution)

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the kept tokens."""
        in_logs = self.config.space == "log"
        found = self._ask_all(rollouts, keep_N, "distribution" if in_logs else need, temperature)
        where_N, calls = torch.where(keep_N, 0, -1), sum(e.calls for e in found.values())
        logp_N = next(iter(found.values())).logp_N
        averaged = AveragedEvidence(
            torch.zeros_like(logp_N),
            where_N,
            calls,
            temperature=temperature,
            members=found,
            weights=self.weights,
            in_logs=in_logs,
        )
        if in_logs:
            scores_N = _sampled(averaged, rollouts, keep_N, logp_N)
        else:
            logs = torch.tensor(self.weights, dtype=torch.float64).log().to(logp_N)
            stack = torch.stack([e.logp_N + log for e, log in zip(found.values(), logs, strict=True)])
            scores_N = torch.where(keep_N, stack.logsumexp(0), 0.0)
        return AveragedEvidence(
            scores_N, where_N, calls, temperature=temperature, members=found, weights=self.weights, in_logs=in_logs
        )


class BestTeacher(SeveralTeachers):
    """Of several teachers, for each response or token, the one with the best score; all are asked.

    By cross-entropy and per token the choice looks at the written token, so what it gives is an upper envelope that
    is no distribution; by confidence it looks at the state alone.
    """

    def __init__(self, name: str, teachers: Mapping[str, Teacher], config: BestConfig) -> None:
        super().__init__(name, teachers)
        self.config = config
        if config.by == "confidence" and not self.gives.distribution:
            raise UserError(
                f"{name} chooses by confidence, which reads whole distributions, and not all of {', '.join(teachers)} "
                "give theirs; set best.by to cross_entropy."
            )

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the kept tokens."""
        confident = self.config.by == "confidence"
        found = self._ask_all(rollouts, keep_N, "distribution" if confident else need, temperature)
        measure = _confidence if confident else _likelihood
        score_SN = torch.stack([measure(evidence, keep_N) for evidence in found.values()])
        if self.config.per == "response":
            sums_SB = score_SN.new_zeros(len(found), rollouts.rows).index_add_(1, rollouts.row_N, score_SN)
            score_SN = sums_SB[:, rollouts.row_N]
        return replace(chosen(found, torch.where(keep_N, score_SN.argmax(0), -1), need, temperature), all_asked=True)


def chosen(found: Mapping[str, Evidence], which_N: Tensor, need: Need, temperature: float) -> ChosenEvidence:
    """One teacher's scores at each token."""
    evidence = list(found.values())
    logp_N = torch.zeros_like(evidence[0].logp_N)
    for place, each in enumerate(evidence):
        logp_N = torch.where(which_N == place, each.logp_N, logp_N)
    few = _chosen_few(evidence, which_N) if need == "few" else None
    # With few outcomes the rows of `few`, one for each scored token, in their order.
    where_N = torch.where(which_N >= 0, (which_N >= 0).cumsum(0) - 1, -1)
    calls = sum(e.calls for e in evidence)
    return ChosenEvidence(
        logp_N, where_N, calls, temperature=temperature, few=few, members=dict(found), which_N=which_N
    )


def _chosen_few(evidence: Sequence[Evidence], which_N: Tensor) -> Few | None:
    fews = [e.few for e in evidence]
    if any(few is None for few in fews):
        return None
    widths = [few.ids_NK.shape[1] for few in fews if few is not None]
    draws = any(few is not None and few.weight_NK is not None for few in fews)
    # The likeliest tokens are cut to what all give; draws are filled up with places of weight 0.
    width, count = (max(widths) if draws else min(widths)), int((which_N >= 0).sum())
    first = fews[0]
    assert first is not None
    ids = first.ids_NK.new_zeros(count, width)
    logp = first.logp_NK.new_zeros(count, width)
    weight = logp.new_zeros(count, width) if draws else None
    kept_M = which_N[which_N >= 0]
    for place, (each, few) in enumerate(zip(evidence, fews, strict=True)):
        assert few is not None
        mine = few.at(each.where_N[which_N == place])
        part = slice(0, min(width, mine.ids_NK.shape[1]))
        rows = (kept_M == place).nonzero().squeeze(1)
        ids[rows, part], logp[rows, part] = mine.ids_NK[:, part], mine.logp_NK[:, part].to(logp)
        if weight is not None and mine.weight_NK is not None:
            weight[rows, part] = mine.weight_NK[:, part].to(weight)
    return Few(ids, logp, weight)


def _width(evidence: Evidence) -> int:
    """Tokens of the vocabulary of a teacher that gives its distribution."""
    parts = evidence.parts("")
    if evidence.head is not None:
        return evidence.head.vocab_size
    return max(_width(part) for part in parts.values() if part is not evidence)


def _sampled(evidence: Evidence, rollouts: Rollouts, keep_N: Tensor, like_N: Tensor) -> Tensor:
    """Log-probs of the written tokens from whole distributions, a chunk of tokens at a time `[N]`."""
    out_N, index = torch.zeros_like(like_N), keep_N.nonzero().squeeze(1)
    for part in chunks(len(index), _width(evidence)):
        at_C = index[part]
        logp_CV = evidence.logp(at_C, like_N.new_empty(len(at_C), _width(evidence)))
        out_N[at_C] = logp_CV.gather(-1, rollouts.tokens_N[at_C, None]).squeeze(-1)
    return out_N


def _confidence(evidence: Evidence, keep_N: Tensor) -> Tensor:
    """The highest probability at each kept token `[N]`, 0 elsewhere."""
    out_N, index = torch.zeros_like(evidence.logp_N), keep_N.nonzero().squeeze(1)
    for part in chunks(len(index), _width(evidence)):
        at_C = index[part]
        logp_CV = evidence.logp(at_C, out_N.new_empty(len(at_C), _width(evidence)))
        out_N[at_C] = logp_CV.amax(-1).exp()
    return out_N


def _likelihood(evidence: Evidence, keep_N: Tensor) -> Tensor:
    return torch.where(keep_N, evidence.logp_N, 0.0)
