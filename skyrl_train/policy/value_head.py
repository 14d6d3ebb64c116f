"""The critic: a causal language model with one number per hidden state in place of the output head.

tokens     1 2 5 6 9 7        prompt [1 2], sampled [5 6], observation [9], sampled [7]
loss_mask  0 0 1 1 0 1
values     . . V V . V        V[t] is predicted from the hidden state of token t - 1, before token t is known
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from skyrl_train.batch.prefix_tree import share_prefixes
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.model import Policy
from skyrl_train.types import Batch

NAME = "value_head"  # of the head in a trunk of its own, and in checkpoints


class ValueHead(nn.Module):
    """A linear map of a hidden state to a value, without a bias. It begins at zero: no seed, and no value is wild."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [N] float32 of hidden states [N, hidden]."""
        return hidden.float() @ self.weight.float()


@dataclass(frozen=True)
class Critic(Policy):
    """A trunk with a value head. `owns_trunk`: the trunk is trained too, and the head is a part of its module."""

    head: ValueHead = field(kw_only=True)
    owns_trunk: bool = field(kw_only=True)

    @classmethod
    def of(cls, trunk: Policy) -> Self:
        """Return a critic that trains this trunk, whose output head is taken out, as nobody needs it."""
        head = _head_for(trunk)
        trunk.module.set_output_embeddings(nn.Identity())
        trunk.module.add_module(NAME, head)
        return cls(trunk.module, trunk.gradient_checkpointing, head=head, owns_trunk=True)

    @classmethod
    def on(cls, policy: Policy) -> Self:
        """Return a critic that reads the hidden states of the policy: only the head learns from its loss."""
        return cls(policy.module, head=_head_for(policy), owns_trunk=False)

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the critic's loss moves, by name."""
        return list(self.module.named_parameters()) if self.owns_trunk else [(f"{NAME}.weight", self.head.weight)]


def batch_values(trunk: Policy, head: nn.Module, batch: Batch, *, learns_trunk: bool = True) -> Tensor:
    """Return values of one forward pass, [T] float32, 0 wherever loss_mask is False.

    `learns_trunk`: the values have a gradient to the trunk's weights.
    """
    with torch.set_grad_enabled(learns_trunk and torch.is_grad_enabled()):
        hidden = hidden_before_tokens(trunk, batch)
    return values_of_hidden(head, hidden, batch)


def hidden_before_tokens(trunk: Policy, batch: Batch) -> Tensor:
    """Return the hidden state before each token with loss_mask, [N, hidden] float32.

    A prefix that samples share is computed once.
    """
    segments, device = share_prefixes(batch), trunk.device
    attention = PackedAttention(segments.offsets, segments.before, device)
    hidden = trunk.hidden_states(segments.input_ids.to(device), segments.position_ids.to(device), attention)
    before = segments.row[torch.nonzero(batch.loss_mask).flatten() - 1].to(device)
    return hidden.float().index_select(0, before)  # samples may share a row, so backward sums in float32


def values_of_hidden(head: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """Return values [T] of what `hidden_before_tokens` has found."""
    values = head(hidden)
    tokens = torch.nonzero(batch.loss_mask).flatten().to(values.device)
    return values.new_zeros(batch.num_tokens).index_put((tokens,), values)


def _head_for(trunk: Policy) -> ValueHead:
    return ValueHead(trunk.config.hidden_size).to(trunk.device, trunk.compute_dtype)
