import functools

import pytest

import skyrl_gym
from skyrl_gym import EnvFailure
from skyrl_gym.tools.search import call_search_api


@pytest.fixture
def make(env_configs):
    def make_env(target: object = ("The Seine", "River Seine"), **extras):
        extras = {"reward_spec": {"ground_truth": {"target": target}}, **extras}
        return skyrl_gym.make("search", env_config=env_configs["search"], extras=extras)

    return make_env


def test_a_search_is_answered_with_passages(make, search_server):
    env = make()
    step = env.step("<search>river</search>")
    content = step["observations"][0]["content"]
    assert content.startswith("\n<information>Doc 1: The Seine flows through Paris.\nDoc 2: ")
    assert content.endswith("</information>\n")
    assert (step["reward"], step["done"], step["truncated"]) == (0.0, False, False)
    assert step["metadata"] == {"tool_group": "SearchToolGroup", "tool_name": "search", "tool_input": "river"}
    assert env.get_metrics() == {"searches": 1, "invalid_actions": 0}


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("<answer>seine</answer>", 1.0),
        ("<answer> A  SEINE! </answer>", 1.0),
        ("<answer>river-seine</answer>", 0.0),
        ("<answer>River Seine</answer> and more <answer>Loire</answer>", 1.0),
        ("<answer>Loire</answer>", 0.0),
        ("<answer></answer>", 0.0),
    ],
)
def test_the_answer_is_matched_without_case_articles_and_punctuation(make, reply, reward):
    step = make().step(reply)
    assert (step["reward"], step["done"], step["truncated"], step["observations"]) == (reward, True, False, [])


def test_one_target_may_be_a_plain_value(make):
    assert make("Seine").step("<answer>the Seine</answer>")["reward"] == 1.0
    assert make(1889).step("<answer>1889</answer>")["reward"] == 1.0
    with pytest.raises(ValueError, match="needs target"):
        make([])


def test_an_answer_in_a_retrieved_passage_is_not_the_models(make):
    env = make(max_turns=2)
    assert "<answer>River Seine</answer>" in env.step("<search>river</search>")["observations"][0]["content"]
    last = env.step("I do not know.")
    assert (last["reward"], last["done"], last["truncated"]) == (0.0, True, True)


def test_what_follows_a_closing_tag_is_cut(make):
    step = make().step("<search>river</search> <information>It is</information> <answer>Seine</answer>")
    assert (step["done"], step["metadata"]["tool_input"]) == (False, "river")


def test_a_reply_without_tags_is_told_what_to_write(make):
    step = make().step("Hm.")
    assert step["done"] is False
    assert "<search>query</search>" in step["observations"][0]["content"]


def test_a_server_that_is_down_is_an_environment_failure_and_no_reward(no_server_url, monkeypatch):
    impatient = functools.partial(call_search_api, max_retries=2, initial_delay=0.01)
    monkeypatch.setattr("skyrl_gym.tools.search.call_search_api", impatient)
    extras = {"reward_spec": {"ground_truth": {"target": "Seine"}}}
    for env_id, reply in (("search", "<search>x</search>"), ("searchcode", "<tool><search>x</search></tool>")):
        truth = extras if env_id == "search" else {"reward_spec": {"ground_truth": "1"}}
        env = skyrl_gym.make(env_id, env_config={"search_url": no_server_url}, extras=truth)
        with pytest.raises(EnvFailure, match="ConnectionError"):
            env.step(reply)
