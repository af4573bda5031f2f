"""YAML as config files mean it: numbers in every spelling, a line for every value, no key twice.

    layer = read_mapping(Path("run.yaml").read_text(), "run.yaml")
    layer.values["rope"]["base"], layer.places["rope", "base"]     # 500000, run.yaml:3, text 5e5
    read_value("5e5", "rope.base"), dump(values)

PyYAML's own rules (YAML 1.1) read 5e5 and 1e-4 as strings, 1:30 as 90 and `no` as false. Here a
plain scalar is null, true, false, a number, or else a string; keys are always strings. Refuses (as
ConfigError) duplicate keys, tags, aliases that contain themselves, and whatever is not YAML.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_ext.errors import ConfigError

Scalar = bool | int | float | str | None
KeyPath = tuple[str, ...]

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBER = re.compile(
    rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?P<exponent>[eE][-+]?[0-9]+)?"
)
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", "inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-inf"), float("-inf")),
    **dict.fromkeys((".nan", "nan"), float("nan")),
}


@dataclass(frozen=True)
class Place:
    """Where a value was written, and how."""

    source: str  # "configs/run.yaml:12" or "override 'rope.base=5e5'"
    text: str  # the scalar as written; "" for a mapping or a list


@dataclass(frozen=True)
class Layer:
    """The settings of one file or of one command line."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)


def parse_scalar(text: str) -> Scalar:
    """A plain (unquoted) scalar: null, true, false, a number, or else the text itself.

    A number without a fraction is an int however it is spelt: 1_000, 5e5 and 2.0 among them, so
    that 1e12 can be a count; 5e-5, 0.1 and 1e400 (infinity) are floats.
    """
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return text
    digits = text.replace("_", "")
    if digits.lstrip("+-").isdecimal() and len(digits) <= 4000:  # Python's limit is 4300
        return int(digits)
    number = float(digits)
    # Beyond 2^53 a float is no longer a count that someone meant.
    return int(number) if abs(number) <= 2**53 and number.is_integer() else number


def read_mapping(text: str, name: str) -> Layer:
    """The one mapping that a YAML text holds, with the place of every value."""
    node = _compose(text, name)
    if node is None:
        raise ConfigError(
            f"{name} is empty: write sections such as `model:`, or `base: other.yaml`"
        )
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(
            f"{name} holds {kind} at its top level: write sections such as `model:` and `rope:`"
        )
    places: dict[KeyPath, Place] = {}
    values = _plain(node, name, (), places, ())
    return Layer(values, places)


def read_value(text: str, key: str) -> Any:
    """The value of an override `key=text`, read with the same rules as a file's."""
    node = _compose(text, f"override '{key}={text}'", lines=False)
    if node is None:
        return None
    return _plain(node, f"override '{key}={text}'", (), {}, (), lines=False)


def dump(values: dict[str, Any]) -> str:
    """YAML that `read_mapping` reads back to equal values."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, indent=2
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's syntax; what a scalar means is left to `parse_scalar`."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "text"
        return "collection"


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> yaml.Node:
        # PyYAML would leave unquoted what only our numbers are, and the line break U+0085.
        quoted = not isinstance(parse_scalar(text), str) or not text.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)

    def represent_in_one_line(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_in_one_line)


def _compose(text: str, name: str, lines: bool = True) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark and lines else name
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{where} is not readable as YAML: {problem}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{name} is not readable as YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply: a setting is a.b or a.b.c") from None


def _plain(
    node: yaml.Node,
    name: str,
    path: KeyPath,
    places: dict[KeyPath, Place],
    inside: tuple[Hashable, ...],
    lines: bool = True,
) -> Any:
    """Node to plain values; fills `places`. `inside` holds the nodes above, to catch a cycle."""
    where = f"{name}:{node.start_mark.line + 1}" if lines else name
    if node.tag not in ("plain", "text", "collection"):
        raise ConfigError(f"{where}: the tag {node.tag!r} has no meaning here: leave it out")
    if id(node) in inside or len(inside) > 50:
        raise ConfigError(f"{where}: an alias contains itself: write the values out")
    inside = (*inside, id(node))
    if isinstance(node, yaml.ScalarNode):
        _check_text(node.value, where)
        places[path] = Place(where, node.value)
        return parse_scalar(node.value) if node.tag == "plain" else node.value
    places[path] = Place(where, "")
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, name, (*path, str(i)), places, inside, lines)
            for i, item in enumerate(node.value)
        ]
    result: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{name}:{line}" if lines else name
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key is a list or a mapping: write a name")
        key = key_node.value
        _check_text(key, where)
        if key in result:
            raise ConfigError(
                f"{where}: {key!r} is given a second time, after line {first[key]}: keep one"
            )
        first[key] = line
        result[key] = _plain(value_node, name, (*path, key), places, inside, lines)
        # A value's line is its key's, also where a section begins on the line after.
        value_path = (*path, key)
        places[value_path] = Place(where, places[value_path].text)
    return result


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{where}: {text!r} holds half a character (a surrogate): write plain UTF-8 text"
        ) from None
