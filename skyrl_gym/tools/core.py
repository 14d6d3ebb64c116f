"""Tools: methods that a model can call by name, gathered in groups that share state."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, overload


class tool:
    """Decorator that marks a method of a ToolGroup as a tool. The tool is called by the method's name."""

    def __init__(self, func: FunctionType) -> None:
        self.func = func
        self.name = func.__name__
        self.__doc__ = func.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> tool: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Callable[..., Any]: ...
    def __get__(self, instance: object | None, owner: type) -> tool | Callable[..., Any]:
        return self if instance is None else MethodType(self.func, instance)


class ToolGroup:
    """Tools that share state (a database, a server). Set that state before `super().__init__(name=...)`."""

    def __init__(self, name: str) -> None:
        self.name = name
        marked = {
            attribute: value for cls in reversed(type(self).__mro__) for attribute, value in vars(cls).items()
        }  # a subclass's attribute replaces its parent's
        self._tools = {value.name: getattr(self, key) for key, value in marked.items() if isinstance(value, tool)}

    def get_name(self) -> str:
        return self.name

    def get_tool(self, name: str) -> Callable[..., Any] | None:
        return self._tools.get(name)

    def get_tool_names(self) -> list[str]:
        return list(self._tools)

    def execute_tool(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name not in self._tools:
            raise ValueError(f"tool group {self.name!r} has no tool {name!r}; it has {self.get_tool_names()}")
        return self._tools[name](*args, **kwargs)

    def get_tool_to_group_mapping(self) -> dict[str, str]:
        return dict.fromkeys(self._tools, self.name)
