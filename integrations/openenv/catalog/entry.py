"""The interface of a catalog entry: tasks, options, and the text form of actions and answers of an environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from random import Random
from typing import Any, ClassVar, Protocol

from integrations.openenv.catalog.options import NoOptions, read_options
from integrations.openenv.client.errors import OpenEnvError, ServerError
from integrations.openenv.client.session import StepResult
from integrations.openenv.hosting.source import ServerSource

Messages = list[dict[str, str]]


class InvalidAction(ValueError):
    """The policy's action cannot be sent.

    The message, which the policy reads, says what is wrong and what is expected.
    """


@dataclass(frozen=True, slots=True)
class Task:
    """One task: what the model is told, what the environment is told, and how the work is judged."""

    prompt: Messages
    family: str  # the kind of task, for metrics and tests
    ground_truth: str = ""  # compared with the answer by a score; empty if the environment's own reward counts
    solution: str | None = None  # the content of an <action> tag that earns full reward in one turn, if there is one
    seed: int | None = None  # of the environment's reset; None takes one from the data set's seed
    options: Mapping[str, Any] = field(default_factory=dict)  # of the environment, those that are not the default


def paid(result: StepResult, name: str) -> float:
    """Return the reward of a step; OpenEnvError if it is null although this server pays every step."""
    if result.reward is None:
        raise OpenEnvError(f"{name}: a step without a reward (null, which is also how a server writes NaN)")
    return result.reward


class OpenSession(Protocol):
    """The part of a session that `prepare` may use: the server's address and MCP requests. A Lease has it."""

    @property
    def url(self) -> str: ...

    async def mcp(self, method: str, params: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """The environment's answer to an action, as the policy gets it."""

    text: str  # the next message to the model; may be empty
    reward: float  # of this turn
    ended: bool  # the episode is over


class Translator(ABC):
    """Translator between the model's text and the environment's fields, for one episode. It may keep state.

    `first_text`, then `action` and `answer` turn by turn. What the server sends is checked here: a field that is
    missing or of another type raises OpenEnvError, which counts as a failure of the environment, not of the policy.
    """

    success: bool = False  # the task is solved
    gold_reward: float | None = None  # the least that an episode of gold actions earns; None: unknown

    @property
    def tool_schemas(self) -> list[dict[str, Any]] | None:
        """Return the tools whose calls are actions: `action` then gets whole replies. None: actions stand in tags."""
        return None

    def opening(self, prompt: Messages) -> list[dict[str, Any]]:
        """Return the first messages for the model, without the environment's first text."""
        return [dict(message) for message in prompt]

    def reply_with(self, action: str) -> str:
        """Return the reply of a model that takes this action."""
        return action if self.tool_schemas else f"<action>{action}</action>"

    @abstractmethod
    def first_text(self, first: StepResult) -> str:
        """Return the text of reset's answer that is appended to the prompt; "" if there is none."""

    @abstractmethod
    def action(self, text: str) -> dict[str, Any]:
        """Return the fields of the action that the text of an <action> tag means; InvalidAction if it means none.

        With `tool_schemas` the text is the whole reply.
        """

    def idle_action(self) -> dict[str, Any] | None:
        """Return the fields of the action to send in a turn whose action cannot be read, as a running game needs.

        None: nothing is sent, and the environment waits.
        """
        return None

    @abstractmethod
    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        """Return what the policy gets of a step's result. last_turn: no turn follows, whatever the answer."""

    def unfinished_reward(self) -> float:
        """Return what is added to the last turn's reward if the turns run out: 0, or a penalty for not finishing."""
        return 0.0

    def gold_action(self) -> str | None:
        """Return the text of the <action> tag that a good player writes now; None if unknown."""
        return None

    def random_action(self, random: Random) -> str | None:
        """Return the text of an <action> tag with a random legal action; None if unknown."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return numbers about the episode, in addition to the metrics that every environment has."""
        return {}


class CatalogEntry(ABC):
    """One environment. To add yours, copy catalog/echo.py and list it in catalog/__init__.py."""

    name: ClassVar[str]  # as in the dataset's env_name and the official image
    image: ClassVar[str]  # the official one, empty if none is published; pulled or built it is tagged `local_image`
    server_module: ClassVar[str]  # our own server of it, for `python -m`
    extra: ClassVar[str | None] = None  # the extra in pyproject.toml that brings the engine of our own server
    engine_module: ClassVar[str | None] = None  # what that extra makes importable
    max_turns: ClassVar[int] = 1  # a good `generator.max_turns`
    max_action_chars: ClassVar[int] = 10_000  # longer ones are refused before they reach the server
    options_type: ClassVar[type] = NoOptions  # a frozen dataclass: the environment's options with their defaults
    code_options: ClassVar[frozenset[str]] = frozenset()  # options that decide what code runs

    @property
    def data_name(self) -> str:
        """The name in files and metrics."""
        return self.name

    @property
    def seed_name(self) -> str:
        """The name that the tasks' random numbers come from: the same on every machine."""
        return self.name

    @property
    def is_prepared(self) -> bool:
        """True if `tasks` can be called before `prepare`."""
        return True

    async def prepare(self, session: OpenSession) -> None:
        """Learn what only the server knows. Called with each session before its first text."""
        return None

    @property
    def local_image(self) -> str:
        """The tag under which this machine has the environment's image, pulled or built."""
        return f"{self.name.replace('_', '-')}:latest"

    @property
    def has_engine(self) -> bool:
        """True if our own server can run: the module of its engine is installed (it is not imported)."""
        return self.engine_module is None or find_spec(self.engine_module) is not None

    @property
    def lack(self) -> str | None:
        """Why our own server cannot run, and what to type; None if it can."""
        if self.has_engine:
            return None
        return (
            f"{self.engine_module} is not installed; pip install 'skyrl-train[{self.extra}]', in a checkout "
            f"uv run integrations/openenv/install_environment.py {self.name}"
        )

    def read_options(self, values: Mapping[str, Any]) -> Any:
        """Return an `options_type` with these values; ValueError names what is unknown or wrong."""
        return read_options(self.options_type, values, self.name)

    def is_refusal(self, error: ServerError, sent: dict[str, Any]) -> bool:
        """Return whether a server's error was caused by the action that was sent, and not by a fault of the server."""
        return error.code == "VALIDATION_ERROR"

    @abstractmethod
    def tasks(self, random: Random, num_tasks: int, options: Any) -> list[Task]:
        """Return tasks, equal for equal random states. `options` is an `options_type`."""

    @abstractmethod
    def translator(self, task: Task, options: Any) -> Translator:
        """Return a translator for one episode of this task. `options` contains `task.options` already."""

    def for_split(self, task: Task, split: str, options: Any) -> Task:
        """Return the task for the split "train" or "validation", if these differ in more than the seed."""
        return task

    def reset_kwargs(self, options: Any) -> dict[str, Any]:
        """Return the keywords, except `seed`, for our own server's reset. Servers ignore unknown ones."""
        return asdict(options)

    def image_variables(self, options: Any) -> dict[str, str]:
        """Return the options as environment variables, for the official image, whose reset takes none."""
        return {}

    def fewest_turns(self, options: Any) -> int:
        """Return the number of turns below which an episode cannot be rewarded."""
        return 1

    def source(self, options: Any) -> ServerSource:
        """Return the ways to serve the environment: our own server's module and the image."""
        variables = tuple(sorted(self.image_variables(options).items()))
        return ServerSource(
            self.name, module=self.server_module, image=self.local_image, variables=variables, lack=self.lack
        )
