"""What a trained policy with adapters leaves behind loads in transformers, and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from skyrl_train.policy.lora import adapters_of, effective_weight
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config
from tests.skyrl_train.policy.test_lora import adapted
from tests.tiny_models import save_tiny_model, tiny_tokenizer

IDS = torch.arange(9)[None] * 7


def logits_from(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def exported(folder: Path, family: str = "llama", **settings) -> tuple[Path, Tensor]:
    """The export of a trained policy, and its logits before."""
    config = trainer_config()
    policy = adapted(family, moved=0.05, **settings)
    learner = learner_for(config, policy=policy)
    learner.update(prepared(learner, config))
    learner.save_pretrained(folder / "policy", tiny_tokenizer())
    policy.module.set_attn_implementation("eager")
    return folder / "policy", logits_from(policy.module)


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}])
def test_the_merged_export_is_a_plain_model_with_the_same_logits(tmp_path, config):
    folder, expected = exported(tmp_path, **config)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # ty: ignore
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(logits_from(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "alpha": 3},
        {"target_modules": "q_proj", "exclude_modules": "layers.0.self_attn.q_proj"},
    ],
)
def test_peft_loads_the_adapter_folder_onto_the_base(tmp_path, lora):
    peft = pytest.importorskip("peft")
    folder, expected = exported(tmp_path, lora=lora)
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    assert (logits_from(base) - expected).abs().max() > 0.01
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    assert_close(logits_from(model), expected, atol=1e-5, rtol=1e-4)


def test_the_adapter_folder_names_layers_in_short_where_that_means_the_same(tmp_path):
    folder, _ = exported(tmp_path, lora={"target_modules": ["v_proj", "q_proj"]})
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 8, ["q_proj", "v_proj"])


def test_a_policy_that_is_trained_whole_has_no_adapter_folder(tmp_path):
    learner = learner_for(trainer_config())
    assert adapters_of(learner.policy.module) == {}
    learner.save_pretrained(tmp_path, tiny_tokenizer())
    assert not (tmp_path / "adapter").exists()


def test_in_bfloat16_the_export_holds_the_weights_that_the_engine_multiplies_by(tmp_path):
    policy = adapted(moved=0.05, compute_dtype=torch.bfloat16)
    learner_for(trainer_config(), policy=policy).save_pretrained(tmp_path, tiny_tokenizer())
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters())
    for name, layer in adapters_of(policy.module).items():
        assert torch.equal(weights[f"{name}.weight"], effective_weight(layer))
