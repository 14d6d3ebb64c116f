"""The memory plan of a run on a GPU, from numbers alone: it chooses what fits and refuses what cannot.

    held = weights (+ reference) + float32 masters + moments + gradient      the whole time
         + critic, the same of its own                                       the whole time
         + activations of a pass + logits                                    in an update
         + keys and values of sequences in flight and of waiting episodes    the whole time

`memory_plan` is a pure function; `model_memory.py` makes its `ModelMemory` from a model's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skyrl_train.config import GeneratorConfig, TrainerConfig

GIB = 2**30
TOKEN_BUDGETS = (32_768, 24_576, 16_384, 12_288, 8192, 6144, 4096, 3072, 2048, 1024, 512)
RECOMPUTED = 4 / 3  # time of an update with checkpointing: the forward pass is computed twice
HOST_SECONDS_PER_LAYER = 4e-3  # of one pass, forward and backward, whatever its size (H200, torch 2.11)
FLOPS_PER_SECOND = 4e14  # of products in an update; only the ratio to the line above matters
FEWEST_REPLIES = 16  # that must fit into the cache at once
SHARE_OF_CACHE = 1 / 8  # of the device that keys and values should have before passes become larger
ASLEEP_BYTES = 2 * GIB  # what vLLM's process keeps while it sleeps: CUDA's context, communicators, graphs
RESERVE_BYTES, RESERVE_SHARE = GIB, 0.04  # fragments, CUDA graphs, kernels' workspaces
LORA_RANK = 16  # of what is proposed
MOMENTS_BYTES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}  # both moments of a number, scales included
FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of a number: its 4 bits, and its share of two kinds of scales


class DoesNotFit(ValueError):
    """The run needs more memory than is free; the message says what needs it and what would fit."""


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """The facts of a model that decide about memory. Activations count as bytes that a pass keeps for its backward."""

    num_weights: int  # adapters included
    num_trained: int
    head_weights: int  # of the output head, if it is trained, else 0
    num_layers: int
    hidden_size: int
    vocab_size: int
    itemsize: int  # bytes of a number in the compute type
    layer_bytes: int  # activations per token and layer, keys and values of shared prefixes not repeated
    layer_kv_bytes: int  # keys and values per token and layer
    has_flash: bool  # attention builds no mask and no scores
    logits_copies: int = 1  # of a chunk at once, where a family scales or caps its logits
    linear_sides: int = 0  # inputs + outputs of all linear layers but the head, for adapters
    linear_weights: int = 0  # of these layers
    widest_linear: int = 0  # weights of the largest of them
    is_four_bit: bool = False  # whether they rest in 4 bits; a pass makes one layer whole at a time
    optim: str = "adamw"

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache per token."""
        return self.num_layers * self.layer_kv_bytes

    def as_critic(self, *, is_tied: bool) -> ModelMemory:
        """The same model as the trunk of a critic, which makes no logits; a head that is the embedding, too, stays."""
        head = 0 if is_tied else self.head_weights
        weights, trained = self.num_weights - head, self.num_trained - head
        return replace(self, num_weights=weights, num_trained=trained, head_weights=0, vocab_size=1)

    @property
    def states(self) -> dict[str, int]:
        """Bytes of what stays while it is trained: float32 weights are their own masters (see learner/optimizer.py)."""
        in_four_bits = self.linear_weights if self.is_four_bit else 0
        whole = (self.num_weights - in_four_bits) * self.itemsize
        return {
            "weights": whole + int(in_four_bits * FOUR_BIT_BYTES),
            "masters": 4 * self.num_trained if self.itemsize < 4 else 0,
            "moments": int(MOMENTS_BYTES[self.optim] * self.num_trained),
            "gradient": 4 * self.num_trained,
        }

    @property
    def made_whole(self) -> int:
        """Bytes of the layer in 4 bits that a pass reads just now."""
        return self.widest_linear * self.itemsize if self.is_four_bit else 0

    def with_adapters(self, rank: int) -> ModelMemory:
        """The same model, frozen, with adapters of this rank on all linear layers but the head."""
        adapters = rank * self.linear_sides
        return replace(self, num_weights=self.num_weights + adapters, num_trained=adapters, head_weights=0)


@dataclass(frozen=True, slots=True)
class Demands:
    """The demands of the configuration."""

    longest_sample: int  # tokens of prompt and replies together at most: a pass holds at least one sample
    keys_per_token: float  # that a pass gathers: a sample sees its prompt's, which its group shares; at most its size
    max_sequences: int  # in flight at once
    prefill_tokens: int  # of one step of the engine
    token_budget: int | None = None  # None: whatever is fastest and fits
    gradient_checkpointing: bool | None = None  # likewise
    reference_weights: int = 0  # of a reference model of its own
    critic: ModelMemory | None = None  # of a critic with a trunk of its own
    engine_bytes: int | None = None  # of an engine of another process, which sleeps during updates; None: ours

    @classmethod
    def of(cls, trainer: TrainerConfig, generator: GeneratorConfig, context: int, reference_weights: int) -> Demands:
        """context: tokens that the model can read. A history may be max_input_length long when the last turn begins."""
        history = max(trainer.max_prompt_length, generator.max_input_length)
        trained = trainer.train_batch_size * generator.n_samples_per_prompt
        evaluated = trainer.eval_batch_size * generator.eval_n_samples_per_prompt if trainer.eval_interval > 0 else 0
        return cls(
            longest_sample=min(history + generator.sampling_params.max_generate_length, context),
            keys_per_token=generator.n_samples_per_prompt,
            max_sequences=min(generator.max_num_seqs, max(trained, evaluated)),
            prefill_tokens=generator.max_num_batched_tokens,
            token_budget=trainer.max_tokens_per_microbatch,
            gradient_checkpointing=trainer.gradient_checkpointing,
            reference_weights=reference_weights,
        )


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU. `available` may be less than is free, never more."""

    name: str
    total: int  # bytes
    available: int  # bytes
    logits_bytes: int  # that the learner gives to one chunk of logits


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The use of the device by a run. `parts`: bytes by what holds them, at the fullest moment of an update."""

    token_budget: int
    gradient_checkpointing: bool
    kv_cache_bytes: int
    session_cache_bytes: int
    parts: dict[str, int]
    engine_bytes: int | None = None  # of an engine of another process, while it samples

    def line(self, device: Device) -> str:
        """Return one line for people that says what the run holds."""
        how = "with" if self.gradient_checkpointing else "without"
        slept = ""
        if self.engine_bytes:
            slept = f"; vLLM, which sleeps during updates, has {_gib(self.engine_bytes)} GiB while it samples"
        held = ", ".join(f"{name} {_gib(size)}" for name, size in self.parts.items() if size >= GIB / 100)
        return (
            f"memory of {device.name}, {_gib(device.available)} of {_gib(device.total)} GiB available: {held} GiB; "
            f"passes of {self.token_budget:,} tokens {how} gradient checkpointing"
            f"{slept}"
        )


def memory_plan(model: ModelMemory, demands: Demands, device: Device) -> MemoryPlan:
    """The fastest plan that fits. Raises `DoesNotFit`, with every single change of the settings that would fit."""
    plan = _best(model, demands, device)
    if plan is None:
        raise DoesNotFit(_refusal(model, demands, device))
    return plan


def _best(model: ModelMemory, demands: Demands, device: Device) -> MemoryPlan | None:
    """The fastest of the plans that leave ample room for the cache, else of those that leave some."""
    candidates = [_plan(model, demands, device, *choice) for choice in _choices(demands)]
    wanted = min(_most_cache(model, demands), int(SHARE_OF_CACHE * device.total))
    needed = min(demands.max_sequences, FEWEST_REPLIES) * demands.longest_sample * model.kv_bytes
    if demands.engine_bytes is not None:  # the cache is the engine's
        wanted = needed = 0
    for cache in (max(wanted, needed), needed):
        fitting = [plan for plan in candidates if plan.kv_cache_bytes >= cache]
        if fitting:
            return min(fitting, key=lambda plan: _seconds_per_token(model, plan))
    return None


def _choices(demands: Demands) -> Iterator[tuple[int, bool]]:
    asked, checkpointing = demands.token_budget, demands.gradient_checkpointing
    for budget in TOKEN_BUDGETS if asked is None else (asked,):
        for is_on in (False, True) if checkpointing is None else (checkpointing,):
            yield budget, is_on


def _seconds_per_token(model: ModelMemory, plan: MemoryPlan) -> float:
    """Return the time of an update per token: the device's, and the host's, which a pass costs whatever it holds."""
    device = 6 * model.num_weights / FLOPS_PER_SECOND
    host = HOST_SECONDS_PER_LAYER * model.num_layers / plan.token_budget
    return (device + host) * (RECOMPUTED if plan.gradient_checkpointing else 1)


def _plan(model: ModelMemory, demands: Demands, device: Device, token_budget: int, checkpointing: bool) -> MemoryPlan:
    """The plan for this choice, with a cache of what is left, possibly less than nothing."""
    parts = _states(model, demands)
    kept = sum(parts.values())
    num_tokens = max(token_budget, demands.longest_sample)
    trained = [model] if demands.critic is None else [model, demands.critic]  # their passes come one after the other
    activations, logits = max((_pass(m, demands, device, num_tokens, checkpointing) for m in trained), key=sum)
    reserve = int(RESERVE_BYTES + RESERVE_SHARE * device.total)
    in_update = device.available - reserve - kept - activations - logits
    in_rollout = device.available - reserve - kept + parts["gradient"]  # there is no gradient then
    if demands.engine_bytes is None:  # one that grows, where it is not in pages, lies beside the old one, half as large
        cache = min(in_update, (in_rollout - _engine_pass(model, demands)) * 3 // 4)
    else:  # the cache is the other process's, and less than nothing is left where both do not fit
        asleep = ASLEEP_BYTES if demands.engine_bytes else 0
        cache = min(in_update - asleep, in_rollout - demands.engine_bytes, 0)
    most = _most_cache(model, demands)
    kv_cache, sessions = min(cache * 2 // 3, most), min(cache // 3, most)
    parts |= {"activations": activations, "logits": logits, "cache": kv_cache, "kept turns": sessions}
    parts |= {"reserve": reserve}
    return MemoryPlan(token_budget, checkpointing, kv_cache, sessions, parts, demands.engine_bytes)


def _most_cache(model: ModelMemory, demands: Demands) -> int:
    """Bytes of keys and values if every sequence in flight were as long as they get."""
    return demands.max_sequences * demands.longest_sample * model.kv_bytes


def _states(model: ModelMemory, demands: Demands) -> dict[str, int]:
    """Bytes of what stays."""
    states = model.states
    return {
        "weights": states.pop("weights"),
        "reference": demands.reference_weights * model.itemsize,
        **states,
        "critic": sum(demands.critic.states.values()) if demands.critic else 0,
    }


def _pass(
    model: ModelMemory, demands: Demands, device: Device, num_tokens: int, checkpointing: bool
) -> tuple[int, int]:
    """Bytes of (activations, logits) when a pass turns round: the last chunk of logits beside all activations.

    With checkpointing the inputs of all layers are kept and one layer is computed again, with about half as much again
    for the gradients on the way; the logits are gone by then, so the greater of the two counts.
    """
    row = num_tokens * model.hidden_size * model.itemsize
    repeated = (demands.keys_per_token - 1) * model.layer_kv_bytes if model.has_flash else 0
    layer = int(num_tokens * (model.layer_bytes + repeated))
    if not model.has_flash:  # a mask in the compute type, kept for backward
        layer += num_tokens * demands.longest_sample * model.itemsize
    chunk = min(num_tokens * model.vocab_size * model.itemsize, max(device.logits_bytes, 1))
    is_whole = chunk >= num_tokens * model.vocab_size * model.itemsize
    head_gradient = model.head_weights * (model.itemsize if is_whole else model.itemsize + 4)
    logits = chunk * model.logits_copies + head_gradient + 4 * row
    if not checkpointing:
        return model.num_layers * layer + model.made_whole, logits
    return model.num_layers * row + model.made_whole, max(logits, layer * 3 // 2)


def _engine_pass(model: ModelMemory, demands: Demands) -> int:
    """Bytes of one step of the engine: a layer's values, and logits in three float32 copies while sampling."""
    rows = min(demands.max_sequences, demands.prefill_tokens)
    sampled = rows * model.vocab_size * (model.itemsize + 12)
    return demands.prefill_tokens * model.layer_bytes + model.made_whole + sampled


def _refusal(model: ModelMemory, demands: Demands, device: Device) -> str:
    """One line: the numbers, and what would fit."""
    states = {name: size for name, size in _states(model, demands).items() if size}
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in states.items())
    kind = "full fine-tuning" if model.num_trained == model.num_weights else "training adapters"
    fits = [
        f"{setting} (passes of {plan.token_budget:,} tokens)" for setting, plan in _what_fits(model, demands, device)
    ]
    least = _least_total(model, demands, device)
    fits.append(f"a GPU of {_gib(least)} GiB (ranks that share the model are not counted on)")
    return (
        f"{kind} of {model.num_weights / 1e9:.1f} billion weights does not fit {device.name}: it holds "
        f"{_gib(sum(states.values()))} GiB ({listed}), with a pass and a cache for samples of "
        f"{demands.longest_sample:,} tokens about {_gib(least)} GiB, but {_gib(device.available)} of "
        f"{_gib(device.total)} GiB are available. "
        f"What fits: {'; or '.join(fits)}"
    )


def _what_fits(model: ModelMemory, demands: Demands, device: Device) -> Iterator[tuple[str, MemoryPlan]]:
    """Settings that would fit, each with its plan, the smallest change first."""
    changes: list[tuple[str, ModelMemory, Demands]] = []
    if demands.gradient_checkpointing is False:
        changes.append(("trainer.gradient_checkpointing=null", model, replace(demands, gradient_checkpointing=None)))
    if demands.token_budget is not None:
        changes.append(("trainer.max_tokens_per_microbatch=null", model, replace(demands, token_budget=None)))
    free = replace(demands, gradient_checkpointing=None, token_budget=None)
    if len(changes) == 2:
        changes.append(("both of them", model, free))
    if demands.reference_weights:
        changes.append(("no KL term (trainer.algorithm.use_kl_loss=false)", model, replace(free, reference_weights=0)))
    for share in (0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        smaller = replace(free, engine_bytes=int(share * device.total))
        if (demands.engine_bytes or 0) > share * device.total and _best(model, smaller, device):
            changes.append((f"less for vLLM, generator.gpu_memory_utilization={share}", model, smaller))
            break
    for shorter in (demands.longest_sample // 2**halvings for halvings in range(1, 8)):
        if shorter >= 512 and _best(model, replace(free, longest_sample=shorter), device):
            says = f"samples of {shorter:,} tokens (trainer.max_prompt_length, generator.max_input_length, "
            says += "generator.sampling_params.max_generate_length)"
            changes.append((says, model, replace(free, longest_sample=shorter)))
            break
    if model.optim == "adamw":
        says = "moments of 8 bits, trainer.policy.optimizer_config.optim=adamw_8bit"
        changes.append((says, replace(model, optim="adamw_8bit"), free))
    alone, adapted = free, model
    if model.num_trained == model.num_weights:  # with adapters the base is its own reference
        alone, adapted = replace(free, reference_weights=0), model.with_adapters(LORA_RANK)
        says = f"adapters, trainer.policy.model.lora.rank={LORA_RANK}"
        changes.append((says, adapted, alone))
    if not model.is_four_bit and model.linear_weights:
        rank = "" if adapted is model else f"trainer.policy.model.lora.rank={LORA_RANK} "
        says = f"adapters on weights of 4 bits, {rank}trainer.policy.model.load_in_4bit=true"
        changes.append((says, replace(adapted, is_four_bit=True), alone))
    for setting, changed, demanded in changes:
        if (plan := _best(changed, demanded, device)) is not None:
            yield setting, plan


def _least_total(model: ModelMemory, demands: Demands, device: Device) -> int:
    """Bytes of the smallest GPU, to a GiB, on which the most frugal plan for these demands would fit."""
    low, high = device.total // GIB, 2**16
    while low < high:
        middle = (low + high) // 2
        larger = replace(device, available=middle * GIB, total=middle * GIB)
        low, high = (low, middle) if _best(model, demands, larger) else (middle + 1, high)
    return low * GIB


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"
