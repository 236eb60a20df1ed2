"""Loading a causal LM and its tokenizer: local folder, GGUF file, hub id, or a new model; every mishap a sentence."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from kdrl.errors import UserError
from kdrl.models.attention import recompute_layers
from kdrl.models.compressed import check_compressed, compression
from kdrl.models.config import ModelConfig, NewModel, NewTokenizer, TeacherModelConfig
from kdrl.models.heads import causal_lm, check_head
from kdrl.models.prompts import apply_template_option
from kdrl.models.quantise import kept_weights, quantise
from kdrl.models.quick import quicken
from kdrl.models.scratch import character_tokenizer, new_model_config
from kdrl.models.sources import Origin, check_named, explain, find_origin, gguf_options, hub_options
from kdrl.seeds import derive


@dataclass
class LoadedModel:
    """A model with everything that writing, scoring and saving need; `vocab_size` leaves out padding rows."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: TeacherModelConfig
    eos_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context in which this model computes: bfloat16 autocast when the recipe asks for it.

        Without gradient, fake-quantised weights are rounded once for all that happens inside.
        """
        casting = contextlib.nullcontext()
        if self.config.autocast is not None:
            casting = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with casting, kept_weights(self.model):
            yield


def load_model(config: TeacherModelConfig, device: str | torch.device, *, trainable: bool, seed: int) -> LoadedModel:
    """Load (or make, from `seed`) the model a recipe section names, with dropout off, on `device`.

    A trainable model is in train mode with gradients on (only the adapters' with `lora`); otherwise eval and frozen.
    Raises UserError when the model, its weights, its tokenizer or its end token are missing, broken or do not fit.
    """
    check_compressed(config, device)
    origin = None if isinstance(config.model, NewModel) else find_origin(config)
    with quiet():
        tokenizer = _load_tokenizer(config, origin)
        if origin is None:
            model = _make_new(config, tokenizer, seed)
        else:
            model = _load_weights(config, origin, device)
    where = "the new model" if origin is None else origin.label
    vocab_size = _vocab_size(tokenizer, model, where)
    eos_ids = _eos_ids(config, tokenizer, getattr(model, "generation_config", None), where)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos_ids[0]
    if config.load is None:  # compressed weights were put there when they were read
        model.to(device)  # type: ignore[arg-type]
    check_head(model, vocab_size, where)
    ready = _prepare(model, config, trainable, seed)
    quicken(ready)
    return LoadedModel(ready, tokenizer, config, eos_ids, pad_id, vocab_size)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or advice of the library while inside: the run has a display of its own."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    # The reader of GGUF files has a bar of its own, which heeds no setting.
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    hub = logging.getLogger("huggingface_hub")  # tells every retry of a hub that cannot be reached
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    log.set_verbosity_error()
    log.disable_progress_bar()
    if bar is not None:
        modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        log.set_verbosity(level)
        if bar is not None:
            modeling_gguf_pytorch_utils.tqdm = bar  # type: ignore[attr-defined]
        if bars:
            log.enable_progress_bar()


def _load_tokenizer(config: TeacherModelConfig, origin: Origin | None) -> PreTrainedTokenizerBase:
    if isinstance(config.tokenizer, NewTokenizer):
        tokenizer = character_tokenizer(config.tokenizer)
    else:
        named = config.tokenizer
        if named is None:
            assert origin is not None
            name, options = origin.name, origin.options
        elif (path := Path(named).expanduser()).exists():
            name, options = str(path), {}
        else:
            check_named(named, "tokenizer")
            name, options = named, hub_options()
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except Exception as error:  # OSError, ValueError, KeyError, and the Rust reader's bare Exception
            raise UserError(explain(error, str(name), "tokenizer")) from error
        # transformers makes an empty one when the folder holds none.
        if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
            raise UserError(f"{name!r} has no tokenizer; set `tokenizer` to a folder or hub id that has one.")
    tokenizer.padding_side = "left"
    apply_template_option(tokenizer, config.chat_template)
    return tokenizer


def load_tokenizer(config: TeacherModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe section without its model; raises UserError."""
    with quiet():
        named = isinstance(config.model, NewModel) or config.tokenizer is not None
        return _load_tokenizer(config, None if named else find_origin(config))


def load_without_weights(config: TeacherModelConfig) -> LoadedModel:
    """What a section says of texts: tokenizer, end tokens, chat template; its `model` is None. Raises UserError.

    For a teacher whose weights are elsewhere. Its vocabulary is the tokenizer's.
    """
    if isinstance(config.model, NewModel):
        raise UserError("a new model has random weights; a teacher that is elsewhere needs the name of a stored one.")
    origin = find_origin(config)
    tokenizer = load_tokenizer(config)
    generation = None
    with quiet(), contextlib.suppress(OSError, ValueError):
        generation = GenerationConfig.from_pretrained(origin.name, **origin.options)
    eos_ids = _eos_ids(config, tokenizer, generation, origin.label)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos_ids[0]
    return LoadedModel(None, tokenizer, config, eos_ids, pad_id, _ids_of(tokenizer))


def _make_new(config: TeacherModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    assert isinstance(config.model, NewModel)
    hf_config = _without_dropout(new_model_config(config.model, _ids_of(tokenizer), tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "new model"))
        # Not `.to(dtype)`: that would round the rotary frequencies, which stay float32 in a loaded model.
        model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, config.dtype), **_attention(config))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _load_weights(config: TeacherModelConfig, origin: Origin, device: str | torch.device) -> PreTrainedModel:
    try:
        hf_config = _without_dropout(AutoConfig.from_pretrained(origin.name, **origin.options))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            origin.name,
            config=hf_config,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            **origin.options,
            **gguf_options(origin),
            **_attention(config),
            **compression(config, device),
        )
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError
        raise UserError(explain(error, origin.label, "model")) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{origin.label}: {len(missing)} weights of {type(model).__name__} are not in the files "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); they would be random. Give all files."
        )
    return _plain_weights(model) if origin.gguf else model


def _plain_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in an ordinary model: one loaded from GGUF cannot be saved or trained further as it is."""
    config = model.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.random.fork_rng(devices=[]):
        kept = {"dtype": model.dtype, "attn_implementation": config._attn_implementation}
        fresh: Any = AutoModelForCausalLM.from_config(config, **kept)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def _attention(config: TeacherModelConfig) -> dict[str, str]:
    return {} if config.attention is None else {"attn_implementation": config.attention}


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    # Training forwards must be the policy that wrote the samples, so every drop rate of the config becomes 0.
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            rate = isinstance(value, (int, float)) and not isinstance(value, bool)
            if rate and ("dropout" in name or name.endswith(("pdrop", "_drop")) or "layerdrop" in name):
                setattr(part, name, 0.0)
    return config


def _ids_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _vocab_size(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, where: str) -> int:
    ids, rows = _ids_of(tokenizer), model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if ids > rows:  # type: ignore[operator]
        raise UserError(
            f"{where}: the tokenizer has {ids} tokens but the model only {rows} vocabulary rows; "
            "they do not belong together. Give the model's own `tokenizer`."
        )
    return ids


def _eos_ids(
    config: TeacherModelConfig, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, where: str
) -> tuple[int, ...]:
    if config.eos is not None:
        known = tokenizer.get_vocab()
        unknown = [token for token in config.eos if token not in known]
        if unknown or not config.eos:
            raise UserError(f"eos: {', '.join(map(repr, unknown)) or 'an empty list'} is no token of {where}.")
        return tuple(dict.fromkeys(known[token] for token in config.eos))
    named = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    flat = [i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None]
    if not flat:
        raise UserError(f"{where}: neither tokenizer nor generation config names an end token; set `eos: ['...']`.")
    return tuple(dict.fromkeys(flat))


def _prepare(model: PreTrainedModel, config: TeacherModelConfig, trainable: bool, seed: int) -> Any:
    model.requires_grad_(trainable)
    ready: Any = model
    if isinstance(config, ModelConfig) and trainable:
        if config.lora is not None:
            ready = _with_lora(model, config, seed)
        if config.quantise is not None:
            quantise(model, config.quantise)
        if config.gradient_checkpointing:
            recompute_layers(causal_lm(ready))
    return ready.train(trainable)


@contextlib.contextmanager
def tied_head() -> Iterator[None]:
    """No advice of peft's on a tied head that has adapters, while they are put on."""
    with warnings.catch_warnings():
        # It warns that merging would change the embedding too; saving unties the head first (`save_final`).
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        yield


def _with_lora(model: PreTrainedModel, config: ModelConfig, seed: int) -> Any:
    import peft

    assert config.lora is not None
    targets = config.lora.target_modules
    options = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), tied_head():
        torch.manual_seed(derive(seed, "lora"))
        try:
            wrapped = peft.get_peft_model(model, options)
        except ValueError as error:
            raise UserError(f"lora.target_modules {targets!r} does not fit {type(model).__name__}: {error}") from error
    return wrapped
