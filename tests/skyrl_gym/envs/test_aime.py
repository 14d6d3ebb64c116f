import pytest

import skyrl_gym
from skyrl_gym.envs.aime.answer import normal_form
from skyrl_gym.envs.aime.value import value


def play(reply, truth: object = "204", column="reward_model"):
    return skyrl_gym.make("aime", env_config={}, extras={column: {"ground_truth": truth}}).step(reply)


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("so\nAnswer: 204", 1.0),
        ("Answer: 1\nanswer: $204$.", 1.0),
        (r"Answer: x = \boxed{204} units", 1.0),
        ("Answer: 204<eos>", 1.0),
        ("Answer: 204.0", 1.0),
        ("Answer: 0204", 1.0),
        ("Answer: 204\nAnswer: 205", -1.0),
        ("204", -1.0),
        ("Answer: 204" + " " * 300, -1.0),
        ("", -1.0),
    ],
)
def test_the_last_answer_near_the_end_counts(reply, reward):
    step = play(reply)
    assert (step["reward"], step["done"], step["metadata"]["acc"]) == (reward, True, reward == 1.0)


def test_the_truth_stands_in_either_column_and_need_not_be_a_string():
    assert play("Answer: 33", truth=33, column="reward_spec")["reward"] == 1.0
    assert play("Answer: 33", truth=33, column="reward_model")["reward"] == 1.0


def test_the_prediction_is_kept_for_the_log():
    assert play("Answer: the $7$ dollars")["metadata"] == {"acc": False, "pred": "7"}
    assert play("no idea")["metadata"] == {"acc": False, "pred": None}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\sqrt{12}", r"\sqrt{12}"),
        ("1,024", "1024"),
        ("1{,}024,000", "1024000"),
        ("(1, 2)", "(1,2)"),
        (r"n = 2\cdot3", r"2\cdot3"),
        (r"\text{the answer is }\boxed{\text{odd}}", "odd"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        ("  7 square units ", "7"),
    ],
)
def test_answers_have_one_spelling(written, meant):
    assert normal_form(written) == normal_form(meant) == meant


@pytest.mark.parametrize(
    ("written", "truth"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed{\sqrt{2}}$", r"\sqrt{2}"),
        (r"\boxed{\frac{\sqrt{3}}{\sqrt{2}+\frac{1}{2}}}", r"\frac{\sqrt{3}}{\sqrt{2}+\frac{1}{2}}"),
        (r"\(\boxed{\text{\textbf{{204}}}}\)", "204"),
        (r"\boxed{204}, since $a + b = 7$", "204"),
        (r"first \boxed{1}, no: \boxed{\dfrac{3}{4}}", "3/4"),
        (r"\boxed{x = 5}", "5"),
        ("**204**", "204"),
        ("\n204", "204"),
        ("0.5", r"\frac12"),
        ("1/2", r"\frac{1}{2}"),
        (r"\tfrac{2}{4}", "0.5"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
        (r"2\frac{1}{2}", "5/2"),
        ("2 1/2", "2.5"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        (r"2 \times \sqrt[3]{5}", r"5^{1/3}\cdot 2"),
        (r"2π", r"2\pi"),
        (r"\left(\frac{1}{2},\, 2\right)", "(0.5, 2.0)"),
        ("2^{10}", "1024"),
        ("[1, 2]", "[1,2]"),
        (r"204\,\text{cm}^2", "204"),
        (r"204\text{ mm}^{3}", "204"),
        (r"{1 \over 2}", "1/2"),
        (r"1+2\over 6", "1/2"),
        (r"\boxed 204$.", "204"),
        (r"\boldsymbol{204}", "204"),
        (r"\$1\,024", "1024"),
        ("`204`", "204"),
        ("*204*", "204"),
        (r"204\quad", "204"),
        ("３e2", "300"),
        ("2½", "5/2"),
        ("10³", "1000"),
        ("√(2)", r"\sqrt2"),
        ("2^10", "2^{10}"),
        ("x²+1", "x^{2}+1"),
        (r"\frac{5!}{2}", r"\binom{4}{2} \cdot 10"),
        (r"0.1\overline{6}", "1/6"),
        ("1/3", r"0.\overline3"),
        (r"\{2, \frac12\}", r"\{0.5, 2\}"),
        ("{1, 2}", r"\{1,2\}"),
    ],
)
def test_equivalent_forms_are_right(written, truth):
    assert play(f"so\nAnswer: {written}", truth=truth)["reward"] == 1.0


@pytest.mark.parametrize(
    ("written", "truth"),
    [
        ("0.3333333333333333", r"\frac13"),
        ("1.4142135623730951", r"\sqrt2"),
        ("21/2", r"2\frac12"),
        (r"\frac{2}{1}", r"\frac12"),
        (r"\sqrt{3}", r"\sqrt[3]{3}"),
        ("-2^2", "4"),
        ("(2,1)", "(1,2)"),
        ("(1,2)", "[1,2]"),
        ("(1,2,3)", "(1,2)"),
        ("9" * 60, "9" * 59 + "8"),
        ("a", "b"),
        ("", "a"),
        (r"\boxed{}", "204"),
        ("1/0", "1"),
        ("20 4", "204"),
        ("0.3", r"0.\overline{3}"),
        (r"\boxed 204", "2"),
        (r"\{1, 1\}", r"\{1\}"),
        (r"\{1\}", r"\{1, 1\}"),
        ("301!", "301"),
        ("", ""),
        ("9e9", "9e99"),
    ],
)
def test_forms_that_only_look_alike_are_wrong(written, truth):
    assert play(f"Answer: {written}", truth=truth)["reward"] == -1.0


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9}}", "(" * 300, "{" * 300, r"\frac" * 60, r"\sqrt{" * 50, "1/0", "0^{-1}", r"\sqrt{-1}", "2^", "-", "1..2",
     "1^{0.5" + "}" * 50, r"\sqrt[0]{2}", "(-8)^{1/3}", "1)(2",
     "9!!", "(9!)!", "0.5!", "(-1)!", r"\binom{999}{500}", r"1\over0", r"1\over2\over3", "1e9999", r"\over"],
)  # fmt: skip
def test_what_is_no_number_has_no_value(text):
    assert value(text) is None
