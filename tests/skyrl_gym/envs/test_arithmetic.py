import pytest

import skyrl_gym
from skyrl_gym.envs.arithmetic import rows


def play(reply, truth="42"):
    env = skyrl_gym.make("arithmetic", env_config={}, extras={"reward_spec": {"ground_truth": truth}})
    return env.step(reply), env


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("<answer>42</answer>", 1.0),
        ("I add.\n<answer>\n 42.0. </answer> Done.", 1.0),
        ("<answer>17 + 25 = 42</answer>", 1.0),
        ("<answer>1</answer> no, <answer>42</answer>", 1.0),
        ("<answer><answer>42</answer>", 1.0),
        ("It is 42.", 0.3),
        ("<answer>42", 0.3),
        ("<answer>43</answer>", 0.1),
        ("<answer>42</answer> no, <answer>43</answer>", 0.1),
        ("<answer>-42</answer>", 0.1),
        ("<answer>many</answer>", 0.0),
        ("It is 43.", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_a_ladder(reply, reward):
    step, env = play(reply)
    assert step == {"observations": [], "reward": reward, "done": True, "metadata": {}, "truncated": False}
    assert env.get_metrics() == {"correct": reward == 1.0, "invalid_actions": int(reward in (0.0, 0.3))}


def test_the_truth_may_be_any_number_and_must_be_one():
    assert play("<answer>1042</answer>", truth="1,042")[0]["reward"] == 1.0
    assert play("<answer>-7</answer>", truth=-7)[0]["reward"] == 1.0
    with pytest.raises(ValueError, match="must be a number, not 'many'"):
        play("", truth="many")
    with pytest.raises(ValueError, match=r"needs reward_spec\.ground_truth; it has the columns \['a'\]"):
        skyrl_gym.make("arithmetic", env_config={}, extras={"a": 1})


def test_rows_are_the_same_for_the_same_seed_and_right():
    train = rows(50, seed=3, digits=2, operators="+-*")
    assert train == rows(50, seed=3, digits=2, operators="+-*")
    assert train != rows(50, seed=4, digits=2, operators="+-*")
    for row in train:
        question = row["prompt"][-1]["content"].removeprefix("What is ").split("?")[0]
        a, operator, b = question.split()
        truth = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        assert row["reward_spec"]["ground_truth"] == str(truth)
        assert row["env_class"] == "arithmetic"


def test_train_and_validation_have_no_problem_in_common():
    questions = {
        split: {row["prompt"][-1]["content"] for row in rows(2000, seed=0, split=split, digits=1, operators="+-")}
        for split in ("train", "validation")
    }
    assert not questions["train"] & questions["validation"]
    assert (len(questions["train"]), len(questions["validation"])) == (160, 40)  # all 200 problems of one digit


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"digits": 0}, {"operators": "/"}, {"operators": ""}])
def test_a_setting_that_makes_no_problems_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rows(1, **wrong)


def test_the_worked_example_of_a_row_keeps_the_rule_itself():
    question, answer, _ = rows(1)[0]["prompt"]
    assert question["content"].startswith("What is 2 + 3?")
    assert play(answer["content"], truth="5")[0]["reward"] == 1.0
