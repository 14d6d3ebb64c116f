"""What a configuration asks of several ranks, each rank's experiment builds: a warm start, critics, a teacher."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from skyrl_gym.envs.registration import deregister, register
from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.config import load_config
from skyrl_train.entrypoints.experiment import BasePPOExp
from tests.fakes import EvenEnv
from tests.skyrl_train.batches import random_batch
from tests.skyrl_train.cluster.runs import TWO, arguments, write_given
from tests.skyrl_train.learner.rank_processes import RankProcesses
from tests.tiny_models import save_tiny_model

pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")
GAE = "trainer.algorithm.advantage_estimator=gae"
ADAPTERS = "trainer.policy.model.lora.rank=4"
SETTINGS = {
    "a critic with a trunk of its own": [GAE, "trainer.critic.model.path=@/model"],
    "adapters of policy and critic": [
        GAE, "trainer.critic.model.path=@/model", "trainer.critic.model.lora.rank=4", ADAPTERS
    ],
    "a critic on the policy's hidden states": [GAE, "trainer.critic.shares_policy=true"],
    "a critic on those of a policy with adapters": [GAE, "trainer.critic.shares_policy=true", ADAPTERS],
    "a teacher": [
        "trainer.algorithm.advantage_estimator=distillation", "trainer.algorithm.use_kl_loss=false",
        "trainer.ref.model.path=@/teacher",
    ],
}  # fmt: skip


def train(settings: list[str], folder: Path) -> dict[str, float]:
    """Imitate, make two updates, and save while the second is asked for."""
    register("even", EvenEnv)
    try:
        exp = BasePPOExp(load_config(settings))
        learner = exp.get_learner(exp.get_policy())
        metrics = learner.imitate(random_batch(seed=3))
        for seed in (0, 1):
            batch = add_advantages(learner.add_logprobs(random_batch(seed=seed)), exp.cfg.trainer.algorithm)
            written = learner.save(folder / str(seed))
            metrics |= learner.update(batch)
            written.result()
        return metrics
    finally:
        deregister("even")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_given(tmp_path_factory.mktemp("configured"))
    save_tiny_model(folder / "teacher", seed=1)
    (folder / "shown.jsonl").write_text('{"prompt": "task 1", "response": "bdfh"}')
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Generator[RankProcesses]:
    processes = RankProcesses(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.close()


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_imitate_and_then_learn_from_rewards(two, given, name, tmp_path):
    words = [word.replace("@", str(given)) for word in [*SETTINGS[name], "trainer.sft.data=['@/shown.jsonl']"]]
    ours, theirs = two.call(train, [*arguments(given, given / "run"), *TWO, *words], tmp_path)
    assert ours == theirs
    assert ours["sft/loss"] > 0
    assert ours["policy/grad_norm"] > 0
    assert ours["policy/policy_version"] > 1
    assert ("critic/grad_norm" in ours) == (GAE in words)
    assert ours.get("critic/grad_norm", 1.0) > 0
    assert (tmp_path / "1" / "critic" / "rank_1_of_2.safetensors").is_file() == (GAE in words)
