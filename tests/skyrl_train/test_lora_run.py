"""A small run that trains adapters: it samples with them, measures the KL from the base, resumes, and exports both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyrl_train.entrypoints.main_base import main
from skyrl_train.learner.saved import SavedLearner
from skyrl_train.run.metrics import read_metrics


def train(given: Path, folder: Path, *more: str) -> int:
    """Two steps an epoch."""
    return main(
        [
            f"data.train_data=['{given}/data.jsonl']",
            "data.val_data=[]",
            "trainer.eval_before_train=false",
            f"trainer.policy.model.path={given}/model",
            f"trainer.ckpt_path={folder}",
            f"trainer.export_path={folder}/exports",
            "trainer.device=cpu",
            "trainer.bf16=false",
            "trainer.deterministic=true",
            "environment.env_class=even",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=1",
            "trainer.policy.model.lora.rank=4",
            "trainer.policy.optimizer_config.lr=1e-2",
            "trainer.update_ref_every_epoch=true",
            "trainer.hf_save_interval=4",
            "generator.n_samples_per_prompt=4",
            "generator.sampling_params.max_generate_length=8",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(given, folder, "trainer.epochs=2") == 0
    return folder


def test_after_every_update_the_engine_samples_from_base_and_adapters(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["policy/policy_version"] for line in lines] == [2, 4, 6, 8]
    assert all(line["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4 for line in lines)
    assert all(line["policy/grad_norm"] > 0.01 for line in lines)


def test_the_kl_counts_from_the_base_and_after_an_epoch_from_the_policy_of_then(finished):
    kl = [line["policy/policy_kl"] for line in read_metrics(finished / "metrics.jsonl")]
    # a step is two optimizer steps; before the first of them the policy of steps 1 and 3 is its reference
    assert 0 < kl[0] < kl[1]
    assert 0 < kl[2] < kl[3]
    assert kl[2] < kl[1]


def test_a_resumed_run_ends_with_the_same_adapters_and_moments(given, finished, tmp_path):
    assert train(given, tmp_path, "trainer.epochs=1") == 0
    assert train(given, tmp_path, "trainer.epochs=2") == 0
    ours, theirs = (SavedLearner(folder / "global_step_4/policy") for folder in (tmp_path, finished))
    assert ours.plain == theirs.plain
    assert all("lora_" in name for name in theirs.shapes)
    assert {name.partition("/")[0] for name in theirs.shapes} == {"masters", "exp_avg", "exp_avg_sq", "reference"}
    for name in theirs.shapes:
        assert torch.equal(ours.whole(name), theirs.whole(name)), name


def test_the_export_holds_the_merged_model_and_the_adapters(finished):
    folder = finished / "exports" / "global_step_4" / "policy"
    assert {"config.json", "model.safetensors", "adapter", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_module_that_the_model_does_not_have_is_refused_before_training(given, tmp_path, capfd):
    assert train(given, tmp_path, "trainer.policy.model.lora.target_modules=[q_porj]") == 2
    text = capfd.readouterr().err
    assert "refused: trainer.policy.model.lora: target_modules names 'q_porj'" in text
    assert "nearest: q_proj" in text
