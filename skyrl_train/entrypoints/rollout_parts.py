"""The parts of an experiment that play episodes: the engine, and what plays rounds against it."""

from __future__ import annotations

import asyncio
import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_gym.contract import NOT_AWAITED
from skyrl_train.config import SkyRLConfig, env_config_for
from skyrl_train.entrypoints.data_parts import DataParts
from skyrl_train.users_functions import yields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.engine.base import Engine, LoadingEngine
    from skyrl_train.generators.base import GeneratorInterface
    from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
    from skyrl_train.policy.model import Policy
    from skyrl_train.rollout.agents.endpoint import Endpoint
    from skyrl_train.rollout.round import RoundPlayer


class RolloutParts(DataParts):
    """Builds the engine that samples and the collector of episodes, or the user's generator in its place."""

    def get_engine(self, policy: Policy) -> Engine:
        """Return an engine that samples from this policy; in a process of its own it can load new weights into it."""
        from skyrl_train.engine.torch.engine import TorchEngine
        from skyrl_train.engine.torch.loading import LoadingTorchEngine

        make = TorchEngine if self.placement.in_process else LoadingTorchEngine
        generator, cache = self.cfg.generator, {}
        if self.memory is not None:
            cache = {
                "kv_cache_bytes": self.memory.kv_cache_bytes,
                "session_cache_bytes": self.memory.session_cache_bytes,
            }
        return make(
            policy,
            self.tokenizer,
            max_num_seqs=generator.max_num_seqs,
            max_num_batched_tokens=generator.max_num_batched_tokens,
            deterministic=self.cfg.trainer.deterministic,
            max_model_len=self.max_length,
            **cache,
        )

    async def get_own_engine(self) -> LoadingEngine:
        """Return the engine of a process that holds nothing else. Its policy is a whole model, without adapters."""
        if self.cfg.generator.backend == "vllm":
            return await self.get_vllm_engine()
        from skyrl_train import compute
        from skyrl_train.config import LoraConfig

        self.cfg = copy.deepcopy(self.cfg)
        self.cfg.trainer.policy.model.lora, self.cfg.trainer.policy.model.load_in_4bit = LoraConfig(), False
        policy = await asyncio.wrap_future(compute.submit(self.get_policy))
        policy.module.requires_grad_(False)
        engine: Any = self.get_engine(policy)
        if not hasattr(engine, "load_weights"):
            raise TypeError(
                f"get_engine returned {type(engine).__name__}, which has no load_weights: an engine in a process of "
                "its own must be a LoadingEngine (skyrl_train.engine.base)"
            )
        return engine

    async def get_vllm_engine(self) -> LoadingEngine:
        from skyrl_train.engine.vllm.engine import VllmEngine
        from skyrl_train.engine.vllm.settings import VllmSettings
        from skyrl_train.policy.model_files import load_config

        generator, changes = self.cfg.generator, self.cfg.trainer.policy.model_config_kwargs
        context = load_config(self.model_path, changes).get_text_config().max_position_embeddings
        settings = VllmSettings(
            model=self.model_path,
            dtype=str(self.compute_dtype).removeprefix("torch."),
            max_num_seqs=generator.max_num_seqs,
            max_num_batched_tokens=generator.max_num_batched_tokens,
            max_model_len=min(self.max_length, context),
            tensor_parallel_size=generator.inference_engine_tensor_parallel_size,
            gpu_memory_utilization=generator.gpu_memory_utilization,
            enable_sleep_mode=self.placement.takes_turns,
            enforce_eager=generator.enforce_eager,
            enable_prefix_caching=generator.enable_prefix_caching,
            threads=self.placement.num_threads,
            seed=self.cfg.trainer.seed % 2**31,
            model_config_kwargs=changes,
            engine_init_kwargs=generator.engine_init_kwargs,
        )
        return await VllmEngine.start(settings, self.tokenizer)

    def get_endpoint(self, engine: Engine) -> Endpoint | None:
        """Return the HTTP server in front of the engine, if the configuration asks for one or an agent needs one."""
        generator = self.cfg.generator
        if not generator.enable_http_endpoint and generator.agent is None:
            return None
        from skyrl_train.rollout.agents.endpoint import Endpoint
        from skyrl_train.rollout.sampling import sampling_params

        is_on = generator.enable_http_endpoint
        return Endpoint(
            engine,
            self.chat_template,
            sampling_params(generator.sampling_params),
            model=generator.served_model_name or Path(self.cfg.trainer.policy.model.path).name,
            host=generator.http_endpoint_host if is_on else "127.0.0.1",
            port=generator.http_endpoint_port if is_on else 0,
        )

    def get_collector(self, engine: Engine, endpoint: Endpoint | None = None) -> RoundPlayer:
        from skyrl_train.rollout.agents.episode import Agent
        from skyrl_train.rollout.collector import Collector
        from skyrl_train.rollout.episode import EpisodeLimits

        generator, environment = self.cfg.generator, self.cfg.environment
        limits = EpisodeLimits(
            max_turns=1 if generator.batched else generator.max_turns,
            max_input_length=generator.max_input_length,
            max_context=engine.max_model_len,
            step_timeout_s=generator.step_timeout_s,
            episode_timeout_s=generator.episode_timeout_s,
        )
        return Collector(
            engine,
            self.chat_template,
            limits,
            env_configs=lambda env_id: env_config_for(environment, env_id),
            max_env_workers=environment.skyrl_gym.max_env_workers,
            max_retries=generator.max_env_retries,
            seed=self.cfg.trainer.seed,
            deterministic=self.cfg.trainer.deterministic,
            agent=(Agent.named(generator.agent), endpoint) if generator.agent and endpoint else None,
            rewards=self.rewards,
        )

    def get_generator(
        self, cfg: SkyRLConfig, tokenizer: PreTrainedTokenizerBase, inference_engine_client: InferenceEngineClient
    ) -> GeneratorInterface | None:
        """Override it to play episodes with a GeneratorInterface of your own; None: environments are played as usual.

        `inference_engine_client.generate` samples from the policy.
        """
        return None

    @property
    def plays_environments(self) -> bool:
        return super().plays_environments and type(self).get_generator is RolloutParts.get_generator

    def get_episodes(self, engine: Engine) -> RoundPlayer:
        """Return what plays the rounds: our collector, or the user's generator behind the same interface."""
        from skyrl_train.generators.custom_generator import GeneratorCollector
        from skyrl_train.generators.users_tokenizer import users_tokenizer
        from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient

        endpoint = self.get_endpoint(engine)
        client = InferenceEngineClient(
            engine,
            self.chat_template,
            max_model_len=engine.max_model_len,
            seed=self.cfg.trainer.seed,
            endpoint_url=endpoint.url if endpoint else None,
        )
        client.tokenizer = users_tokenizer(self.tokenizer)
        generator = self.get_generator(self.cfg, client.tokenizer, client)
        check_generator(generator)
        if generator is None:
            player = self.get_collector(engine, endpoint) if endpoint else self.get_collector(engine)
        elif self.rewards is not None:
            raise ValueError(
                f"{self.rewards.label} is never called: the generator of get_generator pays the episodes; drop the key"
            )
        else:
            needs_logprobs = self.cfg.trainer.algorithm.needs_rollout_logprobs
            player = GeneratorCollector(generator, client, needs_logprobs=needs_logprobs)
        if endpoint is None:
            return player
        from skyrl_train.rollout.agents.served import ServedRounds

        return ServedRounds(player, endpoint)


def check_generator(generator: Any) -> None:
    """Raise RunRefused for what get_generator returned if it cannot play episodes, or would never be closed."""
    from skyrl_train.run.run import RunRefused

    name = type(generator).__name__
    if inspect.isclass(generator) or not (generator is None or callable(getattr(generator, "generate", None))):
        raise RunRefused(f"get_generator returned {generator!r}; it must return a GeneratorInterface, or None")
    generate = getattr(generator, "generate", None)
    if generate is not None and yields(generate):
        raise RunRefused(f"{name}.generate is a generator function; it must return its output instead of yielding it")
    if generate is not None:
        try:
            inspect.signature(generate).bind(None)
        except TypeError as error:
            raise RunRefused(f"{name}.generate must take (input_batch): {error}") from error
    if inspect.iscoroutinefunction(getattr(generator, "close", None)):
        raise RunRefused(f"{name}.close {NOT_AWAITED}")
