import pytest

import skyrl_gym
from skyrl_gym import EnvFailure
from skyrl_gym.envs.sql.env import well_formed


@pytest.fixture
def make(env_configs):
    def make_env(truth="SELECT name FROM pets", **extras):
        extras = {"db_id": "example", "data": "spider", "reward_spec": {"ground_truth": truth}, **extras}
        return skyrl_gym.make("text2sql", env_config=env_configs["text2sql"], extras=extras)

    return make_env


def solve(env, sql):
    return env.step(f"<think>So.</think><solution>{sql}</solution>")["reward"]


def test_a_query_is_answered_and_a_solution_ends_the_episode(make):
    env = make(max_turns=3)
    step = env.step("<think>Look.</think><sql>SELECT age FROM pets LIMIT 1</sql>")
    assert "age\n3\n<reminder>You have 2 turns left." in step["observations"][0]["content"]
    assert (step["reward"], step["done"]) == (0.0, False)
    assert step["metadata"]["tool_input"] == ("example", "SELECT age FROM pets LIMIT 1", 2)
    last = env.step("<think>So.</think><solution>SELECT name FROM pets</solution>")
    assert last == {"observations": [], "reward": 1.0, "done": True, "metadata": {}, "truncated": False}


@pytest.mark.parametrize(
    ("sql", "reward"),
    [
        ("SELECT name FROM pets ORDER BY name DESC", 1.0),
        ("SELECT DISTINCT name FROM pets", 0.0),
        ("SELECT name FROM pets UNION ALL SELECT 'Rex'", 0.0),
        ("SELECT name, age FROM pets", 0.0),
        ("SELECT nothing", 0.0),
        ("", 0.0),
    ],
)
def test_rows_are_compared_in_any_order_but_as_often_as_they_come(make, sql, reward):
    assert solve(make(), sql) == reward


def test_a_delete_is_not_the_same_as_an_empty_result(make):
    empty = "SELECT name FROM toys"
    assert solve(make(empty), "SELECT name FROM pets WHERE age > 9") == 1.0
    assert solve(make(empty), "DELETE FROM pets") == 0.0
    assert solve(make(empty), "") == 0.0
    assert solve(make(), "SELECT name FROM pets") == 1.0  # Rex and the Toms are still there


def test_without_a_query_the_model_is_told_so_and_the_last_turn_costs_one(make):
    env = make(max_turns=2)
    assert "previous action is invalid" in env.step("Hm.")["observations"][0]["content"]
    last = env.step("<think>Hm.</think><sql>SELECT 1</sql>")
    assert (last["reward"], last["done"], last["truncated"], last["observations"]) == (-1.0, True, True, [])


def test_what_follows_a_closing_tag_is_cut(make):
    step = make().step("<think>.</think><sql>SELECT 7</sql><solution>SELECT name FROM pets</solution>")
    assert step["done"] is False
    assert "7\n7\n" in step["observations"][0]["content"]


@pytest.mark.parametrize(
    ("replies", "well"),
    [
        (["<think>a</think><solution>x</solution>"], True),
        (["<sql>y</sql>", " <think>a</think><solution>x</solution>"], True),
        (["<think>a</think><sql>y</sql>", "<solution>x</solution>"], False),
        (["<think>a</think><sql>y</sql>", "so <think>a</think><solution>x</solution>"], False),
        (["<solution>x</solution>"], False),
        (["<think>a</think><solution><solution>x</solution>"], False),
        (["<think>a</think><solution><think>b</think>x</solution>"], False),
        (["<think>a</think><observation>made up</observation><solution>x</solution>"], False),
        (["<think>a</think>"], False),
    ],
)
def test_the_form(replies, well):
    assert well_formed(replies) is well


def test_a_broken_form_costs_one_even_if_the_rows_are_right(make):
    assert make().step("<solution>SELECT name FROM pets</solution>")["reward"] == -1.0


def test_a_missing_database_or_a_broken_truth_is_an_environment_failure(make):
    with pytest.raises(EnvFailure, match="no SQLite database"):
        make(db_id="nope").step("<think>.</think><sql>SELECT 1</sql>")
    with pytest.raises(EnvFailure, match="row's own query fails"):
        solve(make("SELECT nothing"), "SELECT 1")


@pytest.mark.parametrize("db_id", ["..", ".", "", "../spider/example", "/etc", "a/b", "a\\b", "a\0"])
def test_a_database_that_is_a_path_is_refused_by_name(make, db_id):
    with pytest.raises(ValueError, match=r"db_id=.* must be the name of a folder in"):
        make(db_id=db_id)


def test_a_row_without_its_columns_is_refused_by_name(make):
    with pytest.raises(ValueError, match="data='oracle'"):
        make(data="oracle")
    with pytest.raises(ValueError, match="db_path"):
        skyrl_gym.make("text2sql", env_config={}, extras={"data": "bird", "db_id": "x"})


@pytest.mark.parametrize(
    "reply",
    ["hm", "", "<sql>", "<sql></sql>", "<sql> \n</sql>", "</sql>", "<solution>", "<sql>SELEC 1</sql>", "\ud800",
     "<sql>DELETE FROM pets</sql>", "<sql>SELECT * FROM nothing</sql>"],
)  # fmt: skip
def test_every_answer_reminds_of_the_turns_left(make, reply):
    env = make(max_turns=3)
    for turns_left in (2, 1):
        content = env.step(reply)["observations"][0]["content"]
        assert content.endswith(f"<reminder>You have {turns_left} turns left.</reminder>\n</observation>")
    assert env.step(reply)["done"]
