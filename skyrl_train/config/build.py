"""Build the typed tree from settings; collect every problem before anything is raised."""

from __future__ import annotations

import copy
import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config import refused
from skyrl_train.config.nearest import nearest_keys, unknown_key
from skyrl_train.config.problems import NO_VALUE, ConfigError, Problem, shown, written
from skyrl_train.config.refused_rows import ROWS
from skyrl_train.config.renamed import SECTION as MOVED_SECTION
from skyrl_train.config.renamed import renamed
from skyrl_train.config.section import Section, is_section, subsections
from skyrl_train.config.settings import plain_copy
from skyrl_train.config.synonyms import keeps_value
from skyrl_train.config.tree import leaves
from skyrl_train.config.typed import changed_rows, followed_rows, typed_defaults

Root = TypeVar("Root", bound=Section)


def build(
    root: type[Root],
    settings: Iterable[tuple[str, Any]],
    problems: Iterable[Problem] = (),
    may_add: Callable[[str], bool] = lambda key: False,
) -> Root:
    """Return the checked tree of `root` with these settings (`("trainer.epochs", 2)`), or raise a ConfigError.

    may_add: whether a key that the tree does not have is one of the user's own.
    """
    found = list(problems)
    defaults = root()
    tree = copy.deepcopy(typed_defaults(root))
    for key, value in settings:
        found += assigned(tree, defaults, key, value, may_add)
    config = materialised(tree, typed_defaults(root), defaults, "", found)
    found += changed_rows(tree, defaults)
    for path, section in subsections(config):
        found += [problem.under(path) for problem in broken_rules(section)]
    if found:
        first_of_each_key = {problem.key: problem for problem in reversed(found)}
        raise ConfigError(reversed(first_of_each_key.values()))
    for key, value in followed_rows(tree, defaults):
        *names, name = key.split(".")
        reduce(getattr, names, config).follow(name, value)
    return config


def broken_rules(section: Any) -> list[Problem]:
    if isinstance(section, Section):
        return section.problems()
    try:  # another dataclass says what is wrong in its __post_init__
        getattr(section, "__post_init__", lambda: None)()
    except ValueError as error:
        return [Problem("", NO_VALUE, str(error))]
    return []


def assigned(
    tree: DictConfig, defaults: Any, key: str, value: Any, may_add: Callable[[str], bool] = lambda key: False
) -> list[Problem]:
    """Set one key, or each key of a mapping given for a section. Returns the problems."""
    key = renamed(key)
    if key == MOVED_SECTION and isinstance(value, Mapping):
        return [p for name, item in value.items() for p in assigned(tree, defaults, f"{key}.{name}", item, may_add)]
    section, names = defaults, key.split(".")
    for position, name in enumerate(names):
        content = vars(section).get(name, NO_VALUE)
        path = ".".join(names[: position + 1])
        if content is NO_VALUE and (path in ROWS or refused.is_section(path)):
            return set_refused(tree, defaults, key, value)
        if content is NO_VALUE and not getattr(section, "takes_any_key", False):
            return (
                added(tree, section, key, value, position, defaults)
                if may_add(key)
                else [unknown(key, value, defaults)]
            )
        if not is_section(content):
            hint = get_type_hints(type(section)).get(name, Any)
            return set_leaf(tree, hint, key, value, path, defaults)
        section = content
    if isinstance(value, Mapping):
        return [p for name, item in value.items() for p in assigned(tree, defaults, f"{key}.{name}", item, may_add)]
    return [Problem(key, value, f"is a section; set one of its keys: {', '.join(vars(section))}")]


def added(tree: DictConfig, section: Any, key: str, value: Any, position: int, defaults: Any) -> list[Problem]:
    """Set a key of the user's own, which `section` lacks at `position`; refuse one that looks like a typing error.

    A new name beside others is compared with those, a new setting in a known section with every key of the tree.
    """
    names = key.split(".")
    name, is_setting = names[position], position == len(names) - 1 and not isinstance(value, Mapping)
    if refused.reason_against(key) is not None:
        return [unknown(key, value, defaults)]
    if not all(part.isidentifier() for part in names) or hasattr(type(section), name):
        return [Problem(key, NO_VALUE, f"cannot be a key of your own: {name!r} is no free name; take another one")]
    near = difflib.get_close_matches(name, vars(section), n=1, cutoff=0.85)
    meant = [".".join([*names[:position], other, *names[position + 1 :]]) for other in near]
    if is_setting and not meant:
        meant = nearest_keys(key, known(defaults), likeness=0.85)
    if meant:
        return [
            Problem(
                key,
                NO_VALUE,
                f"looks like {' or '.join(meant)}; write that, or put a key of your own under a name of its own: "
                f"+my.{names[-1]}={shown(value)}",
                (written(meant[0], value),) if keeps_value(key) and not isinstance(value, Mapping) else (),
            )
        ]
    OmegaConf.update(tree, key, plain_copy(value), merge=True, force_add=True)
    return []


def set_refused(tree: DictConfig, defaults: Any, key: str, value: Any) -> list[Problem]:
    """Set a refused key, or each key of a mapping given for a section of them. `changed_rows` then looks at the value.

    With its type, and after interpolations: the default may be set, however it is written.
    """
    row = refused.row_of(key)
    if row is not None:
        return set_leaf(tree, ROWS[row].type, key, value, row, defaults)
    if not refused.is_section(key):
        return [unknown(key, value, defaults)]
    if isinstance(value, Mapping):
        return [p for name, item in value.items() for p in assigned(tree, defaults, f"{key}.{name}", item)]
    names = dict.fromkeys(row[len(key) + 1 :].partition(".")[0] for row in refused.rows_below(key))
    return [Problem(key, value, f"is a section; set one of its keys: {', '.join(names)}")]


def set_leaf(tree: DictConfig, hint: Any, key: str, value: Any, leaf: str, defaults: Any) -> list[Problem]:
    """Set the key `leaf`, of type `hint`, or, where it is a mapping, the entry `key` in it."""
    if key != leaf and not takes_mapping(hint):
        return [unknown(key, value, defaults)]
    try:
        if key != leaf and OmegaConf.select(tree, leaf, throw_on_resolution_failure=False) is None:
            OmegaConf.update(tree, leaf, {}, merge=False, force_add=True)  # null has no entries to add to
        is_none = OmegaConf.select(tree, key, throw_on_resolution_failure=False) is None  # nothing to merge with
        OmegaConf.update(tree, key, value, merge=not is_none, force_add=True)
    except OmegaConfBaseException:
        is_one_of_a_list = isinstance(value, str) and value != "" and get_origin(hint) is list
        fix = (written(key, [value]),) if is_one_of_a_list else ()
        return [Problem(key, value, f"has the wrong type: expected {expected(hint)}", fix)]
    return []


def materialised(node: DictConfig, standin: DictConfig, defaults: Any, path: str, found: list[Problem]) -> Any:
    """Return the node as an object of its section's class, made without checks so that all rules are checked together.

    Where an interpolation leads nowhere, the resolved default of `standin` takes its place.
    """
    made = object.__new__(type(defaults))
    for name in map(str, node):
        default = vars(defaults).get(name)
        key = f"{path}{name}"
        if default is None and name not in vars(defaults) and (key in ROWS or refused.is_section(key)):
            continue
        if is_section(default):
            value = materialised(node[name], standin[name], default, f"{key}.", found)
        elif name not in vars(defaults) and not getattr(defaults, "takes_any_key", False):
            value = own(plain(node, name))
        else:
            try:
                value = plain(node, name)
            except OmegaConfBaseException as error:
                text = OmegaConf.to_container(node, resolve=False)
                reason = str(error).splitlines()[0]
                found.append(Problem(key, dict(text).get(name), f"cannot be resolved: {reason}"))  # ty: ignore[no-matching-overload]
                value = plain(standin, name) if name in standin else None
        vars(made)[name] = value
    return made


def own(value: Any) -> Any:
    """Return a value of the user's own, a mapping as the DictConfig that code written for SkyRL expects."""
    if not isinstance(value, dict):
        return value
    settings = OmegaConf.create(value)
    OmegaConf.set_struct(settings, True)
    return settings


def plain(node: DictConfig, name: str) -> Any:
    value = node[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def unknown(key: str, value: Any, defaults: Any) -> Problem:
    """Return the problem of a key that does not exist: the reason, or the key that was probably meant."""
    reason = refused.reason_against(key)
    return unknown_key(key, value, known(defaults)) if reason is None else Problem(key, value, reason)


def known(defaults: Any) -> list[str]:
    return [key for key, _ in leaves(defaults) if refused.reason_against(key) is None]


def takes_mapping(hint: Any) -> bool:
    return hint is Any or any(get_origin(part) is dict or part is Any for part in alternatives(hint))


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def expected(hint: Any) -> str:
    """Return a type in words: `int | None` is "a whole number or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    lists = {str: "a list of texts such as [a,b]", float: "a list of numbers such as [0.9,0.95]"}
    named = []
    for part in alternatives(hint):
        if get_origin(part) is list:
            named.append(lists.get(get_args(part)[0], "a list"))
        else:
            named.append("a mapping such as {a: 1}" if get_origin(part) is dict else words.get(part, str(part)))
    return " or ".join(named)
