"""Schemas of settings, shared by presets, recipes, `--set` and saved configs.

A schema is a pydantic model (`Table`) or a frozen pydantic dataclass (`@settings`) whose fields
carry descriptions. This module has the number types that they share, the messages for invalid
values, and the parser of `--set key=value`.
"""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
)

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from relay_fast.utils.deprecation import current_config, current_value
from relay_fast.utils.nearest import nearest

T = TypeVar("T")
_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_KINDS = {
    "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
    "string_type": "a text", "tuple_type": "a list", "list_type": "a list",
    "finite_number": "a finite number", "int_parsing_size": "a smaller whole number",
}  # fmt: skip
_RANGES = {
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}", "less_than": "less than {lt}",
    "too_short": "at least {min_length} of them", "too_long": "at most {max_length} of them",
}  # fmt: skip
_TABLES = ("model_type", "model_attributes_type", "dataclass_type", "dict_type")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class Table(BaseModel):
    """A table of settings that refuses unknown keys and values of another type."""

    model_config = ConfigDict(**_CONFIG, frozen=True)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass with checked fields; its constructor raises ValueError."""
    made = pydantic_dataclass(cls, frozen=True, config=_CONFIG)
    build = made.__init__

    def __init__(self, *args, **kwargs) -> None:
        if len(args) > len(fields_of(made)):
            raise TypeError(f"{cls.__name__} has {len(fields_of(made))} settings, not {len(args)}")
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            given = dict(zip(fields_of(made), args, strict=False)) | kwargs
            raise ValueError(_sentence(error, made, given)) from None

    made.__init__ = __init__
    return made


def says(words: str) -> WrapValidator:
    """Sets the message `give WORDS` for a value that is out of range or of another type."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            if first["loc"]:
                raise
            whole = words
            if first["type"] == "less_than_equal" and words.startswith("at least"):
                whole = words if "less" in words else f"at most {first['ctx']['le']}"
            elif first["type"] in ("int_type", "float_type") and "number" not in words:
                whole = f"{_KINDS[first['type']]}, {words}"
            raise PydanticCustomError("setting", "give {words}", {"words": whole}) from None

    return WrapValidator(check)


# The default of a key that may be left out; null may be given only where the annotation has None.
ABSENT: Any = None
MAX_SEED = 2**63 - 1

MOST = 2**31 - 1  # of what is counted

Count = Annotated[int, Field(ge=1, le=MOST), says("at least 1")]
Whole = Annotated[int, Field(ge=0, le=MOST), says("at least 0")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), says("at least 0 and less than 2^63")]
NotNegative = Annotated[float, Field(ge=0), says("a number of at least 0")]
Positive = Annotated[float, Field(gt=0), says("a positive number")]
Share = Annotated[float, Field(ge=0, le=1), says("0 to 1")]
Below1 = Annotated[float, Field(ge=0, lt=1), says("at least 0 and less than 1")]
# Not strict, because `says` passes lists, which a strict tuple refuses.
Counts = Annotated[
    tuple[Count, ...], Field(min_length=1, strict=False), says("at least one number")
]
Betas = Annotated[
    tuple[Below1, ...],
    Field(min_length=2, max_length=2, strict=False),
    says("two numbers, like [0.9, 0.95]"),
]
Decay = Literal["linear", "cosine", "wsd", "constant"]  # of relay_fast.training.schedule.DECAYS

# Settings of every training, in RELAY and in the recipes.
Steps = Annotated[Count, Field(description="steps of the training")]
BatchSize = Annotated[Count, Field(description="problems in a batch")]
LearningRate = Annotated[Positive, Field(description="learning rate")]
MuonRate = Annotated[
    Positive, Field(description="learning rate of Muon for the block's matrices; without it, AdamW")
]
WeightDecay = Annotated[NotNegative, Field(description="weight decay, of matrices only")]
BetaPair = Annotated[Betas, Field(description="AdamW's two betas")]
Warmup = Annotated[Share, Field(description="share of the steps until the full learning rate")]
DecayKind = Annotated[
    Decay,
    BeforeValidator(partial(current_value, "decay")),
    Field(description="how the learning rate falls afterwards"),
]
Clip = Annotated[Positive, Field(description="the largest norm of the gradient")]
Ema = Annotated[
    Below1, Field(description="decay of the averaged weights that are kept; without it, no average")
]


def check(schema: type[T], values: Mapping[str, Any], *, others: bool = False) -> T:
    """Validates settings.

    Args:
        schema: A `Table` or a `settings` dataclass.
        values: JSON-able settings.
        others: Ignore unknown keys, as in a file of another version.

    Returns:
        An instance of the schema.

    Raises:
        ValueError: A value is invalid; the message names the first one.
    """
    text = json.dumps(values)
    try:
        return TypeAdapter(schema).validate_json(text, extra="ignore" if others else "forbid")
    except ValidationError as error:
        raise ValueError(_sentence(error, schema, json.loads(text))) from None


def check_value(key: str, value: Any, kind: Any) -> Any:
    """Validates a single value.

    Args:
        key: Its name in the message.
        value: The value; numpy's numbers become Python's, lists become tuples.
        kind: Its type, such as `Count`.

    Raises:
        ValueError: The value is invalid.
    """
    text = json.dumps(value, default=lambda number: number.item())
    try:
        return TypeAdapter(Annotated[kind, Field(strict=True)]).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{key} = {_shown(value)}: {_wanted(first)}") from None


def changed(values: Mapping[str, Any], changes: Sequence[str], schema: type) -> dict[str, Any]:
    """Copies settings and applies changes, without validating the new values.

    Args:
        values: JSON-able settings.
        changes: Texts like "model.d_model=64"; the value is TOML, JSON or a bare word.
        schema: The schema of `values`.

    Raises:
        ValueError: A key is unknown (the message names the nearest one), or the text has no value.
    """
    copy = json.loads(json.dumps(values))
    for change in changes:
        _put(copy, change, schema)
    return current_config(copy, warn=True)


def with_changes(values: T, changes: Sequence[str]) -> T:
    """Copies settings with `changes` applied, validated as a whole. Raises ValueError."""
    return check(type(values), changed(asdict(values), changes, type(values)))


def fields_of(schema: Any) -> dict[str, Any]:
    """Returns the fields of a schema by name; an empty dict for other types."""
    return getattr(schema, "__pydantic_fields__", {})


class Row(NamedTuple):
    """A setting as shown in help texts; `names` says what NAME in the key stands for."""

    key: str
    takes: str
    meaning: str
    names: str = ""


def described(schema: type, start: str = "", names: str = "") -> Iterator[Row]:
    """Yields every setting of a schema; equal tables (stages, tasks) appear once, as NAME.

    Args:
        schema: The schema.
        start: Prefix of the keys.
        names: The meaning of NAME in `start`.
    """
    fields, seen = fields_of(schema), []
    for name, field in fields.items():
        kind = _inner(field.annotation)
        if get_origin(kind) is dict and fields_of(_inner(get_args(kind)[1])):
            yield from described(
                _inner(get_args(kind)[1]), f"{start}{name}.NAME.", f"one of the {name}"
            )
        elif not fields_of(kind):
            yield Row(f"{start}{name}", _takes(kind), _meaning(field), names)
        elif kind not in seen:
            seen.append(kind)
            alike = [other for other, f in fields.items() if _inner(f.annotation) is kind]
            inner = name if len(alike) == 1 else "NAME"
            yield from described(
                kind, f"{start}{inner}.", names if len(alike) == 1 else ", ".join(alike)
            )


def described_text(schema: type) -> str:
    """Formats the settings of a schema, one line each."""
    rows, lines, names = list(described(schema)), [], ""
    keys, takes = (max(len(row[i]) for row in rows) for i in (0, 1))
    for row in rows:
        if row.names != names and row.names:
            lines.append(f"NAME: {row.names}")
        names = row.names
        lines.append(f"  {row.key:{keys}s}  {row.takes:{takes}s}  {row.meaning}".rstrip())
    return "\n".join(lines)


def _inner(annotation: Any) -> Any:
    """Strips None and metadata from an annotation."""
    if get_origin(annotation) is Annotated:
        return _inner(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _inner(next(a for a in get_args(annotation) if a is not type(None)))
    return annotation


def _meaning(field: Any) -> str:
    """Returns the description of a field, or of its type if the field is optional."""
    of_parts = [
        part.description
        for choice in get_args(field.annotation)
        for part in getattr(choice, "__metadata__", ())
        if getattr(part, "description", None)
    ]
    return field.description or "".join(of_parts[:1])


def _takes(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    names = {int: "whole number", float: "number", str: "text", bool: "true | false"}
    return names.get(kind, "list" if get_origin(kind) is tuple else "table")


def _put(values: dict[str, Any], change: str, schema: type) -> None:
    if any("\ud800" <= character <= "\udfff" for character in change):  # undecodable bytes
        raise ValueError(f"{change!a} is not text: write KEY=VALUE")
    key, equals, text = change.partition("=")
    if not equals or not key:
        example = next(described(schema)).key
        raise ValueError(f"{change!r} sets nothing: write KEY=VALUE, like {example}=…")
    *path, name = key.split(".")
    table, kind = values, schema
    for depth, part in enumerate([*path, name]):
        below = _below(kind, part, table)
        if below is None:
            raise ValueError(f"{change!r}: {_unknown(schema, values, [*path, name][: depth + 1])}")
        if depth == len(path):
            if keys := fields_of(below):
                raise ValueError(
                    f"{change!r}: {key} is a table: set one of its keys, like "
                    f"{key}.{next(iter(keys))}=…"
                )
            table[name] = _value(text)
            return
        if table.get(part) is None:
            table[part] = {}
        table, kind = table[part], below
        if not isinstance(table, dict):
            raise ValueError(f"{change!r}: {'.'.join(path)} has no parts: write it without a dot")


def _below(kind: Any, part: str, table: Mapping[str, Any]) -> Any:
    """Returns the type of the key `part` in a table of type `kind`; None for an unknown key."""
    if part in fields_of(kind):
        return _inner(fields_of(kind)[part].annotation)
    if get_origin(kind) is dict and (get_args(kind)[1] is Any or part in table):
        return _inner(get_args(kind)[1])
    if get_origin(kind) is tuple:
        return _inner(get_args(kind)[0])
    has_keys = fields_of(kind) or get_origin(kind) is dict
    return None if kind is None or has_keys else Any


def _value(text: str) -> Any:
    """Parses the text after `=`."""
    try:
        read = tomllib.loads(f"value = {text}")
        if list(read) == ["value"]:
            json.dumps(read)  # a date is text
            return read["value"]
    except (ValueError, TypeError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _sentence(error: ValidationError, schema: type, values: Any) -> str:
    """Converts the first error to a message with the key, the value and the expected values.

    An unknown key comes before others: it may be the one that is missing, misspelt.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda found: found["type"] not in _UNKNOWN)
    loc = list(first["loc"])
    if loc and isinstance(loc[0], int):  # a positional argument
        loc[0] = list(fields_of(schema))[loc[0]]
    if loc and loc[-1] == "[key]":
        return _unknown(schema, values, loc[:-1])
    whole = tuple(loc)
    while loc and isinstance(loc[-1], int):  # an element is shown in its list
        loc.pop()
    key = ".".join(map(str, loc))
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    if first["type"] in _UNKNOWN:
        return _unknown(schema, values, loc)
    if first["type"] == "missing":
        return f"{key} is missing: give it a value"
    value = _at(values, loc)
    if first["type"] == "literal_error":
        known = get_args(_inner(_annotation(schema, whole)))
        how = "one" if len(loc) == len(whole) else "some"
        return f"{key} = {_shown(value)} is unknown: use {how} of {', '.join(map(str, known))}"
    if first["type"] in _TABLES:
        return f"{key or 'the config'} = {_shown(value)}: give a table of settings"
    return f"{key} = {_shown(value)}: {_wanted(first)}"


def _wanted(error: Mapping[str, Any]) -> str:
    if error["type"] == "setting":
        return error["msg"]
    if error["type"] in _KINDS:
        return f"give {_KINDS[error['type']]}"
    if error["type"] in _RANGES:
        return f"give {_RANGES[error['type']].format(**error['ctx'])}"
    return error["msg"].lower()


def _annotation(schema: Any, loc: Sequence[Any]) -> Any:
    for part in loc:
        schema = _below(_inner(schema), str(part), {str(part): None})
    return schema


def _at(values: Any, loc: Sequence[Any]) -> Any:
    for part in loc:
        if is_dataclass(values):
            values = getattr(values, str(part), None)
        elif isinstance(values, Mapping):
            values = values.get(part)
    return values


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(schema: type, values: Any, loc: Sequence[Any]) -> str:
    """Returns the message for an unknown key, with the nearest known one."""
    *path, name = map(str, loc)
    kind, table = _annotation(schema, path), _at(values, path)
    known = list(fields_of(kind)) or [key for key in table or () if key != name]
    start = "".join(f"{part}." for part in path)
    near = [row.key for row in described(schema) if row.key.rpartition(".")[2] == name]
    if known:
        near.append(f"{start}{nearest(name, known)}")
    what = "table" if isinstance(_at(values, [*path, name]), Mapping) else "setting"
    hint = f": the nearest is {near[0]}" if near else ""
    return f"{what} {start}{name} is unknown{hint}"
