"""Refuses a model, by name and with the reason, that learner and engine would compute differently from transformers.

Checked are: every layer on a few tokens; as many layers as there are kinds of them on samples as long as the run's
(and longer than any window), packed as the learner packs them, in the type that the run computes in, and with positions
up to the last one that the run may reach; and the gradients of these layers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skyrl_train.ops.base import Attention
from skyrl_train.policy.attention import ATTENTION_NAME, PackedAttention
from skyrl_train.policy.refusal import FOREIGN_ERRORS, ModelRefused, one_line

if TYPE_CHECKING:
    from skyrl_train.policy.model import Policy

GRADIENT_TOKENS = 160  # of a sample whose gradients are compared
LONG = 1024  # tokens of the long samples, unless a window asks for more or the run for fewer


def allowed_distance(dtype: torch.dtype) -> float:
    """Return the relative distance that rounding explains: bfloat16 has 8 bits, and a deep model adds them up."""
    return 1e-3 if dtype == torch.float32 else 0.1


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs| / |theirs| of [T, *], infinite where ours has a number that is none.

    In bfloat16 without the fifth of the tokens that differ most: rounding alone sends some of them to other experts.
    """
    difference = (ours.float() - theirs.float()).square().flatten(1).sum(1)
    size = theirs.float().square().flatten(1).sum(1)
    if not difference.isfinite().all():
        return float("inf")
    if theirs.dtype != torch.float32:
        kept = difference.argsort()[: len(difference) - len(difference) // 5]
        difference, size = difference[kept], size[kept]
    return float((difference.sum() / size.sum().clamp_min(1e-18)).sqrt())


@torch.inference_mode()
def refuse_unlike_transformers(policy: Policy, max_length: int | None = None) -> None:
    """Raise ModelRefused unless the policy computes what transformers computes for each sequence alone.

    max_length: tokens of the run's longest sequence, prompt and reply; None: the model's context.
    """
    family = type(policy.module).__name__
    try:
        _check_layers(policy)
        longest = min(max_length or policy.context, policy.context)
        _check_logits(policy, longest)
        _check_long_samples(policy, longest)
        _check_gradients(policy, longest)
    except ModelRefused as refusal:
        raise ModelRefused(f"{family} is not supported: {refusal}") from refusal
    except FOREIGN_ERRORS as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelRefused(f"{family} is not supported: it does not run with our attention ({reason})") from error
    finally:
        policy.module.set_attn_implementation(ATTENTION_NAME)


class _Witness:
    """An attention that notes which layers attend, and refuses heads that the engine's cache has no room for."""

    def __init__(self, attention: Attention, cache_shape: tuple[int, int, int]) -> None:
        self.layers: list[int] = []
        self._attention, self._shape = attention, cache_shape

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        if value.shape != key.shape:
            raise ModelRefused(
                f"a value has {value.shape[-1]} numbers and a key {key.shape[-1]} (multi-head latent attention), but "
                "our caches hold keys and values of one size"
            )
        _, heads, size = self._shape
        if key.shape[1:] != (heads, size):
            raise ModelRefused(
                f"layer {layer} has {key.shape[1]} key heads of {key.shape[2]} numbers, but its configuration says "
                f"{heads} of {size}"
            )
        self.layers.append(layer)
        return self._attention.attend(layer, query, key, value, scale=scale, window=window)


def _check_layers(policy: Policy) -> None:
    """Raise ModelRefused unless every layer attends once, through the attention that it is given."""
    witness = _Witness(PackedAttention(torch.tensor([0, 8], device=policy.device)), policy.cache_shape)
    ids, positions = _random_ids(policy, 8), torch.arange(8, device=policy.device)
    policy.hidden_states(ids, positions, witness)
    num_layers = policy.cache_shape[0]
    if not witness.layers:
        raise ModelRefused("its attention cannot be replaced: it computes its own, whatever it is asked for")
    silent = sorted(set(range(num_layers)) - set(witness.layers))
    if silent:
        raise ModelRefused(
            f"{len(silent)} of its {num_layers} layers do not attend (recurrent, convolution or linear attention), and "
            "they would carry one packed sample into the next"
        )
    if len(witness.layers) != num_layers:
        raise ModelRefused(
            f"its {num_layers} layers attend {len(witness.layers)} times in one pass; our caches hold one key per "
            "token and layer"
        )


def _check_logits(policy: Policy, longest: int) -> None:
    """Compare the logits of short samples that stand beside one at the run's last positions, in all layers."""
    lengths, last = [10, 6], min(8, longest)
    near = _random_ids(policy, sum(lengths)).split(lengths)
    far = _random_ids(policy, last)
    starts = torch.arange(longest - last, longest, device=policy.device)
    alone = [*((part, torch.arange(len(part), device=policy.device)) for part in near), (far, starts)]
    ids, positions = (torch.cat(parts) for parts in zip(*alone, strict=True))
    attention = PackedAttention(torch.tensor([0, 10, 16, 16 + last], device=policy.device))
    ours = policy.logits(policy.hidden_states(ids, positions, attention))
    module, given = policy.module, {"use_cache": False}
    head = module(input_ids=ids[None], position_ids=positions[None], attention=attention, **given).logits[0]
    if distance(ours, head) > 1e-3:
        raise ModelRefused("it does something behind its output head that this project does not know")
    module.set_attn_implementation("eager")
    theirs = [module(input_ids=i[None], position_ids=p[None], **given).logits[0] for i, p in alone]
    module.set_attn_implementation(ATTENTION_NAME)
    parts = ours.split([*lengths, last])
    worst = max(map(distance, parts, theirs))
    allowed = allowed_distance(policy.compute_dtype)
    if worst <= allowed:
        return
    attention = PackedAttention(torch.tensor([0, 10, 16], device=policy.device))
    without_far = policy.logits(policy.hidden_states(ids[:16], positions[:16], attention)).split(lengths)
    if max(map(distance, without_far, theirs[:2])) <= allowed:
        raise ModelRefused(_depends_on_length(policy, longest))
    raise ModelRefused(_differs("logits", worst, allowed))


def _depends_on_length(policy: Policy, longest: int) -> str:
    config: Any = policy.config
    rotary = getattr(config, "rope_parameters", None) or {}
    kind, original = rotary.get("rope_type"), rotary.get("original_max_position_embeddings")
    named = f" (rotary embeddings of type {kind!r})" if kind else ""
    within = f" within {original} tokens" if original else " smaller"
    return (
        f"a token's probability depends on the longest sequence of a pass{named} once that has {longest} tokens, so "
        "engine and learner would differ. Keep generator.max_input_length + "
        f"generator.sampling_params.max_generate_length{within}"
    )


def _differs(what: str, worst: float, allowed: float) -> str:
    return (
        f"{what} through our attention differ from transformers' by {worst:.1e} (relative, allowed {allowed}); its "
        "attention does something that this project does not know"
    )


def _check_long_samples(policy: Policy, longest: int) -> None:
    """Compare long samples that share a prefix, in one layer of each kind at least, by their hidden states."""
    size = min(longest, max([LONG, *(window + window // 4 + 8 for window in _windows(policy) if window < longest)]))
    if (rest := size // 4) < 2:
        return
    parts = _prefix_and_ends(policy, size - rest, rest, rest // 2)
    with _few_layers(policy):
        prefix, *ours = _packed_states(policy, parts)
        theirs = _states_apart(policy, parts)
        policy.module.set_attn_implementation(ATTENTION_NAME)
    worst = max(distance(prefix, states[: len(prefix)]) for states in theirs)
    worst = max(worst, *(distance(end, states[len(prefix) :]) for end, states in zip(ours, theirs, strict=True)))
    if worst > (allowed := allowed_distance(policy.compute_dtype)):
        raise ModelRefused(_differs(f"samples of {size} tokens", worst, allowed))


@torch.inference_mode(False)
@torch.enable_grad()
def _check_gradients(policy: Policy, longest: int) -> None:
    """Compare gradients of the first layers on samples that share a prefix and have several blocks of rows."""
    size = min(longest, GRADIENT_TOKENS)
    trained = [weight for weight in policy.module.parameters() if weight.requires_grad and not weight.is_inference()]
    if size < 4 or not trained:
        return
    parts = _prefix_and_ends(policy, size - size // 2, size // 2, size // 4)
    with _few_layers(policy):
        weights = [weight for weight in policy.module.base_model.parameters() if weight.requires_grad]
        _, *ours = _packed_states(policy, parts)
        generator = torch.Generator().manual_seed(size)
        pulls = [torch.randn(part.shape, generator=generator).to(part.device, part.dtype) for part in ours]
        found = _gradients(ours, pulls, weights)
        theirs = [states[len(parts[0]) :] for states in _states_apart(policy, parts)]
        expected = _gradients(theirs, pulls, weights)
        policy.module.set_attn_implementation(ATTENTION_NAME)  # not before: backward recomputes checkpointed layers
    worst = float((found - expected).norm() / expected.norm().clamp_min(1e-18))
    if not worst <= (allowed := 2 * allowed_distance(policy.compute_dtype)):
        raise ModelRefused(_differs("gradients", worst, allowed))


def _prefix_and_ends(policy: Policy, *lengths: int) -> list[Tensor]:
    """Return the token ids [n] of a prefix and of its ends, by their lengths; the same ones for the same lengths."""
    return [ids.clone() for ids in _random_ids(policy, sum(lengths)).split(list(lengths))]


def _packed_states(policy: Policy, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Return our hidden states of a prefix and its ends, which are computed together: the prefix once."""
    lengths = [len(part) for part in parts]
    starts = [0, *[lengths[0]] * (len(parts) - 1)]
    positions = torch.cat([torch.arange(s, s + n, device=policy.device) for s, n in zip(starts, lengths, strict=True)])
    offsets, parents = torch.tensor([0, *lengths]).cumsum(0), torch.tensor([-1, *[0] * (len(parts) - 1)])
    attention = PackedAttention(offsets, parents, policy.device)
    return policy.hidden_states(torch.cat(parts), positions, attention).split(lengths)


def _states_apart(policy: Policy, parts: list[Tensor]) -> list[Tensor]:
    """Return transformers' hidden states of the prefix with each of its ends. Its attention stays switched on."""
    module, base = policy.module, policy.module.base_model
    module.set_attn_implementation("sdpa" if module._supports_sdpa else "eager")
    prefix, *ends = parts
    return [base(input_ids=torch.cat([prefix, end])[None], use_cache=False).last_hidden_state[0] for end in ends]


def _gradients(parts: Sequence[Tensor], pulls: list[Tensor], weights: list[nn.Parameter]) -> Tensor:
    """Return the gradients of sum(parts * pulls), those of all weights in one vector (float32)."""
    total = torch.stack([(part * pull).sum() for part, pull in zip(parts, pulls, strict=True)]).sum()
    found = torch.autograd.grad(total, weights, allow_unused=True)
    return torch.cat([grad.float().flatten() for grad in found if grad is not None])


def _random_ids(policy: Policy, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(policy.config.vocab_size, (count,), generator=generator).to(policy.device)


def _windows(policy: Policy) -> Iterator[int]:
    """Yield how many tokens a token sees, and whatever else the configuration calls a window or a chunk."""
    for name, value in policy.config.to_dict().items():
        if ("window" in name or "chunk" in name) and isinstance(value, int) and value > 0:
            yield value


@contextmanager
def _few_layers(policy: Policy) -> Generator[None]:
    """Let the model end after its first layers, as soon as every kind of layer has been among them, for a while."""
    base, num_layers = policy.module.base_model, policy.cache_shape[0]
    for parent in base.modules():
        for name, layers in parent.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
                setattr(parent, name, layers[: _num_until_all_kinds(layers)])
                try:
                    yield
                finally:
                    setattr(parent, name, layers)
                return
    yield


def _num_until_all_kinds(layers: nn.ModuleList) -> int:
    """Return how many first layers hold every kind of layer, at least 2."""
    kinds = [_kind(layer) for layer in layers]
    return max(2, *(kinds.index(kind) + 1 for kind in kinds))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return what makes this layer unlike another, but its number: classes, sizes and settings of all its parts."""
    settings = []
    for part in layer.modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str)}
        settings.append(tuple(sorted((k, v) for k, v in plain.items() if "idx" not in k and k != "training")))
    return repr(layer), *settings
