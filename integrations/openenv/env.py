"""OpenEnv(BaseTextEnv): any OpenEnv environment, of the catalog or another server, as a text environment.

    reply    I repeat the words. <action>red lamp tree</action> Done!
    action   red lamp tree                       what stands between the tags, over any number of lines
    fields   {"tool_name": "echo_message", ...}  `_get_openenv_action`: override it to change parsing
    answer   "The environment said: red lamp tree", reward 1.0, done

The first complete action counts; text after it is ignored. The catalog defines what actions and answers mean and what a
turn earns, by one Translator per episode.
"""

from __future__ import annotations

from typing import Any

import skyrl_gym
from integrations.openenv.catalog import CATALOG, CatalogEntry, InvalidAction, catalog_entry
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import ConnectionLost, OpenEnvError, ServerError
from integrations.openenv.client.session import StepResult
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting.server import ServersGivenUp
from integrations.openenv.hosting.source import ServerSource
from integrations.openenv.pool.server_pool import Lease, close_shared_pools, shared_pool
from integrations.openenv.prepare_dummy_dataset import dataset_rows, task_of_row
from integrations.openenv.trust import require_trusted
from skyrl_gym.core import EnvFailure, EnvGivenUp, EnvLost
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput, ConversationType
from skyrl_gym.metrics import INVALID_ACTIONS

OPEN, CLOSE = "<action>", "</action>"
GRACE_S = 10.0  # the pool's time-out, whose message says who holds the sessions, comes before the rollout's


def register_openenv() -> None:
    """Register the environment as "openenv", unless it is registered already."""
    if "openenv" not in skyrl_gym.registry:
        skyrl_gym.register(id="openenv", entry_point="integrations.openenv.env:OpenEnv")


class OpenEnv(BaseTextEnv):
    """One episode in one OpenEnv environment. `extras` is a row as prepare_dummy_dataset.py writes it."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        extras = extras or {}
        self.config = OpenEnvConfig.from_any(env_config)
        self.entry: CatalogEntry = catalog_entry(extras.get("env_name", ""))
        self.env_name = self.entry.name
        self.task = task_of_row(extras)
        require_trusted(self.config, self.entry, self.task.options)
        self.options = self.entry.read_options({**self.config.options, **self.task.options})
        self.seed: int | None = extras.get("seed")
        self.init_timeout_s = self.config.lease_timeout_s + GRACE_S
        self.max_turns = int(extras.get("max_turns") or self.entry.max_turns)
        self.translator = self.entry.translator(self.task, self.options)
        self.server_reward = 0.0
        self.last: StepResult | None = None
        self._done = False
        self._lease: Lease | None = None
        self._awaited_source: ServerSource | None = None  # set while `init` waits for a lease
        fewest = self.entry.fewest_turns(self.options)
        if self.max_turns < fewest:
            raise ValueError(
                f"{self.env_name}: max_turns={self.max_turns}, but an episode takes {fewest} turns or more before it "
                f"is rewarded; set generator.max_turns={self.entry.max_turns}"
            )

    # The episode

    async def init_async(self, prompt: ConversationType) -> tuple[ConversationType, dict[str, Any]]:
        try:
            self._lease = await self._leased(self.entry.source(self.options), self.reset_kwargs)
            await self.entry.prepare(self._lease)
            self.last = self._lease.first
            text = self.translator.first_text(self.last)
        except ConnectionLost as lost:
            raise EnvLost(f"{self.env_name}: {lost}", in_step=False) from lost
        except ServersGivenUp as given_up:
            raise EnvGivenUp(f"{self.env_name}: {given_up}") from given_up
        except OpenEnvError as failed:
            raise EnvFailure(f"{self.env_name}: {failed}") from failed
        return with_observation(self.translator.opening(prompt), text), {"env_name": self.env_name}

    @property
    def tool_schemas(self) -> list[dict[str, Any]] | None:
        return self.translator.tool_schemas

    @property
    def reset_kwargs(self) -> dict[str, Any]:
        """Return what the server's reset is given for this episode."""
        seed = {} if self.seed is None else {"seed": int(self.seed)}
        return {**self.entry.reset_kwargs(self.options), **seed}

    @property
    def waits_for_others(self) -> bool:
        return self._awaited_source is not None and shared_pool(self.config).is_full(self._awaited_source)

    async def _leased(self, source: ServerSource, reset_kwargs: dict[str, Any]) -> Lease:
        self._awaited_source = source
        try:
            return await shared_pool(self.config).lease(source, **reset_kwargs)
        finally:
            self._awaited_source = None

    async def step_async(self, action: str) -> BaseTextEnvStepOutput:
        if self._lease is None:
            raise RuntimeError(f"{self.env_name}: step without a session; call init first, and nothing after close")
        if self._done:
            raise RuntimeError(f"{self.env_name}: step after the end of the episode")
        self.turns += 1
        complaint = ""
        try:
            try:
                fields = self._get_openenv_action(self.env_name, self._action_in(action))
            except InvalidAction as invalid:
                idle = self.translator.idle_action()
                if idle is None:
                    return self._answer_invalid(str(invalid))
                fields, complaint = idle, str(invalid)
            self.last = await self._lease.step(fields)
            self.server_reward += self.last.reward or 0.0
            answer = self.translator.answer(self.last, last_turn=self.turns >= self.max_turns)
        except ServerError as refused:
            if self.entry.is_refusal(refused, fields):
                return self._answer_invalid(f"The environment does not accept this action: {_reasons(refused)}")
            raise EnvFailure(f"{self.env_name}: {refused}") from refused
        except ConnectionLost as lost:
            raise EnvLost(f"{self.env_name}: {lost}", in_step=lost.in_request) from lost
        except OpenEnvError as failed:
            raise EnvFailure(f"{self.env_name}: {failed}") from failed
        if complaint:
            return self._answer_invalid(f"{complaint}\n{answer.text}", answer.reward, ended=answer.ended)
        return self._output(answer.text, answer.reward, ended=answer.ended)

    def cut_short(self) -> float:
        return 0.0 if self._done else self.translator.unfinished_reward()

    async def close_async(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.release()

    def _action_in(self, reply: str) -> str:
        """Return the part of a reply that is the action: with tools all of it, which may hold a call."""
        if self.tool_schemas:
            return within(reply, self.entry.max_action_chars)
        return _between_tags(reply, self.entry.max_action_chars)

    def _get_openenv_action(self, env_name: str, action: str) -> dict[str, Any]:
        """Return the fields of the environment's action, from the text between the tags.

        Override this to change how actions are read. Raise InvalidAction(message) for a text that is no action; the
        message becomes the next observation.
        """
        return self.translator.action(action)

    def get_metrics(self) -> dict[str, Any]:
        return {
            "turns": self.turns,
            INVALID_ACTIONS: self.num_invalid_actions,
            "success": self.translator.success,
            "server_reward": self.server_reward,
            **self.translator.metrics(),
        }

    def gold_actions(self) -> list[str] | None:
        """Return the one action that solves the task; None if it takes several (see `gold_action`)."""
        return None if self.task.solution is None else [self.translator.reply_with(self.task.solution)]

    def gold_action(self) -> str | None:
        """Return what the catalog's gold player replies now; None if it has none."""
        gold = self.translator.gold_action()
        return None if gold is None else self.translator.reply_with(gold)

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        rows = [row for name in CATALOG for row in dataset_rows(name, 3, 0, seed=0)[0]]
        return [{key: value for key, value in row.items() if key not in ("prompt", "env_class")} for row in rows]

    # What the model reads

    def _answer_invalid(self, message: str, reward: float = 0.0, *, ended: bool = False) -> BaseTextEnvStepOutput:
        self.num_invalid_actions += 1
        allowed = self.config.max_invalid_actions
        one_too_many = allowed is not None and self.num_invalid_actions > allowed
        return self._output(message, reward - self.config.invalid_action_penalty, ended=ended, stopped=one_too_many)

    def _output(self, text: str, reward: float, *, ended: bool, stopped: bool = False) -> BaseTextEnvStepOutput:
        """Return a step's output; the episode is also done when the turns have run out.

        ended: the environment is done. stopped: too many invalid actions.
        """
        out_of_turns = self.turns >= self.max_turns
        if (stopped or out_of_turns) and not ended:
            reward += self.translator.unfinished_reward()
        self._done = ended or stopped or out_of_turns
        last = self.last
        return {
            "observations": [{"role": "tool" if self.tool_schemas else "user", "content": text}] if text else [],
            "reward": reward,
            "done": self._done,
            "truncated": out_of_turns and not (ended or stopped),
            "metadata": {
                "env_name": self.env_name,
                "observation": last.observation if last else {},
                "server_reward": last.reward if last else None,
                "server_metadata": last.metadata if last else {},
            },
        }

    # The sync methods, for callers without an event loop

    def init(self, prompt: ConversationType) -> tuple[ConversationType, dict[str, Any]]:
        return run_in_background(self.init_async(prompt))

    def step(self, action: str) -> BaseTextEnvStepOutput:
        return run_in_background(self.step_async(action))

    def close(self) -> None:
        if self._lease is not None:
            run_in_background(self.close_async())


def _between_tags(reply: str, max_chars: int) -> str:
    """Return the text in the first complete <action>…</action>; in nested ones, of the innermost.

    Takes time linear in the reply's length. InvalidAction: there is none, or it is too long.
    """
    start = reply.find(OPEN)
    if start < 0:
        raise InvalidAction(f"There is no action in your reply. Write it between {OPEN} and {CLOSE}.")
    end = reply.find(CLOSE, start)
    if end < 0:
        raise InvalidAction(f"Your action does not end. Write {CLOSE} behind it.")
    return within(reply[reply.rfind(OPEN, start, end) + len(OPEN) : end], max_chars)


def within(action: str, max_chars: int) -> str:
    """Return the action as text that can be sent. InvalidAction: it is too long."""
    if len(action) > max_chars:
        raise InvalidAction(f"Your action has {len(action)} characters; at most {max_chars} are allowed.")
    return action.encode(errors="replace").decode()  # lone surrogates cannot be sent to a server


def _reasons(refused: ServerError) -> str:
    """Return pydantic's complaints as "field: what is wrong; ...", or the server's message if there are none."""
    complaints = [
        f"{'.'.join(map(str, detail.get('loc', ())))}: {detail.get('msg')}"
        for detail in refused.details
        if isinstance(detail, dict)
    ]
    return "; ".join(complaints)[:500] or refused.message[:500] or "it does not say why"


def with_observation(prompt: ConversationType, text: str) -> ConversationType:
    """Return the messages with the first observation appended to the last one."""
    messages = [dict(message) for message in prompt]
    if text and messages:
        messages[-1]["content"] = f"{messages[-1]['content']}\n\n{text}"
    return messages


def close_background_pools() -> None:
    """Stop the servers that were started for the sync methods, which otherwise run until Python exits."""
    run_in_background(close_shared_pools())
