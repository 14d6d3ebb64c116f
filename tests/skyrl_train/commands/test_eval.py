"""`skyrl eval`: the numbers of the run's own evaluation, of any of its checkpoints, and several models in one table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from skyrl_train.commands import evaluate
from skyrl_train.commands.main import main
from skyrl_train.run.metrics import read_metrics
from tests.fakes import EvenEnv

SCORE = "eval/all/avg_score"
CPU = ["trainer.device=cpu"]


def test_a_run_is_evaluated_as_it_was_in_training_bit_for_bit(run, capsys):
    own = {line["step"]: line[SCORE] for line in read_metrics(run / "metrics.jsonl") if SCORE in line}
    assert main(["eval", str(run), "--before", "--json", *CPU]) == 0
    before, after = json.loads(capsys.readouterr().out)
    assert (before["step"], after["step"]) == (0, 2)
    assert before["metrics"][SCORE] == own[0]
    assert after["metrics"][SCORE] == own[2]
    assert own[0] != own[2]


def test_several_models_play_the_same_episodes_and_stand_in_one_table(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base = runs["full"].parent / "model"
    words = [str(runs["full"]), str(runs["lora"]), str(base)]
    assert main(["eval", *words, *CPU, "generator.eval_n_samples_per_prompt=2"]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if str(runs["full"].parent) in line]
    assert [row.split()[1] for row in rows] == words
    assert "reward" in shown
    own = read_metrics(runs["full"] / "metrics.jsonl")[0][SCORE]
    assert f"{own:.3f}" in rows[2]


def test_other_prompts_may_be_named(runs, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n")
    assert main(["eval", str(runs["full"]), f"data={tmp_path}/one.jsonl", "--json", *CPU]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["metrics"]["eval/all/avg_score"] == found["metrics"]["eval/unknown/avg_score"]


def test_an_environment_may_be_named_and_its_data_set_is_made(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["eval", str(runs["lora"]), "--env", "echo_env", "--json", *CPU, "environment.openenv.runtime=local"]
    assert main([*words, "generator.sampling_params.max_generate_length=8"]) == 0
    out = capsys.readouterr().out
    [found] = json.loads(out[out.index("[\n") :])
    assert found["metrics"]["eval/openenv_echo_env/avg_score"] == 0.0  # a random model does not echo
    assert (tmp_path / "data/openenv/echo_env/validation.parquet").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trainer.seed=1"], "name at least one run's folder or model"),
        (["./nowhere"], "./nowhere"),
        (["RUN", "--env", "eco_env"], "unknown env_name"),
        (["RUN", "data=./missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(runs, words, says, capsys):
    assert main(["eval", *(str(runs["full"]) if word == "RUN" else word for word in words), *CPU]) == 2
    refused = capsys.readouterr().err
    assert says in refused.splitlines()[-1]


def test_a_model_that_there_is_not_is_refused_before_another_one_plays(runs, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "metrics_of", lambda *_: pytest.fail("it played"))
    assert main(["eval", str(runs["full"]), "nowhere/", *CPU]) == 2
    assert "model 'nowhere/': there is no such folder" in capsys.readouterr().err


class Broken(EvenEnv):
    def step(self, action: str) -> Any:
        raise ConnectionError("the database is gone")


def test_an_evaluation_without_an_episode_ends_with_its_reason_and_no_traceback(runs, capsys):
    words = [str(runs["full"]), f"environment.env_class={__name__}:Broken", "generator.max_env_retries=0", *CPU]
    assert main(["eval", *words]) == 1
    printed = capsys.readouterr().err
    assert "skyrl eval: stopped: all 4 episodes of a round failed in their environments" in " ".join(printed.split())
    assert "Traceback" not in printed
