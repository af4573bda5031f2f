"""The JSON Schema against jsonschema and every shipped config; the page against the schema."""

import json
from pathlib import Path

import jsonschema
import pytest

from megatron_ext.config import Config, load_config
from megatron_ext.config.files import read_layer
from megatron_ext.config.reference import json_schema, markdown
from megatron_ext.config.settings import settings
from tests.conftest import ROOT

# Files of settings; a sweep has a form of its own.
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "sweeps")


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_json() -> None:
    assert json.loads(json.dumps(json_schema())) == json_schema()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_schema_accepts_every_shipped_config_inherited(
    file: Path, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(read_layer(file).values)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_schema_accepts_every_shipped_file_as_an_editor_reads_it(
    file: Path, validator: jsonschema.Draft202012Validator
) -> None:
    yaml = pytest.importorskip("yaml")
    validator.validate(yaml.safe_load(file.read_text()))


def test_the_schema_accepts_a_resolved_config(
    valid: Path, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(load_config(valid).model_dump(mode="json"))


@pytest.mark.parametrize(
    "given",
    [
        {"modle": {}},
        {"model": {"num_layer": 3}},
        {"model": {"num_layers": 0}},
        {"model": {"num_layers": "four"}},
        {"rope": {"base": 1}},
        {"rope": {"bound": "maybe"}},
        {"rope": {"scaling": {"factor": 2}}},
        {"rope": {"scaling": {"type": "linear", "beta_fast": 2}}},
        {"parallel": {"sequence": "yes"}},
        {"data": {"corpora": {"a": {"paht": "x"}}}},
        {"base": 5},
    ],
)
def test_the_schema_refuses(given: dict, validator: jsonschema.Draft202012Validator) -> None:
    assert not validator.is_valid(given)


@pytest.mark.parametrize(
    "given",
    [
        {"base": ["a.yaml", "b.yaml"], "model": {"num_layers": "1_000"}},
        {"rope": {"base": "5e5", "scaling": {"type": "linear", "factor": "2.5"}}},
        {"model": {"head_dim": None}, "optimizer": None, "rope": {"scaling": None}},
        {"data": {"corpora": {"a": {"path": "x"}, "b": None}}},
    ],
)
def test_the_schema_accepts(given: dict, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(given)


def test_the_page_is_up_to_date() -> None:
    """Else: megatron-ext schema --markdown > docs/config.md"""
    assert (ROOT / "docs/config.md").read_text() == markdown() + "\n"


def test_the_page_has_every_setting() -> None:
    page = markdown()
    for section, info in Config.model_fields.items():
        for name in info.annotation.model_fields:  # type: ignore[union-attr]
            assert f"| `{section}.{name}` |" in page


def test_every_setting_says_what_it_means() -> None:
    assert len(settings()) > 60
    for setting in settings():
        assert len(setting.meaning) > 10, setting.name
        assert setting.required or setting.default, setting.name
        assert not setting.required or setting.rule or setting.example, setting.name
