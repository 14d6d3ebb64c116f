"""One request to a judge over OpenAI's API, with a limit for its whole time and size."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests

from skyrl_gym.core import EnvFailure
from skyrl_train.config.rewards import JudgeSettings

MAX_ANSWER = 2**20  # bytes
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that may be gone the next time
LONGEST_WAIT_S = 60.0  # that an endpoint may ask for
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class AskAgain(Exception):
    """The request failed in a way that may be gone the next time. after_s: the endpoint asked to wait so long."""

    def __init__(self, words: str, after_s: float | None = None) -> None:
        super().__init__(words)
        self.after_s = after_s


class Refused(EnvFailure):
    """The endpoint refused the request, and will refuse it again."""


class JudgeClient:
    """Posts questions to one endpoint. Calls block, and may come from many threads."""

    def __init__(self, settings: JudgeSettings, api_key: str | None) -> None:
        self.url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self.timeout_s = settings.timeout_s
        self._api_key = api_key
        body = {
            "model": settings.model,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            **(settings.body or {}),
        }
        self._body = {name: value for name, value in body.items() if value is not None}

    def ask(self, messages: list[dict[str, str]]) -> str:
        """Return the text of the answer. AskAgain if another try may help, Refused if not."""
        deadline = time.monotonic() + self.timeout_s
        try:
            with requests.Session() as session:
                session.trust_env = urlsplit(self.url).hostname not in LOOPBACK  # proxies lead elsewhere
                response = session.post(
                    self.url,
                    json={**self._body, "messages": messages},
                    auth=self._with_key,  # given, so that no .netrc replaces it
                    timeout=self.timeout_s,
                    stream=True,
                    allow_redirects=False,  # the key is for this address alone
                )
                text = b"".join(_read(response, deadline)).decode("utf-8", "replace")
        except requests.RequestException as error:
            raise AskAgain(f"{type(error).__name__}: {error}") from error
        if response.status_code in AGAIN:
            raise AskAgain(self._status(response, text), _wanted_pause(response))
        if response.status_code != 200:
            raise Refused(self._status(response, text))
        return _content(text)

    def _status(self, response: requests.Response, text: str) -> str:
        """Return the status and the beginning of the answer, without the key, which some servers repeat."""
        said = " ".join(text.replace(self._api_key or "\0", "...").split())
        return f"HTTP {response.status_code} from {self.url}: {said[:300]}"

    def _with_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def _read(response: requests.Response, deadline: float) -> Iterator[bytes]:
    size = 0
    for piece in response.iter_content(1024):
        size += len(piece)
        if time.monotonic() > deadline:
            raise AskAgain("the answer took longer than timeout_s")
        if size > MAX_ANSWER:
            raise Refused(f"the answer is longer than {MAX_ANSWER} bytes")
        yield piece


def _content(text: str) -> str:
    """Return the text of the first choice. AskAgain for an answer of another form, or one that was cut."""
    try:
        choice = json.loads(text)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise AskAgain(f"the answer is no chat completion: {text[:200]!r}") from error
    if choice.get("finish_reason") == "length":
        return ""  # it was cut before its last line, whatever that looks like
    return content if isinstance(content, str) else ""


def _wanted_pause(response: requests.Response) -> float | None:
    try:
        wanted: Any = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(max(wanted, 0.0), LONGEST_WAIT_S) if wanted == wanted else None
