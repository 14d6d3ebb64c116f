"""A data set's row chooses no code by itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from integrations.openenv.commands.arguments import add_environment, environment_config
from integrations.openenv.entrypoints.main_openenv import OpenEnvExp, OpenEnvRunConfig
from integrations.openenv.env import OpenEnv

URL = "http://127.0.0.1:9"
SWITCH = r"environment\.openenv\.trust_dataset_code=true"


def made(config: Any, env_name: str, **options: Any) -> OpenEnv:
    return OpenEnv(config, {"env_name": env_name, "reward_spec": {"ground_truth": ""}, "options": options})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment and a reward function that leave a file when they are imported."""
    (tmp_path / "server").mkdir()
    for name in ("server/app.py", "evil_reward.py"):
        (tmp_path / name).write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').write('here')\napp = score = lambda *_: 1.0\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "env_name", [URL, "wss://host.example/x", "image:some/image", "ghcr.io/you/env:tag", "evil.app:app", "FOLDER"]
)
def test_a_server_outside_the_catalog_must_be_named_by_the_configuration(env_name: str, folder: Path) -> None:
    env_name = str(folder) if env_name == "FOLDER" else env_name
    with pytest.raises(ValueError, match=rf"(?s)env_name=.*environment\.openenv\.env_names=.*{SWITCH}"):
        made(None, env_name)
    with pytest.raises(ValueError, match=SWITCH):
        made({"env_names": ["http://127.0.0.1:10", "other.app:app"]}, env_name)
    for allowed in ({"env_names": [env_name]}, {"trust_dataset_code": True}):
        assert made(allowed, env_name).env_name
    assert not (folder / "ran").exists()


def test_the_address_that_the_configuration_names_may_stand_in_a_row() -> None:
    assert made({"url": f"{URL}/"}, URL).env_name == URL


def test_a_folder_is_the_same_however_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert made({"env_names": ["."]}, str(folder)).env_name == str(folder)


@pytest.mark.parametrize(
    "options", [{"reward": "evil_reward:score"}, {"variables": {"LD_PRELOAD": "/tmp/evil.so"}}], ids=str
)
def test_options_that_decide_what_runs_must_stand_in_the_configuration(options: dict[str, Any], folder: Path) -> None:
    allowed = {"env_names": [URL]}
    [name] = options
    with pytest.raises(
        ValueError, match=rf"(?s)sets the option {name}=.*environment\.openenv\.options\.{name}=.*{SWITCH}"
    ):
        made(allowed, URL, **options)
    with pytest.raises(ValueError, match=SWITCH):
        made({**allowed, "options": {name: "other:thing" if name == "reward" else {}}}, URL, **options)
    assert not (folder / "ran").exists()
    assert made({**allowed, "options": options}, URL, **options)
    assert made({**allowed, "trust_dataset_code": True}, URL, **options)
    assert made(allowed, URL, instruction="Walk.", success=1.0, reset={"level": 2}, reward="")


def test_what_the_catalog_knows_needs_no_word() -> None:
    assert made(None, "echo_env").env_name == "echo_env"
    assert made(None, "openspiel-env", game="catch").options.game == "catch"


def test_what_the_command_line_names_is_trusted(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    add_environment(parser)
    words = [str(folder), "--option", "reward=evil_reward:score", "--option", "instruction=Walk."]
    config = environment_config(parser.parse_args(words))
    assert made(config, str(folder), reward="evil_reward:score").env_name == str(folder)
    with pytest.raises(ValueError, match=SWITCH):
        made(config, str(folder), reward="os:getpid")


def test_training_refuses_before_the_model_is_loaded(folder: Path) -> None:
    row = {"env_name": str(folder), "options": "{}", "reward_spec": {"ground_truth": ""}}
    prompt = SimpleNamespace(env_class="openenv", env_extras=row)
    run = cast(OpenEnvExp, SimpleNamespace(train_dataset=[prompt], eval_dataset=None))
    with pytest.raises(ValueError, match=SWITCH):
        OpenEnvExp._preflight(run, OpenEnvRunConfig())
    assert not (folder / "ran").exists()
