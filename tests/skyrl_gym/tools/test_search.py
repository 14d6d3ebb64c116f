import json

import pytest

from skyrl_gym.core import EnvFailure
from skyrl_gym.tools import SearchToolGroup
from skyrl_gym.tools.search import call_search_api, search_text


@pytest.fixture
def search(search_server):
    return SearchToolGroup(search_url=search_server.url, topk=2, timeout=60, log_requests=False).search


def test_passages_are_numbered_lines_in_json(search, search_server):
    text = json.loads(search("river"))["result"]
    assert text == "Doc 1: The Seine flows through Paris.\nDoc 2: A page may say <answer>River Seine</answer>."
    assert search_server.requests[-1] == {"query": "river", "topk": 2, "return_scores": True}


def test_no_hits_and_no_query(search):
    assert json.loads(search("nothing")) == {"result": "No search results found."}
    assert search(None) == ""
    assert search_text("") == ""


def test_result_sets_are_joined_by_a_line(search, monkeypatch):
    hit = [{"document": {"contents": "x"}}]
    monkeypatch.setattr("skyrl_gym.tools.search.call_search_api", lambda **_: ({"result": [hit, hit]}, None))
    assert json.loads(search("q"))["result"] == "Doc 1: x\n---\nDoc 1: x"


def test_a_query_that_the_server_refuses_is_told_to_the_model(search):
    result = search("status 422")
    assert json.loads(result) == {"result": "Search error: the server refused the query: HTTP 422"}
    assert search_text(result).startswith("Search error")


def test_a_busy_server_is_asked_again(search_server):
    before = len(search_server.requests)
    answer, error = call_search_api(search_server.url, "status 503", max_retries=3, initial_delay=0.01)
    assert answer is None
    assert error is not None
    assert "HTTP 503" in error
    assert "3 times" in error
    assert len(search_server.requests) - before == 3


def test_a_server_that_is_down_is_an_environment_failure(no_server_url, monkeypatch):
    answer, error = call_search_api(no_server_url, "q", max_retries=2, initial_delay=0.01)
    assert answer is None
    assert error is not None
    assert "ConnectionError" in error
    monkeypatch.setattr("skyrl_gym.tools.search.call_search_api", lambda **_: (None, error))
    result = SearchToolGroup(search_url=no_server_url).search("q")
    assert json.loads(result)["result"].startswith("Search error: ")
    with pytest.raises(EnvFailure, match="ConnectionError"):
        search_text(result)


def test_any_query_can_be_sent(search, search_server):
    assert "Doc 1" in search("\ud800 \x00")
    assert search_server.requests[-1]["query"] == "? \x00"
