"""Frozen dataclasses <-> YAML, with exact keys: a misspelt field is an error that names the one meant."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from halobench.errors import UserError, reason_of, unknown_name

C = TypeVar("C")


def from_dict(cls: type[C], data: Any, where: str) -> C:
    """Builds the dataclass `cls` from plain data.

    Args:
        cls: a dataclass; nested dataclasses, lists, tuples, dicts, unions with None and scalars are understood.
        data: what YAML or JSON gave.
        where: the name of the place, for messages ("recipe.stages").
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table of fields, got {_named(data)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise unknown_name(f"field in {where}", str(key), fields)
    hints = typing.get_type_hints(cls)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise UserError(f"{where} lacks the field {name!r}; it has no default, so write it")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options:
            try:
                return _convert(option, value, where)
            except UserError:
                if option is options[-1]:
                    raise
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, got {_named(value)}")
        return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a table, got {_named(value)}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise unknown_name(where, str(value), [str(a) for a in arguments])
        return value
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be {getattr(hint, '__name__', hint)}, got {_named(value)}")


def _named(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:79] + '…'}"


def to_dict(value: Any) -> Any:
    """Plain data (dicts, lists, scalars) of a configuration, fit for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def read_yaml(path: Path) -> Any:
    """The YAML in `path`; a syntax error is reported with its line."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as YAML text: {reason_of(error)}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', error)}") from error


def write_yaml(value: Any) -> str:
    """YAML text of a configuration, in the order its fields are declared."""
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`data` with each `a.b=value` of the command line put in place; the value is read as YAML."""
    result = _copy(data)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise UserError(f"--set {override!r} is not of the form a.b=value")
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {override!r}: {parent!r} is a value, not a table")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override!r}: {text!r} is not valid YAML; put it in quotes") from error
    return result


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
