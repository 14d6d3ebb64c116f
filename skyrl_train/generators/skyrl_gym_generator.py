"""SkyRL's generator of environments: our collector behind SkyRL's interface, for users who build on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from skyrl_train.config import GeneratorConfig, SkyRLGymConfig, as_settings, load_config
from skyrl_train.config.section import is_section
from skyrl_train.generators.base import GeneratorInput, GeneratorInterface, GeneratorOutput, TrajectoryID
from skyrl_train.generators.generator_output import output_of
from skyrl_train.generators.utils import get_rollout_metrics
from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
from skyrl_train.inference_engines.utils import read_sampling
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import EpisodeEnd, Prompt
from skyrl_train.vain_overrides import refuse_vain_overrides

__all__ = ["GeneratorInput", "GeneratorInterface", "GeneratorOutput", "SkyRLGymGenerator"]

NEVER_CALLED: Mapping[str, str] = {
    "agent_loop": "an episode is played in rollout/episode.py; override generate and change its input or output, or "
    "derive from GeneratorInterface",
    "generate_batched": "all prompts are always played at once; override generate",
    **dict.fromkeys(
        (
            "_validate_cfg", "_run_in_executor_if_available", "_build_per_token_rewards", "get_obs_ids_from_obs",
            "_update_chat_history", "_zero_reward_if_not_stop", "_update_agent_state_by_retokenizing_chat_history",
            "_update_agent_loop_state_with_multiturn_chat_template",
            "_update_agent_loop_state_with_singleturn_chat_template", "_setup_env_extras",
            "_post_process_agent_loop_output", "_compute_cache_salt",
        ),
        "episodes and their tokens are made in rollout/; override generate and change its input or output",
    ),
}  # fmt: skip


class SkyRLGymGenerator(GeneratorInterface):
    """Plays the environments of the input. Override `generate` to change what goes in or what comes out."""

    def __init__(
        self,
        generator_cfg: GeneratorConfig,
        skyrl_gym_cfg: SkyRLGymConfig,
        inference_engine_client: InferenceEngineClient,
        tokenizer: Any,
        model_name: str = "",
    ) -> None:
        refuse_vain_overrides(type(self), SkyRLGymGenerator, NEVER_CALLED)
        generator_cfg = typed_section("generator", generator_cfg)
        skyrl_gym_cfg = typed_section("environment.skyrl_gym", skyrl_gym_cfg)
        self.generator_cfg, self.skyrl_gym_cfg = generator_cfg, skyrl_gym_cfg
        self.inference_engine_client, self.tokenizer, self.model_name = inference_engine_client, tokenizer, model_name
        self.max_turns = 1 if generator_cfg.batched else generator_cfg.max_turns
        limits = EpisodeLimits(
            max_turns=self.max_turns,
            max_input_length=generator_cfg.max_input_length,
            max_context=inference_engine_client.max_model_len,
            step_timeout_s=generator_cfg.step_timeout_s,
            episode_timeout_s=generator_cfg.episode_timeout_s,
        )
        self.collector = Collector(
            inference_engine_client.engine,
            inference_engine_client.template,
            limits,
            env_configs=lambda env_id: as_settings(vars(skyrl_gym_cfg).get(env_id) or {}),
            max_env_workers=skyrl_gym_cfg.max_env_workers,
            max_retries=generator_cfg.max_env_retries,
            seed=inference_engine_client.seed,
        )

    async def generate(self, input_batch: GeneratorInput, disable_tqdm: bool = False) -> GeneratorOutput:
        """Play one episode per entry. Episodes of one prompt start from the same seed.

        disable_tqdm: SkyRL's switch of a progress bar; there is none here.
        """
        client = self.inference_engine_client
        prompts, samples_per_prompt = _prompts_of(input_batch)
        given = dict(input_batch.get("sampling_params") or {})
        sampling = read_sampling(given, client.defaults, room=client.max_model_len, seed=0)
        phase, step = client.round_name
        groups = await self.collector.collect(Round(phase, step, prompts, samples_per_prompt, sampling))
        client.policy_version = max(
            [client.policy_version]
            + [turn.policy_version for group in groups for t in group.trajectories for turn in t.turns]
        )
        cfg = self.generator_cfg
        output, _ = output_of(groups, one_reward=cfg.batched, failed_too=True, step_wise=cfg.step_wise_trajectories)
        played = [t for group in groups for t in group.trajectories if t.end is not EpisodeEnd.ENV_FAILURE]
        metrics = get_rollout_metrics(
            output["response_ids"],
            output["rewards"],
            [t.env_metrics for t in played],
            [t.prompt.env_class for t in played],
        )
        output["rollout_metrics"] = {k: v for k, v in metrics.items() if k.startswith("environment/")}
        return output

    def close(self) -> None:
        self.collector.close()


def typed_section(key: str, given: Any) -> Any:
    """Return a section that was given as a DictConfig or a dictionary, as SkyRL's examples do, with our defaults."""
    if is_section(given):
        return given
    settings: Any = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given or {}
    section = load_config([])
    for name in key.split("."):
        section = getattr(section, name)
    return _filled(section, settings)


def _filled(section: Any, settings: Mapping[str, Any]) -> Any:
    for name, value in settings.items():
        below = vars(section).get(name)
        vars(section)[name] = _filled(below, value) if is_section(below) and isinstance(value, Mapping) else value
    return section


def _prompts_of(input_batch: GeneratorInput) -> tuple[list[Prompt], int]:
    """(prompts, episodes of each): entries of one instance_id in a row are one prompt, if all have as many."""
    num = len(input_batch["prompts"])
    extras = input_batch.get("env_extras") or [{} for _ in range(num)]
    ids = input_batch.get("trajectory_ids") or [TrajectoryID(str(i), 0) for i in range(num)]
    names = [i.instance_id for i in ids]
    starts = [i for i in range(num) if i == 0 or names[i] != names[i - 1]]
    size = num // len(starts) if starts else 1
    if starts != list(range(0, num, size)) or len({names[i] for i in starts}) != len(starts):
        names, starts, size = [i.to_string() for i in ids], list(range(num)), 1
    prompts = [Prompt(names[i], input_batch["prompts"][i], input_batch["env_classes"][i], extras[i]) for i in starts]
    return prompts, size
