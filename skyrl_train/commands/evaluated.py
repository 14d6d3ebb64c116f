"""The experiment behind `skyrl eval`: the validation prompts of a configuration, played by the model of a Source."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from skyrl_train import compute
from skyrl_train.commands.experiments import entry_point, is_openenv
from skyrl_train.commands.sources import Source, configuration
from skyrl_train.commands.trained import TrainedModel
from skyrl_train.config.tree import to_flat_dict
from skyrl_train.entrypoints.main_generate import EvalOnlyEntrypoint
from skyrl_train.rollout.round import Round
from skyrl_train.rollout.sampling import sampling_params
from skyrl_train.run.metrics import eval_metrics
from skyrl_train.types import Group


class Evaluated(TrainedModel, EvalOnlyEntrypoint):
    """Plays what `Evaluator` plays, with the same seeds, and keeps nothing."""

    async def measure(self) -> dict[str, float]:
        """Return the metrics, `eval/...`."""
        assert self.eval_dataset is not None
        generator, trainer = self.cfg.generator, self.cfg.trainer
        sampling, samples_per_prompt = (
            sampling_params(generator.eval_sampling_params),
            generator.eval_n_samples_per_prompt,
        )
        groups: list[Group] = []
        try:
            policy = await asyncio.wrap_future(compute.submit(self.get_policy))
            engine = self.get_engine(policy)
            episodes = self.get_episodes(engine)
            try:
                for prompts in self.eval_dataset.batches(trainer.eval_batch_size):
                    this_round = Round("eval", 0, prompts, samples_per_prompt, sampling, reproducible=True)
                    groups += await episodes.collect(this_round)
            finally:
                episodes.close()
                await engine.close()
        finally:
            await self.closed()
        return eval_metrics(groups)


def evaluated(of: Source, keys: Sequence[str], shared: Mapping[str, Any] | None) -> Evaluated:
    """Return the experiment with which a source is evaluated. ValueError for settings or data that cannot be."""
    cfg = configuration(of, keys, shared)
    openenv = is_openenv(f"{key}={value}" for key, value in to_flat_dict(cfg).items())
    plain = entry_point(openenv=openenv).EXPERIMENT
    made = cast("type[Evaluated]", type("Evaluated", (Evaluated, plain), {"source": of}))
    return made(cfg)
