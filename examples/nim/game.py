"""Nim against a perfect player: take 1, 2 or 3 sticks in turn; who takes the last one wins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.episode_metrics import INVALID_ACTIONS

RULES = "Nim: take 1, 2 or 3 sticks. The last stick wins. Write: take N"
MOST = 15
STARTS = [sticks for sticks in range(1, MOST + 1) if sticks % 4]  # who leaves a multiple of four wins


def prompt(sticks: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": RULES}, {"role": "user", "content": f"{sticks} left."}]


def answer(taken: int, sticks: int) -> str:
    return f"I take {taken}. {sticks} left." if sticks else f"I take {taken}. I win."


def best_move(sticks: int, random: Random) -> int:
    """Return the move that wins, or any move that can be made where none does."""
    return sticks % 4 or random.randint(1, min(3, sticks))


class NimEnv(BaseTextEnv):
    """One game, which the model begins. extras: `sticks`, how many lie there. Pays 1 for a win and 0 for a loss.

    The other player makes the move that wins wherever there is one. A reply that is no move loses the game.
    """

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.sticks = int(extras["sticks"])
        self.random = Random(f"{extras.get('seed', 0)} {self.sticks}")
        self.max_turns = MOST
        self.won = False

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        found = re.fullmatch(r"\s*take ([123])\W*", action.lower())
        taken = int(found[1]) if found else 0
        if not 1 <= taken <= self.sticks:
            self.num_invalid_actions += 1
            return self.told("That is no move. You lose.", done=True)
        self.sticks -= taken
        if self.sticks == 0:
            self.won = True
            return self.told("You win.", done=True)
        mine = best_move(self.sticks, self.random)
        self.sticks -= mine
        return self.told(answer(mine, self.sticks))

    def told(self, text: str, done: bool = False) -> BaseTextEnvStepOutput:
        over = done or self.sticks == 0
        return BaseTextEnvStepOutput(
            observations=[{"role": "user", "content": text}], reward=float(self.won), done=over, metadata={}
        )

    def get_metrics(self) -> dict[str, Any]:
        return {"won": self.won, INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{"sticks": sticks} for sticks in STARTS]

    def gold_actions(self) -> list[str]:
        """Return the moves that win: always leave a multiple of four. The other player's moves are foreseen."""
        sticks, random, moves = self.sticks, Random(), []
        random.setstate(self.random.getstate())
        while sticks > 0:
            moves.append(f"take {sticks % 4}")
            sticks -= sticks % 4
            sticks -= best_move(sticks, random) if sticks else 0
        return moves


def random_game(random: Random) -> list[dict[str, str]]:
    """Return a game of two players who move at random, as a conversation: what moves look like, without any skill.

    It ends with the last move of the one who begins, as a conversation to imitate does.
    """
    sticks = random.randint(1, MOST)
    messages = prompt(sticks)
    while True:
        taken = random.randint(1, min(3, sticks))
        sticks -= taken
        messages.append({"role": "assistant", "content": f"take {taken}"})
        if sticks == 0:
            return messages
        mine = random.randint(1, min(3, sticks))
        sticks -= mine
        if sticks == 0:
            return messages
        messages.append({"role": "user", "content": answer(mine, sticks)})
