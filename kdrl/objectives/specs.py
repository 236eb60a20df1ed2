"""How a distillation loss is written in a recipe: the divergence, read, checked and written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.objectives.adaptive import ADAPTIVE
from kdrl.objectives.base import ScheduleField
from kdrl.objectives.schedules import SCHEDULES, Moment, Schedule
from kdrl.objectives.scores import Score, ScoreField

Side = Literal["p", "q", "r"]
ORDERS = ("p||q", "q||p", "p||r", "r||p", "q||r", "r||q")
# Settings of each kind, the one that may stand alone first: {jsd: 0.5} is {jsd: {beta: 0.5}}.
KINDS: dict[str, tuple[str, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "tv": (),
    "jsd": ("beta", "scale", "detach"),
    "skew_kl": ("skew",),
    "skew_reverse_kl": ("skew", "detach"),
    "symmetric": ("forward",),
    "alpha_beta": ("alpha", "beta"),
    "arms": ("arms", "assistant"),
    "pair": ("weights",),
    "preference": ("beta",),
    "rank": (),
}


class Assistant(Config):
    """A distribution between teacher p and student q: the power mean M_{a,share}, or p tilted by the student."""

    a: float = -1.0
    """Kind of mean (AMiD, 2510.15982): -1 arithmetic, 1 geometric, 3 harmonic."""
    share: ScheduleField | None = None
    """Weight of the teacher in the mean, 0 to 1; may be a schedule (TAID, 2501.16937)."""
    tilt: ScheduleField | None = None
    """Instead of a mean: r proportional to p q^tilt (Veto, 2601.07155)."""
    detach: bool = False
    """Whether r is data; attached, gradient flows through the student inside r too, which is another method."""

    @model_validator(mode="after")
    def _check(self) -> Assistant:
        if (self.share is None) == (self.tilt is None):
            raise ValueError("an assistant is {a: -1, share: 0.5} (a mean) or {tilt: 0.8} (p q^tilt), one of both")
        if self.tilt is not None and "a" in self.model_fields_set:
            raise ValueError("a says which mean; {tilt: ...} is none")
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> dict[str, Any]:
        unsaid = {"share", "a"} if self.share is None else {"tilt"}
        return {name: value for name, value in handler(self).items() if name not in unsaid}


class Arm(Config):
    """One comparison D_{alpha,beta}(X||Y) with its weight and its gate."""

    of: Literal["p||q", "q||p", "p||r", "r||p", "q||r", "r||q"]
    """What is compared: teacher p, student q, assistant r."""
    weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Coefficient of the arm; may be a schedule."""
    gate: ScoreField = Field(default_factory=lambda: Score(1.0))
    """A token or entry score that multiplies it, such as head_gap; see the registry of scores."""
    alpha: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Exponent of X; (1, 0) is KL(X||Y) and (0, 1) is KL(Y||X)."""
    beta: ScheduleField = Field(default_factory=lambda: Schedule(0.0))
    """Exponent of Y (ABKD, 2505.04560)."""


@dataclass(frozen=True)
class ArmNow:
    """An arm at one moment of a run, all scalars known."""

    x: Side
    y: Side
    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 0.0
    gate: Score | None = None


@dataclass(frozen=True)
class AssistantNow:
    """An assistant at one moment; `power` of the mean is 1 + tilt for a tilted teacher."""

    a: float
    share: float
    detach: bool
    power: float = 1.0


class Divergence(Config):
    """A name, `{jsd: beta}` and its like, or `{arms: [...], assistant: {...}}`."""

    kind: str = "reverse_kl"
    """forward_kl KL(p||q), reverse_kl KL(q||p), tv, jsd, skew_kl, skew_reverse_kl, symmetric, alpha_beta, arms, pair,
    preference or rank, for teacher p and student q."""
    beta: ScheduleField | None = None
    """jsd: weight of the teacher in m; alpha_beta: exponent of q; preference: sharpness."""
    alpha: ScheduleField | None = None
    """alpha_beta: exponent of p."""
    skew: ScheduleField | None = None
    """skew_kl: KL(p || skew p + (1-skew) q); skew_reverse_kl: KL(q || (1-skew) p + skew q) (DistiLLM, 2402.03898)."""
    forward: ScheduleField | None = None
    """symmetric: g in g KL(p||q) + (1-g) KL(q||p)."""
    scale: Literal["limits", "paper"] = "limits"
    """jsd: `limits` divides J_beta by beta(1-beta), so its ends are the two KLs; `paper` is J_beta as in GKD."""
    detach: bool = False
    """jsd and skew_reverse_kl: take the mixture as data (DistiLLM-2 does, DistiLLM does not)."""
    arms: tuple[Arm, ...] = ()
    """One or two comparisons."""
    assistant: Assistant | None = None
    """The r of the arms."""
    weights: tuple[Literal["student", "teacher", "uniform"], Literal["student", "teacher", "uniform"]] | None = None
    """pair: the two distributions over which logit differences are compared (CSD, 2509.25837)."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"kind": raw}
        if not isinstance(raw, dict) or not raw or "kind" in raw:
            return raw
        if "arms" in raw:
            return {"kind": "arms", **raw}
        kind, inner = next(iter(raw.items()))
        if len(raw) != 1 or kind not in KINDS or not KINDS[kind]:
            with_settings = ", ".join(k for k in KINDS if KINDS[k])
            raise ValueError(f"a divergence is a name or one of {with_settings} with its settings, not {raw!r}")
        if isinstance(inner, bool) or inner is None:
            raise ValueError(f"{kind} takes no {inner!r}")
        schedule = isinstance(inner, dict) and bool(set(inner) & {*SCHEDULES, *ADAPTIVE})
        inner = inner if isinstance(inner, dict) and not schedule else {KINDS[kind][0]: inner}
        if "kind" in inner:
            raise ValueError(f"{kind} takes no kind")
        # At its ends the scaled divergence is a plain KL, and goes by that name.
        beta = inner.get("beta")
        if kind == "jsd" and beta in (0, 1) and inner in ({"beta": beta}, {"beta": beta, "scale": "limits"}):
            return {"kind": "reverse_kl" if beta == 1 else "forward_kl"}
        return {"kind": kind, **inner}

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"no divergence is called {kind!r}{nearest(kind, KINDS)}")
        return kind

    @model_validator(mode="after")
    def _check(self) -> Divergence:
        allowed = KINDS[self.kind]
        for name in self.model_fields_set - {"kind"} - set(allowed):
            raise ValueError(f"{name} belongs to {', '.join(k for k in KINDS if name in KINDS[k])}, not to {self.kind}")
        optional = {"scale", "detach", "assistant"}
        for name in allowed:
            if name not in optional and not getattr(self, name):
                raise ValueError(f"{self.kind} needs {name}: write {{{self.kind}: {{{name}: ...}}}}")
        if self.kind == "arms":
            self._check_arms()
        for name, value in self.scalars().items():
            if isinstance(value.spec, int | float):
                self.check_scalar(name, float(value.spec))
        return self

    def _check_arms(self) -> None:
        if len(self.arms) > 2:
            raise ValueError("a divergence has at most two arms; write a second distill term for more")
        reads_r = any("r" in arm.of for arm in self.arms)
        if reads_r != (self.assistant is not None):
            raise ValueError(
                "an arm names r, which needs an assistant: {a: -1, share: 0.5}"
                if reads_r
                else "there is an assistant, but no arm compares with r"
            )
        if self.assistant is not None and self.assistant.detach:
            for arm in self.arms:
                if "q" not in arm.of:
                    raise ValueError(f"with a detached assistant {arm.of} holds no student: nothing would be trained")

    def scalars(self) -> dict[str, Schedule]:
        """Every scalar by its name in messages."""
        found = {name: getattr(self, name) for name in ("beta", "alpha", "skew", "forward")}
        for i, arm in enumerate(self.arms):
            found |= {f"arms.{i}.alpha": arm.alpha, f"arms.{i}.beta": arm.beta}
        if self.assistant is not None:
            found |= {"assistant.share": self.assistant.share, "assistant.tilt": self.assistant.tilt}
        return {name: value for name, value in found.items() if value is not None}

    def check_scalar(self, name: str, value: float) -> None:
        """Raise ValueError for a value that the scalar cannot take."""
        if self.kind == "jsd" and not 0.0 <= value <= 1.0:
            raise ValueError("jsd needs a beta between 0 and 1, as in {jsd: 0.5}")
        if self.kind == "jsd" and self.scale == "paper" and value in (0.0, 1.0):
            raise ValueError(
                f"the paper's J_beta is zero for every student at beta {value:g}; "
                "write forward_kl (beta 0) or reverse_kl (beta 1)"
            )
        last = name.rsplit(".", 1)[-1]
        if last in ("skew", "forward", "share") and not 0.0 <= value <= 1.0:
            raise ValueError(f"{self.kind}.{name} is a share between 0 and 1, not {value:g}")
        if last == "skew" and value == 1.0:
            raise ValueError(f"{self.kind} of skew 1 compares a distribution with itself and teaches nothing")
        if self.kind in ("alpha_beta", "arms") and last in ("alpha", "beta", "tilt") and value < 0.0:
            raise ValueError(f"{self.kind}.{name} is {value:g}: a negative power of a zero probability is infinite")
        if self.kind == "preference" and value <= 0.0:
            raise ValueError("preference needs a beta above 0 (0.1 in DPKD)")

    def now(self, moment: Moment) -> tuple[list[ArmNow], AssistantNow | None]:
        """Arms and assistant at a moment, for every kind that has arms (not tv, pair, preference, rank)."""
        values = {name: schedule.at(moment) for name, schedule in self.scalars().items()}
        for name, value in values.items():
            self.check_scalar(name, value)
        if self.kind == "forward_kl":
            return [ArmNow("p", "q")], None
        if self.kind == "reverse_kl":
            return [ArmNow("q", "p")], None
        if self.kind == "symmetric":
            g = values["forward"]
            return [ArmNow("p", "q", g), ArmNow("q", "p", 1.0 - g)], None
        if self.kind == "alpha_beta":
            return [ArmNow("p", "q", 1.0, values["alpha"], values["beta"])], None
        if self.kind == "jsd":
            return self._jsd(values["beta"])
        if self.kind == "skew_kl":
            return [ArmNow("p", "r")], AssistantNow(-1.0, values["skew"], False)
        if self.kind == "skew_reverse_kl":
            return [ArmNow("q", "r")], AssistantNow(-1.0, 1.0 - values["skew"], self.detach)
        return self._arms(moment)

    def _jsd(self, beta: float) -> tuple[list[ArmNow], AssistantNow | None]:
        if beta in (0.0, 1.0):  # reached by a schedule: the limit
            return [ArmNow("q", "p") if beta else ArmNow("p", "q")], None
        norm = 1.0 if self.scale == "paper" else beta * (1.0 - beta)
        arms = [ArmNow("p", "r", beta / norm), ArmNow("q", "r", (1.0 - beta) / norm)]
        return arms, AssistantNow(-1.0, beta, self.detach)

    def _arms(self, moment: Moment) -> tuple[list[ArmNow], AssistantNow | None]:
        arms = []
        for arm in self.arms:
            x, y = arm.of.split("||")
            gate = None if arm.gate.constant == 1.0 else arm.gate
            arms.append(ArmNow(x, y, arm.weight.at(moment), arm.alpha.at(moment), arm.beta.at(moment), gate))  # type: ignore[arg-type]
        if self.assistant is None:
            return arms, None
        if self.assistant.tilt is not None:
            # p q^t is the geometric mean of share 1/(1+t), raised to 1 + t.
            tilt = self.assistant.tilt.at(moment)
            return arms, AssistantNow(1.0, 1.0 / (1.0 + tilt), self.assistant.detach, 1.0 + tilt)
        assert self.assistant.share is not None
        return arms, AssistantNow(self.assistant.a, self.assistant.share.at(moment), self.assistant.detach)

    @property
    def of_arms(self) -> bool:
        """Whether it is a sum of arms, so that any support and target can carry it."""
        return self.kind not in ("tv", "pair", "preference", "rank")

    @property
    def gates(self) -> list[Score]:
        """The gates of its arms."""
        return [arm.gate for arm in self.arms]

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> Any:
        names = KINDS[self.kind]
        if not names:
            return self.kind
        dumped = handler(self)
        default = {n: type(self).model_fields[n].get_default() for n in names}
        kept = {n: dumped[n] for n in names if dumped.get(n) is not None and dumped[n] != default[n]}
        if self.kind == "arms":
            return kept
        return {self.kind: kept[names[0]] if list(kept) == [names[0]] else kept}
