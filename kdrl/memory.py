"""How much memory a run will need, from configurations alone: nothing is loaded, so `--dry-run` answers in seconds.

Formulas count what PyTorch keeps for a decoder with flash or memory-efficient attention (no T x T scores per head).
Left out: verifier processes, fragmentation on a GPU, sliding windows (counted as full attention), eager attention.
"""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table

from kdrl.available import available_bytes
from kdrl.model_shape import ModelShape as ModelShape
from kdrl.model_shape import activation_bytes
from kdrl.model_shape import adapter_parameters as adapter_parameters
from kdrl.objectives.head import CHUNK_ELEMENTS
from kdrl.optimizers import OptimizerKind, state_bytes

# Interpreter, torch and transformers on the CPU; driver context and cuBLAS workspace on a GPU. Measured, in bytes.
_LIBRARIES = {"cpu": 360 << 20, "cuda": 800 << 20}
# oneDNN's code and scratch for products in bfloat16 on a CPU, which it keeps by shape. Measured.
_LOW_PRECISION = 180 << 20
# glibc's heap keeps about half as much again as the activations of an update need, more in small arrays of many sizes,
# and less time goes to page faults. Above so many bytes in an update a run gives arrays back at once (`settle_heap`).
HEAP_SLACK, _SETTLED = 0.4, 256 << 20
# Float32 arrays of one logits chunk alive at once: logits, gradient, one to work in; the teacher's and those between.
_CHUNK_ARRAYS, _COMPARED_ARRAYS = 3, 6
# The same for the logits of one sampling step: logits, probabilities, their running sum.
_SAMPLING_ARRAYS = 3

Phase = Literal["always", "rollout", "prepare", "update", "optimizer step"]
PHASES: tuple[Phase, ...] = ("rollout", "prepare", "update", "optimizer step")


@dataclass(frozen=True)
class Item:
    """One part of a plan; `why` is its formula with the numbers in it."""

    name: str
    bytes: int
    phase: Phase
    why: str


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, part by part, against the bytes that this process may use on the device."""

    items: tuple[Item, ...]
    available: int
    device: str
    advice: tuple[str, ...] = ()

    def of(self, phase: Phase) -> int:
        """Bytes in use during a phase, parts that are always there included."""
        return sum(item.bytes for item in self.items if item.phase in ("always", phase))

    @property
    def _phases(self) -> list[Phase]:
        """Fitting a teacher to the student is a phase of few runs."""
        return [phase for phase in PHASES if phase != "prepare" or any(item.phase == phase for item in self.items)]

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


@dataclass(frozen=True)
class _Request:
    """The arguments of `plan`, so that the parts of the formula can share them."""

    student: ModelShape
    teacher: ModelShape | None
    trainable: int
    tokens: int
    max_length: int
    rows: int
    dtype_bytes: int
    teacher_bytes: int
    autocast: bool
    lora: bool
    reference: bool
    checkpointing: bool
    optimizer: OptimizerKind
    master_weights: bool
    device: torch.device
    more: tuple[Item, ...] = ()

    @property
    def low_precision(self) -> bool:
        """Whether matrix products are in bfloat16."""
        return self.compute_bytes < 4

    @property
    def trained_bytes(self) -> int:
        """Of one weight that is trained: adapters are float32 whatever their base is."""
        return 4 if self.lora else self.dtype_bytes

    @property
    def compute_bytes(self) -> int:
        return 2 if self.autocast else self.dtype_bytes

    @property
    def attention_bytes(self) -> int:
        # See kdrl.models.attention.
        return 4 if self.device.type == "cpu" and not self.checkpointing else self.compute_bytes


def plan(
    student: ModelShape,
    teacher: ModelShape | None = None,
    *,
    trainable_parameters: int | None = None,
    micro_batch_tokens: int,
    step_tokens: int | None = None,
    max_length: int,
    rollout_rows: int,
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
    token budget of one forward and backward, of a step's `step_tokens`; `max_length` is prompt and response together;
    `rollout_rows` responses are written at once (0: none); `available` bytes are asked of the device when None;
    `more`: other parts. Raises UserError when the device is not there.
    """
    if lora and trainable_parameters is None:
        raise ValueError("plan(lora=True) needs trainable_parameters: the parameters of the adapters")
    request = _Request(
        student=student,
        teacher=teacher,
        trainable=student.parameters if trainable_parameters is None else trainable_parameters,
        # One sequence is never cut, and a step has no more than it has.
        tokens=max(min(micro_batch_tokens, step_tokens or micro_batch_tokens), max_length),
        max_length=max_length,
        rows=rollout_rows,
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
    room = available_bytes(request.device) if available is None else available
    made = MemoryPlan(_items(request), room, str(request.device))
    return made if made.fits else replace(made, advice=tuple(_advice(made, request)))


def _items(r: _Request) -> tuple[Item, ...]:
    parts = [*_held(r), *_rollout(r), *_update(r), *_optimizer_step(r), *r.more]
    if r.device.type == "cpu":
        for phase in ("update", "prepare"):
            slack = 0 if _settled(parts) else int(HEAP_SLACK * _kept(parts, phase))
            parts.append(Item("heap slack", slack, phase, "freed arrays that the C library keeps"))
    return tuple(item for item in parts if item.bytes)


def _kept(items: Iterable[Item], phase: Phase) -> int:
    return sum(item.bytes for item in items if item.phase == phase and item.name.endswith("activations"))


def _settled(items: Iterable[Item]) -> bool:
    """Whether what comes and goes with a micro-batch is so much that its arrays are given back at once."""
    items = list(items)
    return max(sum(i.bytes for i in items if i.phase == phase) for phase in ("update", "prepare")) > _SETTLED


def _need(r: _Request, phase: Phase) -> int:
    return MemoryPlan(_items(r), 0, "").of(phase)


def _held(r: _Request) -> Iterable[Item]:
    """What is there from start to end."""
    yield Item("libraries", _LIBRARIES.get(r.device.type, 0), "always", "Python, torch, transformers")
    if r.low_precision and r.device.type == "cpu":
        yield Item("bfloat16 kernels", _LOW_PRECISION, "always", "code and scratch that oneDNN keeps by shape")
    weights = r.student.parameters
    yield Item("student weights", weights * r.dtype_bytes, "always", f"{weights:,} x {r.dtype_bytes} B")
    if r.lora:
        yield Item("adapters", r.trainable * r.trained_bytes, "always", f"{r.trainable:,} x {r.trained_bytes} B")
    if r.autocast:
        products = r.student.parameters - r.student.vocabulary * r.student.width
        yield Item("autocast copies", 2 * products, "always", f"{products:,} weights of matrix products x 2 B")
    size, why = state_bytes(r.optimizer, r.trainable, r.trained_bytes, master_weights=r.master_weights)
    # Paged moments leave the device while it is short of memory.
    when: Phase = "optimizer step" if r.optimizer.startswith("paged") else "always"
    yield Item("optimizer state", size, when, why)
    if r.teacher:
        size = r.teacher.parameters * r.teacher_bytes
        yield Item("teacher weights", size, "always", f"{r.teacher.parameters:,} x {r.teacher_bytes} B")
    if r.reference:
        size = 0 if r.lora else r.student.parameters * r.dtype_bytes  # with LoRA: the base without its adapters
        yield Item("reference weights", size, "always", f"{r.student.parameters:,} x {r.dtype_bytes} B")


def _rollout(r: _Request) -> Iterable[Item]:
    """What writing responses needs."""
    layer = r.rows * r.max_length * r.student.kv_width * 2 * r.compute_bytes
    yield Item(
        "rollout KV cache",
        layer * r.student.layers,
        "rollout",
        f"{r.rows} rows x {r.max_length} tokens x {r.student.layers} layers x {r.student.kv_heads} heads x "
        f"{r.student.head_dim} x 2 x {r.compute_bytes} B",
    )
    repeat = r.student.heads // r.student.kv_heads
    yield Item("attention copies", layer * (1 + repeat), "rollout", "one layer's cache, growing and repeated per head")
    yield Item(
        "sampling logits",
        _SAMPLING_ARRAYS * 4 * r.rows * r.student.vocabulary,
        "rollout",
        f"{_SAMPLING_ARRAYS} x {r.rows} rows x {r.student.vocabulary:,} x 4 B",
    )


def _update(r: _Request) -> Iterable[Item]:
    """What forward and backward of one micro-batch need."""
    yield Item("gradients", r.trainable * r.trained_bytes, "update", f"{r.trainable:,} x {r.trained_bytes} B")
    per_layer = activation_bytes(r.student, r.compute_bytes, r.attention_bytes, frozen=r.lora)
    kept = r.student.width * r.compute_bytes
    if r.checkpointing:
        size, why = per_layer + kept * r.student.layers, f"{per_layer:,} B + {r.student.layers} layers x {kept:,} B"
    else:
        size, why = per_layer * r.student.layers, f"{r.student.layers} layers x {per_layer:,} B"
    yield Item("activations", r.tokens * size, "update", f"{r.tokens:,} tokens x {why}")
    hidden = r.student.width + (r.teacher.width if r.teacher else 0)
    yield Item("hidden states", 2 * 4 * r.tokens * hidden, "update", f"{r.tokens:,} tokens x {hidden:,} x 2 x 4 B")
    # The head is through, backward too, before the layers begin.
    layer = r.tokens * r.compute_bytes * (3 * r.student.mlp_width + 2 * r.student.width)
    chunk = chunk_bytes(r.tokens, r.student.vocabulary, compared=r.teacher is not None)
    if r.dtype_bytes < 4:
        chunk += 4 * r.student.vocabulary * r.student.width
    why = "backward of one layer" if layer > chunk else "one chunk of the head's logits"
    yield Item("working arrays", max(layer, chunk), "update", f"{why}, the larger of both")
    if r.teacher:
        forward = r.tokens * r.teacher_bytes * (3 * r.teacher.mlp_width + 4 * r.teacher.width)
        yield Item("teacher forward", forward, "update", "one layer's activations, none kept")


def settle_heap(made: MemoryPlan) -> None:
    """Have large arrays given back at once where a plan on the CPU counts on that; for the whole process, glibc alone.

    Without it the peak of a 20M update with LoRA is 1.7 times as high; the page faults cost it up to 4 % of its time.
    """
    if made.device == "cpu" and sys.platform.startswith("linux") and _settled(made.items):
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            trim, mmap = -1, -3
            library.mallopt(mmap, 1 << 20)
            library.mallopt(trim, 64 << 20)


def chunk_bytes(tokens: int, vocabulary: int, *, compared: bool = True) -> int:
    """Bytes of the arrays of one chunk of the head, as `kdrl.objectives.head.chunks` cuts it."""
    size = max(16, min(CHUNK_ELEMENTS // vocabulary, (tokens + 1) // 2))
    return (_COMPARED_ARRAYS if compared else _CHUNK_ARRAYS) * 4 * size * vocabulary


def _optimizer_step(r: _Request) -> Iterable[Item]:
    """What AdamW's step needs beside its state."""
    size = r.trained_bytes
    yield Item("gradients", r.trainable * size, "optimizer step", f"{r.trainable:,} x {size} B")
    if r.master_weights and size < 4:
        yield Item("float32 gradients", 4 * r.trainable, "optimizer step", f"{r.trainable:,} x 4 B")


def _advice(made: MemoryPlan, r: _Request) -> Iterable[str]:
    """What to change, with the largest value that would fit where there is one."""
    room = made.available
    if made.of("always") > room or made.of("optimizer step") > room:
        yield from _smaller_weights(r)
        return
    if made.of("update") > room:
        fit = bisect_left(range(r.tokens), True, key=lambda n: _need(replace(r, tokens=n + 1), "update") > room)
        if fit >= r.max_length:
            yield f"lower optimizer.micro_batch_tokens to {fit:,}"
        if not r.checkpointing:
            yield "set student.gradient_checkpointing: true"
        if fit < r.max_length:
            yield "lower rollout.max_new_tokens"
            yield from _smaller_weights(r)
    if made.of("prepare") > room:
        yield "lower optimizer.micro_batch_tokens, which the teacher is fitted in, or leave teacher.prepare out"
    if made.of("rollout") > room:
        fit = bisect_left(range(r.rows), True, key=lambda n: _need(replace(r, rows=n + 1), "rollout") > room)
        yield f"lower rollout.rows to {fit:,}" if fit else "lower rollout.max_new_tokens"


def _smaller_weights(r: _Request) -> Iterable[str]:
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
