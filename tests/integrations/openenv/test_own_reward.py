"""environment.reward in OpenEnv's environments, and `check` for classes of the user's."""

from __future__ import annotations

import asyncio

import pytest

from integrations.openenv.__main__ import main
from integrations.openenv.commands.games import is_text_environment
from integrations.openenv.env import register_openenv
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_train.engine.base import SamplingParams
from skyrl_train.prompts import row_prompt
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.reward import RewardFunction
from skyrl_train.rollout.rewards import Rewards
from skyrl_train.rollout.round import Round
from tests.fakes import ScriptedEngine
from tests.tiny_models import tiny_tokenizer


def test_a_function_pays_with_the_fields_of_the_server(echo_url):
    register_openenv()
    seen = []

    def score(reply, ground_truth, metadata, reward):
        seen.append((reply, ground_truth in str(metadata["observation"]), metadata["server_reward"], reward))
        return 0.75

    [row], _ = dataset_rows("echo_env", 1, 1, seed=0)
    words = f"<action>{row['reward_spec']['ground_truth']}</action>"
    tokenizer = tiny_tokenizer()
    limits = EpisodeLimits(3, 2000, 4096, step_timeout_s=30, episode_timeout_s=60)
    engine = ScriptedEngine(tokenizer, lambda _: words)
    engine.max_model_len = 4096
    config = {"openenv": {"url": echo_url, "runtime": "url"}}
    reward = RewardFunction("m:score", score)
    collector = Collector(engine, ChatTemplate(tokenizer), limits, env_configs=config, rewards=Rewards(alone=reward))
    prompts = [row_prompt("row 0", row, "openenv")]
    [group] = asyncio.run(collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=200))))
    collector.close()
    assert [turn.reward for turn in group.trajectories[0].turns] == [0.75]
    [(reply, was_echoed, _, own)] = seen
    assert (reply, was_echoed, own) == (words, True, 1.0)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("tests.fakes:EvenEnv", True),
        ("arithmetic", True),
        ("echo_env", False),
        ("echo_env:latest", False),  # an image
        ("integrations.openenv.servers.app:load_app", False),  # no class: an app for OpenEnv's servers
        ("./my_env", False),
    ],
)
def test_classes_are_told_from_servers(name, is_one):
    assert is_text_environment(name) is is_one


def test_check_plays_a_class(capsys):
    assert main(["check", "tests.fakes:EvenEnv", "--row", '{"number": 1}']) == 0
    assert "tests.fakes:EvenEnv: keeps the contract" in capsys.readouterr().out


def test_a_class_that_cannot_be_imported_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_game.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", "broken_game:Game"]) == 2
    assert "broken_game:Game cannot be imported: ZeroDivisionError" in capsys.readouterr().err
