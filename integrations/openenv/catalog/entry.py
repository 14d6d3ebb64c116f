"""What the catalog knows about one environment: its tasks, its options, and how actions and answers look as text."""

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
    """The policy's action cannot be sent. The message goes back to the policy: what was wrong, what is expected."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task: what the model is told, what the environment is told, and how the work is judged."""

    prompt: Messages
    family: str  # the kind of task, for metrics and tests
    ground_truth: str = ""  # what a score compares with; empty where the environment's own reward counts
    solution: str | None = None  # the content of an <action> tag that earns full reward in one turn, if there is one
    seed: int | None = None  # of the environment's reset; None takes one from the data set's seed
    options: Mapping[str, Any] = field(default_factory=dict)  # of the environment, those that are not the default


def paid(result: StepResult, name: str) -> float:
    """The reward of a step, for an environment whose server pays every step."""
    if result.reward is None:
        raise OpenEnvError(f"{name}: a step without a reward (null, which is also how a server writes NaN)")
    return result.reward


class OpenSession(Protocol):
    """What `prepare` may ask: the server at `url`, and the session's MCP side. The pool's Lease is one."""

    @property
    def url(self) -> str: ...

    async def mcp(self, method: str, params: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What the environment's answer to an action means to the policy."""

    text: str  # what the model reads next; empty: nothing
    reward: float  # of this turn
    ended: bool  # the episode is over


class Translator(ABC):
    """Stands between the model's words and the environment's fields for one episode, and may remember what it saw.

    `first_text`, then `action` and `answer` turn by turn. What the server sends is checked here: a field that is
    missing or of another type raises OpenEnvError, which is the environment's failure and never the policy's.
    """

    success: bool = False  # the task is solved
    gold_reward: float | None = None  # what an episode of gold actions earns at least; None: no promise

    @abstractmethod
    def first_text(self, first: StepResult) -> str:
        """What the model reads of reset's answer, behind the prompt; empty if there is nothing to read."""

    @abstractmethod
    def action(self, text: str) -> dict[str, Any]:
        """The text of an <action> tag as the fields of the environment's action; or InvalidAction: what is wrong."""

    def idle_action(self) -> dict[str, Any] | None:
        """What happens in a turn whose action cannot be read: the fields of an action where the world does not wait
        (a running game), or None where it does, and nothing is sent."""
        return None

    @abstractmethod
    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        """What step's answer means."""

    def unfinished_reward(self) -> float:
        """Added to the last turn's reward when the turns run out first: not to finish must not pay."""
        return 0.0

    def gold_action(self) -> str | None:
        """The content of the <action> tag that a perfect (or at least a good) player writes now, if known."""
        return None

    def random_action(self, random: Random) -> str | None:
        """The content of an <action> tag that a player writes who knows the rules and nothing more, if known."""
        return None

    def metrics(self) -> dict[str, float]:
        """Plain numbers about the episode, beside those that every environment has."""
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
        """What files and metrics call it."""
        return self.name

    @property
    def is_prepared(self) -> bool:
        """Whether `tasks` can be asked for before a server was seen."""
        return True

    async def prepare(self, session: OpenSession) -> None:
        """Called with a session before its first text: the place to learn what only the server knows."""
        return None

    @property
    def local_image(self) -> str:
        """The tag under which this machine has the environment's image, pulled or built."""
        return f"{self.name.replace('_', '-')}:latest"

    @property
    def has_engine(self) -> bool:
        """Whether our own server of it can run: its engine is importable, which is not tried."""
        return self.engine_module is None or find_spec(self.engine_module) is not None

    def require_engine(self) -> None:
        """ValueError, with what to type, where our own server of it cannot run."""
        if not self.has_engine:
            raise ValueError(
                f"{self.name}: {self.engine_module} is not installed; "
                f"uv run integrations/openenv/install_environment.py {self.name}"
            )

    def read_options(self, values: Mapping[str, Any]) -> Any:
        """An `options_type` with these values; ValueError names what is unknown or wrong."""
        return read_options(self.options_type, values, self.name)

    def is_refusal(self, error: ServerError, sent: dict[str, Any]) -> bool:
        """Whether a server's error is the doing of the action that was sent, rather than its own."""
        return error.code == "VALIDATION_ERROR"

    @abstractmethod
    def tasks(self, random: Random, num_tasks: int, options: Any) -> list[Task]:
        """Different tasks. The same random state gives the same tasks. `options` is an `options_type`."""

    @abstractmethod
    def translator(self, task: Task, options: Any) -> Translator:
        """For one episode of this task. `task.options` are in `options` already."""

    def for_split(self, task: Task, split: str, options: Any) -> Task:
        """The task as one of the split "train" or "validation", where these differ in more than the seed."""
        return task

    def reset_kwargs(self, options: Any) -> dict[str, Any]:
        """What our own server's reset takes beside `seed`. Servers drop what they do not know."""
        return asdict(options)

    def image_variables(self, options: Any) -> dict[str, str]:
        """The same for the official image, which knows its environment variables only."""
        return {}

    def fewest_turns(self, options: Any) -> int:
        """With fewer turns than this an episode cannot be rewarded."""
        return 1

    def source(self, options: Any) -> ServerSource:
        """Where it can be served from."""
        variables = tuple(sorted(self.image_variables(options).items()))
        return ServerSource(self.name, module=self.server_module, image=self.local_image, variables=variables)
