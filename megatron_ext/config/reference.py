"""What editors and readers get of the schema: a JSON Schema for config files, a page of docs.

    json.dumps(json_schema())     # megatron-ext schema
    markdown()                    # megatron-ext schema --markdown > docs/config.md

Both are made from `schema.py` alone. The JSON Schema is that of a file, not of a whole run: a file
may leave anything to its `base`, so nothing is required; null stands for a default everywhere.
"""

from typing import Any, get_args

from megatron_ext.config.schema import Config
from megatron_ext.config.settings import Setting, root_schema, section_meaning, settings
from megatron_ext.rope.frequencies import RopeScaling

_BASE = {
    "description": "Config files to inherit from, relative to this file; the later wins.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
# Keys of our own and pydantic's that JSON Schema does not know.
_OURS = ("unit", "unset", "discriminator", "title")

# YAML readers of editors take 5e5 and 1_000 for text; this program takes them for numbers.
_SPELT_NUMBER = {"type": "string", "pattern": r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?$"}


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file."""
    whole = root_schema()
    definitions = {name: _of_file(part) for name, part in whole["$defs"].items()}
    sections = {name: _or_null(part) for name, part in whole["properties"].items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megatron-ext config",
        "description": "A file given to pretrain.py.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"base": _BASE, **{k: _cleaned(v) for k, v in sections.items()}},
        "$defs": definitions,
    }


def markdown() -> str:
    """docs/config.md: every setting with type, default, unit and meaning."""
    lines = [_PREFACE]
    for section in Config.model_fields:
        lines += [f"## {section}", "", section_meaning(section), ""]
        mine = [s for s in settings() if s.path[0] == section]
        lines += _table([s for s in mine if not s.rule])
        for rule in dict.fromkeys(s.rule for s in mine if s.rule):
            lines += [f"### rope.scaling of type {rule}", "", rule_meaning(rule), ""]
            lines += _table([s for s in mine if s.rule == rule and s.path[-1] != "type"])
    return "\n".join(lines).rstrip()


def rule_meaning(rule: str) -> str:
    """The first paragraph of a scaling rule's docstring."""
    [cls] = [cls for cls in get_args(RopeScaling) if cls.type == rule]
    return " ".join(cls.__doc__.split("\n\n")[0].split())


def _table(rows: list[Setting]) -> list[str]:
    if not rows:
        return []
    lines = ["| setting | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        default = "**required**" if row.required else row.default
        if row.path in (("training", "steps"), ("training", "tokens")):
            default = f"{row.default} (one of the two is required)"
        cells = (f"`{row.name}`", row.kind, default, row.unit, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _of_file(definition: dict[str, Any]) -> dict[str, Any]:
    """A section as a file may give it."""
    properties = {
        name: _or_null(_spelt(_described(part))) for name, part in definition["properties"].items()
    }
    rest = {k: v for k, v in definition.items() if k not in ("properties", "required", "title")}
    # A rule of rope.scaling is told by its type, so there the type must stand.
    if "const" in definition["properties"].get("type", {}):
        properties["type"] = _cleaned(definition["properties"]["type"])
        rest["required"] = ["type"]
    return {**rest, "properties": properties}


def _described(part: dict[str, Any]) -> dict[str, Any]:
    """With unit and derived default in the description, which is what an editor shows."""
    text = " ".join(part.get("description", "").split())
    notes = [part["unit"]] if "unit" in part else []
    notes += [f"unset: {part['unset']}"] if "unset" in part else []
    if isinstance(part.get("additionalProperties"), dict):  # null takes a corpus out of the blend
        part = {**part, "additionalProperties": _or_null(part["additionalProperties"])}
    return _cleaned({**part, "description": f"{text} [{'; '.join(notes)}]" if notes else text})


def _spelt(part: dict[str, Any]) -> dict[str, Any]:
    """A number in every spelling that the config reader takes."""
    if part.get("type") not in ("integer", "number"):
        return part
    outer = {k: v for k, v in part.items() if k in ("description", "default", "examples")}
    number = {k: v for k, v in part.items() if k not in outer}
    return {**outer, "anyOf": [number, _SPELT_NUMBER]}


def _or_null(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("anyOf"):
        return {**part, "anyOf": [*(p for p in part["anyOf"] if p != _NULL), _NULL]}
    outer = {k: v for k, v in part.items() if k in ("description", "default", "examples")}
    inner = {k: v for k, v in part.items() if k not in outer}
    return {**outer, "anyOf": [inner, _NULL]}


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _cleaned(v) for k, v in value.items() if k not in _OURS}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


_NULL = {"type": "null"}

_PREFACE = """\
# Every setting

Made by `megatron-ext schema --markdown > docs/config.md`; a test fails when it is out of date.

A config is a YAML file of the sections below, shown here by their dotted names.

- `base: other.yaml` (or a list of files, the later wins) inherits: paths are relative to the file,
  sections are merged key by key, the inheriting file wins.
- `python pretrain.py run.yaml rope.base=5e5 parallel.tensor=2`: the command line wins over files.
- Numbers are written as you like: `5e5`, `1e-4`, `1_000_000`; a whole number may be `1e12`.
- `null` takes a setting back to its default.
- The run folder's `config.yaml` holds every setting, resolved; it is itself a config file.
- For completion in an editor: `megatron-ext schema > config.schema.json`, and at the top of a file
  `# yaml-language-server: $schema=config.schema.json`.
"""
