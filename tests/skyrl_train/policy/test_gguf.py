"""A GGUF file is read back by transformers: the same logits, the same tokens. What llama.cpp cannot know is refused."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from skyrl_train.policy.gguf_file import refuse_unless_gguf, write_gguf
from skyrl_train.policy.refusal import ModelRefused
from tests.tiny_models import tiny_bpe_tokenizer, tiny_module, tiny_tokenizer

QWEN2 = GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
TEXTS = ["It's 12345 o'clock,  don't\n\n\twe'll see ☃ é", "<|im_start|>user\nhi<|im_end|>", "a <think>b</think>"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def module_of(family: str, **changes: Any) -> Any:
    """Return a random model with rows for more tokens than the tokenizer has. Its norms are random, too."""
    settings: dict[str, Any] = {"vocab_size": 416, "bos_token_id": 397, "eos_token_id": 398} | changes
    module = tiny_module(family, **settings)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.linspace(-0.3, 0.3, len(weight)).roll(len(name)))
    return module


def written(folder: Path, module: Any, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Path:
    refuse_unless_gguf(module.config, tokenizer)
    write_gguf(folder / "model.gguf", module, tokenizer, dtype=dtype, name="tiny", about="a test")
    return folder / "model.gguf"


def read_back(file: Path, **known: Any) -> tuple[Any, Any]:
    """Return model and tokenizer as transformers reads them. known: what it does not look for in the file."""
    source: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=quantized, dtype=torch.float32, **known)
    return model, AutoTokenizer.from_pretrained(**source)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(3, 300, 7)[None]).logits


@pytest.mark.parametrize(
    ("family", "changes", "expression"),
    [
        ("llama", {"tie_word_embeddings": True}, None),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}, GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]),
        ("qwen2", {"rms_norm_eps": 1e-3}, QWEN2),
        ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}, QWEN2),  # 128: transformers does not read it
    ],
)
def test_transformers_reads_the_same_model_and_the_same_tokens(family, changes, expression, tmp_path):
    module, tokenizer = module_of(family, **changes), tiny_bpe_tokenizer(expression)
    known = {name: True for name in ("attention_bias", "mlp_bias") if name in changes}
    model, read = read_back(written(tmp_path, module, tokenizer, "float32"), **known)
    torch.testing.assert_close(logits(model), logits(module), rtol=1e-5, atol=1e-5)
    assert model.config.max_position_embeddings == 512
    for text in TEXTS:
        assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert read.chat_template == tokenizer.chat_template
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.0), ("float16", 0.0), ("q8_0", 0.02)])
def test_matrices_have_the_type_that_was_asked_for_and_vectors_float32(dtype, most, tmp_path):
    rounded = getattr(torch, dtype, torch.float32)
    module = module_of("llama", hidden_size=64, intermediate_size=80).to(rounded)
    file = written(tmp_path, module, tiny_bpe_tokenizer(), dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    name = {"bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.ffn_up.weight"] == name
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == ("F32" if dtype == "q8_0" else name)  # rows of 80 are no whole blocks
    read, _ = read_back(file)
    expected = dict(module.float().named_parameters())
    for name, weight in read.named_parameters():
        assert (weight - expected[name]).abs().max() <= most, name


def test_a_stretched_context_divides_each_frequency_as_transformers_does(tmp_path):
    module = module_of("llama", head_dim=16, rope_parameters=LLAMA3_ROPE)
    reader = gguf.GGUFReader(written(tmp_path, module, tiny_bpe_tokenizer(), "float32"))
    [factors] = [torch.from_numpy(t.data.copy()) for t in reader.tensors if t.name == "rope_freqs.weight"]
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, module.model.rotary_emb.inv_freq)
    assert len(factors.unique()) > 2  # some frequencies stay, some are divided by 8, one is between


@pytest.mark.parametrize(
    ("family", "changes", "expression"),
    [
        ("llama", {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, None),
        ("llama", {"attention_bias": True, "mlp_bias": True}, None),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"head_dim": 16}, QWEN2),
        ("qwen3", {"head_dim": 32}, QWEN2),
    ],
)
def test_llama_cpp_computes_the_same(family, changes, expression, tmp_path):
    llama_cpp: Any = pytest.importorskip("xllamacpp")
    module, tokenizer = module_of(family, **({"hidden_size": 64} | changes)), tiny_bpe_tokenizer(expression)
    how = llama_cpp.CommonParams()
    how.model.path = str(written(tmp_path, module, tokenizer, "float32"))
    how.n_ctx, how.n_parallel, how.cpuparams.n_threads, how.warmup = 512, 1, 1, False
    server = llama_cpp.Server(how)
    body = json.dumps({"content": "".join(TEXTS), "add_special": False, "parse_special": True}).encode()
    address = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(address, timeout=120) as answer:
        assert json.load(answer)["tokens"] == tokenizer.encode("".join(TEXTS), add_special_tokens=False)
    ids, expected = a_prompt_that_is_answered_by_a_letter(module, tokenizer)
    done = server.handle_completions({"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5})
    first = done["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert first[0]["id"] == expected.argmax()
    for token in first:
        assert token["logprob"] == pytest.approx(expected[token["id"]].item(), abs=0.02)


def a_prompt_that_is_answered_by_a_letter(module: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Any]:
    """Return 200 tokens and the logprobs of the next one. llama.cpp's server shows no half letter, and no end."""
    for step in range(7, 397, 2):
        ids = [place * step % 390 for place in range(200)]
        with torch.no_grad():
            logprobs = module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        if str(tokenizer.decode([int(logprobs[:397].argmax())])).isascii() and logprobs.argmax() < 397:
            return ids, logprobs
    raise AssertionError


def test_a_second_token_that_ends_a_turn_is_named(tmp_path):
    module = module_of("llama")
    module.generation_config.eos_token_id = [398, 397]
    fields = gguf.GGUFReader(written(tmp_path, module, tiny_bpe_tokenizer(), "float32")).fields
    ended = [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")]
    assert ended == [398, 397]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[395:402] == [1, 1, 3, 3, 4, 5, 5]  # normal, control, user defined, unused


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gemma2", {}, "GGUF is written for llama, mistral, qwen2, qwen3; this model is of the type gemma2"),
        ("llama", {"hidden_act": "gelu"}, "a llama with hidden_act=gelu"),
        ("mistral", {"sliding_window": 64}, "a mistral with sliding windows"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "with sliding windows"),
        ("qwen2", {"hidden_size": 64}, "heads that are narrower or wider than hidden_size"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "a qwen2 with rope_type=llama3"),
        ("llama", {"vocab_size": 399}, "the token '<think>' has number 399, and the model's embedding 399 rows"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(family, changes, says):
    settings: dict[str, Any] = {"vocab_size": 416} | changes
    config = tiny_module(family, **settings).config
    with pytest.raises(ModelRefused, match=says):
        refuse_unless_gguf(config, tiny_bpe_tokenizer())


def test_a_weight_without_a_place_is_refused(tmp_path):
    with pytest.raises(ModelRefused, match=r"no place for model.layers.0.self_attn.q_proj.bias in a qwen3"):
        written(tmp_path, module_of("qwen3", attention_bias=True), tiny_bpe_tokenizer(), "float32")


def test_a_number_that_the_type_cannot_hold_is_refused(tmp_path):
    module = module_of("llama")
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ModelRefused, match=r"blk.0.ffn_up.weight has numbers that float16 cannot hold"):
        written(tmp_path, module.half(), tiny_bpe_tokenizer(), "float16")


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused():
    config = tiny_module("llama", vocab_size=416).config
    with pytest.raises(ModelRefused, match="byte-level BPE tokenizers with merges"):
        refuse_unless_gguf(config, tiny_tokenizer())
    own = tiny_bpe_tokenizer(r"\d+|\D+")
    with pytest.raises(ModelRefused, match=r"llama.cpp has no name for this one: \\d\+\|\\D\+, ByteLevel"):
        refuse_unless_gguf(config, own)
    by_chance = tiny_bpe_tokenizer()
    by_chance.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ModelRefused, match="GGUF has no key for this tokenizer's dropout"):
        refuse_unless_gguf(config, by_chance)
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    own.backend_tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(ModelRefused, match="byte-level BPE"):
        refuse_unless_gguf(config, own)
