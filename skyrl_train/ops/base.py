"""The protocol of the arithmetic of a pass, and the shapes of it. `ops_for` in `__init__.py` chooses who computes.

`reference.py` computes everything in plain torch. `cuda.py` and `cpu/` compute the same faster, tested against it.
T counts the tokens of a pass, all sequences end to end; D is the size of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PackedSegments:
    """Token sequences that may share prefixes, end to end: segment n is tokens [bounds[n], bounds[n + 1]).

    parents[n] is the segment that n continues, -1 if it begins a sequence. A segment sees its parent whole, and what
    the parent continues, and so on. A parent comes before those that continue it.
    """

    bounds: list[int]  # N + 1
    parents: list[int]  # N

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]


class SegmentAttention(Protocol):
    """Causal attention of the tokens of one pass, layer after layer: exact, differentiable, without state."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Attend with query [T, heads, D] to key and value [T, kv_heads, D] -> [T, heads, D].

        `window`: a token sees itself and the `window - 1` tokens before it; None: everything before it.
        """
        ...


class Attention(Protocol):
    """The attention of one forward pass, as the learner or the engine chose it: called layer by layer."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Attend with the pass's new tokens: query [T, heads, D], key and value [T, kv_heads, D] -> [T, heads, D].

        `window`: a token sees itself and the `window - 1` tokens before it; None: everything before it.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """Settings of one step of AdamW, Loshchilov and Hutter (2019), algorithm 2; `clip` is a factor of all gradients."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class MasterWeight:
    """A float32 master with its gradient and AdamW's moments, and the parameter that the model computes with.

    The parameter may be the master itself. `step` ([] float32) counts the steps so far; `Ops.adamw` adds one to it.
    """

    master: Tensor
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class Decoder(Protocol):
    """The forward pass of an engine's step: the model itself, or a faster one over a second copy of its weights."""

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Any) -> Tensor:
        """Return the hidden states [T, hidden] after the final norm; input_ids, position_ids [T]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [*, vocab] of hidden states [*, hidden]."""
        ...

    def weights_changed(self) -> None:
        """Take up weights that have changed in place."""
        ...


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Rows that are one token each, with the place of each in an engine's cache, all [N] int64.

    The first `prefix_lengths` tokens of a row's sequence are the same in slot `prefix_slots`. They are read there, so
    from memory only once when neighbours have the same.
    """

    slots: Tensor
    positions: Tensor
    prefix_slots: Tensor
    prefix_lengths: Tensor

    def __len__(self) -> int:
        return len(self.slots)


class RowAttention(ABC):
    """The attention of a pass over an engine's cache, for decoders that attend row by row in kernels of their own."""

    @property
    @abstractmethod
    def store(self) -> Tensor:
        """Return the cache: [layers, keys and values, slots, kv_heads, length, D]."""

    @property
    @abstractmethod
    def is_short(self) -> bool:
        """Return whether every row of the pass is one of `row_tokens`."""

    @property
    @abstractmethod
    def row_tokens(self) -> RowTokens:
        """Return the tokens of all chunks that are short, which come first."""

    @property
    @abstractmethod
    def places(self) -> Tensor:
        """Return where each new key of the first head begins in the keys of a layer, counted in numbers, [T] int64."""

    @abstractmethod
    def attend_rows(
        self,
        attend: Callable[..., Tensor],
        layer: int,
        heads: Tensor,
        rotate: Callable[[Tensor, Tensor, Tensor], None],
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend with heads [T, heads + 2 kv_heads, D] -> [T, heads, D], by `attend` for the short chunks.

        `rotate(keys, values, places)` rotates queries and keys in place and stores keys and values in the cache.
        """

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See `Attention`."""


class Draw(Protocol):
    """Draws one token per row."""

    def __call__(
        self, logits: Tensor, temperatures: list[float], uniforms: list[float], banned: list[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        """Return tokens and logprobs of the rows of logits [rows, vocab], as c/draw.h says."""
        ...


class Ops(Protocol):
    """The arithmetic of a forward and backward pass on one device, in one type of numbers."""

    keeps_buffers: bool  # whether new memory costs so much that large buffers are kept for the next pass

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return the RMSNorm of x [*, hidden] (arXiv 1910.07467, eq. 4): x / rms(x) * weight."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return (RMSNorm of x + residual, x + residual), each [T, hidden]."""
        ...

    def rotate(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key [T, heads, D] with rotary positions (arXiv 2104.09864, eq. 34). May reuse their memory.

        The halves of a head are the pairs. cosine, sine [T, D].
        """
        ...

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up (SwiGLU, arXiv 2002.05202, eq. 5). Backward may reuse the memory of both."""
        ...

    def block(self, block: Any, row: Tensor, position: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """Return the residual stream [T, hidden] after a transformers block of a known family.

        row [T, hidden]: the stream before it; position: cosine and sine, [T, D] each.
        """
        ...

    def segment_attention(self, segments: PackedSegments, device: torch.device) -> SegmentAttention:
        """Return the causal attention of the tokens of `segments`."""
        ...

    def logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(target), the log of the sum of exponentials and the entropy, each [n] float32.

        All are of softmax(logits / temperature); logits [n, vocab], targets [n].
        """
        ...

    def logprobs_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        normalizers: Tensor,
        entropies: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropies: Tensor | None,
    ) -> None:
        """Write the gradient of the logits over them, from those of log p(target) and of the entropy, [n] each.

        d log p(target) / dz = [target] - p,  dH / dz = -p (log p + H)
        """
        ...

    def round_masters(self, masters: Tensor, first: int = 0) -> Tensor:
        """Return float32 masters in bfloat16, rounded up or down by thresholds of their own, see reference.py.

        `first`: how many numbers of the whole tensor stand before these, which are a part of it.
        """
        ...

    def rounded(self, masters: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
        """Return float32 masters in another type: bfloat16 by `round_masters`, any other rounded to the nearest."""
        ...

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        """Return the 2-norm of all gradients together."""
        ...

    def adamw(self, weights: Sequence[MasterWeight], settings: AdamWSettings) -> None:
        """Move the masters by one step and write them, rounded, into their parameters."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros in memory that is fast to read from end to end."""
        ...

    def decoders(
        self, module: nn.Module, weight_of: Callable[[nn.Linear], Tensor]
    ) -> Iterator[tuple[Decoder, Draw | None]]:
        """Yield decoders of a model of a known family, the fastest first, each with what draws its tokens.

        `weight_of` returns the matrix [out, in] that a linear layer multiplies by, its adapter included.
        """
        ...
