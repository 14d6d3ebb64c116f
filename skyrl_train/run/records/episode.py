"""The record of an episode: a trajectory with every token once, in order, and its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from skyrl_train.types import EpisodeEnd, Message, Trajectory


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens of one kind: sampled by the policy, or given to it. All lists have one length."""

    sampled: bool
    turn: int  # the turn that sampled these tokens, or whose prompt they are in
    new_history: bool  # the first tokens of a row: the history before them was edited, or there was none
    ids: list[int]
    texts: list[str]  # their concatenation is the text, see records/tokens.py
    logprobs: list[float]  # with 6 decimals; empty unless sampled

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts) or (self.sampled and len(self.ids) != len(self.logprobs)):
            raise ValueError(f"{len(self.ids)} ids, {len(self.texts)} texts, {len(self.logprobs)} logprobs differ")

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One reply with the environment's answer to it."""

    reward: float
    text: str
    stop_reason: str
    policy_version: int
    observation: list[Message]
    rewards: dict[str, float] = field(default_factory=dict)  # those with a name, before their weights


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """One line of a trajectory file."""

    phase: str  # "train" or "eval"
    step: int
    uid: str
    repetition: int
    data_source: str
    env_class: str
    env_extras: dict[str, Any]
    seed: int
    messages: list[Message]  # as the model first saw them
    turns: list[TurnRecord]
    segments: list[Segment]
    reward: float
    end: EpisodeEnd
    stop_reason: str
    env_metrics: dict[str, Any]
    num_attempts: int
    failure: str | None
    seconds: float
    rewards: dict[str, float] = field(default_factory=dict)  # those with a name, before their weights

    def to_json(self) -> str:
        """Return the record as one line. A value that JSON cannot hold is written as text."""
        return json.dumps(self, default=_plain, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> EpisodeRecord:
        values = json.loads(line)
        values["turns"] = [TurnRecord(**turn) for turn in values["turns"]]
        values["segments"] = [Segment(**segment) for segment in values["segments"]]
        values["end"] = EpisodeEnd(values["end"])
        return cls(**values)

    @property
    def num_sampled(self) -> int:
        return sum(len(segment.ids) for segment in self.segments if segment.sampled)


def episode_record(
    trajectory: Trajectory, phase: str, step: int, token_texts: Callable[[list[int]], list[str]]
) -> EpisodeRecord:
    """Return the record of a trajectory; token_texts: see records/tokens.py."""
    prompt = trajectory.prompt
    return EpisodeRecord(
        phase=phase,
        step=step,
        uid=prompt.uid,
        repetition=trajectory.repetition,
        data_source=prompt.data_source,
        env_class=prompt.env_class,
        env_extras=_string_keys(prompt.env_extras),
        seed=trajectory.seed,
        messages=trajectory.messages,
        turns=[
            TurnRecord(float(t.reward), t.text, t.stop_reason, t.policy_version, t.observation, t.rewards)
            for t in trajectory.turns
        ],
        segments=segments(trajectory, token_texts),
        reward=trajectory.reward,
        end=trajectory.end,
        stop_reason=trajectory.stop_reason,
        env_metrics=_string_keys(trajectory.env_metrics),
        num_attempts=trajectory.num_attempts,
        failure=trajectory.failure,
        seconds=trajectory.seconds,
        rewards=trajectory.rewards,
    )


def segments(trajectory: Trajectory, token_texts: Callable[[list[int]], list[str]]) -> list[Segment]:
    """Return every token of the episode once, as long as each turn's prompt continues the history.

    turn 0: prompt [1 2] sampled [5 6]; turn 1: prompt [1 2 5 6 9] sampled [7]
    -> given [1 2], sampled [5 6], given [9], sampled [7]
    """
    found: list[Segment] = []
    row: list[int] = []
    for number, turn in enumerate(trajectory.turns):
        continues = bool(row) and turn.prompt_ids[: len(row)] == row
        given = turn.prompt_ids[len(row) :] if continues else turn.prompt_ids
        if given:
            found.append(Segment(False, number, not continues, given, token_texts(given), []))
        if turn.response_ids:
            texts = token_texts(turn.response_ids)
            found.append(Segment(True, number, False, turn.response_ids, texts, _rounded(turn.logprobs)))
        row = turn.prompt_ids + turn.response_ids
    return found


def _rounded(logprobs: list[float]) -> list[float]:
    """Return the logprobs with 6 decimals: half the size on disk, and the error is far below any engine's."""
    return [round(logprob, 6) for logprob in logprobs]


def _string_keys(values: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Return dataclasses as dictionaries, numpy and torch arrays as lists, their scalars as numbers; else the repr."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: getattr(value, part.name) for part in fields(value)}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return repr(value)
