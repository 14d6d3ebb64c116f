import json
import multiprocessing

import psutil
import pytest

import skyrl_gym
from skyrl_gym.envs.lcb.grading import ProgramTest, passes, same_output
from tests.integrations.openenv.processes import no_children_but

STDIN = [{"input": "3\n", "output": "6\n", "testtype": "stdin"}, {"input": "4\n", "output": "8\n", "testtype": "stdin"}]
FUNCTION = [
    {"input": '[1, 2]\n"x"', "output": '["x1", "x2"]', "testtype": "functional", "metadata": {"func_name": "label"}}
]


def make(tests):
    return skyrl_gym.make("lcb", env_config={}, extras={"reward_spec": {"ground_truth": tests}})


def reward(code, tests):
    return make(tests).step(f"Here:\n```python\n{code}\n```")["reward"]


def test_a_program_must_pass_every_test():
    assert reward("print(2 * int(input()))", json.dumps(STDIN)) == 1.0
    assert reward("print(6)", STDIN) == 0.0
    assert reward("import sys; n = int(sys.stdin.read()); print(f'{2 * n}.0 ')", STDIN) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "class Solution:\n    def label(self, n: List[int], s: str):\n        return [f'{s}{i}' for i in n]",
        "def label(n, s):\n    print('working')\n    return tuple(s + str(i) for i in n)",
        "label = lambda n, s: ['x1', 'x2']",
    ],
)
def test_a_function_or_method_is_called_with_json_arguments(code):
    assert reward(code, FUNCTION) == 1.0


@pytest.mark.parametrize(
    "code", ["label = 3", "", "def label(n, s): return {1}", "1/0", "import sys; sys.exit(0)", "def label("]
)
def test_a_function_that_is_missing_or_breaks_earns_nothing(code):
    assert reward(code, FUNCTION) == 0.0


def test_the_last_code_block_is_graded_and_kept():
    step = make(STDIN).step("```python\n1/0\n```\nbetter:\n```python\nprint(2 * int(input()))\n```")
    assert step["reward"] == 1.0
    assert step["metadata"] == {"parsed_code": "print(2 * int(input()))\n"}
    assert make(STDIN).step("print(6)")["metadata"] == {"parsed_code": None}


def test_an_endless_program_fails_in_time_and_leaves_no_process():
    assert passes("", ProgramTest("", "", None), timeout_s=60)
    before = set(psutil.Process().children(recursive=True))  # servers of other tests
    assert not passes("while True: pass", ProgramTest("", "", None), timeout_s=0.3)
    assert no_children_but(before)


def test_grading_works_in_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(reward, ("print(2 * int(input()))", STDIN)) == 1.0


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1  2\n3", True),
        ("1.0", "1", True),
        ("a", "A", False),
        ("1 2\n", "1\n2\n", False),
        ("1", "1 1", False),
        ("", "", True),
        ("sNaN", "1", False),
        ("1e999999999999999999", "1", False),
        ("True", "1", False),
        ("1_0", "10", False),
        ("١", "1", False),
        ("-1.50e1", "-15", True),
    ],
)
def test_outputs_are_compared_by_lines_words_and_numbers(printed, expected, same):
    assert same_output(printed, expected) is same


def test_a_row_whose_tests_say_nothing_is_refused():
    with pytest.raises(ValueError, match="holds no test"):
        make([])
    with pytest.raises(ValueError, match="func_name"):
        make([{"input": "", "output": "", "testtype": "functional"}])


@pytest.mark.parametrize(
    ("returned", "expected", "right"),
    [
        ("True", "1", False),
        ("1", "true", False),
        ("[False, 1]", "[0, 1]", False),
        ("{'a': [True]}", '{"a": [1]}', False),
        ("{'a': 1, 'b': 2}", '{"b": 2.0, "a": 1}', True),
        ("{'a': 1}", '{"a": 1, "b": 2}', False),
        ("1", "1.0", True),
        ("float('inf')", "1e999", False),
        ("10**400", "1e400", True),
        ("0.1 + 0.2", "0.3", False),
        ("True", "true", True),
        ("'1'", "1", False),
        ("None", "null", True),
        ("None", "0", False),
        ("(1, [2])", "[1, [2]]", True),
        ("float('nan')", "NaN", False),
    ],
)
def test_a_result_must_have_the_type_that_is_expected(returned, expected, right):
    test = ProgramTest("", expected, "f")
    assert passes(f"def f(): return {returned}", test, timeout_s=60) is right
