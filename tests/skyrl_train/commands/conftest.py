"""Two finished runs on a tiny model, full fine-tuning and adapters, that all tests of the commands share."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from skyrl_gym.envs.registration import deregister, register
from skyrl_train.entrypoints.main_base import main
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model, tiny_bpe_tokenizer

KINDS = ("full", "lora")
ENV = "even_commands"


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, Path]]:
    """A run's folder by kind: two steps, a checkpoint and an export by the learner after each."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = tiny_bpe_tokenizer()  # not a token per byte: GGUF needs merges
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    save_tiny_model(folder / "model", vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, **ends)
    GenerationConfig(**ends).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i} → ☃"}], "data_source": "even"} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register(ENV, EvenEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in KINDS:
        assert main(settings(folder, folder / kind, kind)) == 0
    yield {kind: folder / kind for kind in KINDS}
    torch.set_num_threads(threads)
    deregister(ENV)


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


def settings(given: Path, folder: Path, kind: str) -> list[str]:
    return [
        f"data.train_data=['{given}/data.jsonl']",
        f"data.val_data=['{given}/data.jsonl']",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={folder}",
        f"trainer.export_path={folder}/exports",
        "trainer.device=cpu",
        "trainer.bf16=false",
        f"environment.env_class={ENV}",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.algorithm.use_kl_loss=false",
        "trainer.policy.optimizer_config.lr=1e-2",
        "trainer.hf_save_interval=1",
        "trainer.ckpt_interval=1",
        "generator.n_samples_per_prompt=4",
        "generator.sampling_params.max_generate_length=8",
        *(["trainer.policy.model.lora.rank=4"] if kind == "lora" else []),
    ]
