"""The plan counts what a run really holds: parameters, kept activations, and the peak of a real train step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import raw_recipe
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from kdrl.batch import Segment
from kdrl.bench.allocations import Allocations
from kdrl.errors import UserError
from kdrl.memory import ModelShape, plan
from kdrl.model_shape import activation_bytes, adapter_parameters
from kdrl.models.attention import recompute_layers
from kdrl.models.config import LoraConfig
from kdrl.models.heads import head_of, hidden_states
from kdrl.models.packing import Packing
from kdrl.models.quick import quicken
from kdrl.objectives.head import score_tokens
from kdrl.run import resume, train

REPO = Path(__file__).parents[1]
TINY = {
    "vocab_size": 50,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MIDDLE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SMALL_RUN = {"micro_batch_tokens": 1024, "max_length": 128, "rollout_rows": 32}


def shape(**changes) -> ModelShape:
    return ModelShape.from_config(Qwen3Config(**(TINY | changes)))


def size_of(made, name: str) -> int:
    return sum(item.bytes for item in made.items if item.name == name)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**TINY, tie_word_embeddings=True),
        Qwen3Config(**TINY, tie_word_embeddings=False),
        LlamaConfig(**MIDDLE),
        GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
        MixtralConfig(**(TINY | {"num_hidden_layers": 2}), num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_parameters_are_those_of_the_real_model(config) -> None:
    model = AutoModelForCausalLM.from_config(config)
    found = ModelShape.from_config(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found == ModelShape.from_model(model)


def test_a_large_model_is_counted_without_memory() -> None:
    large = ModelShape.from_config(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        )
    )
    assert large.parameters == 70_553_706_496  # Llama-3-70B
    made = plan(large, micro_batch_tokens=4096, max_length=4096, rollout_rows=8, dtype_bytes=2, available=80 * 10**9)
    assert not made.fits
    assert "student.lora" in made.verdict


def test_a_configuration_that_is_no_causal_lm_is_a_sentence() -> None:
    from transformers import CLIPVisionConfig

    with pytest.raises(UserError, match="no causal language model"):
        ModelShape.from_config(CLIPVisionConfig())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapter_parameters_are_those_that_peft_trains(targets) -> None:
    import peft

    config = Qwen3Config(**TINY)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_config(config),
        peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(config, LoraConfig(rank=4, target_modules=targets)) == trained
    with pytest.raises(UserError, match="nowhere"):
        adapter_parameters(config, LoraConfig(target_modules=["nowhere"]))


def kept_for_backward(config, tokens: int, length: int, autocast: bool, dtype: torch.dtype, lora: bool) -> int:
    """Bytes of all storages, weights and their casts apart, that autograd holds after one forward."""
    import peft

    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if lora:
        model = peft.get_peft_model(model.requires_grad_(False), peft.LoraConfig(r=2, target_modules="all-linear"))
    quicken(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    sizes, held = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = tensor.ndim == 2 and (tuple(tensor.shape) in shapes or tuple(tensor.T.shape) in shapes)
        if storage.data_ptr() not in weights and not cast:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    ids = torch.randint(0, 50, (1, tokens))
    packing = Packing([Segment(start, length) for start in range(0, tokens, length)], ids.device)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden_states(model, ids, None, packing=packing)
    return sum(sizes.values())


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("compute", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("numbers", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_activation_formula_is_what_autograd_keeps(kind, numbers, compute: str, lora: bool) -> None:
    """Two more layers keep what the formula says, within 3 %."""
    tokens, length = 448, 64  # no width of a weight, so that casts of weights are told apart by shape
    low, autocast = compute == "bfloat16", compute == "autocast"
    dtype = torch.bfloat16 if low else torch.float32
    kept = [
        kept_for_backward(kind(**(numbers | {"num_hidden_layers": n})), tokens, length, autocast, dtype, lora)
        for n in (1, 3)
    ]
    wide = {"stream_bytes": 2 if low else 4, "lora": lora}
    formula = activation_bytes(ModelShape.from_config(kind(**numbers)), 4 if compute == "float32" else 2, 4, **wide)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(tokens * formula, rel=0.03)


def live_bytes(
    config, segments: list[Segment], *, dtype=torch.float32, autocast=False, lora=False, checkpointing=False
):
    """Most bytes of live tensors in an optimizer step and two micro-batches, weights and optimizer included."""
    import peft

    tokens = sum(segment.length for segment in segments)
    with Allocations() as seen:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if lora:
            model = peft.get_peft_model(model.requires_grad_(False), peft.LoraConfig(r=8, target_modules="all-linear"))
        if checkpointing:
            recompute_layers(model)
        quicken(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for number in range(3):
            ids = torch.randint(0, 50, (1, tokens))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = hidden_states(model, ids, None, packing=Packing(segments, ids.device))
            scores = score_tokens(head_of(model), hidden.flatten(0, 1), ids.flatten())
            (-scores.logp_N.mean()).backward()
            del hidden, scores
            if number == 0:
                optimizer.step()
                optimizer.zero_grad()
    return seen.peak


SHARED = [*(Segment(64 * n, 64) for n in range(2)), *(Segment(128 + 40 * n, 40, n // 8) for n in range(16))]
OWN = [Segment(96 * n, 96) for n in range(8)]


@pytest.mark.parametrize(
    ("segments", "options"),
    [
        (SHARED, {}),
        (OWN, {}),
        (OWN, {"autocast": True}),
        (OWN, {"dtype": torch.bfloat16}),
        (OWN, {"lora": True}),
        (OWN, {"checkpointing": True}),
    ],
    ids=["shared prompts", "float32", "autocast", "bfloat16", "lora", "checkpointing"],
)
def test_plan_of_an_update_is_its_live_bytes(segments: list[Segment], options: dict) -> None:
    """Within 12 %: weights, gradients, optimizer state, activations and what works on them; not the heap."""
    config = Qwen3Config(**(MIDDLE | {"num_hidden_layers": 3}))
    student, shared = ModelShape.from_config(config), segments is SHARED
    # As `kdrl.batch` counts the packed tokens.
    budget = 768 + 16 * 104 // 8 if shared else 768
    run = {"max_length": 104, "prompt_tokens": 64, "group": 8} if shared else {"max_length": 96}
    given = {k: v for k, v in options.items() if k != "dtype"}
    if given.get("lora"):
        run["trainable_parameters"] = adapter_parameters(config, LoraConfig(rank=8))
    made = plan(
        student,
        micro_batch_tokens=budget,
        rollout_rows=0,
        dtype_bytes=2 if "dtype" in options else 4,
        available=10**11,
        **run,
        **given,
    )
    beside = sum(size_of(made, name) for name in ("libraries", "bfloat16 kernels", "heap slack"))
    assert made.of("update") - beside == pytest.approx(live_bytes(config, segments, **options), rel=0.12)


def test_parts_follow_their_numbers() -> None:
    student, teacher = shape(), shape(hidden_size=256)
    made = plan(student, teacher, reference=True, available=10**10, **SMALL_RUN)
    assert size_of(made, "student weights") == 4 * student.parameters
    assert size_of(made, "optimizer state") == 8 * student.parameters
    assert size_of(made, "teacher weights") == 4 * teacher.parameters
    assert size_of(made, "reference weights") == 4 * student.parameters
    assert size_of(made, "rollout KV cache") == 32 * 128 * 5 * 2 * 32 * 2 * 4
    assert size_of(made, "gradients") == 2 * 4 * student.parameters  # in two phases, which do not add
    assert made.of("update") < sum(item.bytes for item in made.items)
    alone = plan(student, available=10**10, **SMALL_RUN | {"rollout_rows": 0})
    assert not size_of(alone, "teacher weights")
    assert not size_of(alone, "rollout KV cache")


def test_every_saving_saves() -> None:
    student = ModelShape.from_config(Qwen3Config(**MIDDLE))
    common = SMALL_RUN | {"available": 10**11, "reference": True}
    whole = plan(student, student, **common)
    assert plan(student, None, **common).peak < whole.peak
    assert plan(student, student, checkpointing=True, **common).peak < whole.peak
    assert plan(student, student, dtype_bytes=2, **common).peak < whole.peak
    assert plan(student, student, teacher_dtype_bytes=2, **common).peak < whole.peak
    assert size_of(plan(student, autocast=True, **common), "activations") < size_of(whole, "activations")
    adapters = plan(student, student, lora=True, trainable_parameters=10_000, **common)
    assert adapters.peak < whole.peak
    assert size_of(adapters, "reference weights") == 0
    assert size_of(adapters, "student weights") == 4 * student.parameters
    assert size_of(adapters, "adapters") == 4 * 10_000
    with pytest.raises(ValueError, match="adapters"):
        plan(student, lora=True, **common)


def test_a_sequence_longer_than_the_budget_is_planned_whole() -> None:
    long = plan(shape(), micro_batch_tokens=16, max_length=2048, rollout_rows=0, available=10**11)
    assert long.peak == plan(shape(), micro_batch_tokens=2048, max_length=2048, rollout_rows=0, available=10**11).peak


def test_advice_is_enough_when_followed() -> None:
    """Each number in the verdict fits, and one more does not."""
    run = {"micro_batch_tokens": 65536, "max_length": 128, "rollout_rows": 4}
    made = plan(shape(), available=2 * 10**9, **run)
    assert made.verdict.startswith("does not fit: about ")
    assert "gradient_checkpointing" in made.verdict
    tokens = int(made.verdict.split("micro_batch_tokens to ")[1].split(";")[0].replace(",", ""))
    assert plan(shape(), available=2 * 10**9, **run | {"micro_batch_tokens": tokens}).fits
    assert not plan(shape(), available=2 * 10**9, **run | {"micro_batch_tokens": tokens + 1}).fits

    run = {"micro_batch_tokens": 128, "max_length": 128, "rollout_rows": 100_000}
    made = plan(shape(), available=2 * 10**9, **run)
    rows = int(made.verdict.split("rollout.rows to ")[1].split(";")[0].replace(",", ""))
    assert plan(shape(), available=2 * 10**9, **run | {"rollout_rows": rows}).fits
    assert not plan(shape(), available=2 * 10**9, **run | {"rollout_rows": rows + 1}).fits


def test_table_and_json_say_the_verdict() -> None:
    for room, start in ((10**11, "fits"), (10**6, "does not fit")):
        made = plan(shape(), shape(), available=room, **SMALL_RUN)
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(made.table())
        text = console.export_text()
        assert start in text
        assert all(item.name in text for item in made.items)
        plain = json.loads(json.dumps(made.to_dict()))
        assert plain["verdict"].startswith(start)
        assert plain["fits"] == (start == "fits")


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(world: Path, tmp_path: Path) -> None:
    """A real process, and no folder is left."""
    recipe = tmp_path / "recipe.yaml"
    many = {"optimizer": {"micro_batch_tokens": 10**10}, "rollout": {"group": 10**8}}
    recipe.write_text(json.dumps(raw_recipe(world, **many)))
    command = [sys.executable, "-m", "kdrl", "train", str(recipe), "--output", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "kdrl: the run does not fit: about" in done.stderr
    assert re.search(r"lower optimizer\.micro_batch_tokens to [\d,]+", done.stderr)
    assert "--force" in done.stderr
    assert not (tmp_path / "run").exists()


def test_force_starts_it_all_the_same_and_a_resumed_run_is_asked_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("kdrl.memory.available_bytes", lambda device: 10**8)
    train(raw_recipe(world), output=tmp_path / "run", say=lambda text: said.append(str(text)), force=True)
    memory = next(text for text in said if text.startswith("memory: "))
    assert re.match(r"memory: rollout [\d.]+ .B, update [\d.]+ .B, optimizer step [\d.]+ .B; does not fit", memory)
    with pytest.raises(UserError, match="--force"):
        resume(tmp_path / "run")


STEP = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from kdrl.batch import Segment
from kdrl.heap import settle
from kdrl.models.heads import hidden_states
from kdrl.models.packing import Packing
from kdrl.objectives.head import Head, score_tokens
numbers, tokens, length, autocast = json.loads(sys.argv[1])
torch.set_num_threads(1)
config = Qwen3Config(**numbers)
settle(tight=False)
model = AutoModelForCausalLM.from_config(config).train()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    ids = torch.randint(0, numbers["vocab_size"], (1, tokens))
    packing = Packing([Segment(start, length) for start in range(0, tokens, length)], ids.device)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = hidden_states(model, ids, None, packing=packing)
        scores = score_tokens(Head(model.lm_head.weight), hidden.flatten(0, 1), ids.flatten())
    (-scores.logp_N.mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
# Not ru_maxrss: a child starts with its parent's.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is measured as Linux counts it")
@pytest.mark.parametrize(
    ("numbers", "tokens", "autocast"),
    [(TINY, 4096, False), (MIDDLE, 1024, False)],
    ids=["tiny", "20M"],
)
def test_plan_against_the_peak_of_a_real_step(numbers: dict, tokens: int, autocast: bool) -> None:
    """Within 15 % of the peak that the kernel counted; benchmarks/memory_plan.py measures whole runs."""
    arguments = json.dumps([numbers, tokens, 128, autocast])
    command = [sys.executable, "-c", STEP, arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    measured = 1024 * int(done.stdout.split()[-1])
    student = ModelShape.from_config(Qwen3Config(**numbers))
    run = {"micro_batch_tokens": tokens, "step_tokens": tokens, "max_length": 128, "rollout_rows": 0}
    made = plan(student, **run, autocast=autocast, available=10**11)
    print(f"planned {made.peak / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert made.peak == pytest.approx(measured, rel=0.15)
