"""Options that act between episodes and update, seen in the metrics of whole small runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model

Lines = list[dict[str, Any]]
# Every fifth token of a random model is a letter and ends its reply, so about half of the replies are cut.
OFTEN_CUT = (
    "generator.sampling_params.max_generate_length=3",
    f"generator.sampling_params.stop=[{','.join(ascii_letters)}]",
    "generator.max_turns=1",
    "generator.n_samples_per_prompt=8",
)


class Drawing(BasePPOExp):
    """Logs one draw of the global generator with every step, as an environment of a user may draw from it."""

    def extra_metrics(self) -> dict[str, float]:
        return {"mine/draw": random.random()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lines]:
    """Return a function: settings -> the metrics of a run of two steps an epoch, one prompt each."""
    given = tmp_path_factory.mktemp("given")
    save_tiny_model(given / "model")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b")]
    (given / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder: Path, *more: str) -> Lines:
        register("even", EvenEnv)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            status = main(
                [
                    f"data.train_data=['{given}/data.jsonl']",
                    f"data.val_data=['{given}/data.jsonl']",
                    "trainer.eval_interval=2",
                    "generator.eval_sampling_params.max_generate_length=2",
                    "generator.eval_n_samples_per_prompt=3",
                    f"trainer.policy.model.path={given}/model",
                    f"trainer.ckpt_path={folder}",
                    "trainer.device=cpu",
                    "trainer.bf16=false",
                    "trainer.eval_before_train=false",
                    "environment.env_class=even",
                    "trainer.train_batch_size=1",
                    "trainer.policy_mini_batch_size=1",
                    "trainer.algorithm.use_kl_loss=false",
                    "generator.n_samples_per_prompt=4",
                    *more,
                ],
                Drawing,
            )
        finally:
            torch.set_num_threads(threads)
            skyrl_gym.envs.deregister("even")
        assert status == 0
        return read_metrics(folder / "metrics.jsonl")

    return run


def by_end(folder: Path) -> tuple[list[float], list[float], int, int]:
    """(rewards of finished, of cut episodes, sampled tokens of finished, of cut episodes) of the first step."""
    episodes = read_trajectories(trajectory_files(folder, "train")[1])
    finished = [episode for episode in episodes if episode.stop_reason == "stop"]
    cut = [episode for episode in episodes if episode.stop_reason == "length"]
    assert finished
    assert cut
    return (
        [episode.reward for episode in finished],
        [episode.reward for episode in cut],
        sum(episode.num_sampled for episode in finished),
        sum(episode.num_sampled for episode in cut),
    )


def test_without_the_options_cut_episodes_are_paid_and_trained_like_others(run, tmp_path):
    first = run(tmp_path, *OFTEN_CUT, "trainer.ckpt_interval=3")[0]
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_2"]  # the last step, due or not
    of_finished, of_cut, tokens_of_finished, tokens_of_cut = by_end(tmp_path)
    assert first["loss/num_trained_tokens"] == tokens_of_finished + tokens_of_cut
    assert first["loss/avg_final_rewards"] == pytest.approx(sum(of_finished + of_cut) / 8)


def test_evaluation_has_its_own_sampling_and_its_own_number_of_episodes(run, tmp_path):
    first, second = run(tmp_path, *OFTEN_CUT)
    assert not any(name.startswith("eval/") for name in first)
    assert second["eval/all/generate/num_episodes"] == 2 * 3
    assert (second["eval/all/generate/max_num_tokens"], second["generate/max_num_tokens"]) == (2, 3)


def test_apply_overlong_filtering_leaves_cut_episodes_out_of_the_loss_and_pays_them(run, tmp_path):
    first = run(tmp_path, *OFTEN_CUT, "generator.apply_overlong_filtering=true")[0]
    of_finished, of_cut, tokens_of_finished, tokens_of_cut = by_end(tmp_path)
    assert first["loss/num_trained_tokens"] == tokens_of_finished
    assert first["loss/avg_final_rewards"] == pytest.approx(sum(of_finished + of_cut) / 8)
    assert first["trainer/num_tokens"] == tokens_of_finished + tokens_of_cut  # all that was sampled


def test_zero_reward_on_non_stop_trains_cut_episodes_without_their_rewards(run, tmp_path):
    first = run(tmp_path, *OFTEN_CUT, "generator.zero_reward_on_non_stop=true")[0]
    of_finished, of_cut, tokens_of_finished, tokens_of_cut = by_end(tmp_path)
    assert sum(of_cut) > 0
    assert first["loss/num_trained_tokens"] == tokens_of_finished + tokens_of_cut
    assert first["loss/avg_final_rewards"] == pytest.approx(sum(of_finished) / 8)
    assert first["reward/avg_raw_reward"] == pytest.approx(sum(of_finished + of_cut) / 8)


def test_a_resumed_run_goes_on_with_the_weight_of_the_kl_and_the_random_states_of_its_checkpoint(run, tmp_path):
    kl = (
        "trainer.algorithm.use_kl_in_reward=true",
        "trainer.algorithm.kl_loss_coef=0.5",
        "trainer.algorithm.kl_ctrl.type=adaptive",
        "trainer.algorithm.kl_ctrl.kl_target=100",  # far above any KL here: each step lowers the weight by its most
        "trainer.algorithm.kl_ctrl.horizon=8",
        "generator.sampling_params.max_generate_length=4",
        "generator.sampling_params.min_tokens=4",
        "generator.max_turns=2",
        "trainer.policy.optimizer_config.lr=1e-2",
        "trainer.ckpt_interval=1",
    )
    random.seed(7)
    run(tmp_path, *kl, "trainer.epochs=1")
    random.seed(8)
    lines = run(tmp_path, *kl, "trainer.epochs=2")
    draws = random.Random(7)
    assert [line["mine/draw"] for line in lines] == [draws.random() for _ in range(4)]
    num_sampled = [line["generate/num_sampled_tokens"] for line in lines]
    assert [line["trainer/num_tokens"] for line in lines] == [sum(num_sampled[:step]) for step in (1, 2, 3, 4)]
    step = 1 - 0.2 * 4 / 8  # four samples of a horizon of eight
    weights = [line["loss/kl_loss_coef"] for line in lines]
    assert weights == pytest.approx([0.5, 0.5 * step, 0.5 * step**2, 0.5 * step**3])
    assert lines[1]["loss/avg_kl"] > 1e-3
    for line in lines:  # each of the two turns has four tokens, which pay for the KL
        paid = line["loss/kl_loss_coef"] * 8 * line["loss/avg_kl"]
        assert line["loss/avg_final_rewards"] == pytest.approx(line["reward/avg_raw_reward"] - paid, abs=1e-5)


def test_the_length_penalty_is_trained_and_not_recorded(run, tmp_path):
    """Replies have at most 3 tokens, and each costs 0.1 with a buffer of 3: a cut one loses 0.3."""
    buffer = ("trainer.algorithm.overlong_penalty.len=3", "trainer.algorithm.overlong_penalty.factor=0.3")
    first = run(tmp_path, *OFTEN_CUT, *buffer)[0]
    plain = run(tmp_path / "plain", *OFTEN_CUT)[0]
    assert first["reward/avg_raw_reward"] == plain["reward/avg_raw_reward"]
    cost = -0.1 * first["generate/num_sampled_tokens"] / 8
    assert first["overlong/mean_penalty"] == pytest.approx(cost)
    assert first["overlong/penalized_share"] == 1.0
    assert first["loss/avg_final_rewards"] == pytest.approx(plain["loss/avg_final_rewards"] + cost)
    assert "overlong/mean_penalty" not in plain


GAE = ("trainer.algorithm.advantage_estimator=gae", "trainer.critic.optimizer_config.lr=1e-2")


def test_a_critic_is_trained_saved_and_taken_up_again_bit_for_bit(run, tmp_path):
    model = ["trainer.critic.model.path=${trainer.policy.model.path}", "trainer.algorithm.lambd=0.9"]
    settings = (
        *GAE,
        *model,
        "trainer.deterministic=true",
        "trainer.ckpt_interval=1",
        "trainer.policy.optimizer_config.lr=1e-3",
    )
    unbroken = run(tmp_path / "unbroken", *settings)
    assert all(line["critic/critic_loss"] > 0 and line["critic/grad_norm"] > 0 for line in unbroken)
    assert unbroken[0]["critic/values_mean"] == 0.0  # the head begins at zero
    assert unbroken[1]["critic/values_mean"] != 0.0
    assert abs(unbroken[0]["loss/avg_raw_advantages"]) < 1e-6  # whitened
    begun = tmp_path / "unbroken" / "global_step_1"
    digests = (begun / "digests.txt").read_text()
    assert "policy/critic/index.json" in digests
    resumed = run(tmp_path / "resumed", *settings, "trainer.resume_mode=from_path", f"trainer.resume_path={begun}")
    critic = {key for key in unbroken[1] if key.startswith(("critic/", "policy/"))}
    assert {key: resumed[-1][key] for key in critic} == {key: unbroken[1][key] for key in critic}
    (damaged := begun / "policy/critic/rank_0_of_1.safetensors").write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError):  # main refuses it with status 2
        run(tmp_path / "again", *settings, "trainer.resume_mode=from_path", f"trainer.resume_path={begun}")


def test_a_critic_that_does_not_know_the_policys_tokens_is_refused_before_anything_is_loaded(run, tmp_path, capsys):
    config = save_tiny_model(tmp_path / "small") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 64}))
    with pytest.raises(AssertionError):
        run(tmp_path / "run", *GAE, f"trainer.critic.model.path={tmp_path}/small")
    assert "knows 64 tokens, the policy 258" in capsys.readouterr().err
