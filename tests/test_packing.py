"""A packed pass is the padded one: hidden states, losses and gradients, on fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHARACTERS, gradient, made_responses, problem, score, sharpen
from torch import Tensor

from kdrl.batch import Response, Rollouts, lay_out, pack_rows
from kdrl.bench.allocations import Allocations
from kdrl.models import LoadedModel, LoraConfig, ModelConfig, NewModel, NewTokenizer, load_model, packing
from kdrl.models.heads import causal_lm
from kdrl.models.packing import micro_batches, packs, wanted_states
from kdrl.teachers import LocalTeacher
from kdrl.update import Updater

PACKED = {
    "qwen3": {},
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "mistral": {"sliding_window": None},
}
PADDED: dict[str, Any] = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "_sliding_window_pattern": 2},
    "bloom": {},
}
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "lora": {"lora": LoraConfig(rank=2)},
    "recomputed": {"gradient_checkpointing": True},
    "lora-recomputed": {"lora": LoraConfig(rank=2), "gradient_checkpointing": True},
}


def model(architecture: str = "qwen3", own: dict[str, Any] | None = None, **change: Any) -> LoadedModel:
    heads = {} if architecture in ("gpt2", "gpt_neox", "bloom") else {"kv_heads": 2}
    sizes: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 4, "max_positions": 128, **heads}
    if architecture != "bloom":
        sizes["intermediate_size"] = 48
    new = NewModel(architecture=architecture, settings=own or {}, **sizes)
    config = ModelConfig(model=new, tokenizer=NewTokenizer(characters=CHARACTERS), **change)
    loaded = load_model(config, "cpu", trainable=True, seed=0)
    sharpen(loaded, 8.0)
    return loaded


def exact(architecture: str, own: dict[str, Any] | None = None, **change: Any) -> LoadedModel:
    """In float64 throughout: the norms of most models compute in float32 whatever comes in."""
    loaded = model(architecture, own, **change)
    loaded.model.double()

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = getattr(self, "variance_epsilon", None) or getattr(self, "eps", 1e-6)
        weight = self.weight + 1.0 if type(self).__name__.startswith("Gemma") else self.weight
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + scale))

    for module in loaded.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return loaded


def made(shape: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[Response]:
    """Responses of groups `(prompt tokens, (response tokens, ...))`."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 30, (count,), generator=draw).tolist()

    out = []
    for group, (width, lengths) in enumerate(shape):
        prompt = ids(width)
        for length in lengths:
            out.append(Response(problem(f"p{group}"), group, prompt, ids(length), "student", True, ""))
            out[-1].privileged_ids = prompt + ids(1 + len(out) % 4)
    return out


def passed(
    loaded: LoadedModel, rollouts: Rollouts, wanted_N: Tensor, packed: bool, budget: int = 4096, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states `[N, D]` of the wanted tokens, zero elsewhere, and the gradients of a random function of them."""
    width = causal_lm(loaded).config.hidden_size
    weights_ND = torch.randn(rollouts.tokens, width, generator=torch.Generator().manual_seed(1))
    found_ND, total = torch.zeros(rollouts.tokens, width, dtype=torch.float64), torch.zeros(())
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for micro in micro_batches(loaded, rollouts, range(rollouts.rows), wanted_N, budget, padded=not packed, **options):
        assert bool(micro.segments) == packed
        hidden_MD = wanted_states(loaded, micro)
        found_ND[micro.index_M] = hidden_MD.detach().double()
        total = (hidden_MD.double() * weights_ND[micro.index_M].double()).sum()
        each = torch.autograd.grad(total, parameters, allow_unused=True)
        grads = [a if b is None else a + b for a, b in zip(grads, each, strict=True)]
    return found_ND, grads


def distance(found: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Relative errors of the hidden states and of the parameter gradient that is furthest off."""
    assert want[0].norm() > 0
    largest = max(float(g.norm()) for g in want[1])
    hidden = float((found[0] - want[0]).norm() / want[0].norm())
    each = [
        float((a - b).norm()) / max(float(b.norm()), 1e-6 * largest) for a, b in zip(found[1], want[1], strict=True)
    ]
    return hidden, max(each)


RAGGED = [(3, (5, 1, 9)), (11, (2, 2, 2, 2)), (1, (7,)), (30, (1, 1)), (6, (4, 23, 1, 12)), (2, (1,))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", PACKED)
def test_hidden_states_and_every_gradient_are_those_of_the_padded_form(architecture: str, way: str):
    loaded = exact(architecture, PACKED[architecture], **WAYS[way])
    assert packs(loaded)
    rollouts = Rollouts.of(made(RAGGED))
    want = passed(loaded, rollouts, rollouts.trained_N, packed=False)
    for budget in (4096, 60):
        assert max(distance(passed(loaded, rollouts, rollouts.trained_N, True, budget), want)) < 1e-10


SHAPES = {
    "one token": [(3, (1,))],
    "one row": [(4, (9,))],
    "one-token prompts": [(1, (3, 4)), (1, (5,))],
    "prompts of very different lengths": [(1, (3, 3)), (70, (2, 30)), (5, (4, 4)), (40, (1,))],
    "all alike": [(6, (5, 5, 5)), (6, (5, 5, 5))],
    "one group": [(12, (1, 2, 3, 4, 5, 6, 7, 8))],
    "none shared": [(3 + i, (2 + 3 * i,)) for i in range(6)],
}


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_and_mask(shape: str, share: float):
    loaded = exact("qwen3")
    rollouts = Rollouts.of(made(SHAPES[shape]))
    wanted_N = torch.rand(rollouts.tokens, generator=torch.Generator().manual_seed(2)) < share
    wanted_N[0] = True
    for options in ({}, {"privileged": True}):
        want = passed(loaded, rollouts, wanted_N, packed=False, **options)
        for budget in (4096, 25, 1):
            assert max(distance(passed(loaded, rollouts, wanted_N, True, budget, **options), want)) < 1e-10


def test_nothing_wanted_is_nothing_run():
    loaded, rollouts = exact("qwen3"), Rollouts.of(made(RAGGED))
    assert list(micro_batches(loaded, rollouts, range(rollouts.rows), ~rollouts.trained_N, 4096)) == []


ENTRIES: list[dict[str, Any]] = [
    {"policy_gradient": {"ratio": "token", "clip": {"low": 0.1, "high": 0.2}}},
    {"distill": {"divergence": "reverse_kl", "support": "full", "mask": "wrong_response"}},
]


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_loss_and_gradient_of_an_objective(architecture: str, monkeypatch: pytest.MonkeyPatch):
    student, teacher = exact(architecture), exact(architecture)
    sharpen(teacher, 1.5)
    teacher.model.requires_grad_(False)
    responses, found, losses = made_responses(), [], []
    for packed in (False, True):
        monkeypatch.setattr(packing, "packs", lambda *given, packed=packed: packed)
        scored = score(student, responses, ENTRIES, teacher=teacher, reference=teacher, stale=True)
        losses.append(Updater(student, 4096).accumulate(scored, range(9)))
        found += [gradient(student, scored, budget=budget) for budget in (4096, 50)]
    # Old log-probs, scores and advantages are kept in float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for each in found[1:]:
        assert (each - found[0]).norm() < 1e-6 * found[0].norm()


@pytest.mark.parametrize("architecture", PADDED)
def test_what_is_not_full_causal_attention_stays_padded(architecture: str):
    loaded = model(architecture, PADDED[architecture])
    assert not packs(loaded)
    rollouts = Rollouts.of(made(RAGGED))
    batches = list(micro_batches(loaded, rollouts, range(rollouts.rows), rollouts.trained_N, 4096))
    assert [bool(micro.segments) for micro in batches] == [False]
    assert wanted_states(loaded, batches[0]).isfinite().all()


def test_another_attention_stays_padded():
    assert not packs(model(attention="eager"))


def test_experts_choose_token_by_token():
    """In float32: the products of experts know no wider format."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    loaded, rollouts = model("mixtral", own), Rollouts.of(made(RAGGED))
    found, want = (passed(loaded, rollouts, rollouts.trained_N, packed) for packed in (True, False))
    assert max(distance(found, want)) < 1e-4


def test_a_text_within_the_window_is_packed():
    for architecture, own in (("mistral", {}), ("gemma3_text", {"_sliding_window_pattern": 2})):
        loaded = exact(architecture, own | {"sliding_window": 30})
        assert packs(loaded, 30)
        assert not packs(loaded, 31)
        for prompt, packed in ((20, True), (21, False)):
            rollouts = Rollouts.of(made([(prompt, (11, 3)), (3, (5, 5))]))
            batches = list(micro_batches(loaded, rollouts, range(4), rollouts.trained_N, 4096))
            assert [bool(micro.segments) for micro in batches] == [packed]
            if packed:
                found, want = (passed(loaded, rollouts, rollouts.trained_N, form) for form in (True, False))
                assert max(distance(found, want)) < 1e-10


def test_a_layer_that_mixes_tokens_by_itself_is_found_out():
    """The check compares numbers, so a model need not say that it is of another kind."""
    loaded = model()

    def shifted(module: Any, given: Any, result: Tensor) -> Tensor:
        return result + result.roll(1, dims=1)

    loaded.model.model.layers[1].mlp.register_forward_hook(shifted)
    assert not packs(loaded)


def test_a_layer_computed_again_with_other_attention_is_an_error_not_another_number():
    loaded = model()
    loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # without kdrl's context
    rollouts = Rollouts.of(made(RAGGED))
    (micro,) = micro_batches(loaded, rollouts, range(rollouts.rows), rollouts.trained_N, 4096)
    assert micro.segments
    with pytest.raises((RuntimeError, torch.utils.checkpoint.CheckpointError)):
        wanted_states(loaded, micro).sum().backward()


def read_by(loaded: LoadedModel) -> list[int]:
    """How many tokens every pass embeds from now on."""
    read: list[int] = []
    packs(loaded)  # the check reads too
    embed = causal_lm(loaded).get_input_embeddings()
    embed.register_forward_hook(lambda module, given, result: read.append(given[0].numel()))
    return read


def test_a_prompt_is_run_once_for_its_group_by_student_teacher_and_reference():
    student, teacher = exact("qwen3"), exact("qwen3")
    responses = made([(20, (5, 7, 1, 6)), (9, (8, 8))])
    scored = score(student, responses, ENTRIES[:1], reference=teacher, stale=True)
    own = sum(len(r.token_ids) - 1 for r in responses)
    once, each = own + 20 + 9, own + 4 * 20 + 2 * 9
    for loaded, run in (
        (student, lambda budget: Updater(student, budget).accumulate(scored, range(6))),
        (student, lambda budget: Updater(student, budget).score_policy(scored.rollouts, 1.0)),
        (
            teacher,
            lambda budget: LocalTeacher(teacher, budget).score(
                scored.rollouts, scored.rollouts.trained_N, "token", 1.0
            ),
        ),
    ):
        read = read_by(loaded)
        run(4096)
        assert read == [once]
        read.clear()
        run(1)
        assert sum(read) == each
        assert len(read) == 6
        read.clear()
        run(50)
        assert once <= sum(read) < each, "a group that fits stays together"


@pytest.mark.parametrize("shape", [[(96, (24,) * 40)], [(30, (30,) * 4)] * 8], ids=["long prompts", "short prompts"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_packed_batch_of_a_budget_holds_no_more_than_a_padded_one(
    shape: list[tuple[int, tuple[int, ...]]], joined: bool, monkeypatch: pytest.MonkeyPatch
):
    """Copies of a shared prompt's keys and values are paid for, where every head has keys of its own too."""
    if not joined:
        monkeypatch.setattr(packing, "joins", lambda *given: False)
    new = NewModel(architecture="llama", hidden_size=64, layers=2, heads=4, intermediate_size=192, max_positions=128)
    padded, packed = peaks(new, shape, 1200)
    assert packed <= padded


def peaks(new: NewModel, shape: list[tuple[int, tuple[int, ...]]], budget: int) -> tuple[int, int]:
    """Bytes at once of the first micro-batch of a budget, forward and backward: padded, packed."""
    config = ModelConfig(model=new, tokenizer=NewTokenizer(characters=CHARACTERS))
    loaded, rollouts, found = load_model(config, "cpu", trainable=True, seed=0), Rollouts.of(made(shape)), []
    for padded in (True, False):
        micro = next(micro_batches(loaded, rollouts, range(rollouts.rows), rollouts.trained_N, budget, padded=padded))
        assert bool(micro.segments) != padded
        with Allocations() as counted:
            wanted_states(loaded, micro).sum().backward()
        found.append(counted.peak)
        loaded.model.zero_grad()
    return found[0], found[1]


@pytest.mark.parametrize("low", [{"autocast": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("way", ["all", "recomputed"])
def test_bfloat16_is_as_near_to_float64_as_the_padded_form(low: dict[str, Any], way: str, record_property: Any):
    rollouts = Rollouts.of(made(RAGGED))
    want = passed(exact("qwen3"), rollouts, rollouts.trained_N, packed=False)

    def error(packed: bool) -> tuple[float, float]:
        loaded = model(**low, **WAYS[way])
        hidden, grads = passed(loaded, rollouts, rollouts.trained_N, packed)
        flat, flat_want = (torch.cat([g.flatten() for g in each]) for each in (grads, want[1]))
        whole = float((flat - flat_want).norm() / flat_want.norm())
        return float((hidden - want[0]).norm() / want[0].norm()), whole

    packed, padded = error(True), error(False)
    record_property("error against float64: packed, padded", (packed, padded))
    bounds = (0.03, 0.06) if "autocast" in low else (0.04, 0.08)
    for mine, theirs, bound in zip(packed, padded, bounds, strict=True):
        assert mine < bound
        assert mine < 1.3 * theirs


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    budget=st.integers(1, 60),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_wanted_token_stands_once_after_the_text_that_leads_to_it(
    shape: list[tuple[int, list[int]]], budget: int, packed: bool, seed: int
):
    responses = made(shape, seed)
    rollouts = Rollouts.of(responses)
    wanted_N = torch.rand(rollouts.tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    seen: list[int] = []
    batches = [
        lay_out(rollouts, pack, wanted_N, 0, packed=packed)
        for pack in pack_rows(rollouts, range(rollouts.rows), wanted_N, budget, packed=packed)
    ]
    for micro in batches:
        ids = micro.input_ids_BL.flatten().tolist()
        assert micro.input_ids_BL.numel() <= budget or len(micro.rows) == 1
        for index, place, local in zip(*(x.tolist() for x in (micro.index_M, micro.place_M, micro.row_M)), strict=True):
            row = micro.rows[local]
            response, offset = responses[row], index - rollouts.span(row)[0]
            if packed:
                (segment,) = (s for s in micro.segments if s.start <= place < s.start + s.length)
                before = [] if segment.parent is None else [micro.segments[segment.parent]]
                read = [t for s in before for t in ids[s.start : s.start + s.length]] + ids[segment.start : place + 1]
            else:
                start = place - place % micro.input_ids_BL.shape[1]
                read = ids[start : place + 1]
            assert read == response.prompt_ids + response.token_ids[:offset]
            seen.append(index)
        last = max(len(responses[row].prompt_ids) + len(responses[row].token_ids) for row in micro.rows)
        assert micro.longest < last
    assert sorted(seen) == wanted_N.nonzero().squeeze(1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_packed_is_padded(dtype: str):
    change: dict[str, Any] = {} if dtype == "float32" else {"dtype": dtype}
    config = model(**change).config
    loaded = load_model(config, "cuda", trainable=True, seed=0)
    rollouts = Rollouts.of(made(RAGGED), "cuda")
    assert packs(loaded)
    assert not packs(loaded, 1 << 20), "a mask is bounded"
    batches = [
        next(micro_batches(loaded, rollouts, range(rollouts.rows), rollouts.trained_N, 4096, padded=padded))
        for padded in (True, False)
    ]
    found = []
    for micro in batches:
        hidden_ND = torch.empty(rollouts.tokens, 32, device="cuda")
        states = wanted_states(loaded, micro).float()
        states.square().sum().backward()
        hidden_ND[micro.index_M] = states.detach()
        found.append([hidden_ND, *(p.grad.float().clone() for p in loaded.model.parameters() if p.grad is not None)])
        loaded.model.zero_grad()
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= (1e-3 if dtype == "float32" else 0.05) * want.norm()
