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
from tests.study.conftest import write_run

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


def test_the_page_is_whole_and_asks_for_nothing_outside(page: Path) -> None:
    html = page.read_text()
    parsed = Page(html)
    assert parsed.counts["svg"] == 2 * 4  # wide and narrow
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


def test_no_colour_of_a_figure_is_fixed(page: Path) -> None:
    """Otherwise a line could vanish on the dark page."""
    for svg in re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL):
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_every_colour_is_defined_for_light_and_dark(page: Path) -> None:
    html = page.read_text()
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
    page = write_report([make_run("below"), make_run("above", seed=7)])
    assert "did not read the same tokens" in Page(page.read_text()).words


def test_names_are_escaped(make_run: MakeRun) -> None:
    page = write_report([make_run("a<script>b&c")])
    parsed = Page(page.read_text())
    assert "script" not in parsed.counts
    assert "a<script>b&c" in parsed.words


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.yaml: name the folder of a run"):
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
@pytest.mark.parametrize("width", [390, 1280])
def test_the_browser_has_no_complaint_and_nothing_sticks_out(
    page: Path, tmp_path: Path, width: int
) -> None:
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
    assert "over 0, shown 4, blank 0" in done.stdout
    assert "CONSOLE" not in done.stderr
