"""Reader of env_names outside the catalog: an address, an image, a folder or an app."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from integrations.openenv.client.addresses import http_url
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.hosting.source import ServerSource

FORMS = (
    "an address (http://host:8000), a folder that `openenv init` could have made (./my_env), "
    "an app that can be imported (package.module:app), or an image (ghcr.io/you/env:tag, image:NAME)"
)
APP_SERVER = "integrations.openenv.servers.app"
ADDRESS = re.compile(r"(https?|wss?)://", re.IGNORECASE)
APP = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+:[A-Za-z_]\w*")  # a dot before the colon: echo-env:latest is an image


@dataclass(frozen=True, slots=True)
class ForeignName:
    """One env_name, parsed. `text` is its canonical form, equal for equal servers."""

    form: Literal["address", "image", "folder", "app"]
    target: str  # the url, the image, the absolute folder, module:attribute

    @property
    def text(self) -> str:
        return f"image:{self.target}" if self.form == "image" else self.target

    def source(self, variables: tuple[tuple[str, str], ...] = ()) -> ServerSource:
        """Return the source of its server; `variables` are set in the server's environment."""
        if self.form == "address":
            return ServerSource(self.text, url=self.target)
        if self.form == "image":
            return ServerSource(self.text, image=self.target, variables=variables)
        settings = tuple(f"--variable={name}={value}" for name, value in variables)
        return ServerSource(self.text, module=APP_SERVER, arguments=(*settings, self.target))


def foreign_name(text: str) -> ForeignName | None:
    """Parse an env_name by the first rule that fits; None for a plain word, which can only be in the catalog.

    http://, https://, ws://, wss:// begin an address; image: an image; / ./ ../ ~ a folder; a.b:c is an app;
    whatever else has a / or a : in it is an image.
    """
    text = text.strip()
    if ADDRESS.match(text):
        return ForeignName("address", _address(text))
    if text.startswith("image:"):
        return ForeignName("image", _image(text.removeprefix("image:"), text))
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return ForeignName("folder", _folder(text))
    if APP.fullmatch(text):
        return ForeignName("app", text)
    if "/" in text or ":" in text:
        if Path(text).is_dir():
            raise ValueError(
                f"env_name={text!r} would be an image, but there is a folder of this name: "
                f"write ./{text} for the folder, image:{text} for the image"
            )
        return ForeignName("image", _image(text, text))
    return None


def _address(text: str) -> str:
    try:
        http_url(text)
    except OpenEnvError as wrong:
        raise ValueError(f"env_name={text!r} is no address: {wrong}") from None
    return text.rstrip("/")


def _folder(text: str) -> str:
    folder = Path(os.path.expanduser(text)).resolve()  # ~x of no user is a folder that is not there
    if not folder.is_dir():
        raise ValueError(f"env_name={text!r}: there is no folder {folder}")
    if not (folder / "openenv.yaml").is_file() and not (folder / "server" / "app.py").is_file():
        raise ValueError(
            f"env_name={text!r}: {folder} holds neither openenv.yaml nor server/app.py, as `openenv init` makes them"
        )
    return str(folder)


def _image(image: str, text: str) -> str:
    if not image or re.search(r"\s", image):
        raise ValueError(f"env_name={text!r} names no image; it must look like ghcr.io/you/env:tag")
    return image
