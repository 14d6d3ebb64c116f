"""Dataset rows for the arithmetic environment, generated from a seed."""

from __future__ import annotations

import random
from typing import Any, Literal

_EXAMPLE = [
    {"role": "user", "content": "What is 2 + 3? Put the answer in <answer>…</answer>."},
    {"role": "assistant", "content": "<answer>5</answer>"},
]  # a worked example as earlier turns: a small model imitates where it does not obey


def rows(
    num: int, *, seed: int = 0, split: Literal["train", "validation"] = "train", digits: int = 2, operators: str = "+"
) -> list[dict[str, Any]]:
    """Return `num` random problems with numbers of up to `digits` digits and one of the operators "+", "-" and "*".

    A problem (a, operator, b) belongs to exactly one split: validation where a + 3b is a multiple of 5, a fifth of all.
    Within a split a problem may come twice.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split={split!r} must be 'train' or 'validation'")
    if digits < 1:
        raise ValueError(f"digits={digits} must be at least 1")
    if not operators or not set(operators) <= set("+-*"):
        raise ValueError(f"operators={operators!r} must be some of '+', '-' and '*', such as '+-'")
    draw = random.Random(f"{seed} {split}")
    problems: list[dict[str, Any]] = []
    while len(problems) < num:
        a, operator, b = draw.randrange(10**digits), draw.choice(operators), draw.randrange(10**digits)
        if ((a + 3 * b) % 5 == 0) == (split == "validation"):
            problems.append(_row(a, operator, b, split))
    return problems


def _row(a: int, operator: str, b: int, split: str) -> dict[str, Any]:
    truth = {"+": a + b, "-": a - b, "*": a * b}[operator]
    question = f"What is {a} {operator} {b}? Put the answer in <answer>…</answer>."
    return {
        "prompt": [*({**message} for message in _EXAMPLE), {"role": "user", "content": question}],
        "env_class": "arithmetic",
        "data_source": "arithmetic",
        "reward_spec": {"method": "rule", "ground_truth": str(truth)},
        "extra_info": {"split": split},
    }
