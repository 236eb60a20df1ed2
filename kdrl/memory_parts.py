"""The parts of a memory plan: what each phase of a run holds, from the models' numbers alone.

Formulas count what PyTorch keeps for a decoder with flash or memory-efficient attention (no T x T scores per head), and
what glibc's heap keeps beside that. Responses are taken to be as long as they may be.
Left out: verifier processes, fragmentation on a GPU, sliding windows (counted as full attention), eager attention, and
what the heap still holds of an earlier phase, which never makes the greatest phase greater.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from kdrl.model_shape import ModelShape, activation_bytes
from kdrl.objectives.head import CHUNK_ELEMENTS
from kdrl.optimizers import OptimizerKind, state_bytes

# Interpreter, torch and transformers on the CPU; driver context and cuBLAS workspace on a GPU. Measured, in bytes.
_LIBRARIES = {"cpu": 385 << 20, "cuda": 800 << 20}
# oneDNN's code and scratch for products in bfloat16 on a CPU, which it keeps by shape. Measured.
_LOW_PRECISION = 80 << 20
# What glibc's heap keeps beside the arrays that are alive, measured: as much again as an update's activations, up to a
# limit, where freed arrays are given back at once (`kdrl.heap`) or a step is a single micro-batch; more where the
# arrays of one micro-batch must find room between those of the last.
_HEAP_SLACK, _HEAP_GAPS = 96 << 20, 256 << 20
# Float32 arrays of one logits chunk alive at once: logits, gradient, one to work in; the teacher's and those between.
_CHUNK_ARRAYS, _COMPARED_ARRAYS = 3, 6
# The same for the logits of one sampling step: logits, probabilities, their running sum.
_SAMPLING_ARRAYS = 3

# Up to so many weights `kdrl.engines.fused` copies a model's layers, and `kdrl.engines.sampling` its head on a CPU.
_COPIED, _PACKED = {"cpu": 1 << 28, "cuda": 1 << 25}, 1 << 26
# Of `kdrl.engines.decoding`: the shortest prompt that is kept once for its rows, tokens of prompts read at once.
_SHARED, _READ = 48, {"cpu": 1 << 13, "cuda": 1 << 16}

Phase = Literal["always", "rollout", "prepare", "teacher", "update", "optimizer step"]
PHASES: tuple[Phase, ...] = ("rollout", "prepare", "teacher", "update", "optimizer step")


@dataclass(frozen=True)
class Item:
    """One part of a plan; `why` is its formula with the numbers in it."""

    name: str
    bytes: int
    phase: Phase
    why: str


@dataclass(frozen=True)
class Request:
    """The arguments of `kdrl.memory.plan`, with what follows from them."""

    student: ModelShape
    teacher: ModelShape | None
    trainable: int
    budget: int
    several: bool
    max_length: int
    prompt: int
    group: int
    rows: int
    samples: int
    teacher_states: int
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
    tight: bool = False

    @property
    def keys(self) -> float:
        """Keys and values that responses attend to, for each packed token where they share prompts; 0 where not."""
        own = self.max_length - self.prompt
        # As `kdrl.batch` counts: beside its tokens, an eighth of what a response attends to.
        rows = min(self.group, int((self.budget - self.prompt) / (own + self.max_length / 8)))
        return rows * self.max_length / (self.prompt + rows * own) if rows > 1 else 0.0

    @property
    def tokens(self) -> int:
        """Of one forward pass; one sequence is never cut."""
        return max(int(self.budget / (1 + self.keys / 8)), self.max_length)

    @property
    def fused(self) -> bool:
        """Whether the engine has its own decode step for the model: not for adapters in low precision."""
        return self.student.gated_mlp and not (self.lora and self.low_precision)

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
        """Of one element in matrix products."""
        return 2 if self.autocast else self.dtype_bytes

    @property
    def attention_bytes(self) -> int:
        """Of one element in attention, see `kdrl.models.attention`."""
        return 4 if self.device.type == "cpu" else self.compute_bytes


def items_of(r: Request) -> tuple[Item, ...]:
    """All parts that are not empty."""
    parts = [*_held(r), *_rollout(r), *_teacher(r), *_update(r), *_optimizer_step(r), *r.more]
    if r.device.type == "cpu":
        for phase in ("update", "prepare"):
            slack = _slack(_kept(parts, phase), gaps=r.several and not r.tight)
            parts.append(Item("heap slack", slack, phase, "freed arrays that the C library keeps"))
    return tuple(item for item in parts if item.bytes)


def _kept(items: Iterable[Item], phase: Phase) -> int:
    return sum(item.bytes for item in items if item.phase == phase and item.name.endswith("activations"))


def _slack(kept: int, *, gaps: bool) -> int:
    return min(2 * kept, _HEAP_GAPS + kept // 2) if gaps else min(kept, _HEAP_SLACK)


def _held(r: Request) -> Iterable[Item]:
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
        phases: tuple[Phase, ...] = ("rollout", "update")
        for phase in phases:
            yield Item("autocast copies", 2 * products, phase, f"{products:,} weights of matrix products x 2 B")
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


def _rollout(r: Request) -> Iterable[Item]:
    """What writing responses needs."""
    shape, prompts = r.student, -(-r.rows // r.samples)
    shared = r.fused and r.device.type == "cpu" and r.samples > 1 and r.prompt >= _SHARED
    tokens = r.rows * (r.max_length - r.prompt) + (prompts if shared else r.rows) * r.prompt
    # Keys turned by their position have the format of the residual stream.
    each = shape.kv_width * (r.dtype_bytes + r.compute_bytes)
    why = f"{tokens:,} tokens x {shape.layers} layers x {shape.kv_heads} heads x {shape.head_dim}"
    cache = tokens * each * shape.layers
    yield Item("rollout KV cache", cache, "rollout", f"{why} x ({r.dtype_bytes} + {r.compute_bytes}) B")
    repeat = 0 if r.fused and r.device.type == "cpu" else shape.heads // shape.kv_heads
    copies = tokens * each * (1 + repeat)
    why = "one layer's cache, growing" + (" and repeated per head" if repeat else "")
    yield Item("attention copies", copies, "rollout", why)
    logits = _SAMPLING_ARRAYS * 4 * r.rows * shape.vocabulary
    why = f"{_SAMPLING_ARRAYS} x {r.rows} rows x {shape.vocabulary:,} x 4 B"
    yield Item("sampling logits", logits, "rollout", why)
    if not r.rows:
        return
    layers = shape.layers * shape.width * (2 * (shape.query_width + shape.kv_width) + 3 * shape.mlp_width)
    if r.fused and (r.autocast or r.lora or layers <= _COPIED[r.device.type]):
        yield Item("decode copies", layers * r.compute_bytes, "rollout", f"{layers:,} weights x {r.compute_bytes} B")
    head = shape.vocabulary * shape.width
    if r.device.type == "cpu" and (r.dtype_bytes < 4 or head <= _PACKED):
        yield Item("head copy", 4 * head, "rollout", f"{head:,} x 4 B")
    # Prompts are read before most of the cache is there.
    read = min(prompts * r.prompt, max(_READ[r.device.type], r.prompt))
    beyond = read * _forward_bytes(shape, r.compute_bytes) + prompts * r.prompt * each * shape.layers
    beyond = max(0, beyond - cache - copies - logits)
    yield Item("prompt forward", beyond, "rollout", f"{read:,} tokens of prompts at once, less the cache to come")


def _forward_bytes(shape: ModelShape, compute_bytes: int) -> int:
    """Bytes a token of a layer's arrays in a forward pass that keeps none."""
    return compute_bytes * (3 * shape.mlp_width + 4 * shape.width)


def _teacher(r: Request) -> Iterable[Item]:
    """What the teacher's pass needs, and what an update keeps of it."""
    if r.teacher is None:
        return
    forward = r.tokens * _forward_bytes(r.teacher, r.teacher_bytes)
    yield Item("teacher forward", forward, "teacher", "one layer's arrays, none kept")
    chunk = chunk_bytes(r.tokens, r.teacher.vocabulary, compared=False)
    yield Item("logits chunk", chunk, "teacher", f"of {r.teacher.vocabulary:,} tokens")
    states = r.teacher_states * r.teacher.width * r.teacher_bytes
    why = f"{r.teacher_states:,} tokens x {r.teacher.width:,} x {r.teacher_bytes} B"
    phases: tuple[Phase, ...] = ("teacher", "update")
    for phase in phases:
        yield Item("teacher's hidden states", states, phase, why)


def _update(r: Request) -> Iterable[Item]:
    """What forward and backward of one micro-batch need."""
    # Keys of prompts are copied for their responses on a GPU alone (`kdrl.models.packing`).
    copied = 0.0 if r.device.type == "cpu" else r.keys
    per_layer = activation_bytes(
        r.student, r.compute_bytes, r.attention_bytes, stream_bytes=r.dtype_bytes, lora=r.lora, keys=copied
    )
    kept = r.student.width * r.dtype_bytes
    if r.checkpointing:
        size, why = per_layer + kept * r.student.layers, f"{per_layer:,} B + {r.student.layers} layers x {kept:,} B"
    else:
        size, why = per_layer * r.student.layers, f"{r.student.layers} layers x {per_layer:,} B"
    activations = r.tokens * size
    yield Item("activations", activations, "update", f"{r.tokens:,} tokens x {why}")
    width = r.student.width
    yield Item("hidden states", 2 * 4 * r.tokens * width, "update", f"{r.tokens:,} tokens x {width:,} x 2 x 4 B")
    # The head is through, backward too, before the layers begin.
    layer = r.tokens * r.compute_bytes * (3 * r.student.mlp_width + 2 * width)
    chunk = chunk_bytes(r.tokens, r.student.vocabulary, compared=r.teacher is not None)
    why = "backward of one layer" if layer > chunk else "one chunk of the head's logits"
    working = max(layer, chunk)
    yield Item("working arrays", working, "update", f"{why}, the larger of both")
    gradients, why = r.trainable * r.trained_bytes, f"{r.trainable:,} x {r.trained_bytes} B"
    if not r.several:
        gradients = max(0, gradients - activations - working)
        why += ", in the place of the only micro-batch's activations"
    yield Item("gradients", gradients, "update", why)
    if not r.lora:
        head = r.student.vocabulary * width
        yield Item("head gradient", 4 * head, "update", f"{head:,} x 4 B, added up beside the others")


def chunk_bytes(tokens: int, vocabulary: int, *, compared: bool = True) -> int:
    """Bytes of the arrays of one chunk of the head, as `kdrl.objectives.head.chunks` cuts it."""
    size = max(16, min(CHUNK_ELEMENTS // vocabulary, (tokens + 1) // 2))
    return (_COMPARED_ARRAYS if compared else _CHUNK_ARRAYS) * 4 * size * vocabulary


def _optimizer_step(r: Request) -> Iterable[Item]:
    """What AdamW's step needs beside its state."""
    size = r.trained_bytes
    yield Item("gradients", r.trainable * size, "optimizer step", f"{r.trainable:,} x {size} B")
    if r.master_weights and size < 4:
        yield Item("float32 gradients", 4 * r.trainable, "optimizer step", f"{r.trainable:,} x 4 B")
