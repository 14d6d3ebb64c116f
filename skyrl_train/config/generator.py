"""Settings of episodes: the engine, sampling, turns, limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import II

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section

BACKENDS = ("torch", "vllm")
LEAST_TEMPERATURE = 1e-3  # below it logits / temperature leave float32's precision, and further down its range


@dataclass
class SamplingConfig(Section, at="generator.sampling_params"):
    """Settings of sampling the policy's replies."""

    max_generate_length: int = 1024  # new tokens of one turn at most
    min_tokens: int = 1  # end-of-sequence tokens and stop strings count only from here on
    repetition_penalty: float = 1.0  # 1 is off
    temperature: float = 1.0  # 0 is greedy, in evaluation only
    top_p: float = 1.0  # nucleus sampling; 1 is off
    min_p: float = 0.0  # least probability relative to the likeliest token; 0 is off
    top_k: int = -1  # the k likeliest tokens; -1 is off
    logprobs: int | None = 1  # 0 or 1: keep the sampled token's logprob
    stop: list[str] | None = None  # strings that end a turn; they stay in the text

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(1, "max_generate_length")
        if not 0 <= self.min_tokens <= max(self.max_generate_length, 0):
            yield self.problem("min_tokens", f"must be from 0 to max_generate_length={self.max_generate_length}")
        if not 0 < self.repetition_penalty < math.inf:
            yield self.problem("repetition_penalty", "must be above 0 and finite; 1 is off")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            yield self.problem("temperature", f"must be 0 (greedy), or finite and at least {LEAST_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            yield self.problem("top_p", "must be above 0 and at most 1; 1 is off")
        yield from self.within(0, 1, "min_p")
        if self.top_k != -1 and self.top_k < 1:
            yield self.problem("top_k", "must be -1 (off) or at least 1")
        if self.logprobs not in (0, 1):
            yield self.problem("logprobs", "must be 0 or 1: the engine keeps the logprob of each sampled token")
        if self.stop is not None and not all(self.stop):
            yield self.problem("stop", "holds an empty string, which would end every turn at once")


@dataclass
class EvalSamplingConfig(SamplingConfig, at="generator.eval_sampling_params"):
    """Settings of sampling in evaluation."""

    max_generate_length: int = II("generator.sampling_params.max_generate_length")  # follows sampling_params
    temperature: float = 0.0  # greedy


@dataclass
class ChatTemplateConfig(Section, at="generator.chat_template"):
    """The chat template, if another than the tokenizer's own is wanted."""

    source: str = "name"  # file: name_or_path is a Jinja file
    name_or_path: str | None = None  # null is the tokenizer's own template
    keep_thinking: bool = False  # keep the thinking marks of earlier turns, also where the template edits them

    def rules(self) -> Iterator[Problem]:
        yield from self.one_of("source", ("name", "file"))
        if self.source == "file" and not self.name_or_path:
            says = "is missing: generator.chat_template.source=file needs a Jinja file"
            yield self.problem("name_or_path", says, drops=("generator.chat_template.source",))
        if self.source == "name" and self.name_or_path is not None:
            yield self.problem(
                "name_or_path",
                "is not a template known by name; for a Jinja file add generator.chat_template.source=file, for the "
                "switches of the model's own template set generator.chat_template_kwargs={enable_thinking: false}",
            )


@dataclass
class GeneratorConfig(Section, at="generator"):
    """The engines, and the episodes in which they sample."""

    backend: str = "torch"  # torch: the project's own engine; vllm: vLLM, in processes of its own
    num_inference_engines: int = 1  # engines with a copy of the policy each; episodes are spread over them
    inference_engine_tensor_parallel_size: int = 1  # vLLM: devices that share each layer of one engine
    gpu_memory_utilization: float = 0.8  # vLLM: share of a GPU's memory for weights and keys and values
    enforce_eager: bool = True  # vLLM: without CUDA graphs
    enable_prefix_caching: bool = True  # vLLM: keep the KV of shared prompts and earlier turns; torch always does
    engine_init_kwargs: dict[str, Any] = field(default_factory=dict)  # vLLM: further arguments of AsyncEngineArgs
    weight_sync_backend: str = "nccl"  # CUDA IPC on shared GPUs, NCCL between others; or shared_memory, gloo (on a CPU)
    n_samples_per_prompt: int = 5  # episodes per prompt: the group
    batched: bool = False  # all prompts of a step at once, one turn each; the torch engine always does
    max_input_length: int = II("trainer.max_prompt_length")  # tokens; no turn starts on a longer history
    max_num_batched_tokens: int = 8192  # tokens per forward pass of the engine at most
    max_num_seqs: int = 1024  # replies sampled at once at most
    max_turns: int | None = None  # turns of an episode at most; a row's own max_turns wins; null: until done
    max_env_retries: int = 2  # fresh starts of an episode whose environment broke, unless it would break again
    step_timeout_s: float = 60.0  # seconds one answer of an environment may take
    episode_timeout_s: float = 600.0  # seconds one episode may take
    chat_template: ChatTemplateConfig = field(default_factory=ChatTemplateConfig)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the chat template
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    use_conversation_multi_turn: bool = True  # true: a message per turn; false: one growing assistant message
    append_eos_token_after_stop_str_in_multi_turn: bool = True  # close a turn that a stop string ended
    step_wise_trajectories: bool = False  # print the history anew before every turn, as the chat template edits it
    eval_sampling_params: EvalSamplingConfig = field(default_factory=EvalSamplingConfig)
    eval_n_samples_per_prompt: int = 1  # episodes per prompt in evaluation
    zero_reward_on_non_stop: bool = False  # no reward for an episode cut off by a length limit
    apply_overlong_filtering: bool = False  # episodes cut off by a length limit are left out of the loss
    agent: str | None = None  # package.module:function that plays an episode with an OpenAI client of its own
    enable_http_endpoint: bool = False  # serve the policy over HTTP (OpenAI's API) while episodes are played
    http_endpoint_host: str = "127.0.0.1"  # any but loopback needs an API key: SKYRL_API_KEY, or a printed one
    http_endpoint_port: int = 8000  # 0: any that is free, as for an agent without enable_http_endpoint
    served_model_name: str | None = None  # name of the policy at the endpoint; null: the last part of the model's path

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(
            1, "n_samples_per_prompt", "eval_n_samples_per_prompt", "max_turns", "max_input_length", "max_num_seqs",
            "max_num_batched_tokens", "num_inference_engines", "inference_engine_tensor_parallel_size",
        )  # fmt: skip
        yield from self.at_least(0, "max_env_retries")
        yield from self.within(0, 65535, "http_endpoint_port")
        if self.agent is not None and not self.use_conversation_multi_turn:
            says = "sends a message per turn; drop use_conversation_multi_turn=false"
            yield self.problem("agent", says, drops=("generator.use_conversation_multi_turn",))
        yield from self._engine_rules()
        if self.step_wise_trajectories:
            yield from self._step_wise_rules()
        for key in ("step_timeout_s", "episode_timeout_s"):
            if getattr(self, key) <= 0:
                yield self.problem(key, "must be above 0 seconds")
        if self.sampling_params.temperature == 0:
            problem = self.sampling_params.problem(
                "temperature", "is greedy: training would explore nothing; only eval_sampling_params may use 0"
            )
            yield problem.under("sampling_params")
        if self.batched and (self.max_turns or 1) > 1:
            yield self.problem(
                "batched", f"plays one turn per prompt, but generator.max_turns={self.max_turns}; drop batched=true"
            )

    def _step_wise_rules(self) -> Iterator[Problem]:
        if self.batched:
            says = "has no second turn with generator.batched=true; drop one"
            yield self.problem("step_wise_trajectories", says, drops=("generator.batched",))
        if not self.use_conversation_multi_turn:
            says = "needs a message per turn; drop generator.use_conversation_multi_turn=false"
            yield self.problem("step_wise_trajectories", says, drops=("generator.use_conversation_multi_turn",))
        if self.chat_template.keep_thinking:
            problem = self.chat_template.problem(
                "keep_thinking",
                "keeps earlier turns, which generator.step_wise_trajectories=true prints anew; drop one",
            )
            yield problem.under("chat_template")
        if not self.append_eos_token_after_stop_str_in_multi_turn:
            yield self.problem(
                "append_eos_token_after_stop_str_in_multi_turn",
                "has no effect with generator.step_wise_trajectories=true: the template closes each turn; drop one",
            )

    def _engine_rules(self) -> Iterator[Problem]:
        if self.backend not in BACKENDS:
            yield self.problem("backend", "is not one of the engines here; use generator.backend=vllm or torch")
        if not 0 < self.gpu_memory_utilization <= 1:
            yield self.problem("gpu_memory_utilization", "must be above 0 and at most 1")
