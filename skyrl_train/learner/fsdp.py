"""A learner whose policy is sharded over N ranks: torch's FSDP2 beneath the learner of one process.

    block, block, ..., root     each is gathered for its part of a pass, and freed after it
    rows a..b of every weight   stay on a rank: float32, the masters of the optimizer

A rank computes its share of each mini batch (passes.py). The loss weights are made on the whole mini batch, so ranks
add up their gradients and divide by nothing. The root is a module whose forward is a whole pass: inside it every weight
of the root is whole, the embedding and the head, which may be the same, among them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from skyrl_train.learner.base import Learner
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.learner.ranks import Forward, Ranks, Values, rows_of
from skyrl_train.ops import ops_for
from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.lora import BaseUnderAdapters, merged_weights
from skyrl_train.policy.lora_files import save_whole
from skyrl_train.policy.model import Policy
from skyrl_train.policy.value_head import Critic, batch_values, hidden_before_tokens, values_of_hidden
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from skyrl_train.config import TrainerConfig

T = TypeVar("T")


def sharded_learner(
    policy: Policy,
    trainer: TrainerConfig,
    *,
    num_training_steps: int,
    temperature: float,
    reference: Policy | None,
    critic: Critic | None = None,
    offload: bool = False,
) -> Learner:
    """Shard the policy and its reference over all ranks of torch.distributed, and return this rank's learner.

    The caller has initialised torch.distributed, on GPUs with the backend "cpu:gloo,cuda:nccl": small tensors are added
    up on the host. Every rank calls it with the same weights and settings, and afterwards calls the same methods in the
    same order with the same arguments; all of them return the same. `offload`: shards and optimizer stay on the host.
    """
    if "cpu" not in dist.get_backend_config():
        raise ValueError(
            f"torch.distributed was initialised with {dist.get_backend_config()!r}, which has no backend for tensors "
            'on the host: use init_process_group("cpu:gloo,cuda:nccl") on GPUs and "gloo" on CPUs'
        )
    ranks = ShardedRanks(policy.compute_dtype)
    sharded = shard(policy, offload=offload)
    theirs: Policy | None = None
    if isinstance(reference, BaseUnderAdapters):
        theirs = _base_under_adapters(sharded)
    elif reference is not None:
        theirs = shard(reference, offload=offload)
    return TorchLearner(
        sharded,
        trainer,
        num_training_steps=num_training_steps,
        temperature=temperature,
        reference=theirs,
        critic=None if critic is None else shard_critic(critic, sharded, offload=offload),
        ranks=ranks,
    )


class ShardedRanks(Ranks):
    """The ranks of torch.distributed. `dtype`: what the policy computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._dtype = dtype

    def forward(self, policy: Policy) -> Forward:
        if not isinstance(policy, ShardedPolicy):
            raise TypeError("the policy is not sharded, and its ranks would compute with weights of their own")
        return policy.logprobs_of_batch

    def values_of(self, critic: Critic) -> Values:
        if not isinstance(critic, ShardedCritic):
            raise TypeError("the critic is not sharded, and its ranks would compute with weights of their own")
        return critic.values_of_batch

    def local(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            raise TypeError(
                "a weight is not sharded: shard the policy before its optimizer is made, whose masters would otherwise "
                "never get a gradient"
            )
        with torch.no_grad():
            return tensor.to_local().as_subclass(Tensor)

    def computed(self, parameter: Tensor) -> Tensor:
        rows = self.local(parameter)
        first, _ = rows_of(parameter.shape[0], self.rank, self.size)
        return _rounded(rows, first * math.prod(parameter.shape[1:]), self._dtype)

    def whole(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            raise TypeError("a weight is not sharded, so there is nothing to gather")
        rows = DTensor.from_local(
            self.computed(parameter),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
            run_check=False,
        )
        return rows.full_tensor()

    def save_merged(self, policy: Policy, folder: Path) -> None:
        """Gather every weight on all ranks, one after the other, and let rank 0 keep and write them."""
        weights: dict[str, Tensor] = {}
        for name, weight in merged_weights(policy.module, self.whole):
            if self.rank == 0:
                weights[name] = weight.cpu()
        adapters = {}
        for name, parameter in policy.module.named_parameters():
            if name.endswith((".lora_A", ".lora_B")):
                adapters[name] = self.whole(parameter).cpu()
        if self.rank == 0:
            save_whole(policy.module, weights, adapters, self._dtype, folder)

    def sum(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers)
        return numbers

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@dataclass(frozen=True)
class ShardedPolicy(Policy):
    """A policy whose weights are rows on every rank. Outside of a pass `module` holds nothing whole."""

    root: WholePass = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    computes_on: torch.device = field(kw_only=True)

    def logprobs_of_batch(self, batch: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
        """Return what `batch_logprobs` returns. It is a collective, forward and backward."""
        return self.root(batch_logprobs, self, batch, **settings)

    @property
    def device(self) -> torch.device:
        return self.computes_on

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.dtype


@dataclass(frozen=True)
class ShardedBase(ShardedPolicy):
    """The reference of a sharded policy with adapters: the same module, with these adapters in the policy's place."""

    adapters: dict[str, Tensor] = field(kw_only=True)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.adapters

    def logprobs_of_batch(self, batch: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
        with self._in_place():
            return super().logprobs_of_batch(batch, **settings)

    @contextmanager
    def _in_place(self) -> Generator[None]:
        parameters = dict(self.module.named_parameters())
        ours = {name: parameters[name].detach().clone() for name in self.adapters}
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                parameters[name].copy_(adapter)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, adapter in ours.items():
                    parameters[name].copy_(adapter)


@dataclass(frozen=True)
class ShardedCritic(Critic):
    """A critic whose weights, the head's among them, are rows on every rank. `root`: of its trunk."""

    root: WholePass = field(kw_only=True)
    computes_on: torch.device = field(kw_only=True)

    @property
    def device(self) -> torch.device:
        return self.computes_on

    def values_of_batch(self, batch: Batch) -> Tensor:
        """Return what `batch_values` returns. It is a collective, forward and backward."""
        if self.owns_trunk:
            return self.root(batch_values, self, self.head, batch)
        with torch.no_grad():
            hidden = self.root(hidden_before_tokens, self, batch)
        return values_of_hidden(self.head, hidden, batch)


class WholePass(nn.Module):
    """The root of the sharded modules. Its forward calls `compute`, for which every weight of the root is whole."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[..., T], *args: Any, **settings: Any) -> T:
        return compute(*args, **settings)


class RoundedShard(Tensor):
    """Rows of float32 masters. They are gathered as what one process would compute with: rounded by `Ops.rounded`.

    The two methods are FSDP2's extension of its all-gather. Left alone it would round to the nearest.
    """

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], None]:
        first, _ = rows_of(outer_size[0], mesh.get_local_rank(), mesh.size())
        rows, dtype = self.detach().as_subclass(Tensor), mp_policy.param_dtype or torch.float32
        rounded = _rounded(rows, first * math.prod(outer_size[1:]), dtype)
        missing = -(-outer_size[0] // mesh.size()) - len(rounded)
        return (torch.cat([rounded, rounded.new_zeros(missing, *outer_size[1:])]) if missing else rounded,), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the gathered rows, and that they need nothing else; with `out` they are there already."""
        return (gathered[0], gathered) if out is None else None


def shard(policy: Policy, *, offload: bool = False) -> ShardedPolicy:
    """Return the policy with its weights sharded, block by block; those that are trained become float32 masters."""
    device, dtype, root = policy.device, policy.compute_dtype, WholePass(policy.module)
    _shard_weights([*_blocks(policy), root], device, dtype, offload=offload)
    return ShardedPolicy(policy.module, policy.gradient_checkpointing, root=root, dtype=dtype, computes_on=device)


def shard_critic(critic: Critic, policy: ShardedPolicy, *, offload: bool = False) -> ShardedCritic:
    """Return the critic with its weights sharded likewise. `policy`: whose hidden states it reads without a trunk."""
    if critic.owns_trunk:
        device, dtype, root = critic.device, critic.compute_dtype, WholePass(critic.module)
        _shard_weights([*_blocks(critic), root], device, dtype, offload=offload)
    else:
        device, root = policy.device, policy.root
        _shard_weights([critic.head], device, policy.compute_dtype, offload=offload)
    return ShardedCritic(
        critic.module,
        critic.gradient_checkpointing,
        head=critic.head,
        owns_trunk=critic.owns_trunk,
        root=root,
        computes_on=device,
    )


def _shard_weights(modules: list[nn.Module], device: torch.device, dtype: torch.dtype, *, offload: bool) -> None:
    """Shard each module; the last one is around all the others."""
    mesh, root = init_device_mesh(device.type, (dist.get_world_size(),)), modules[-1]
    for parameter in root.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    precision = MixedPrecisionPolicy()
    if dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offloading = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nobody writes into it
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=offloading)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided already: a mean would be N times too small
            module.set_force_sum_reduction_for_comms(True)  # as gloo has it; NCCL could also multiply on the way
            module.set_reduce_scatter_unused_params(True)  # a rank may have tokens for a weight and another none
    if dtype != torch.float32:
        for parameter in root.parameters():
            if parameter.requires_grad and isinstance(parameter, DTensor):
                parameter._local_tensor = parameter._local_tensor.as_subclass(RoundedShard)


def _base_under_adapters(policy: ShardedPolicy) -> ShardedBase:
    return ShardedBase(
        policy.module,
        policy.gradient_checkpointing,
        root=policy.root,
        dtype=policy.dtype,
        computes_on=policy.computes_on,
        adapters=BaseUnderAdapters.of(policy).adapters,
    )


def _blocks(policy: Policy) -> list[nn.Module]:
    """Return the layers: the module list that is as long as the model has layers. Without one, all is the root."""
    num_layers = policy.config.num_hidden_layers
    for module in policy.module.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    return []


def _rounded(rows: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Return rows as the policy computes with them; `first`: how many numbers of the whole weight stand before them."""
    return rows if rows.dtype == dtype else ops_for(rows.device, dtype).rounded(rows, dtype, first)
