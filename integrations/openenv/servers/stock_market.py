"""A portfolio and its trades, by the rules of FinRL's StockTradingEnv (version 0.3.7)."""

from __future__ import annotations

from collections.abc import Sequence

from integrations.openenv.servers.stock_prices import Window


class Market:
    """The cash, the shares and the day of one episode. Orders are filled at the day's close; then days pass.

    An action is a number in [-1, 1] per stock: times the stock's `limit` and cut to whole shares, it is the shares to
    buy (or to sell if negative). Sells come first, then buys, the largest first, each as far as the cash goes.
    """

    def __init__(
        self,
        window: Window,
        *,
        cash: float,
        shares: Sequence[int],
        limits: Sequence[int],
        buy_costs: Sequence[float],
        sell_costs: Sequence[float],
    ) -> None:
        self.window = window
        self.cash = cash
        self.shares = list(shares)
        self.limits = list(limits)  # shares that an action of 1 trades
        self.buy_costs = list(buy_costs)  # as a fraction of what is traded
        self.sell_costs = list(sell_costs)
        self.day = 0

    @property
    def prices(self) -> tuple[float, ...]:
        return self.window.closes[self.day]

    @property
    def date(self) -> str:
        return self.window.dates[self.day]

    @property
    def is_over(self) -> bool:
        return self.day >= len(self.window.dates) - 1

    @property
    def value(self) -> float:
        """The value of the portfolio: the cash, and the shares at the day's close."""
        return self.cash + sum(price * held for price, held in zip(self.prices, self.shares, strict=True))

    def state(self) -> list[float]:
        """Return [cash, price per stock, shares per stock, indicators], in FinRL's order."""
        return [self.cash, *self.prices, *map(float, self.shares), *self.window.indicators[self.day]]

    def trade(self, actions: Sequence[float]) -> None:
        orders = [int(max(-1.0, min(1.0, action)) * limit) for action, limit in zip(actions, self.limits, strict=True)]
        by_size = sorted(range(len(orders)), key=orders.__getitem__)
        for stock in by_size:
            if orders[stock] < 0:
                self._sell(stock, -orders[stock])
        for stock in reversed(by_size):  # of two equal buys the later stock comes first, as in FinRL
            if orders[stock] > 0:
                self._buy(stock, orders[stock])

    def pass_days(self, days: int) -> None:
        self.day = min(self.day + days, len(self.window.dates) - 1)

    def _sell(self, stock: int, wanted: int) -> None:
        sold = min(wanted, self.shares[stock])
        self.cash += sold * self.prices[stock] * (1.0 - self.sell_costs[stock])
        self.shares[stock] -= sold

    def _buy(self, stock: int, wanted: int) -> None:
        cost = self.prices[stock] * (1.0 + self.buy_costs[stock])
        bought = min(wanted, int(self.cash // cost))
        self.cash -= bought * cost
        self.shares[stock] += bought
