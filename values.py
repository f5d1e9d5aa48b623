"""What a value from outside may be: the types of the commands' options, and of the fields of JSON files."""

from __future__ import annotations

import reprlib
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST = 10**9  # of numbers that need no limit of their own: far beyond any use, far below what overflows
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 100


class Kind:
    """What a value may be. `a | b` is either."""

    def __init__(self, right: str, allows: Callable[[Any], bool]) -> None:
        """right: what is allowed, in words. allows: whether a value is."""
        self.right = right
        self.allows = allows

    def __str__(self) -> str:
        return self.right

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self} or {other}", lambda value: self.allows(value) or other.allows(value))


class Number(Kind):
    """A number in a range. As the type of an option it takes a text."""

    def __init__(self, read: type[int] | type[float], least: float, most: float, auto: bool = False) -> None:
        """read: int takes whole numbers only. auto: an option may be this word instead."""
        name = "a whole number" if read is int else "a number"
        super().__init__(f"{name} from {least} to {most}{' or auto' * auto}", self.is_in_range)
        self.read, self.least, self.most, self.auto = read, least, most, auto

    def is_in_range(self, value: object) -> bool:
        types = (int,) if self.read is int else (int, float)
        if not isinstance(value, types) or isinstance(value, bool):
            return False
        return self.least <= value <= self.most  # also False for NaN

    def __call__(self, text: str) -> Any:
        """The number in a text. Raises ArgumentTypeError, whose message goes on from the option's name."""
        if self.auto and text == "auto":
            return text
        try:
            value = self.read(text) + 0  # and no -0.0
        except ValueError:
            value = None
        if not self.allows(value):
            raise ArgumentTypeError(f"{shown(text)[1:-1]}: must be {self}")
        return value


def whole(least: int = 0, most: int = MOST) -> Number:
    return Number(int, least, most)


def real(least: float = 0, most: float = MOST) -> Number:
    return Number(float, least, most)


def or_auto(number: Number) -> Number:
    """The type of an option that takes the number or the word auto."""
    return Number(number.read, number.least, number.most, auto=True)


def one_of(*allowed: str) -> Kind:
    return Kind(" or ".join(allowed), lambda value: value in allowed)


def list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each of it {kind}", lambda value: isinstance(value, (list, tuple)) and all(map(kind.allows, value))
    )


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NOTHING = Kind("null", lambda value: value is None)


def filled(text: str) -> str:
    """The type of an option that names something. An empty shell variable names nothing."""
    if not text.strip():
        raise ArgumentTypeError("is empty")
    if "\0" in text:
        raise ArgumentTypeError(f"{shown(text)}: a name can't have a NUL character in it")
    return text


def filled_path(text: str) -> Path:
    """The type of an option that names a file or folder: Path("") would be the current folder."""
    return Path(filled(text))


def shown(value: Any) -> str:
    """A value as a message shows it: a long one shortened."""
    return SHORT.repr(value)
