from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from kdrl.errors import UserError
from kdrl.models import (
    LoraConfig,
    ModelConfig,
    NewModel,
    NewTokenizer,
    TeacherModelConfig,
    encode_prompt,
    head_of,
    hidden_states,
    load_model,
    save_final,
)
from kdrl.models.heads import causal_lm, check_head
from kdrl.models.loading import load_tokenizer
from kdrl.models.sources import check_named, hub_answers

NEW = NewModel(architecture="qwen3", hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48)
CHARS = NewTokenizer(characters="0123456789+-=;# \n")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
SMOLLM = Path(__file__).parents[1] / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fresh(trainable=False, seed=0, **change):
    config = ModelConfig(**{"model": NEW, "tokenizer": CHARS, **change})
    return load_model(config, "cpu", trainable=trainable, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "final"
    save_final(fresh(), path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def ids(vocab_size):
    return torch.randint(vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


def digests(path):
    return {p.relative_to(path): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()}


HEADS = {
    "qwen3": ({}, True),
    "gpt2": ({}, True),
    "gemma2": ({"final_logit_softcapping": 2.0, "head_dim": 8}, True),
    "granite": ({"logits_scaling": 4.0}, True),
    "cohere": ({"logit_scale": 0.25}, True),
    "llama": ({}, False),
    "phi": ({}, False),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_the_head_on_hidden_states_gives_the_models_logits(architecture):
    settings, tied = HEADS[architecture]
    new = NEW.model_copy(
        update={"architecture": architecture, "settings": settings, "kv_heads": None, "tie_embeddings": tied}
    )
    loaded = fresh(model=new)
    with torch.no_grad():
        head = head_of(loaded)
        head.weight_VD.mul_(40)
        if head.bias_V is not None:
            head.bias_V.normal_()
        batch = ids(loaded.vocab_size)
        want = torch.log_softmax(loaded.model(batch, use_cache=False).logits.float(), -1)
        found = head.logp(hidden_states(loaded.model, batch, torch.ones_like(batch)).flatten(0, 1))
    assert (head.bias_V is not None) == (architecture == "phi")
    assert (head.scale != 1.0) == (architecture in ("granite", "cohere"))
    assert (head.softcap is not None) == (architecture == "gemma2")
    torch.testing.assert_close(found.view_as(want), want, atol=1e-4, rtol=1e-4)


def test_an_architecture_with_another_head_is_refused(monkeypatch):
    loaded = fresh()
    lm = loaded.model
    plain = type(lm).forward

    def shifted(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(type(lm), "forward", shifted)
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        check_head(lm, loaded.vocab_size, "toy")


def test_hidden_states_do_not_depend_on_padding_and_never_hold_logits():
    loaded = fresh()
    batch = ids(loaded.vocab_size)
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.ones_like(batch)
    with torch.no_grad():
        want = hidden_states(loaded.model, batch, mask)
        left = hidden_states(loaded.model, torch.cat([pad, batch], 1), torch.cat([pad, mask], 1))[:, 3:]
        right = hidden_states(loaded.model, torch.cat([batch, pad], 1), torch.cat([mask, pad], 1))[:, :9]
    assert want.shape == (2, 9, 32)
    torch.testing.assert_close(left, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right, want, atol=1e-5, rtol=1e-4)


def test_padding_rows_of_the_vocabulary_are_cut_off(tmp_path):
    loaded = fresh()
    loaded.model.resize_token_embeddings(loaded.vocab_size + 13, mean_resizing=False)
    save_final(loaded, tmp_path)
    again = load_model(ModelConfig(model=str(tmp_path)), "cpu", trainable=False, seed=0)
    assert again.vocab_size == loaded.vocab_size
    assert again.model.get_input_embeddings().weight.shape[0] == loaded.vocab_size + 13
    assert head_of(again).vocab_size == loaded.vocab_size
    assert head_of(again).logp(torch.zeros(1, 32)).shape == (1, loaded.vocab_size)


def test_a_saved_model_is_what_plain_transformers_loads(folder, tmp_path):
    loaded = fresh()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = ids(loaded.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, loaded.model(batch).logits, rtol=1e-5, atol=1e-6)
    weights = loaded.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    text = "12+3=15\n# "
    assert tokenizer(text)["input_ids"] == encode_prompt(loaded, text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert model.generation_config.eos_token_id == loaded.eos_ids[0]
    save_final(loaded, tmp_path)
    assert digests(tmp_path) == digests(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_weights_follow_the_seed_and_dtype_holds(dtype):
    a, b, c = fresh(seed=1, dtype=dtype), fresh(seed=1, dtype=dtype), fresh(seed=2, dtype=dtype)
    state = a.model.state_dict()
    assert all(torch.equal(p, b.model.state_dict()[name]) for name, p in state.items())
    assert not all(torch.equal(p, c.model.state_dict()[name]) for name, p in state.items())
    assert {p.dtype for p in state.values()} == {getattr(torch, dtype)}


def test_a_bfloat16_model_keeps_its_rotary_frequencies_and_its_logits(tmp_path):
    loaded = fresh(dtype="bfloat16")
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    save_final(loaded, tmp_path)
    batch = ids(loaded.vocab_size)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(batch).logits, loaded.model(batch).logits)


def test_loading_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fresh(trainable=True, lora=LoraConfig(rank=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_and_trainable_decides_the_gradients():
    loaded = fresh(True, model=NEW.model_copy(update={"architecture": "gpt2", "kv_heads": None}))
    config = loaded.model.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    assert loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    batch = ids(loaded.vocab_size)
    with torch.no_grad():
        assert torch.equal(loaded.model(batch).logits, loaded.model(batch).logits)
    frozen = fresh(False)
    assert not frozen.model.training
    assert not any(p.requires_grad for p in frozen.model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, True):
        loaded = fresh(True, gradient_checkpointing=flag)
        batch = ids(loaded.vocab_size)
        hidden_states(loaded.model, batch, torch.ones_like(batch)).square().sum().backward()
        assert any(getattr(m, "gradient_checkpointing", False) for m in causal_lm(loaded.model).modules()) == flag
        grads.append({n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_lora_trains_the_adapter_alone_and_saves_adapter_and_merged_weights(tmp_path):
    loaded = fresh(True, lora=LoraConfig(rank=4, alpha=8))
    twin = fresh(True, lora=LoraConfig(rank=4, alpha=8))
    trained = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for name, p in twin.model.named_parameters():
        assert torch.equal(p, dict(loaded.model.named_parameters())[name])
    with torch.no_grad():
        for p in trained.values():
            p.normal_(std=0.3)
    batch = ids(loaded.vocab_size)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    save_final(loaded, tmp_path / "a")
    save_final(loaded, tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert all(torch.equal(p, before[n]) for n, p in loaded.model.named_parameters())
    from peft import PeftModel

    with torch.no_grad():
        want = loaded.model(batch).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "a")(batch).logits
        base = fresh().model
        assert not torch.allclose(base(batch).logits, want, atol=1e-3)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "a" / "adapter"))(batch).logits
    torch.testing.assert_close(merged, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(adapted, want, atol=1e-5, rtol=1e-4)


def test_lora_on_nothing_is_refused():
    with pytest.raises(UserError, match="target_modules"):
        fresh(True, lora=LoraConfig(target_modules=["no_such_layer"]))


def test_prompts_follow_the_chat_template_option(tmp_path):
    chat = NewTokenizer(characters="0123456789+=[]>abcdefghijklmnopqrstuvwxyz", bos=True)
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+2"}]

    def text(option, prompt, **kwargs):
        loaded = fresh(tokenizer=chat, chat_template=option, **kwargs)
        return loaded.tokenizer.decode(encode_prompt(loaded, prompt))

    assert text("auto", "1+2=") == text("none", "1+2=") == "<bos>1+2="
    for option in (TEMPLATE, str(file)):
        assert text(option, "1+2") == "[user]1+2>"
        assert text(option, messages) == "[system]add[user]1+2>"
    assert text(TEMPLATE + "{{ extra }}", "1", chat_template_kwargs={"extra": "zz"}) == "[user]1>zz"
    with pytest.raises(UserError, match="no chat template"):
        text("auto", messages)
    with pytest.raises(UserError, match="does not exist"):
        text(str(tmp_path / "none.jinja"), "1")
    with pytest.raises(UserError, match="refuses the prompt"):
        text("{{ raise_exception('only one message') }}", messages)


def test_unknown_characters_and_empty_prompts_are_sentences():
    loaded = fresh()
    with pytest.raises(UserError, match="'x'"):
        encode_prompt(loaded, "1+x")
    with pytest.raises(UserError, match="no tokens"):
        encode_prompt(loaded, "")


def test_an_eos_that_the_tokenizer_adds_is_taken_off_the_prompt():
    from tokenizers.processors import TemplateProcessing

    loaded = fresh()
    plain = encode_prompt(loaded, "1+2=")
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair=None, special_tokens=[("<eos>", loaded.eos_ids[0])]
    )
    assert loaded.tokenizer("1+2=")["input_ids"][-1] == loaded.eos_ids[0]
    assert encode_prompt(loaded, "1+2=") == plain


def test_eos_can_be_named():
    assert fresh(eos=["#"]).eos_ids == (fresh().tokenizer.get_vocab()["#"],)
    with pytest.raises(UserError, match="'</s>'"):
        fresh(eos=["</s>"])


def load(path, **options):
    return load_model(ModelConfig(model=str(path), **options), "cpu", trainable=False, seed=0)


def test_missing_and_wrong_folders_are_sentences(tmp_path, folder, broken, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such GGUF"):
        load(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"gguf_file: a\.gguf"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"cannot be loaded|no tokenizer"):
        load(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="is a file"):
        load(folder / "config.json")
    with pytest.raises(UserError, match="revision"):
        load(folder, revision="main")
    (broken / "config.json").unlink()
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter"):
        load(broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="somebody/no-such-model"):
        load("somebody/no-such-model")


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that never answers; what is asked of it all the same is written down."""
    asked = []

    def session():
        asked.append("hub")
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.utils.get_session", session)
    hub_answers.cache_clear()
    yield asked
    hub_answers.cache_clear()


def test_a_mistyped_path_never_goes_to_the_hub(tmp_path, monkeypatch, silent_hub):
    (tmp_path / "models" / "tiny-student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for named in ("/abs/typo", "./typo", "../typo", "~/no/such/typo", "a/b/c", "models/typo"):
        with pytest.raises(UserError, match=f"student.model '{named}': there is no such folder"):
            check_named(named, "student.model")
        with pytest.raises(UserError, match="there is no such folder"):
            load(named)
        with pytest.raises(UserError, match="there is no such folder"):
            load_tokenizer(ModelConfig(model="models/tiny-student", tokenizer=named))
    with pytest.raises(UserError, match=r"did you mean 'models/tiny-student'\? If it is a hub id"):
        check_named("models/tiny-studnet")
    for named in ("models/tiny-student", "./models/tiny-student", "Qwen/Qwen3-8B", "gpt2"):
        check_named(named)
    assert silent_hub == []


def test_a_hub_that_does_not_answer_is_asked_once_and_said(silent_hub):
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"'somebody/typo': there is no local folder of that name.*cannot be reached"
        ):
            load("somebody/typo")
        with pytest.raises(UserError, match=r"tokenizer 'somebody/typo': there is no local folder of that name"):
            load_tokenizer(ModelConfig(model="somebody/other", tokenizer="somebody/typo"))
    assert silent_hub == ["hub"]


def test_corrupt_and_incomplete_weights_are_sentences(broken):
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        load(broken)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load(broken)
    from safetensors.torch import load as read
    from safetensors.torch import save_file

    state = read(whole)
    state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights .*up_proj"):
        load(broken)


def test_models_that_cannot_be_used_are_sentences(tmp_path, folder, broken):
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(small).save_pretrained(tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    with pytest.raises(UserError, match="not a causal language model"):
        load(tmp_path / "t5", tokenizer=str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load(broken)
    with pytest.raises(UserError, match="vocabulary rows"):
        load(broken, tokenizer=NewTokenizer(characters="abcdefghijklmnopqrstuvwxyz"))


def test_a_model_without_an_end_token_is_refused(broken):
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        content = json.loads((broken / name).read_text())
        (broken / name).write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("eos")}))
    with pytest.raises(UserError, match="end token"):
        load(broken)
    assert load(broken, eos=["<eos>"]).eos_ids == (1,)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"model": NEW}, "needs `tokenizer`"),
        ({"model": NEW, "tokenizer": CHARS, "gguf_file": "x"}, "gguf_file"),
        ({"model": "x", "dtype": "bfloat16", "autocast": "bfloat16"}, "autocast"),
        ({"model": "x", "lora": {"rank": 0}}, "rank"),
        ({"model": "x", "quantise": True}, "quantise"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(section, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**section)


def test_a_teacher_has_nothing_to_train():
    with pytest.raises(ValidationError, match="lora"):
        TeacherModelConfig(model="x", lora={"rank": 4})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": "qwen33"}, "did you mean 'qwen3'"),
        ({"settings": {"rms_norm_epz": 1e-6}}, "did you mean 'rms_norm_eps'"),
        ({"heads": 5}, "multiple"),
        ({"architecture": "gpt2"}, "num_key_value_heads"),
    ],
)
def test_a_new_model_with_wrong_keys_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        fresh(model=NEW.model_copy(update=change))


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.exists(), reason="the SmolLM2 GGUF is not there; `make smollm` fetches it")
def test_a_real_gguf_loads_answers_and_is_saved_dequantised(tmp_path):
    from kdrl.engines import TorchEngine

    loaded = load(SMOLLM, dtype="bfloat16")
    prompt = encode_prompt(loaded, "What is the capital of France?")
    answer = TorchEngine(loaded, 4).generate([prompt], samples=1, max_new_tokens=24, temperature=0.0, seed=0)[0][0]
    assert "Paris" in loaded.tokenizer.decode(answer.token_ids)
    save_final(loaded, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    batch = torch.tensor([prompt])
    with torch.no_grad():
        assert torch.equal(model(batch).logits, loaded.model(batch).logits)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == prompt
