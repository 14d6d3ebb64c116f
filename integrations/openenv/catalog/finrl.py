"""finrl_env: trade a few stocks at real daily prices. The environment fills the orders, then some days pass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, ClassVar, Self

from integrations.openenv.catalog.entry import Answer, CatalogEntry, Messages, Task, Translator, paid
from integrations.openenv.catalog.finrl_options import SP500_STOCKS, FinRLOptions
from integrations.openenv.catalog.orders import read_orders
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.client.session import StepResult


@dataclass(frozen=True, slots=True)
class FinRLAction:
    """An action: a number in [-1, 1] per stock. Times hmax it is the shares to buy, or to sell if it is negative."""

    actions: list[float]

    def fields(self) -> dict[str, Any]:
        return {"actions": self.actions}


@dataclass(frozen=True, slots=True)
class FinRLObservation:
    """An observation: `state` is [cash, prices, shares, indicators], of which all but cash go stock by stock."""

    state: list[float]
    portfolio_value: float
    date: str

    @classmethod
    def from_fields(cls, observation: dict[str, Any]) -> Self:
        state, value, day = (observation.get(name) for name in ("state", "portfolio_value", "date"))
        if not isinstance(state, list) or not all(_is_number(part) for part in state) or not _is_number(value):
            raise OpenEnvError(f"finrl_env sent no list of numbers and value: {str(observation)[:200]}")
        return cls([float(part) for part in state], float(value), str(day or ""))  # ty: ignore[invalid-argument-type]

    def portfolio(self, num_stocks: int) -> Portfolio:
        if len(self.state) < 1 + 2 * num_stocks or (len(self.state) - 1) % num_stocks:
            raise OpenEnvError(
                f"finrl_env sent a state of {len(self.state)} numbers, which does not fit {num_stocks} stocks: "
                "set the option stocks to the names of the server's stocks"
            )
        rows = [self.state[1 + n : 1 + n + num_stocks] for n in range(0, len(self.state) - 1, num_stocks)]
        return Portfolio(self.portfolio_value, self.state[0], prices=rows[0], shares=rows[1], indicators=rows[2:])


@dataclass(frozen=True, slots=True)
class Portfolio:
    """The parts of an observation's `state`."""

    value: float
    cash: float
    prices: list[float]  # of each stock
    shares: list[float]
    indicators: list[list[float]]  # [indicator][stock]


class FinRLEntry(CatalogEntry):
    """Two stocks, eight decisions, 20 trading days after each. The reward is how much better than buying and holding.

    A policy can learn to answer with an order at all, and to stay in the market. Prices over weeks are close to noise,
    and the change over the last 20 days helps little. Mean rewards over 400 validation windows (standard
    deviation): buying and holding 0, following the 20-day change -0.04 (0.12), against it -0.05 (0.12), random words
    -0.05 (0.13), keeping the cash -0.11 (0.15), never answering with an action -1.
    """

    name: ClassVar[str] = "finrl_env"
    image: ClassVar[str] = ""  # none is published
    server_module: ClassVar[str] = "integrations.openenv.servers.finrl_env"
    extra: ClassVar[str | None] = "finrl-env"
    engine_module: ClassVar[str | None] = "skfolio"
    max_turns: ClassVar[int] = 8
    max_action_chars: ClassVar[int] = 2000
    options_type: ClassVar[type] = FinRLOptions

    def tasks(self, random: Random, num_tasks: int, options: FinRLOptions) -> list[Task]:
        """Return tasks with stocks, drawn here because the model reads their names. A row's seed draws its days."""
        tasks = []
        for _ in range(num_tasks):
            stocks = options.stocks
            if not stocks and not options.prices:
                stocks = tuple(random.sample(SP500_STOCKS, min(options.num_stocks, len(SP500_STOCKS))))
            task_options = {"stocks": list(stocks)} if stocks else {}
            tasks.append(Task(_prompt(options), family="trading", options=task_options))
        return tasks

    def for_split(self, task: Task, split: str, options: FinRLOptions) -> Task:
        """Return the task with the split's period: training days before the option `split`, validation days after it.

        With the option `start` the task is unchanged.
        """
        return task if options.start else replace(task, options={**task.options, "period": split})

    def translator(self, task: Task, options: FinRLOptions) -> Translator:
        return FinRLTranslator(options)

    def reset_kwargs(self, options: FinRLOptions) -> dict[str, Any]:
        return {name: value for name, value in asdict(options).items() if name != "shaped_reward"}

    def fewest_turns(self, options: FinRLOptions) -> int:
        return max(options.num_decisions, 1)


class FinRLTranslator(Translator):
    """Translator that compares the portfolio with buying equal parts on the first day and holding them.

    Shaped reward of a decision, all in parts of the first day's portfolio, with n decisions in an episode:

        r = clip(change of the portfolio - change of buying and holding, -1/n, 1/n)

    and -1/n for each decision that was not taken when the turns run out, which no decision can fall below: an episode
    earns -1 to 1, buying and holding earns 0, keeping the cash earns minus what the market gained. Subtracting the
    market takes out what no decision could change. The plain reward is the server's (by default the change of the
    portfolio in parts of 10,000 dollars); there an unfinished episode earns as if everything had been lost.
    """

    def __init__(self, options: FinRLOptions) -> None:
        self.options = options
        self.stocks = options.stocks or tuple(f"S{n}" for n in range(1, options.num_stocks + 1))
        self.turn = 0  # decisions taken
        self.earned = 0.0
        self.first: Portfolio | None = None
        self.now: Portfolio | None = None
        self.held_shares: list[int] = []  # shares of each stock if bought on the first day and held
        self.invested: list[float] = []  # fraction of the portfolio in stocks after each decision
        # With hmax, buying may take several turns; then the reward of buying and holding is not certain.
        self.gold_reward = None if options.hmax or not options.shaped_reward else 0.0

    def first_text(self, first: StepResult) -> str:
        self.first = self.now = FinRLObservation.from_fields(first.observation).portfolio(len(self.stocks))
        part = self.first.cash / len(self.stocks)
        costs = [1.0 + cost for cost in self._buy_costs()]
        self.held_shares = [
            int(held) + int(part // (price * cost))
            for held, price, cost in zip(self.first.shares, self.first.prices, costs, strict=True)
        ]
        return self._text(self.now)

    def action(self, text: str) -> dict[str, Any]:
        return FinRLAction(read_orders(text, self.stocks)).fields()

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        assert self.first is not None
        assert self.now is not None
        before, self.now = self.now, FinRLObservation.from_fields(result.observation).portfolio(len(self.stocks))
        market_before = self.first.value if self.turn == 0 else self._market_value(before)
        self.turn += 1
        self.invested.append(1.0 - self.now.cash / self.now.value if self.now.value > 0 else 0.0)
        change = self.now.value - before.value - (self._market_value(self.now) - market_before)
        reward = self._shaped(change / self.first.value) if self.options.shaped_reward else paid(result, "finrl_env")
        self.earned += reward
        self.success = result.done and self.now.value >= self._market_value(self.now) - 1e-6 * self.first.value
        return Answer(self._last_text(self.now) if result.done else self._text(self.now), reward, result.done)

    def unfinished_reward(self) -> float:
        if not self.options.shaped_reward:
            value = self.first.value if self.first else 0.0
            return -self.earned - value * self.options.reward_scaling
        return -max(self._num_decisions - self.turn, 0) / self._num_decisions

    def gold_action(self) -> str | None:
        if self.turn == 0 or self.options.hmax:
            return ", ".join(f"buy {stock}" for stock in self.stocks)
        return "hold"

    def random_action(self, random: Random) -> str | None:
        return ", ".join(f"{random.choice(('buy', 'sell', 'hold'))} {stock}" for stock in self.stocks)

    def metrics(self) -> dict[str, float]:
        if self.first is None or self.now is None:
            return {}
        return {
            "return_pct": 100.0 * (self.now.value / self.first.value - 1.0),
            "market_pct": 100.0 * (self._market_value(self.now) / self.first.value - 1.0) if self.turn else 0.0,
            "invested": sum(self.invested) / len(self.invested) if self.invested else 0.0,
        }

    @property
    def _num_decisions(self) -> int:
        return max(self.options.num_decisions, 1)

    def _shaped(self, excess: float) -> float:
        bound = 1.0 / self._num_decisions
        return round(max(-bound, min(bound, excess)), 9)

    def _buy_costs(self) -> list[float]:
        costs = self.options.buy_cost_pct
        return list(costs) if isinstance(costs, tuple) else [costs] * len(self.stocks)

    def _market_value(self, portfolio: Portfolio) -> float:
        """Return what buying equal parts on the first day and holding would be worth at these prices."""
        assert self.first is not None
        value = self.first.cash
        for stock, cost in enumerate(self._buy_costs()):
            bought = self.held_shares[stock] - self.first.shares[stock]
            value += self.held_shares[stock] * portfolio.prices[stock]
            value -= bought * self.first.prices[stock] * (1.0 + cost)
        return value

    # Texts for the model

    def _text(self, seen: Portfolio) -> str:
        of = f" of {self.options.num_decisions}" if self.options.num_decisions else ""
        lines = [f"Turn {self.turn + 1}{of}. Cash ${seen.cash:.0f} of ${seen.value:.0f}."]
        for n, stock in enumerate(self.stocks):
            changes = ", ".join([f"${seen.prices[n]:.2f}", *self._changes(seen, n)])
            lines.append(f"{stock}: {changes}. You own {seen.shares[n]:.0f}.")
        return "\n".join(lines)

    def _changes(self, seen: Portfolio, stock: int) -> list[str]:
        if len(seen.indicators) != len(self.options.indicators):
            return []  # the server has other indicators
        words = []
        for name, values in zip(self.options.indicators, seen.indicators, strict=True):
            days = name.removeprefix("return_")
            if days.isdecimal() and days != name:
                words.append(f"{round(values[stock]):+d}% in {days} day{'' if days == '1' else 's'}")
            else:
                words.append(f"{name} {values[stock]:.4g}")
        return words

    def _last_text(self, seen: Portfolio) -> str:
        assert self.first is not None
        return (
            f"The end. Your ${self.first.value:.0f} became ${seen.value:.0f}; "
            f"buying and holding would have made ${self._market_value(seen):.0f}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _prompt(options: FinRLOptions) -> Messages:
    """Return the prompt: the task and an example turn, as earlier messages. The first prices follow the last message.

    The example has the form of the turns to come. Its action names no stock, else the model invents names.
    """
    days = "a day passes" if options.days_per_action == 1 else f"{options.days_per_action} days pass"
    instruction = f"You trade stocks. Answer each turn with an action: buy, sell or hold. Then {days}."
    example = (
        "Turn 3 of 8. Cash $4000 of $9000.\nCAT: $40.00, +0% in 1 day, -2% in 5 days, +4% in 20 days. You own 125."
    )
    return [
        {"role": "system", "content": instruction},
        {"role": "user", "content": example},
        {"role": "assistant", "content": "<action>hold</action>"},
        {"role": "user", "content": "Now these stocks."},
    ]
