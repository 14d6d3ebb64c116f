"""The nouns of the walk, in the order in which a prompt meets them: prompt, turn, trajectory, group, sample, batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes a second to load, and most commands need the other nouns alone
    import torch
    from torch import Tensor

AGENT = "agent"  # env_class of rows that an agent of the user's plays and that name no environment
Message = dict[str, Any]  # {"role": ..., "content": ...}; a call of tools has "tool_calls" as well, in OpenAI's form


class EpisodeEnd(StrEnum):
    """The end of an episode. Only ENV_FAILURE carries no reward: it is retried, counted, and never trained on."""

    FINISHED = "finished"  # the environment said done
    OUT_OF_TURNS = "out_of_turns"  # the turn limit was reached first
    OUT_OF_TOKENS = "out_of_tokens"  # a reply or the history hit its length limit
    ENV_FAILURE = "env_failure"  # the environment broke and every retry broke too


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task of the data set."""

    uid: str  # position of the row in the (filtered) data set
    messages: list[Message]
    env_class: str
    env_extras: dict[str, Any] = field(default_factory=dict)  # every other column of the row

    @property
    def data_source(self) -> str:
        return str(self.env_extras.get("data_source") or "unknown")


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine call: the tokens it was given, the tokens it sampled, and the reward that the environment paid.

    `prompt_ids` holds everything the engine saw, earlier turns included. `observation` holds the messages with which
    the environment answered the reply.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]  # of response_ids, under the policy that sampled them
    reward: float
    text: str
    stop_reason: str  # "stop", "length" or "abort"
    policy_version: int
    observation: list[Message] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)  # those with a name, before their weights

    def __post_init__(self) -> None:
        if len(self.response_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.response_ids)} response tokens but {len(self.logprobs)} logprobs")


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of an episode: its turns, its end, and what the environment said."""

    prompt: Prompt
    repetition: int  # which of the group's episodes this is, from 0
    seed: int  # of the environment, the same in the whole group
    messages: list[Message]  # the conversation as the model first saw it (after env.init)
    turns: list[Turn]
    end: EpisodeEnd
    env_metrics: dict[str, Any] = field(default_factory=dict)
    num_attempts: int = 1  # 1 + retries after environment failures
    failure: str | None = None  # the last environment failure, in words
    seconds: float = 0.0
    samples: list[Sample] | None = None  # where a generator or a hook of the user's says what is trained

    @property
    def id(self) -> str:
        """SkyRL's TrajectoryID as a string; its samples carry it as `trajectory_id`."""
        return f"{self.prompt.uid}_{self.repetition}"

    @property
    def reward(self) -> float:
        """Sum over turns: the score of the episode."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def rewards(self) -> dict[str, float]:
        """Return the sum over turns of each reward that has a name, before its weight."""
        names = dict.fromkeys(name for turn in self.turns for name in turn.rewards)
        return {name: float(sum(turn.rewards.get(name, 0.0) for turn in self.turns)) for name in names}

    def plus(self, reward: float) -> Trajectory:
        """Return the same episode, paid so much more (less, if negative) at its last sampled token.

        An episode without a turn has no token to be paid at, and is returned as it is.
        """
        if not self.turns:
            return self
        samples = self.samples
        if samples:
            last = max(i for i, sample in enumerate(samples) if any(sample.loss_mask) or i == 0)
            samples = [sample.plus(reward) if i == last else sample for i, sample in enumerate(samples)]
        paid = replace(self.turns[-1], reward=self.turns[-1].reward + reward)
        return replace(self, turns=[*self.turns[:-1], paid], samples=samples)

    @property
    def stop_reason(self) -> str:
        """SkyRL's word for the end: "stop" for an episode that the environment ended, else "length"."""
        return "length" if self.end is EpisodeEnd.OUT_OF_TOKENS else "stop"


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories of one prompt."""

    prompt: Prompt
    trajectories: list[Trajectory]


@dataclass(frozen=True, slots=True)
class Sample:
    """One flat row of tokens. All lists have the length of `input_ids`.

    prompt [1 2]  sampled [5 6]  tool said [9]  sampled [7]
    input_ids     1 2 5 6 9 7
    loss_mask     0 0 1 1 0 1
    """

    input_ids: list[int]
    loss_mask: list[bool]  # True where the policy sampled the token
    rollout_logprobs: list[float]  # 0.0 where loss_mask is False
    rewards: list[float]  # the reward of a turn stands on the turn's last sampled token
    num_prompt_tokens: int
    group_id: str  # the prompt's uid
    trajectory_id: str  # uid_repetition; an edited history opens a new sample of the same trajectory

    def __post_init__(self) -> None:
        lengths = {len(self.input_ids), len(self.loss_mask), len(self.rollout_logprobs), len(self.rewards)}
        if len(lengths) != 1:
            raise ValueError(
                f"a sample's lists differ in length: {len(self.input_ids)} input_ids, {len(self.loss_mask)} loss_mask, "
                f"{len(self.rollout_logprobs)} rollout_logprobs, {len(self.rewards)} rewards"
            )
        if not self.input_ids:
            raise ValueError("a sample needs at least one token")
        if self.loss_mask[0]:
            raise ValueError("the first token of a sample has nothing before it, so it cannot be trained on")

    def plus(self, reward: float) -> Sample:
        """The same row with more reward on its last sampled token."""
        place = max((i for i, is_sampled in enumerate(self.loss_mask) if is_sampled), default=len(self.rewards) - 1)
        return replace(self, rewards=[old + reward * (i == place) for i, old in enumerate(self.rewards)])


@dataclass(frozen=True)
class Batch:
    """The input of one update: samples end to end, without padding.

    T tokens in all, S samples, sample s is [offsets[s], offsets[s+1]). Entry t of every [T] tensor is about token t:
    `logprobs[t]` is log p(token t | the tokens before it in the same sample), 0 for a sample's first token.
    """

    input_ids: Tensor  # [T] int64
    offsets: Tensor  # [S+1] int64, offsets[0] = 0, offsets[S] = T
    loss_mask: Tensor  # [T] bool
    rollout_logprobs: Tensor  # [T] float32
    rewards: Tensor  # [T] float32
    group_index: Tensor  # [S] int64: which prompt, numbered from 0 in order of first appearance
    trajectory_index: Tensor  # [S] int64: which trajectory, likewise
    old_logprobs: Tensor | None = None  # [T] float32, from the learner, before the update
    ref_logprobs: Tensor | None = None  # [T] float32, from the reference policy
    advantages: Tensor | None = None  # [T] float32
    loss_weights: Tensor | None = None  # [T] float32: the loss is sum(loss_weights * token loss), see batch/packing.py
    kl_weights: Tensor | None = None  # [T] float32: the same for the KL term, which has a reduction of its own
    entropy_weights: Tensor | None = None  # [T] float32: and for the entropy term
    values: Tensor | None = None  # [T] float32, from a critic
    returns: Tensor | None = None  # [T] float32
    num_prompt_tokens: Tensor | None = None  # [S] int64: where each sample's response begins

    def __post_init__(self) -> None:
        num_tokens, num_samples = self.input_ids.numel(), self.offsets.numel() - 1
        if num_samples < 1 or int(self.offsets[0]) != 0 or int(self.offsets[-1]) != num_tokens:
            raise ValueError(f"offsets must run from 0 to {num_tokens} tokens, got {self.offsets.tolist()}")
        for name, tensor in self.token_tensors():
            if tensor.shape != (num_tokens,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the batch has {num_tokens} tokens")
        for name, tensor in self.sample_tensors():
            if tensor.shape != (num_samples,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not [{num_samples} samples]")

    TOKEN_FIELDS = (
        "input_ids", "loss_mask", "rollout_logprobs", "rewards", "old_logprobs", "ref_logprobs",
        "advantages", "loss_weights", "kl_weights", "entropy_weights", "values", "returns",
    )  # fmt: skip

    def token_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.TOKEN_FIELDS:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def sample_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("group_index", "trajectory_index", "num_prompt_tokens"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_samples(self) -> int:
        return self.offsets.numel() - 1

    @property
    def num_trajectories(self) -> int:
        return self.trajectory_index.unique().numel()

    @property
    def lengths(self) -> Tensor:
        """[S] tokens of each sample."""
        return self.offsets.diff()

    @property
    def sample_index(self) -> Tensor:
        """[T]: which sample each token belongs to."""
        import torch

        return torch.repeat_interleave(torch.arange(self.num_samples, device=self.offsets.device), self.lengths)

    @property
    def position_ids(self) -> Tensor:
        """[T]: position of each token in its sample, from 0."""
        import torch

        return torch.arange(self.num_tokens, device=self.offsets.device) - self.offsets[:-1][self.sample_index]

    @property
    def turn_index(self) -> Tensor:
        """[T]: how many turns of its sample have begun up to each token: 0 in the prompt, 1 from the first reply on."""
        begins = self.loss_mask.clone()
        begins[1:] &= ~self.loss_mask[:-1]  # a sample's first token is never trained, so no reply crosses samples
        begun = begins.cumsum(0)
        return begun - begun[self.offsets[:-1]][self.sample_index]

    def select(self, samples: list[int]) -> Batch:
        """The batch of these samples, in this order. Group and trajectory numbers stay those of the whole batch."""
        import torch

        index = torch.tensor(samples, dtype=torch.long, device=self.offsets.device)
        lengths, tokens = self.lengths[index], self.places(samples)
        return replace(
            self,
            offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            **{name: tensor[index] for name, tensor in self.sample_tensors()},
            **{name: tensor[tokens] for name, tensor in self.token_tensors()},
        )

    def places(self, samples: list[int]) -> Tensor:
        """[tokens of these samples]: where each token of `select(samples)` stands in this batch."""
        import torch

        index = torch.tensor(samples, dtype=torch.long, device=self.offsets.device)
        starts, lengths = self.offsets[:-1][index], self.lengths[index]
        begins = lengths.cumsum(0) - lengths
        return torch.arange(int(lengths.sum()), device=index.device) + (starts - begins).repeat_interleave(lengths)

    def to(self, device: torch.device | str) -> Batch:
        tensors = [("offsets", self.offsets), *self.sample_tensors(), *self.token_tensors()]
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors})
