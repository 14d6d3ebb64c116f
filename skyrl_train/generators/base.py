"""SkyRL's interface of a generator: what a custom one is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from skyrl_train.inference_engines.base import ConversationType

TrainingPhase = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class TrajectoryID:
    """The name of an episode: its prompt and its number among the prompt's episodes."""

    instance_id: str
    repetition_id: int

    def to_string(self) -> str:
        return f"{self.instance_id}_{self.repetition_id}"


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """The step and the phase that a batch is generated for."""

    global_step: int
    training_phase: TrainingPhase


class GeneratorInput(TypedDict):
    """One entry per episode; in training each prompt stands `generator.n_samples_per_prompt` times in a row."""

    prompts: list[ConversationType]
    env_classes: list[str]
    env_extras: list[dict[str, Any]] | None
    sampling_params: dict[str, Any] | None  # as vLLM names them: max_tokens, temperature, ...
    trajectory_ids: NotRequired[list[TrajectoryID] | None]
    batch_metadata: NotRequired[BatchMetadata | None]


class GeneratorOutput(TypedDict):
    """One entry per episode, in the order of the input; with `is_last_step` one per turn, those of an episode together.

    Response, loss mask, logprobs and token rewards of an entry have one length; the response holds observations, too.
    """

    prompt_token_ids: list[list[int]]
    response_ids: list[list[int]]
    rewards: list[float] | list[list[float]]
    loss_masks: list[list[int]]
    stop_reasons: NotRequired[list[str] | None]
    rollout_metrics: NotRequired[dict[str, Any] | None]
    rollout_logprobs: NotRequired[list[list[float]] | None]
    trajectory_ids: NotRequired[list[TrajectoryID] | None]
    is_last_step: NotRequired[list[bool] | None]


class GeneratorInterface(ABC):
    """Plays a batch of episodes. A subclass comes in through `BasePPOExp.get_generator`."""

    @abstractmethod
    async def generate(self, input_batch: GeneratorInput) -> GeneratorOutput:
        """Return one entry per episode of the input, in its order."""
