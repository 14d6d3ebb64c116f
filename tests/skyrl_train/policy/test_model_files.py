"""A model whose files are not whole, or not its own, is refused in one line before the first step, with status 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.policy.model import load_policy
from skyrl_train.policy.model_files import fit_tokenizer, load_config, load_module, load_tokenizer
from skyrl_train.policy.refusal import ModelRefused
from tests.fakes import EvenEnv
from tests.families import tiny_family
from tests.tiny_models import save_tiny_model, tiny_tokenizer

WEIGHTS, MISSING = "model.safetensors", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "task"}]}) + "\n")
    save_tiny_model(folder / "model")
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole / "model", tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_json(folder: Path, name: str, **changes: object) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def cut(folder: Path, name: str, size: int = 400) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def in_shards(folder: Path) -> None:
    """Its weights in two files and an index."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, mine in shards.items():
        save_file({name: weights[name] for name in mine}, folder / shard, metadata={"format": "pt"})
    where = {name: shard for shard, mine in shards.items() for name in mine}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / WEIGHTS).unlink()


def with_a_lost_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "b.safetensors").unlink()


def with_a_cut_shard(folder: Path) -> None:
    in_shards(folder)
    cut(folder, "b.safetensors", 3000)


def with_a_shard_that_the_index_forgot(folder: Path) -> None:
    in_shards(folder)
    index = folder / f"{WEIGHTS}.index.json"
    where = json.loads(index.read_text())["weight_map"]
    kept = {name: shard for name, shard in where.items() if shard == "a.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def with_a_larger_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_start|>", "<|begin|>")
    tokenizer.add_tokens([AddedToken("<|begin|>", special=True)])
    tokenizer.save_pretrained(folder)


def with_falcon(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("falcon", vocab_size=258, eos_token_id=257, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight is missing": (
        lambda f: change_weights(f, lambda w: w.pop(MISSING)), rf"1 weights are in none .*{MISSING}",
    ),
    "all weights have other names": (
        lambda f: change_weights(f, lambda w: [w.update({f"x.{name}": w.pop(name)}) for name in list(w)]),
        "weights are in none",
    ),
    "NaN": (lambda f: change_weights(f, lambda w: w[MISSING][3, 5].fill_(torch.nan)), f"NaN or infinite .*{MISSING}"),
    "infinite": (lambda f: change_weights(f, lambda w: w[MISSING][3, 5].fill_(-torch.inf)), "NaN or infinite"),
    "another shape": (
        lambda f: change_weights(f, lambda w: w.update({MISSING: torch.zeros(8, 8)})), "weights cannot be loaded",
    ),
    "a cut file": (lambda f: cut(f, WEIGHTS, 9000), "weights cannot be loaded"),
    "an empty file": (lambda f: cut(f, WEIGHTS, 0), "weights cannot be loaded"),
    "no file": (lambda f: (f / WEIGHTS).unlink(), "weights cannot be loaded: .*no file named"),
    "a lost shard": (with_a_lost_shard, "weights cannot be loaded: .*b.safetensors"),
    "a cut shard": (with_a_cut_shard, "weights cannot be loaded"),
    "a shard that the index forgot": (with_a_shard_that_the_index_forgot, "weights are in none"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "configuration cannot be read"),
    "a cut configuration": (lambda f: cut(f, "config.json", 200), "configuration cannot be read"),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), "configuration cannot be read"),
    "a configuration in no encoding": (
        lambda f: (f / "config.json").write_bytes(b'{"model_type": "ll\xff\xfema"}'), "configuration cannot be read",
    ),
    "an unknown family": (lambda f: change_json(f, "config.json", model_type="x7"), "configuration .*x7"),
    "a size that is no number": (lambda f: change_json(f, "config.json", hidden_size="x"), "cannot be"),
    "fewer layers in the file": (lambda f: change_json(f, "config.json", num_hidden_layers=3), "weights are in none"),
    "a cut tokenizer": (lambda f: cut(f, "tokenizer.json"), "tokenizer cannot be loaded"),
    "a tokenizer in no encoding": (
        lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe" * 30), "tokenizer cannot be loaded",
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer cannot be loaded"),
    "a cut tokenizer_config": (lambda f: cut(f, "tokenizer_config.json", 50), "tokenizer cannot be loaded"),
    "a larger tokenizer": (with_a_larger_tokenizer, r"embedding 258 rows.*'<\|begin\|>' is 258"),
    "a smaller embedding": (
        lambda f: save_tiny_model(f, vocab_size=200, eos_token_id=7, bos_token_id=6, pad_token_id=7),
        "embedding 200 rows",
    ),
    "falcon": (with_falcon, "falcon is not supported: its attention cannot be replaced"),
    "gptj": (lambda f: save_tiny_model(f, "gptj", rotary_dim=8), "gptj is not supported: its attention cannot be"),
    "bert": (lambda f: save_tiny_model(f, "bert"), "BertLMHeadModel is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_model_is_refused_in_one_line(name: str, whole: Path, model: Path, tmp_path: Path, capsys) -> None:
    break_it, reason = BROKEN[name]
    break_it(model)
    register("even", EvenEnv)
    threads = torch.get_num_threads()
    try:
        status = main(
            [
                f"data.train_data=['{whole}/data.jsonl']",
                "trainer.eval_interval=0",
                f"trainer.policy.model.path={model}",
                f"trainer.ckpt_path={tmp_path}/run",
                "trainer.device=cpu",
                "environment.env_class=even",
                "trainer.train_batch_size=1",
                "trainer.policy_mini_batch_size=1",
            ]
        )
    finally:
        torch.set_num_threads(threads)
        skyrl_gym.envs.deregister("even")
    errors = capsys.readouterr().err
    assert status == 2
    [line] = [line for line in errors.splitlines() if line.startswith("refused: ")]
    assert errors.endswith(line + "\n")
    assert "Traceback" not in errors
    assert re.search(reason, line), line


def test_a_whole_model_in_shards_loads(model: Path) -> None:
    before = load_module(model, torch.float32, {}).state_dict()
    in_shards(model)
    after = load_module(model, torch.float32, {}).state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_tied_weights_are_not_missing_and_weights_too_many_are_said(tmp_path: Path, caplog) -> None:
    folder = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    change_weights(folder, lambda weights: weights.update({"v_head.weight": torch.zeros(1)}))
    load_module(folder, torch.float32, {})


def test_a_multi_head_latent_attention_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4}
    folder = save_tiny_model(tmp_path / "model", "deepseek_v3", **sizes, **experts)
    with pytest.raises(ModelRefused, match=r"DeepseekV3ForCausalLM is not supported: .*latent attention"):
        load_policy(folder, device="cpu", compute_dtype=torch.float32)


def test_added_tokens_without_a_row_are_read_as_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True), AddedToken("<padding>", special=True)])
    tokenizer.pad_token = "<padding>"
    assert max(tokenizer.encode("a<image>b")) == 258
    prompt = [{"role": "user", "content": "a"}]
    fit_tokenizer(tokenizer, 258, tokenizer.encode(str(tokenizer.apply_chat_template(prompt, tokenize=False))))
    ids = tokenizer.encode("a<image>b<padding><|im_end|>")
    assert max(ids) == 257
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<image>b<padding>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 257


def test_a_tokenizer_smaller_than_the_embedding_stays_as_it_is(model: Path) -> None:
    tokenizer, before = load_tokenizer(model), load_tokenizer(model).get_vocab()
    fit_tokenizer(tokenizer, load_config(model, {}).vocab_size + 64, [])
    assert tokenizer.get_vocab() == before


@pytest.mark.filterwarnings("ignore")
def test_buffers_may_be_infinite_and_not_nan(tmp_path: Path) -> None:
    """Gemma 4 keeps bounds, infinite until something sets them, in its files."""
    module = tiny_family("gemma4")
    module.save_pretrained(tmp_path)
    loaded = load_module(tmp_path, torch.float32, {})
    bounds = {name: buffer for name, buffer in loaded.named_buffers() if buffer.isinf().any()}
    assert bounds
    module.get_buffer(next(iter(bounds))).fill_(torch.nan)
    module.save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="1 weights have numbers that are NaN"):
        load_module(tmp_path, torch.float32, {})
