"""The page: complete, self-contained, safe with any name; and, where a Chromium is installed, right in a browser."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fewbits
from fewbits.diagnosis.workflow import report_reference
from fewbits.report import terminal
from fewbits.report.page import page
from fewbits.report.words import decibels, number, signed_bytes, size
from test_cli import refused, run

pytest.importorskip("plotly", reason="plotly is not installed: the report page cannot be made")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
EVIL = "</script><script>document.title='broken'</script><b x=\"1\" y='2'>&amp;"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(checkpoint, diagnosis, report) of the demo model."""
    folder = tmp_path_factory.mktemp("report") / "made"
    fewbits.quantize_reference(
        "demo:digits", "rtn", "W3A4", out=folder, calib="demo:digits", samples=32, eval_data="demo:digits",
        eval_samples=64,
    )  # fmt: skip
    file, diagnosis = report_reference(folder, samples=8, top=2)
    assert file == folder / "report.html"
    yield folder, diagnosis, json.loads((folder / "report.json").read_text())


class _Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.text += data


# -- structure ---------------------------------------------------------------------------------------------------------
def test_everything_asked_for_is_on_the_page(made: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, diagnosis, report = made
    parsed = _Page((folder / "report.html").read_text())
    seen = re.sub(r"\s+", " ", parsed.text)
    assert "demo:digits" in seen and "rtn at W3A4" in seen
    assert f"{number(report['metric_before'])}→{number(report['metric_after'])}" in seen
    assert size(report["bytes_before"]) in seen and size(report["bytes_after"]) in seen
    for site in diagnosis["sites"]:
        assert site["site"] in seen  # the table holds every site
    for item in (*diagnosis["suggestions"], *diagnosis["patterns"]):
        assert item["says"] in seen and item["command"] in parsed.text
    assert len([1 for tag, _ in parsed.tags if tag == "h1"]) == 1
    data = json.loads(parsed.scripts[0])
    assert [site["site"] for site in data["sites"]] == [site["site"] for site in diagnosis["sites"]]
    assert all(site["histogram"]["counts"] for site in data["sites"])
    levels = {site["site"]: site["histogram"]["levels"] for site in data["sites"]}
    assert all(len(found) >= 2 for found in levels.values())
    assert len(levels["blocks.0.attn.q_proj.input"]) <= 16  # one grid of 4 bits


def test_nothing_is_loaded_from_elsewhere(made: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    text = (made[0] / "report.html").read_text()
    parsed = _Page(text)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base") and "src" not in attributes, tag
        assert not any((value or "").startswith(("http:", "https:", "//")) for value in attributes.values())
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags
    own = text.replace(max(parsed.scripts, key=len), "")
    assert "@import" not in own and "url(" not in own and "http" not in own.replace(html.escape("http"), "")
    assert len(own) < 400_000  # light besides the library


def test_any_name_is_safe(made: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, diagnosis, report = copy.deepcopy(made)
    diagnosis["sites"][0]["site"] = diagnosis["ranking"][0] = EVIL
    diagnosis["sites"][0]["format"] = EVIL
    for item in diagnosis["suggestions"][:1]:
        item["globs"], item["sites"], item["says"], item["command"] = [EVIL], [EVIL], EVIL, EVIL
    diagnosis["notes"] = [EVIL]
    diagnosis["data"]["data"] = EVIL
    diagnosis["sizes"][0]["site"] = EVIL
    for key in ("model", "recipe", "bits", "out", "metric"):
        report[key] = EVIL
    report["options"] = {EVIL: EVIL}
    report["versions"] = {EVIL: EVIL}
    report["notes"] = [EVIL]
    before, after = _Page(page(made[1], made[2])), _Page(page(diagnosis, report))
    assert len(after.scripts) == len(before.scripts) == 3
    assert json.loads(after.scripts[0])["sites"][0]["site"] == EVIL
    assert not any(tag == "b" and "x" in attributes for tag, attributes in after.tags)
    assert EVIL in after.text.replace("\n", "")
    assert "broken" not in "".join(before.scripts[1:]) and after.scripts[1:] == before.scripts[1:]


def test_missing_numbers_are_shown_as_such(made: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    """No labels, no evaluation, nothing to suggest, outputs that are not finite."""
    _, diagnosis, report = copy.deepcopy(made)
    diagnosis.update(metric=None, suggestions=[], patterns=[], together=[], notes=[])
    diagnosis["output"]["quantized"] = math.inf
    diagnosis["sites"][0].update(tensor_db=math.inf, layer_db=None, accumulated_db=-math.inf, histogram=None)
    for key in ("metric", "metric_before", "metric_after", "evaluation", "calibration", "size"):
        report.pop(key)
    text = _Page(page(diagnosis, report)).text
    assert "not finite" in text and "exact" in text and "No change of a single site" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_words() -> None:
    assert (size(12), size(1234), size(5.6e6), size(None)) == ("12 B", "1.2 KB", "5.60 MB", "?")
    assert signed_bytes(80) == "+80 B" and signed_bytes(-1500) == "−1.5 KB"
    assert (number(0.12345), number(12.345), number(0), number(math.nan)) == ("0.123", "12.35", "0", "not finite")
    assert (decibels(12.34), decibels(math.inf), decibels(-math.inf), decibels(None)) == ("12.3", "exact", "lost", "–")


# -- the commands ------------------------------------------------------------------------------------------------------
def test_the_terminal_tells_the_same(made: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, diagnosis, _ = made
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.diagnosed(diagnosis, console)
    told = console.export_text()
    for name in diagnosis["ranking"][:10]:
        assert name in told
    for item in diagnosis["suggestions"]:
        assert item["says"] in told and item["option"].partition("=")[2] in told
    result = run("diagnose", made[0], "--samples", 8, "--top", 2, "--json")
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["ranking"] == diagnosis["ranking"]
    assert [s["option"] for s in again["suggestions"]] == [s["option"] for s in diagnosis["suggestions"]]


def test_quantize_can_report_at_once(tmp_path: Path) -> None:
    wanted = tmp_path / "page.html"
    arguments = ["--recipe", "rtn", "--bits", "W4A16", "--out", tmp_path / "made"]
    assert "a report needs data" in refused("quantize", "demo:digits", *arguments, "--report")
    assert not (tmp_path / "made").exists()
    result = run("quantize", "demo:digits", *arguments, "--report", "--json", "--calib", "demo:digits", "--samples", 4)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["page"] == str(tmp_path / "made" / "report.html")
    assert "top1" in (tmp_path / "made" / "report.html").read_text()
    assert fewbits.load(tmp_path / "made").kind == "demo"  # the page does not disturb the checkpoint
    result = run("report", tmp_path / "made", "--samples", 2, "--top", 1, "--out", wanted)
    assert result.exit_code == 0 and wanted.is_file() and str(wanted) in result.stdout
    assert "no checkpoint" in refused("report", "demo:digits")
    assert "its folder does not exist" in refused("report", tmp_path / "made", "--out", tmp_path / "no" / "x.html")
    assert not list(tmp_path.glob(".*"))


# -- the browser -------------------------------------------------------------------------------------------------------
_PROBE_START = "<script>window.bad = []; onerror = message => { bad.push(String(message)) };</script>"
_PROBE_END = """<script>
setTimeout(() => {
  const first = document.querySelector("ol.suggestions button.show");
  const caption = () => document.getElementById("caption").textContent;
  const before = document.getElementById("site").value;
  document.getElementById("next").click();
  const moved = document.getElementById("site").value;
  if (first) first.click();
  Plotly.relayout("errors", {"xaxis.range": [2, 6]}).then(() => setTimeout(() => parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, bad,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    dots: document.querySelectorAll("#errors .scatterlayer .point").length,
    bars: document.querySelectorAll("#histogram .bars .point").length,
    grid: document.querySelectorAll("#histogram .scatterlayer .js-line").length,
    chart: document.querySelector("#errors .main-svg").getBoundingClientRect().width,
    range: document.getElementById("errors").layout.xaxis.range, before, moved, caption: caption(),
    chosen: document.getElementById("site").value, title: document.title, small:
      [...document.querySelectorAll("p, td, li, dd")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length,
  }), "*"), 500));
}, 1500);
</script></body>"""
_FRAME = """<!doctype html><body><iframe src="page.html" width="{width}" height="800" style="border:0"></iframe>
<script>onmessage = event => {{ document.body.textContent = "PROBE" + event.data + "EBORP" }}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page is not tried in a browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(tmp_path: Path, made: tuple[Path, dict[str, Any], dict[str, Any]], width: int) -> None:
    """As wide as a phone and as a desk: charts drawn, no error, nothing fetched, no sideways scrolling, zoom works."""
    text = (made[0] / "report.html").read_text().replace("<head>", "<head>" + _PROBE_START)
    (tmp_path / "page.html").write_text(_PROBE_END.join(text.rsplit("</body>", 1)))
    (tmp_path / "frame.html").write_text(_FRAME.format(width=width))
    arguments = (
        "--headless=new --no-sandbox --disable-gpu --virtual-time-budget=20000 --window-size=1400,900 --dump-dom"
    )
    ran = subprocess.run(
        [str(CHROMIUM), *arguments.split(), f"--user-data-dir={tmp_path / 'p'}", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    found = re.search("PROBE(.*)EBORP", ran.stdout, re.DOTALL)
    assert found is not None, (ran.stdout[-500:], ran.stderr[-500:])
    told = json.loads(html.unescape(found[1]))
    sites = [site["site"] for site in made[1]["sites"]]
    assert told["bad"] == [] and told["loaded"] == []
    assert told["inner"] in (width, width - 15) and told["scroll"] <= told["inner"]
    assert 0 < told["chart"] <= told["inner"]
    shown = next(site for site in made[1]["sites"] if site["site"] == told["chosen"])
    assert told["dots"] >= 3 * 4 and told["bars"] == len(shown["histogram"]["counts"])
    assert told["grid"] == len(shown["histogram"]["levels"])
    assert [round(edge) for edge in told["range"]] == [2, 6]
    assert told["before"] == made[1]["ranking"][0]
    assert told["moved"] == sites[(sites.index(told["before"]) + 1) % len(sites)]
    if made[1]["suggestions"]:
        assert told["chosen"] == made[1]["suggestions"][0]["sites"][0]
    assert "bits" in told["caption"] and told["small"] == 0 and "demo:digits" in told["title"]
