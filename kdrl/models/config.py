"""The recipe's `student` and `teacher` sections. No torch import: a recipe is checked before anything is loaded."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kdrl.config import Config


class LoraConfig(Config):
    """Low-rank adapters (arXiv 2106.09685) through `peft`; the base weights stay frozen."""

    rank: int = Field(16, ge=1)
    """Rank of every adapter."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's output is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter: `all-linear` (all but the LM head) or module names, such as `lm_head`."""


class QuantiseConfig(Config):
    """Fake quantisation of the linear layers (arXiv 2402.10631): rounded forward, straight-through gradient."""

    bits: int = Field(ge=2, le=8)
    """Bits of a weight, 2 to 8."""
    group: int = Field(default=128, ge=1)
    """Consecutive inputs of a row that share a scale; a wider group than the layer is one scale a row."""
    scheme: Literal["asymmetric", "symmetric"] = "asymmetric"
    """`asymmetric` uses all 2^bits levels between the group's ends, `symmetric` 2^bits - 1 levels around zero."""
    skip: tuple[str, ...] = ()
    """Layers left in full precision beside embeddings and LM head: a name or a part of one, as `down_proj`."""


class NewModel(Config):
    """A model made from nothing, with random weights drawn from the run's seed."""

    architecture: str
    """A transformers model type that has a causal LM, such as `qwen3`, `llama` or `gpt2`."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    layers: int = Field(ge=1)
    """Number of transformer blocks."""
    heads: int = Field(ge=1)
    """Number of attention heads."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Number of key-value heads (grouped-query attention); default: as many as heads."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of one head; default: hidden_size / heads."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Inner width of the feed-forward blocks; default: 4 x hidden_size."""
    max_positions: int = Field(1024, ge=1)
    """Longest sequence in tokens, prompt and response together."""
    tie_embeddings: bool = True
    """Whether the LM head shares its weights with the input embedding."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the architecture's own transformers configuration, such as `rope_theta`."""


class NewTokenizer(Config):
    """A tokenizer made from nothing: one token a character, saved as an ordinary `tokenizer.json`."""

    characters: str = Field(min_length=1)
    """Every character that prompts and responses may hold; a repeated one counts once."""
    bos: bool = False
    """Whether every text starts with a `<bos>` token."""


class TeacherModelConfig(Config):
    """Where a model comes from and in which numbers it computes."""

    model: str | NewModel
    """A local folder, a `.gguf` file, a hub id, or a mapping that describes a new model."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the folder or hub repository that `model` names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | NewTokenizer | None = None
    """A folder or hub id, or `{characters: ...}`; default: the one that lies beside the model."""
    eos: list[str] | None = None
    """Tokens that end a response; default: what the tokenizer and the generation config name."""
    chat_template: str = "auto"
    """`auto` (the tokenizer's, when it has one), `none` (plain text), a Jinja file, or the template's own text."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, such as `enable_thinking: false`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    autocast: Literal["bfloat16"] | None = None
    """Compute matrix products in this format while the weights stay in `dtype`."""
    load: Literal["int8", "int4"] | None = None
    """Keep the linear layers of a frozen stored model in 8 bits (LLM.int8) or 4 bits (NF4), CUDA only; its scores are
    then those of the rounded model."""
    attention: str | None = None
    """transformers attention implementation (`sdpa`, `eager`, `flash_attention_2`); default: the model's own choice."""

    @model_validator(mode="after")
    def _consistent(self) -> TeacherModelConfig:
        if isinstance(self.model, NewModel):
            if self.tokenizer is None:
                raise ValueError("a new model needs `tokenizer`: a folder, or {characters: '...'}.")
            for name in ("gguf_file", "revision"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` belongs to a stored model, but `model` describes a new one; remove it.")
        if self.load is not None and (
            isinstance(self.model, NewModel) or self.gguf_file or self.model.endswith(".gguf")
        ):
            raise ValueError(
                "`load` rounds the weights of a stored model as it is read, not a new one nor GGUF; remove it"
            )
        if self.autocast == self.dtype:
            raise ValueError("`autocast: bfloat16` has no effect on bfloat16 weights; remove it or set dtype: float32.")
        return self


class ModelConfig(TeacherModelConfig):
    """The model that is trained."""

    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; `final/` then holds merged weights and `final/adapter`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    quantise: QuantiseConfig | None = None
    """Train under fake quantisation, as in {bits: 3, group: 128}; `final/` then holds the rounded weights."""

    @model_validator(mode="after")
    def _whole_weights(self) -> ModelConfig:
        if self.load is not None:
            raise ValueError("`load` is for a frozen model, and the student is trained; remove it (see `quantise`)")
        if self.lora is not None and self.quantise is not None:
            raise ValueError(
                "`quantise` rounds the weights that are trained, and with `lora` the base is frozen and the merged "
                "result would be off the grid; remove one of them."
            )
        return self
