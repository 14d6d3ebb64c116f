"""SkyRL's methods of an experiment that nothing here calls, and what to do instead of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.vain_overrides import refuse_vain_overrides

NEVER_CALLED: Mapping[str, str] = {
    "get_cfg_as_str": "skyrl_train.config.get_config_as_yaml_str(cfg) writes the settings",
    "get_colocate_pg": "trainer.placement and its like alone say where models lie; drop the method",
    "get_inference_client": "override get_engine(policy), which returns the engine that samples; a run that only plays "
    "episodes is an EvalOnlyEntrypoint (skyrl_train.entrypoints.main_generate)",
    "get_trajectory_logger": "every episode is kept in the run folder; drop the method",
    "_get_legacy_inference_client": "override get_engine(policy), which returns the engine that samples",
    "_get_new_inference_client": "override get_engine(policy), which returns the engine that samples",
    "get_tracker": "choose trackers with trainer.logger, or override extra_metrics() to log more with every step",
    "_setup_trainer": "override get_trainer(...) or get_callbacks()",
    "setup_trainer": "override get_trainer(...) or get_callbacks()",
    "init_tracker": "choose trackers with trainer.logger",
    "build_models": "override get_policy(), get_reference(policy) or get_learner(policy)",
    "get_models": "override get_policy(), get_reference(policy) or get_learner(policy)",
    "get_dataset": "override get_train_dataset() or get_eval_dataset()",
    "get_train_dataloader": "override get_train_dataset(); which rows a step plays follows from trainer.seed",
    "get_reward_model": "rewards come from the environment's step, or from environment.rewards (a judge, too)",
}


def check_overrides(experiment: Any, base: type) -> None:
    """Raise ValueError if the class of `experiment` overrides a method in vain."""
    refuse_vain_overrides(type(experiment), base, NEVER_CALLED)
