"""Low-rank adapters: only A and B of y = x W^T + b + (alpha / rank) (x A^T) B^T learn (LoRA, Hu et al. 2021, eq. 3).

The linear layers of a policy are replaced in place, under their old names: whoever calls the module computes with the
adapters, and whoever reads a layer's `weight` reads the frozen base; `effective_weight` is both in one matrix. The base
may rest in 4 bits (four_bit.py).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl_train.ops import ops_for
from skyrl_train.policy.four_bit import FourBitLinear, FourBitMatrix, four_bit_matrices
from skyrl_train.policy.model import Policy

if TYPE_CHECKING:
    from skyrl_train.config import LoraConfig
    from skyrl_train.ops.base import Attention

STARTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {  # A at the start, by init_method; B is always 0
    "kaiming": lambda a, rng: nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng),
    "xavier": lambda a, rng: nn.init.xavier_normal_(a, generator=rng),
    "normal": lambda a, rng: nn.init.normal_(a, std=1 / len(a), generator=rng),  # 1 / rank
}


class NoSuchModules(ValueError):
    """The configuration names modules that the model does not have."""


class LoraLinear(nn.Linear):
    """A frozen linear layer and its adapter, named as in PEFT: lora_A [rank, in], lora_B [out, rank]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._take(base)
        self.bias = base.bias
        empty = torch.empty(0, dtype=self.base.dtype, device=self.base.device)
        self.lora_A = nn.Parameter(empty.new_zeros(rank, base.in_features))
        self.lora_B = nn.Parameter(empty.new_zeros(base.out_features, rank))
        self.scale = scale

    def _take(self, base: nn.Linear) -> None:
        self.weight = base.weight

    @property
    def base(self) -> Tensor | FourBitMatrix:
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        rows = input if input.dim() == 2 else input.flatten(0, -2)
        out = _AdaptedLinear.apply(rows, self.base, self.bias, self.lora_A, self.lora_B, self.scale)
        return out if input.dim() == 2 else out.unflatten(0, input.shape[:-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_A)}"


class FourBitLoraLinear(LoraLinear):
    """An adapter on a layer that rests in 4 bits. Each reader of `weight` gets a whole matrix of its own."""

    matrix: FourBitMatrix

    def _take(self, base: nn.Linear) -> None:
        assert isinstance(base, FourBitLinear)
        self.matrix = base.matrix

    @property
    def base(self) -> FourBitMatrix:
        return self.matrix

    @property
    def weight(self) -> Tensor:  # ty: ignore[incompatible-property-override]
        return self.matrix.whole()


class _AdaptedLinear(torch.autograd.Function):
    """Maps rows [T, in] -> [T, out]; the adapter's matmuls are added in place, forward and backward.

    A base in 4 bits is made whole in each of them, and not kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        base: Tensor | FourBitMatrix,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
    ) -> Tensor:
        thin = F.linear(rows, lora_a)
        is_whole = isinstance(base, Tensor)
        out = F.linear(rows, base if is_whole else base.whole(), bias).addmm_(thin, lora_b.t(), alpha=scale)
        ctx.save_for_backward(rows, thin, lora_a, lora_b, base if is_whole else None)
        ctx.four_bits, ctx.scale = None if is_whole else base, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, thin, lora_a, lora_b, weight = ctx.saved_tensors
        [grad_out] = grads
        grad_thin = (grad_out @ lora_b).mul_(ctx.scale)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            weight = ctx.four_bits.whole() if weight is None else weight
            grad_rows = (grad_out @ weight).addmm_(grad_thin, lora_a)
        return grad_rows, None, None, grad_thin.t() @ rows, (grad_out.t() @ thin).mul_(ctx.scale), None


def add_adapters(policy: Policy, config: LoraConfig, *, seed: int) -> None:
    """Freeze the policy and give the linear layers that `config` names an adapter which changes nothing yet.

    The same seed gives the same adapters. Raises `NoSuchModules`.
    """
    module, generator = policy.module, torch.Generator().manual_seed(seed)
    names = adapted_names(policy, config)
    module.requires_grad_(False)
    for name in names:
        base: Any = module.get_submodule(name)
        kind = FourBitLoraLinear if isinstance(base, FourBitLinear) else LoraLinear
        layer = kind(base, config.rank, config.alpha / config.rank)
        start = STARTS[config.init_method](torch.empty(layer.lora_A.shape), generator)
        layer.lora_A.data.copy_(start)
        module.set_submodule(name, layer)
    module.train(module.training)


def adapters_of(module: nn.Module) -> dict[str, LoraLinear]:
    """Full name -> layer; empty for a policy that is trained whole."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}


def effective_weight(linear: nn.Linear) -> Tensor:
    """Return what the layer multiplies by, [out, in], its adapter included, rounded to the layer's type by ops/."""
    return _merged(linear, Tensor.detach) if isinstance(linear, LoraLinear) else linear.weight.detach()


@torch.no_grad()
def _merged(layer: LoraLinear, whole: Callable[[Tensor], Tensor]) -> Tensor:
    weight = whole(layer.weight)
    change = torch.mm(whole(layer.lora_B).float(), whole(layer.lora_A).float())
    return ops_for(weight.device, weight.dtype).rounded(change.mul_(layer.scale).add_(weight), weight.dtype)


def merged_weights(
    module: nn.Module, whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight that the module computes with, its adapter included; one that has two names comes once.

    `whole` returns all rows of a parameter.
    """
    adapted = adapters_of(module)
    for name, parameter in module.named_parameters():
        layer, _, last = name.rpartition(".")
        if last not in ("lora_A", "lora_B"):
            is_adapted = last == "weight" and layer in adapted
            yield name, _merged(adapted[layer], whole) if is_adapted else whole(parameter)
    for layer, matrix in four_bit_matrices(module).items():
        yield f"{layer}.weight", _merged(adapted[layer], whole) if layer in adapted else matrix.whole()


def adapted_names(policy: Policy, config: LoraConfig) -> list[str]:
    """Full names of the layers that get an adapter, in the model's order: those of `target_modules` that are not among
    `exclude_modules`. The output head never gets one: its weights may be the embedding's too."""
    head, family = policy.module.get_output_embeddings(), type(policy.module).__name__
    kinds = nn.Linear, FourBitLinear
    linears = [name for name, layer in policy.module.named_modules() if type(layer) in kinds and layer is not head]
    if not linears:
        raise NoSuchModules(f"{family} has no linear layers that could get an adapter; train it whole with rank=0")
    targets = linears
    if config.target_modules != "all-linear":
        targets = _chosen("target_modules", _listed(config.target_modules), linears, family)
    excluded = _chosen("exclude_modules", _listed(config.exclude_modules), linears, family)
    if not (left := [name for name in targets if name not in excluded]):
        raise NoSuchModules("exclude_modules excludes every layer of target_modules: nothing is left to train")
    return left


def is_named(full_name: str, names: Collection[str]) -> bool:
    """PEFT's rule: the whole name, or its end after a dot."""
    return any(full_name == name or full_name.endswith(f".{name}") for name in names)


def _chosen(key: str, names: list[str], linears: list[str], family: str) -> list[str]:
    ends = sorted({name.rpartition(".")[2] for name in linears})
    for name in names:
        if not any(is_named(linear, [name]) for linear in linears):
            near = difflib.get_close_matches(name, [*ends, *linears], n=2) or ends
            raise NoSuchModules(
                f"{key} names {name!r}, but {family} has no such linear layer inside; nearest: {', '.join(near)} "
                f"(all: {', '.join(ends)}; the output head takes no adapter)"
            )
    return [linear for linear in linears if is_named(linear, names)]


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


@dataclass(frozen=True)
class BaseUnderAdapters(Policy):
    """The reference policy of a policy with adapters: the same module, with these adapters in place of the policy's.

    It begins as the base, with every B zero. `adapters`: lora_A and lora_B of every layer, by their full names.
    """

    adapters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy) -> BaseUnderAdapters:
        trained = {name: p.detach() for name, p in policy.module.named_parameters() if p.requires_grad}
        adapters = {name: p.clone() if name.endswith("lora_A") else torch.zeros_like(p) for name, p in trained.items()}
        return cls(policy.module, adapters=adapters)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.adapters

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        with self._in_place():
            return super().hidden_states(input_ids, position_ids, attention)

    @contextmanager
    def _in_place(self) -> Generator[None]:
        parameters = dict(self.module.named_parameters())
        theirs = {name: parameters[name].data for name in self.adapters}
        try:
            for name, adapter in self.adapters.items():
                parameters[name].data = adapter
            yield
        finally:
            for name, tensor in theirs.items():
                parameters[name].data = tensor
