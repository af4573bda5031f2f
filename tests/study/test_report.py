"""The page: whole, self-contained, honest about what is missing, and clean in a real browser."""

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.rope.bound import b_values, base_frequencies
from tests.conftest import ROOT
from tests.study.conftest import write_perplexity, write_retrieval, write_run

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from megatron_ext.study.report import write_report

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "rect", "circle"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Collects what a test asks for, and notices a tag that is closed by another."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report([write_run(folder, "below"), write_run(folder, "above")])


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, two seeds of each, with retrieval, given as the folder that holds them."""
    folder = tmp_path_factory.mktemp("sweeps") / "bases"
    found = {
        "below-seed_1": {64: [10, 10, 10], 128: [10, 8, 7], 256: [9, 1, 0], 512: [0, 0, 0]},
        "below-seed_2": {64: [10, 9, 10], 128: [8, 6, 9], 256: [9, 2, 1], 512: [0, 0, 0]},
        "above-seed_1": {64: [10, 10, 10], 128: [10, 10, 9], 256: [10, 10, 9], 512: [5, 0, 1]},
        "above-seed_2": {64: [10, 10, 10], 128: [10, 10, 10], 256: [10, 10, 10], 512: [9, 9, 9]},
    }
    for name, correct in found.items():
        run = write_run(folder, name, seed=int(name[-1]))
        write_retrieval(run, "passkey", correct)
        losses = {c: (40 / c) ** 0.5 + 3 for c in (32, 64, 128, 256)}
        write_perplexity(run, 40, {**losses, 512: 9.0})
    (folder / "not_begun").mkdir()
    return write_report([folder])


def rows(page: Path, name: str) -> list[dict[str, str]]:
    with (page.parent / f"figures/{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_sweep_s_folder_becomes_a_page_with_its_seeds_together(sweep_page: Path) -> None:
    assert sweep_page.parent.name == "bases"
    parsed = Page(sweep_page.read_text())
    assert "Effective context against base" in parsed.headings
    assert "Retrieval by length and depth: passkey" in parsed.headings
    assert "Runs of one seed read the same tokens in the same order." in parsed.words
    assert "below (base 100, 2 seeds)" in parsed.words
    assert {row["run"] for row in rows(sweep_page, "bound")} == {"below", "above"}
    assert len({row["run"] for row in rows(sweep_page, "loss")}) == 4


def test_effective_context_stands_beside_the_theory_s(sweep_page: Path) -> None:
    found = {row["run"]: row for row in rows(sweep_page, "effective_context")}
    # 25 of 30 at 128 (Wilson .664 to .927), 10 of 30 at 256; 23 of 30 at 128 (.591 to .882).
    expected = {
        "below-seed_1": ("128", "64", "128", "45"),
        "below-seed_2": ("64", "64", "128", "45"),
        "above-seed_1": ("256", "256", "256", "724"),
        "above-seed_2": ("512", "256", "512", "724"),
    }
    keys = ("effective_context", "low", "high", "theory_usable_context")
    assert {name: tuple(row[key] for key in keys) for name, row in found.items()} == expected
    words = Page(sweep_page.read_text()).words
    assert "128 (95%: 64 to 128); 64 (95%: 64 to 128) tokens retrieved, one for each" in words
    assert "at least 512 (95%: 256 to 512)" in words
    assert "Effective context, passkey ≥ 80%" in words
    heat = rows(sweep_page, "retrieval_passkey")
    assert len(heat) == 4 * 4 * 3
    assert [row["correct"] for row in heat if row["run"] == "below-seed_1"][3:6] == ["10", "8", "7"]


def test_the_power_law_is_of_lengths_within_the_trained_context(sweep_page: Path) -> None:
    law = rows(sweep_page, "context_law")
    assert {row["length"] for row in law} == {"32", "64", "128", "256"}
    for row in law:
        assert float(row["alpha"]) == pytest.approx(40, rel=1e-2)
        assert float(row["beta"]) == pytest.approx(0.5, rel=1e-3)
        assert float(row["fitted"]) == pytest.approx(float(row["loss"]), abs=1e-5)


def test_where_no_law_was_fitted_the_table_says_why(page: Path) -> None:
    assert not (page.parent / "figures/context_law.csv").exists()
    assert "not fitted: 2 lengths within the trained context" in Page(page.read_text()).words


def test_jobs_and_checkpoint_of_every_result_are_named(make_run: MakeRun) -> None:
    run = make_run("above")
    lines = ['{"event": "began", "time": 1, "job": "77", "restart": 0}'] * 2
    lines.append(lines[0].replace("77", "78"))
    (run / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    write_retrieval(run, "passkey", {64: [1, 2, 3]}, step=20)
    words = Page(write_report([run]).read_text()).words
    assert "Slurm jobs 77, 78" in words
    assert "step 40 cdcdcdcdcdcd: perplexity; step 20 cdcdcdcdcdcd: passkey" in words
    assert "above: passkey at step 20, not at the last one" in words


def test_a_glance_shows_theory_and_every_seed_beside_it(sweep_page: Path) -> None:
    row = re.search(
        r"<tr><th scope=.row.><i [^>]*></i>below</th>(.*?)</tr>", sweep_page.read_text(), re.DOTALL
    )
    assert row is not None
    cells = re.findall(r"<td>(.*?)</td>", row[1], re.DOTALL)
    assert cells[:2] == ["100", "45"]  # B_46 is the first below zero
    assert cells[2].split("\n") == ["128 (95%: 64 to 128)", "64 (95%: 64 to 128)"]
    assert cells[3].split("\n") == ["4.500", "4.500"]
    assert cells[4].split("\n") == ["62.56, 65.12 at 512"] * 2


def test_retrieval_is_told_by_the_distance_back_to_the_fact(sweep_page: Path) -> None:
    found = {
        int(row["up_to_distance"]): (int(row["correct"]), int(row["samples"]))
        for row in rows(sweep_page, "distance_passkey")
        if row["run"] == "below-seed_1"
    }
    # Depths 0, 50, 100% of 64, 128, 256, 512 tokens, 10 prompts each: all four ends are near.
    near = (10 + 7 + 0 + 0, 40)
    assert found == {
        16: near,
        32: (10, 10),
        64: (18, 20),
        128: (11, 20),
        256: (9, 20),
        512: (0, 10),
    }


def test_a_sweep_s_file_stands_for_its_folder_and_seeds_may_stand_in_front(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(f"seed_{seed}-above", seed=seed) for seed in (1, 2)]
    file = tmp_path / "bases.yaml"
    axes = "axes: {training.seed: [1, 2], rope.base: [1e4]}"
    file.write_text(f"config: {runs[0] / 'config.yaml'}\nfolder: {tmp_path}\n{axes}\n")
    page = write_report([file])
    assert page == tmp_path / "report.html"
    assert "above (base 10,000, 2 seeds)" in Page(page.read_text()).words


def test_a_sweep_without_a_begun_arm_says_how_to_begin(config_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "bases.yaml"
    axes = "axes: {training.seed: [1, 2]}"
    file.write_text(f"config: {config_file.name}\nfolder: {tmp_path / 'none'}\n{axes}\n")
    with pytest.raises(UserError, match=r"no arm of .* has begun in .*none: megatron-ext sweep"):
        write_report([file])


@pytest.mark.parametrize("threshold", [0.0, 1.5, 80.0])
def test_a_threshold_that_is_no_share_is_refused(threshold: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--threshold .* is no share"):
        write_report([tmp_path], threshold=threshold)


@pytest.mark.parametrize(("which", "figures"), [("page", 4), ("sweep_page", 8)])
def test_the_page_is_whole_and_asks_for_nothing_outside(
    which: str, figures: int, request: pytest.FixtureRequest
) -> None:
    html = request.getfixturevalue(which).read_text()
    parsed = Page(html)
    assert parsed.counts["svg"] == 2 * figures  # wide and narrow
    assert "Loss while training" in parsed.headings
    assert "Perplexity against context length" in parsed.headings
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    for address in parsed.addresses:
        assert address == "data:," or address.startswith("#"), address
        assert address == "data:," or address[1:] in parsed.ids
    assert "prefers-color-scheme: dark" in html
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_no_colour_of_a_figure_is_fixed(page: Path, sweep_page: Path) -> None:
    """Otherwise a line could vanish on the dark page."""
    html = page.read_text() + sweep_page.read_text()
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_every_colour_is_defined_for_light_and_dark(sweep_page: Path) -> None:
    html = sweep_page.read_text()
    for name in set(re.findall(r"var\((--[\w-]+)\)", html)):
        assert len(re.findall(rf"{name}: #", html)) == 2, name


def test_the_words_say_what_the_theory_says(page: Path) -> None:
    words = Page(page.read_text()).words
    # From an independent sum: distances 46 (base 100) and 725 (base 10,000) at head dim 64.
    for base, first in ((100.0, 46), (10_000.0, 725)):
        b = b_values(base_frequencies(base, 64), range(first + 1))
        assert b[first] < 0 <= b[:first].min()
    assert "negative at distance 46, within the trained context of 256" in words
    assert "negative at distance 725, beyond it" in words
    assert "All runs read the same tokens in the same order." in words
    assert "3 of 9 documents were scored" in words
    assert "Not everything is here yet" not in words


def test_every_figure_has_its_numbers_beside_it(page: Path) -> None:
    folder = page.parent / "figures"
    names = {file.stem for file in folder.glob("*.png")}
    assert names == {"loss", "bound", "perplexity", "position"}
    tables = {}
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        alone = (folder / f"{name}.svg").read_text()
        assert "var(" not in alone
        assert "(base 10,000)" in alone or name == "bound"  # it brings its legend
        with (folder / f"{name}.csv").open() as stream:
            tables[name] = list(csv.DictReader(stream))
    assert {row["run"] for row in tables["loss"]} == {"below", "above"}
    bound = {(row["run"], int(row["distance"])): float(row["b_m"]) for row in tables["bound"]}
    assert bound["below", 45] >= 0 > bound["below", 46]
    assert bound["above", 724] >= 0 > bound["above", 725]
    assert len(tables["perplexity"]) == 6


def test_what_is_missing_is_said(make_run: MakeRun) -> None:
    folders = [make_run("below", steps=20), make_run("above", evaluated=False)]
    words = Page(write_report(folders).read_text()).words
    assert "below: unfinished: 20 of 40 steps" in words
    assert "above: not evaluated" in words


def test_a_run_that_has_just_begun_has_a_page(make_run: MakeRun) -> None:
    page = write_report([make_run("above", steps=0, evaluated=False)])
    assert page.parent.name == "above"
    parsed = Page(page.read_text())
    assert parsed.counts["svg"] == 2  # theory alone
    assert "no step has been logged yet" in parsed.words


def test_runs_on_different_data_are_not_passed_off_as_comparable(make_run: MakeRun) -> None:
    page = write_report([make_run("below", steps=20), make_run("above", seed=7)])
    words = Page(page.read_text()).words
    assert "did not read the same tokens" in words
    assert "least validation loss" not in words


def test_names_are_escaped(make_run: MakeRun) -> None:
    page = write_report([make_run("a<script>b&c")])
    parsed = Page(page.read_text())
    assert "script" not in parsed.counts
    assert "a<script>b&c" in parsed.words


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.yaml: name the folder of a run or sweep"):
        write_report([tmp_path])


def test_the_command_writes_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    import sys

    output = tmp_path / "out" / "page.html"
    command = [sys.executable, "-m", "megatron_ext.cli", "report", str(make_run("above"))]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert output.is_file()
    assert (output.parent / "figures/loss.csv").is_file()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")
@pytest.mark.parametrize(("which", "figures"), [("page", 4), ("sweep_page", 8)])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_browser_has_no_complaint_and_nothing_sticks_out(
    which: str, figures: int, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = request.getfixturevalue(which)
    # A frame of that width: the window of a headless browser has a least width of its own.
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(
        f"""<!doctype html>
        <iframe src="{page.name}" style="width: {width}px; height: 900px; border: 0"></iframe>
        <script>onload = () => {{
          const page = document.querySelector("iframe").contentDocument;
          const width = svg => svg.getBoundingClientRect().width;
          const shown = [...page.querySelectorAll("svg")].filter(width);
          const root = page.documentElement;
          document.body.textContent = [
            `over ${{root.scrollWidth - root.clientWidth}}`, `shown ${{shown.length}}`,
            `blank ${{shown.filter(svg => svg.querySelectorAll("path").length < 10).length}}`,
          ].join(", ");
        }}</script>"""
    )
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--allow-file-access-from-files", "--window-size=1400,1000",
            "--virtual-time-budget=5000", "--dump-dom", probe.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert f"over 0, shown {figures}, blank 0" in done.stdout
    assert "CONSOLE" not in done.stderr
