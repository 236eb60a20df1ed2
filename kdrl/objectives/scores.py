"""One registry of token scores: gates, weights, masks, label mixing and temperatures are all expressions of them.

An expression is a number, a schedule, a name, or `{name: {setting: value}}`; a setting called `of`, `where` or `by` is
again an expression. Scores are data: no gradient flows through them. One that ranks or averages tokens looks at the
whole step's tokens, measured before the update, so that micro-batches change nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import PlainSerializer, PlainValidator
from torch import Tensor

from kdrl.errors import nearest
from kdrl.objectives.adaptive import ADAPTIVE
from kdrl.objectives.schedules import SCHEDULES, START, Moment, Schedule
from kdrl.registry import Registry

if TYPE_CHECKING:
    from kdrl.objectives.support import Few

Reads = Literal["data", "student", "teacher", "distributions", "entries", "batch"]
NESTED = ("of", "where", "by")


@dataclass(frozen=True)
class Tokens:
    """What scores may look at: C tokens with data about them, and where a term compares them, both distributions.

    `logq_C` and `logp_C` are log-probs of the tokens themselves, `reference_CV` those of the initial student,
    `uniform_CK` numbers to draw with, `few` some of the teacher's outcomes where it gives no distribution,
    `temperature` the policy's; `measured` holds scores of the whole step by key.
    """

    data: Mapping[str, Tensor]
    logq_C: Tensor
    logp_C: Tensor | None = None
    entropy_C: Tensor | None = None
    token_C: Tensor | None = None
    logp_CV: Tensor | None = None
    logq_CV: Tensor | None = None
    reference_CV: Tensor | None = None
    uniform_CK: Tensor | None = None
    temperature: float = 1.0
    few: Few | None = None
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    moment: Moment = START

    def both(self) -> tuple[Tensor, Tensor]:
        """Teacher and student log-probs over the vocabulary."""
        assert self.logp_CV is not None
        assert self.logq_CV is not None
        return self.logp_CV, self.logq_CV.detach()

    def of(self, name: str) -> Tensor:
        """One of the data columns, as floats `[C]`."""
        return self.data[name].to(self.logq_C.dtype)


ScoreFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Kind:
    """A registered score, what it reads, and whether rewards or verdicts may be among its data."""

    function: ScoreFunction
    reads: Reads
    verdicts: bool = True


SCORES: Registry[Kind] = Registry("score")


def register_score(
    name: str, reads: Reads = "distributions", verdicts: bool = True
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register `fn(tokens: Tokens, **settings) -> [C]` as a score of that name.

    `reads`: `data` (columns of `tokens.data`), `student` or `teacher` (log-probs of the tokens), `distributions`
    (both over the vocabulary), `entries` (`fn(logp, logq, **settings) -> [C, V]`), or `batch` (`fn(values_N, row_N,
    **settings) -> [N]` of the expression in its setting `of`, over all tokens of the step). `verdicts=False` says that
    it reads no column of rewards or verdicts; a mask made of such scores does not wait for them.
    """

    def register(function: ScoreFunction) -> ScoreFunction:
        SCORES.add(name, of=function)(Kind(function, reads, verdicts))
        return function

    return register


class Score:
    """An expression, read from a recipe value and written back unchanged; raises ValueError for a wrong one."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec.spec if isinstance(spec, Score) else spec
        self.number: Schedule | None = None
        self.settings: dict[str, Any] = {}
        spec = self.spec
        name, given = next(iter(spec.items())) if isinstance(spec, dict) and len(spec) == 1 else (spec, ())
        if isinstance(name, str) and name in SCORES:
            self.kind, self.name = SCORES.get(name), name
            self.settings = _read_settings(name, self.kind, given)
            return
        named = isinstance(name, str) and (name in SCHEDULES or name in ADAPTIVE or name == "warmup")
        if isinstance(name, str) and not named:
            known = [*SCORES, *SCHEDULES, *ADAPTIVE]
            raise ValueError(f"no score or schedule is called {name!r}{nearest(name, known)}")
        self.number = Schedule(spec)

    def parts(self) -> dict[str, Any]:
        """Inner scores and schedules by setting."""
        return {"": self.number} if self.number is not None else dict(self.settings)

    @property
    def inner(self) -> list[Score]:
        """The expressions directly inside this one."""
        return [value for value in self.settings.values() if isinstance(value, Score)]

    @property
    def reads(self) -> set[str]:
        """What this and all inner scores look at."""
        own: set[str] = set() if self.number is not None else {self.kind.reads}
        return own.union(*(inner.reads for inner in self.inner))

    @property
    def reads_verdicts(self) -> bool:
        """Whether this or an inner score looks at rewards or verdicts, or does not say that it looks at none."""
        # What ranks a step's tokens is given the values of its inner score alone.
        own = self.number is None and self.kind.reads != "batch" and self.kind.verdicts
        return own or any(inner.reads_verdicts for inner in self.inner)

    @property
    def constant(self) -> float | None:
        """Its value when it is a plain number."""
        return float(self.spec) if isinstance(self.spec, int | float) else None

    @property
    def key(self) -> str:
        """A name under which a measured value is kept."""
        return json.dumps(self.spec, sort_keys=True)

    def batch_parts(self) -> Iterator[Score]:
        """Scores over the whole step inside this expression, inner ones first."""
        for inner in self.inner:
            yield from inner.batch_parts()
        if self.number is None and self.kind.reads == "batch":
            yield self

    def _values(self, moment: Moment) -> dict[str, Any]:
        return {k: v.at(moment) if isinstance(v, Schedule) else v for k, v in self.settings.items()}

    def __call__(self, tokens: Tokens) -> Tensor | float:
        """Its value for C tokens: a number, `[C]`, or `[C, V]` where it judges entries."""
        if self.number is not None:
            return self.number.at(tokens.moment)
        if self.kind.reads == "batch":
            return tokens.measured[self.key].to(tokens.logq_C.dtype)
        values = {k: v(tokens) if isinstance(v, Score) else v for k, v in self._values(tokens.moment).items()}
        if "entries" in self.reads:  # a token's score beside an entry's is the same for all its entries
            values = {k: v[:, None] if isinstance(v, Tensor) and v.dim() == 1 else v for k, v in values.items()}
        first = tokens.both() if self.kind.reads == "entries" else (tokens,)
        return self.kind.function(*first, **values)

    def measure(self, inner_N: Tensor, row_N: Tensor, moment: Moment) -> Tensor:
        """A score over the whole step from the values of its inner expression, both `[N]`."""
        settings = {k: v for k, v in self._values(moment).items() if k != "of"}
        return self.kind.function(inner_N, row_N, **settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and self.spec == other.spec

    def __repr__(self) -> str:
        return f"Score({self.spec!r})"


def _read_settings(name: str, kind: Kind, given: Any) -> dict[str, Any]:
    skip = {"data": 1, "student": 1, "teacher": 1, "distributions": 1}.get(kind.reads, 2)
    parameters = dict(list(inspect.signature(kind.function).parameters.items())[skip:])
    if kind.reads == "batch":
        parameters = {"of": inspect.Parameter("of", inspect.Parameter.KEYWORD_ONLY)} | parameters
    settings = given if isinstance(given, dict) else {} if given == () else {next(iter(parameters), "value"): given}
    # `above: {entropy_p: ...}` would be ambiguous: a mapping is always the settings.
    for key in settings:
        if key not in parameters and key in SCORES and "of" in parameters:
            raise ValueError(f"score {name} takes another score by its setting `of`: {{{name}: {{of: {key}, ...}}}}")
        if key not in parameters:
            raise ValueError(f"score {name} has no setting {key!r}{nearest(str(key), parameters)}")
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in settings]
    if missing:
        raise ValueError(f"score {name} needs {', '.join(missing)}: write {{{name}: {{{missing[0]}: ...}}}}")
    filled = {k: settings.get(k, p.default) for k, p in parameters.items()}
    return {k: Score(v) if k in NESTED else v if v is None else Schedule(v) for k, v in filled.items()}


ScoreField = Annotated[Score, PlainValidator(Score), PlainSerializer(lambda score: score.spec)]


def column(value: Tensor | float, like: Tensor) -> Tensor:
    """A score's value as data of the type of `like`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()


def measure(
    score: Score, evaluate: Callable[[Score, Mapping[str, Tensor]], Tensor], row_N: Tensor, moment: Moment
) -> dict[str, Tensor]:
    """Every whole-step score inside an expression, `[N]` by its key; `evaluate` gives an inner one for all tokens."""
    found: dict[str, Tensor] = {}
    for part in score.batch_parts():
        found[part.key] = part.measure(evaluate(part.inner[0], found), row_N, moment)
    return found


from kdrl.objectives import score_kinds as score_kinds  # noqa: E402  (the built-in scores register themselves)
