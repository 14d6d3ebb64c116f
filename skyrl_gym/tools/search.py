"""The search tool: it asks a retrieval server for passages."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from skyrl_gym.core import EnvFailure
from skyrl_gym.reply import printable
from skyrl_gym.tools.core import ToolGroup, tool

logger = logging.getLogger(__name__)

_TRY_AGAIN_ON = {500, 502, 503, 504}
_NO_RESULTS = "No search results found."


def call_search_api(
    search_url: str,
    query: str,
    topk: int = 3,
    timeout: float = 30,
    log_requests: bool = True,
    max_retries: int = 10,
    initial_delay: float = 1,
) -> tuple[dict[str, Any] | None, str | None]:
    """POST the query. Returns (answer, None); ({}, error) if the server refuses it; (None, error) if the server fails.

    Statuses 500, 502, 503, 504, connection errors and time-outs are tried again, up to `max_retries` times in all,
    after 1, 2, 3, … times `initial_delay` seconds.
    """
    import requests

    body = {"query": query, "topk": topk, "return_scores": True}
    error = "no attempt was made"
    for attempt in range(1, max_retries + 1):
        if attempt > 1:
            time.sleep(initial_delay * (attempt - 1))
        try:
            response = requests.post(search_url, json=body, timeout=timeout)
            if log_requests:
                logger.info("search %r: HTTP %s, attempt %s", query[:200], response.status_code, attempt)
            if response.status_code in _TRY_AGAIN_ON:
                error = f"HTTP {response.status_code} from {search_url}"
                continue
            if 400 <= response.status_code < 500:
                return {}, f"the server refused the query: HTTP {response.status_code}"
            response.raise_for_status()
            answer = response.json()
            return (answer, None) if isinstance(answer, dict) else (None, f"{search_url} answered no JSON object")
        except (requests.ConnectionError, requests.Timeout) as unreachable:
            error = f"{type(unreachable).__name__}: {unreachable}"
        except requests.RequestException as broken:  # bad url, bad JSON, other statuses: no use trying again
            return None, f"{type(broken).__name__}: {broken}"
    return None, f"{error} (tried {max_retries} times)"


class SearchToolGroup(ToolGroup):
    def __init__(
        self,
        search_url: str = "http://127.0.0.1:8000/retrieve",
        topk: int = 3,
        timeout: float = 30,
        log_requests: bool = True,
    ) -> None:
        self.search_url = search_url
        self.topk = topk
        self.timeout = timeout
        self.log_requests = log_requests
        super().__init__(name="SearchToolGroup")

    @tool
    def search(self, query: str | None) -> str:
        """Return passages for the query as JSON {"result": text}; with "server_failed": true if the server failed."""
        if query is None:
            return ""
        answer, error = call_search_api(
            search_url=self.search_url,
            query=printable(query),
            topk=self.topk,
            timeout=self.timeout,
            log_requests=self.log_requests,
        )
        if error is None and answer is not None:
            return json.dumps({"result": _passages(answer)})
        failed = {"server_failed": True} if answer is None else {}
        return json.dumps({"result": f"Search error: {error or 'no answer'}", **failed})


def search_text(result: str) -> str:
    """Return the text of a search tool's result; EnvFailure if the server failed, so that no reward is paid."""
    content = json.loads(result) if result else {"result": ""}
    if content.get("server_failed"):
        raise EnvFailure(content["result"])
    return content["result"]


def _passages(answer: dict[str, Any]) -> str:
    """Return `Doc i: contents` lines, one set of them per query, with a line `---` between sets.

    answer: {"result": [[{"document": {"contents": ...}, "score": ...}, ...], ...]}
    """
    sets = [
        "\n".join(f"Doc {position}: {_contents(hit)}" for position, hit in enumerate(hits, 1))
        for hits in answer.get("result") or []
        if hits
    ]
    return printable("\n---\n".join(sets)) or _NO_RESULTS


def _contents(hit: Any) -> str:
    document = hit.get("document", hit) if isinstance(hit, dict) else hit
    contents = document.get("contents", document) if isinstance(document, dict) else document
    return str(contents).strip()
