"""SkyRL's RayPPOTrainer as its users subclass it: what stands between episodes and batch, and the callbacks of a run.

The loop is trainer.py's. A subclass comes in through `BasePPOExp.get_trainer`; what nothing would call is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from skyrl_train.callbacks import CallbackInput, TrainingCallback, TrainingControl, check_callbacks
from skyrl_train.generators.base import GeneratorOutput
from skyrl_train.generators.generator_output import (
    WrongOutput,
    check_output,
    num_episodes_in,
    output_of,
    plain_output,
    with_output,
)
from skyrl_train.types import Group
from skyrl_train.vain_overrides import refuse_vain_overrides

ESTIMATOR = "register an advantage estimator (skyrl_train.utils.ppo_utils.register_advantage_estimator)"
LOSS = "register a policy loss (skyrl_train.utils.ppo_utils.register_policy_loss)"
GENERATOR = "return a GeneratorInterface of your own from get_generator of the experiment"
CALLBACK = "use a TrainingCallback (get_callbacks of the experiment)"
LOOP = "the loop is not to be replaced; " + CALLBACK + " or postprocess_generator_output"
# SkyRL's methods that nothing here calls, and what to do instead.
NEVER_CALLED: Mapping[str, str] = {
    "train": LOOP,
    "eval": CALLBACK + " with on_eval_start and on_eval_end",
    "generate": GENERATOR,
    "convert_to_training_input": "change the episodes in postprocess_generator_output",
    "fwd_logprobs_values_reward": "change rewards in postprocess_generator_output",
    "apply_reward_kl_penalty": "set trainer.algorithm.use_kl_in_reward=true, or " + ESTIMATOR,
    "compute_advantages_and_returns": ESTIMATOR,
    "train_critic_and_policy": LOSS,
    "_execute_training_step": LOSS,
    "handle_dynamic_sampling": "set trainer.algorithm.dynamic_sampling.type, or set loss_masks to 0 in "
    "postprocess_generator_output",
    "build_models": "override get_policy(), get_reference(policy) or get_learner(policy) of the experiment",
    "init_weight_sync_state": "the engine reads the learner's weights; drop the method",
    "sync_policy_weights_to_inference_engines": "the engine reads the learner's weights; drop the method",
    "save_checkpoints": CALLBACK + " with on_save",
    "load_checkpoints": "resuming is trainer.resume_mode; drop the method",
    "save_models": "exports are trainer.hf_save_interval; drop the method",
    "update_ref_with_policy": "set trainer.update_ref_every_epoch=true",
    "dump_data": "every episode is kept in the run folder; drop the method",
    "_normalize_advantages": "set trainer.algorithm.advantage_batch_normalize=true, or " + ESTIMATOR,
    "_build_train_dataloader_and_compute_training_steps": "override get_train_dataset() of the experiment; which rows "
    "a step plays follows from trainer.seed",
    "_remove_tail_data": "batches are whole; drop the method",
    "_cleanup_old_checkpoints": "set trainer.max_ckpts_to_keep",
    "_execute_forward_pass": "override get_learner(policy) of the experiment",
    "flush_pending_metrics": CALLBACK + " with on_log",
    "has_critic": "trainer.critic.model.path alone says it; drop the method",
    "pad_batch": "batches have no padding; drop the method",
}


class RayPPOTrainer:
    """Holds what SkyRL's trainer holds for its users, and is called at the same places."""

    def __init__(
        self,
        cfg: Any,
        tracker: Any,
        tokenizer: Any,
        train_dataset: Any,
        inference_engine_client: Any = None,
        generator: Any = None,
        colocate_pg: Any = None,
        eval_dataset: Any = None,
        callbacks: Iterable[TrainingCallback] = (),
    ) -> None:
        refuse_vain_overrides(type(self), RayPPOTrainer, NEVER_CALLED)
        self.cfg, self.tracker, self.tokenizer = cfg, tracker, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.inference_engine_client, self.generator, self.colocate_pg = inference_engine_client, generator, colocate_pg
        self.callbacks = check_callbacks(callbacks)
        self.control = TrainingControl()
        self.global_step = self.total_training_steps = 0
        self.all_metrics: dict[str, float] = {}  # what a subclass puts here is logged with the step
        self.all_timings: dict[str, float] = {}

    def postprocess_generator_output(self, generator_output: GeneratorOutput, uids: list[str]) -> GeneratorOutput:
        """Override it to change rewards or loss masks between the episodes and the batch; token ids stay as they are.

        It may be written with `async def`.
        `rewards` holds one number per response with generator.batched=true, else one per response token.
        """
        return generator_output

    async def shaped(self, groups: list[Group]) -> list[Group]:
        """Return the groups as `postprocess_generator_output` leaves them."""
        if type(self).postprocess_generator_output is RayPPOTrainer.postprocess_generator_output:
            return groups
        step_wise = self.cfg.generator.step_wise_trajectories
        output, uids = output_of(groups, one_reward=self.cfg.generator.batched, step_wise=step_wise)
        answer: Any = self.postprocess_generator_output(output, uids)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, tuple):  # the newest SkyRL returns (output, uids)
            answer = answer[0]
        if answer is None:
            raise WrongOutput(
                f"{type(self).__qualname__}.postprocess_generator_output returned None; it must return the output"
            )
        answer = plain_output(answer)
        check_output(answer, num_episodes_in(groups))
        return with_output(groups, answer, step_wise=step_wise)

    def add_callback(self, callback: TrainingCallback) -> None:
        """Have a callback called, too, behind those that are there."""
        self.callbacks += check_callbacks([callback])

    def listens_to(self, event: str) -> bool:
        """Return whether a callback overrides the event."""
        return any(getattr(type(one), event) is not getattr(TrainingCallback, event) for one in self.callbacks)

    def fire(self, event: str, where: CallbackInput) -> None:
        """Call the event of every callback, in their order."""
        for callback in self.callbacks:
            getattr(callback, event)(self, where, self.control)

    def taken_metrics(self) -> dict[str, float]:
        """Return what a subclass measured since the last step, and forget it."""
        found = {**self.all_metrics, **{f"timing/{name}": seconds for name, seconds in self.all_timings.items()}}
        self.all_metrics, self.all_timings = {}, {}
        return found
