"""Reads a sweep's YAML file into a checked `SweepConfig`, or says which field is wrong and how.

Every complaint has the form `miniature.yaml: library.steps: must be greater than 0, got 0`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from search.budget import Budget
from storage.document import read_document
from storage.errors import EspalierError

Model = TypeVar("Model", bound=BaseModel)

BOUNDS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}
"""pydantic's error types for numbers out of range: our words, and where the bound is kept."""


class ConfigError(EspalierError):
    """A configuration file, or a `--set` on top of it, that does not say a sweep."""


def load_config(path: Path, settings: Sequence[str], section: type[Model]) -> Model:
    """The file's content, with `settings` (`key.subkey=value`) laid over it, as `section`.

    Raises:
        ConfigError: no such file, not YAML, or a field that is wrong; all of them are named.
    """
    document = read_yaml(path)
    for setting in settings:
        apply_setting(document, setting)
    drop_empty(document, section)
    try:
        return section.model_validate(document)
    except ValidationError as error:
        problems = error.errors()
        # A tuple with a wrong item is also reported as too short: said once.
        inner = {p["loc"][:i] for p in problems for i in range(len(p["loc"]))}
        told: dict[str, list[str]] = {}
        for problem in problems:
            if problem["type"] != "too_short" or problem["loc"] not in inner:
                said = sentence(problem, section)
                told.setdefault(dotted(_written(problem, document)), []).append(said)
        lines = [
            f"{where}: {_joined(said)}" if where else _joined(said) for where, said in told.items()
        ]
        raise ConfigError("\n".join(f"{path.name}: {line}" for line in lines)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The top mapping of a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration ({error})") from error
    try:
        document = read_document(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}:{mark.column + 1}" if mark else path.name
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path.name}: must hold `key: value` lines, see examples/miniature.yaml")
    return document


def apply_setting(document: dict[str, Any], setting: str) -> None:
    """Lays one `a.b=value` over the document; the value is read as YAML, so `[1, 2]` is a list."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting}: must be KEY=VALUE, such as search.trials=40")
    *parents, last = key.strip().split(".")
    place = document
    for parent in parents:
        below = place[parent] = {} if place.get(parent) is None else place[parent]
        if not isinstance(below, dict):
            raise ConfigError(f"--set {setting}: `{parent}` is not a section")
        place = below
    try:
        place[last] = read_document(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not valid YAML") from error


def drop_empty(document: dict[str, Any], section: type[BaseModel]) -> None:
    """Takes out sections of which nothing is said, as when all of their lines are comments."""
    for name, field in section.model_fields.items():
        below = field.annotation
        if not (isinstance(below, type) and issubclass(below, BaseModel)):
            continue
        if name in document and document[name] is None and not field.is_required():
            del document[name]
        elif isinstance(document.get(name), dict):
            drop_empty(document[name], below)


def sentence(problem: ErrorDetails, section: type[BaseModel]) -> str:
    """One pydantic problem as `what is wrong, got what`."""
    place, kind, context = problem["loc"], problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_suggestion(str(place[-1]), known_names(section, place))}"
    if kind == "missing":
        return "is missing"
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"{words} {context[bound]}, got {problem['input']!r}"
    if kind == "literal_error":
        return f"must be {context['expected']}, got {problem['input']!r}"
    if kind == "too_short":
        return f"must have at least {context['min_length']}, got {len(problem['input'])}"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", problem["msg"]))
    if kind == "tuple_type":
        return f"must be a list in brackets, got {_short(problem['input'])}"
    said = problem["msg"].removeprefix("Input should be ").removeprefix("Value should have ")
    said = f"must be {said}" if problem["msg"].startswith("Input should be") else said
    return f"{said}, got {_short(problem['input'])}"


def _written(problem: ErrorDetails, document: Any) -> list[int | str]:
    """Where a problem is in the file: pydantic also names which of several types a value would have
    had to be."""
    place: list[int | str] = []
    for part in problem["loc"]:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            if problem["type"] != "missing" or part != problem["loc"][-1]:
                continue
        place.append(part)
    return place


def _joined(said: Sequence[str]) -> str:
    """What is wrong with one value, which might have been of several types."""
    distinct = list(dict.fromkeys(said))
    got = f", got {distinct[-1].rpartition(', got ')[2]}"
    if len(distinct) > 1 and all(each.endswith(got) for each in distinct):
        return f"{', or '.join(each.removesuffix(got) for each in distinct)}{got}"
    return "; ".join(distinct)


def dotted(place: Sequence[int | str]) -> str:
    """A pydantic location as a path in the file.

    >>> dotted(("recover", "phases", 1, "steps"))
    'recover.phases[1].steps'
    """
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def known_names(section: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys that the section around `place` accepts."""
    current: Any = section
    for part in place[:-1]:
        if isinstance(part, str):
            fields = current.model_fields if _is_model(current) else {}
            if part not in fields:  # a union's tag: the models it may mean are tried below
                continue
            current = fields[part].annotation
        current = model_within(current) or current
    return sorted(current.model_fields) if _is_model(current) else []


class Key(NamedTuple):
    """A key that a configuration may have."""

    path: str
    """As in --set; `[]` follows a key that takes a list of sections."""
    default: JsonValue
    required: bool
    section: bool
    """Whether it only holds other keys, which follow it."""
    text: str


def keys_of(section: type[BaseModel], above: str = "") -> Iterator[Key]:
    """Every key of a section and of those within it, as its fields are documented."""
    for name, field in section.model_fields.items():
        inner = model_within(field.annotation)
        if inner is Budget:  # written as one word
            inner = None
        path = above + name + ("[]" if inner and get_origin(field.annotation) is tuple else "")
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        text = " ".join((field.description or "").split())
        required = field.is_required()
        yield Key(path, None if inner else default, required, inner is not None, text)
        if inner is not None:
            yield from keys_of(inner, f"{path}.")


def model_within(annotation: Any) -> type[BaseModel] | None:
    """The first model inside `tuple[Phase, ...]`, `Data | None` and the like."""
    if _is_model(annotation):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list, dict, Mapping):
        for inner in get_args(annotation):
            if (found := model_within(inner)) is not None:
                return found
    return None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"the known keys are {', '.join(known)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
