"""The Triton kernels of a GPU, interpreted on a CPU in float32 and compared with plain torch. A test runs it apart.

Prints how far each is from the plain computation, as JSON.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from skyrl_train.ops import REFERENCE, cuda_decode, cuda_kernels
from skyrl_train.ops.ragged import Ragged, ragged_attention


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).abs().max())


def attention(heads: int, kv_heads: int, dim: int, used: list[int], window: int | None, num_pages: int) -> float:
    """Sequences of these lengths over pages in no order, the first of which all of them share."""
    page_size, longest = 64, 16
    keys, values = (random(num_pages, page_size, kv_heads, dim, seed=i) for i in (1, 2))
    generator = torch.Generator().manual_seed(3)
    pages = torch.randint(1, num_pages, (len(used), longest), generator=generator, dtype=torch.int32)
    pages[:, 0] = 5
    query, num_keys = random(len(used), heads, dim, seed=4), torch.tensor(used)
    ours = cuda_decode.attend(query, keys, values, num_keys, pages, scale=dim**-0.5, window=window)
    ragged = Ragged.of([1] * len(used), used, query.device, pages)
    return distance(ours, ragged_attention(query, keys, values, ragged, scale=dim**-0.5, window=window))


def written() -> float:
    keys, values = (random(40, 2, 8, seed=i) for i in (1, 2))
    new, rows = [random(5, 2, 8, seed=i) for i in (3, 4)], torch.tensor([7, 0, 39, 12, 3])
    expected = [store.index_copy(0, rows, added) for store, added in zip((keys, values), new, strict=True)]
    cuda_decode.write(*new, keys, values, rows)
    return max(distance(*pair) for pair in zip((keys, values), expected, strict=True))


def softmax() -> dict[str, float]:
    logits, targets = 4 * random(6, 5000, seed=1), torch.tensor([0, 4999, 7, 4096, 4095, 2])
    logits[3, 4200:] = -torch.inf
    found = cuda_kernels.statistics(logits, targets, 0.7)
    exact = REFERENCE.logprobs(logits, targets, 0.7)
    pulls = random(6, seed=2), random(6, seed=3)
    ours, theirs = logits.clone(), logits.clone()
    cuda_kernels.into_gradient(ours, targets, 0.7, *exact[1:], *pulls)
    REFERENCE.logprobs_backward(theirs, targets, 0.7, *exact[1:], *pulls)
    far = {"statistics": max(distance(*pair) for pair in zip(found, exact, strict=True))}
    finite = theirs.isfinite().all(1)  # plain torch multiplies 0 by the logarithm of 0
    return far | {"gradient": distance(ours[finite], theirs[finite])}


def rounded() -> float:
    masters, first = random(9001, seed=1), 12345
    weights = torch.empty(9001, dtype=torch.bfloat16)
    cuda_kernels.dither(masters, weights, first)
    return distance(weights.float(), REFERENCE.round_masters(masters, first).float())


print(
    json.dumps(
        {
            "attention, keys in parts": attention(14, 2, 64, [700, 1, 65, 1024], None, 40),
            "attention, keys at once": attention(4, 4, 20, [1, 64, 63, 100], None, 30),
            "attention, window": attention(6, 2, 16, [700, 1, 65, 128], 50, 30),
            "written keys": written(),
            **softmax(),
            "rounded weights": rounded(),
        }
    )
)
