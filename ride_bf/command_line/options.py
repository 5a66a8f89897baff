"""Options as fields of dataclasses. Each field holds the help, choices and limits for the command line.

    @dataclass
    class Settings:
        epochs: int = option("number of epochs", 10, group="optimisation", must_be="1 or more")

`add_options` adds the options to a parser. `check_values` checks the values of an instance.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ride_bf.command_line.processes import is_first_of_machine

LIMITS: dict[str, Callable[[float], bool]] = {
    "0 or more": lambda value: value >= 0,
    "1 or more": lambda value: value >= 1,
    "positive": lambda value: value > 0,
    "0 or more and less than 1": lambda value: 0 <= value < 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "between 0 and 1": lambda value: 0 < value < 1,
    "0 to 1": lambda value: 0 <= value <= 1,
    "0 to 4294967295": lambda value: 0 <= value < 2**32,
}


@dataclass(frozen=True)
class Need:
    """What an option needs to have an effect.

    Attributes:
        words: what to give, for messages: "--schedule step"; or a function that returns it.
        options: the names of the options that decide whether the need is met.
        met: whether it is met, from the values of these options.
        in_help: whether `--help` shows it.
    """

    words: str | Callable[[], str]
    options: tuple[str, ...]
    met: Callable[..., bool]
    in_help: bool = True

    def is_met(self, values: Mapping[str, Any]) -> bool:
        return self.met(*(values[name] for name in self.options))


def only_with(option: str, *allowed: Any) -> Need:
    """The need of an option that acts only if another one has one of these values; without values, if it is set."""
    if not allowed:
        return Need(f"--{option}", (option,), lambda value: value is not None and value is not False)
    words = f"--{option}" if allowed == (True,) else f"--{option} {' or '.join(map(str, allowed))}"
    return Need(words, (option,), lambda value: value in allowed)


def not_with(option: str, value: Any, in_help: bool = True) -> Need:
    """The need of an option that acts unless another one has this value."""
    return Need(f"a --{option} other than {value}", (option,), lambda other: other != value, in_help)


@dataclass(frozen=True, kw_only=True)
class Option:
    """The description of an option, apart from its type and default.

    Attributes:
        help: its meaning, for `--help`.
        group: its heading in `--help`.
        must_be: a key of `LIMITS`, for numbers; each number of a list must meet it.
        choices: a function that returns the allowed values.
        kind: what a choice is, for messages: "data set".
        needs: what the option needs to have an effect.
        off: a value that turns the option off, like None and False. It is allowed even if the option cannot act.
        metavar: the placeholder for the value in `--help`, if the type does not give one.
    """

    help: str
    group: str
    must_be: str | None = None
    choices: Callable[[], Iterable[str]] | None = None
    kind: str = ""
    needs: tuple[Need, ...] = ()
    off: Any = None
    metavar: str = ""

    def asks_for_nothing(self, value: Any) -> bool:
        return value is None or value is False or value == self.off


def option(help: str, default: Any = MISSING, **facts: Any) -> Any:
    """A dataclass field with the attributes of `Option`. A default list is copied for each instance."""
    metadata = {"option": Option(help=help, **facts)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(kind: Any) -> dict[str, Option]:
    """The options of a dataclass, by field name."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(kind) if "option" in f.metadata}


def check_values(instance: Any) -> None:
    """Raises ValueError, with the option and the value, for one that is out of limits, not a choice, or empty."""
    for name, facts in options_of(instance).items():
        value = getattr(instance, name)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, bool) or number is None:
                continue
            if number == "":
                raise ValueError(f"{name} is empty; give it a value or leave it out")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, not {number}")
            if facts.must_be and not isinstance(number, str) and not LIMITS[facts.must_be](number):
                allowed = [*words_of(get_type_hints(type(instance))[name]), facts.must_be]
                raise ValueError(f"{name} must be {_alternatives(allowed)}, not {shown(value)}")
        if facts.choices is not None and value is not None and value not in (choices := list(facts.choices())):
            raise ValueError(f"no {facts.kind or name} is called {value!r}; there are {', '.join(choices)}")


def _alternatives(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def shown(value: Any) -> str:
    """A value as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def words_of(annotation: Any) -> tuple[str, ...]:
    """The literals of an annotation such as `int | Literal["local", "global"]` or `Literal[...]`."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((get_args(member) for member in _members(annotation) if get_origin(member) is Literal), ())


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads the word None as None, for options that may be None."""

    def convert_or_none(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    convert_or_none.__name__ = convert.__name__  # for argparse's message
    return convert_or_none


def _word_or_int(words: Sequence[str]) -> Callable[[str], str | int]:
    """Reads one of the words as text, and anything else as a whole number."""

    def convert(text: str) -> str | int:
        if text in words or text.removeprefix("-").isdecimal():
            return text if text in words else int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor one of {', '.join(words)}")

    return convert


def _true_or_false(text: str) -> bool:
    words = {**dict.fromkeys(("true", "yes", "1"), True), **dict.fromkeys(("false", "no", "0"), False)}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


_METAVARS = {int: "N", float: "X"}


def _reading(annotation: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """Arguments for argparse that read values of an annotation."""
    members = _members(annotation)
    kinds = [member for member in members if member is not type(None)]
    lists = [member for member in kinds if get_origin(member) in (list, tuple)]
    if lists:
        kind = get_args(lists[0])[0]
        return {"type": kind, "nargs": "+", "metavar": _METAVARS.get(kind, "TEXT")}
    words = words_of(annotation)
    if words and int in kinds:
        reading = {"type": _word_or_int(words), "metavar": f"{{{','.join(words)},N}}"}
    elif words or choices is not None:
        known = list(words or choices)
        reading = {"choices": known, "metavar": f"{{{','.join(known)}}}"}
    elif kinds == [bool]:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    else:
        kind = float if float in kinds else kinds[0]
        reading = {"type": kind, "metavar": _METAVARS.get(kind, "TEXT")}
    if type(None) in members:
        reading["type"] = _or_none(reading.get("type", str))
        if "choices" in reading:
            reading["choices"].append(None)
    return reading


class OptionParser(argparse.ArgumentParser):
    """A parser for many options. An error prints one line, not the list of all options."""

    def __init__(self, **facts: Any):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **facts)
        self.names: list[str] = []
        self._headings: dict[str, argparse._ArgumentGroup] = {}

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n" if is_first_of_machine() else None)

    def add_heading(self, title: str, description: str | None = None) -> argparse._ArgumentGroup:
        """The group with this title. Help shows groups in the order in which they were first added."""
        if title not in self._headings:
            self._headings[title] = self.add_argument_group(title, description)
        return self._headings[title]

    def add_option(self, name: str, annotation: Any, facts: Option, default: Any) -> None:
        """Adds an option to its group. The parsed namespace holds only the options that were given."""
        group = self.add_heading(facts.group)
        limits = f"; {facts.must_be}" if facts.must_be else ""
        needs = "".join(f"; only with {need.words}" for need in facts.needs if need.in_help)
        unset = default is None or default is MISSING or default is False or default == ()
        initial = "" if unset else f" (default: {shown(default)})"
        reading = _reading(annotation, None if facts.choices is None else list(facts.choices()))
        if facts.metavar:
            reading["metavar"] = facts.metavar
        help = f"{facts.help}{limits}{needs}{initial}".replace("%", "%%")
        group.add_argument(f"--{name}", dest=name, help=help, **reading)
        if reading.get("const") is True:
            off = f"--{name} false" if default is True else argparse.SUPPRESS
            group.add_argument(f"--no_{name}", dest=name, action="store_false", help=off)
        self.names.append(name)


def add_options(parser: OptionParser, kind: Any, defaults: Mapping[str, Any]) -> None:
    """Adds the options of a dataclass to a parser. The help shows `defaults`."""
    hints = get_type_hints(kind)
    for name, facts in options_of(kind).items():
        parser.add_option(name, hints[name], facts, defaults.get(name))


def with_underscores(words: Sequence[str]) -> list[str]:
    """Writes options with underscores: `--learning-rate=0.1` becomes `--learning_rate=0.1`."""
    parts = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words]
    return [
        f"{name.replace('-', '_').replace('__', '--', 1)}{equals}{value}" if name.startswith("--") else name
        for name, equals, value in parts
    ]
