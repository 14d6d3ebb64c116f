"""An environment and a reward of the user's own, named in one line: trusted or not, refused or trained."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import skyrl_train
from skyrl_train.config import ConfigError, load_config
from skyrl_train.entrypoints.library import configuration
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.show import show
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.fakes import EvenEnv
from tests.skyrl_train.rollout.test_judge import JudgeServer
from tests.tiny_models import save_tiny_model

EVEN = "tests.fakes:EvenEnv"


def share_of_letters(reply: str, question: str, scale: float = 1.0) -> float:
    return scale * sum(letter.isalpha() for letter in reply) / max(len(reply), 1)


class LoadsNoModel(BasePPOExp):
    def get_policy(self) -> Any:
        raise AssertionError("the model was loaded")


class Stepless(EvenEnv):
    step: Any = None


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_tiny_model(folder / "model")
    return folder


def settings(given: Path, run: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    data = run.with_name(f"{run.name}.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data.train_data": [str(data)],
        "data.val_data": [],
        "trainer.policy.model.path": str(given / "model"),
        "trainer.ckpt_path": str(run),
        "trainer.export_path": f"{run}/exports",
        "trainer.device": "cpu",
        "trainer.bf16": False,
        "trainer.ckpt_interval": -1,
        "trainer.eval_interval": -1,
        "trainer.train_batch_size": 2,
        "trainer.policy_mini_batch_size": 2,
        "trainer.algorithm.use_kl_loss": False,
        "generator.n_samples_per_prompt": 4,
        "generator.sampling_params.max_generate_length": 8,
        **more,
    }


def refusal(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([f"{key}={json.dumps(value)}" for key, value in values.items()], LoadsNoModel) == 2
    return capsys.readouterr().err


def test_a_class_is_trained_in_without_being_registered(given, tmp_path):
    rows = [{"prompt": f"task {i}"} for i in range(2)]
    more = {"environment.env_class": EvenEnv, "generator.sampling_params.temperature": 1.0}
    summary = skyrl_train.train(settings(given, tmp_path / "run", rows, **more))
    assert summary.steps == 1
    assert summary.environment == EVEN
    [line] = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    assert line["generate/num_turns"] == 2.0


async def test_where_an_event_loop_runs_it_is_trained_in_a_thread_as_the_docstring_says(given, tmp_path):
    """As in a notebook."""
    values = settings(given, tmp_path / "run", [{"prompt": f"task {i}"} for i in range(2)])
    summary = await asyncio.to_thread(skyrl_train.train, values | {"environment.env_class": EvenEnv})
    assert summary.steps == 1


def test_a_reward_function_trains_on_any_rows(given, tmp_path):
    rows = [{"question": f"say {i}"} for i in range(2)]
    more = {"environment.reward": f"{__name__}:share_of_letters", "data.prompt_column": "question"}
    summary = skyrl_train.train(settings(given, tmp_path / "run", rows, **more))
    assert summary.environment == "single_turn"
    [line] = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    assert 0 < line["reward/avg_raw_reward"] < 1


def brief(reply: str) -> float:
    return -float(len(reply))


def test_several_rewards_train_and_are_kept_by_name(given, tmp_path):
    rows = [{"question": f"say {i}"} for i in range(2)]
    rewards = {"letters": share_of_letters, "brief": {"function": brief, "weight": 0.01}}
    more = {"environment.rewards": rewards, "data.prompt_column": "question"}
    more |= {"trainer.algorithm.advantage_estimator": "gdpo"}
    skyrl_train.train(settings(given, tmp_path / "run", rows, **more))
    [line] = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    means = line["rewards/letters/mean"], line["rewards/brief/mean"]
    assert line["reward/avg_raw_reward"] == pytest.approx(means[0] + 0.01 * means[1])
    assert -8 <= means[1] < 0 < means[0] <= 1
    assert line["rewards/letters/std"] > 0
    assert line["policy/grad_norm"] > 0
    [file] = trajectory_files(tmp_path / "run", "train").values()
    for episode in read_trajectories(file):
        assert episode.reward == pytest.approx(episode.rewards["letters"] + 0.01 * episode.rewards["brief"])
        assert episode.turns[0].rewards == episode.rewards
        assert episode.rewards["brief"] == -len(episode.turns[0].text)
    report = (tmp_path / "run" / "report.html").read_text()
    assert " · brief -" in report
    shown = Console(record=True, width=200)
    show(tmp_path / "run", "train", None, "first", 1, shown)
    assert ", brief -" in shown.export_text()


def test_a_judge_trains_and_its_key_is_written_nowhere(given, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = JudgeServer()
    server.answer = lambda body: f"SCORE: 0.{len(body['messages'][0]['content'].encode()) % 10}"
    judge = {"function": "judge", "base_url": server.url, "model": "m", "api_key_env": "MY_KEY", "weight": 2}
    rows = [{"prompt": f"say {i}"} for i in range(2)]
    try:
        skyrl_train.train(settings(given, tmp_path / "run", rows, **{"environment.rewards": {"good": judge}}))
    finally:
        server.close()
    [line] = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    assert line["reward/avg_raw_reward"] == pytest.approx(2 * line["rewards/good/mean"])
    asked = line["judge/good/requests"] + line["judge/good/cached"]
    assert asked == 8
    assert len(server.bodies) == line["judge/good/requests"] + 1  # once at start-up
    assert set(server.keys) == {"Bearer sk-secret"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path.name for path in files if b"sk-secret" in path.read_bytes()] == []


def test_a_row_may_name_only_code_that_the_configuration_names(given, tmp_path, capsys):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        evil = settings(given, tmp_path / "run", [{"prompt": "a", "env_class": "evil:Env"}] * 2)
        said = refusal(evil, capsys)
        assert "row 0 of" in said
        assert "environment.env_classes=['evil:Env'] allows it; environment.trust_dataset_code=true" in said
        assert "evil:Env" in refusal({**evil, "environment.env_class": EVEN}, capsys)
        assert not (tmp_path / "ran").exists()
        assert "evil has no Env" in refusal({**evil, "environment.env_classes": ["evil:Env"]}, capsys)
        assert (tmp_path / "ran").exists()
        assert "evil has no Env" in refusal({**evil, "environment.trust_dataset_code": True}, capsys)
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({}, {"environment.env_class": "tests.fakes:NoSuchEnv"}, "tests.fakes has no NoSuchEnv"),
        (
            {},
            {"environment.env_class": "tests.fakes:varied_logprobs"},
            "it is called with (env_config=..., extras=...), and there: missing a required argument: 'ids'",
        ),
        ({}, {"environment.env_class": f"{__name__}:Stepless"}, "it must be a method step(action)"),
        ({}, {"environment.env_class": "single_turn"}, "set environment.reward=my_module:my_function"),
        ({"env_class": "single_turn"}, {"environment.env_class": EVEN}, "set environment.reward=my_module:my_function"),
        ({}, {"environment.reward": "my_reward.py"}, "must name a function as my_module:my_function"),
        ({}, {"environment.reward": f"{__name__}:share_of_letters"}, "needs question, which prompt 0 lacks"),
        ({}, {"data.prompt_column": "question"}, 'has no column "question"; it has prompt'),
        ({}, {"environment.reward": "m:f", "generator.agent": "a:b"}, "is never called: generator.agent=a:b pays"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(given, tmp_path, capsys, row, more, words):
    values = settings(given, tmp_path / "run", [{"prompt": "a", **row}] * 2, **more)
    assert words in refusal(values, capsys)


@pytest.mark.parametrize(
    ("more", "settings_instead"),
    [
        (
            {"trainer.train_batch_size": 4, "trainer.policy_mini_batch_size": 4},
            ["trainer.train_batch_size=2", "trainer.policy_mini_batch_size=2"],
        ),
        ({"trainer.max_prompt_length": 1}, ["trainer.max_prompt_length="]),
        ({"generator.num_inference_engines": 3, "trainer.strategy": "fsdp2"}, ["generator.num_inference_engines=1"]),
        (
            {"trainer.deterministic": True, "trainer.placement.colocate_all": False, "trainer.strategy": "fsdp2"},
            ["trainer.deterministic=false"],
        ),
    ],
)
def test_what_fits_neither_machine_nor_data_is_refused_with_a_command_that_fits(
    given, tmp_path, capsys, more, settings_instead
):
    values = settings(given, tmp_path / "run", [{"prompt": "a"}] * 2, **{"environment.env_class": EVEN, **more})
    _, found, command = refusal(values, capsys).partition("This would start:")
    assert found
    words = shlex.split(command)
    for key in more:
        [setting] = [word for word in words if word.startswith(f"{key}=")]
        wanted = [instead for instead in settings_instead if instead.startswith(key)]
        assert all(setting.startswith(instead) for instead in wanted)
        assert wanted or setting == f"{key}={json.dumps(more[key])}"
    load_config(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_for_the_cpu_is_told(given, tmp_path, capsys):
    more = {"environment.env_class": EVEN, "trainer.device": "cuda"}
    words = refusal(settings(given, tmp_path / "run", [{"prompt": "a"}] * 2, **more), capsys)
    assert "trainer.device=cpu" in shlex.split(words.partition("This would start:")[2])


def test_the_settings_of_a_class_stand_under_its_name():
    from skyrl_train.config import env_config_for

    config = load_config(["environment.skyrl_gym.EvenEnv.size=3", f"environment.env_class={EVEN}"])
    assert env_config_for(config.environment, EVEN) == {"size": 3}


def test_train_takes_settings_in_one_of_three_forms():
    for config in (
        configuration(["trainer.epochs=3"], {}),
        configuration({"trainer.epochs": 3}, {}),
        configuration({"trainer": {"epochs": 3}}, {}),
        configuration((), {"trainer": {"epochs": 3}}),
    ):
        assert config.trainer.epochs == 3
    named = configuration((), {"environment": {"env_class": EvenEnv, "reward": share_of_letters}}).environment
    assert (named.env_class, named.reward) == (EVEN, f"{__name__}:share_of_letters")
    with pytest.raises(TypeError, match="give settings in one way"):
        configuration(["trainer.epochs=3"], {"trainer": {"epochs": 3}})
    with pytest.raises(TypeError, match="is one text"):
        configuration("trainer.epochs=3", {})
    with pytest.raises(ValueError, match="made inside a function"):
        configuration((), {"environment": {"reward": lambda reply: 0.0}})
    with pytest.raises(ConfigError, match=r"did you mean"):
        configuration({"trainer.epoch": 3}, {})


def test_importing_the_package_is_cheap():
    code = (
        "import sys, skyrl_train\nassert skyrl_train.__version__\n"
        "from skyrl_train import train\nfrom skyrl_gym import check_env\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
