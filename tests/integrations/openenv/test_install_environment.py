from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from integrations.openenv import install_environment
from integrations.openenv.catalog import catalog_entry
from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.config import OpenEnvConfig


class NeedsEngine(CodingEntry):
    """An environment whose engine is missing."""

    extra = "no-such-extra"
    engine_module = "no_such_module"


def installed(monkeypatch: pytest.MonkeyPatch, *words: str, keeps_bytecode: bool = True) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "dont_write_bytecode", not keeps_bytecode)
    monkeypatch.setattr(sys, "argv", ["install", *words])
    with pytest.raises(SystemExit) as ended:
        install_environment.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


async def test_the_good_player_earns_full_reward_on_a_server_of_its_own() -> None:
    played = await install_environment.play_gold_episode(catalog_entry("coding_env"), OpenEnvConfig(runtime="local"))
    assert played == (1.0, 1.0)


def test_without_docker_it_says_that_the_local_runtime_serves_and_checks_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert installed(monkeypatch, "echo-env") == 0
    printed = capsys.readouterr().out
    assert "the docker command is not installed" in printed
    assert "The local runtime will serve." in printed
    assert "echo_env: the good player earned 1 of 1" in printed


def test_where_python_keeps_no_bytecode_the_packages_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "prefix", "/a/virtual/environment")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("x = 1\n")
    (tmp_path / "package" / "no_python.py").write_text("{{ a template }\n")
    assert installed(monkeypatch, "echo-env") == 0
    assert not list(tmp_path.rglob("*.pyc"))
    assert installed(monkeypatch, "echo-env", keeps_bytecode=False) == 0
    assert [path.name.split(".")[0] for path in tmp_path.rglob("*.pyc")] == ["module"]
    assert "compiled in" in capsys.readouterr().out


def test_without_docker_nothing_can_be_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert installed(monkeypatch, "--build", "echo-env") == 1
    assert "Nothing can be built." in capsys.readouterr().out


def test_without_a_registry_it_says_so_and_the_local_runtime_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command(tmp_path, "docker", '[ "$1" = pull ] && { echo "no such host"; exit 1; }; exit 0')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert installed(monkeypatch, "echo-env") == 0
    printed = capsys.readouterr().out
    assert "no image: docker pull failed\n    no such host\n  The local runtime will serve." in printed
    assert "earned 1 of 1" in printed


def test_a_failed_build_shows_its_last_lines_and_tags_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = f'echo "$1" >> {tmp_path}/calls; [ "$1" = build ] && {{ cat > /dev/null; seq 100; exit 1; }}; exit 0'
    command(tmp_path, "docker", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert installed(monkeypatch, "--build", "echo-env") == 1
    printed = capsys.readouterr().out
    assert "docker build failed\n    81\n" in printed
    assert printed.rstrip().endswith("100\nnot ready: echo_env")
    assert (tmp_path / "calls").read_text().split() == ["version", "build"]


async def test_a_missing_engine_is_installed_with_uv_into_this_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command(tmp_path, "uv", f'echo "$UV_PROJECT_ENVIRONMENT" "$@" > {tmp_path}/asked')
    monkeypatch.setenv("UV", str(tmp_path / "uv"))
    with pytest.raises(OpenEnvError, match=r"installed the extra no-such-extra, but no_such_module is still missing"):
        await install_environment.bring_engine(NeedsEngine(), 60.0)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:3] == [sys.prefix, "sync", "--inexact"]
    assert asked[-2:] == ["--extra", "no-such-extra"]


async def test_without_uv_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OpenEnvError, match=r"uv is not here; in .* type: uv sync --inexact --extra no-such-extra"):
        await install_environment.bring_engine(NeedsEngine(), 60.0)


def test_an_unknown_name_is_an_error_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert installed(monkeypatch, "chess") == 2
    assert "unknown env_name='chess' (known: echo_env, coding_env, openspiel_env," in capsys.readouterr().err
