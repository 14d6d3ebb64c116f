"""The server of OpenSpiel: catch, tic_tac_toe, kuhn_poker, cliff_walking, 2048, blackjack, and other turn-based games.

It has the official image's wire format, rewards and environment variables. In addition, reset takes a seed, which fixes
chance and opponents, and the options; an illegal action is refused (it would crash the engine); a step after the end
answers done again, with reward 0; `text` and `legal_names` describe the position in the engine's words.

A move takes microseconds, less than the protocol, so all sessions share this process.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from pydantic import Field

from integrations.openenv.servers.openspiel_game import Play, play_of
from integrations.openenv.servers.serving import serve


class OpenSpielAction(Action):
    """A move: one of the observation's legal_actions. The official client's other fields are ignored."""

    action_id: int
    game_name: str = "catch"
    game_params: dict[str, Any] = Field(default_factory=dict)


class OpenSpielObservation(Observation):
    """A player's observation. The official image does not have the last three fields."""

    info_state: list[float]
    legal_actions: list[int]
    game_phase: str = "playing"  # "initial", "playing" or "terminal"
    current_player_id: int = 0
    opponent_last_action: int | None = None
    text: str = ""  # the engine's text of what this player may know
    legal_names: list[str] = Field(default_factory=list)  # of legal_actions
    lowest_return: float | None = None  # the least that an episode of this game can pay


class OpenSpielState(State):
    """OpenEnv's common state and the game's setup."""

    game_name: str = "catch"
    agent_player: int = 0
    opponent_policy: str = "random"
    game_params: dict[str, Any] = Field(default_factory=dict)
    num_players: int = 1


class OpenSpielEnvironment(Environment[OpenSpielAction, OpenSpielObservation, OpenSpielState]):
    """One session: one player of one game. Opponents move within the player's step."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._play: Play | None = None
        self._episode_id: str | None = None

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        game: str | None = None,
        opponent: str | None = None,
        agent_player: int | None = None,
        game_params: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> OpenSpielObservation:
        """Start a game. Defaults come from OPENSPIEL_GAME, OPENSPIEL_OPPONENT_POLICY and OPENSPIEL_AGENT_PLAYER."""
        if unknown:
            options = "seed, episode_id, game, opponent, agent_player and game_params"
            raise ValueError(f"openspiel_env: reset takes {options}, not {', '.join(sorted(unknown))}")
        self._play = None
        self._play = play_of(
            game=os.environ.get("OPENSPIEL_GAME", "catch") if game is None else game,
            game_params=game_params or {},
            agent_player=int(os.environ.get("OPENSPIEL_AGENT_PLAYER", "0")) if agent_player is None else agent_player,
            opponent=os.environ.get("OPENSPIEL_OPPONENT_POLICY", "random") if opponent is None else opponent,
            seed=seed,
        )
        self._episode_id = episode_id or str(uuid.uuid4())
        return self._observation(self._play, reward=None if self._play.is_first else self._play.reward)

    def step(self, action: OpenSpielAction, timeout_s: float | None = None, **kwargs: Any) -> OpenSpielObservation:
        play = self._play
        if play is None:
            raise ValueError("openspiel_env: step before reset")
        if play.is_over:
            return self._observation(play, reward=0.0)
        play.move(action.action_id)
        return self._observation(play, reward=play.reward)

    @property
    def state(self) -> OpenSpielState:
        if self._play is None:
            return OpenSpielState(episode_id=self._episode_id)
        setup = self._play.setup
        return OpenSpielState(
            episode_id=self._episode_id,
            step_count=self._play.num_moves,
            game_name=setup.game,
            agent_player=setup.agent_player,
            opponent_policy=setup.opponent,
            game_params=dict(setup.game_params),
            num_players=self._play.num_players,
        )

    @staticmethod
    def _observation(play: Play, reward: float | None) -> OpenSpielObservation:
        legal = play.legal_actions
        return OpenSpielObservation(
            info_state=play.info_state,
            legal_actions=legal,
            game_phase="terminal" if play.is_over else "initial" if play.is_first else "playing",
            current_player_id=play.current_player,
            opponent_last_action=play.opponent_last_action,
            text=play.text,
            legal_names=[play.name_of(action) for action in legal],
            lowest_return=play.lowest_return,
            done=play.is_over,
            reward=reward,
        )


def make_app(max_sessions: int) -> FastAPI:
    return create_app(
        OpenSpielEnvironment,
        OpenSpielAction,
        OpenSpielObservation,
        env_name="openspiel_env",
        max_concurrent_envs=max_sessions,
    )


if __name__ == "__main__":
    serve(make_app, "OpenSpiel's turn-based games as an OpenEnv environment, without Docker.")
