"""A run refuses its memory plan before any weight is read, or passes the plan to its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from skyrl_train.cluster.placement import Placement
from skyrl_train.config import load_config
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from skyrl_train.policy import model_memory
from skyrl_train.policy.memory_plan import GIB, Device, MemoryPlan
from tests.benchmarks.shapes import SHAPES
from tests.tiny_models import save_tiny_model


class OnGpu(BasePPOExp):
    """An experiment that believes in a GPU, until it has its memory plan."""

    def get_device(self):
        return torch.device("cuda"), torch.bfloat16


class Planned(BasePPOExp):
    """An experiment on a CPU with the memory plan of a GPU."""

    def get_memory_plan(self):
        return MemoryPlan(96, True, kv_cache_bytes=2**20, session_cache_bytes=2**10, parts={})


def arguments(folder: Path) -> list[str]:
    (folder / "data.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "x"}]}) + "\n")
    return [
        f"data.train_data=['{folder}/data.jsonl']", "data.val_data=[]", f"trainer.policy.model.path={folder}/model",
        f"trainer.ckpt_path={folder}/run", f"trainer.export_path={folder}/run/exports", "trainer.train_batch_size=1",
        "trainer.policy_mini_batch_size=1", "trainer.algorithm.use_kl_loss=false", "environment.env_class=gsm8k",
    ]  # fmt: skip


@pytest.fixture
def an_80_gb_gpu(monkeypatch):
    device = Device("NVIDIA H100", int(79.6 * GIB), 79 * GIB, int(79.6 * GIB / 32))
    monkeypatch.setattr(model_memory, "gpu", lambda _, whole: device)


def test_7b_is_refused_on_80_gb_from_its_configuration_alone(tmp_path, capsys, an_80_gb_gpu):
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-7b"]).save_pretrained(
        tmp_path / "model"
    )  # no weights, no tokenizer
    assert main(arguments(tmp_path), experiment=OnGpu) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused:")]
    assert "full fine-tuning of 7.6 billion weights does not fit NVIDIA H100" in line
    assert "trainer.policy.model.lora.rank=16" in line


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.policy.model.lora.rank=16"],
        ["trainer.policy.model.lora.rank=16", "trainer.algorithm.use_kl_loss=true"],  # the base is the reference
    ],
)
def test_what_it_proposes_is_planned(tmp_path, an_80_gb_gpu, settings):
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-7b"]).save_pretrained(tmp_path / "model")
    cfg = load_config([*arguments(tmp_path), *settings])
    experiment = object.__new__(OnGpu)
    experiment.cfg, experiment.model_path, experiment.critic_path = cfg, str(tmp_path / "model"), None
    experiment.device, experiment.compute_dtype = experiment.get_device()
    experiment.placement = experiment.get_placement()
    plan = experiment.memory = experiment.get_memory_plan()
    assert plan is not None
    assert plan.parts["reference"] == 0
    assert 0 < plan.parts["moments"] < GIB
    assert experiment.trainer_section.max_tokens_per_microbatch == plan.token_budget


def test_a_reference_of_its_own_is_counted(tmp_path, an_80_gb_gpu):
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-0.5b"]).save_pretrained(tmp_path / "model")
    experiment = object.__new__(OnGpu)
    experiment.cfg = load_config([*arguments(tmp_path), "trainer.algorithm.use_kl_loss=true"])
    experiment.model_path, experiment.critic_path = str(tmp_path / "model"), None
    experiment.device, experiment.compute_dtype = experiment.get_device()
    experiment.placement = experiment.get_placement()
    plan = experiment.get_memory_plan()
    assert plan is not None
    assert plan.parts["reference"] == 2 * 494_032_768


@pytest.mark.parametrize(("engines", "share"), [(((0,),), 0.4), (((1,),), 0.0)])
def test_an_engine_of_another_process_has_its_share_of_a_gpu_that_it_takes_turns_on(
    tmp_path, an_80_gb_gpu, engines, share
):
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-0.5b"]).save_pretrained(tmp_path / "model")
    experiment = object.__new__(OnGpu)
    experiment.cfg = load_config(
        [*arguments(tmp_path), "generator.backend=vllm", "generator.gpu_memory_utilization=0.4"]
    )
    experiment.model_path, experiment.critic_path = str(tmp_path / "model"), None
    experiment.device, experiment.compute_dtype = experiment.get_device()
    experiment.placement = Placement(on_gpu=True, in_process=False, ranks=(0,), engines=engines, num_threads=1)
    plan = experiment.get_memory_plan()
    assert plan is not None
    assert experiment.placement.takes_turns == (share > 0)
    assert (plan.engine_bytes, plan.kv_cache_bytes) == (int(share * int(79.6 * GIB)), 0)


def test_names_of_adapters_that_do_not_exist_are_refused_here_too(tmp_path, capsys, an_80_gb_gpu):
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-0.5b"]).save_pretrained(tmp_path / "model")
    lora = ["trainer.policy.model.lora.rank=16", "trainer.policy.model.lora.target_modules=[q_projection]"]
    assert main([*arguments(tmp_path), *lora], experiment=OnGpu) == 2
    assert "refused: trainer.policy.model.lora: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "token_budget", "checkpointing"), [(Planned, 96, True), (BasePPOExp, 8192, True)]
)
def test_the_plan_reaches_the_learner_and_the_engine(tmp_path, experiment, token_budget, checkpointing):
    save_tiny_model(tmp_path / "model")
    built = experiment(load_config([*arguments(tmp_path), "trainer.device=cpu"]))
    policy = built.get_policy()
    assert policy.gradient_checkpointing is checkpointing
    assert built.get_learner(policy)._trainer.token_budget == token_budget
    scheduler = built.get_engine(policy)._scheduler
    if experiment is Planned:
        tiny_token = 2 * 2 * 2 * 8 * policy.compute_dtype.itemsize  # layers, keys and values, heads, their size
        assert scheduler.max_cached_tokens == 2**20 // tiny_token
        assert scheduler._sessions.budget == 2**10


def test_a_cpu_keeps_what_the_user_says(tmp_path):
    save_tiny_model(tmp_path / "model")
    said = ["trainer.device=cpu", "trainer.gradient_checkpointing=false", "trainer.max_tokens_per_microbatch=300"]
    built = BasePPOExp(load_config([*arguments(tmp_path), *said]))
    assert built.memory is None
    section = built.trainer_section
    assert (section.max_tokens_per_microbatch, section.gradient_checkpointing) == (300, False)
