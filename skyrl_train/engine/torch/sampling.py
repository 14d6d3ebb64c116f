"""Logits to tokens: temperature, the filters, one uniform number per token, and the exact log probability.

Rows without filters are drawn by the decoder's own `draw` where it has one, all others row by row. On a GPU see
batched_sampling.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_train.engine.torch.batched_sampling import BatchedDraw
from skyrl_train.engine.torch.draws import NOT_FINITE, Row, chosen, uniforms_of
from skyrl_train.ops.base import Draw


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens and logprobs that the host has."""

    result: tuple[list[int], list[float]]

    def read(self) -> tuple[list[int], list[float]]:
        return self.result


def begin_sampling(logits: Tensor, rows: list[Row], draw: Draw | None = None) -> Drawn | BatchedDraw:
    """Return what `sample` returns, to be read; from a GPU without waiting for it."""
    if logits.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return BatchedDraw(logits, rows)
    return Drawn(_sample_on_host(logits, rows, draw))


def sample(logits: Tensor, rows: list[Row], draw: Draw | None = None) -> tuple[list[int], list[float]]:
    """Return a token per row of logits [rows, vocab], and its uncut logprob under softmax(logits / temperature).

    Temperature 0 takes the most likely token and reports its log probability at temperature 1. Rows without filters are
    drawn by `draw` if given.
    """
    return begin_sampling(logits, rows, draw).read()


def _sample_on_host(logits: Tensor, rows: list[Row], draw: Draw | None) -> tuple[list[int], list[float]]:
    logits = logits.cpu()  # torch has no running sums on a GPU that are the same twice
    if draw is not None and all(row.is_plain for row in rows):
        banned = [(index, token) for index, row in enumerate(rows) for token in row.banned]
        tokens, logprobs = draw(logits, [row.params.temperature for row in rows], uniforms_of(rows), banned)
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError(NOT_FINITE)
        if -1 not in tokens:
            return tokens, logprobs
    temperatures = torch.tensor([row.params.temperature or 1.0 for row in rows], device=logits.device)[:, None]
    weights = logits.to(torch.float32, copy=True)
    if any(row.params.temperature not in (0, 1) for row in rows):
        weights /= temperatures
    top = weights.amax(-1, keepdim=True)
    weights.sub_(top).exp_()  # unnormalised probabilities, at most 1
    total = weights.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise FloatingPointError(NOT_FINITE)
    underflowed = _ban(weights, rows)
    for index, row in enumerate(rows):
        _cut(weights[index], logits[index], row, again=row.params.repetition_penalty != 1 or index in underflowed)
    tokens = chosen(weights, rows)[:, None]
    logprobs = logits.gather(1, tokens).float() / temperatures - top - total.log()
    return tokens.squeeze(1).tolist(), logprobs.squeeze(1).tolist()


def _ban(weights: Tensor, rows: list[Row]) -> set[int]:
    """Banned tokens weigh 0. Returns the rows in which next to nothing is left, for the rest had underflowed."""
    banned = [(index, token) for index, row in enumerate(rows) for token in row.banned]
    if not banned:
        return set()
    places = torch.tensor(banned, device=weights.device)
    weights[places[:, 0], places[:, 1]] = 0
    return set((weights.amax(-1) < 1e-20).nonzero().flatten().tolist())


def _cut(weight: Tensor, logits: Tensor, row: Row, *, again: bool) -> None:
    """Change one row's weights [vocab] in place: top-k, then top-p of what is left, then min-p.

    A token that is cut weighs exactly 0. `again`: from the logits again, with the repetition penalty and the ban.
    """
    params = row.params
    if again:
        scores = _penalised(logits.float() / (params.temperature or 1.0), row)
        scores[list(row.banned)] = -torch.inf
        weight.copy_((scores - scores.max()).exp_())
    if 0 < params.top_k < weight.numel():
        _keep(weight, weight.topk(params.top_k).indices)
    if params.top_p < 1:
        _keep(weight, _nucleus(weight, params.top_p))
    if params.min_p > 0:
        weight[weight < params.min_p * weight.max()] = 0


def _penalised(scores: Tensor, row: Row) -> Tensor:
    """Repetition penalty (Keskar et al., 2019, section 4.1; negative scores are multiplied), on all tokens so far."""
    seen = torch.tensor(sorted(set(row.tokens)), dtype=torch.long, device=scores.device)
    values, penalty = scores[seen], row.params.repetition_penalty
    scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return scores


def _nucleus(weight: Tensor, top_p: float) -> Tensor:
    """The fewest tokens, likeliest first, that hold at least `top_p` of the probability (Holtzman et al., 2020).

    Sorts only tokens above a cutoff if those hold enough, which spares sorting the vocabulary.
    """
    target, likeliest = top_p * weight.sum(dtype=torch.float64), weight.max()
    indices = held = torch.empty(0)
    for cutoff in (1e-3, 1e-5, 0.0):
        indices = (weight >= cutoff * likeliest).nonzero().squeeze(1)
        values, order = weight[indices].sort(descending=True, stable=True)
        indices, held = indices[order], values.double().cumsum(0)
        if held[-1] >= target:
            break
    return indices[: int(torch.searchsorted(held, target)) + 1]


def _keep(weight: Tensor, indices: Tensor) -> None:
    kept = weight[indices]
    weight.zero_()
    weight[indices] = kept
