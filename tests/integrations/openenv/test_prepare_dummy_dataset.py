from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import load_dataset

from integrations.openenv import prepare_dummy_dataset
from integrations.openenv.catalog import CATALOG, catalog_entry
from integrations.openenv.entrypoints.main_openenv import OpenEnvRunConfig
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_train.config import load_config

COLUMNS = {"prompt", "env_class", "env_name", "data_source", "seed", "options", "reward_spec", "extra_info"}


def test_the_splits_share_no_task_and_the_seed_decides() -> None:
    train, validation = dataset_rows("echo_env", 200, 50, seed=1)
    assert len(train) == 200
    assert len(validation) == 50
    assert not {row["reward_spec"]["ground_truth"] for row in train} & {
        row["reward_spec"]["ground_truth"] for row in validation
    }
    assert dataset_rows("echo_env", 200, 50, seed=1) == (train, validation)
    assert dataset_rows("echo_env", 200, 50, seed=2) != (train, validation)
    assert dataset_rows("echo_env", 20, 50, seed=1)[1] == validation  # more training tasks, same validation


def test_the_tasks_are_the_same_wherever_the_folder_is_and_however_the_name_is_spelled(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "my_env" / "server").mkdir(parents=True)
        (tmp_path / place / "my_env" / "server" / "app.py").touch()
    here, there = (catalog_entry(str(tmp_path / place / "my_env")) for place in ("here", "there"))
    assert here.name != there.name
    assert here.seed_name == there.seed_name == "my_env"
    assert catalog_entry("http://127.0.0.1:8000").seed_name != catalog_entry("http://127.0.0.1:8001").seed_name
    spelled = [dataset_rows(name, 2, 1, seed=0)[0] for name in ("echo-env", "echo_env")]
    dashed, tdashed = ([(row["prompt"], row["seed"]) for row in rows] for rows in spelled)
    assert dashed == tdashed


def test_without_a_name_all_environments_share_the_files_which_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prepare", "--output_dir", str(tmp_path), "--num_train", "9", "--num_validation", "3"]
    monkeypatch.setattr(sys, "argv", command)
    prepare_dummy_dataset.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parquet", "validation.parquet"]
    names = pyarrow.parquet.read_table(tmp_path / "train.parquet")["env_name"].to_pylist()
    assert {name: names.count(name) for name in names} == dict.fromkeys(CATALOG, 9)
    made_for = f"openenv_env_names={','.join(sorted(CATALOG))}"
    assert made_for.encode() in (tmp_path / "train.parquet").read_bytes()


def test_a_mixture_has_turn_limits_of_its_own_and_says_how_to_train_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["echo_env", "openspiel_env"]
    chosen = [word for name in names for word in ("--env_name", name)]
    command = ["prepare", "--output_dir", str(tmp_path), *chosen, "--num_train", "4", "--num_validation", "2"]
    monkeypatch.setattr(sys, "argv", command)
    prepare_dummy_dataset.main()
    rows = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert {row["env_name"]: row["max_turns"] for row in rows} == {n: CATALOG[n].max_turns for n in names}
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert typed[:4] == ["uv", "run", "skyrl", "train"]
    config = load_config(typed[4:], OpenEnvRunConfig)
    assert config.data.train_data == [str(tmp_path / "train.parquet")]


def test_the_file_gives_back_plain_values(tmp_path: Path) -> None:
    _, rows = dataset_rows("coding_env", 1, 3, seed=0)
    prepare_dummy_dataset.write_parquet(rows, tmp_path / "v.parquet")
    read = load_dataset("parquet", data_files=str(tmp_path / "v.parquet"), split="train", cache_dir=str(tmp_path))
    assert list(read) == rows
    assert set(rows[0]) == COLUMNS


def test_an_unknown_environment_is_an_error_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", "--env_name", "chess"])
    with pytest.raises(SystemExit):
        prepare_dummy_dataset.main()
    assert "unknown env_name='chess' (known: echo_env, coding_env," in capsys.readouterr().err
