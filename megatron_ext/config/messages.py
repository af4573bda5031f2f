"""pydantic's complaints as one sentence: place, setting, value, what is allowed instead.

    explain(error, values, places, "run.yaml")
    # run.yaml:12: optimizer.lr=-1e-4 must be a number above 0
    # run.yaml:3: model.num_layer is no setting: did you mean model.num_layers?

Of several mistakes it names the first, misspelt names before all others (a misspelt name is often
why another is missing), and how many there are.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_ext.config.settings import find, names_in, settings
from megatron_ext.config.yaml_text import KeyPath, Place, parse_scalar

_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
_NO_TYPE = {"union_tag_not_found", "union_tag_invalid"}


def explain(
    error: ValidationError, values: dict[str, Any], places: Mapping[KeyPath, Place], name: str
) -> str:
    """The sentence for the first mistake of a config called `name`."""
    # Not called: the value would follow from one that is itself mistaken.
    details = [d for d in error.errors() if d["type"] != "default_factory_not_called"]
    if {d["loc"][-1:] for d in details} >= {("steps",), ("tokens",)}:  # one mistake, not two
        details = [d for d in details if d["loc"] != ("training", "tokens")]
    details.sort(key=lambda d: 0 if d["type"] in _UNKNOWN else 2 if d["type"] in _MISSING else 1)
    sentence = _sentence(details[0], values, places, name)
    return sentence + (f" (the first of {len(details)} mistakes)" if len(details) > 1 else "")


def _sentence(
    detail: ErrorDetails, values: dict[str, Any], places: Mapping[KeyPath, Place], name: str
) -> str:
    path = _path(detail["loc"], values)
    dotted = ".".join(path)
    place = _place(path, places, name)
    kind = detail["type"]
    rule = _rule(path, values)
    if kind in _UNKNOWN:
        return f"{place.source}: {dotted} is no setting: {_nearest(path, rule)}"
    if kind in _MISSING:
        return f"{place.source}: {_missing(path, rule)}"
    if kind in _NO_TYPE:
        return f"{place.source}: {_no_type(dotted, detail['input'])}"
    if kind == "value_error":
        return f"{place.source}: {dotted}: {detail['ctx']['error']}"
    value = place.text or _yaml(detail["input"])
    setting = find(path, rule)
    if kind in ("model_type", "dict_type", "dataclass_type", "model_attributes_type"):
        names = ", ".join(names_in(path, rule)[:4]) or "name: {path: ..}"
        return f"{place.source}: {dotted}={value} must be a mapping of settings ({names}, ..)"
    if setting is None:  # an item of a list
        setting = find(path[:-1], rule)
        wanted = setting.kind.partition("each a ")[2] if setting else detail["msg"]
        choices = setting.item_choices if setting else []
    else:
        wanted, choices = setting.kind, setting.choices
    close = difflib.get_close_matches(value, choices, n=1)
    if choices:
        wanted = "one of " + ", ".join(choices)
    elif wanted.startswith(("whole", "number", "path", "list", "mapping")):
        wanted = "a " + wanted
    hint = f"; did you mean {close[0]}?" if close else _hint(detail["input"], wanted)
    return f"{place.source}: {dotted}={value} must be {wanted}{hint}"


def _path(loc: tuple[Any, ...], values: Any) -> KeyPath:
    """pydantic's location without the name of the union's branch (rope.scaling.yarn.factor)."""
    path: list[str] = []
    for i, part in enumerate(loc):
        inside = isinstance(values, dict) and part in values
        if not inside and isinstance(part, str) and i and loc[i - 1] == "scaling":
            continue
        path.append(str(part))
        values = values[part] if inside else None
    return tuple(path)


def _place(path: KeyPath, places: Mapping[KeyPath, Place], name: str) -> Place:
    """Where the value stands, or the nearest section around it."""
    if path in places:
        return places[path]
    for n in range(len(path) - 1, 0, -1):
        if path[:n] in places:
            return Place(places[path[:n]].source, "")
    return Place(name, "")


def _rule(path: KeyPath, values: dict[str, Any]) -> str:
    """The type of rope.scaling, where its parameters are meant."""
    if path[:2] != ("rope", "scaling"):
        return ""
    scaling = values["rope"]["scaling"]
    return str(scaling.get("type", "")) if isinstance(scaling, dict) else ""


def _nearest(path: KeyPath, rule: str) -> str:
    *section, wrong = path
    here = names_in(tuple(section), rule)
    close = difflib.get_close_matches(wrong, here, n=1)
    if close:
        return f"did you mean {'.'.join((*section, close[0]))}?"
    # The right name in the wrong section, or a section's setting at the top level.
    leaves = {s.path[-1]: s.name for s in reversed(settings()) if not s.rule}
    elsewhere = difflib.get_close_matches(wrong, leaves, n=1, cutoff=0.75)
    if elsewhere:
        return f"did you mean {leaves[elsewhere[0]]}?"
    owner = f"{'.'.join(section)} has" if section else "the sections are"
    if rule:
        owner = f"{'.'.join(section)} of type {rule} has"
    return f"{owner} {', '.join(here)}"


def _missing(path: KeyPath, rule: str) -> str:
    dotted = ".".join(path)
    if path == ("training", "steps"):
        return (
            "the length of the run is missing: write training.steps, for example 1000, or "
            "training.tokens, for example 1e9"
        )
    setting = find(path, rule)
    example = setting.example if setting else None
    wanted = f" ({setting.kind})" if setting else ""
    what = f"write it, for example {path[-1]}: {example}" if example else f"write {path[-1]}: .."
    return f"{dotted} is missing: {what}{wanted}"


def _no_type(dotted: str, given: Any) -> str:
    setting = find(("rope", "scaling"))
    rules = setting.choices if setting else []
    wrong = given.get("type") if isinstance(given, dict) else None
    close = difflib.get_close_matches(str(wrong), rules, n=1)
    if wrong is None:
        return f"{dotted}.type is missing: write one of {', '.join(rules)}"
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{dotted}.type={_yaml(wrong)} must be one of {', '.join(rules)}{hint}"


def _hint(given: Any, wanted: str) -> str:
    if isinstance(given, str) and "number" in wanted:
        meant = parse_scalar(given.strip())
        if isinstance(meant, (int, float)) and not isinstance(meant, bool):
            return ": write it without quotes"
    return ""


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
