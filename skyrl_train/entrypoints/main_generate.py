"""`python -m skyrl_train.entrypoints.main_generate key=value ...`: evaluate the policy as it is, learn nothing."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from skyrl_train.config.load import refused_later
from skyrl_train.config.problems import Problem
from skyrl_train.entrypoints.main_base import BasePPOExp, main

if TYPE_CHECKING:
    from skyrl_train.cluster.placement import Placement
    from skyrl_train.prompts import PromptRows
    from skyrl_train.run.run import Run

__all__ = ["EvalOnlyEntrypoint"]

NOT_FOR_ONE_ENGINE = ("generator.backend", "generator.num_inference_engines")


class EvalOnlyEntrypoint(BasePPOExp):
    """Plays the validation prompts once. There is no training data, no learner and no optimizer state."""

    def get_placement(self) -> Placement:
        """Return the placement of one engine in this process; how ranks would share devices does not matter."""
        from skyrl_train.cluster.placement import in_this_process, resources_here

        generator = self.cfg.generator
        if generator.backend != "torch" or generator.num_inference_engines > 1:
            says = (
                "is not possible in evaluation alone, for no learner is there to give engines of other processes the "
            )
            says += "weights; use generator.backend=torch with one engine"
            problem = Problem("generator.backend", generator.backend, says, drops=NOT_FOR_ONE_ENGINE)
            raise refused_later(problem, type(self.cfg))
        return in_this_process(resources_here(), on_gpu=self.device.type == "cuda")

    def get_train_dataset(self) -> None:
        return None

    def get_eval_dataset(self) -> PromptRows:
        if not self.cfg.data.val_data:
            raise ValueError("data.val_data=[] is empty: there is nothing to evaluate; give at least one file")
        return self._dataset(self.cfg.data.val_data)

    async def run(self) -> dict[str, float]:
        """Evaluate, log the metrics at step 0, and return them. Files stand under dumped_evals/eval_only."""
        from pathlib import Path

        from skyrl_train.run.run import Run, environment_of, run_info

        assert self.eval_dataset is not None
        environment = environment_of(self.eval_dataset)
        device = f"{self.device}, {str(self.compute_dtype).removeprefix('torch.')}"
        info = run_info(self.cfg, Path(self.model_path).name, environment, device, 0)
        with Run.open(self.cfg, self.tokenizer, info, self.get_contents()) as run:
            metrics = await self._evaluate(run)
            run.finish()
        return metrics

    async def _evaluate(self, run: Run) -> dict[str, float]:
        from skyrl_train import compute
        from skyrl_train.evaluate import Evaluator

        assert self.eval_dataset is not None
        try:
            policy = await asyncio.wrap_future(compute.submit(self.get_policy))
            engine = self.get_engine(policy)
            try:
                episodes = self.get_episodes(engine)
                evaluator = Evaluator(self.cfg, self.eval_dataset, episodes, run, self.decode)
                metrics = await evaluator.evaluate(None)
                run.log(0, metrics)
                episodes.close()
                return metrics
            finally:
                await engine.close()
        finally:
            await self.closed()


if __name__ == "__main__":
    sys.exit(main(experiment=EvalOnlyEntrypoint))
