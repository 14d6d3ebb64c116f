"""The games of OpenSpiel: six with a file each, and other.py for all others. To add a game, copy catch.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from integrations.openenv.catalog.games.blackjack import Blackjack
from integrations.openenv.catalog.games.catch import Catch
from integrations.openenv.catalog.games.cliff_walking import CliffWalking
from integrations.openenv.catalog.games.game import Game, OpenSpielObservation
from integrations.openenv.catalog.games.kuhn_poker import KuhnPoker
from integrations.openenv.catalog.games.other import OtherGame
from integrations.openenv.catalog.games.tic_tac_toe import TicTacToe
from integrations.openenv.catalog.games.twenty_forty_eight import TwentyFortyEight

__all__ = ["GAMES", "Game", "OpenSpielObservation", "OtherGame", "game_of"]

GAMES: dict[str, type[Game]] = {
    game.name: game for game in (Catch, TicTacToe, KuhnPoker, CliffWalking, TwentyFortyEight, Blackjack)
}


def game_of(name: str, params: Mapping[str, Any], agent_player: int) -> Game:
    return GAMES[name](params, agent_player) if name in GAMES else OtherGame(name, params, agent_player)
