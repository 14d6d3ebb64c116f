"""Names that other trainers use for a key, to suggest the right one for an unknown key, and to find it by."""

from __future__ import annotations

# Key -> names that other trainers use for it. The value can be copied unchanged.
SAME_THING: dict[str, str] = {
    "trainer.train_batch_size": "batch_size prompts_per_step rollout_batch_size",
    "trainer.policy_mini_batch_size": "mini_batch_size ppo_mini_batch_size",
    "trainer.micro_train_batch_size_per_gpu": "micro_batch_size per_device_train_batch_size",
    "trainer.epochs": "num_epochs num_train_epochs total_epochs",
    "trainer.max_prompt_length": "prompt_length max_prompt_tokens",
    "trainer.seed": "random_seed",
    "trainer.ckpt_path": "output_dir save_dir save_path checkpoint_dir checkpoint_path",
    "trainer.ckpt_interval": "save_steps save_interval save_freq checkpoint_interval",
    "trainer.max_ckpts_to_keep": "save_total_limit",
    "trainer.resume_path": "checkpoint resume_from_checkpoint",
    "trainer.eval_interval": "eval_steps eval_freq test_freq",
    "trainer.logger": "report_to tracker",
    "trainer.policy.model.path": "model model_path model_name_or_path base_model pretrained",
    "trainer.policy.model.lora.rank": "lora_rank lora_r",
    "trainer.policy.model.lora.alpha": "lora_alpha",
    "trainer.policy.optimizer_config.lr": "learning_rate",
    "trainer.policy.optimizer_config.max_grad_norm": "grad_clip clip_grad gradient_clipping",
    "trainer.policy.optimizer_config.num_warmup_steps": "warmup warmup_steps",
    "trainer.policy.optimizer_config.scheduler": "lr_scheduler lr_scheduler_type",
    "trainer.algorithm.advantage_estimator": "algorithm_name adv_estimator",
    "trainer.algorithm.policy_loss_type": "loss loss_type loss_fn",
    "trainer.algorithm.kl_loss_coef": "kl_coef kl_coeff beta",
    "trainer.algorithm.entropy_loss_coef": "entropy_coef entropy_coeff",
    "trainer.algorithm.eps_clip_high": "clip_range clip_eps cliprange epsilon",
    "trainer.algorithm.overlong_penalty.len": "overlong_buffer_len overlong_cache soft_punish_cache",
    "trainer.algorithm.overlong_penalty.factor": "overlong_buffer_penalty_factor",
    "trainer.algorithm.value_clip": "cliprange_value vf_clip vf_clip_param",
    "trainer.algorithm.lambd": "lam lambda gae_lambda",
    "trainer.critic.model.path": "critic_path critic_model value_model value_model_path",
    "trainer.sft.data": "sft_data sft_dataset warmup_data",
    "generator.n_samples_per_prompt": "n num_samples n_samples num_generations num_rollouts group_size",
    "generator.max_turns": "turns num_turns",
    "generator.max_input_length": "max_model_len context_length",
    "generator.sampling_params.max_generate_length": (
        "max_tokens max_new_tokens max_length max_response_length max_completion_length"
    ),
    "generator.sampling_params.stop": "stop_strings stop_sequences",
    "data.train_data": "dataset train_file train_files data_path",
    "data.val_data": "eval_data eval_dataset val_file val_files",
    "environment.env_class": "env env_name env_id",
    "environment.skyrl_gym.max_env_workers": "num_workers num_envs",
}
# Key -> names for a related setting in another unit: the value cannot be copied.
OTHER_VALUE: dict[str, str] = {
    "trainer.epochs": "steps num_steps max_steps total_steps training_steps",
    "trainer.device": "gpus num_gpus n_gpus gpu cuda",
    "trainer.bf16": "dtype precision fp16",
    "trainer.max_tokens_per_microbatch": "gradient_accumulation_steps",
    "trainer.resume_mode": "resume",
}


def squeezed(name: str) -> str:
    """Return a name without case, dashes and underscores: learning-rate, learningRate and learning_rate become one."""
    return name.lower().replace("_", "").replace("-", "")


def _by_word(table: dict[str, str]) -> dict[str, str]:
    return {squeezed(word): key for key, words in table.items() for word in words.split()}


SYNONYMS = _by_word(SAME_THING) | _by_word(OTHER_VALUE)
NOT_TO_PASTE = _by_word(OTHER_VALUE).keys()


def names_elsewhere(key: str) -> list[str]:
    """Return what other trainers call a key."""
    return f"{SAME_THING.get(key, '')} {OTHER_VALUE.get(key, '')}".split()


def keeps_value(key: str) -> bool:
    """Return whether the value of an unknown key may be given to the nearest key: `steps=100` is not `epochs=100`."""
    return squeezed(key.rpartition(".")[2]) not in NOT_TO_PASTE
