"""`--env ENV`: the data set is made if it is missing, and the user's keys win over those of the recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integrations.openenv.catalog import CATALOG, catalog_entry
from integrations.openenv.entrypoints.main_openenv import OpenEnvRunConfig
from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from integrations.openenv.recipe import data_folder, made_for, recipe, value_of, with_recipe
from skyrl_train.config import load_config

ROOT = Path(__file__).parents[3]
CPU = "trainer.device=cpu"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_data_set_is_made_once_and_named_in_the_keys(home):
    keys = with_recipe(["--env", "echo-env", CPU])
    folder = home / "data" / "openenv" / "echo_env"
    assert made_for(folder) == ["echo_env"]
    assert value_of("data.train_data", keys) == f"['{folder}/train.parquet']"
    written = (folder / "train.parquet").stat().st_mtime_ns
    with_recipe(["--env", "echo_env", CPU])
    assert (folder / "train.parquet").stat().st_mtime_ns == written


def test_no_data_set_is_made_where_the_user_names_both_files(home):
    with_recipe(["--env", "echo_env", CPU, "data.train_data=[a]", "data.val_data=[]"])
    assert list(home.iterdir()) == []


def test_the_shared_folder_is_taken_if_it_is_this_environments(home):
    shared = home / "data" / "openenv"
    rows, _ = dataset_rows("echo_env", 2, 0, seed=0)
    write_parquet(rows, shared / "train.parquet")
    assert data_folder(catalog_entry("echo_env")) == shared
    assert data_folder(catalog_entry("coding_env")) == shared / "coding_env"


def test_a_data_set_of_another_environment_is_refused(home):
    rows, _ = dataset_rows("echo_env", 2, 0, seed=0)
    write_parquet(rows, home / "mine" / "train.parquet")
    with pytest.raises(ValueError, match="holds tasks for echo_env, not for coding_env"):
        data_folder(catalog_entry("coding_env"), str(home / "mine"))


@pytest.mark.parametrize("name", [*CATALOG, "a.b:c"])
@pytest.mark.parametrize(("num_gpus", "on_cpu"), [(0, True), (2, True), (6, False)])
def test_every_recipe_is_accepted_and_exports_stay_in_the_runs_folder(home, name, num_gpus, on_cpu):
    keys = [*recipe(catalog_entry(name), home / "it's here", num_gpus, on_cpu=on_cpu), "trainer.ckpt_path='~/a run'"]
    if name == "a.b:c":
        assert "environment.openenv.env_names=['a.b:c']" in keys
    config = load_config(keys, OpenEnvRunConfig)
    assert (config.trainer.ckpt_path, config.trainer.export_path) == (f"{home}/a run", f"{home}/a run/exports")
    assert config.trainer.train_batch_size == max(4, num_gpus)
    assert config.trainer.placement.policy_num_gpus_per_node == max(1, num_gpus)
    assert (config.trainer.strategy, config.trainer.device) == (
        "fsdp2" if num_gpus > 1 else "single", "cpu" if on_cpu else "cuda",
    )  # fmt: skip
    assert config.generator.n_samples_per_prompt == 8
    assert (config.trainer.gradient_checkpointing is False) == on_cpu  # on a GPU the memory plan decides


def test_the_users_keys_come_last_and_a_wrong_one_is_refused_with_the_command_as_it_was_typed(home):
    words = ["-m", "skyrl_train", "train", "--env", "echo_env", CPU, "trainer.seed=1", "trainer.lerning_rate=3"]
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("refused: trainer.lerning_rate is not a key")
    assert done.stderr.rstrip().endswith("-m skyrl_train train --env echo_env trainer.device=cpu trainer.seed=1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--env", "eco_env"], "unknown env_name='eco_env'"),
        (["--env", "echo_env", "--gpus", "-1"], "must not be negative"),
        (["--env", "./nowhere"], "there is no folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(home, words, says):
    with pytest.raises(ValueError, match=says):
        with_recipe(words)
    assert list(home.iterdir()) == []
