"""A run whose engine dies ends with one clear message, wherever it is noticed: in a rollout, a push, a user's code."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engine.base import Engine, Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from skyrl_train.generators.base import GeneratorInterface
from skyrl_train.policy.model import Policy


class BreaksInStep(BasePPOExp):
    """Its engine meets an error of its own in the tenth step."""

    def get_engine(self, policy: Policy) -> Engine:
        engine = super().get_engine(policy)
        assert isinstance(engine, TorchEngine)
        step = engine._scheduler.step

        def breaks() -> Any:
            if engine.stats().steps >= 10:
                raise ZeroDivisionError("no room between two tokens")
            return step()

        engine._scheduler.step = breaks
        return engine


class BreaksInPush(BasePPOExp):
    """Its engine cannot take the weights of the first update."""

    def get_engine(self, policy: Policy) -> Engine:
        engine = super().get_engine(policy)
        assert isinstance(engine, TorchEngine)
        take = engine._scheduler.weights_changed

        def breaks(policy_version: int) -> None:
            if policy_version:
                raise MemoryError("no memory for the packed weights")
            take(policy_version)

        engine._scheduler.weights_changed = breaks
        return engine


class AsksInAHook(BreaksInStep):
    """Asks the engine itself, in a task group of the user's own."""

    def get_engine(self, policy: Policy) -> Engine:
        self.engine = super().get_engine(policy)
        return self.engine

    async def shape_rewards(self, groups: Any) -> Any:
        async with asyncio.TaskGroup() as asking:
            for i in range(2):
                wanted = SamplingParams(max_tokens=40, min_tokens=40)
                asking.create_task(self.engine.generate(Request([1, 2], wanted, f"teacher {i}")))
        return groups


class PaysNothing(GeneratorInterface):
    """Takes every error of the engine for an environment that broke."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def generate(self, input_batch: Any) -> Any:
        num = len(input_batch["prompts"])
        with contextlib.suppress(RuntimeError):
            await self.client.generate({"prompts": input_batch["prompts"]})
        return {
            "prompt_token_ids": [[1, 2]] * num,
            "response_ids": [[3]] * num,
            "rewards": [0.0] * num,
            "loss_masks": [[1]] * num,
            "stop_reasons": ["env_failure"] * num,
            "rollout_logprobs": [[-0.1]] * num,
        }


class OwnGenerator(BreaksInStep):
    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> GeneratorInterface:
        return PaysNothing(inference_engine_client)


def arguments(given: Path, run: Path) -> list[str]:
    return [
        f"data.train_data=['{given}/data.jsonl']",
        "data.val_data=[]",
        f"trainer.policy.model.path={given}/model",
        f"trainer.ckpt_path={run}",
        f"trainer.export_path={run}/exports",
        "trainer.ckpt_interval=1",
        "trainer.device=cpu",
        "environment.env_class=even",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "generator.n_samples_per_prompt=2",
        "generator.sampling_params.max_generate_length=20",
        "generator.sampling_params.min_tokens=20",
    ]


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        (
            BreaksInStep,
            "stopped: the engine died of ZeroDivisionError: no room between two tokens (test_dead_engine.py",
        ),
        (
            BreaksInPush,
            "stopped: the weights of policy version 1 did not reach the engine, which samples nothing more: the engine "
            "died of MemoryError: no memory for the packed weights",
        ),
        (AsksInAHook, "stopped: the engine died of ZeroDivisionError: no room between two tokens"),
        (OwnGenerator, "stopped: the engine died of ZeroDivisionError: no room between two tokens"),
    ],
)
def test_a_run_with_a_dead_engine_stops_with_one_message(given, tmp_path, capfd, experiment, says):
    assert main(arguments(given, tmp_path), experiment) == 1
    said = capfd.readouterr().err
    assert says in said
    assert "the same command begins again" in said
    assert "Traceback" not in said
    assert "ExceptionGroup" not in said
    assert "episodes of a round failed" not in said
    assert "is played again" not in said
