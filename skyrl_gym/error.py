"""Errors of the registry of environments."""


class Error(Exception):
    """An environment id is unknown, or its entry point cannot be loaded."""


class RegistrationError(Error):
    """The environment id is already registered."""
