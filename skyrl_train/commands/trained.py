"""The parts that play with a trained model, without data or a learner: tokenizer, template, policy, engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skyrl_train.commands.sources import Source, configuration
from skyrl_train.entrypoints.rollout_parts import RolloutParts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from skyrl_train.engine.base import Engine
    from skyrl_train.policy.memory_plan import MemoryPlan
    from skyrl_train.policy.model import Policy
    from skyrl_train.rollout.chat import ChatTemplate

MAX_CONTEXT = 4096  # tokens of a conversation, unless the model's context ends before


class TrainedModel(RolloutParts):
    """Takes the policy from a Source. Nothing is trained, so there is no plan of a GPU's memory."""

    source: Source

    def get_memory_plan(self) -> MemoryPlan | None:
        return None

    def get_policy(self) -> Policy:
        if self.source.saved is None:
            return super().get_policy()
        from skyrl_train.ops import prepare
        from skyrl_train.policy.model import wrap_module
        from skyrl_train.run.model_folder import trained_module

        prepare(self.device, self.compute_dtype)
        module = trained_module(self.source.saved, self.compute_dtype)
        return wrap_module(module.to(self.device), max_length=self.max_length)


class Talker(TrainedModel):
    """A trained model that answers conversations of any number of turns."""

    def __init__(self, source: Source, keys: Iterable[str] = ()) -> None:
        """ValueError if the model cannot be read, or its template cannot be continued turn by turn."""
        self.source, self.memory = source, None
        turns = ["generator.max_turns=null", "generator.use_conversation_multi_turn=true", "generator.batched=false"]
        self.cfg = configuration(source, [*turns, *keys])
        self.device, self.compute_dtype = self.get_device()
        self.placement = self.get_placement()
        self.model_path = self.get_model_path()
        self.num_embeddings = self.get_num_embeddings()
        self.tokenizer = self.get_tokenizer()
        self.chat_template: ChatTemplate = self.get_chat_template()
        self.fit_tokenizer()

    @property
    def max_length(self) -> int:
        return MAX_CONTEXT

    async def start(self) -> Engine:
        """Load the weights and return an engine that samples from them. Close it in the end."""
        import asyncio

        from skyrl_train import compute

        policy: Any = await asyncio.wrap_future(compute.submit(self.get_policy))
        return self.get_engine(policy)
