"""BaseTextEnv: base class of environments with chat messages as observations and a model's text as actions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NotRequired, TypedDict

from skyrl_gym.core import Env
from skyrl_gym.episode_metrics import default_aggregate_metrics
from skyrl_gym.tools.core import ToolGroup

MessageType = dict[str, Any]  # {"role": ..., "content": ...}
ConversationType = list[MessageType]


class BaseTextEnvStepOutput(TypedDict):
    """The keys of the dict that a text environment's `step` returns."""

    observations: ConversationType  # the environment's reply; may be empty
    # A float, finite and within ±1e9: what this turn earns; the score of an episode is the sum over its turns. Or
    # several by name, {"right": 1.0, "format": 0.2}: each is logged, and environment.rewards.format=0.5 weighs it.
    reward: Any
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
      seed       an int, the same for all episodes of one prompt and for retries: an environment derives all its
                 randomness from this seed, so that the episodes of a group are comparable.
    The constructor copies what it needs and changes neither argument. It stays cheap: a server, a container or a file
    is opened in `init`.

    `step` takes any string: a wrong reply is answered and never raises. `EnvFailure` is for an environment that
    failed.

    An environment that waits on a network overrides `init_async`, `step_async` and `close_async`. The rollout then
    awaits those on its event loop (`is_async` is True) and runs all others in threads. Such an
    environment also defines the sync methods if it is to be called without an event loop.
    """

    is_async: ClassVar[bool] = False  # set for each subclass: whether it defines its own step_async
    max_reward: ClassVar[float] = 1.0  # the summed reward of `gold_actions`
    init_timeout_s: float | None = None  # if `init` may wait for a free session; None: the limit of a step

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

    @classmethod
    def check_machine(cls) -> None:
        """Raise, with what to do, if this machine cannot run the environment. Called before a model is loaded."""

    @property
    def waits_for_others(self) -> bool:
        """Return whether `init` waits for a session that it gets only when another episode has ended.

        In evaluation (and with `trainer.deterministic`) other episodes wait for this one's `init` unless it returns
        True.
        """
        return False

    def init(self, prompt: ConversationType) -> tuple[ConversationType, dict[str, Any]]:  # ty: ignore[incompatible-method-override]
        """Return the first messages for the model (a copy of the prompt) and a dict of facts about the episode."""
        return [dict(message) for message in prompt], {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Play the model's decoded text (without special tokens) as one turn."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    @property
    def tool_schemas(self) -> list[dict[str, Any]] | None:
        """Return the tools of this episode, [{"type": "function", "function": {"name", "description", "parameters"}}].

        Read once, after `init`. The chat template prints them in the model's own form, `step` gets the reply as it was
        written, and `skyrl_gym.tool_calls.read_tool_calls` reads the calls in it. What a tool returned is an
        observation with the role "tool".
        """
        return None

    def cut_short(self) -> float | dict[str, float]:
        """Return what is added to the last turn's reward when the run has no tokens left for another turn.

        An environment in which stopping early could pay more than playing on returns a penalty.
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
        """Return the metrics of many episodes, from the `get_metrics` of each."""
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
        """Return rows for `check_env` to try the environment on, without `prompt`, `max_turns` and `seed`."""
        return []

    def gold_actions(self) -> list[str] | None:
        """Return actions that earn `max_reward` in this episode, if known; else None. Called after `init`."""
        return None
