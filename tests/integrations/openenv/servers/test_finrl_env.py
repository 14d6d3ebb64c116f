from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests

if importlib.util.find_spec("skfolio") is None:  # never imported: it is here for a data file
    pytest.skip("its prices come with the extra finrl-env", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from integrations.openenv.catalog import InvalidAction, catalog_entry
from integrations.openenv.catalog.finrl import FinRLEntry, FinRLObservation, FinRLTranslator
from integrations.openenv.catalog.finrl_options import SP500_STOCKS, FinRLOptions
from integrations.openenv.catalog.orders import read_orders
from integrations.openenv.client.errors import OpenEnvError, ServerError
from integrations.openenv.client.session import StepResult, open_session
from integrations.openenv.env import OpenEnv, close_background_pools, register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from integrations.openenv.servers.finrl_env import FinRLAction, FinRLEnvironment, default_options, public_config
from integrations.openenv.servers.stock_market import Market
from integrations.openenv.servers.stock_prices import Window, draw_window, price_table
from skyrl_gym.check import check_env
from skyrl_gym.envs.registration import deregister
from tests.integrations.openenv.conftest import started

SERVER = "integrations.openenv.servers.finrl_env"
ENTRY = FinRLEntry()


@pytest.fixture(scope="module")
def finrl_url() -> Iterator[str]:
    yield from started(SERVER)


def market(*closes: tuple[float, ...], cash: float = 1000.0, hmax: int = 100, cost: float = 0.0) -> Market:
    """Stocks A, B, ... with these prices day by day."""
    num = len(closes[0])
    days = tuple(f"2020-01-{day:02d}" for day in range(1, len(closes) + 1))
    window = Window(tuple("ABC"[:num]), days, closes, tuple(() for _ in closes))
    costs = [cost] * num
    return Market(window, cash=cash, shares=[0] * num, limits=[hmax] * num, buy_costs=costs, sell_costs=costs)


@pytest.fixture
def prices(tmp_path: Path) -> str:
    """A goes 10, 11, 12, ... and B 40, 39, 38, ... over ten days; `mood` is the day's number."""
    rows = ["date,ticker,close,mood"]
    rows += [f"2020-01-{1 + day:02d},A,{10 + day},{day}\n2020-01-{1 + day:02d},B,{40 - day},{day}" for day in range(10)]
    path = tmp_path / "prices.csv"
    path.write_text("\n".join(rows))
    return str(path)


def own(prices: str, **more: Any) -> dict[str, Any]:
    """Options of a short episode on them: three decisions of two days, from the fourth day on."""
    return {
        "prices": prices,
        "stocks": ["A", "B"],
        "window": 6,
        "days_per_action": 2,
        "start": "2020-01-04",
        "cash": 1000.0,
        "buy_cost_pct": 0.0,
        "sell_cost_pct": 0.0,
        "indicators": ["return_1", "return_2"],
        **more,
    }


# FinRL's rules


def test_an_action_is_a_part_of_hmax_cut_to_whole_shares_and_to_the_cash() -> None:
    trading = market((10.0,), (10.0,))
    trading.trade([0.257])
    assert (trading.shares, trading.cash) == ([25], 750.0)
    trading.trade([50.0])  # cut to 1, which is 100 shares; the cash is for 75
    assert (trading.shares, trading.cash) == ([100], 0.0)
    trading.trade([-0.309])
    assert (trading.shares, trading.cash) == ([70], 300.0)
    trading.trade([-50.0])
    assert (trading.shares, trading.cash) == ([0], 1000.0)


def test_sales_pay_for_the_purchases_of_the_same_day() -> None:
    trading = market((10.0, 20.0), (10.0, 20.0))
    trading.trade([1.0, 0.0])
    trading.trade([-1.0, 0.5])
    assert (trading.shares, trading.cash) == ([0, 50], 0.0)


def test_the_larger_purchase_comes_first() -> None:
    trading = market((10.0, 10.0), (10.0, 10.0))
    trading.trade([0.6, 0.8])
    assert trading.shares == [20, 80]


def test_both_sides_of_a_trade_cost() -> None:
    trading = market((10.0,), (10.0,), cost=0.01)
    trading.trade([0.5])
    assert trading.cash == pytest.approx(1000 - 50 * 10.1)
    trading.trade([-0.5])
    assert trading.cash == pytest.approx(1000 - 50 * 10.1 + 50 * 9.9)


# The server


def test_an_episode_on_given_prices(prices: str) -> None:
    env = FinRLEnvironment({})
    first = env.reset(seed=1, **own(prices, reward_scaling=0.01))
    # cash, prices, shares, changes over 1 day, changes over 2 days
    assert first.state == pytest.approx([1000, 13, 37, 0, 0, 100 / 12, -100 / 38, 200 / 11, -200 / 39])
    assert (first.portfolio_value, first.date, first.reward, first.done) == (1000.0, "2020-01-04", 0.0, False)
    bought = env.step(FinRLAction(actions=[1.0, 0.0]))  # half of 1000 buys 38 shares of A at 13
    assert bought.state[:5] == [1000 - 38 * 13, 15.0, 35.0, 38.0, 0.0]
    assert (bought.reward, bought.date) == (pytest.approx(38 * 2 * 0.01), "2020-01-06")
    assert not env.step(FinRLAction(actions=[-1.0, 0.0])).done
    last = env.step(FinRLAction(actions=[0.0, 0.0]))
    assert (last.done, last.date, last.reward) == (True, "2020-01-10", 0.0)
    assert env.state.step_count == 3


def test_a_step_after_the_end_changes_nothing_and_earns_nothing(prices: str) -> None:
    env = FinRLEnvironment({})
    env.reset(**own(prices, window=2))
    last = env.step(FinRLAction(actions=[1.0, 0.0]))
    again = env.step(FinRLAction(actions=[-1.0, 1.0]))
    assert last.done
    assert last.reward != 0.0
    assert (again.state, again.done, again.reward) == (last.state, True, 0.0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"stocks": ["TSLA"]}, "stocks: there are no prices of 'TSLA'; there are AAPL, AMD"),
        ({"stocks": ["AAPL", "AAPL"]}, "at most 50 different tickers"),
        ({"window": 9000}, "window=9000: 9000 days and 20 before them do not fit into the 8313 days"),
        ({"start": "1990-01-02"}, "start=1990-01-02 must be from 1990-01-30 to 2022-05-"),
        ({"start": "soon"}, "start='soon' must be a day like 2010-01-31"),
        ({"period": "test"}, "period: Input should be 'all', 'train' or 'validation'"),
        ({"windw": 5}, "finrl_env has no option 'windw'; did you mean window?"),
        ({"days_per_action": 0}, "days_per_action=0 must be from 1 to 10000"),
        (
            {"cash": 20, "stocks": ["KO", "XOM"], "start": "2020-01-02"},
            "cash=20: a part of 1/2 does not buy one share of KO",
        ),
        ({"cash": float("nan")}, "cash=nan must be from"),
        ({"indicators": ["rsi"]}, "indicators: 'rsi' is neither return_DAYS nor a column"),
        ({"buy_cost_pct": [0.1]}, r"buy_cost_pct=\[0.1\] must be one number, or 2"),
        ({"prices": "/etc/passwd"}, "must be a file ending in .csv"),
        ({"prices": "/nowhere.csv"}, "is no file on the server's machine"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FinRLEnvironment({}).reset(seed=0, **options)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("day,price\n1,2\n", "must have the columns date, ticker and close"),
        ("date,ticker,close\n2020-01-01,A,0\n", "every close must be a positive number"),
        ("date,ticker,close\n2020-01-01,A,x\n", "every close must be a positive number"),
        ("date,ticker,close\nnever,A,3\n", "each row needs a date"),
        ("date,ticker,close\n2020-01-01,A,3\n2020-01-01,A,4\n", "one row a day"),
        ("", "cannot be read as comma-separated values"),
    ],
)
def test_a_broken_price_file_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        price_table(str(path))


def test_a_finrl_configuration_sets_the_defaults(prices: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    size = {"stock_dim": 2, "state_space": 7, "action_space": 2, "tech_indicator_list": ["mood"]}
    money = {"initial_amount": 500, "num_stock_shares": [3, 0], "hmax": 10, "reward_scaling": 1.0}
    free = {"buy_cost_pct": [0.0, 0.0], "sell_cost_pct": [0.0, 0.0]}
    config.write_text(json.dumps({"data_path": prices, **size, **money, **free}))
    defaults = default_options(str(config))
    env = FinRLEnvironment(defaults)
    assert env.reset().state == [500.0, 10.0, 40.0, 3.0, 0.0, 0.0, 0.0]
    results = [env.step(FinRLAction(actions=[0.1, 0.0])) for _ in range(9)]  # ten days are nine steps
    assert [result.done for result in results] == [False] * 8 + [True]
    assert results[0].state == [490.0, 11.0, 39.0, 4.0, 0.0, 1.0, 1.0]
    assert results[0].reward == 4.0
    expected = {"stock_dim": 2, "initial_amount": 500.0, "action_space": 2, "state_space": 7}
    assert public_config(FinRLOptions(**_tuples(defaults))) == {**expected, "tech_indicators": ["mood"]}
    config.write_text(json.dumps({"data_path": prices, "stock_dim": 3}))
    with pytest.raises(ValueError, match=r"stock_dim=3, but .* has 2 stocks"):
        default_options(str(config))


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


@pytest.mark.parametrize("period", ["train", "validation"])
def test_training_and_validation_share_no_day_and_indicators_look_at_none_of_the_other(period: Any) -> None:
    dates = list(price_table("").closes.index)
    own_days = [date for date in dates if (date < "2015-01-01") == (period == "train")]
    longest = len(own_days) - 1 - 20  # 20 days before the first one are for return_20
    window = draw_window(FinRLOptions(period=period, window=longest), seed=0)
    assert dates[dates.index(window.dates[0]) - 20] == own_days[0]
    assert window.dates[-1] == own_days[-1]
    with pytest.raises(ValueError, match=f"do not fit into the {len(own_days)} days of the period '{period}'"):
        draw_window(FinRLOptions(period=period, window=longest + 1), seed=0)


def test_indicators_use_no_later_price() -> None:
    closes = price_table("").closes
    window = draw_window(FinRLOptions(stocks=("KO", "XOM"), start="2001-03-01"), 0)
    for day in (0, 100):
        past = closes.loc[: window.dates[day], ["KO", "XOM"]]
        changes = [100 * (past.iloc[-1] / past.iloc[-1 - days] - 1) for days in (1, 5, 20)]
        assert window.indicators[day] == pytest.approx([change[stock] for change in changes for stock in ("KO", "XOM")])


def test_the_bundled_prices_are_the_ones_that_dataset_rows_name() -> None:
    assert tuple(price_table("").stocks) == SP500_STOCKS


# On the wire


async def _transcript(url: str, seed: int) -> list[StepResult]:
    client, first = await open_session(url, {"seed": seed})
    random = Random(0)
    seen = [first]
    while not seen[-1].done:
        seen.append(await client.step({"actions": [random.uniform(-1, 1), random.uniform(-1, 1)]}))
    await client.close()
    return seen


async def test_the_same_seed_repeats_in_another_server_process(finrl_url: str) -> None:
    other = await ServerProcess.start(SERVER, max_sessions=4, timeout_s=90.0)
    try:
        assert await _transcript(finrl_url, 7) == await _transcript(other.url, 7) == await _transcript(finrl_url, 7)
    finally:
        other.stop()
    assert await _transcript(finrl_url, 8) != await _transcript(finrl_url, 7)


async def test_sixteen_sessions_at_once_see_what_each_would_see_alone(finrl_url: str) -> None:
    together = await asyncio.gather(*(_transcript(finrl_url, seed) for seed in range(16)))
    assert together[5] == await _transcript(finrl_url, 5)


async def test_the_official_client_plays_and_bad_actions_are_explained(finrl_url: str) -> None:
    from openenv.core import GenericEnvClient

    async with GenericEnvClient(base_url=finrl_url) as client:
        first = await client.reset()
        assert set(first.observation) == {"state", "portfolio_value", "date"}
        result = await client.step({"actions": [1.0, 0.0]})
        assert (len(result.observation["state"]), result.done) == (1 + 2 * 5, False)
        assert (await client.state())["step_count"] == 1
    client, _ = await open_session(finrl_url, {"seed": 0, "stocks": ["KO", "XOM"]})
    for wrong in ([0.5], [0.5, float("nan")]):
        with pytest.raises(ServerError, match="must be 2 numbers, one for each of KO, XOM"):
            await client.step({"actions": wrong})
    assert not (await client.step({"actions": [0, 0]})).done  # the session goes on
    await client.close()
    config = await asyncio.to_thread(requests.get, f"{finrl_url}/config", timeout=120)
    assert config.json()["stock_dim"] == 2


# What the model writes


@pytest.mark.parametrize(
    ("text", "orders"),
    [
        ("buy AAPL", [1, 0]),
        (" Buy aapl, SELL jpm. ", [1, -1]),
        ("AAPL 0.5, JPM -1", [0.5, -1]),
        ("AAPL: buy\nJPM: sell 50%", [1, -0.5]),
        ("buy 0.25 AAPL and JPM", [0.25, 1]),
        ("buy AAPL and JPM", [1, 1]),
        ("buy AAPL 7 shares", [1, 0]),
        ("sell", [-1, -1]),
        ("buy all 0.5", [0.5, 0.5]),
        ("hold", [0, 0]),
        ("hold AAPL, sell JPM", [0, -1]),
        ("[0.5, -1]", [0.5, -1]),
        ("0.5 -3", [0.5, -1]),
        ('{"AAPL": 0.5, "JPM": -1}', [0.5, -1]),
    ],
)
def test_orders_are_read_in_words_and_numbers(text: str, orders: list[float]) -> None:
    assert read_orders(text, ["AAPL", "JPM"]) == orders


LEGAL = 'Your stocks are AAPL, JPM. Write for example "buy AAPL", "sell JPM", "AAPL 0.5" or "hold".'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("  ", "Your action is empty."),
        ("buy TSLA", '"TSLA" is no order and no stock of yours.'),
        ("AAPL", "It is not clear what to do with AAPL."),
        ("buy AAPL, sell AAPL", "AAPL is named twice."),
        ("[0.5]", "1 numbers for 2 stocks."),
    ],
)
def test_an_unreadable_order_is_answered_with_what_may_be_written(text: str, complaint: str) -> None:
    with pytest.raises(InvalidAction) as invalid:
        read_orders(text, ["AAPL", "JPM"])
    assert str(invalid.value) == f"{complaint} {LEGAL}"


WORDS = st.sampled_from(
    ["buy", "sell", "hold", "AAPL", "JPM", "0.5", "-1", "50%", ",", "1e999", "-", ".", "9" * 5000, "nan"]
)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(text=st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=8).map(" ".join)))
def test_any_text_is_two_numbers_from_minus_one_to_one_or_explained(text: str) -> None:
    try:
        orders = read_orders(text, ["AAPL", "JPM"])
    except InvalidAction as invalid:
        orders, explained = [0.0, 0.0], str(invalid)
    else:
        explained = ""
    assert len(explained) < 300
    assert len(orders) == 2
    assert all(-1.0 <= order <= 1.0 for order in orders)


# What the model reads, and what it earns


def local(prices: str, **more: Any) -> tuple[FinRLEnvironment, FinRLTranslator, StepResult]:
    """The environment in this process, and a translator for it."""
    options = ENTRY.read_options(own(prices, **more))
    env, translator = FinRLEnvironment({}), FinRLTranslator(options)
    first = env.reset(seed=0, **ENTRY.reset_kwargs(options))
    return env, translator, StepResult(first.model_dump(), 0.0, False)


def play(env: FinRLEnvironment, translator: FinRLTranslator, order: str) -> Any:
    seen = env.step(FinRLAction(**translator.action(order)))
    return translator.answer(StepResult(seen.model_dump(), float(seen.reward or 0), seen.done), last_turn=False)


def test_the_text_of_a_known_day(prices: str) -> None:
    env, translator, first = local(prices)
    assert translator.first_text(first) == (
        "Turn 1 of 3. Cash $1000 of $1000.\n"
        "A: $13.00, +8% in 1 day, +18% in 2 days. You own 0.\n"
        "B: $37.00, -3% in 1 day, -5% in 2 days. You own 0."
    )
    assert play(env, translator, "buy A").text == (
        "Turn 2 of 3. Cash $506 of $1076.\n"
        "A: $15.00, +7% in 1 day, +15% in 2 days. You own 38.\n"
        "B: $35.00, -3% in 1 day, -5% in 2 days. You own 0."
    )
    play(env, translator, "hold")
    last = play(env, translator, "hold")
    # 38 A and 13 B for 975: 38 * 19 + 13 * 31 + 25 = 1150
    assert last.text == "The end. Your $1000 became $1228; buying and holding would have made $1150."
    assert last.ended
    assert translator.success


def test_a_decision_earns_what_it_is_better_than_buying_and_holding(prices: str) -> None:
    env, translator, first = local(prices)
    translator.first_text(first)
    # two days: A +2, B -2. Buying and holding has 38 A and 13 B: +76 - 26 = +50 of 1000
    assert play(env, translator, "hold").reward == pytest.approx(-0.05)
    assert play(env, translator, "buy A").reward == pytest.approx((38 * 2 - 50) / 1000)
    assert translator.metrics()["market_pct"] == pytest.approx(10.0)


def test_no_decision_earns_less_than_one_that_was_not_taken(prices: str) -> None:
    env, translator, first = local(prices, stocks=["A"], window=2, start="2020-01-03", cash=40.0, indicators=[])
    translator.first_text(first)
    assert translator.unfinished_reward() == -1.0
    env, translator, first = local(prices, days_per_action=1, window=6)
    translator.first_text(first)
    assert translator.unfinished_reward() == -1.0
    play(env, translator, "hold")
    assert translator.unfinished_reward() == pytest.approx(-5 / 6)
    assert [translator._shaped(excess) for excess in (-2.0, 2.0, 0.1)] == pytest.approx([-1 / 6, 1 / 6, 0.1])


def test_the_plain_reward_is_the_servers_and_unfinished_counts_as_all_lost(prices: str) -> None:
    env, translator, first = local(prices, shaped_reward=False)
    translator.first_text(first)
    assert play(env, translator, "buy A").reward == pytest.approx(76 * 1e-4)
    assert translator.unfinished_reward() == pytest.approx(-(1000 + 76) * 1e-4)
    assert translator.gold_reward is None


def test_other_stocks_than_the_options_say_are_an_error_of_the_environment() -> None:
    translator = FinRLTranslator(FinRLOptions(stocks=("A", "B", "C")))
    sample = {"state": [1000.0, 10.0, 0.0, 1.0, 2.0, 3.0], "portfolio_value": 1000.0, "date": ""}
    with pytest.raises(OpenEnvError, match="does not fit 3 stocks: set the option stocks"):
        translator.first_text(StepResult(sample, 0.0, False))
    with pytest.raises(OpenEnvError, match="no list of numbers"):
        FinRLObservation.from_fields({"state": [1.0, None], "portfolio_value": 1.0})


def test_the_official_sample_of_one_stock_with_other_indicators_is_shown_without_them() -> None:
    translator = FinRLTranslator(FinRLOptions(num_stocks=1, window=99, days_per_action=1, hmax=100))
    sample = {"state": [100000.0, 101.5, 0, 0.3, 51.0, 1.0, 20.0], "portfolio_value": 100000.0, "date": "2020-01-01"}
    shown = translator.first_text(StepResult(sample, 0.0, False))
    assert shown == "Turn 1 of 99. Cash $100000 of $100000.\nS1: $101.50. You own 0."
    assert translator.action("buy") == {"actions": [1.0]}


# Whole episodes


async def played(row: dict[str, Any], url: str, reply: str | None, **config: Any) -> tuple[OpenEnv, float]:
    """An episode with always the same reply, or of the gold player; and what it earned."""
    env = OpenEnv({"url": url, **config}, row)
    await env.init_async(row["prompt"])
    earned, done = 0.0, False
    while not done:
        output = await env.step_async(env.gold_action() or "" if reply is None else reply)
        earned, done = earned + output["reward"], output["done"]
    await env.close_async()
    return env, earned


async def test_the_gold_player_earns_what_is_promised_and_cash_earns_minus_the_market(finrl_url: str) -> None:
    train, validation = dataset_rows("finrl_env", 12, 12, seed=3)
    for row in train + validation:
        env, earned = await played(row, finrl_url, None)
        assert env.translator.gold_reward == 0.0
        assert earned == 0.0
        assert env.get_metrics()["success"] is True
        assert env.get_metrics()["turns"] == 8
    row = {**train[0], "options": json.dumps({"stocks": ["KO", "JNJ"], "start": "2004-03-01"})}
    env, earned = await played(row, finrl_url, "<action>hold</action>")
    assert earned == pytest.approx(-env.get_metrics()["market_pct"] / 100)
    env, earned = await played(row, finrl_url, "I would rather not say.")
    assert earned == -1.0
    await close_shared_pools()


def test_rows_say_the_stocks_and_the_period_and_a_given_start_is_for_both() -> None:
    train, validation = dataset_rows("finrl_env", 3, 2, seed=0, options={"num_stocks": 3})
    for rows, split in ((train, "train"), (validation, "validation")):
        for row in rows:
            options = json.loads(row["options"])
            assert options["period"] == split
            assert len(options["stocks"]) == 3
    [row], _ = dataset_rows("finrl_env", 1, 1, seed=0, options={"start": "2008-01-02", "stocks": ["KO"]})
    assert json.loads(row["options"]) == {"stocks": ["KO"]}


def test_too_few_turns_for_an_episode_are_refused() -> None:
    with pytest.raises(ValueError, match="max_turns=3, but an episode takes 8 turns"):
        OpenEnv(None, {**dataset_rows("finrl_env", 1, 1, seed=0)[0][0], "max_turns": 3})
    assert catalog_entry("finrl-env").max_turns == 8


def test_it_keeps_the_contract_of_a_text_environment(finrl_url: str) -> None:
    register_openenv()
    [row], _ = dataset_rows("finrl_env", 1, 1, seed=0)
    extras = {key: value for key, value in row.items() if key not in ("prompt", "env_class")}
    report = check_env("openenv", extras={**extras, "max_turns": 8}, env_config={"url": finrl_url})
    deregister("openenv")
    close_background_pools()
    assert report.passed, str(report)
