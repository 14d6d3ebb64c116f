"""A whole run on two learner ranks and two engines, through the real main: imitation first, then PPO with a critic.

An engine is killed and the run goes on; a rank is killed and the run ends; one process goes on where it ended.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from tests.skyrl_train.cluster.runs import (
    NUM_STEPS,
    TWO,
    family_after_step,
    imitating,
    nothing_is_left,
    start,
    title,
    write_given,
)

EVERY_PROMPT = Counter({str(uid): 4 for uid in range(2 * NUM_STEPS)})
pytest.importorskip("ray", reason="needs Ray: uv sync --inexact --extra cluster")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_given(tmp_path_factory.mktemp("given"))


def prompts_of(run_folder: Path, steps: range) -> Counter[str]:
    """Return how often each prompt was played in these steps."""
    files = trajectory_files(run_folder, "train")
    return Counter(episode.uid for step in steps for episode in read_trajectories(files[step]))


def settings(given: Path) -> list[str]:
    critic = ["trainer.algorithm.advantage_estimator=gae", f"trainer.critic.model.path={given}/model"]
    return [*imitating(given), *critic]


@pytest.fixture(scope="module")
def ended(given: Path) -> tuple[float, int, str, list[psutil.Process]]:
    """Kill an engine of a long run, and rank 1 two steps later.

    Return seconds to the end of the run, its status, its output and its processes.
    """
    process = start(given, *TWO, *settings(given), "trainer.epochs=1000")
    try:
        family = family_after_step(1, given / "run", process)
        [engine, _] = [child for child in family if title(child) == "ray::EngineActor"]
        engine.send_signal(signal.SIGKILL)
        step = read_metrics(given / "run" / "metrics.jsonl")[-1]["step"]
        family = family_after_step(int(step) + 2, given / "run", process)
        [_, victim] = [child for child in family if title(child) == "ray::LearnerRank"]
        victim.send_signal(signal.SIGKILL)
        began = time.monotonic()
        output, _ = process.communicate(timeout=400)
        return time.monotonic() - began, process.returncode, output, family
    finally:
        process.kill()


@pytest.mark.timeout(1200)
def test_a_dead_rank_ends_the_run_with_its_name_and_how_to_go_on_and_nothing_is_left(ended):
    seconds, status, output, family = ended
    assert seconds < 300  # the end of Ray and of the environments included
    assert status == 1
    assert " is replaced: engine " in output
    assert "stopped: learner rank " in output
    assert " of 2 (process " in output
    assert "the same command goes on after step" in output
    assert "Traceback" not in output
    assert nothing_is_left(family)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ended")
def test_one_process_goes_on_with_what_two_ranks_have_written(given):
    before = read_metrics(given / "run" / "metrics.jsonl")
    epochs = -(-(before[-1]["step"] - 1) // NUM_STEPS) + 1
    process = start(given, *settings(given), f"trainer.epochs={epochs}")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    assert "resuming after step" in output
    assert "order" in output  # of the sums, which is another now
    lines = read_metrics(given / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(epochs * NUM_STEPS + 2))
    for epoch in range(epochs):  # behind the step of imitation
        assert prompts_of(given / "run", range(epoch * NUM_STEPS + 2, (epoch + 1) * NUM_STEPS + 2)) == EVERY_PROMPT
    of_two = [line for line in lines if "weights/push_seconds" in line]
    assert 2 <= len(of_two) < len(lines)
    assert all(line["weights/max_logprob_difference"] < 1e-4 for line in of_two)
    assert all(line["policy/grad_norm"] > 0 for line in lines[1:])
    assert [line["step"] for line in lines if "sft/loss" in line] == [1]
    assert all(line["critic/grad_norm"] > 0 for line in lines[2:])
