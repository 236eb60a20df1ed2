"""A new model and a new character tokenizer, from a few lines of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdrl.errors import UserError, nearest
from kdrl.models.config import NewModel, NewTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def character_tokenizer(config: NewTokenizer) -> PreTrainedTokenizerBase:
    """One token a character behind `<pad>`, `<eos>` and, when asked for, `<bos>`; unknown characters are refused."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PAD, EOS, *([BOS] if config.bos else [])]
    tokens = [*special, *dict.fromkeys(config.characters)]
    # Without an <unk> token the encoder raises on a character it does not know, instead of dropping it.
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if config.bos:
        post = processors.TemplateProcessing(single=f"{BOS} $A", pair=None, special_tokens=[(BOS, tokens.index(BOS))])
        tokenizer.post_processor = post  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS if config.bos else None,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def new_model_config(spec: NewModel, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The transformers configuration that a NewModel describes; raises UserError for keys the architecture lacks."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if spec.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(spec.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = hint if hint.startswith("; did") else "; try qwen3, llama or gpt2"
        raise UserError(f"model.architecture: transformers has no causal LM called {spec.architecture!r}{hint}")
    if spec.hidden_size % spec.heads and spec.head_dim is None:
        raise UserError(
            f"model.hidden_size {spec.hidden_size} is not a multiple of model.heads {spec.heads}; set head_dim."
        )
    kind: Any = CONFIG_MAPPING[spec.architecture]
    known = {*kind().to_dict(), *kind.attribute_map}
    for name in spec.settings:
        if name not in known:
            raise UserError(f"model.settings: {spec.architecture} has no key {name!r}{nearest(name, known)}")
    asked = {
        "vocab_size": vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tie_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **_optional(spec, known),
        **spec.settings,
    }
    return kind(**{kind.attribute_map.get(name, name): value for name, value in asked.items()})


def _optional(spec: NewModel, known: set[str]) -> dict[str, int]:
    inner = "intermediate_size" if "intermediate_size" in known else "n_inner"
    asked = {
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        inner: spec.intermediate_size,
    }
    for name, value in asked.items():
        if value is not None and name not in known:
            raise UserError(f"model: {spec.architecture} has no {name!r}; remove that key.")
    fallback = {
        "num_key_value_heads": spec.heads,
        "head_dim": spec.hidden_size // spec.heads,
        inner: 4 * spec.hidden_size,
    }
    return {name: value or fallback[name] for name, value in asked.items() if name in known}
