"""What a YAML text means here, against Python's own reading of numbers."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.yaml_text import dump, parse_scalar, read_mapping, read_value
from megatron_ext.errors import ConfigError

# Every text that YAML can carry: no surrogates; dump escapes what is not printable.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5e5", 500000), ("5.0e5", 500000), ("5.e5", 500000), ("5E+5", 500000), ("1e-4", 1e-4),
        ("1_000_000", 1000000), ("1_000.5", 1000.5), ("1e12", 10**12), ("-3", -3), ("+3", 3),
        (".5", 0.5), ("-.5e1", -5), ("2.0", 2), ("0", 0), ("1.5e-07", 1.5e-7),
        ("125_696", 125696), (".inf", math.inf), ("1e400", math.inf),
    ],
)  # fmt: skip
def test_every_spelling_of_a_number(text: str, number: float) -> None:
    for value in (read_value(text, "x"), read_mapping(f"x: {text}", "f").values["x"]):
        assert value == number
        assert isinstance(value, int) == (math.isfinite(number) and float(number).is_integer())


@pytest.mark.parametrize(
    "text", ["1:30", "1_", "_1", "1__0", "e5", "1e", "0x10", "1.2.3", "5e5m", "2024-01-01", "yes"]
)
def test_what_looks_like_a_number_but_is_text(text: str) -> None:
    assert read_value(text, "x") == text


@given(FINITE, st.sampled_from(["{!r}", "{:.17e}", "{:.17E}", "{:+.17e}", "{:.17g}"]))
def test_any_float_in_any_format_reads_back(number: float, form: str) -> None:
    assert parse_scalar(form.format(number)) == number


@given(st.integers())
def test_any_integer_reads_back_grouped_or_not(number: int) -> None:
    assert parse_scalar(str(number)) == number
    assert parse_scalar(f"{number:_}") == number


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_dump_reads_back(values: dict) -> None:
    assert read_mapping(dump(values), "f").values == values


@given(TEXT)
def test_quoted_text_stays_text(text: str) -> None:
    quoted = yaml.dump({"x": text}, default_style='"', allow_unicode=True)
    assert read_mapping(quoted, "f").values["x"] == text


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        read_mapping(text, "f")
    except ConfigError as error:
        sentence = str(error)
    else:
        return
    assert "\n" not in sentence


def test_every_value_knows_its_line_and_spelling() -> None:
    layer = read_mapping("a:\n  b: 5e5\n\n  c:\n    - 1\n    - 2\nd: x\n", "f.yaml")
    assert layer.places["a", "b"].source == "f.yaml:2"
    assert layer.places["a", "b"].text == "5e5"
    assert layer.places["a", "c"].source == "f.yaml:4"
    assert layer.places["a", "c", "1"].source == "f.yaml:6"
    assert layer.places["d",].source == "f.yaml:7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  b: 1\n  b: 2", "f:3: 'b' is given a second time, after line 2: keep one"),
        ("a: 1\na: 2", "f:2: 'a' is given a second time, after line 1: keep one"),
        ("a: !!python/object:os.system x", "has no meaning here"),
        ("a: &x [*x]", "contains itself"),
        ("a: [1", "f:1 is not readable as YAML"),
        ("a: 1\n\tb: 2", "f:2 is not readable as YAML"),
        ("a: 1\n---\nb: 2", "f:2 is not readable as YAML"),
        ("", "f is empty"),
        ("# only a comment\n", "f is empty"),
        ("- a\n- b", "f holds a list"),
        ("just words", "f holds a single value"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ('a: "\\ud800"', "surrogate"),
        ("[" * 3000, "f is "),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_mapping(text, "f")
    assert message in str(caught.value)
