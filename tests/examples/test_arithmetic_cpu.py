"""The example as a user starts it, with the real model, for two steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from skyrl_gym.envs.arithmetic import rows
from skyrl_train.policy.pretrained import cache_folder
from skyrl_train.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_the_example_trains_the_packaged_model(tmp_path):
    for split, num in (("train", 8), ("validation", 8)):
        lines = [json.dumps(row) + "\n" for row in rows(num, split=split, digits=1)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    finished = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "arithmetic_cpu" / "train.py"),
            f"data.train_data=['{tmp_path}/train.jsonl']",
            f"data.val_data=['{tmp_path}/validation.jsonl']",
            "trainer.ckpt_interval=-1",
            "generator.n_samples_per_prompt=4",
        ],
        env=os.environ | {"HOME": str(tmp_path), "SKYRL_CACHE": str(cache_folder())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    run_folder = tmp_path / "ckpts" / "arithmetic_cpu"
    lines = read_metrics(run_folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["eval/all/avg_score"] >= 0.1, "the real model puts a number between the tags, greedily"
    assert all(line["policy/rollout_train_logprobs_abs_diff_mean"] < 0.1 for line in lines[1:])
    assert json.loads((run_folder / "summary.json").read_text())["model"].startswith("SmolLM2-135M-Instruct")
