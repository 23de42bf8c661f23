"""An option is said once: `name: Annotated[type, Help("text")] = default`, as a field of a record or a parameter of a
verb.

A record is a frozen dataclass of options, and of groups, which are records too. `public` makes a verb of a function
that takes records: their options expand in place into keyword arguments, and the command line (`cli.py`) is built from
those. Fields without a `Help` are no options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from coterie.errors import CoterieError

Result = TypeVar("Result")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_TYPED: ContextVar[bool] = ContextVar("typed", default=False)


@dataclass(frozen=True)
class Help:
    """How an option is shown, typed and read.

    text, metavar, flags: of the command line's help; without flags it is typed as --NAME. given: its type there, if not
    the annotated one. read: makes of what a caller gives what the record holds. default: what a caller may leave out,
    where that is not the field's default. stdin: whether `-` stands for standard input.
    """

    text: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    given: Any = None
    read: Callable[[Any], Any] | None = None
    default: Any = ...
    stdin: bool = False


Changes = Mapping[str, Help | None]  # other helps for options of a group; None leaves one out


def as_text(value: object) -> str | None:
    """A path or a name as text."""
    return None if value is None else str(value)


def flag_of(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


ModelPath = Annotated[str | Path, Help("A folder of safetensors, or a hub id.", "MODEL", given=str)]
OutPath = Annotated[str | Path, Help("The folder to write; must not exist.", "OUT", given=Path)]
Resume = Annotated[bool, Help("Go on where an interrupted run stopped.")]


def flat(record: Any) -> dict[str, object]:
    """The values of a record by name, in order; groups expand in place, and a name declared earlier stays."""
    found: dict[str, object] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        found = found | (flat(value) | found if is_dataclass(value) else {field.name: value})
    return found


def help_of(parameter: Parameter) -> Help | None:
    """The help of a public function's parameter; None where it is not of the command line."""
    return _split(parameter.annotation, Help)[1]


def public(body: Callable[..., Result]) -> Callable[..., Result]:
    """The function with its records expanded into keyword arguments; `body` is called with records."""
    hints = get_type_hints(body, include_extras=True)
    asked = {name: hint for name, hint in hints.items() if name != "return"}
    parameters: dict[str, Parameter] = {}
    for parameter in inspect.signature(body).parameters.values():
        hint = hints[parameter.name]
        if _is_group(hint):
            for option in _expanded(hint, {}):
                parameters.setdefault(option.name, option)
        else:
            shown = _split(hint, Help)[1]
            default = parameter.default if shown is None or shown.default is ... else shown.default
            parameters[parameter.name] = parameter.replace(annotation=hint, default=default)
    signature = inspect.Signature(list(parameters.values()), return_annotation=hints.get("return", Any))

    @wraps(body)
    def verb(*args: Any, **kwargs: Any) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{body.__name__}() {error}") from None
        bound.apply_defaults()
        try:
            given = {name: _read(parameters[name], value) for name, value in bound.arguments.items()}
            return body(**{n: _built(hint, given) if _is_group(hint) else given[n] for n, hint in asked.items()})
        except CoterieError as error:
            if not _TYPED.get():
                error.args = (_in_python(str(error), parameters),)
            raise

    verb.__signature__ = signature  # type: ignore[attr-defined]
    verb.__annotations__ = {n: p.annotation for n, p in parameters.items()} | {"return": signature.return_annotation}
    return verb


@contextmanager
def typed() -> Iterator[None]:
    """While entered, options came from a command line, and refusals name them as they are typed there."""
    token = _TYPED.set(True)
    try:
        yield
    finally:
        _TYPED.reset(token)


def _in_python(message: str, parameters: Mapping[str, Parameter]) -> str:
    """The message with `--an-option` as the argument that it is: `an_option`, or `an_option=True` of a truth value."""
    names = {flag: name for name, p in parameters.items() if (h := help_of(p)) for flag in h.flags or (flag_of(name),)}

    def argument(found: re.Match[str]) -> str:
        flag = found[0]
        opposite = flag.removeprefix("--no-").replace("-", "_")
        if flag.startswith("--no-") and opposite in parameters and flag not in names:
            return f"{opposite}=False"
        name = names.get(flag)
        return flag if name is None else f"{name}=True" if isinstance(parameters[name].default, bool) else name

    return FLAG.sub(argument, message)


def _expanded(hint: Any, changes: Changes) -> Iterator[Parameter]:
    """The options of a group, as keyword-only parameters."""
    group, own = _split(hint, dict)
    hints, changes = get_type_hints(group, include_extras=True), {**(own or {}), **changes}
    for field in fields(group):
        annotation = hints[field.name]
        if _is_group(annotation):
            yield from _expanded(annotation, changes)
            continue
        base, found = _split(annotation, Help)
        shown = changes.get(field.name, found)
        if shown is not None:
            default = _default(field) if shown.default is ... else shown.default
            kind = Parameter.KEYWORD_ONLY
            yield Parameter(field.name, kind, default=default, annotation=Annotated[base, shown])


def _built(hint: Any, given: Mapping[str, Any]) -> Any:
    """The record of what was given; what was not asked keeps its default."""
    group = _split(hint, dict)[0]
    hints, found = get_type_hints(group, include_extras=True), {}
    for field in fields(group):
        if _is_group(hints[field.name]):
            found[field.name] = _built(hints[field.name], given)
        elif field.name in given and _split(hints[field.name], Help)[1]:
            found[field.name] = given[field.name]
    return group(**found)


def _read(parameter: Parameter, value: Any) -> Any:
    """What a record holds of what was given. Raises: CoterieError for a value of another type than the option's."""
    shown = help_of(parameter)
    if shown and shown.read:
        return shown.read(value)
    kinds = _kinds(_split(parameter.annotation, Help)[0]) if shown else ()
    if kinds and value is not parameter.default and not any(_is_a(value, kind) for kind in kinds):
        expected = " or ".join(dict.fromkeys(NOUNS[kind] for kind in kinds if kind in NOUNS))
        raise CoterieError(f"{flag_of(parameter.name)} {value!r:.60}: expected {expected}")
    return value


NOUNS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "None",
    list: "a list", dict: "a dictionary", Sequence: "a sequence",
}  # fmt: skip


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The classes that an annotation allows."""
    union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(get_origin(kind) or kind for kind in union)


def _is_a(value: object, kind: type) -> bool:
    """Numbers may be of other libraries; a truth value is no number."""
    number: Any = {int: Integral, float: Real}
    return isinstance(value, number.get(kind, kind)) and isinstance(value, bool) == (kind is bool)


def _split(hint: Any, kind: type) -> tuple[Any, Any]:
    """The type in an annotation, and what of a kind stands beside it."""
    if get_origin(hint) is not Annotated:
        return hint, None
    base, *beside = get_args(hint)
    return base, next((found for found in beside if isinstance(found, kind)), None)


def _is_group(hint: Any) -> bool:
    return isinstance(base := _split(hint, dict)[0], type) and is_dataclass(base)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
