"""BaseTextEnv: an environment whose observations are chat messages and whose actions are a model's words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NotRequired, TypedDict

from skyrl_gym.core import Env
from skyrl_gym.metrics import default_aggregate_metrics
from skyrl_gym.tools.core import ToolGroup

MessageType = dict[str, str]  # {"role": ..., "content": ...}
ConversationType = list[MessageType]


class BaseTextEnvStepOutput(TypedDict):
    """What one step of a text environment gives back."""

    observations: ConversationType  # what the environment says next; empty when it has nothing to say
    reward: float  # of this turn, finite and within ±1e9; the score of an episode is the sum over its turns
    done: bool
    metadata: dict[str, Any]
    postprocessed_action: NotRequired[str | None]  # the action as it shall stand in the history, if not as written
    truncated: NotRequired[bool]  # done because the turns ran out, not because the task ended; absent means False


class BaseTextEnv(Env[ConversationType, str]):
    """The base of every text environment.

    A registered environment is constructed as `Env(env_config=..., extras=...)`. `env_config` is the section
    `environment.skyrl_gym.<id>` of the configuration, or empty. `extras` is the dataset row without `prompt` and
    `env_class`, plus
      max_turns  the turn limit of the row or of the run; absent where neither has one, so read it with
                 extras.get("max_turns", my_own). The episode ends when `step` says done, at the latest there,
      seed       an int, the same for all episodes of one prompt and for retries: whatever an environment draws at
                 random it draws from this seed, so that the episodes of a group are comparable.
    The constructor copies what it needs and changes neither argument. It stays cheap: a server, a container or a file
    is opened in `init`.

    `step` takes any string: what the policy writes may be wrong, never an exception. `EnvFailure` is for an
    environment that broke.

    An environment that waits on a network overrides `init_async`, `step_async` and `close_async`. The rollout then
    awaits those on its event loop (`is_async` is True) and runs all others in threads. It keeps the sync methods
    working as well if anybody is to call it without a loop.
    """

    is_async: ClassVar[bool] = False  # set for each subclass: does it define its own step_async?
    max_reward: ClassVar[float] = 1.0  # the summed reward of `gold_actions`
    init_timeout_s: float | None = None  # for an `init` that may wait for its turn; None: it is as quick as a step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_async = cls.step_async is not BaseTextEnv.step_async

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0
        self.max_turns = 1
        self.num_invalid_actions = 0  # replies in which no action could be read
        self.tool_groups: list[ToolGroup] = []
        self.tool_to_toolgroup: dict[str, str] = {}

    @property
    def waits_for_others(self) -> bool:
        """Whether `init` waits for a session and gets one only when another episode has ended.

        In evaluation (and with `trainer.deterministic`) others wait for this one's `init` unless it says so.
        """
        return False

    def init(self, prompt: ConversationType) -> tuple[ConversationType, dict[str, Any]]:  # ty: ignore[incompatible-method-override]
        """The first messages for the model (the prompt, as a copy) and a dict of facts about the episode."""
        return [dict(message) for message in prompt], {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Answer the model's decoded text, without special tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def cut_short(self) -> float:
        """What is added to the last turn's reward when the run has no tokens left for another turn.

        An environment in which not to finish could pay better than to play on gives a penalty here.
        """
        return 0.0

    async def init_async(self, prompt: ConversationType) -> tuple[ConversationType, dict[str, Any]]:
        return self.init(prompt)

    async def step_async(self, action: str) -> BaseTextEnvStepOutput:
        return self.step(action)

    async def close_async(self) -> None:
        self.close()

    def get_metrics(self) -> dict[str, Any]:
        """Return plain values about the episode, read after it.

        An environment that counts its unreadable actions gives their number as skyrl_gym.metrics.INVALID_ACTIONS: the
        trainer shows which share of all replies that is, and says so when nothing can be learned.
        """
        return {}

    @staticmethod
    def aggregate_metrics(metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """The metrics of many episodes, from those of each."""
        return default_aggregate_metrics(metrics)

    def init_tool_groups(self, tool_groups: Iterable[ToolGroup] = ()) -> None:
        self.tool_groups = list(tool_groups)
        self.tool_to_toolgroup = {}
        for group in self.tool_groups:
            self.tool_to_toolgroup.update(group.get_tool_to_group_mapping())

    def _execute_tool(self, tool_group_name: str, tool_name: str, tool_input: Any) -> Any:
        """Call the tool with `*tool_input`."""
        for group in self.tool_groups:
            if group.get_name() == tool_group_name:
                return group.execute_tool(tool_name, *tool_input)
        known = [group.get_name() for group in self.tool_groups]
        raise ValueError(f"no tool group {tool_group_name!r} in {self}; it has {known}")

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        """Small rows to try the environment on, without `prompt`, `max_turns` and `seed`. For `check_env`."""
        return []

    def gold_actions(self) -> list[str] | None:
        """Actions that earn `max_reward` in this episode, if the environment knows them. Read after `init`."""
        return None
