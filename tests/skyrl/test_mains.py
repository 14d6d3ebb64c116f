"""Mains of SkyRL's users: they import, they start, they train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_train.run.metrics import read_metrics
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mains")
    save_tiny_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(2)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.train_data=['{folder}/data.jsonl']",
        "data.val_data=[]",
        f"trainer.policy.model.path={folder}/model",
        f"trainer.ckpt_path={folder}/run",
        f"trainer.export_path={folder}/exports",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "environment.env_class=even_characters",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.algorithm.use_kl_loss=false",
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.ckpt_interval=-1",
        "generator.n_samples_per_prompt=4",
        "generator.sampling_params.max_generate_length=8",
    ]


def run(main: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
    command = [sys.executable, "-m", main, *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)


def test_a_hydra_main_with_a_ray_task_trains_with_its_own_estimator_and_key(settings, tmp_path):
    own = ["trainer.algorithm.advantage_estimator=simple_baseline", "+my.key=7", f"hydra.run.dir={tmp_path}"]
    done = run("tests.skyrl.hydra_main", *settings, *own)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = next(Path(s.partition("=")[2]) for s in settings if s.startswith("trainer.ckpt_path"))
    line = read_metrics(folder / "metrics.jsonl")[-1]
    assert line["mine/own_key"] == 7.0
    assert line["policy/grad_norm"] > 0
    assert line["loss/avg_raw_advantages_abs"] > 0


def test_a_hydra_main_that_is_refused_ends_with_what_to_paste(settings, tmp_path):
    refused = run("tests.skyrl.hydra_main", *settings, "trainer.flash_attn=true", f"hydra.run.dir={tmp_path}")
    assert refused.returncode != 0
    pasted = refused.stderr.partition("This would start:\n")[2]
    assert "-m tests.skyrl.hydra_main" in pasted
    assert "flash_attn" not in pasted.splitlines()[0]
