"""kill -9 at any moment, the same command again: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skyrl_gym.envs import deregister, register
from skyrl_train.learner.saved import SavedLearner
from skyrl_train.run.checkpoint import Checkpoints
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.fakes import EvenEnv
from tests.tiny_models import save_tiny_model

NUM_STEPS = 6
CONTEXT = multiprocessing.get_context("forkserver")  # see conftest.py: children have everything imported


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with a tiny model and tiny data."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny_model(folder / "model")
    for split, num in (("train", 2 * NUM_STEPS), ("validation", 2)):
        lines = [json.dumps({"prompt": [{"role": "user", "content": f"task {i}"}]}) for i in range(num)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def arguments(given: Path, run_folder: Path, *, deterministic: bool) -> list[str]:
    return [
        f"data.train_data=['{given}/train.jsonl']",
        f"data.val_data=['{given}/validation.jsonl']",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={run_folder}",
        f"trainer.export_path={run_folder}/exports",
        f"trainer.deterministic={str(deterministic).lower()}",
        "trainer.device=cpu",
        "environment.env_class=even",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=1",
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.policy.optimizer_config.scheduler=cosine",
        "trainer.ckpt_interval=1",
        "trainer.max_ckpts_to_keep=2",
        "trainer.eval_interval=3",
        "generator.n_samples_per_prompt=4",
        "generator.max_turns=2",
        "generator.sampling_params.max_generate_length=8",
    ]


def run_to_its_end(args: list[str], log: Path) -> None:
    """Main function of the child process, which writes its output to `log`."""
    from skyrl_train.entrypoints.main_base import main

    register("even", EvenEnv)
    with log.open("a") as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        sys.exit(main(args))


def start(given: Path, run_folder: Path, *, deterministic: bool) -> multiprocessing.process.BaseProcess:
    args = arguments(given, run_folder, deterministic=deterministic)
    child = CONTEXT.Process(target=run_to_its_end, args=(args, given / "log.txt"))
    child.start()
    return child


def finish(given: Path, run_folder: Path, *, deterministic: bool) -> None:
    child = start(given, run_folder, deterministic=deterministic)
    child.join(500)
    assert child.exitcode == 0, (given / "log.txt").read_text()[-3000:]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Everything with numbers in the last checkpoint: weights, both moments of Adam, step counts."""
    step, _ = Checkpoints(run_folder).load(NUM_STEPS)
    assert step == NUM_STEPS
    saved = SavedLearner(run_folder / f"global_step_{NUM_STEPS}/policy")
    steps = {name: torch.tensor(count) for name, count in saved.plain["optimizer"]["steps"].items()}
    return {name: saved.whole(name) for name in saved.shapes} | steps


def assert_every_step_and_prompt_is_there_once(run_folder: Path) -> None:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(NUM_STEPS + 1))
    played = Counter(
        episode.uid for path in trajectory_files(run_folder, "train").values() for episode in read_trajectories(path)
    )
    assert played == {str(uid): 4 for uid in range(2 * NUM_STEPS)}


@pytest.fixture(scope="module")
def unbroken(given, tmp_path_factory) -> tuple[dict[str, torch.Tensor], Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(given, folder / "run", deterministic=True)
    return weights(folder / "run"), folder / "run"


def is_killed_at_work(given: Path, run_folder: Path, step: int, part: float, *, deterministic: bool) -> bool:
    """Start a run and kill it in this part of the step behind this one (-1: before the first). Return if it was alive.

    How long a step takes, the last one tells: the machine may be busier than it was a minute ago.
    """
    child = start(given, run_folder, deterministic=deterministic)
    while child.is_alive() and last_step(run_folder) < step:
        time.sleep(0.01)
    lines = read_metrics(run_folder / "metrics.jsonl")
    time.sleep(part * max([line["timing/step"] for line in lines if "timing/step" in line][-1:], default=0.5))
    was_alive = child.is_alive()
    child.kill()
    child.join()
    return was_alive


def last_step(run_folder: Path) -> int:
    return max((line["step"] for line in read_metrics(run_folder / "metrics.jsonl")), default=-1)


@pytest.mark.timeout(900)
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_weights(given, unbroken, tmp_path):
    """Five runs, each killed twice: the second time while it goes on where the first kill left it."""
    expected, _ = unbroken
    moments = random.Random(7)
    kills_in_mid_run = 0
    for trial in range(5):
        folder = tmp_path / str(trial)
        for step in sorted(moments.sample(range(-1, NUM_STEPS - 1), 2)):
            part = moments.uniform(0, 1)
            kills_in_mid_run += is_killed_at_work(given, folder, step, part, deterministic=True) and step >= 0
        finish(given, folder, deterministic=True)
        got = weights(folder)
        assert got.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(got[name], expected[name])]
        assert different == [], f"trial {trial}"
        assert_every_step_and_prompt_is_there_once(folder)
    assert kills_in_mid_run >= 3, "the kills hit too few runs at work to show anything"


def test_training_moved_the_weights_at_all(given, unbroken):
    """Else the test above would compare nothing."""
    _, folder = unbroken
    lines = read_metrics(folder / "metrics.jsonl")
    assert lines[-1]["policy/policy_version"] == 2 * NUM_STEPS
    assert all(line["policy/grad_norm"] > 0.01 for line in lines[1:])


def test_another_seed_ends_with_other_weights(given, unbroken, tmp_path):
    args = [*arguments(given, tmp_path / "run", deterministic=True), "trainer.seed=1"]
    child = CONTEXT.Process(target=run_to_its_end, args=(args, given / "log.txt"))
    child.start()
    child.join(500)
    got = weights(tmp_path / "run")
    assert any(not torch.equal(got[name], tensor) for name, tensor in unbroken[0].items())


def test_in_the_default_mode_no_prompt_is_lost_or_trained_twice(given, tmp_path):
    moments = random.Random(8)
    for step in (0, 1, 4):
        is_killed_at_work(given, tmp_path / "run", step, moments.uniform(0, 1), deterministic=False)
    finish(given, tmp_path / "run", deterministic=False)
    assert_every_step_and_prompt_is_there_once(tmp_path / "run")


@pytest.fixture
def even() -> Iterator[None]:
    """The environment of the data, known in this process too."""
    register("even", EvenEnv)
    yield
    deregister("even")


@pytest.mark.usefixtures("even")
def test_a_finished_run_says_so_and_one_with_other_settings_is_refused(given, unbroken, capfd):
    from skyrl_train.entrypoints.main_base import main

    _, folder = unbroken
    args = arguments(given, folder, deterministic=True)
    assert main(args) == 0
    assert "this run is complete: 6 of 6 steps" in capfd.readouterr().out
    assert main([*args, "trainer.policy.optimizer_config.lr=1e-4"]) == 2
    assert "trainer.policy.optimizer_config.lr: was 0.001, is now 0.0001" in capfd.readouterr().err
