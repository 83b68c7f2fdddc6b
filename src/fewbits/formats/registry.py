"""Plain-data round trips for the small frozen dataclasses that describe formats, granularities and ranges.

`to_dict` writes `{"kind": ..., field: value}`; `Registry.from_dict` reads it back and names what it does not
understand.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, ClassVar, Generic, TypeVar

from fewbits.errors import FewbitsError

T = TypeVar("T", bound="Described")


class Described:
    """A frozen dataclass that prints as plain data. Subclasses set `kind`, the name used in files and recipes."""

    kind: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description; tuples become lists, nested descriptions become nested dicts."""
        out: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.init:
                out[field.name] = _plain(getattr(self, field.name))
        return out


def _plain(value: Any) -> Any:
    if isinstance(value, Described):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


class Registry(Generic[T]):
    """Kinds of one family ("format", "granularity", "range", ...), filled by the `register` decorator."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.kinds: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: make `cls` readable from plain data under its `kind`."""
        if not cls.kind or cls.kind in self.kinds:
            raise TypeError(f"{cls.__name__} needs a `kind` of its own (got {cls.kind!r})")
        self.kinds[cls.kind] = cls
        return cls

    def from_dict(self, data: Any) -> T:
        """The described object. Raises FewbitsError for an unknown kind, an unknown field or a bad value."""
        if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
            raise FewbitsError(f"a {self.family} must be a mapping with a 'kind', got {data!r}")
        fields = dict(data)
        kind = fields.pop("kind")
        cls = self.kinds.get(kind)
        if cls is None:
            raise FewbitsError(f"unknown {self.family} kind {kind!r}; known: {', '.join(sorted(self.kinds))}")
        known = set(inspect.signature(cls).parameters)
        unknown = sorted(set(fields) - known)
        if unknown:
            raise FewbitsError(
                f"{self.family} {kind!r} has no field {', '.join(map(repr, unknown))}; "
                f"it has: {', '.join(sorted(known))}"
            )
        fields = {
            name: tuple(value) if isinstance(value, list) else self.nested(name, value)
            for name, value in fields.items()
        }
        try:
            return cls(**fields)
        except FewbitsError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise FewbitsError(f"{self.family} {kind!r} cannot be built from {fields}: {error}") from error

    def nested(self, name: str, value: Any) -> Any:
        """Hook: turn the nested description in field `name` into an object. Families with nested parts override it."""
        return value
