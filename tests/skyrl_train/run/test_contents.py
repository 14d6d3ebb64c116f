"""A run goes on with the data, the models and the template that it began with, wherever they lie, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.checkpoint import Checkpoints
from skyrl_train.run.contents import changed_contents, model_contents, prompt_contents
from skyrl_train.types import Prompt
from tests.fakes import EvenEnv
from tests.tiny_models import CHATML, save_tiny_model

ROWS = [{"prompt": [{"role": "user", "content": f"task {i}"}], "answer": i} for i in range(4)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(given: Path, *more: str) -> int:
    """Two steps an epoch, with a KL from a reference policy of its own folder."""
    return main(
        [
            f"data.train_data=['{given}/train.jsonl']",
            f"data.val_data=['{given}/validation.jsonl']",
            f"trainer.policy.model.path={given}/model",
            f"trainer.ref.model.path={given}/reference",
            f"generator.chat_template.name_or_path={given}/template.jinja",
            "generator.chat_template.source=file",
            "trainer.algorithm.use_kl_loss=true",
            f"trainer.ckpt_path={given}/run",
            f"trainer.export_path={given}/exports",
            "trainer.eval_before_train=false",
            "trainer.device=cpu",
            "environment.env_class=even",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=2",
            "trainer.ckpt_interval=2",
            "generator.n_samples_per_prompt=2",
            "generator.sampling_params.max_generate_length=4",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """The files of a run and the run, of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "validation.jsonl", ROWS[:2])
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "reference")
    (folder / "template.jinja").write_text(CHATML)
    register("even", EvenEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train(folder) == 0
    yield folder
    torch.set_num_threads(threads)
    skyrl_gym.envs.deregister("even")


@pytest.fixture
def run(finished, tmp_path):
    """The same, put back afterwards."""
    shutil.copytree(finished, tmp_path / "kept")
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(tmp_path / "kept", finished)


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def times(folder: Path) -> dict[Path, int]:
    """Return when each file was written, except for the lock, which every start writes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a row more", lambda f: write_rows(f / "train.jsonl", [*ROWS, ROWS[0]]), "data.train_data: 4 rows then, 5 now"),
    ("a row less", lambda f: write_rows(f / "train.jsonl", ROWS[:3]), "data.train_data: 4 rows then, 3 now"),
    ("another order", lambda f: write_rows(f / "train.jsonl", ROWS[::-1]), "data.train_data: their digest differs"),
    (
        "another answer",
        lambda f: write_rows(f / "train.jsonl", [*ROWS[:3], ROWS[3] | {"answer": 7}]),
        "data.train_data: their digest differs",
    ),
    (
        "another model",
        lambda f: other_weights(f / "model"),
        "trainer.policy.model.path: model.safetensors differs",
    ),
    (
        "another tokenizer",
        lambda f: (f / "model/tokenizer_config.json").write_text(
            (f / "model/tokenizer_config.json").read_text().replace("{", "{ ", 1)
        ),
        "trainer.policy.model.path: tokenizer_config.json differs",
    ),
    (
        "another reference",
        lambda f: other_weights(f / "reference"),
        "trainer.ref.model.path: model.safetensors differs",
    ),
    (
        "another template",
        lambda f: (f / "template.jinja").write_text((f / "template.jinja").read_text() + "\n"),
        "generator.chat_template.name_or_path: template differs",
    ),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_other_content_under_the_same_path_is_refused_by_name(run, change, words, capfd):
    change(run)
    before = times(run / "run")
    assert train(run, "trainer.epochs=2") == 2
    said = capfd.readouterr().err
    assert words in said
    assert "refused: the checkpoint belongs to a run on other files" in said
    assert times(run / "run") == before


def test_the_same_content_in_other_places_and_another_format_goes_on(run):
    elsewhere = run / "elsewhere"
    elsewhere.mkdir()
    for name in ("model", "reference", "template.jinja"):
        (run / name).rename(elsewhere / name)
    pandas.DataFrame(ROWS).to_parquet(elsewhere / "train.parquet")
    (elsewhere / "model/README.md").write_text("no part of the model")
    settings = [
        f"data.train_data=['{elsewhere}/train.parquet']",
        f"trainer.policy.model.path={elsewhere}/model",
        f"trainer.ref.model.path={elsewhere}/reference",
        f"generator.chat_template.name_or_path={elsewhere}/template.jinja",
    ]
    assert train(run, *settings, "trainer.epochs=2") == 0
    assert Checkpoints(run / "run").latest() == 4


def test_other_validation_rows_are_said_and_do_not_end_the_run(run, capfd):
    write_rows(run / "validation.jsonl", ROWS[1:])
    assert train(run, "trainer.epochs=2") == 0
    assert "data.val_data is not what it was" in capfd.readouterr().out
    assert Checkpoints(run / "run").latest() == 4


def test_rows_have_one_digest_whatever_their_values_and_each_value_counts():
    def contents(extras: dict, env_class: str = "even") -> dict[str, str]:
        return prompt_contents([Prompt("0", [{"role": "user", "content": "\ud800 ☃"}], env_class, extras)])

    class Thing:
        """Its repr names its place in memory."""

    values = [1, 1.0, "1", True, None, [1], {"a": 1}, b"1", {"b": {1, 2}}, float("nan"), "\ud800"]
    digests = [contents({"x": value})["their digest"] for value in values]
    assert digests == [contents({"x": value})["their digest"] for value in values]
    assert contents({"x": Thing()}) == contents({"x": Thing()})
    assert len({*digests, contents({"x": 1}, "odd")["their digest"]}) == len(values) + 1


def test_files_of_a_model_that_are_new_or_gone_are_named(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md", "LICENSE.txt", ".hidden.json"):
        (tmp_path / name).write_text(name)
    before = model_contents(tmp_path)
    assert sorted(before) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "generation_config.json").write_text("{}")
    assert changed_contents({"model": before}, {"model": model_contents(tmp_path)}) == {
        "model": "config.json is missing; generation_config.json is new"
    }
