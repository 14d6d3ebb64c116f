"""Environments of other projects."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # a project of the user's may have a folder `integrations`, as SkyRL's has
