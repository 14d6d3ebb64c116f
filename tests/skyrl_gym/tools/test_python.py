import os
import threading
import time

import psutil
import pytest

import skyrl_gym
from skyrl_gym.core import EnvFailure
from skyrl_gym.tools import PythonCodeExecutorToolGroup, python_process
from skyrl_gym.tools.python_process import run_python
from skyrl_gym.walls.wall import NoWall
from tests.integrations.openenv.processes import no_children_but


@pytest.fixture
def python():
    return PythonCodeExecutorToolGroup(timeout=60).python


def test_a_program_answers_with_what_it_printed(python):
    assert python("print(17 + 25)") == "42"
    assert python("") == ""
    assert python("if __name__ == '__main__':\n    print('main')") == "main"


def test_a_warning_does_not_hide_the_output(python):
    answer = python("import sys; print('42'); print('careful', file=sys.stderr)")
    assert answer == "42\nstderr:\ncareful"


def test_an_error_names_itself_and_what_was_printed_before(python):
    answer = python("print('before')\n1/0")
    assert answer.startswith("Error executing Python code: ")
    assert "ZeroDivisionError" in answer
    assert "line 2" in answer
    assert answer.endswith("Output before the error:\nbefore")


def test_a_program_is_stopped_when_its_time_is_up():
    start = time.perf_counter()
    answer = PythonCodeExecutorToolGroup(timeout=5).python("print('x', flush=True)\nwhile True: pass")
    assert answer.startswith("Error executing Python code: Execution timed out after 5 seconds.")
    assert answer.endswith("x")
    assert time.perf_counter() - start < 60  # it never ends by itself


@pytest.mark.parametrize(
    "code",
    ["\x00", "(" * 100_000, "x" * 1_000_000, "print('\ud800')", "import sys; sys.exit(7)", "import os; os.abort()"],
)
def test_no_program_raises(python, code):
    assert isinstance(python(code), str)


def test_output_and_memory_are_limited(python):
    flood = python("print('x' * 100_000)")
    assert len(flood) < 20_000
    assert "output cut" in flood
    assert "File too large" in python("while True: print('x' * 1_000_000)")
    assert "MemoryError" in python("x = bytearray(4 << 30)")


def test_a_program_sees_neither_our_environment_nor_our_folder(python, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    assert python("import os; print(dict(os.environ))") == "{'LANG': 'C.UTF-8'}"
    (tmp_path / "secret").write_text("s3cret")
    for folder in (tmp_path, os.getcwd(), "/tmp", "/root", "/proc/self"):
        answer = python(
            f"import os\nprint(os.listdir({str(folder)!r}))\nprint(open({str(folder)!r} + '/secret').read())"
        )
        assert "Error" in answer
        assert "s3cret" not in answer


def test_the_limits_cannot_be_raised_again_by_the_program(python):
    assert "Error" in python("import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))")


def test_a_program_is_gone_when_its_time_is_up_and_starts_no_other(python):
    assert "PermissionError" in python("import os; os.fork()")
    assert "PermissionError" in python("import subprocess; subprocess.run(['true'])")
    run_python("pass", timeout_s=60)
    before = set(psutil.Process().children(recursive=True))
    assert run_python("import time; time.sleep(60)", timeout_s=0.2).timed_out
    assert no_children_but(before)


@pytest.mark.parametrize(
    ("code", "stdout", "exit_code"),
    [
        ("import os; os._exit(7)", "", 7),
        ("raise SystemExit", "", 0),
        ("exit(3)", "", 3),
        ("import os; os.abort()", "", None),
        ("import atexit; atexit.register(print, 'at exit')", "at exit\n", 0),
        ("open(1, 'w').write('hi')", "hi", 0),
        ("kept = open(1, 'w', closefd=False); kept.write('hi')", "hi", 0),
        ("print(open(0).read())", "given\n", 0),
        ("import sys; sys.stdout.buffer.write(b'x'); sys.stdout.write('y')", "xy", 0),
        ("import threading as t\ndef f(): import time; time.sleep(0.1); print('thread')\nt.Thread(target=f).start()",
         "thread\n", 0),
        ("import sys, threading\nthreading.stack_size(1 << 27)\nsys.setrecursionlimit(1 << 20)\n"
         "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(20000)))\nt.start()",
         "20000\n", 0),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nprint(A(3))", "A(x=3)\n", 0),
        ("import numpy; print(numpy.ones(3) @ numpy.ones(3))", "3.0\n", 0),
        ("import sympy; print(sympy.sqrt(8))", "2*sqrt(2)\n", 0),
    ],
)  # fmt: skip
def test_a_program_ends_as_it_would_in_python(code, stdout, exit_code):
    result = run_python(code, stdin="given", timeout_s=60)
    assert result.stdout == stdout
    assert (result.exit_code or 0) < 0 if exit_code is None else result.exit_code == exit_code


def test_a_traceback_shows_the_program_and_nothing_of_ours():
    result = run_python("def f():\n    return 1 / 0\nf()", timeout_s=60)
    assert result.stderr.splitlines()[:2] == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
    ]
    assert "return 1 / 0" in result.stderr
    assert "skyrl_gym" not in result.stderr


def test_without_bubblewrap_programs_still_compute(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(python_process, "_PROGRAMS", python_process._Programs())
    assert python_process._PROGRAMS.wall().name == "confinement"
    code = "import decimal, statistics, threading, random\nprint(statistics.mean([1, 2]))"
    assert run_python(code, timeout_s=60).stdout == "1.5\n"
    assert "PermissionError" in run_python("open('/etc/passwd')", timeout_s=60).stderr


def test_a_machine_without_walls_is_refused_before_an_episode(monkeypatch):
    monkeypatch.setattr("skyrl_gym.walls.wall.can_filter", lambda: False)
    monkeypatch.delenv("OPENENV_ACCEPT_UNSAFE", raising=False)
    monkeypatch.setattr(python_process, "_PROGRAMS", python_process._Programs())
    truth = {"reward_spec": {"ground_truth": [{"input": "", "output": ""}]}}
    for make in (
        PythonCodeExecutorToolGroup,
        lambda: run_python("print(1)", timeout_s=60),
        lambda: skyrl_gym.make("lcb", env_config={}, extras=truth),
        lambda: skyrl_gym.make("searchcode", env_config={}, extras={"reward_spec": {"ground_truth": "1"}}),
    ):
        with pytest.raises(NoWall, match="OPENENV_ACCEPT_UNSAFE=1"):
            make()
    monkeypatch.setenv("OPENENV_ACCEPT_UNSAFE", "1")
    assert run_python("print(1)", timeout_s=60).stdout == "1\n"


def test_a_program_may_use_threads(python):
    assert python("import threading; threading.Thread(target=print, args=(3,)).start()") == "3"


def test_programs_run_from_many_threads_at_once(python):
    answers: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: answers.update({i: python(f"print({i})")})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: str(i) for i in range(6)}


def test_standard_input_reaches_the_program():
    result = run_python("print(int(input()) + 1)", stdin="41\n", timeout_s=60)
    assert (result.stdout, result.stderr, result.exit_code, result.timed_out) == ("42\n", "", 0, False)


def test_a_machine_that_starts_no_process_is_an_environment_failure(monkeypatch):
    monkeypatch.setattr(python_process, "_PROGRAMS", python_process._Programs())
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(EnvFailure, match="cannot start"):
        run_python("print(1)", timeout_s=60)
