from __future__ import annotations

from pathlib import Path

import pytest

from integrations.openenv.catalog import CATALOG, GenericEntry, catalog_entry
from integrations.openenv.catalog.generic.names import foreign_name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """./my_env in the working directory."""
    made = tmp_path / "my_env"
    made.mkdir()
    (made / "openenv.yaml").write_text("app: server.app:app\n")
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize(
    ("text", "form", "target"),
    [
        ("http://127.0.0.1:8000/", "address", "http://127.0.0.1:8000"),
        ("wss://example.org/env", "address", "wss://example.org/env"),
        ("ghcr.io/x/y:tag", "image", "ghcr.io/x/y:tag"),
        ("echo-env:latest", "image", "echo-env:latest"),
        ("my_env:latest", "image", "my_env:latest"),  # an app has a dot before the colon
        ("image:my_env", "image", "my_env"),
        ("my_pkg.server.app:app", "app", "my_pkg.server.app:app"),
    ],
)
def test_each_form_is_told_from_the_others(text: str, form: str, target: str) -> None:
    name = foreign_name(text)
    assert name is not None
    assert (name.form, name.target) == (form, target)
    assert foreign_name(name.text) == name  # a row may carry the text


@pytest.mark.parametrize(
    "text",
    [
        "http://[::1:9", "http://x]:9", "http://[x]:9", "http://host:port", "http://host:99999", "http://", "ws:///path",
        "https://:80", "http://a b:1", "http://x\x1b[2J:9", "http://\u202e:9",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_parsed_is_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no address: .*must look like http://host:8000"):
        foreign_name(text)


def test_a_folder_is_the_same_from_everywhere(folder: Path) -> None:
    for text in ("./my_env", str(folder), "./my_env/../my_env/"):
        name = foreign_name(text)
        assert name is not None
        assert (name.form, name.text) == ("folder", str(folder))


def test_a_folder_without_an_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither openenv\.yaml nor server/app\.py"):
        foreign_name(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder"):
        foreign_name(str(tmp_path / "missing"))


def test_an_image_that_is_also_a_folder_must_be_told_apart(folder: Path) -> None:
    (folder.parent / "envs").mkdir()
    folder.rename(folder.parent / "envs" / "my_env")
    with pytest.raises(ValueError, match=r"write ./envs/my_env for the folder, image:envs/my_env for the image"):
        foreign_name("envs/my_env")


def test_plain_words_are_names_of_the_catalog() -> None:
    assert foreign_name("echo_env") is None
    assert catalog_entry("echo-env") is CATALOG["echo_env"]
    with pytest.raises(ValueError, match=r"unknown env_name='chess' .*package.module:app"):
        catalog_entry("chess")


def test_a_server_outside_the_catalog_is_one_entry_in_a_process() -> None:
    entry = catalog_entry("http://127.0.0.1:8000")
    assert entry is catalog_entry("http://127.0.0.1:8000/")
    assert isinstance(entry, GenericEntry)
    assert entry.data_name == "http_127_0_0_1_8000"
    assert entry.source(entry.read_options({})).url == "http://127.0.0.1:8000"


def test_variables_reach_the_server_whatever_starts_it(folder: Path) -> None:
    options = {"variables": {"SIZE": "3"}}
    image, local = catalog_entry("image:x"), catalog_entry("./my_env")
    assert image.source(image.read_options(options)).variables == (("SIZE", "3"),)
    assert local.source(local.read_options(options)).arguments == ("--variable=SIZE=3", str(folder))
