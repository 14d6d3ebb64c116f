"""SkyRL's layout of a batch, [rows, response tokens], and the way back to ours, where all tokens lie end to end.

our tokens    1 2 5 6 9 7 | 1 2 8        prompt [1 2], then what was sampled or observed
padded        5 6 9 7
              8 0 0 0                    responses begin at column 0 and are padded on the right
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_train.types import Batch


@dataclass(frozen=True)
class PaddedRows:
    """The place of each response token of a batch in the padded layout. N response tokens, T tokens in all."""

    tokens: Tensor  # [N] positions in the batch
    rows: Tensor  # [N]
    columns: Tensor  # [N]
    shape: tuple[int, int]
    num_tokens: int  # T

    def pad(self, values: Tensor) -> Tensor:
        """Return values [T] as [rows, columns], 0 where no token stands. Keeps the gradient."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values[self.tokens])

    def unpad(self, values: Tensor) -> Tensor:
        """Return values [rows, columns] as [T], 0 at tokens of the prompt. Keeps the gradient."""
        found = values[self.rows, self.columns]
        return found.new_zeros(self.num_tokens).index_put((self.tokens,), found)

    @property
    def response_mask(self) -> Tensor:
        """Return [rows, columns] int64: 1 at every response token, observations included."""
        ones = torch.ones(self.num_tokens, dtype=torch.long, device=self.tokens.device)
        return self.pad(ones)


def sample_rows(batch: Batch) -> PaddedRows:
    """Return the layout with a row for each sample of the batch."""
    tokens = _response_tokens(batch)
    return _laid_out(tokens, batch.sample_index[tokens], batch.num_samples, batch)


def trajectory_rows(batch: Batch) -> PaddedRows:
    """Return the layout with a row for each trajectory, in order; the responses of its samples follow each other."""
    tokens = _response_tokens(batch)
    trajectories, row_of_sample = batch.trajectory_index.unique(return_inverse=True)
    rows = row_of_sample[batch.sample_index[tokens]]
    order = rows.argsort(stable=True)
    return _laid_out(tokens[order], rows[order], len(trajectories), batch)


def _response_tokens(batch: Batch) -> Tensor:
    """Return the positions of the tokens behind each sample's prompt, which ends where the policy first sampled."""
    first = batch.num_prompt_tokens
    if first is None:
        position = torch.where(batch.loss_mask, batch.position_ids, batch.num_tokens)
        first = torch.full_like(batch.lengths, batch.num_tokens).scatter_reduce(0, batch.sample_index, position, "amin")
    return torch.nonzero(batch.position_ids >= first[batch.sample_index]).flatten()


def _laid_out(tokens: Tensor, rows: Tensor, num_rows: int, batch: Batch) -> PaddedRows:
    lengths = torch.bincount(rows, minlength=num_rows)
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(len(tokens), device=tokens.device) - starts[rows]
    longest = int(lengths.max()) if len(lengths) else 0
    return PaddedRows(tokens, rows, columns, (num_rows, longest), batch.num_tokens)
