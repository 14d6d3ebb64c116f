import pytest

import skyrl_gym


def make(env_id, truth="42", **extras):
    return skyrl_gym.make(env_id, env_config={}, extras={"reward_spec": {"ground_truth": truth}, **extras})


@pytest.mark.parametrize(
    ("reply", "truth", "reward"),
    [
        ("so\n#### 42", "42", 1.0),
        ("#### 42.", "42", 1.0),
        ("#### 42... or so", "42", 1.0),
        ("#### 42.0", "42", 1.0),
        ("####42", 42, 1.0),
        ("#### $1,080", "1080", 1.0),
        ("#### 1080", "1,080", 1.0),
        ("#### -3.5", "-3.50", 1.0),
        ("#### 7 no\n#### 42", "42", 1.0),
        ("#### 42 no\n#### 7", "42", 0.0),
        ("42", "42", 0.0),
        ("#### .", "42", 0.0),
        ("#### forty-two", "42", 0.0),
    ],
)
def test_the_number_behind_the_last_mark_is_compared_as_a_number(reply, truth, reward):
    step = make("gsm8k", truth).step(reply)
    assert step == {"observations": [], "reward": reward, "done": True, "metadata": {}, "truncated": False}


def test_several_turns_pay_a_little_for_form_and_end_with_the_right_answer():
    env = make("gsm8k_multi_turn", max_turns=4)
    first = env.step("I think")
    assert (first["reward"], first["done"], first["truncated"]) == (0.0, False, False)
    assert "#### ANSWER" in first["observations"][0]["content"]
    assert env.step("#### 41")["reward"] == pytest.approx(0.05)  # 0.2 / 4
    last_call = env.step("#### 43")["observations"]
    assert "last turn" not in first["observations"][0]["content"]
    assert "last turn" in last_call[0]["content"]
    right = env.step("#### 42")
    assert right == {"observations": [], "reward": 1.0, "done": True, "metadata": {}, "truncated": False}
    assert env.get_metrics() == {"steps": 4, "invalid_actions": 1}


def test_running_out_of_turns_is_said_and_nothing_more_is_asked():
    step = make("gsm8k_multi_turn", max_turns=1).step("#### 41")
    assert step == {"observations": [], "reward": 0.2, "done": True, "metadata": {}, "truncated": True}


@pytest.mark.parametrize(
    ("extras", "limit"),
    [({"max_turns": 3}, 3), ({"extra_info": {"max_turns": 2}}, 2), ({"extra_info": None}, 5), ({}, 5)],
)
def test_the_turn_limit_is_the_runs_or_the_rows_or_five(extras, limit):
    assert make("gsm8k_multi_turn", **extras).max_turns == limit


def test_a_turn_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_turns=-1"):
        make("gsm8k_multi_turn", max_turns=-1)
