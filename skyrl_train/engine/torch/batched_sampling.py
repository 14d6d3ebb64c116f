"""Sampling on a GPU: all rows at once, the small inputs in one copy there, tokens and logprobs in one copy back.

The same distribution and the same random numbers as row by row in sampling.py. Only rows with top-k or top-p are
sorted, equal weights by token. Between drawing and reading the scheduler may start the next step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyrl_train.engine.torch.draws import NOT_FINITE, Row, chosen, moved

UNDERFLOWED = 1e-20  # next to nothing of a row is left beside what is banned: its weights are computed again
SORTED_AT_ONCE = 64  # rows; sorting takes some thirty bytes per number


class BatchedDraw:
    """Tokens drawn on the device, as `sampling.sample` says, which uses this for logits on a GPU.

    `tokens` [rows] can be computed with there before the host has read them. `read` may find that next to nothing of a
    row was left beside its banned tokens. It then draws again, and `is_redrawn` says that `tokens` do not count.
    """

    def __init__(self, logits: Tensor, rows: list[Row]) -> None:
        self._rows, self.is_redrawn = rows, False
        self._is_plain = all(row.is_plain for row in rows)
        self._scores = logits
        if any(row.params.temperature not in (0, 1) for row in rows):
            temperatures = moved([row.params.temperature or 1.0 for row in rows], logits.device)
            self._scores = logits / temperatures.float()[:, None]
        drawn = self._draw_plainly() if self._is_plain else self._draw_cut()
        self.tokens = drawn[0]
        self._arriving = Arriving(torch.stack([tensor.double() for tensor in drawn]))

    def read(self) -> tuple[list[int], list[float]]:
        """Wait for this draw alone, and return its tokens and logprobs. FloatingPointError if logits are not finite."""
        tokens, logprobs, sign = self._arriving.tolist()
        if not all(map(math.isfinite, sign)):
            raise FloatingPointError(NOT_FINITE)
        if self._is_plain and min(sign) <= UNDERFLOWED:
            self.is_redrawn = True
            tokens, logprobs, _ = torch.stack([tensor.double() for tensor in self._draw_cut()]).tolist()
        return [int(token) for token in tokens], logprobs

    def _draw_plainly(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, logprobs and the largest probability of each row that is left, [rows] each."""
        weights = self._scores.softmax(-1, dtype=torch.float32)
        if places := _banned(self._rows, weights.device):
            weights[places] = 0
        tokens = chosen(weights, self._rows)
        return tokens, weights.gather(1, tokens[:, None]).squeeze(1).log(), weights.amax(-1)

    def _draw_cut(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, logprobs and the logarithm of the sum of each row, [rows] each."""
        scores = self._scores.to(torch.float32, copy=True)
        normalizers = scores.logsumexp(-1)
        tokens = chosen(cut_weights(scores.clone(), self._rows), self._rows)
        return tokens, scores.gather(1, tokens[:, None]).squeeze(1) - normalizers, normalizers


class Arriving:
    """Numbers on their way from the device to the host, behind which the device may go on computing."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._event = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tolist(self) -> list:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def _banned(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Row and token of each that is banned."""
    banned = [(index, token) for index, row in enumerate(rows) for token in row.banned]
    if not banned:
        return None
    index, token = moved(banned, device).t().long()
    return index, token


def cut_weights(scores: Tensor, rows: list[Row]) -> Tensor:
    """Return unnormalised probabilities, exactly 0 where a token is cut. Overwrites scores [rows, vocab].

    In the order of sampling.py: the repetition penalty, the ban, top-k, top-p of what is left, min-p.
    """
    _penalise(scores, rows)
    if places := _banned(rows, scores.device):
        scores[places] = -torch.inf
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    params = [row.params for row in rows]
    cut = [i for i, p in enumerate(params) if 0 < p.top_k < weights.shape[1] or p.top_p < 1]
    for start in range(0, len(cut), SORTED_AT_ONCE):
        here = cut[start : start + SORTED_AT_ONCE]
        top_k = [params[i].top_k if params[i].top_k > 0 else weights.shape[1] for i in here]
        index, most, enough = moved([here, top_k, [params[i].top_p for i in here]], weights.device)
        weights[index.long()] = _top(weights[index.long()], most[:, None], enough[:, None])
    if any(p.min_p > 0 for p in params):
        least = moved([p.min_p for p in params], weights.device).float()[:, None] * weights.amax(-1, keepdim=True)
        weights.masked_fill_(weights < least, 0)
    return weights


def _penalise(scores: Tensor, rows: list[Row]) -> None:
    """Repetition penalty (Keskar et al., 2019, section 4.1; negative scores are multiplied), on all tokens so far."""
    seen = [
        (index, token, row.params.repetition_penalty)
        for index, row in enumerate(rows)
        if row.params.repetition_penalty != 1
        for token in set(row.tokens)
    ]
    if seen:
        index, token, penalty = moved(seen, scores.device).t()
        places = index.long(), token.long()
        values, by = scores[places], penalty.float()
        scores.index_put_(places, torch.where(values > 0, values / by, values * by))


def _top(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The `top_k` heaviest of each row, then the fewest of these that hold `top_p` of their sum. Both [rows, 1]."""
    ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(ordered.shape[1], device=ordered.device) >= top_k, 0)
    held = ordered.double().cumsum(-1)
    before = torch.nn.functional.pad(held[:, :-1], (1, 0))  # by the heavier ones
    ordered.masked_fill_((before >= top_p * held[:, -1:]) & (top_p < 1), 0)
    return torch.zeros_like(weights).scatter_(1, tokens, ordered)
