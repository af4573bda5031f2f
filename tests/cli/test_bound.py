"""`megatron-ext bound` as a person runs it: a process, its output, its exit code."""

import csv
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.cli.bound import round_up
from megatron_ext.rope.bound import base_frequencies, judge
from megatron_ext.rope.feasible import smallest_feasible_base
from tests.conftest import ROOT


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext.cli", "bound", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_base_is_judged():
    assert json.loads(run("--base", "1e6", "--json").stdout) == {
        "base": 1e6,
        "first_failing_distance": 27115,
        "min_b": pytest.approx(-22.294532581, abs=1e-8),
        "failing_share": pytest.approx(0.4051399231, abs=1e-9),
        "usable_context": 27114,
    }
    within = json.loads(run("--base", "1e6", "--context", 27115, "--json").stdout)
    assert within["first_failing_distance"] is None
    assert within["usable_context"] is None
    assert within["failing_share"] == 0


def test_a_context_is_answered():
    assert json.loads(run("--context", 1024, "--json").stdout) == {
        "context_length": 1024,
        "head_dim": 128,
        "smallest_feasible_base": pytest.approx(4293.437569262, rel=1e-12),
        "always_feasible_base": pytest.approx(6018.280857279, rel=1e-12),
        "active_distance": 1009,
    }


def test_people_get_a_sentence():
    text = run("--base", "1e4", "--context", 4096).stdout
    assert "first fails at distance 1707" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(("context", "head_dim"), [(1024, 128), (3, 128), (100, 64), (4096, 80)])
def test_the_base_that_people_are_told_is_feasible(context, head_dim):
    text = run("--context", context, "--head-dim", head_dim).stdout
    least, always = (
        float(re.search(rf"{word} ([\d.e+]+)", text)[1]) for word in ("least", "above")
    )
    exact = smallest_feasible_base(context, head_dim)
    assert exact <= least < exact * (1 + 1e-9)
    for base in (least, always):
        assert judge(base_frequencies(base, head_dim), context).feasible


@given(st.floats(1, 1e15), st.integers(2, 16))
def test_rounding_up_is_never_below_and_less_than_a_digit_above(base, digits):
    rounded = float(round_up(base, digits))
    assert base <= rounded <= base * (1 + 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    "arguments", [("--rotary-fraction", 0.5, "--context", 4096), ("--context", 2)]
)
def test_where_nothing_fails_people_are_told_so(arguments):
    text = run(*arguments).stdout
    assert "need no base in particular: none from 1 up fails." in text
    assert "None" not in text
    assert text.count("\n") == 1


def test_a_table_where_nothing_fails_names_no_distance():
    text = run("--table", "--context", 1024, "--rotary-fraction", 0.5).stdout
    assert "| 1k |  | 1.000000000 | 1.000000000 | none |" in text


def test_the_table_shows_both_columns_of_the_paper():
    text = run("--table", "--context", 4096, "--listing").stdout
    assert "| 4k | 2.7e4 | 2.9e4 | 26952.33923 | 58789.50416 | 4012 |" in text
    rows = json.loads(run("--table", "--context", 2048, "--head-dim", 64, "--json").stdout)
    assert [row["context_length"] for row in rows] == [1024, 2048]
    assert rows[0]["published_base"] is None  # the paper's table is of head dim 128


def test_a_figure_comes_with_its_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "bound.png"
    run("--base", "1e4", "--context", 2048, "--plot", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "bound.csv").open() as file:
        lines = list(csv.DictReader(file))
    curve = [line for line in lines if line["series"] == "curve"]
    assert len(curve) == 2048 and float(curve[0]["b"]) == 64
    assert [line["context_length"] for line in lines if line["series"] == "bound"] == [
        "1024",
        "2048",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bound.csv", "bound.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing was asked"),
        (["--context", 0], "write 1 token or more"),
        (["--base", 0.5], "must be above 1"),
        (["--base", "nan"], "must be a"),
        (["--base", 1e4, "--head-dim", 63], "must be even"),
        (["--table", "--context", 100], "write 1024 or more"),
        (["--context", 1024, "--listing"], "write --table --listing"),
        (["--context", 1024, "--plot", "figure.doc"], "ends in .png"),
        (["--context", 1024, "--plot", "nowhere/figure.png"], "make nowhere first"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(arguments, words):
    done = run(*arguments, code=2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
