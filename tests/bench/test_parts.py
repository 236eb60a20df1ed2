"""What `kdrl bench --parts` measures is the recipe's own head."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import section

from kdrl.bench import parts
from kdrl.models import ModelConfig, load_model
from kdrl.objectives.head import Head, TokenScores, score_tokens


@pytest.mark.parametrize("lora", [None, {"rank": 3, "target_modules": ["lm_head", "q_proj"]}])
def test_the_head_is_measured_with_its_adapters_and_what_is_frozen_frozen(
    lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
):
    raw: dict[str, Any] = section() | ({} if lora is None else {"lora": lora})
    loaded = load_model(ModelConfig.model_validate(raw), "cpu", trainable=True, seed=0)
    seen: list[Head] = []

    def spied(head: Head, *given: Any) -> TokenScores:
        seen.append(head)
        return score_tokens(head, *given)

    monkeypatch.setattr(parts, "score_tokens", spied)
    assert parts.head(loaded, 40)["tokens"] == 40
    head = seen[0]
    assert len(head.adapters) == (lora is not None)
    assert head.weight_VD.requires_grad == (lora is None)
    assert all((x.grad is not None) == x.requires_grad for x in head.tensors)
    assert all(x.grad is None for x in loaded.model.parameters()), "the student is not touched"
