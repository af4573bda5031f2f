"""A setting that no code reads misleads whoever sets it: every field of the schema must be read
somewhere outside megatron_ext/config."""

import ast
import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest

from megatron_ext.config import Config, load_config
from megatron_ext.errors import ConfigError
from megatron_ext.rope.frequencies import RopeScaling
from tests.conftest import ROOT

# What acts within megatron_ext/config itself: the rule that judges, the budget that becomes steps.
SPENT_IN_CONFIG = {"rope.bound", "training.tokens"}

SECTIONS = {name: info.annotation for name, info in Config.model_fields.items()}
CLASSES = {cls.__name__: name for name, cls in SECTIONS.items()}  # Model -> model


def settings_read(sources: Iterable[str]) -> set[str]:
    """`section.field` for every field that the sources read: as `x.section.field`, or as
    `name.field` where the same function bound `name` to `x.section` or took it as a parameter of
    the section's class. Writing an attribute, or one of another object, does not count."""
    found: set[str] = set()
    for source in sources:
        tree = ast.parse(source)
        _read_in(tree, {}, found)
    return found


def _read_in(scope: ast.AST, outer: dict[str, str], found: set[str]) -> None:
    names = dict(outer)
    inner: list[ast.AST] = []
    nodes: list[ast.AST] = []
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        arguments = scope.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            names.pop(argument.arg, None)
            annotation = argument.annotation
            if isinstance(annotation, ast.Name) and annotation.id in CLASSES:
                names[argument.arg] = CLASSES[annotation.id]
            elif isinstance(annotation, ast.Attribute) and annotation.attr in CLASSES:
                names[argument.arg] = CLASSES[annotation.attr]
    stack = list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner.append(node)
            continue
        nodes.append(node)
        stack += ast.iter_child_nodes(node)
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _bind(target, node.value, names)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            _bind(node.target, node.value, names)
        elif isinstance(node, (ast.For, ast.comprehension)) and "corpora" in _attributes(node.iter):
            for name in ast.walk(node.target):
                if isinstance(name, ast.Name):
                    names[name.id] = "data.corpora"
    for node in nodes:
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
            continue
        owner = node.value
        if isinstance(owner, ast.Attribute) and owner.attr in SECTIONS:
            found.add(f"{owner.attr}.{node.attr}")
        elif isinstance(owner, ast.Name) and owner.id in names:
            found.add(f"{names[owner.id]}.{node.attr}")
    for function in inner:
        _read_in(function, names, found)


def _bind(target: ast.AST, value: ast.AST, names: dict[str, str]) -> None:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its_value in zip(target.elts, value.elts, strict=False):
            _bind(one, its_value, names)
    elif isinstance(target, ast.Name):
        if isinstance(value, ast.Attribute) and value.attr in SECTIONS:
            names[target.id] = value.attr
        else:
            names.pop(target.id, None)


def _attributes(node: ast.AST) -> set[str]:
    return {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def all_settings() -> set[str]:
    fields = {f"{s}.{field}" for s, cls in SECTIONS.items() for field in cls.model_fields}
    return fields | {"data.corpora.path", "data.corpora.weight"}


def readers() -> list[str]:
    files = [ROOT / "pretrain.py", *(ROOT / "megatron_ext").rglob("*.py")]
    outside = [f for f in files if "config" not in f.relative_to(ROOT).parts[:-1]]
    assert len(outside) > 20
    return [file.read_text() for file in outside]


def test_every_setting_is_read() -> None:
    assert sorted(all_settings() - settings_read(readers()) - SPENT_IN_CONFIG) == []


def test_what_config_spends_itself_has_an_effect(valid: Path) -> None:
    assert load_config(valid, ["training.tokens=1e6"]).training.steps == 489
    with pytest.raises(ConfigError):
        load_config(valid, ["rope.bound=expect_violation"])


@pytest.mark.parametrize("rule", get_args(RopeScaling), ids=lambda cls: cls.__name__)
def test_every_parameter_of_a_scaling_rule_is_read_by_its_formula(rule: type) -> None:
    tree = ast.parse(inspect.getsource(rule))
    checks = {"__post_init__", "to_hf"}  # neither is the formula
    formula = [
        n for n in tree.body[0].body if isinstance(n, ast.FunctionDef) and n.name not in checks
    ]
    read = {
        node.attr
        for function in formula
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    if "getattr(self, name)" in ast.unparse(formula):
        read |= {
            node.value
            for function in formula
            for node in ast.walk(function)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    unread = {field.name for field in dataclasses.fields(rule)} - read - {"type"}
    assert not unread


# The checker itself.


def test_the_checker_misses_a_field_that_nobody_reads() -> None:
    fields = {"model.num_layers", "model.fake"}
    assert fields - settings_read(["print(config.model.num_layers)"]) == {"model.fake"}


@pytest.mark.parametrize(
    "source",
    [
        "config.model.fake",
        "a.b.config.model.fake + 1",
        "model = config.model\nmodel.fake",
        "def f(config):\n    m, p = config.model, config.parallel\n    return m.fake",
        "def f(config):\n    m = config.model\n    def g():\n        return m.fake\n    return g",
        "def f(m: Model): return m.fake",
        "def f(m: config.Model): return m.fake",
        "[config.model.fake for _ in x]",
        "(m := config.model).fake\nm.fake",
    ],
)
def test_the_checker_sees_a_read(source: str) -> None:
    assert "model.fake" in settings_read([source])


@pytest.mark.parametrize(
    "source",
    [
        "'config.model.fake'",
        "# config.model.fake",
        "config.model.fake = 3",
        "del config.model.fake",
        "options.fake",
        "model.fake",
        "fake = config.model",
        "config.parallel.fake",
        "def f(config):\n    m = config.model\ndef g(m):\n    return m.fake",
        "def f(config):\n    m = config.parallel\n    return m.fake",
        "config.model_fake",
        "setattr(config.model, 'fake', 1)",
    ],
)
def test_the_checker_is_not_fooled(source: str) -> None:
    assert "model.fake" not in settings_read([source])


def test_the_checker_sees_a_corpus() -> None:
    source = "for name, corpus in config.data.corpora.items():\n    print(corpus.path)"
    assert settings_read([source]) >= {"data.corpora", "data.corpora.path"}
