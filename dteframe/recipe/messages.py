"""Word what pydantic finds wrong with a section as a person would: what the value must be, and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dteframe.recipe.document import KeyPath

UNKNOWN_KEY = "unknown key"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong inside a section."""

    path: KeyPath
    """Inside the section; of a missing key, where it should be."""
    what: str
    is_about_key: bool = False
    """Whether to point at the key rather than at the value."""


def read_config(config: type[BaseModel], section: Mapping[str, Any]) -> BaseModel | list[Finding]:
    """Make the configuration of a section, or say everything that is wrong with it.

    The section goes through JSON, so that strict configurations may have paths, tuples and enumerations.
    """
    try:
        return config.model_validate_json(json.dumps(section))
    except ValidationError as error:
        details = error.errors(include_url=False)
        return list(_findings(config, section, details))
    except Exception as error:  # noqa: BLE001  # a plugin's own validator may raise anything
        return [Finding((), f"{config.__name__} cannot be made of this: {type(error).__name__}: {error}")]


@dataclass(frozen=True, slots=True)
class _Located:
    detail: ErrorDetails
    path: KeyPath
    union_at: KeyPath | None
    """Where a value may be one of several types, and this error is about one of them."""
    branch: str
    """Which of them."""
    value: Any


def _findings(
    config: type[BaseModel], section: Mapping[str, Any], details: Sequence[ErrorDetails]
) -> Iterator[Finding]:
    located = [_locate(detail, section) for detail in details]
    done: set[KeyPath] = set()
    for item in located:
        if item.union_at is None:
            yield _finding(config, item)
        elif item.union_at not in done:
            done.add(item.union_at)
            yield from _union_findings(config, [one for one in located if one.union_at == item.union_at])


def _locate(detail: ErrorDetails, section: Mapping[str, Any]) -> _Located:
    """Find the place in the recipe: pydantic's location also names the types of a union that it tried."""
    value: Any = section
    path: KeyPath = ()
    union_at: KeyPath | None = None
    branch = ""
    *_, last = detail["loc"] or ("",)
    for index, part in enumerate(detail["loc"]):
        is_last = index == len(detail["loc"]) - 1
        is_item = isinstance(part, int) and isinstance(value, list) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]
            path = (*path, part)
        elif is_last and detail["type"] == "missing":
            path = (*path, part)
        elif part != "[key]" and union_at is None:
            union_at, branch = path, str(part)
    return _Located(detail, path, union_at, branch, path[-1] if last == "[key]" and path else value)


def _union_findings(config: type[BaseModel], errors: Sequence[_Located]) -> Iterator[Finding]:
    """Report the type that the value was most likely meant to be; all of them if it is like none."""
    at = errors[0].union_at
    branches: dict[str, list[_Located]] = {}
    for error in errors:
        branches.setdefault(error.branch, []).append(error)
    alike = [
        found
        for found in branches.values()
        if not any(one.path == at and one.detail["type"].endswith("_type") for one in found)
    ]
    if alike:
        for error in min(alike, key=len):
            yield _finding(config, error)
        return
    wanted = list(dict.fromkeys(phrase for error in errors if (phrase := _wanted(error.detail))))
    yield Finding(errors[0].path, f"must be {_or(wanted)}, not {shown(errors[0].value)}")


def _finding(config: type[BaseModel], error: _Located) -> Finding:
    kind = error.detail["type"]
    if kind == "missing":
        text = _description(config, error.path)
        return Finding(error.path, f"is required: {text}" if text else "is required", is_about_key=True)
    if kind == "extra_forbidden":
        return Finding(error.path, UNKNOWN_KEY, is_about_key=True)
    return Finding(error.path, sentence(error.detail, error.value))


def sentence(detail: ErrorDetails, value: Any) -> str:
    """Word one of pydantic's errors, with the value that it is about."""
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"])).rstrip(".")
    phrase = _wanted(detail)
    if phrase is None:
        return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, not {shown(value)}"
    hint = _hint(kind, value, context)
    return f"must be {phrase}, not {shown(value)}{f'; {hint}' if hint else ''}"


def _wanted(detail: ErrorDetails) -> str | None:
    """Say what the value must be, as the end of "must be"; None for kinds of errors that we do not know."""
    template = WANTED.get(detail["type"])
    if template is None:
        return None
    context = {name: _plain(item) for name, item in detail.get("ctx", {}).items()}
    return template.format_map(context)


WANTED = {
    "arguments_type": "a list or a section of arguments",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "bytes_invalid_encoding": "text that encodes bytes",
    "bytes_too_long": "text of at most {max_length} bytes",
    "bytes_too_short": "text of at least {min_length} bytes",
    "bytes_type": "text",
    "callable_type": "a function, which a recipe cannot give",
    "complex_str_parsing": "a complex number in quotes, such as '1+2j'",
    "complex_type": "a complex number in quotes, such as '1+2j'",
    "counter_type": "a section of counts",
    "dataclass_exact_type": "a section with keys",
    "dataclass_type": "a section with keys",
    "date_from_datetime_inexact": "a date without a time, such as '2026-01-31'",
    "date_from_datetime_parsing": "a date in quotes, such as '2026-01-31'",
    "date_future": "a date in the future",
    "date_parsing": "a date in quotes, such as '2026-01-31'",
    "date_past": "a date in the past",
    "date_type": "a date in quotes, such as '2026-01-31'",
    "datetime_from_date_parsing": "a date and time in quotes, such as '2026-01-31T12:00:00'",
    "datetime_future": "a time in the future",
    "datetime_object_invalid": "a date and time in quotes, such as '2026-01-31T12:00:00'",
    "datetime_parsing": "a date and time in quotes, such as '2026-01-31T12:00:00'",
    "datetime_past": "a time in the past",
    "datetime_type": "a date and time in quotes, such as '2026-01-31T12:00:00'",
    "decimal_max_digits": "a number of at most {max_digits} digits",
    "decimal_max_places": "a number of at most {decimal_places} decimal places",
    "decimal_parsing": "a number",
    "decimal_type": "a number",
    "decimal_whole_digits": "a number of at most {whole_digits} digits before the point",
    "deque_type": "a list",
    "dict_type": "a section with keys",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "fraction_parsing": "a fraction in quotes, such as '1/3'",
    "fraction_type": "a fraction in quotes, such as '1/3'",
    "frozen_dict_type": "a section with keys",
    "frozen_set_type": "a list of distinct values",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a shorter whole number",
    "int_type": "a whole number",
    "invalid_key": "a section whose keys are text",
    "is_instance_of": "a {class}, which a recipe cannot give",
    "is_subclass_of": "a {class}, which a recipe cannot give",
    "iterable_type": "a list",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a section with keys",
    "missing_sentinel_error": "left out",
    "model_attributes_type": "a section with keys",
    "model_type": "a section with keys",
    "multiple_of": "a multiple of {multiple_of}",
    "named_tuple_type": "a list",
    "none_required": "null",
    "ordered_dict_type": "a section with keys",
    "set_item_not_hashable": "a list of plain values",
    "set_type": "a list of distinct values",
    "string_not_ascii": "text of ASCII characters",
    "string_pattern_mismatch": "text that matches the pattern {pattern!r}",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "string_unicode": "text",
    "time_delta_parsing": "a duration in quotes, such as 'PT30S'",
    "time_delta_type": "a duration, such as 30 (seconds)",
    "time_parsing": "a time in quotes, such as '12:00:00'",
    "time_type": "a time in quotes, such as '12:00:00'",
    "timezone_aware": "a time with a time zone",
    "timezone_naive": "a time without a time zone",
    "timezone_offset": "a time with the offset {tz_expected} seconds",
    "too_long": "a list of at most {max_length} items",
    "too_short": "a list of at least {min_length} items",
    "tuple_type": "a list",
    "union_tag_invalid": "a section whose {discriminator} is one of {expected_tags}",
    "union_tag_not_found": "a section with the key {discriminator}",
    "url_parsing": "a URL in quotes, such as 'https://host/path'",
    "url_scheme": "a URL that begins with {expected_schemes}",
    "url_syntax_violation": "a URL in quotes, such as 'https://host/path'",
    "url_too_long": "a URL of at most {max_length} characters",
    "url_type": "a URL in quotes, such as 'https://host/path'",
    "uuid_parsing": "a UUID in quotes",
    "uuid_type": "a UUID in quotes",
    "uuid_version": "a UUID of version {expected_version}",
}
"""What a value must be, by pydantic's type of error; in braces what pydantic says about the limit."""


def _hint(kind: str, value: Any, context: Mapping[str, Any]) -> str:
    """Say what to write instead, where the value shows what was meant."""
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return _number_hint(kind, value)
    if kind == "bool_type" and str(value).lower() in _TRUE | _FALSE:
        return f"write {'true' if str(value).lower() in _TRUE else 'false'}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "put it in quotes"
    if kind == "list_type" and not isinstance(value, Mapping) and value is not None:
        return f"write [{_plain_scalar(value)}]"
    if kind in ("literal_error", "enum") and isinstance(value, str):
        allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return nearest(value, allowed)
    if kind in ("literal_error", "enum") and isinstance(value, bool | int | float) or value is None:
        return (
            "put text in quotes" if "'" + _plain_scalar(value) + "'" in str(context.get("expected")) else ""
        )
    return ""


_TRUE = {"yes", "on", "y", "true", "1"}
_FALSE = {"no", "off", "n", "false", "0"}


def _number_hint(kind: str, text: str) -> str:
    plain = text.strip().replace("_", "")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", plain):
        plain = plain.replace(",", "")  # thousands
    pattern = r"[-+]?\d+" if kind == "int_type" else r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    if re.fullmatch(pattern, plain):
        return f"write {plain}, without quotes" if plain == text else f"write {plain}"
    return ""


def nearest(word: str, known: Sequence[str]) -> str:
    """Ask whether the nearest spelling was meant; empty if nothing is near."""
    lowered = {name.lower(): name for name in reversed(known)}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(lowered), n=1, cutoff=0.7)
    return f"did you mean {lowered[found[0]]!r}?" if found else ""


def shown(value: Any) -> str:
    """Show a value as it stands in YAML, cut to what fits into a line."""
    if isinstance(value, bool) or value is None:
        return _plain_scalar(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain_scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _plain(value: Any) -> Any:
    """Write a limit as people do: 1 for 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _or(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} or {phrases[-1]}"


# What a configuration knows about its own keys.


def known_keys(config: type[BaseModel], path: KeyPath, section: Any = None) -> list[str]:
    """List the keys that the section at ``path`` inside a configuration may have.

    ``section`` are the configuration's values: where several classes are possible, the type there decides.
    """
    for part in path if section is not None else ():
        section = section[part]
    models = _models_at(config, path)
    wanted = section.get("type") if isinstance(section, Mapping) else None
    of_type = [
        model
        for model in models
        if "type" in model.model_fields and model.model_fields["type"].default == wanted
    ]
    return [name for model in of_type or models for name in model.model_fields]


def _description(config: type[BaseModel], path: KeyPath) -> str:
    """Give the first sentence of a key's description, small and without its full stop."""
    for model in _models_at(config, path[:-1]):
        field = model.model_fields.get(str(path[-1]))
        if field is not None and field.description:
            whole = " ".join(field.description.replace("``", "`").split())
            text = re.split(r"(?<=\w)[.;](?:\s|$)", whole, maxsplit=1)[0].rstrip(".")
            return text[:1].lower() + text[1:] if text[1:2].islower() else text
    return ""


def _models_at(config: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    models = [config]
    for part in path:
        if isinstance(part, int):
            continue
        annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [model for annotation in annotations for model in _models_in(annotation)]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
