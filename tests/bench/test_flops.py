"""Operations of an update against those that torch counts."""

from __future__ import annotations

import pytest
import torch
from tiny import MODEL
from torch.utils.flop_counter import FlopCounterMode

from kdrl.batch import Response, Rollouts
from kdrl.bench.flops import Cost
from kdrl.models import ModelConfig, NewModel, NewTokenizer, load_model
from kdrl.tasks import Problem


def responses(prompts: list[list[int]], texts: list[list[int]]) -> Rollouts:
    return Rollouts.of(
        [
            Response(Problem(id=str(n), prompt="", answer=""), n, prompt, text, "student", True, "")
            for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
    )


@pytest.mark.parametrize("tied", [True, False])
def test_one_response_costs_what_torch_counts(tied: bool):
    model = NewModel(**MODEL | {"tie_embeddings": tied})
    loaded = load_model(
        ModelConfig(model=model, tokenizer=NewTokenizer(characters="0123456789")), "cpu", trainable=True, seed=0
    )
    cost = Cost.of(loaded)
    assert cost is not None
    prompt, text = [1, 2, 3, 4, 5], [6, 7, 8]
    rollouts = responses([prompt], [text])
    ids = torch.tensor([prompt + text[:-1]])
    loaded.model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = loaded.model.model(ids).last_hidden_state
        loaded.model.lm_head(hidden[:, len(prompt) - 1 :])
    n = ids.shape[1]
    # Eager attention also multiplies what the causal mask then hides.
    hidden_half = cost.attention * (n * n - n * (n + 1) / 2)
    counted = 3 * (counter.get_total_flops() - hidden_half)
    assert counted == pytest.approx(cost.of_update(rollouts, rollouts.trained_N))


def test_prompts_are_read_once_and_dropped_tokens_not_at_all():
    cost = Cost(body=1.0, attention=0.0, head=100.0, passes=1.0)
    rollouts = responses([[1, 2, 3], [1, 2, 3], [4]], [[5, 6], [7, 8, 9], [5]])
    everything = rollouts.trained_N
    assert cost.of_update(rollouts, everything) == (3 + 1) + (1 + 2 + 0) + 100 * 6
    second_to_first_token = torch.tensor([False, False, True, False, False, False])
    assert cost.of_update(rollouts, second_to_first_token) == 3 + 0 + 100
    assert cost.of_update(rollouts, everything & False) == 0
