"""The list of all settings, read off the schema: for messages, the JSON Schema and the docs.

    for setting in settings():
        setting.name, setting.kind, setting.default, setting.unit, setting.meaning
    find(("rope", "base"))

A part of a name that is free to choose, such as a corpus' name, stands as NAME.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.schema import Config
from megatron_ext.config.yaml_text import KeyPath

_KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false"}
_LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


@dataclass(frozen=True)
class Setting:
    """One setting, described in words."""

    path: KeyPath
    """Its section and names, such as ("rope", "base")."""
    rule: str
    """The rope.scaling.type that has this parameter; "" for all other settings."""
    required: bool
    """Whether a config must give it."""
    schema: dict[str, Any]
    """Its JSON Schema."""

    @property
    def name(self) -> str:
        """Dotted, as in an override."""
        return ".".join(self.path)

    @property
    def choices(self) -> list[str]:
        """The values allowed when only some words are, else nothing."""
        if "const" in self.schema:
            return [self.schema["const"]]
        return list(
            self.schema.get("enum", self.schema.get("discriminator", {}).get("mapping", []))
        )

    @property
    def item_choices(self) -> list[str]:
        """The words allowed in a list of some words, else nothing."""
        return list(self.schema.get("items", {}).get("enum", []))

    @property
    def kind(self) -> str:
        """Its type and range, such as `whole number above 0`."""
        if self.choices and "oneOf" not in self.schema:
            return " | ".join(self.choices)
        return _kind(self.schema)

    @property
    def default(self) -> str:
        """What it is when it is not given, as YAML or in words; "" when it must be given."""
        if "unset" in self.schema:
            return self.schema["unset"]
        if self.required:
            return ""
        value = self.schema.get("default")
        return "unset" if value is None else json.dumps(value).replace('"', "")

    @property
    def unit(self) -> str:
        return self.schema.get("unit", "")

    @property
    def meaning(self) -> str:
        """Its documentation, in one line."""
        return " ".join(self.schema.get("description", "").split())

    @property
    def example(self) -> str | None:
        """A value that one could write, as YAML."""
        examples = self.schema.get("examples")
        return json.dumps(examples[0]).strip('"') if examples else None


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Every setting, section by section, in the order of the schema."""
    return tuple(_walk(root_schema()["properties"], root_schema()["$defs"], (), ""))


def find(path: KeyPath, rule: str = "") -> Setting | None:
    """The setting at a path, or None when there is no such setting (a section is none)."""
    for setting in settings():
        if _matches(setting.path, path) and (not setting.rule or setting.rule == rule):
            return setting
    return None


def names_in(path: KeyPath, rule: str = "") -> list[str]:
    """The names that may stand directly under a section."""
    names: dict[str, None] = {}
    for setting in settings():
        inside = len(setting.path) > len(path) and _matches(setting.path[: len(path)], path)
        if inside and (not setting.rule or not rule or setting.rule == rule):
            names[setting.path[len(path)]] = None
    return list(names)


@functools.cache
def root_schema() -> dict[str, Any]:
    """pydantic's JSON Schema of a whole config."""
    return Config.model_json_schema()


def section_meaning(name: str) -> str:
    """The docstring of a section."""
    return " ".join((Config.model_fields[name].annotation.__doc__ or "").split())


def _walk(
    properties: dict[str, Any],
    definitions: dict[str, Any],
    path: KeyPath,
    rule: str,
    required: tuple[str, ...] = (),
) -> list[Setting]:
    found = []
    for name, schema in properties.items():
        here = (*path, name)
        inner = schema.get("additionalProperties")
        if "$ref" in schema:
            found += _section(schema["$ref"], definitions, here, rule)
            continue
        must = name in required and "unset" not in schema
        found.append(Setting(here, rule, must, schema))
        if isinstance(inner, dict) and "$ref" in inner:
            found += _section(inner["$ref"], definitions, (*here, "NAME"), rule)
        for type_name, reference in schema.get("discriminator", {}).get("mapping", {}).items():
            found += _section(reference, definitions, here, type_name)
    return found


def _section(
    reference: str, definitions: dict[str, Any], path: KeyPath, rule: str
) -> list[Setting]:
    definition = definitions[reference.rsplit("/", 1)[1]]
    needed = tuple(definition.get("required", ()))
    return _walk(definition["properties"], definitions, path, rule, needed)


def _matches(pattern: KeyPath, path: KeyPath) -> bool:
    return len(pattern) == len(path) and all(
        a in (b, "NAME") for a, b in zip(pattern, path, strict=True)
    )


def _kind(schema: dict[str, Any]) -> str:
    if "oneOf" in schema or schema.get("type") == "object":
        return "mapping"
    if "anyOf" in schema:  # a value or nothing
        return " or ".join(_kind(part) for part in schema["anyOf"] if part.get("type") != "null")
    if schema.get("type") == "array":
        words = schema["items"].get("enum")
        return f"list of {', '.join(words)}" if words else f"list, each a {_kind(schema['items'])}"
    if schema.get("type") == "string":
        return "path" if schema.get("format") == "path" else "text"
    limits = [f"{word} {schema[key]:g}" for key, word in _LIMITS.items() if key in schema]
    return " ".join([_KINDS[schema["type"]], " and ".join(limits)]).strip()
