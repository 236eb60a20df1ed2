"""How much memory a run will need, from configurations alone: nothing is loaded, so `--dry-run` answers in seconds.

The formulas are those of `kdrl.memory_parts`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from kdrl.available import available_bytes
from kdrl.memory_parts import PHASES, Item, Phase, Request, items_of
from kdrl.memory_parts import chunk_bytes as chunk_bytes
from kdrl.model_shape import ModelShape as ModelShape
from kdrl.model_shape import adapter_parameters as adapter_parameters
from kdrl.optimizers import OptimizerKind


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, part by part, against the bytes that this process may use on the device.

    `tight`: it is to give every freed array back at once, which takes an update up to 1.7 times as long on a CPU.
    """

    items: tuple[Item, ...]
    available: int
    device: str
    advice: tuple[str, ...] = ()
    tight: bool = False

    def of(self, phase: Phase) -> int:
        """Bytes in use during a phase, parts that are always there included."""
        return sum(item.bytes for item in self.items if item.phase in ("always", phase))

    @property
    def _phases(self) -> list[Phase]:
        """Those of the run: not every one has a teacher, or fits it to the student."""
        seldom = ("prepare", "teacher")
        return [phase for phase in PHASES if phase not in seldom or any(item.phase == phase for item in self.items)]

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.of)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return self.of(self.peak_phase)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within what is available."""
        return self.peak <= self.available

    @property
    def verdict(self) -> str:
        """One sentence: it fits, or it does not and what to change."""
        what = f"about {_size(self.peak)} at the peak ({self.peak_phase}) of {_size(self.available)} on {self.device}"
        what += ", each freed array given back at once, which is slower" if self.tight else ""
        return f"fits: {what}" if self.fits else f"does not fit: {what}; {'; or '.join(self.advice)}"

    @property
    def summary(self) -> str:
        """The totals and the verdict in one line."""
        return f"memory: {', '.join(f'{phase} {_size(self.of(phase))}' for phase in self._phases)}; {self.verdict}"

    def table(self) -> Table:
        """The plan for the terminal, with the verdict below."""
        style = "green" if self.fits else "bold red"
        table = Table(title="memory plan", caption=f"[{style}]{self.verdict}", caption_justify="left")
        for name in ("part", "when", "size", "how"):
            table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
        for item in self.items:
            table.add_row(item.name, item.phase, _size(item.bytes), item.why)
        table.add_section()
        for phase in self._phases:
            table.add_row(f"[bold]total, {phase}", "", f"[bold]{_size(self.of(phase))}", "")
        return table

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        totals = {phase: self.of(phase) for phase in self._phases}
        return asdict(self) | {"totals": totals, "peak": self.peak, "fits": self.fits, "verdict": self.verdict}


def plan(
    student: ModelShape,
    teacher: ModelShape | None = None,
    *,
    trainable_parameters: int | None = None,
    micro_batch_tokens: int,
    step_tokens: int | None = None,
    max_length: int,
    prompt_tokens: int = 0,
    group: int = 1,
    rollout_rows: int,
    samples: int = 1,
    teacher_states: int = 0,
    dtype_bytes: int = 4,
    teacher_dtype_bytes: int | None = None,
    autocast: bool = False,
    lora: bool = False,
    reference: bool = False,
    checkpointing: bool = False,
    optimizer: OptimizerKind = "adamw",
    master_weights: bool = False,
    device: str | torch.device = "cpu",
    available: int | None = None,
    more: tuple[Item, ...] = (),
) -> MemoryPlan:
    """Plan the memory of a run.

    `trainable_parameters` are all of the student's when None, the adapters' with `lora`; `micro_batch_tokens` is the
    token budget of one forward and backward, of an optimizer step's `step_tokens`; `max_length` is prompt and response
    together, `prompt_tokens` of them of a prompt that `group` responses share in an update; `rollout_rows` responses
    are written at once (0: none), `samples` to a prompt; the teacher's hidden states are kept of `teacher_states`
    tokens; `available` bytes are asked of the device when None (UserError where there is none); `more`: other parts.
    """
    if lora and trainable_parameters is None:
        raise ValueError("plan(lora=True) needs trainable_parameters: the parameters of the adapters")
    request = Request(
        student=student,
        teacher=teacher,
        trainable=student.parameters if trainable_parameters is None else trainable_parameters,
        # One sequence is never cut, and a step has no more than it has.
        budget=max(min(micro_batch_tokens, step_tokens or micro_batch_tokens), max_length),
        several=step_tokens is None or step_tokens > micro_batch_tokens,
        max_length=max_length,
        prompt=prompt_tokens,
        group=group,
        rows=rollout_rows,
        samples=samples,
        teacher_states=teacher_states,
        dtype_bytes=dtype_bytes,
        teacher_bytes=teacher_dtype_bytes or dtype_bytes,
        autocast=autocast,
        lora=lora,
        reference=reference,
        checkpointing=checkpointing,
        optimizer=optimizer,
        master_weights=master_weights,
        device=torch.device(device),
        more=more,
    )
    return _made(request, available_bytes(request.device) if available is None else available)


def _made(request: Request, room: int) -> MemoryPlan:
    """The plan within `room` bytes: a tight one where only that fits, with advice where nothing does."""
    made = MemoryPlan(items_of(request), room, str(request.device))
    if not made.fits and request.device.type == "cpu":
        request = replace(request, tight=True)
        made = MemoryPlan(items_of(request), room, str(request.device), tight=True)
    return made if made.fits else replace(made, advice=tuple(_advice(made, request)))


def _need(r: Request, phase: Phase) -> int:
    return MemoryPlan(items_of(r), 0, "").of(phase)


def _advice(made: MemoryPlan, r: Request) -> Iterable[str]:
    """What to change, with the largest value that would fit where there is one."""
    room = made.available
    if made.of("always") > room or made.of("optimizer step") > room:
        yield from _smaller_weights(r)
        return
    if made.of("update") > room:
        less = replace(r, several=True)
        fit = bisect_left(range(r.budget), True, key=lambda n: _need(replace(less, budget=n + 1), "update") > room)
        if fit >= r.max_length:
            yield f"lower optimizer.micro_batch_tokens to {fit:,}"
        if not r.checkpointing:
            yield "set student.gradient_checkpointing: true"
        if fit < r.max_length:
            if r.teacher is not None and r.teacher_states > r.tokens:
                yield "lower rollout.prompts or rollout.group, for all of whose tokens the teacher's states are kept"
            yield "lower rollout.max_new_tokens"
            yield from _smaller_weights(r)
    if made.of("prepare") > room:
        yield "lower optimizer.micro_batch_tokens, which the teacher is fitted in, or leave teacher.prepare out"
    if made.of("teacher") > room >= made.of("update"):
        yield "lower optimizer.micro_batch_tokens, which the teacher reads too"
    if made.of("rollout") > room:
        fit = bisect_left(range(r.rows), True, key=lambda n: _need(replace(r, rows=n + 1), "rollout") > room)
        yield f"lower rollout.rows to {fit:,}" if fit else "lower rollout.max_new_tokens"


def _smaller_weights(r: Request) -> Iterable[str]:
    if not r.lora:
        yield "train adapters with student.lora"
    if r.dtype_bytes > 2:
        yield "set student.dtype: bfloat16"
    if r.teacher and r.teacher_bytes > 2:
        yield "set teacher.dtype: bfloat16"
    yield "choose a smaller model"


def _size(count: int) -> str:
    """Bytes for people: 512 B, 1.5 MB, 2.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
