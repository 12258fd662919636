"""The part of pydantic that options of `KFAC` are declared with, for environments that have torch only.

`config.section` takes it where pydantic is not installed. Names, messages and coercions are pydantic's; a
test holds both to the same answers over a table of options. Whole configurations need pydantic.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

_Problem = dict[str, Any]
_REQUIRED = object()


class ValidationError(ValueError):
    """Values that are not allowed, all of them."""

    def __init__(self, problems: Sequence[_Problem]) -> None:
        super().__init__("; ".join(p["msg"] for p in problems))
        self._problems = list(problems)

    def errors(self) -> list[_Problem]:
        """`loc`, `msg`, `type` and `input` of each."""
        return self._problems


@dataclass(frozen=True)
class _Bounds:
    gt: float | None
    ge: float | None
    lt: float | None
    le: float | None

    def complaint(self, value: Any) -> str | None:
        if self.gt is not None and not value > self.gt:
            return f"greater than {self.gt}"
        if self.ge is not None and not value >= self.ge:
            return f"greater than or equal to {self.ge}"
        if self.lt is not None and not value < self.lt:
            return f"less than {self.lt}"
        if self.le is not None and not value <= self.le:
            return f"less than or equal to {self.le}"
        return None


def Field(
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """Bounds of a number."""
    return _Bounds(gt, ge, lt, le)


@dataclass(frozen=True)
class Tag:
    """The name of a branch of a union."""

    name: str


@dataclass(frozen=True)
class Discriminator:
    """Chooses the branch of a union by the `Tag` that a function names."""

    function: Callable[[Any], str]
    custom_error_type: str
    custom_error_message: str


@dataclass(frozen=True)
class _Check:
    mode: str
    function: Any


def model_validator(*, mode: Literal["before", "after"]) -> Any:
    """Marks a method that sees the mapping before, or the section after its fields were checked."""
    return lambda function: _Check(mode, function)


def field_validator(*fields: str) -> Any:
    """Marks a class method that sees the value of every field."""
    assert fields == ("*",)
    return lambda function: _Check("field", function)


@dataclass(frozen=True)
class FieldInfo:
    """The declaration of an option."""

    annotation: Any
    default: Any
    description: str | None


class _Fields:
    """The fields of a class by name, those of its bases first; made when they are first asked for."""

    def __get__(self, instance: object, owner: type) -> dict[str, FieldInfo]:
        found: dict[str, FieldInfo] | None = owner.__dict__.get("_own_fields")
        if found is None:
            hints = typing.get_type_hints(owner, include_extras=True)
            texts: dict[str, str] = {}
            for base in reversed(owner.__mro__):
                if issubclass(base, BaseModel):
                    texts |= _texts_of(base)
            found = {
                name: FieldInfo(hint, getattr(owner, name, _REQUIRED), texts.get(name))
                for name, hint in hints.items()
                if get_origin(hint) is not ClassVar
            }
            type.__setattr__(owner, "_own_fields", found)
        return found


def _texts_of(section: type) -> dict[str, str]:
    """The docstrings under the fields of a class."""
    if sys.flags.optimize > 1:
        return {}
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    return {
        before.target.id: inspect.cleandoc(after.value.value)
        for before, after in pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def ConfigDict(**settings: Any) -> dict[str, Any]:
    """What every section has anyway."""
    return settings


class BaseModel:
    """A frozen section that refuses unknown keys and checks its values."""

    model_fields: ClassVar[Any] = _Fields()

    def __init__(self, **values: Any) -> None:
        for check in _checks(type(self), "before"):
            values = check.function.__func__(type(self), values)
        problems = [
            _problem((name,), "Extra inputs are not permitted", value, "extra_forbidden")
            for name, value in values.items()
            if name not in self.model_fields
        ]
        made = {}
        for name, field in self.model_fields.items():
            if name not in values:
                made[name] = field.default
                if field.default is _REQUIRED:
                    problems.append(_problem((name,), "Field required", values, "missing"))
                continue
            try:
                made[name] = _checked(field.annotation, values[name], (name,))
                for check in _checks(type(self), "field"):
                    _call(lambda: check.function.__func__(type(self), made[name]), (name,))  # noqa: B023
            except ValidationError as error:
                problems += error.errors()
        if problems:
            raise ValidationError(problems)
        self.__dict__.update(made)
        for check in _checks(type(self), "after"):
            _call(lambda: check.function(self), ())  # noqa: B023

    @classmethod
    def model_validate(cls, values: Any) -> typing.Self:
        """A section of a mapping; a section of this class stays as it is."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            message = "Input should be a valid dictionary or instance of " + cls.__name__
            raise ValidationError([_problem((), message, values, "model_type")])
        return cls(**values)

    def model_copy(self, *, update: Mapping[str, Any]) -> typing.Self:
        """A copy with other values, unchecked."""
        copy = object.__new__(type(self))
        copy.__dict__.update({**self.__dict__, **update})
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValidationError([_problem((name,), "Instance is frozen", value, "frozen_instance")])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"


class TypeAdapter:
    """Checks single values."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def __class_getitem__(cls, item: Any) -> type[TypeAdapter]:
        return cls

    def validate_python(self, value: Any) -> Any:
        """The value as its type has it."""
        return _checked(self._annotation, value, ())


def _checks(section: type, mode: str) -> Iterator[_Check]:
    for base in reversed(section.__mro__):
        for value in vars(base).values():
            if isinstance(value, _Check) and value.mode == mode:
                yield value


def _call(check: Callable[[], object], loc: tuple[str, ...]) -> None:
    try:
        check()
    except ValidationError:
        raise
    except ValueError as error:
        raise ValidationError(
            [_problem(loc, f"Value error, {error}", None, "value_error")]
        ) from None


def _problem(loc: tuple[str, ...], message: str, value: Any, kind: str = "value") -> _Problem:
    return {"loc": loc, "msg": message, "input": value, "type": kind}


def _wrong(loc: tuple[str, ...], wanted: str, value: Any) -> ValidationError:
    return ValidationError([_problem(loc, f"Input should be {wanted}", value)])


def _checked(annotation: Any, value: Any, loc: tuple[str, ...]) -> Any:
    """The value as the annotation has it.

    Raises:
        ValidationError: If it is not allowed.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for mark in arguments[1:]:
            if isinstance(mark, Discriminator):
                return _of_kind(get_args(arguments[0]), mark, value, loc)
        result = _checked(arguments[0], value, loc)
        for mark in arguments[1:]:
            if isinstance(mark, _Bounds) and (complaint := mark.complaint(result)):
                raise _wrong(loc, complaint, value)
        return result
    if origin in (typing.Union, types.UnionType):
        return _of_a_union(arguments, value, loc)
    if origin is Literal:
        if any(type(each) is type(value) and each == value for each in arguments):
            return value
        *most, last = map(repr, arguments)
        raise _wrong(loc, f"{', '.join(most)} or {last}" if most else last, value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(loc, "a valid tuple", value)
        return tuple(_checked(arguments[0], each, (*loc, str(n))) for n, each in enumerate(value))
    if origin is Callable:
        if not callable(value):
            raise _wrong(loc, "callable", value)
        return value
    return _of_a_class(annotation, value, loc)


def _of_kind(branches: Sequence[Any], mark: Discriminator, value: Any, loc: tuple[str, ...]) -> Any:
    kind = mark.function(value)
    for branch in branches:
        if Tag(kind) in get_args(branch)[1:]:
            return _checked(branch, value, (*loc, kind))
    raise ValidationError([_problem(loc, mark.custom_error_message, value, mark.custom_error_type)])


def _of_a_union(branches: Sequence[Any], value: Any, loc: tuple[str, ...]) -> Any:
    if value is None and type(None) in branches:
        return None
    problems: list[_Problem] = []
    for branch in branches:
        if branch is type(None):  # Not worth a mention to those who gave something.
            continue
        try:
            return _checked(branch, value, loc)
        except ValidationError as error:
            problems += error.errors()
    raise ValidationError(problems)


def _of_a_class(kind: Any, value: Any, loc: tuple[str, ...]) -> Any:
    if kind is type(None):
        if value is not None:
            raise _wrong(loc, "None", value)
        return None
    if kind is bool:
        known: dict[str | float, bool] = {0: False, 1: True}
        known |= dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True)
        known |= dict.fromkeys(("false", "f", "no", "n", "off", "0"), False)
        key = value.lower() if isinstance(value, str) else value
        if not isinstance(key, str | int | float):
            raise _wrong(loc, "a valid boolean", value)
        if key not in known:
            raise _wrong(loc, "a valid boolean, unable to interpret input", value)
        return known[key]
    if kind is str:
        if not isinstance(value, str):
            raise _wrong(loc, "a valid string", value)
        return value
    if kind in (int, float):
        return _number(kind, value, loc)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            problems = [{**p, "loc": (*loc, *p["loc"])} for p in error.errors()]
            raise ValidationError(problems) from None
    raise TypeError(f"no check for {kind}")


def _number(kind: type, value: Any, loc: tuple[str, ...]) -> Any:
    name = "integer" if kind is int else "number"
    is_text = isinstance(value, str)
    if not isinstance(value, int | float | str):
        raise _wrong(loc, f"a valid {name}", value)
    try:
        number = int(value) if is_text and kind is int else float(value) if is_text else value
    except ValueError:
        text = f"a valid {name}, unable to parse string as {'an' if kind is int else 'a'} {name}"
        raise _wrong(loc, text, value) from None
    if isinstance(number, float) and not math.isfinite(number):
        raise _wrong(loc, "a finite number", value)
    if kind is int and number != int(number):
        raise _wrong(loc, "a valid integer, got a number with a fractional part", value)
    return kind(number)
