"""Dual-space terms at work: projectors between the widths of student and teacher, trained beside the student.

u = W_ts h_teacher is read by the student's head (as data), v = W_st h_student by the teacher's; the student's gradient
goes through its own hidden states. Every comparison has data on its other side, so the chunked head serves unchanged.
Left out: v2's W_st that is solved anew at every step, and projectors of several layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdrl.batch import Rollouts
from kdrl.model_shape import ModelShape
from kdrl.models import LoadedModel, head_of
from kdrl.models.heads import causal_lm
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.head import Head, score_tokens
from kdrl.objectives.objective import Active, Objective
from kdrl.objectives.schedules import Moment
from kdrl.seeds import derive
from kdrl.vocab.dual import DualConfig
from kdrl.vocab.teacher import VocabEvidence, Vocabularies

if TYPE_CHECKING:
    from kdrl.update import Scored


def reading_of(mine_KD: Tensor, theirs_KE: Tensor) -> Tensor:
    """The map `[D, E]` by which this head gives the other one's logits of K tokens best, in least squares."""
    mine_KD, theirs_KE = mine_KD.double(), theirs_KE.double()
    return torch.linalg.pinv(mine_KD.T @ mine_KD, hermitian=True) @ (mine_KD.T @ theirs_KE)


class Space(nn.Module):
    """The projectors of one term: to the student's width, to the teacher's, and of embeddings for attention."""

    def __init__(self, config: DualConfig, student: int, teacher: int) -> None:
        super().__init__()
        self.to_student, self.to_teacher = nn.Linear(teacher, student), nn.Linear(student, teacher)
        self.query = nn.Linear(2 * student, 2 * teacher) if config.align == "attention" else None

    @torch.no_grad()
    def start_from(self, student: Head, teacher: Head, shared_2K: Tensor) -> None:
        """Begin where the heads agree on the tokens that stand for the same text."""
        heads = (head.merged().weight_VD for head in (student, teacher))
        mine, theirs = (weight_VD[ids] for weight_VD, ids in zip(heads, shared_2K, strict=True))
        for layer, found in ((self.to_student, reading_of(mine, theirs)), (self.to_teacher, reading_of(theirs, mine))):
            layer.weight.copy_(found)
            layer.bias.zero_()


@dataclass(frozen=True)
class _Live:
    """One term with its projectors and its teacher; `student_of_V` maps a teacher's token to the student's, or -1."""

    config: DualConfig
    space: Space
    teacher: LoadedModel
    student_of_V: Tensor


@dataclass(frozen=True)
class _Tokens:
    """T kept student tokens of a micro-batch, and the S teacher tokens of their responses."""

    live: _Live
    evidence: VocabEvidence
    head: Head
    hidden_TD: Tensor
    index_T: Tensor
    token_T: Tensor
    temperature: float
    moment: Moment

    @property
    def teacher_head(self) -> Head:
        assert self.evidence.inner is not None
        assert self.evidence.inner.head is not None
        return self.evidence.inner.head

    def teacher_hidden(self, place_S: Tensor) -> Tensor:
        """The teacher's hidden states `[S, D_T]` at its own tokens, in the format of the projectors."""
        inner = self.evidence.inner
        assert inner is not None
        assert inner.hidden_MD is not None
        return inner.hidden_MD[inner.where_N[place_S]].to(self.live.space.to_student.weight)

    def in_student(self, projected_TD: Tensor, label_T: Tensor) -> Tensor:
        """-log softmax(u)[label] + D(sg softmax(u), q) at each token, without those of label -1, and whether u's
        likeliest token is the label, `[T, 2]`."""
        config, frozen, fixed_TD = self.live.config, self.head.map(Tensor.detach), projected_TD.detach()
        sharp = self.temperature * config.temperature

        def compare(logq_CV: Tensor, part: slice) -> Tensor:
            logp_CV = frozen.logp(fixed_TD[part], sharp).to(logq_CV.dtype)
            loss_C = divergence_of(config.divergence, logp_CV, logq_CV, self.moment)
            right_C = logp_CV.argmax(-1) == label_T[part]
            use_C = right_C if config.agree else label_T[part] >= 0
            return torch.stack([torch.where(use_C, loss_C, 0.0), right_C.to(loss_C.dtype)], -1)

        learned = score_tokens(frozen, projected_TD, label_T.clamp(min=0), temperature=self.temperature)
        found = score_tokens(self.head, self.hidden_TD, self.token_T, temperature=sharp, comparisons=[compare])
        loss_T = found.losses_N[0][:, 0] - torch.where(label_T >= 0, learned.logp_N, 0.0)
        return torch.stack([loss_T, found.losses_N[0][:, 1]], -1)

    def in_teacher(self, projected_SD: Tensor, place_S: Tensor) -> Tensor:
        """D(p, softmax(v)) at each of the teacher's tokens, `[S]`."""
        config, head, hidden_SD = self.live.config, self.teacher_head, self.teacher_hidden(place_S)
        sharp = self.temperature * config.temperature
        assert self.evidence.read is not None
        token_S = self.evidence.read.tokens_N[place_S]

        def compare(logv_CV: Tensor, part: slice) -> Tensor:
            logp_CV = head.logp(hidden_SD[part], sharp).to(logv_CV.dtype)
            return divergence_of(config.in_teacher, logp_CV, logv_CV, self.moment)[:, None]

        return score_tokens(head, projected_SD, token_S, temperature=sharp, comparisons=[compare]).losses_N[0][:, 0]

    @torch.no_grad()
    def likeliest(self, hidden_SD: Tensor) -> Tensor:
        """The teacher's likeliest token as the student's, -1 where it has none, `[S]`."""
        head, table_V = self.teacher_head, self.live.student_of_V
        parts = [table_V[head.logp(part).argmax(-1)] for part in hidden_SD.split(256)]
        return torch.cat(parts) if parts else torch.zeros_like(self.token_T)

    def exact(self) -> Tensor:
        """Both spaces token by token, and what `in_student` says beside, `[T, 2]`."""
        place_T, space = self.evidence.where_N[self.index_T], self.live.space
        hidden_TD = self.teacher_hidden(place_T)
        label_T = self.likeliest(hidden_TD) if self.live.config.label == "teacher" else self.token_T
        wide_TD = self.hidden_TD.to(hidden_TD)
        mine_T2 = self.in_student(space.to_student(hidden_TD), label_T)
        return _plus(mine_T2, self.in_teacher(space.to_teacher(wide_TD), place_T))

    def attended(self, row_T: Tensor, mine_TE: Tensor, theirs: _Keys) -> Tensor:
        """As `exact`, through attention within each response; the teacher's space in equal parts on its tokens."""
        space = self.live.space
        assert space.query is not None
        wide_TD = self.hidden_TD.to(space.query.weight)
        to_student, to_teacher, places, counts = [], [], [], []
        for row in row_T.unique_consecutive().tolist():
            pick = (row_T == row).nonzero().squeeze(1)
            place_S = theirs.places(self.evidence, self.index_T[pick[0]])
            key_SE, value_SD = theirs.key_NE[place_S], theirs.value_ND[place_S]
            score_TS = space.query(mine_TE[pick]) @ key_SE.T / math.sqrt(key_SE.shape[-1])
            to_student.append(score_TS.softmax(-1) @ space.to_student(value_SD))
            to_teacher.append(score_TS.T.softmax(-1) @ space.to_teacher(wide_TD[pick]))
            places.append(place_S)
            counts.append((len(pick), len(place_S)))
        mine_T2 = self.in_student(torch.cat(to_student), self.token_T)
        theirs_S = self.in_teacher(torch.cat(to_teacher), torch.cat(places))
        cut = theirs_S.split([s for _, s in counts])
        shared = [(part.sum() / t).expand(t) for (t, _), part in zip(counts, cut, strict=True)]
        return _plus(mine_T2, torch.cat(shared))


def _plus(mine_T2: Tensor, more_T: Tensor) -> Tensor:
    return torch.stack([mine_T2[:, 0] + more_T.to(mine_T2.dtype), mine_T2[:, 1]], -1)


@dataclass(frozen=True)
class _Keys:
    """What attention looks at: of all the teacher's tokens of a step, embeddings of input and target over their
    deviation, and hidden state plus target embedding, each over its own."""

    evidence: VocabEvidence
    key_NE: Tensor
    value_ND: Tensor

    def places(self, evidence: VocabEvidence, index: Tensor) -> Tensor:
        """The teacher's scored tokens of the response that a student's token is in."""
        assert evidence.read is not None
        assert evidence.inner is not None
        start, end = evidence.read.span(int(evidence.read.row_N[evidence.where_N[index]]))
        return start + (evidence.inner.where_N[start:end] >= 0).nonzero().squeeze(1)


def _embedded(model: LoadedModel, ids_N: Tensor) -> Tensor:
    lm: Any = causal_lm(model)
    return lm.get_input_embeddings()(ids_N).detach()


def inputs_of(rollouts: Rollouts) -> Tensor:
    """The token that each response token is predicted from, `[N]`."""
    before_N = rollouts.tokens_N.roll(1)
    last = [r.prompt_ids[-1] for r in rollouts.responses]
    before_N[list(rollouts.offsets[:-1])] = torch.tensor(last, dtype=before_N.dtype, device=before_N.device)
    return before_N


class Spaces:
    """The dual-space terms of an objective with their projectors, called `dual_distill.<name>` in a checkpoint."""

    def __init__(
        self, objective: Objective, student: LoadedModel, teachers: Mapping[str, LoadedModel], seed: int
    ) -> None:
        self.student = student
        dtype = torch.promote_types(next(student.model.parameters()).dtype, torch.float32)
        self.live: dict[str, _Live] = {}
        for name, term in zip(objective.names, objective.terms, strict=True):
            if not isinstance(term.config, DualConfig):
                continue
            teacher = teachers[term.config.teacher]
            widths = [ModelShape.from_model(causal_lm(model)).width for model in (student, teacher)]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "projector", name))
                space = Space(term.config, *widths)
            shared_2K = Vocabularies(student, teacher).shared_2K
            if term.config.start == "heads":
                space.start_from(head_of(student), head_of(teacher), shared_2K.to(student.device))
            table_V = torch.full((teacher.vocab_size,), -1, device=student.device)
            table_V[shared_2K[1].to(student.device)] = shared_2K[0].to(student.device)
            self.live[name] = _Live(term.config, space.to(student.device, dtype), teacher, table_V)
        self._keys: dict[str, _Keys] = {}
        self.right: dict[str, float] = {}

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every projector's parameters by the name they have in a checkpoint."""
        return {f"{name}.{key}": p for name, live in self.live.items() for key, p in live.space.named_parameters()}

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the projectors: no weight decay, `lr_scale` times the student's rate."""
        return [
            {"params": list(live.space.parameters()), "weight_decay": 0.0, "lr_scale": live.config.lr_scale}
            for live in self.live.values()
        ]

    def losses(self, active: Sequence[Active], hidden_MD: Tensor, index_M: Tensor, scored: Scored) -> dict[str, Tensor]:
        """Each term's loss per token of a micro-batch, `[M]`, zero where its mask keeps none.

        `right` then holds at how many of the kept tokens the projected teacher's likeliest token is the label.
        """
        found = {}
        self.right = dict.fromkeys((a.name for a in active), 0.0)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for each in active:
                evidence = scored.evidence[each.teacher or ""]
                assert isinstance(evidence, VocabEvidence)
                pick_T = (each.keep_N & evidence.scored_N)[index_M].nonzero().squeeze(1)
                loss_M = torch.zeros(len(index_M), dtype=torch.promote_types(hidden_MD.dtype, torch.float32))
                loss_M = loss_M.to(hidden_MD.device)
                if len(pick_T):
                    found_T2 = self._of(each, evidence, hidden_MD[pick_T], index_M[pick_T], scored)
                    loss_M = loss_M.index_put((pick_T,), found_T2[:, 0].to(loss_M.dtype))
                    self.right[each.name] = float(found_T2[:, 1].detach().sum())
                found[each.name] = loss_M
        return found

    def _of(self, each: Active, evidence: VocabEvidence, hidden_TD: Tensor, index_T: Tensor, scored: Scored) -> Tensor:
        live, rollouts = self.live[each.name], scored.rollouts
        token_T = rollouts.tokens_N[index_T]
        head = head_of(self.student)
        tokens = _Tokens(live, evidence, head, hidden_TD, index_T, token_T, scored.temperature, each.moment)
        if live.config.align == "exact":
            return tokens.exact()
        both = (inputs_of(rollouts)[index_T], token_T)
        mine_TE = torch.cat([_embedded(self.student, ids) for ids in both], -1).to(live.space.to_student.weight)
        return tokens.attended(rollouts.row_N[index_T], mine_TE, self._keys_of(each.name, evidence))

    @torch.no_grad()
    def _keys_of(self, name: str, evidence: VocabEvidence) -> _Keys:
        known = self._keys.get(name)
        if known is None or known.evidence is not evidence:
            live, inner, read = self.live[name], evidence.inner, evidence.read
            assert inner is not None
            assert inner.hidden_MD is not None
            assert read is not None
            wide = live.space.to_student.weight
            have_N = inner.where_N >= 0
            target_ND = _embedded(live.teacher, read.tokens_N).to(wide)
            key_NE = torch.cat([_embedded(live.teacher, inputs_of(read)).to(wide), target_ND], -1)
            hidden_MD = inner.hidden_MD.to(wide)
            value_ND = target_ND / target_ND[have_N].std()
            value_ND[have_N] += hidden_MD[inner.where_N[have_N]] / hidden_MD.std()
            self._keys[name] = _Keys(evidence, key_NE / key_NE[have_N].std(), value_ND)
        return self._keys[name]


def make_spaces(
    objective: Objective, student: LoadedModel, teachers: Mapping[str, LoadedModel], seed: int
) -> Spaces | None:
    """The objective's dual-space terms at work, None where it has none; a teacher not in `teachers` is the student."""
    asked = [t.config.teacher for t in objective.terms if isinstance(t.config, DualConfig)]
    return Spaces(objective, student, {n: teachers.get(n, student) for n in asked}, seed) if asked else None
