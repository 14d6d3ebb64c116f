"""A tiny run, as arguments and as a program: `python -m tests.skyrl_train.cluster.runs key=value ...`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from skyrl_gym.envs import register
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[3]
NUM_STEPS = 4
TWO = ["trainer.strategy=fsdp2", "trainer.placement.policy_num_gpus_per_node=2", "generator.num_inference_engines=2"]


def write_given(folder: Path) -> Path:
    """Write a tiny model and tiny data."""
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(2 * NUM_STEPS)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(given: Path, run_folder: Path) -> list[str]:
    return [
        f"data.train_data=['{given}/train.jsonl']",
        "data.val_data=[]",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={run_folder}",
        f"trainer.export_path={run_folder}/exports",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "environment.env_class=even",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.ckpt_interval=1",
        "trainer.max_ckpts_to_keep=2",
        "generator.n_samples_per_prompt=4",
        "generator.max_turns=2",
        "generator.sampling_params.max_generate_length=8",
    ]


def environment() -> dict[str, str]:
    """Return the variables of a run's process: one thread each, for the tests share the cores with it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "0"}


if __name__ == "__main__":
    from skyrl_train.entrypoints.main_base import main

    register("even", EvenEnv)
    sys.exit(main(sys.argv[1:]))
