"""An OpenEnv server outside the catalog as a catalog entry: tasks and text forms come from its description."""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from integrations.openenv.catalog.entry import (
    Answer,
    CatalogEntry,
    InvalidAction,
    Messages,
    OpenSession,
    Task,
    Translator,
)
from integrations.openenv.catalog.generic.blame import caused_by_action
from integrations.openenv.catalog.generic.description import ServerDescription, describe
from integrations.openenv.catalog.generic.names import ForeignName
from integrations.openenv.catalog.generic.observation import legal_actions, observation_text
from integrations.openenv.catalog.generic.validation import sendable
from integrations.openenv.catalog.generic.values import Legal
from integrations.openenv.client.errors import OpenEnvError, ServerError
from integrations.openenv.client.session import StepResult
from integrations.openenv.hosting.source import ServerSource
from skyrl_gym.contract import WrongAnswer, checked_reward
from skyrl_gym.tool_calls import UnreadableCall, read_tool_calls, written

RewardFunction = Callable[[dict[str, Any], dict[str, Any], float, bool], float]
MAX_LOGGED = 5  # errors of one server
EXAMPLE_SEED = 1  # of the action that the prompt shows


@dataclass(frozen=True, slots=True)
class GenericOptions:
    """Options for what no server describes: the task, the reward, success, and arguments of reset."""

    instruction: str = ""  # the task, in words; empty: earn reward
    reward: str = ""  # "package.module:function"(action, observation, server_reward, done); empty: the server's
    success: float | None = None  # an episode that earns this is a success; None: one that ends with any reward
    reset: dict[str, Any] = field(default_factory=dict)  # keywords of the server's reset, beside `seed`
    variables: dict[str, str] = field(default_factory=dict)  # environment variables of a server that we start
    tool_calls: bool = False  # actions are calls of tools, in the form that the model's family was taught


class GenericEntry(CatalogEntry):
    """One server outside the catalog. `prepare` asks for its description once."""

    options_type: ClassVar[type] = GenericOptions
    code_options: ClassVar[frozenset[str]] = frozenset({"reward", "variables"})
    max_turns: ClassVar[int] = 10

    def __init__(self, foreign: ForeignName) -> None:
        self.foreign = foreign
        self.name = foreign.text  # ty: ignore[invalid-attribute-access]
        self.image = foreign.target if foreign.form == "image" else ""  # ty: ignore[invalid-attribute-access]
        self.server_module = foreign.source().module or ""  # ty: ignore[invalid-attribute-access]
        self._description: ServerDescription | None = None
        self._describing: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[ServerDescription]]
        self._describing = WeakKeyDictionary()
        self._logged: set[str] = set()  # errors that were logged

    @property
    def data_name(self) -> str:
        """The name in files and metrics: http://127.0.0.1:8000 -> http_127_0_0_1_8000."""
        return re.sub(r"[^a-z0-9]+", "_", self.foreign.target.lower()).strip("_")

    @property
    def seed_name(self) -> str:
        """A folder's own name, wherever the folder is; the whole name of everything else."""
        return Path(self.foreign.target).name if self.foreign.form == "folder" else self.foreign.text

    @property
    def local_image(self) -> str:
        return self.image

    @property
    def is_prepared(self) -> bool:
        return self._description is not None

    @property
    def description(self) -> ServerDescription:
        if self._description is None:
            raise OpenEnvError(f"{self.name}: its server has not been asked yet")
        return self._description

    async def prepare(self, session: OpenSession) -> None:
        """Ask the server for its description, once per process; concurrent episodes share one request."""
        if self._description is None:
            loop = asyncio.get_running_loop()
            describing = self._describing.get(loop)
            if describing is None or describing.done():
                describing = self._describing[loop] = loop.create_task(describe(session))
            self._description = await asyncio.shield(describing)

    def is_refusal(self, error: ServerError, sent: dict[str, Any]) -> bool:
        """Return whether the error counts as the policy's mistake, judged by its message.

        Each such message is logged once, so that a person can check the judgement.
        """
        if not caused_by_action(error, sent, set(self.description.action_schema["properties"])):
            return False
        if error.code == "EXECUTION_ERROR" and error.message not in self._logged and len(self._logged) < MAX_LOGGED:
            from loguru import logger  # imported here because the servers' images, which import the catalog, lack it

            self._logged.add(error.message)
            logger.warning(f"{self.name}: an action is refused, and counts as the policy's mistake: {error.message!r}")
        return True

    def tasks(self, random: Random, num_tasks: int, options: GenericOptions) -> list[Task]:
        """Return tasks that are all equal; each row's seed, given to reset, makes the difference."""
        prompt = self.prompt(options)
        plain = asdict(GenericOptions())
        given = {name: value for name, value in asdict(options).items() if value != plain[name]}
        return [Task(prompt, family=self.data_name, options=given) for _ in range(num_tasks)]

    def prompt(self, options: GenericOptions) -> Messages:
        """Return the prompt: the task, the form of actions, and an example reply, which helps small models most."""
        about = self.description
        task = options.instruction or f"You act in the environment {about.title or self.name}. Earn as much as you can."
        if options.tool_calls:  # the chat template says which tools there are
            how = "Act by calling a tool in each of your replies."
            return [{"role": "user", "content": "\n\n".join(part for part in (task, about.manual, how) if part)}]
        example = about.form.random_text(Random(EXAMPLE_SEED), None)
        how = (
            f"Each of your replies holds one action between <action> and </action>: {about.form.how()}\n"
            f"For example: <action>{example}</action>"
        )
        return [
            {"role": "user", "content": "\n\n".join(part for part in (task, about.manual, how) if part)},
            {"role": "assistant", "content": f"<action>{example}</action>"},
            {"role": "user", "content": "Now a new episode."},
        ]

    def translator(self, task: Task, options: GenericOptions) -> Translator:
        return ToolCallTranslator(self, options) if options.tool_calls else GenericTranslator(self, options)

    def reset_kwargs(self, options: GenericOptions) -> dict[str, Any]:
        return dict(options.reset)

    def source(self, options: GenericOptions) -> ServerSource:
        return self.foreign.source(tuple(sorted((key, str(value)) for key, value in options.variables.items())))


class GenericTranslator(Translator):
    """Translator that remembers the last observation, for its legal actions, and the rewards so far."""

    def __init__(self, entry: GenericEntry, options: GenericOptions) -> None:
        self.entry = entry
        self.options = options
        self.reward_function = load_function(options.reward) if options.reward else None
        self.earned = 0.0
        self.num_unpaid = 0  # turns in which the server's reward was null, which counts as 0
        self._last: dict[str, Any] = {}
        self._action: dict[str, Any] = {}

    def first_text(self, first: StepResult) -> str:
        self._last = first.observation
        return observation_text(first.observation)

    def action(self, text: str) -> dict[str, Any]:
        self._action = self._fields(text, legal_actions(self._last, checked=True))
        return self._action

    def _fields(self, text: str, legal: Legal | None) -> dict[str, Any]:
        return self.entry.description.form.fields(text, legal)

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        self._last = result.observation
        self.num_unpaid += result.reward is None
        reward = result.reward or 0.0
        if self.reward_function is not None:
            reward = self._judged(self.reward_function(self._action, result.observation, reward, result.done))
        self.earned += reward
        threshold = self.options.success
        self.success = (result.done and self.earned > 0) if threshold is None else self.earned >= threshold
        return Answer(observation_text(result.observation), reward, result.done)

    def _judged(self, reward: Any) -> float:
        try:
            return checked_reward(reward)
        except WrongAnswer as wrong:
            raise OpenEnvError(f"option reward={self.options.reward!r}: {wrong}") from None

    def metrics(self) -> dict[str, float]:
        return {"unpaid_turns": self.num_unpaid}

    def random_action(self, random: Random) -> str | None:
        return self.entry.description.form.random_text(random, legal_actions(self._last))


class ToolCallTranslator(GenericTranslator):
    """Translator of calls of tools. The first call of a reply is made; the answer says so where there were more."""

    def __init__(self, entry: GenericEntry, options: GenericOptions) -> None:
        super().__init__(entry, options)
        self._num_calls = 1  # of the last reply

    @property
    def tool_schemas(self) -> list[dict[str, Any]]:
        return self._functions

    @cached_property
    def _functions(self) -> list[dict[str, Any]]:
        """Return what the server's description offers; it has been asked before the first message."""
        return self.entry.description.form.functions()

    def opening(self, prompt: Messages) -> list[dict[str, Any]]:
        """Return the prompt with an example call behind it, which helps small models most."""
        call = self.entry.description.form.random_call(Random(EXAMPLE_SEED), None)
        function = {"name": call.name, "arguments": call.arguments}
        calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        return [*super().opening(prompt), calling, {"role": "user", "content": "Now a new episode."}]

    def _fields(self, text: str, legal: Legal | None) -> dict[str, Any]:
        try:
            calls = read_tool_calls(text)
        except UnreadableCall as wrong:
            raise InvalidAction(str(wrong)) from None
        if not calls:
            raise InvalidAction("There is no call of a tool in your reply.")
        self._num_calls = len(calls)
        return self.entry.description.form.called(calls[0].name, sendable(calls[0].arguments), legal)

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        answer = super().answer(result, last_turn=last_turn)
        if self._num_calls == 1:
            return answer
        said = f"{answer.text}\n\nOnly the first of your {self._num_calls} calls was made: call one tool in each reply."
        return replace(answer, text=said.strip())

    def random_action(self, random: Random) -> str | None:
        call = self.entry.description.form.random_call(random, legal_actions(self._last))
        return written(call)


def load_function(path: str) -> RewardFunction:
    """Import "package.module:function"; ValueError if it is no function."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as missing:
        raise ValueError(f"option reward={path!r} must name a function, like my_pkg.rewards:score: {missing}") from None
    if not callable(function):
        raise ValueError(f"option reward={path!r} is {type(function).__name__}, not a function")
    return function
