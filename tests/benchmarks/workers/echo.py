"""echo_env's data set and reward, for a trainer that does not play environments."""

from __future__ import annotations

from typing import Any

from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.catalog.entry import InvalidAction
from integrations.openenv.prepare_dummy_dataset import dataset_rows

ENTRY = EchoEntry()


def rows() -> list[dict[str, Any]]:
    """Return the tasks that run_openenv.sh trains on."""
    train, _ = dataset_rows("echo_env", 64, 32, 0)
    return [{"prompt": row["prompt"], "wanted": row["reward_spec"]["ground_truth"]} for row in train]


def rewards(completions: list[list[dict[str, str]]], wanted: list[str], **_: Any) -> list[float]:
    return [reward(message["content"], truth) for [message], truth in zip(completions, wanted, strict=True)]


def reward(reply: str, truth: str) -> float:
    """Return echo_env's reward of a reply: its first complete action, echoed, is compared with the wanted words."""
    _, _, rest = reply.partition("<action>")
    action, closed, _ = rest.partition("</action>")
    if not closed:
        return 0.0
    try:
        fields = ENTRY.parse(action.rpartition("<action>")[2])
    except InvalidAction:
        return 0.0
    return ENTRY.score(truth, {"result": fields["arguments"]["message"]})
