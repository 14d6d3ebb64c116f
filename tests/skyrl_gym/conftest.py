"""Fixtures: small real services, which are a retrieval server and a SQLite database."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PASSAGES = ["The Seine flows through Paris.", "A page may say <answer>River Seine</answer>."]


class _Retriever(BaseHTTPRequestHandler):
    """Request handler that finds the same passages for every query; "status N" is answered with HTTP status N."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)  # ty: ignore[missing-attribute]
        hits = [{"document": {"contents": text}, "score": 1.0} for text in PASSAGES[: request["topk"]]]
        words = request["query"].split()
        self.send_response(int(words[1]) if words[:1] == ["status"] and len(words) == 2 else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"result": [[] if request["query"] == "nothing" else hits]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean."""


class SearchServer:
    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Retriever)
        self.requests: list[dict[str, Any]] = []
        self.server.requests = self.requests  # ty: ignore[missing-attribute]
        self.url = f"http://127.0.0.1:{self.server.server_port}/retrieve"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="session")
def search_server() -> Iterator[SearchServer]:
    server = SearchServer()
    yield server
    server.stop()


@pytest.fixture
def no_server_url() -> str:
    """Return the address of a server that has stopped."""
    server = SearchServer()
    server.stop()
    return server.url


@pytest.fixture(scope="session")
def sql_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a db_path with spider/database/example/example.sqlite: pets Rex 3, Tom 5, Tom 5; empty toys(name)."""
    root = tmp_path_factory.mktemp("sql_data")
    folder = root / "spider" / "database" / "example"
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "example.sqlite") as connection:
        connection.execute("CREATE TABLE pets (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO pets VALUES (?, ?)", [("Rex", 3), ("Tom", 5), ("Tom", 5)])
        connection.execute("CREATE TABLE toys (name TEXT)")
    connection.close()
    return root


@pytest.fixture
def env_configs(search_server: SearchServer, sql_root: Path) -> dict[str, dict[str, Any]]:
    """Return the env_config of each built-in environment that needs one."""
    search = {"search_url": search_server.url, "timeout": 60, "log_requests": False}
    return {"search": search, "searchcode": search, "text2sql": {"db_path": str(sql_root)}}
