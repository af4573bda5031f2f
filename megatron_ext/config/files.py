"""Config files: read, inherit, override, validate; write resolved.

    config = load_config("configs/models/llama_2b.yaml", ["rope.base=5e5", "parallel.tensor=2"])
    save_config(config, "runs/llama_2b/config.yaml")

`base: other.yaml` (or a list, the later wins) inherits from files, relative to the file that says
so; sections are merged key by key, the inheriting file wins, overrides win over all. null takes a
setting back to its default. Refuses, as ConfigError with file and line: what is not readable YAML,
unknown keys, wrong types, values out of range, cycles, and what `rules.py` refuses.
"""

import contextlib
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_tools.files import write_file
from megatron_ext.config.messages import explain
from megatron_ext.config.rules import validate
from megatron_ext.config.schema import Config
from megatron_ext.config.yaml_text import KeyPath, Layer, Place, dump, read_mapping, read_value
from megatron_ext.errors import ConfigError

PathLike = str | Path


def load_config(path: PathLike, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a file and `a.b=c` overrides, checked by every rule for its own
    parallel.world_size. Raises ConfigError with one sentence."""
    path = Path(path)
    layer = merge(read_layer(path), read_overrides(overrides))
    layer.values.setdefault("training", {})
    if isinstance(layer.values["training"], dict):
        layer.values["training"].setdefault("run_dir", str(Path("runs") / path.stem))
    config = to_config(layer, str(path))
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def named_run_dir(path: PathLike, overrides: Sequence[str] = ()) -> Path:
    """The run folder that a file and overrides name, as far as it can be told where they have
    mistakes: so that somebody who looks there finds them."""
    layers = [partial(read_overrides, [override]) for override in reversed(overrides)]
    for read in (*layers, partial(read_layer, Path(path))):
        with contextlib.suppress(ConfigError):
            named = _mapping(read().values.get("training")).get("run_dir")
            if isinstance(named, str):
                return Path(named)
    return Path("runs") / Path(path).stem


def to_config(layer: Layer, name: str) -> Config:
    """Types, ranges and names checked; raises ConfigError naming the place of the first mistake.

    Goes through JSON, because pydantic's strict mode then means what a file means: a string is
    never a number, true is not 1, a list is a tuple, a string is a path.
    """
    values = _without_null(layer.values)
    for section, info in Config.model_fields.items():
        if info.is_required():  # so that its first missing setting is named, not the section
            values.setdefault(section, {})
    try:
        return Config.model_validate_json(json.dumps(values), strict=True).resolved()
    except ValidationError as error:
        raise ConfigError(explain(error, values, layer.places, name)) from None


def save_config(config: Config, path: PathLike) -> None:
    """Write every setting; `load_config(path)` gives back an equal config. The file appears whole
    or not at all."""
    text = "# Every setting of the run, resolved.\n" + dump(config.model_dump(mode="json"))
    write_file(path, text)


def read_layer(path: Path, heirs: tuple[Path, ...] = ()) -> Layer:
    """A file merged over its bases. `heirs`: the files that inherit from it, to catch a cycle."""
    if path.resolve() in [heir.resolve() for heir in heirs]:
        chain = " -> ".join(str(file) for file in (*heirs, path))
        raise ConfigError(f"{path} inherits from itself: {chain}; remove one `base:`")
    own = read_mapping(read_text(path), str(path))
    bases = own.values.pop("base", None)
    place = own.places.get(("base",), Place(str(path), ""))
    if bases is None:
        return own
    bases = bases if isinstance(bases, list) else [bases]
    merged = Layer()
    for base in bases:
        if not isinstance(base, str):
            raise ConfigError(
                f"{place.source}: base={place.text or base} is no file name: write "
                "`base: other.yaml`, or under `rope:` if RoPE's base is meant"
            )
        file = Path(os.path.normpath(path.parent / base))
        if not file.exists():
            raise ConfigError(
                f"{place.source}: base={base} does not exist: it is looked for at {file}"
                + _similar(file)
            )
        merged = merge(merged, read_layer(file, (*heirs, path)))
    return merge(merged, own)


def read_overrides(overrides: Sequence[str]) -> Layer:
    """All `a.b=c` of a command line as one layer; of two for the same key the later wins."""
    merged = Layer()
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not equals or not all(keys):
            raise ConfigError(f"override '{override}' is not of the form section.setting=value")
        if not text.strip():
            raise ConfigError(
                f"override '{override}' has no value: write {key}=null for the default"
            )
        if keys == ("base",):
            raise ConfigError(
                f"override '{override}': a base file is named inside a config file; for RoPE's "
                f"base write rope.base={text}"
            )
        value = read_value(text, key)
        place = Place(f"override '{override}'", text)
        nested: Any = value
        for part in reversed(keys):
            nested = {part: nested}
        places = {keys[:n]: Place(place.source, "") for n in range(1, len(keys))}
        places |= _places(keys, value, place)
        merged = Layer(_merged(merged.values, nested), {**merged.places, **places})
    return merged


def merge(lower: Layer, upper: Layer) -> Layer:
    """Key by key, the upper wins, except that one choice is not mixed with another: the rule of
    rope.scaling with the parameters of a different rule, training.steps with training.tokens."""
    values = dict(lower.values)
    budget = {"steps", "tokens"}
    training = _mapping(values.get("training"))
    if any(_mapping(upper.values.get("training")).get(key) is not None for key in budget):
        values["training"] = {k: v for k, v in training.items() if k not in budget}
    rope = _mapping(values.get("rope"))
    rule = _mapping(_mapping(upper.values.get("rope")).get("scaling")).get("type")
    if rule is not None and rule != _mapping(rope.get("scaling")).get("type"):
        values["rope"] = {k: v for k, v in rope.items() if k != "scaling"}
    return Layer(_merged(values, upper.values), {**lower.places, **upper.places})


def read_text(path: Path) -> str:
    """The file's text, or one sentence about why there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist{_similar(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: name a config file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {data[error.start]:#04x} at {error.start}): "
            "name a YAML file, saved as UTF-8"
        ) from None


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            result[key] = _merged(below, value)
        elif not (isinstance(below, dict) and value is None and key in Config.model_fields):
            result[key] = value  # a section left empty changes nothing
    return result


def _without_null(value: Any) -> Any:
    """null is the default: dropped here, so that the schema fills it in."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value


def _places(path: KeyPath, value: Any, place: Place) -> dict[KeyPath, Place]:
    """The place of an override for its value and everything within."""
    places = {path: place}
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            text = item if isinstance(item, str) else json.dumps(item)
            places.update(_places((*path, str(key)), item, Place(place.source, text)))
    return places


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _similar(path: Path) -> str:
    """ "; is it NAME?" when a file beside it is spelt alike."""
    try:
        names = sorted(file.name for file in path.parent.iterdir())
    except OSError:
        return ""
    close: list[str] | None = difflib.get_close_matches(path.name, names, n=1)
    return f"; is it {path.parent / close[0]}?" if close else ""
