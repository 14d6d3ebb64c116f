"""The server answers this machine's page only, and tells of the runs what their files hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from starlette.testclient import TestClient

from skyrl_train.view.app import make_app
from skyrl_train.view.command import main
from skyrl_train.view.folders import RunFolder
from skyrl_train.view.library import Library
from skyrl_train.view.summary import state_of
from tests.skyrl_train.view.conftest import EVIL, EVIL_NAME, NUM_PROMPTS, NUM_SAMPLES, NUM_STEPS, read_whole, write_run

NUM_TRAIN = NUM_STEPS * NUM_PROMPTS * NUM_SAMPLES


@pytest.fixture(scope="module")
def library(runs: Path) -> Library:
    return read_whole(runs)


@pytest.fixture(scope="module")
def client(library: Library) -> TestClient:
    return TestClient(make_app(library), base_url="http://127.0.0.1:8365")


@pytest.fixture(scope="module")
def run(library: Library) -> str:
    """The id of the run with four steps."""
    return next(name for name, entry in library.entries.items() if entry.summary["step"] == NUM_STEPS)


def ask(client: TestClient, path: str, **question: Any) -> Any:
    answer = client.get(path, params=question)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9000"}, 200),  # a port that was forwarded
        ({"host": "[::1]:9000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8365"}, 403),
        ({"host": "10.0.0.1:8365"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:8365"}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
    ],
)
def test_only_this_page_is_answered(client, headers, status):
    for path in ("/", "/api/runs"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == status
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert ("alert" in answer.text) == (status == 200 and path == "/api/runs")  # the run's name


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(client, run, method):
    for path in ("/", "/api/runs", f"/api/runs/{run}"):
        assert client.request(method, path).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../command.py", "/assets/..%2fcommand.py", "/assets/%2e%2e/%2e%2e/trainer.py", "/assets//etc/passwd",
        "/assets/vendor/../../app.py", "/assets/", "/assets/vendor", "/api/runs/..%2f..%2fetc", "/api/runs/nothing",
    ],
)  # fmt: skip
def test_no_address_leads_out_of_the_page(client, path):
    assert client.get(path).status_code == 404


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/").text
    assert "http" not in page.replace("http-equiv", "")
    assert "<script>" not in page  # all of it comes from files, which is what the policy allows
    names = [part.split('"')[0] for part in page.split('"/assets/')[1:]]
    assert len(names) >= 5
    for name in names:
        assert client.get(f"/assets/{name}").status_code == 200


def test_the_table_holds_the_runs_numbers(client):
    rows = {row["step"]: row for row in ask(client, "/api/runs")["rows"]}
    assert rows.keys() == {2, NUM_STEPS}
    row = rows[NUM_STEPS]
    assert row["name"].endswith(EVIL_NAME)
    assert row["environment"] == "echo_env"
    assert (row["before"], row["after"], row["reward_of"]) == (0.0, 0.25 * 4, "evaluation")
    assert row["spark"] == [[step, step - 1.0] for step in range(1, 5)]  # the mean of -2, -1, 0 plus the step
    assert row["spark_evals"] == [[0, 0.0], [2, 0.5], [4, 1.0]]
    assert row["state"] == "finished"
    assert row["episodes"] == NUM_TRAIN + 9


@pytest.mark.parametrize(
    ("starts", "state"),
    [
        ([{"ended": "finished"}, {"ended": "failed"}], "failed"),
        ([{"ended": "interrupted"}], "interrupted"),
        ([{"ended": None}], "killed"),
        ([{"ended": ["odd"]}], "stopped"),
        ([], "finished"),
        ("odd", "finished"),
    ],
)
def test_a_run_that_ended_says_how_as_the_command_runs_does(tmp_path, starts, state):
    folder = RunFolder(tmp_path, tmp_path)
    assert state_of(folder, {"starts": starts}, 4, 4) == state


def test_series_are_those_of_the_file_and_an_unknown_metric_is_none(client, run):
    keys = ["reward/avg_raw_reward", "policy/grad_norm", "no/such", f"environment/{EVIL}"]
    found = ask(client, "/api/series", run=run, key=keys)["series"][run]
    assert found["reward/avg_raw_reward"] == [[1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0]]
    assert found["policy/grad_norm"][1] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert found[f"environment/{EVIL}"][1] == [1.0, 2.0, 3.0, 4.0]
    assert "no/such" not in found


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ({}, NUM_TRAIN + 9),
        ({"phase": "train"}, NUM_TRAIN),
        ({"phase": "eval", "step_from": 2}, 6),
        ({"prompt": "task1"}, NUM_STEPS * NUM_SAMPLES),
        ({"prompt": EVIL}, NUM_STEPS * NUM_SAMPLES),
        ({"end": "out_of_tokens"}, NUM_TRAIN // NUM_SAMPLES),
        ({"phase": "train", "step_from": 2, "step_to": 3, "end": "finished"}, 2 * NUM_PROMPTS * 2),
        (
            {"phase": "train", "reward_from": 3},
            3 * NUM_PROMPTS,
        ),  # step + repetition - 2: 3 in step 3, 3 and 4 in step 4
        ({"phase": "train", "reward_to": -0.5}, NUM_PROMPTS),
        ({"text": "word1"}, NUM_STEPS * NUM_SAMPLES),
        ({"text": "WORD"}, NUM_TRAIN),  # the beginning of a word, in any letters
        ({"text": "ord1"}, 0),
        ({"text": '"try 2"'}, NUM_PROMPTS * NUM_SAMPLES),
        ({"text": '"try 2'}, NUM_PROMPTS * NUM_SAMPLES),
        ({"text": "word1 try b"}, NUM_STEPS),
        ({"text": "第一"}, NUM_TRAIN),
        ({"text": "一步"}, NUM_TRAIN),
        ({"text": "一第"}, 0),
        ({"text": "answer 2", "phase": "eval"}, 3),
        ({"text": "' OR 1=1 --"}, 0),
        ({"text": 'try NOT "('}, 0),
        ({"text": "{{"}, NUM_TRAIN // NUM_SAMPLES),  # signs alone are looked for in the first reply
        ({"text": "%"}, 0),
        ({"end": "' OR 1=1 --"}, 0),
    ],
)
def test_filters_find_exactly_what_they_say(client, run, question, wanted):
    answer = ask(client, f"/api/runs/{run}/episodes", **question, limit=500)
    assert answer["total"] == len(answer["rows"]) == wanted


def test_pages_join_without_gap_and_every_order_holds(client, run):
    for sort, key in (("reward", "reward"), ("-reward", "reward"), ("step", "step"), ("-tokens", "tokens")):
        pages = [
            ask(client, f"/api/runs/{run}/episodes", sort=sort, offset=o, limit=7)["rows"] for o in range(0, 50, 7)
        ]
        rows = [row for page in pages for row in page]
        assert len({row["id"] for row in rows}) == len(rows) == NUM_TRAIN + 9
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=sort.startswith("-"))
        assert len(set(values)) > 2


@pytest.mark.parametrize(
    "question", [{"sort": "uid; DROP TABLE episodes"}, {"step_from": "x"}, {"limit": "nan"}, {"reward_to": "1e400"}]
)
def test_a_bad_question_gets_a_clear_answer(client, run, question):
    answer = client.get(f"/api/runs/{run}/episodes", params=question)
    assert answer.status_code == 400
    assert next(iter(question)) in answer.json()["error"]


def test_an_episode_comes_with_tokens_mask_advantages_and_group(client, run):
    [row] = ask(client, f"/api/runs/{run}/episodes", prompt="task1", text='"try 3 b"')["rows"]
    episode = ask(client, f"/api/runs/{run}/episodes/{row['id']}")
    assert (episode["step"], episode["repetition"], episode["reward"], episode["end"]) == (3, 1, 2.0, "out_of_tokens")
    given, first, heard, second = episode["segments"]
    assert "".join(first["texts"]) == "try 3 b"
    assert len(set(first["logprobs"])) > 1
    assert given["trained"] == [False] * len(given["ids"])
    assert first["trained"] == [True] * len(first["ids"])
    assert heard["advantages"] == [None] * len(heard["ids"])
    # Advantages are the token's place in the batch over its length, so neighbours differ by that.
    step = first["advantages"][1] - first["advantages"][0]
    between = len(first["ids"]) + len(heard["ids"])
    assert second["advantages"][0] - first["advantages"][0] == pytest.approx(between * step, rel=1e-3)
    assert [member["reward"] for member in episode["group"]] == [1.0, 2.0, 3.0]
    side = ask(client, f"/api/runs/{run}/side-by-side", id=[member["id"] for member in episode["group"]])
    assert [one["repetition"] for one in side["episodes"]] == [0, 1, 2]


def test_a_validation_task_is_followed_over_the_steps(client, run):
    answer = ask(client, f"/api/runs/{run}/tasks")
    assert answer["steps"] == [0, 2, 4]
    rewards = {task["uid"]: [cell[0] for cell in task["cells"]] for task in answer["tasks"]}
    assert rewards == {"held0": [0, 0, 0], "held1": [0, 0.5, 1.0], "held2": [0, 1.0, 2.0]}
    side = ask(client, f"/api/runs/{run}/side-by-side", prompt="held2", phase="eval")
    assert [episode["step"] for episode in side["episodes"]] == [0, 2, 4]
    listed = ask(client, f"/api/runs/{run}/episodes", text="try", prompt="task1")
    side = ask(client, f"/api/runs/{run}/side-by-side", text="try", prompt="task1")
    assert len(side["episodes"]) == listed["total"] > 0


def test_an_episode_that_changed_meanwhile_is_not_shown_as_another(tmp_path):
    write_run(tmp_path / "run")
    library = read_whole(tmp_path)
    client = TestClient(make_app(library), base_url="http://127.0.0.1")
    [run] = library.entries
    row = ask(client, f"/api/runs/{run}/episodes", step_from=4)["rows"][0]
    path = tmp_path / "run/trajectories/train_step_000004.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-20])
    answer = client.get(f"/api/runs/{run}/episodes/{row['id']}")
    assert answer.status_code == 409
    assert "has just changed" in answer.json()["error"]


def test_the_command_serves_until_it_is_interrupted(runs):
    command = [sys.executable, "-m", "skyrl_train.view", str(runs), "--no-open", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("2 runs in ")
        address = process.stdout.readline().split()[0]
        with urlopen(f"{address}/api/runs", timeout=60) as answer:
            assert len(json.load(answer)["rows"]) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("folder", ["missing", "file", "nul\0"])
def test_a_folder_that_is_none_is_refused_in_one_line(tmp_path, capsys, folder):
    (tmp_path / "file").touch()
    assert main([str(tmp_path / folder), "--no-open"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("skyrl view: ")
    assert "give" in line


def test_a_port_that_is_taken_is_refused(tmp_path, capsys):
    for port in ("99999", "-1"):
        assert main([str(tmp_path), "--no-open", "--port", port]) == 2
        assert f"--port {port} cannot be used" in capsys.readouterr().err


def test_help_has_no_side_effects(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--no-open" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
