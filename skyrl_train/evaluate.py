"""Evaluation: the validation prompts played once with the evaluation's own sampling, nothing learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skyrl_train.config import SkyRLConfig
from skyrl_train.left_out import getter_of
from skyrl_train.prompts import PromptRows
from skyrl_train.rollout.round import Round, RoundPlayer
from skyrl_train.rollout.sampling import sampling_params
from skyrl_train.run.metrics import dump_eval_results, eval_metrics
from skyrl_train.run.run import Run
from skyrl_train.types import Group

__getattr__ = getter_of(__name__)


@dataclass
class Evaluator:
    """Plays the same episodes each time: their seeds depend on the prompt and on trainer.seed, not on the step.

    The same weights earn the same, bit for bit on the same machine, where the environment does its part: episodes take
    their turns together, and the engine computes each such round apart from all else. An episode that fails and is
    played again is missing in the turns of the others, which rounding may then change: a warning says so.
    """

    config: SkyRLConfig
    prompts: PromptRows
    collector: RoundPlayer
    run: Run
    decode: Callable[[list[int]], str]

    async def evaluate(self, global_step: int | None) -> dict[str, float]:
        """Return the metrics after this step; None: of a run that only evaluates."""
        generator, trainer = self.config.generator, self.config.trainer
        samples_per_prompt = generator.eval_n_samples_per_prompt
        groups: list[Group] = []
        on_episode = self.run.phase("eval", len(self.prompts) * samples_per_prompt, "episodes")
        sampling = sampling_params(generator.eval_sampling_params)
        for prompts in self.prompts.batches(trainer.eval_batch_size):
            this_round = Round("eval", 0, prompts, samples_per_prompt, sampling, reproducible=True)
            groups += await self.collector.collect(this_round, on_episode)
        self.run.keep("eval", global_step or 0, groups)
        metrics = eval_metrics(groups) | {"eval/all/num_dropped_prompts": float(self.prompts.num_dropped)}
        if trainer.dump_eval_results:
            dump_eval_results(trainer.export_path, groups, metrics, global_step, self.decode)
        return metrics
