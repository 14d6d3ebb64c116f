"""The rewards of a run: functions, judges and what the environment itself pays, each with a name and a weight.

A turn pays the weighted sum. What each reward paid, before its weight, is kept by name with the turn:

    environment.rewards.right=m:right   environment.rewards.brief={function: m:brief, weight: 0.5}
    a turn for which right returns 1 and brief -2       reward 1 + 0.5 * -2 = 0, rewards {right: 1, brief: -2}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from skyrl_gym.contract import WrongAnswer, checked_reward
from skyrl_train.config.rewards import ENVIRONMENT, JUDGE, NamedReward
from skyrl_train.rollout.judge import Judge
from skyrl_train.rollout.reward import RewardFunction
from skyrl_train.types import Prompt


@dataclass(frozen=True)
class Rewards:
    """The functions and weights that pay the episodes of a run, where that is not the environment alone."""

    functions: Mapping[str, RewardFunction] = field(default_factory=dict)
    judges: Mapping[str, Judge] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)  # of every named reward
    whole: str | None = None  # the name of all that the environment pays
    alone: RewardFunction | None = None  # environment.reward: it has no name, and nothing else pays

    @classmethod
    def of(cls, reward: str | None, named: Mapping[str, NamedReward]) -> Rewards | None:
        """Return the rewards that the configuration names; None for none. ValueError if one cannot be made."""
        if reward is not None:
            return cls(alone=RewardFunction.named(reward))
        if not named:
            return None
        key = "environment.rewards"
        return cls(
            functions={
                name: RewardFunction.named(entry.function, f"{key}.{name}")
                for name, entry in named.items()
                if entry.function not in ("", ENVIRONMENT, JUDGE)
            },
            judges={name: Judge(f"{key}.{name}", entry.judge) for name, entry in named.items() if entry.judge},
            weights={name: entry.weight for name, entry in named.items()},
            whole=next((name for name, entry in named.items() if entry.function == ENVIRONMENT), None),
        )

    def check(self, prompts: Iterable[Prompt], within_s: float) -> None:
        """Try every function and every judge on the first prompt. ValueError says which fails and how."""
        prompts = list(prompts)
        for function in [*self.functions.values(), *([self.alone] if self.alone else [])]:
            function.check(prompts, within_s)
        for judge in self.judges.values():
            judge.check(prompts)

    @property
    def label(self) -> str:
        return self.alone.label if self.alone else f"environment.rewards ({', '.join(self.weights)})"

    @property
    def replaces_environment(self) -> bool:
        """Return whether nothing that the environment pays counts."""
        return self.alone is not None or (self.whole is None and not self.own_parts)

    @property
    def own_parts(self) -> set[str]:
        """Return the names under which the environment has to pay."""
        return self.weights.keys() - self.functions.keys() - self.judges.keys() - {self.whole}

    @property
    def metrics(self) -> dict[str, float]:
        return {key: value for judge in self.judges.values() for key, value in judge.metrics.items()}

    @property
    def templates(self) -> dict[str, str]:
        """Return the text that each judge is asked by, which a file may hold."""
        return {name: judge.template for name, judge in self.judges.items()}

    def of_environment(self, total: float, parts: Mapping[str, float]) -> dict[str, float]:
        """Return the part of what the environment paid that counts. WrongAnswer for names that have no weight."""
        if self.whole is not None:
            return {self.whole: total}
        if not (own := self.own_parts):
            return {}
        if unknown := parts.keys() - own:
            names = ", ".join(sorted(unknown))
            raise WrongAnswer(f"it pays {names}, which environment.rewards does not weigh; add it (0 leaves it out)")
        if total and not parts:
            words = f"it pays {total:g} without a name, and environment.rewards weighs {', '.join(sorted(own))}"
            raise WrongAnswer(f"{words}; its step returns {{'reward': {{name: number}}}} for several rewards")
        return dict(parts)

    def check_paid(self, names: Iterable[str]) -> None:
        """Raise WrongAnswer unless a whole episode was paid under every name that the environment has to pay."""
        if missing := self.own_parts - set(names):
            words = f"it never paid {', '.join(sorted(missing))}, which environment.rewards weighs"
            raise WrongAnswer(f"{words}; its step returns {{'reward': {{name: number}}}} for several rewards")

    def weighted(self, rewards: Mapping[str, float]) -> float:
        """Return the weighted sum. WrongAnswer if it is nothing to learn from."""
        return checked_reward(sum(self.weights[name] * value for name, value in rewards.items()))
