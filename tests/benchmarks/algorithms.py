"""Reward before and after training with step-wise trajectories, with PPO and a critic, with DAPO, three seeds each.

uv run python -m tests.benchmarks.algorithms [--env echo_env] [--only dapo] [--seeds 42 1 2] [key=value ...]

Without --env a random model of two layers plays `EvenEnv`: three turns, each paid by its share of characters with an
even code point. There the step-wise run reads its history through a template that keeps four letters of each earlier
reply, so every turn is a sample of its own. With --env, SmolLM2-135M-Instruct plays three turns of an OpenEnv
environment by its recipe. All else is the same in the three.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_train.run.metrics import read_metrics
from tests import fakes
from tests.tiny_models import CHATML, save_tiny_model

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "step-wise": ("generator.step_wise_trajectories=true",),
    "ppo": (
        "trainer.algorithm.advantage_estimator=gae",
        "trainer.critic.model.path='${trainer.policy.model.path}'",
        "trainer.critic.optimizer_config.lr='${trainer.policy.optimizer_config.lr}'",
    ),
    "dapo": (
        "trainer.algorithm.dynamic_sampling.type=filter",
        "trainer.algorithm.eps_clip_high=0.28",
        "trainer.algorithm.loss_reduction=token_mean",
        "trainer.algorithm.overlong_penalty.len=4",
        "trainer.algorithm.overlong_penalty.factor=0.1",
    ),
}
TINY = (
    "trainer.device=cpu",
    "trainer.bf16=false",
    "trainer.epochs=4",
    "trainer.train_batch_size=4",
    "trainer.policy_mini_batch_size=4",
    "trainer.policy.optimizer_config.lr=1e-2",
    "trainer.algorithm.use_kl_loss=false",
    "generator.n_samples_per_prompt=8",
    "generator.sampling_params.max_generate_length=8",
    "environment.env_class=tests.benchmarks.algorithms:EvenEnv",
)
ONCE = ("trainer.eval_interval=1000", "trainer.ckpt_interval=-1", "trainer.dump_eval_results=false")


class EvenEnv(fakes.EvenEnv):
    """The same, over three turns."""

    def step(self, action: str) -> Any:
        return {**super().step(action), "done": self.turns == 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", help="an OpenEnv environment; needs 5 GB of memory")
    parser.add_argument("--only", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("keys", nargs="*", help="configuration keys of every run")
    chosen = parser.parse_intermixed_args()
    print(
        "| algorithm | seed | reward before | reward after | samples per episode | minutes |\n|---|---|---|---|---|---|"
    )
    for seed in chosen.seeds:
        for name in chosen.only:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                before, after, samples, seconds = trained(Path(folder), name, seed, chosen.env, chosen.keys)
            row = f"| {name} | {seed} | {before:.3f} | {after:.3f} | {samples:.2f} | {seconds / 60:.1f} |"
            print(row, flush=True)


def trained(
    folder: Path, name: str, seed: int, env: str | None, keys: Sequence[str]
) -> tuple[float, float, float, float]:
    """Return the rewards of the evaluations before and after a run, samples per episode, and seconds."""
    from integrations.openenv.entrypoints import main_openenv
    from skyrl_train.entrypoints import main_base

    run = folder / "run"
    own = (f"trainer.ckpt_path={run}", f"trainer.export_path={run}/exports", f"trainer.seed={seed}")
    begun = time.monotonic()
    if env is not None:
        words = ["--env", env, "--gpus", "0", "--data-dir", str(folder / "data"), "generator.max_turns=3"]
        status = main_openenv.main([*words, *ONCE, *ALGORITHMS[name], *own, *keys])
    else:
        status = main_base.main([*TINY, *tiny_task(folder, name), *ONCE, *ALGORITHMS[name], *own, *keys])
    if status != 0:
        raise SystemExit(status)
    lines = read_metrics(run / "metrics.jsonl")
    evaluated = [line["eval/all/avg_score"] for line in lines if "eval/all/avg_score" in line]
    samples = [line["generate/samples_per_episode"] for line in lines if "generate/samples_per_episode" in line]
    return evaluated[0], evaluated[-1], sum(samples) / max(len(samples), 1), time.monotonic() - begun


def tiny_task(folder: Path, name: str) -> Iterator[str]:
    """Write a random model and its tasks, and yield the keys that name them."""
    yield f"trainer.policy.model.path={save_tiny_model(folder / 'model')}"
    rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(16)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield f"data.train_data=['{folder}/tasks.jsonl']"
    yield f"data.val_data=['{folder}/tasks.jsonl']"
    if name == "step-wise":
        shortened = "(message['content'][:4] if message['role'] == 'assistant' else message['content'])"
        (folder / "shortens.jinja").write_text(CHATML.replace("message['content']", shortened))
        yield "generator.chat_template.source=file"
        yield f"generator.chat_template.name_or_path={folder}/shortens.jinja"


if __name__ == "__main__":
    main()
