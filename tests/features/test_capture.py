"""What a tap keeps is what transformers itself gives, in the same pass that the other terms use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import toy

from kdrl.errors import UserError
from kdrl.models import hidden_states
from kdrl.models.features import Tap, Wanted

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {},
    "gpt2": {"kv_heads": None},
    "gemma2": {"head_dim": 8},
    "mistral": {"settings": {"sliding_window": 3}},
}


def padded(loaded: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL = torch.randint(2, 30, (3, 9), generator=torch.Generator().manual_seed(3))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 8:], mask_BL[2, 7:] = 0, 0  # a query of the padding must see something, even through a window
    return ids_BL, mask_BL


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_is_what_transformers_gives(name: str, attention: str):
    if (name, attention) == ("gemma2", "sdpa"):
        return  # capped scores, which transformers computes only in eager attention
    loaded = toy(1, trainable=True, sharp=6.0, architecture=name, layers=2, **ARCHITECTURES[name])
    config = loaded.model.config
    config._attn_implementation = attention
    ids_BL, mask_BL = padded(loaded)
    tap = Tap(loaded, attention=True)
    everything = Wanted(frozenset({0, 1}), frozenset({1, 2}), frozenset({1, 2}))
    before_BLD = hidden_states(loaded, ids_BL, mask_BL)
    with tap.watch(everything) as kept:
        last_BLD = hidden_states(loaded, ids_BL, mask_BL)
    assert torch.equal(before_BLD, last_BLD), "watching changes nothing"
    assert config._attn_implementation == attention
    config._attn_implementation = "eager"
    places_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
    theirs = loaded.model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=places_BL,
        use_cache=False,
        output_hidden_states=True,
        output_attentions=True,
    )
    for row in range(3):
        place_T = mask_BL[row].nonzero().squeeze(1)
        for layer, mine in ((0, kept.hidden[0]), (1, kept.hidden[1]), (2, last_BLD)):
            assert torch.allclose(mine[row, place_T], theirs.hidden_states[layer][row, place_T], atol=1e-6)
        for layer in (1, 2):
            scores_HTL, seen_TL = kept.attention[layer].scores(row, place_T)
            assert not bool(seen_TL[:, place_T[-1] + 1 :].any()), "no key beyond the query, so no padding"
            map_HTL = scores_HTL.masked_fill(~seen_TL, -torch.inf).softmax(-1)
            assert torch.allclose(map_HTL, theirs.attentions[layer - 1][row][:, place_T], atol=1e-6)
            assert map_HTL.requires_grad


def test_attention_output_is_what_the_layer_adds():
    loaded = toy(1, sharp=6.0, layers=2, architecture="gpt2", kv_heads=None)
    ids_BL, mask_BL = padded(loaded)
    tap = Tap(loaded, attention=True)
    with torch.no_grad(), tap.watch(Wanted(hidden=frozenset({0, 1}), output=frozenset({1}))) as kept:
        hidden_states(loaded, ids_BL, mask_BL)
    block = loaded.model.transformer.h[0]
    middle = kept.hidden[0] + kept.output[1]
    assert torch.allclose(middle + block.mlp(block.ln_2(middle)), kept.hidden[1], atol=1e-9)


def test_queries_keys_and_values_give_the_scores():
    loaded = toy(1, sharp=6.0, layers=1, heads=4, kv_heads=2, head_dim=4)
    ids_BL, mask_BL = padded(loaded)
    with torch.no_grad(), Tap(loaded, attention=True).watch(Wanted(attention=frozenset({1}))) as kept:
        hidden_states(loaded, ids_BL, mask_BL)
    attended = kept.attention[1]
    query, key = attended.vectors("queries")[0], attended.vectors("keys")[0]
    assert query.shape == (9, 16)
    assert key.shape == attended.vectors("values")[0].shape == (9, 8)
    scores_HTL, _ = attended.scores(0, torch.arange(9))
    assert torch.allclose(scores_HTL[3], query[:, 12:] @ key[:, 4:].T / 2.0), (
        "the fourth head reads the second key head"
    )


def test_an_architecture_whose_attention_is_hidden_is_refused():
    loaded = toy(1, layers=2, architecture="bloom", kv_heads=None, intermediate_size=None)
    with pytest.raises(UserError, match=r"attention of BloomForCausalLM cannot be watched.*use `of: hidden`"):
        Tap(loaded, attention=True)
    assert Tap(loaded, attention=False).layers == 2
