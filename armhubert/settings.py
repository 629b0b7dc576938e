"""Settings as frozen dataclasses: files of them read strictly, fields checked, help from the docstrings under them."""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import numbers
import os
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from armhubert.errors import ArmhubertError, brief, nearest, shown

_T = TypeVar("_T")

MAX_JSON, MAX_YAML = 2**24, 2**18
"""Bytes of a configuration file; PyYAML takes seconds for the latter."""


class _Loader(yaml.SafeLoader):
    """Without what makes a small file large or slow: aliases (through `<<` they multiply), numbers without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write the values out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > 100:
            raise yaml.YAMLError("a number of more than 100 digits")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds (safe parsers only; YAML without aliases).

    Raises:
        ArmhubertError: unreadable, too large, not YAML or JSON, or not a mapping.
    """
    kind, most = ("JSON", MAX_JSON) if path.suffix == ".json" else ("YAML", MAX_YAML)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= most else b""
    except OSError as error:
        raise ArmhubertError(f"cannot read {path}: {error.strerror}") from None
    if size > most:
        raise ArmhubertError(f"{path} must have at most {most} bytes, got {size}: give another file")
    try:
        text = content.decode("utf-8")
        data = json.loads(text) if kind == "JSON" else yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML's constructors raise KeyError, IndexError and more for a value of a wrong kind
        raise ArmhubertError(f"{path} is not valid {kind}: {brief(error)}") from None
    if not isinstance(data, dict):
        raise ArmhubertError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return data


def build(cls: type[_T], data: Mapping[str, Any], source: str) -> _T:
    """A frozen dataclass from untrusted data: unknown keys, wrong types and missing keys are errors.

    Args:
        cls: the dataclass.
        data: its fields by name; lists stand for tuples, strings of numbers for numbers (YAML reads 1e-4 as text).
        source: where the data came from, for messages.

    Raises:
        ArmhubertError: naming the key, the rule, the value and, for an unknown key, the nearest known one.
    """
    values = coerced(cls, data, source)
    required = {
        field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - values.keys()):
        raise ArmhubertError(f"{source} lacks {', '.join(missing)}")
    return cls(**values)


def coerced(cls: type, data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Some of a dataclass' fields, checked and converted as by `build`."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(typing.cast(Any, cls)) if field.init]
    values = {}
    for key, value in data.items():
        if key not in known:
            raise ArmhubertError(f"unknown key {key!r} in {source}{nearest(str(key), known)}")
        values[key] = _coerce(value, hints[key], f"{key} in {source}")
    return values


def check_fields(config: Any) -> None:
    """A frozen dataclass' fields, given in Python, checked and converted as by `build`.

    Raises:
        ArmhubertError: naming the setting, the rule and the value.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ArmhubertError(f"{name} must be a finite number, got {value}")
        object.__setattr__(config, name, _coerce(value, hint, name))


def _coerce(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _coerce(value, hint, name)
    if origin is Literal:
        if value in args:
            return value
        raise ArmhubertError(f"{name} must be {' or '.join(map(repr, args))}, got {shown(value)}")
    if origin is tuple:
        if args == (str, ...) and isinstance(value, (str, os.PathLike)):
            value = (value,)
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(_coerce(item, args[0], name) for item in value)
            if len(value) == len(args):
                return tuple(_coerce(item, arg, name) for item, arg in zip(value, args, strict=True))
        raise ArmhubertError(
            f"{name} must be a list{f' of {len(args)}' if Ellipsis not in args else ''}, got {shown(value)}"
        )
    if hint is bool or hint is str:
        if isinstance(value, hint):
            return value
        if hint is str and isinstance(value, os.PathLike):
            return os.fspath(value)
    elif isinstance(value, (numbers.Real, str)) and not isinstance(value, bool):
        try:
            number = hint(value)
            if hint is float and math.isfinite(number):
                return number
            if hint is int and (isinstance(value, str) or number == value) and number < 2**63:
                return number
        except (ValueError, OverflowError):
            pass  # no number, or none that fits
    whole = "below 2**63" if type(value) is int else "a whole number"
    kind = {bool: "true or false", str: "text", int: whole, float: "a number"}[hint]
    raise ArmhubertError(f"{name} must be {kind}, got {shown(value)}")


# ---- help ------------------------------------------------------------------


class _WithFields:
    """The docstring of a class, followed by those under its fields, which are read from the source when asked for."""

    def __init__(self, doc: str) -> None:
        self.doc = doc

    def __get__(self, instance: object, owner: type) -> str:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except OSError:  # installed without its source
            return self.doc
        body = typing.cast(ast.ClassDef, tree).body
        fields = "\n".join(
            textwrap.fill(f"{field.target.id}: {' '.join(text.value.value.split())}", 100, subsequent_indent=" " * 4)
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        )
        return f"{inspect.cleandoc(self.doc)}\n\nAttributes:\n{textwrap.indent(fields, ' ' * 4)}\n"


def documented(cls: type[_T]) -> type[_T]:
    """Let `help` show the docstrings under a class' fields as well."""
    cls.__doc__ = typing.cast(str, _WithFields(cls.__doc__ or ""))
    return cls
