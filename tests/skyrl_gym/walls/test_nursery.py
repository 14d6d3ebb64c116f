from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from skyrl_gym.walls.nursery import Nursery, Worker
from tests.integrations.openenv.processes import gone

WORKER = "tests.skyrl_gym.walls.counting_worker"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(WORKER)
    yield nursery
    nursery.close()


def pid_of(worker: Worker) -> int:
    return worker.ask("count", 30)[1]


def test_each_worker_counts_for_itself_in_a_process_of_its_own(nursery: Nursery) -> None:
    one, other = nursery.worker(10), nursery.worker(20)
    counts = [worker.ask("count", 30) for worker in (one, other, one)]
    assert [count for count, _ in counts] == [11, 21, 12]
    assert counts[0][1] == counts[2][1] != counts[1][1]
    one.close()
    other.close()


def test_a_worker_that_dies_or_hangs_answers_none_and_is_gone_alone(nursery: Nursery) -> None:
    neighbour = nursery.worker(0)
    for question, timeout_s in (("die", 30), ("hang", 0.2)):
        worker = nursery.worker(0)
        pid = pid_of(worker)
        assert worker.ask(question, timeout_s) is None
        assert gone([pid])
    assert neighbour.ask("count", 30)[0] == 1
    neighbour.close()


def test_closing_a_session_kills_its_worker(nursery: Nursery) -> None:
    worker = nursery.worker(0)
    pid = pid_of(worker)
    worker.close()
    assert gone([pid])


@pytest.mark.parametrize(
    ("text", "times"),
    [("no JSON\n", 1), ("1\n2\n", 1), ("[" * 100_000 + "\n", 1), ("9" * 5000 + "\n", 1), ("x" * 2**20, 1000)],
    ids=["text", "two lines", "deep", "long number", "1 GB"],
)
def test_what_is_not_one_short_line_of_json_ends_the_worker(nursery: Nursery, text: str, times: int) -> None:
    worker = nursery.worker(0)
    pid = pid_of(worker)
    assert worker.ask({"say": text, "times": times}, 30) is None
    assert gone([pid])


def test_a_worker_has_none_of_our_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_THE_TRAINER", "secret")
    nursery = Nursery(WORKER)
    assert set(nursery.worker(0).ask("environment", 30)) <= {"LANG", "PYTHONPATH", "LC_CTYPE"}
    nursery.close()


def test_workers_end_with_the_nursery_and_the_next_one_starts_it_again() -> None:
    nursery = Nursery(WORKER)
    first, second = nursery.worker(0), nursery.worker(0)
    pids = [pid_of(first), pid_of(second)]
    psutil.Process(pids[0]).parent().kill()
    assert gone(pids)
    assert nursery.has_died(within_s=60)
    assert first.ask("count", 30) is None
    third = nursery.worker(0)
    pid = pid_of(third)
    nursery.close()
    assert gone([pid])


def test_a_module_that_does_not_import_is_an_error_and_not_a_hang() -> None:
    nursery = Nursery("tests.integrations.openenv.no_such_worker")
    with pytest.raises(RuntimeError, match="ended while it imported"):
        nursery.worker(0)
    nursery.close()
