"""A warm start: a model that cannot write an action imitates conversations first, and then learns which one pays."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.registration import deregister, register
from skyrl_train.entrypoints.main_base import main
from skyrl_train.run.metrics import read_metrics
from tests.tiny_models import save_tiny_model

LEVERS = "ABCD"


class LeverEnv(BaseTextEnv):
    """Pays 1 for `<pull>C</pull>`; a reply that is not of this form pulls nothing."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        return {"observations": [], "reward": float(action == "<pull>C</pull>"), "done": True, "metadata": {}}


@pytest.fixture(scope="module")
def levers(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A folder with a random model, prompts, and conversations that pull every lever equally often."""
    folder = tmp_path_factory.mktemp("levers")
    save_tiny_model(folder / "model")
    prompts = [[{"role": "user", "content": f"{i}"}] for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    rows = [{"prompt": prompt, "response": f"<pull>{lever}</pull>"} for prompt in prompts for lever in LEVERS]
    (folder / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register("levers", LeverEnv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)
    deregister("levers")


def settings_of(folder: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data.train_data=['{folder}/prompts.jsonl']",
        f"data.val_data=['{folder}/prompts.jsonl']",
        f"trainer.policy.model.path={folder}/model",
        f"trainer.ckpt_path={run}",
        "trainer.device=cpu",
        "trainer.bf16=false",
        "environment.env_class=levers",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4",
        "trainer.eval_interval=1000",
        "trainer.ckpt_interval=-1",
        "trainer.epochs=6",
        "trainer.dump_eval_results=false",
        "trainer.algorithm.use_kl_loss=false",
        "trainer.policy.optimizer_config.lr=3e-3",
        "generator.n_samples_per_prompt=8",
        "generator.sampling_params.max_generate_length=20",
        *more,
    ]


SFT = ("trainer.sft.batch_size=16", "trainer.sft.lr=1e-2", "trainer.sft.epochs=12")


def evaluations(run: Path) -> list[float]:
    return [line["eval/all/avg_score"] for line in read_metrics(run / "metrics.jsonl") if "eval/all/avg_score" in line]


def test_imitation_gives_the_form_and_rl_the_lever_that_pays(levers: Path, tmp_path: Path) -> None:
    """Greedy evaluations: before, after imitation, after RL. RL alone gets as many steps and never sees a reward.

    Where every lever is equally likely and all else is certain, a token costs ln(4) / 15 = 0.092: one of the 15 tokens
    of `<pull>C</pull>` and its end is free.
    """
    both, alone, shown = tmp_path / "both", tmp_path / "alone", f"trainer.sft.data=['{levers}/shown.jsonl']"
    saved = ("trainer.ckpt_interval=10", "trainer.max_ckpts_to_keep=-1")
    begun = time.monotonic()
    assert main(settings_of(levers, both, shown, *SFT, *saved)) == 0
    lines = read_metrics(both / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(37))
    assert lines[1]["sft/loss"] > 5.0  # about ln 258 = 5.55
    assert lines[24]["sft/loss"] < 0.13
    assert all("sft/loss" not in line and "reward/avg_raw_reward" in line for line in lines[25:])
    assert [line["trainer/epoch"] for line in lines[23:30]] == [0, 0, 0, 0, 1, 1, 2]
    before, imitated, after = evaluations(both)
    assert before == 0.0
    assert imitated < 0.9 <= after
    took = time.monotonic() - begun
    assert main(settings_of(levers, alone, "trainer.epochs=18")) == 0
    assert evaluations(alone) == [0.0, 0.0]
    assert len(read_metrics(alone / "metrics.jsonl")) == 37
    print(f"imitation and RL {took:.1f} s: {before} -> {imitated} -> {after}")

    # gone on with from the middle of the imitation, it is the same run
    resumed, start = (
        tmp_path / "resumed",
        ("trainer.resume_mode=from_path", f"trainer.resume_path={both}/global_step_20"),
    )
    assert main(settings_of(levers, resumed, shown, *SFT, *saved, *start)) == 0
    again = read_metrics(resumed / "metrics.jsonl")
    assert [line["step"] for line in again] == list(range(21, 37))
    for key in ("sft/loss", "reward/avg_raw_reward", "policy/grad_norm", "policy/policy_version"):
        assert [line.get(key) for line in again] == [line.get(key) for line in lines[21:]], key


def test_the_kl_is_measured_from_the_policy_that_has_imitated(levers: Path, tmp_path: Path) -> None:
    """Against the random model it would be ln 258 a token and more."""
    shown = f"trainer.sft.data=['{levers}/shown.jsonl']"
    kl = ("trainer.algorithm.use_kl_loss=true", "trainer.epochs=1", "trainer.eval_interval=-1")
    assert main(settings_of(levers, tmp_path, shown, *SFT, *kl)) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-2]["policy/policy_kl"] == 0.0  # the first step of RL
    assert 0.0 < lines[-1]["policy/policy_kl"] < 1.0


def test_a_teacher_that_knows_the_lever_is_enough_without_any_reward(levers: Path, tmp_path: Path) -> None:
    """The teacher imitates lever C alone; its student, which pulls all four, follows its logprobs alone."""
    (levers / "right.jsonl").write_text(json.dumps({"prompt": "7", "response": "<pull>C</pull>"}) + "\n")
    shown = [f"trainer.sft.data=['{levers}/{name}.jsonl']" for name in ("right", "shown")]
    export = ("trainer.hf_save_interval=1000", f"trainer.export_path={tmp_path}/exports", "trainer.sft.epochs=30")
    one_step = ("trainer.epochs=1", "trainer.train_batch_size=8", "trainer.eval_interval=-1")
    lr = ("trainer.policy.optimizer_config.lr=1e-9",)
    assert main(settings_of(levers, tmp_path / "teacher", shown[0], *SFT, *export, *one_step, *lr)) == 0
    [teacher] = sorted((tmp_path / "exports").glob("global_step_31/policy"))
    distill = ("trainer.algorithm.advantage_estimator=distillation", f"trainer.ref.model.path={teacher}")
    run = tmp_path / "student"
    assert main(settings_of(levers, run, shown[1], *SFT, *distill)) == 0
    _, imitated, after = evaluations(run)
    gaps = [line["loss/reverse_kl"] for line in read_metrics(run / "metrics.jsonl") if "loss/reverse_kl" in line]
    print(f"distilled: {imitated} -> {after}, reverse KL {gaps[0]:.3f} -> {gaps[-1]:.3f}")
    assert imitated < 0.9 <= after
    assert gaps[0] > 0.2
    assert abs(gaps[-1]) < gaps[0] / 3


def test_a_teacher_with_other_tokens_is_refused(levers: Path, tmp_path: Path, capsys) -> None:
    other = save_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    distill = ("trainer.algorithm.advantage_estimator=distillation", f"trainer.ref.model.path={other}")
    assert main(settings_of(levers, tmp_path / "run", *distill)) == 2
    assert "2 of the policy's 258 tokens are others there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["trainer.sft.data=['{folder}/none.jsonl']"], "there is no file"),
        (["trainer.sft.data=['{folder}/prompts.jsonl']"], "(trainer.sft.data) has no"),
        (["trainer.sft.lr=1e-4"], "trainer.sft.lr=0.0001 has no effect without trainer.sft.data"),
        (
            ["trainer.sft.data=['{folder}/shown.jsonl']", "trainer.sft.epochs=0"],
            "trainer.sft.epochs=0 must be at least 1",
        ),
    ],
)
def test_what_cannot_be_imitated_is_refused_with_status_2(levers, tmp_path, capsys, settings, says) -> None:
    given = [setting.format(folder=levers) for setting in settings]
    assert main(settings_of(levers, tmp_path / "run", *given)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
