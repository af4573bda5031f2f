"""Inheritance, overrides, resolved values, and the way to a file and back."""

import dataclasses
import os
import stat
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.config import Config, load_config, named_run_dir, save_config
from megatron_ext.config.files import read_layer, to_config
from megatron_ext.errors import ConfigError
from megatron_ext.rope.frequencies import Linear, NoScaling, Yarn


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# Inheritance


def test_a_file_overrides_only_what_it_names(valid: Path) -> None:
    heir = write(valid.parent, "heir.yaml", "base: valid.yaml\nmodel: {num_heads: 2}\n")
    config, plain = load_config(heir), load_config(valid)
    assert (config.model.num_heads, config.model.head_dim) == (2, 128)
    assert config.model.num_layers == plain.model.num_layers
    assert config.optimizer == plain.optimizer


def test_base_is_relative_to_the_file_not_to_the_working_directory(
    valid: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    heir = write(valid.parent, "deep/er/heir.yaml", "base: ../../valid.yaml\nrope: {base: 2e4}\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_config(heir).rope.base == 20000


def test_the_later_of_several_bases_wins(valid: Path) -> None:
    write(valid.parent, "a.yaml", "optimizer: {lr: 1, beta1: 0.5}\n")
    write(valid.parent, "b.yaml", "optimizer: {lr: 2}\n")
    heir = write(valid.parent, "heir.yaml", "base: [valid.yaml, a.yaml, b.yaml]\n")
    optimizer = load_config(heir).optimizer
    assert (optimizer.lr, optimizer.beta1) == (2, 0.5)


def test_one_base_may_be_reached_twice(valid: Path) -> None:
    write(valid.parent, "a.yaml", "base: valid.yaml\n")
    heir = write(valid.parent, "heir.yaml", "base: [a.yaml, valid.yaml]\n")
    assert load_config(heir).model == load_config(valid).model


def test_a_cycle_is_refused_with_its_chain(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: sub/../a.yaml\n")
    text = message(a)
    assert "inherits from itself" in text
    assert "a.yaml -> " in text and "b.yaml -> " in text


def test_an_empty_section_changes_nothing(valid: Path) -> None:
    heir = write(valid.parent, "heir.yaml", "base: valid.yaml\noptimizer:\n")
    assert load_config(heir).optimizer == load_config(valid).optimizer


@pytest.mark.parametrize("above", ["rope: {scaling: {type: linear, factor: 2}}", ""])
def test_another_rule_does_not_inherit_the_parameters_of_the_first(valid: Path, above: str) -> None:
    write(
        valid.parent, "yarn.yaml",
        "base: valid.yaml\n"
        "rope: {scaling: {type: yarn, factor: 4, original_context_length: 64}}\n",
    )  # fmt: skip
    heir = write(valid.parent, "heir.yaml", f"base: yarn.yaml\n{above}\n")
    expected = Linear(factor=2.0) if above else Yarn(factor=4.0, original_context_length=64)
    assert load_config(heir).rope.scaling == expected
    assert load_config(heir, ["rope.scaling.type=none"]).rope.scaling == NoScaling()
    assert load_config(heir, ["rope.scaling=null"]).rope.scaling == NoScaling()


def test_the_same_rule_is_merged(valid: Path) -> None:
    over = ["rope.scaling={type: yarn, factor: 4, original_context_length: 64}"]
    over += ["rope.scaling.factor=8"]
    assert load_config(valid, over).rope.scaling == Yarn(factor=8.0, original_context_length=64)


# Steps and tokens


def test_tokens_and_steps_say_the_same(valid: Path) -> None:
    by_steps, by_tokens = load_config(valid), load_config(valid, ["training.tokens=204_801"])
    assert (by_steps.training.steps, by_steps.training.tokens) == (100, 204_800)
    assert by_steps.training.tokens_per_step == 2048
    assert by_tokens.training.steps == 101  # rounded up


def test_the_upper_layer_replaces_the_budget_of_the_lower(valid: Path) -> None:
    heir = write(valid.parent, "heir.yaml", "base: valid.yaml\ntraining: {tokens: 1e6}\n")
    assert load_config(heir).training.steps == 489
    assert load_config(heir, ["training.steps=7"]).training.tokens == 7 * 2048
    assert load_config(heir, ["training.steps=null"]).training.steps == 489


def test_both_in_one_layer_must_agree(valid: Path) -> None:
    over = ["training.steps=489", "training.tokens=1e6"]
    assert load_config(valid, over).training.tokens == 10**6
    text = message(valid, "training.steps=488", "training.tokens=1e6")
    assert "steps=488" in text and "489 steps" in text


def test_a_run_without_a_length_is_refused(valid: Path) -> None:
    assert "training.steps, for example" in message(valid, "training.steps=null")


# Overrides


def test_overrides_read_values_as_files_do(valid: Path) -> None:
    config = load_config(
        valid,
        [
            "rope.base=5e5",
            "data.corpora={a: {path: x/1:30, weight: 2}}",
            "data.corpora.b.path=y=z",
            "evaluation.lengths=[1_00, 2e2]",
            "parallel.sequence=false",
            "data.tokenizer=tokens.model",
            "data.tokenizer=null",
        ],
    )
    assert config.rope.base == 500000.0 and isinstance(config.rope.base, float)
    assert config.data.corpora["a"].path == Path("x/1:30")
    assert config.data.corpora["b"].path == Path("y=z")
    assert config.evaluation.lengths == (100, 200)
    assert config.data.tokenizer is None


def test_the_later_of_two_overrides_wins(valid: Path) -> None:
    assert load_config(valid, ["rope.base=2e4", "rope.base=3e4"]).rope.base == 30000


@pytest.mark.parametrize(
    ("text", "overrides", "folder"),
    [
        ("training: {run_dir: a/b}\nmodel: {num_layer: 2}\n", [], "a/b"),
        ("training: {run_dir: a/b}\n", ["rope.bse=1", "training.run_dir=c"], "c"),
        ("training: {run_dir: a/b}\n", ["training.run_dir='c d'", "rope.bse=1"], "c d"),
        ("model: {num_layer: 2}\n", ["="], "runs/wrong"),
        ("training: [1\n", [], "runs/wrong"),
        (None, [], "runs/wrong"),
    ],
    ids=["unknown setting", "override", "quoted", "default", "no YAML", "no file"],
)
def test_run_folder_is_known_of_a_config_with_mistakes(
    text: str | None, overrides: list[str], folder: str, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(file, overrides)
    assert named_run_dir(file, overrides) == Path(folder)


def test_null_takes_a_setting_back_to_its_default(valid: Path) -> None:
    heir = write(valid.parent, "heir.yaml", "base: valid.yaml\nmodel: {head_dim: 32}\n")
    assert load_config(heir).model.head_dim == 32
    assert load_config(heir, ["model.head_dim=null"]).model.head_dim == 64


@given(st.floats(1.0001, 1e300), st.sampled_from(["{!r}", "{:.17e}", "{:.17g}"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_any_base_arrives_exactly(valid: Path, base: float, form: str) -> None:
    over = [f"rope.base={form.format(base)}", "rope.bound=off"]
    assert load_config(valid, over).rope.base == base


@given(st.text(max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_no_override_ends_in_anything_but_a_sentence(valid: Path, text: str) -> None:
    for override in (text, f"rope.{text}", f"rope.base={text}", f"data.corpora={text}"):
        try:
            load_config(valid, [override])
        except ConfigError:
            continue  # anything else fails the test


# What is resolved


def test_values_that_follow_from_others_are_plain(valid: Path) -> None:
    config = load_config(valid)
    assert (config.model.head_dim, config.model.num_kv_heads) == (64, 4)
    assert config.training.run_dir == Path("runs/valid")
    assert config.schedule.decay_steps == 100
    assert config.evaluation.lengths == (128, 256, 512)
    assert config.parallel.world_size == 1
    wsd = load_config(valid, ["schedule.type=wsd", "schedule.warmup_steps=20"])
    assert wsd.schedule.decay_steps == 10
    assert load_config(valid, ["parallel.tensor=2", "parallel.pipeline=2"]).parallel.world_size == 4


def test_a_config_is_frozen(valid: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(valid).rope.base = 1.0  # type: ignore[misc]


# The resolved file


POSITIVE = st.integers(1, 2**40)
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(Path)
RULES = st.one_of(
    st.just({"type": "none"}),
    st.fixed_dictionaries({"type": st.just("linear"), "factor": st.floats(1, 1e6)}),
    st.fixed_dictionaries(
        {"type": st.just("yarn"), "factor": st.floats(1, 99), "truncate": st.booleans(),
         "original_context_length": st.integers(2, 10**6)}
    ),
    st.fixed_dictionaries(
        {"type": st.just("longrope"), "factor": st.floats(1, 99),
         "short_factor": st.lists(st.floats(0.1, 99), min_size=1, max_size=70),
         "long_factor": st.lists(st.floats(0.1, 99), min_size=1, max_size=3),
         "original_context_length": st.integers(2, 10**6)}
    ),
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any config that the types allow; the rules between settings are not asked."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    values: dict[str, Any] = {
        "model": {
            "num_layers": draw(POSITIVE),
            "hidden_size": draw(POSITIVE),
            "ffn_hidden_size": draw(POSITIVE),
            "num_heads": draw(POSITIVE),
            "vocab_size": draw(POSITIVE),
            "norm_eps": draw(st.floats(1e-300, 1e300)),
        },
        "rope": {"base": draw(st.floats(1.0000001, 1e300)), "scaling": draw(RULES)},
        "data": {
            "corpora": {
                name: {"path": draw(PATHS), "weight": draw(st.floats(1e-9, 1e9))}
                for name in draw(st.lists(text, max_size=3, unique=True))
            },
            "tokenizer": draw(st.none() | PATHS),
        },
        "training": {
            "run_dir": draw(PATHS),
            "sequence_length": draw(st.integers(1, 2**20)),
            "global_batch_size": draw(st.integers(1, 2**20)),
            "micro_batch_size": draw(POSITIVE),
            draw(st.sampled_from(["steps", "tokens"])): draw(POSITIVE),
            "seed": draw(st.integers(0, 2**62)),
        },
        "optimizer": {"lr": draw(st.floats(1e-300, 1e300))},
        "checkpoint": {"keep_every": draw(st.none() | POSITIVE)},
        "evaluation": {"lengths": draw(st.lists(POSITIVE, max_size=4))},
    }
    return Config.model_validate(values).resolved()


@given(configs())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_saved_config_reads_back_equal(tmp_path: Path, config: Config) -> None:
    file = tmp_path / "config.yaml"
    save_config(config, file)
    again = to_config(read_layer(file), "config.yaml")
    assert again == config
    assert again.training.steps == config.training.steps
    assert [type(v) for v in dataclasses.astuple(again.rope.scaling)] == [
        type(v) for v in dataclasses.astuple(config.rope.scaling)
    ]


def test_a_saved_config_loads_from_anywhere(valid: Path, tmp_path: Path) -> None:
    config = load_config(
        valid, ["training.tokens=1e6", "schedule.type=wsd", "model.num_kv_heads=2"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_saving_leaves_no_half_file(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, file = load_config(valid), valid.parent / "run" / "config.yaml"
    file.parent.mkdir()
    save_config(config, file)
    before = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_config(config, file)
    assert file.read_text() == before
    assert [PurePath(f).name for f in file.parent.iterdir()] == ["config.yaml"]
