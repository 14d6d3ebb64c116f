"""The server behind the page: read only, for this machine only."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import zstandard
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyrl_train.run.records.advantages import advantages_path, read_advantages
from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.view.ask import BadQuestion, filter_of, group_of, page_of, real, tasks_of
from skyrl_train.view.episodes import read_episodes
from skyrl_train.view.index import has_words, open_to_read
from skyrl_train.view.library import Entry, Library
from skyrl_train.view.summary import plain

KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOCAL_NAMES = {"127.0.0.1", "localhost", "::1"}
MAX_RUNS, MAX_KEYS, MAX_SHOWN = 100, 60, 64  # of one question about curves; episodes side by side


def make_app(library: Library) -> ASGIApp:
    """Return the ASGI application that answers for these runs."""
    pages = Routes(library)
    routes = [Route(path, answer, methods=["GET"]) for path, answer in pages.routes().items()]
    return for_this_page(Starlette(routes=routes))


def for_this_page(app: ASGIApp) -> ASGIApp:
    """Return the app behind a check of who asks, so that no page of another site can read a run.

    Host must be a name of loopback (a page that made its own name point here sends that name), and Origin and
    Sec-Fetch-Site, where a browser sends them, must be this page's. A link from elsewhere may open the page.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        elif scope["type"] == "http" and (complaint := _complaint(Request(scope))):
            await PlainTextResponse(complaint, status_code=403)(scope, receive, with_headers)
        elif scope["type"] == "http":
            await app(scope, receive, with_headers)

    return checked


def _complaint(request: Request) -> str:
    hosts, origins = request.headers.getlist("host"), request.headers.getlist("origin")
    try:
        name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
    except ValueError:
        name = None
    if name not in LOCAL_NAMES:
        return f"this page is not called {', '.join(hosts)!r}; open it by the address that the command printed"
    if any(origin != f"http://{hosts[0]}" for origin in origins):
        return f"a page of {', '.join(origins)!r} may not read this one"
    from_elsewhere = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if from_elsewhere and request.headers.get("sec-fetch-mode") != "navigate":
        return "another page may not read this one"
    return ""


Answer = Callable[[Request], Response]


def _answering(ask: Callable[..., Any]) -> Answer:
    """Return a route that answers with JSON, and with words where the question or the files are wrong."""

    @wraps(ask)
    def answer(request: Request) -> Response:
        try:
            return _json(ask(request))
        except BadQuestion as error:
            return _json({"error": str(error)}, 400)
        except KeyError as error:
            return _json({"error": f"there is no {error.args[0]}"}, 404)
        except (ValueError, OSError, RecursionError, TypeError, AttributeError) as error:  # of files made by others
            return _json({"error": str(error) or type(error).__name__}, 409)
        except sqlite3.Error as error:
            return _json({"error": f"the index cannot be read now ({error}); it is built anew"}, 503)

    return answer


def _json(value: Any, status: int = 200) -> Response:
    try:
        body = json.dumps(value, separators=(",", ":"), default=str, allow_nan=False)
    except ValueError:  # a number that is not finite
        body = json.dumps(plain(value), separators=(",", ":"), default=str)
    return Response(body, status_code=status, media_type="application/json")


class Routes:
    """The answers to each address."""

    def __init__(self, library: Library) -> None:
        self.library, self.with_words = library, has_words()
        self.assets = _assets()

    def routes(self) -> dict[str, Answer]:
        return {
            "/": lambda _: self.asset("index.html"),
            "/assets/{name:path}": lambda request: self.asset(request.path_params["name"]),
            "/api/runs": _answering(self.runs),
            "/api/state": _answering(self.state),
            "/api/series": _answering(self.series),
            "/api/runs/{run}": _answering(self.run),
            "/api/runs/{run}/episodes": _answering(self.episodes),
            "/api/runs/{run}/episodes/{number:int}": _answering(self.episode),
            "/api/runs/{run}/side-by-side": _answering(self.side_by_side),
            "/api/runs/{run}/tasks": _answering(self.tasks),
        }

    def asset(self, name: str) -> Response:
        """Return a file of the page; only those that were there at the start have names."""
        if name not in self.assets:
            return PlainTextResponse("there is no such file", status_code=404)
        kind, content = self.assets[name]
        return Response(content, media_type=kind)

    def state(self, request: Request) -> dict[str, Any]:
        self.library.want(request.query_params.get("run", ""))
        entries = list(self.library.entries.values())
        run = self.library.entries.get(request.query_params.get("run", ""))
        return {
            "version": self.library.version,
            "run_version": run.version if run else None,
            "runs": len(entries),
            "unread": sum(not entry.is_read for entry in entries),
            "files_left": sum(entry.files_left or 0 for entry in entries),
        }

    def runs(self, request: Request) -> dict[str, Any]:
        return self.state(request) | {
            "roots": [str(root) for root in self.library.roots],
            "rows": self.library.table(),
        }

    def run(self, request: Request) -> dict[str, Any]:
        return self.library.detail(self._entry(request)) | {"searches_words": self.with_words}

    def series(self, request: Request) -> dict[str, Any]:
        """Return {run: {metric: [steps, values]}} for `run` and `key`, each given as often as wanted."""
        names = request.query_params.getlist("run")[:MAX_RUNS]
        keys = request.query_params.getlist("key")[:MAX_KEYS]
        found = {}
        for name in names:
            if name not in self.library.entries:
                raise KeyError(f"run {name!r}")
            columns = self.library.columns_of(self.library.entries[name])
            series = {key: columns.series(key) for key in keys}
            found[name] = {key: list(zip(*points, strict=True)) for key, points in series.items() if points}
        return {"series": found}

    def episodes(self, request: Request) -> dict[str, Any]:
        entry = self._entry(request)
        if entry.index is None:
            return {"total": 0, "offset": 0, "rows": []}
        with open_to_read(entry.index) as database:
            return page_of(database, request.query_params, self.with_words)

    def episode(self, request: Request) -> dict[str, Any]:
        """Return an episode with its tokens, and the rows of its group."""
        entry, number = self._entry(request), request.path_params["number"]
        found = self._episodes_of(entry, [number])
        if not found:
            raise KeyError(f"episode {number}")
        with self._index(entry) as database:
            return found[0] | {"group": group_of(database, number)}

    def side_by_side(self, request: Request) -> dict[str, Any]:
        """Return several episodes with their tokens: those of `id`, or those that a filter finds, in their order."""
        entry = self._entry(request)
        numbers = [int(real("id", text)) for text in request.query_params.getlist("id")]
        if not numbers:
            found = filter_of(request.query_params, self.with_words)
            with self._index(entry) as database:
                found.search(database)
                rows = database.execute(
                    f"SELECT id FROM episodes e {found.where} ORDER BY step, repetition, id LIMIT ?",
                    [*found.values, MAX_SHOWN],
                )
                numbers = [row[0] for row in rows]
        return {"episodes": self._episodes_of(entry, numbers[:MAX_SHOWN])}

    def tasks(self, request: Request) -> dict[str, Any]:
        with self._index(self._entry(request)) as database:
            return tasks_of(database, request.query_params.get("phase", "eval"))

    def _entry(self, request: Request) -> Entry:
        name = request.path_params["run"]
        entry = self.library.want(name)
        if entry is None:
            raise KeyError(f"run {name!r}")
        return entry

    def _index(self, entry: Entry) -> Any:
        if entry.index is None:
            raise ValueError("the run has not been read yet; it will be in a moment")
        return open_to_read(entry.index)

    def _episodes_of(self, entry: Entry, numbers: list[int]) -> list[dict[str, Any]]:
        with self._index(entry) as database:
            found = read_episodes(entry.folder, database, numbers)
        return [{"id": number, **_told(entry, episode)} for number, episode in found]


def _told(entry: Entry, episode: EpisodeRecord) -> dict[str, Any]:
    """Return an episode as the page draws it, with the mask and the advantages where they are known."""
    told = asdict(episode)
    path = advantages_path(entry.folder.path, episode.step)
    if episode.phase == "train":
        try:
            path = entry.folder.file(str(path.relative_to(entry.folder.path)))
            if path.exists():
                for segment, row in zip(told["segments"], read_advantages(path, episode), strict=True):
                    segment["trained"] = row and [is_trained for is_trained, _ in row]
                    segment["advantages"] = row and [advantage for _, advantage in row]
        except (ValueError, OSError, zstandard.ZstdError) as error:
            told["advantages_problem"] = str(error)
    return told


def _assets() -> dict[str, tuple[str, bytes]]:
    """Return every file of the page by its name: nothing else can be asked for."""
    folder = files("skyrl_train.view") / "pages"
    found = {}
    for place, prefix in ((folder, ""), (folder / "vendor", "vendor/")):
        for file in place.iterdir():
            kind = KINDS.get(f".{file.name.rpartition('.')[2]}")
            if kind and file.is_file():
                found[prefix + file.name] = (kind, file.read_bytes())
    return found
