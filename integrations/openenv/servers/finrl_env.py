"""The stock trading environment's server: FinRL's StockTradingEnv by its published rules, without FinRL.

It has the official server's wire format: actions in; state [cash, prices, shares, indicators], portfolio_value and date
out; reward = change of the portfolio's value * reward_scaling; done on the last day; GET /config; FINRL_CONFIG_PATH
names a JSON file with FinRL's own keys, whose values are then the defaults.

It differs on purpose in these points:
- Actions outside [-1, 1] are cut to it, as FinRL's action space says; its step buys 50 times hmax for 50.0.
- The step that reaches the last day is done. FinRL needs one call more, trades nothing in it and repeats the last
  reward, so that an episode's sum counts it twice. A step after the end answers done again, with reward 0.
- A stock whose first indicator happens to equal 1.0 can be traded.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import Action, Environment, Observation, State, create_app

from integrations.openenv.catalog.finrl_options import FinRLOptions
from integrations.openenv.catalog.options import read_options
from integrations.openenv.servers.serving import serve
from integrations.openenv.servers.stock_market import Market
from integrations.openenv.servers.stock_prices import Window, draw_window, price_table

# FinRL's names of settings, and ours.
FINRL_KEYS = {
    "data_path": "prices",
    "stock_dim": "num_stocks",
    "hmax": "hmax",
    "initial_amount": "cash",
    "num_stock_shares": "shares",
    "buy_cost_pct": "buy_cost_pct",
    "sell_cost_pct": "sell_cost_pct",
    "reward_scaling": "reward_scaling",
    "tech_indicator_list": "indicators",
}
DERIVED_KEYS = ("state_space", "action_space")  # computed from the others


class FinRLAction(Action):
    """One number in [-1, 1] per stock: times hmax, the shares to buy, or to sell if it is negative."""

    actions: list[float]


class FinRLObservation(Observation):
    """`state` is [cash, prices, shares held, indicators]; with the portfolio's value and the day."""

    state: list[float]
    portfolio_value: float
    date: str = ""


class FinRLEnvironment(Environment[FinRLAction, FinRLObservation, State]):
    """One session. A step takes microseconds, so all sessions run in threads of one process."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        super().__init__()
        self._defaults = defaults
        self._options: FinRLOptions | None = None
        self._market: Market | None = None
        self._state = State(episode_id=str(uuid.uuid4()))

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> FinRLObservation:
        """Start an episode.

        `options`: fields of FinRLOptions. The seed draws the first day and the stocks if not given.
        """
        chosen = read_options(FinRLOptions, {**self._defaults, **options}, "finrl_env")
        self._market = new_market(chosen, draw_window(chosen, seed))
        self._options = chosen
        self._state = State(episode_id=episode_id or str(uuid.uuid4()))
        return self._observation(reward=0.0)

    def step(self, action: FinRLAction, timeout_s: float | None = None, **kwargs: Any) -> FinRLObservation:
        if self._market is None or self._options is None:
            raise ValueError("there is no episode yet: reset first")
        stocks = self._market.window.stocks
        if len(action.actions) != len(stocks) or not all(map(math.isfinite, action.actions)):
            raise ValueError(
                f"actions={action.actions[:20]} must be {len(stocks)} numbers, one for each of {', '.join(stocks)}"
            )
        self._state.step_count += 1
        if self._market.is_over:
            return self._observation(reward=0.0)
        before = self._market.value
        self._market.trade(action.actions)
        self._market.pass_days(self._options.days_per_action)
        return self._observation(reward=(self._market.value - before) * self._options.reward_scaling)

    def _observation(self, reward: float) -> FinRLObservation:
        assert self._market is not None
        return FinRLObservation(
            state=self._market.state(),
            portfolio_value=self._market.value,
            date=self._market.date,
            reward=reward,
            done=self._market.is_over,
            metadata={"stocks": list(self._market.window.stocks), "hmax": self._market.limits},
        )

    @property
    def state(self) -> State:
        return self._state


def new_market(options: FinRLOptions, window: Window) -> Market:
    """Return the market at the start of an episode.

    With hmax=0 an action of 1 spends an equal part of the initial cash, so that buying every stock spends all of it.
    """
    num, first = len(window.stocks), window.closes[0]
    buy_costs = per_stock("buy_cost_pct", options.buy_cost_pct, num)
    limits = [options.hmax] * num
    if options.hmax == 0:
        limits = [int(options.cash / num // (price * (1 + cost))) for price, cost in zip(first, buy_costs, strict=True)]
    if 0 in limits:
        stock, price = window.stocks[limits.index(0)], first[limits.index(0)]
        raise ValueError(f"cash={options.cash:g}: a part of 1/{num} does not buy one share of {stock} at {price:g}")
    return Market(
        window,
        cash=options.cash,
        shares=[int(held) for held in per_stock("shares", options.shares, num)],
        limits=limits,
        buy_costs=buy_costs,
        sell_costs=per_stock("sell_cost_pct", options.sell_cost_pct, num),
    )


def per_stock(name: str, value: float | tuple[float, ...], num: int) -> list[float]:
    """Return one number per stock, from one for all or a tuple with one for each; ValueError if the length is wrong."""
    if not isinstance(value, tuple):
        return [float(value)] * num
    if len(value) != num:
        raise ValueError(f"{name}={list(value)} must be one number, or {num}: one for each stock")
    return [float(part) for part in value]


def default_options(config_path: str | None) -> dict[str, Any]:
    """Return the defaults of reset's options: {} for our own, or those of a FinRL configuration.

    As in FinRL, an episode of such a configuration spans the whole file with all its stocks and a decision every day.
    """
    if not config_path:
        return {}
    with open(config_path, encoding="utf-8") as file:
        config = json.load(file)
    unknown = [key for key in config if key not in FINRL_KEYS and key not in DERIVED_KEYS]
    if unknown or "data_path" not in config:
        known = ", ".join([*FINRL_KEYS, *DERIVED_KEYS])
        raise ValueError(f"FINRL_CONFIG_PATH={config_path}: unknown {unknown}, or no data_path; known: {known}")
    defaults = {FINRL_KEYS[key]: value for key, value in config.items() if key in FINRL_KEYS}
    stocks = price_table(config["data_path"]).stocks
    if config.get("stock_dim", len(stocks)) != len(stocks):
        raise ValueError(f"stock_dim={config['stock_dim']}, but {config['data_path']} has {len(stocks)} stocks")
    whole = {"stocks": stocks, "num_stocks": len(stocks), "window": 0, "days_per_action": 1}
    return {"hmax": 100, "indicators": [], **defaults, **whole}


def public_config(options: FinRLOptions) -> dict[str, Any]:
    """Return the answer of GET /config, with the official names."""
    stocks = len(options.stocks) or options.num_stocks
    return {
        "stock_dim": stocks,
        "initial_amount": options.cash,
        "action_space": stocks,
        "state_space": 1 + stocks * (2 + len(options.indicators)),
        "tech_indicators": list(options.indicators),
    }


def make_app(max_sessions: int) -> FastAPI:
    defaults = default_options(os.environ.get("FINRL_CONFIG_PATH"))
    options = read_options(FinRLOptions, defaults, "FINRL_CONFIG_PATH")
    price_table(options.prices)  # read once, before the first session

    def make_environment() -> FinRLEnvironment:
        return FinRLEnvironment(defaults)

    app = create_app(
        make_environment, FinRLAction, FinRLObservation, env_name="finrl_env", max_concurrent_envs=max_sessions
    )
    app.add_api_route("/config", lambda: public_config(options))
    return app


if __name__ == "__main__":
    serve(make_app, "The stock trading environment of OpenEnv, without Docker and without FinRL.")
