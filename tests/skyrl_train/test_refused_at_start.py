"""Errors that can be known before the first step end the run with one line and status 2, before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_gym.tools import python_process
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model


class LoadsNoModel(BasePPOExp):
    def get_policy(self) -> Any:
        raise AssertionError("the model was loaded")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_tiny_model(folder)
    return folder


@pytest.fixture(autouse=True)
def _environments():
    register("even", EvenEnv)
    register("gone", "no_such_package.envs:Env")
    register("nameless", "tests.fakes:NoSuchEnv")
    yield
    for env_id in ("even", "gone", "nameless"):
        skyrl_gym.envs.deregister(env_id)


def rows(count: int = 4, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"task {i}"}], "number": i, **columns} for i in range(count)]


def lines(*given: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in given).encode()


def settings(model: Path, folder: Path, data: list[Path], *more: str) -> list[str]:
    return [
        f"data.train_data={[str(path) for path in data]}",
        "data.val_data=[]",
        f"trainer.policy.model.path={model}",
        f"trainer.ckpt_path={folder}/run",
        f"trainer.export_path={folder}/exports",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "trainer.eval_interval=-1",
        "environment.env_class=even",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4",
        *more,
    ]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that says why. The corrected command may follow it."""
    capsys.readouterr()
    assert main(arguments, LoadsNoModel) == 2
    said = [
        line for line in capsys.readouterr().err.splitlines() if "INFO" not in line and "DeprecationWarning" not in line
    ]
    assert said[0].startswith("refused: ")
    assert said[1:] == [] or said[1].endswith(":"), said
    return said[0]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damaged(content: bytes) -> bytes:
    """Pages overwritten, the footer whole."""
    return content[:4] + bytes(200) + content[204:]


def parquet(*given: dict[str, Any]) -> bytes:
    return pd.DataFrame(list(given)).to_parquet()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", lines(*rows(3)), "takes trainer.train_batch_size=4 prompts, but the data set has 3"),
        ("x.parquet", cut(parquet(*rows(400))), "x.parquet is not a readable parquet file"),
        ("x.parquet", damaged(parquet(*rows(400))), "x.parquet is not a readable parquet file"),
        ("x.parquet", b"", "x.parquet is not a readable parquet file"),
        ("x.jsonl", cut(lines(*rows(5))), "line 3 of "),
        ("x.json", cut(json.dumps(rows()).encode()), "x.json is neither a JSON array nor"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl is neither a JSON array nor"),
        ("x.jsonl", lines(*rows()).replace(b"task", b"t\xe4sk"), "x.jsonl is not written in UTF-8"),
        ("x.json", json.dumps(rows()).encode("utf-16"), "x.json is not written in UTF-8"),
        ("x.jsonl", lines(*rows(prompt=[{"role": "user", "content": "\ud800"}])), "row 0 of "),
        ("x.jsonl", lines(*rows(env_class="evne")), "env_class='evne': skyrl_gym.error.Error: no environment 'evne'"),
        ("x.jsonl", lines(*rows(3), rows(1, env_class="gone")[0]), "row 3 of "),
        ("x.jsonl", lines(*rows(env_class="nameless")), "module tests.fakes has no NoSuchEnv"),
        ("x.jsonl", lines(*rows(max_turns="many")), "max_turns must be a whole number or null, got 'many'"),
        ("x.jsonl", lines(*rows(max_turns=0)), "max_turns=0 must be at least 1"),
        ("x.jsonl", lines(*rows(max_turns=2.5)), "max_turns must be a whole number or null, got '2.5'"),
        ("x.jsonl", lines(*rows(seed=[1])), "seed must be a whole number or null, got '[1]'"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_refused(name, content, words, model, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    said = refusal(settings(model, tmp_path, [path]), capsys)
    assert words in said
    assert name in said or "train_batch_size" in said


def test_every_unknown_environment_is_named_in_one_line(model, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(lines(*rows(2, env_class="a1"), *rows(2, env_class="b2"), *rows(2)))
    said = refusal(settings(model, tmp_path, [tmp_path / "x.jsonl"]), capsys)
    assert "env_class='a1'" in said
    assert "env_class='b2'" in said
    assert "name it as my_module:MyEnv" in said


@pytest.mark.parametrize("env_class", ["lcb", "searchcode"])
def test_an_environment_that_this_machine_cannot_wall_in_is_refused(env_class, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("skyrl_gym.walls.wall.can_filter", lambda: False)
    monkeypatch.delenv("OPENENV_ACCEPT_UNSAFE", raising=False)
    monkeypatch.setattr(python_process, "_PROGRAMS", python_process._Programs())
    (tmp_path / "x.jsonl").write_bytes(lines(*rows(env_class=env_class)))
    said = refusal(settings(model, tmp_path, [tmp_path / "x.jsonl"]), capsys)
    assert f"env_class='{env_class}': " in said
    assert "OPENENV_ACCEPT_UNSAFE=1" in said


def test_a_missing_shard_is_named(model, tmp_path, capsys):
    (tmp_path / "x-1.jsonl").write_bytes(lines(*rows()))
    said = refusal(settings(model, tmp_path, [tmp_path / "x-1.jsonl", tmp_path / "x-2.jsonl"]), capsys)
    assert f"there is no file {tmp_path}/x-2.jsonl" in said


def in_the_way(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"trainer.export_path={folder}/file/exports", "trainer.hf_save_interval=1"]


def a_checkpoint_path_in_the_way(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"trainer.ckpt_path={folder}/file/run"]


def a_folder_in_a_checkpoint(folder: Path) -> list[str]:
    (folder / "global_step_2").mkdir()
    (folder / "global_step_2" / "digests.txt").write_text("")
    return [f"trainer.ckpt_path={folder}/global_step_2/run"]


def a_folder_in_an_exported_model(folder: Path) -> list[str]:
    (folder / "skyrl.json").write_text("{}")
    return [f"trainer.ckpt_path={folder}/run"]


def a_template_that_is_no_utf8(folder: Path) -> list[str]:
    (folder / "chat.jinja").write_bytes(b"\xff{{ messages }}")
    name = f"generator.chat_template.name_or_path={folder}/chat.jinja"
    return ["generator.chat_template.source=file", name]


def a_template_that_is_no_jinja(folder: Path) -> list[str]:
    (folder / "chat.jinja").write_text("{% for %}")
    name = f"generator.chat_template.name_or_path={folder}/chat.jinja"
    return ["generator.chat_template.source=file", name]


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (in_the_way, "file/exports cannot be written into (Not a directory)"),
        (a_checkpoint_path_in_the_way, "file/run cannot be written into (Not a directory); give another folder"),
        (a_folder_in_a_checkpoint, "global_step_2, which would be damaged; give another place"),
        (a_folder_in_an_exported_model, "which the next export replaces; give another place"),
        (a_template_that_is_no_utf8, "chat.jinja is not written in UTF-8"),
        (a_template_that_is_no_jinja, "chat template"),
    ],
)
def test_paths_and_templates_that_cannot_be_used_are_refused(
    arrange: Callable[[Path], list[str]], words, model, tmp_path, capsys
):
    (tmp_path / "x.jsonl").write_bytes(lines(*rows()))
    assert words in refusal(settings(model, tmp_path, [tmp_path / "x.jsonl"], *arrange(tmp_path)), capsys)


def test_an_export_path_that_nothing_needs_is_not_asked_for(model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "x.jsonl").write_bytes(lines(*rows()))
    with pytest.raises(AssertionError, match="the model was loaded"):
        main(
            settings(model, tmp_path, [tmp_path / "x.jsonl"], f"trainer.export_path={tmp_path}/file/exports"),
            LoadsNoModel,
        )
