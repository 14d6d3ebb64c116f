"""What a learner hands to engines of other processes: the numbers that it computes with, and a proof of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyrl_train.config import LoraConfig
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.ops import REFERENCE
from skyrl_train.policy.lora import add_adapters
from skyrl_train.weights.shared_memory import read_shared
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config
from tests.tiny_models import tiny_policy, tiny_tokenizer


def trained(*, rank: int = 0, **model) -> TorchLearner:
    """A learner after an update, with adapters if they have a rank."""
    config, policy = trainer_config(), tiny_policy(**model)
    if rank:
        add_adapters(policy, LoraConfig(rank=rank), seed=1)
    learner = learner_for(config, policy=policy)
    learner.update(prepared(learner, config))
    return learner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_published_weights_are_those_of_the_export(tied, rank, dtype, tmp_path):
    learner = trained(rank=rank, compute_dtype=dtype, tie_word_embeddings=tied)
    learner.save_pretrained(tmp_path / "export", tiny_tokenizer())
    exported = load_file(tmp_path / "export/model.safetensors")
    shared = learner.publish(tmp_path / "weights")
    assert shared.version == learner.policy_version == 1
    published = dict(read_shared(shared))
    assert ("lm_head.weight" in published) is not tied
    assert published.keys() == exported.keys()
    for name, weight in published.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, exported[name]), name


def test_masters_are_published_rounded_as_the_policy_rounds_them(tmp_path):
    learner = trained(compute_dtype=torch.bfloat16)
    published = dict(read_shared(learner.publish(tmp_path / "weights")))
    masters = learner._optimizer.masters
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
    for name, master in masters.items():
        assert torch.equal(published[name], REFERENCE.rounded(master, torch.bfloat16)), name


def test_the_logprobs_of_tokens_are_those_of_transformers_whatever_the_temperature_of_sampling():
    policy = tiny_policy()
    learner = learner_for(trainer_config(), policy=policy, temperature=0.7)
    ids = [5, 9, 2, 77, 120]
    policy.module.set_attn_implementation("eager")
    with torch.no_grad():
        expected = policy.module(torch.tensor([ids])).logits[0].log_softmax(-1)
    policy.module.set_attn_implementation("skyrl")
    found = learner.logprobs_of_tokens(ids)
    assert found == pytest.approx([float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=1e-4)
    with pytest.raises(ValueError, match="1 token ids: the first one has nothing before it"):
        learner.logprobs_of_tokens([3])


def test_an_index_that_is_none_is_named(tmp_path: Path):
    learner = trained()
    with pytest.raises(ValueError, match=r"index.json is missing: no learner was saved there"):
        learner.load(tmp_path)
    for content in ("{", "[]", '{"ranks": 1, "plain": {}}', "null"):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index.json is not the index of a learner"):
            learner.load(tmp_path)
