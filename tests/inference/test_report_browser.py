"""The report in a real browser: Chromium without a window, on pages opened from the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from inference.report import main, write_report
from inference.report_compare import compare
from inference.report_data import judge, read_evaluation
from inference.report_rows import Videos
from tests.inference.conftest import EVIL, EvaluationRuns

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's Chromium."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (the dev extras have it)"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(evaluation_runs: EvaluationRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the reports `alone`, `paired` and `many` (10,000 queries)."""
    folder = tmp_path_factory.mktemp("reports")
    main(["--run", str(evaluation_runs.better), "--output", str(folder / "alone")])
    flags = ["--run", str(evaluation_runs.better), "--vs", str(evaluation_runs.worse)]
    main([*flags, "--output", str(folder / "paired")])
    many = [
        multiplied(read_evaluation(run, "--run"), 10_000) for run in (evaluation_runs.better, evaluation_runs.worse)
    ]
    write_report(many[0], compare(*many), Videos(folder / "many"))
    return folder


def multiplied(evaluation: Any, count: int) -> Any:
    """The same evaluation with its grounded rows over and over, each a little different."""
    rows = [row.record for row in evaluation.rows.values() if row.record["gt"] and row.record["pred"]]
    records = [
        row | {"qid": f"m{place}", "sentence": f"{row['sentence']} {place}", "gt": [[0.0, 2 + place % 997 / 200]]}
        for place, row in ((place, rows[place % len(rows)]) for place in range(count))
    ]
    return replace(evaluation, rows={record["qid"]: judge(record, "default") for record in records})


@pytest.fixture
def visit(browser: Browser, reports: Path) -> Iterator[Any]:
    """Opens a report in a context of its own. What the page complains about or asks the network for fails the test."""
    complaints: list[str] = []
    contexts = []

    def opened(name: str, **settings: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
        page.goto((reports / name / "index.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def qids(page: Page) -> list[str]:
    return page.eval_on_selector_all("#list tbody tr", "rows => rows.map(row => row.dataset.qid)")


def column(page: Page, name: str) -> list[str]:
    return page.eval_on_selector_all(f"#list td[data-name='{name}']", "cells => cells.map(cell => cell.textContent)")


def focused(page: Page) -> str | None:
    return page.evaluate("document.activeElement.closest('tr')?.dataset.qid ?? null")


def focus_returns_to(page: Page, qid: str) -> None:
    """Wait for the dialog's `close` event, which comes after the dialog has gone."""
    page.wait_for_function("qid => document.activeElement.closest('tr')?.dataset.qid === qid", arg=qid)


def seeked_to(page: Page, time_s: float) -> None:
    """Wait until the video stands at `time_s`."""
    page.wait_for_function(
        "time => { const v = document.getElementById('video'); return v.readyState > 1 && !v.seeking && "
        "Math.abs(v.currentTime - time) < 0.01; }",
        arg=time_s,
    )


def test_sort(visit: Any) -> None:
    page = visit("alone")
    assert qids(page) == [f"q{i}" for i in range(24) if i != 11]
    page.click("#list th button:text-is('IoU')")
    worst = column(page, "IoU")
    assert page.get_attribute("#list th:nth-child(3)", "aria-sort") == "ascending"
    numbers = [float(words) for words in worst if words[0].isdigit()]
    assert numbers == sorted(numbers) and {"unparsable", "says absent", "wrong"} <= set(worst[:5])
    page.click("#list th button:text-is('IoU')")
    assert page.get_attribute("#list th:nth-child(3)", "aria-sort") == "descending"
    again = [float(words) for words in column(page, "IoU") if words[0].isdigit()]
    assert again == numbers[::-1] and qids(page)[-1] == "q12" and page.input_value("#f-sort") == "score down"
    page.select_option("#f-sort", "start down")
    sizes = [abs(float(words.replace("−", "-"))) for words in column(page, "start") if words != "–"]
    assert sizes == sorted(sizes, reverse=True) and column(page, "start")[-1] == "–"  # what has none comes last
    page.select_option("#f-sort", "start up")
    assert column(page, "start")[-1] == "–"


def test_filter(visit: Any) -> None:
    page = visit("alone")
    page.fill("#f-text", "Leaves </SCRIPT>")
    assert qids(page) == ["q3"] and page.inner_text("#found") == "1 of 23 queries"
    page.fill("#f-text", "nothing like it")
    assert qids(page) == [] and page.inner_text("#found") == "No query fits these filters."
    page.click("button[type=reset]")
    page.wait_for_function("() => document.querySelectorAll('#list tbody tr').length === 23")
    found = {
        "unparsable": ["q9"],
        "says-absent": ["q4", "q10"],
        "labelled-absent": ["q4", "q5"],
        "several": ["q6"],
        "unreadable": [],
    }
    for answer, expected in found.items():
        page.select_option("#f-answer", answer)
        assert qids(page) == expected, answer
    page.select_option("#f-answer", "window")
    page.select_option("#f-group", "source=home & more")
    assert qids(page) == [f"q{i}" for i in range(1, 24, 2) if i not in (9, 11)]
    page.fill("#f-low", "0")
    page.fill("#f-high", "0")
    page.select_option("#f-answer", "")
    page.select_option("#f-group", "")
    assert qids(page) == ["q9", "q10", "q12"]  # IoU 0; rows that are labelled absent have none
    page.fill("#f-low", "0.83")
    page.fill("#f-high", "0.84")
    assert qids(page) == ["q6"]


def test_against_another(visit: Any) -> None:
    page = visit("paired")
    changes = [abs(float(words[2:].replace("−", "-") or 0)) for words in column(page, "change") if len(words) > 4]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0.5  # wins and losses first
    assert column(page, "change")[-1] == "0.00"
    page.select_option("#f-change", "worse")
    assert qids(page) == ["q13", "q6"] and all(words.startswith("▼ −") for words in column(page, "change"))
    page.select_option("#f-change", "better")
    assert all(words.startswith("▲ +") for words in column(page, "change")) and "q1" in qids(page)
    page.select_option("#f-change", "same")
    assert set(qids(page)) == {"q4", "q5", "q9", "q10", "q12"}


def test_a_click_on_a_timeline_opens_the_video_there(visit: Any) -> None:
    page = visit("paired")
    bars = "tr[data-qid='q1'] .strip .window"
    start = page.eval_on_selector_all(bars, "bars => bars.map(bar => [bar.dataset.kind, Number(bar.dataset.start)])")
    times = dict(start)
    assert list(times) == ["truth", "prediction", "vs"]
    for kind, time in times.items():
        page.click(f"{bars}.{kind}")
        assert page.is_visible("#player")
        seeked_to(page, time)
        page.keyboard.press("Escape")
        assert not page.is_visible("#player")
        focus_returns_to(page, "q1")
    page.click("tr[data-qid='q1'] .strip", position={"x": 1, "y": 1})
    page.wait_for_function("() => document.getElementById('video').readyState > 1")
    assert page.evaluate("document.getElementById('video').currentTime") < 0.1


def test_the_seek_bar_jumps_to_either_window(visit: Any) -> None:
    page = visit("alone")
    page.click("tr[data-qid='q6'] .open")
    seeked_to(page, 4.5)  # the predicted window that counts
    for kind, time in (("truth", 1.0), ("prediction", 4.5)):
        page.click(f"#seek .window.{kind} >> nth=0" if kind == "truth" else "#seek .window.prediction:not(.faint)")
        seeked_to(page, time)
    page.click("#jumps button:has-text('labelled 4.00 – 7.00 s')")
    seeked_to(page, 4.0)
    assert page.get_attribute("#seek", "aria-valuenow") == "4.0"
    assert page.get_attribute("#seek", "aria-valuetext") == "4.00 s"
    box = page.locator("#seek").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] - 2)
    page.wait_for_function("() => Math.abs(document.getElementById('video').currentTime - 7.2) < 0.05")
    assert page.eval_on_selector("#video", "video => [video.duration, video.error]") == [8, None]
    bars = page.eval_on_selector_all("#seek .window", "bars => bars.map(bar => [bar.dataset.kind, bar.style.left])")
    assert sorted(bars) == [["prediction", "12.5%"], ["prediction", "56.25%"], ["truth", "12.5%"], ["truth", "50%"]]


def test_a_trimmed_row_seeks_on_the_files_clock(visit: Any) -> None:
    page = visit("alone")
    page.click("tr[data-qid='q7'] .open")
    seeked_to(page, 3.1)
    assert page.inner_text("#seek-end") == "8.00 s" and page.text_content("#seek-start") == "2.00"
    left = page.eval_on_selector("#seek .window.truth", "bar => parseFloat(bar.style.left)")
    assert left == pytest.approx(100 / 6, abs=0.01)
    page.click("#jumps button:has-text('labelled 3.00')")
    seeked_to(page, 3.0)


def test_rows_without_a_window_or_a_video(visit: Any) -> None:
    page = visit("alone")
    page.click("tr[data-qid='q5'] .open")
    seeked_to(page, 2.0)
    assert "labelled absent" in page.inner_text("#seek") and "wrong" in page.inner_text("#facts")
    page.keyboard.press("Escape")
    page.click("tr[data-qid='q9'] .open")
    assert "unparsable" in page.inner_text("#seek") and "unparsable" in page.inner_text("#facts")
    page.keyboard.press("Escape")
    page.click("tr[data-qid='q8'] .open")
    assert "gone.mp4 was not there when this report was made" in page.inner_text("#video-note")
    assert not page.is_visible("#video") and page.locator("#seek .window.truth").count() == 1
    page.keyboard.press("j")  # the next one has a video again
    page.wait_for_function("() => document.getElementById('video').readyState > 1")
    assert page.is_visible("#video") and page.inner_text("#video-note") == ""


def test_a_video_that_is_gone_by_now(browser: Browser, evaluation_runs: EvaluationRuns, tmp_path: Path) -> None:
    main(["--run", str(evaluation_runs.better), "--output", str(tmp_path / "report"), "--copy_videos"])
    shutil.rmtree(tmp_path / "report" / "videos")
    page = browser.new_page()
    page.goto((tmp_path / "report" / "index.html").as_uri())
    page.click("tr[data-qid='q0'] .open")
    page.wait_for_function("() => document.getElementById('video-note').textContent.includes('cannot be played')")
    assert "it is no longer at file://" in page.inner_text("#video-note") and not page.is_visible("#video")
    page.close()


def test_a_report_that_was_moved(browser: Browser, reports: Path, tmp_path: Path) -> None:
    """Elsewhere on the same machine the videos are found by their whole path."""
    shutil.copytree(reports / "alone", tmp_path / "deeper" / "report")
    page = browser.new_page()
    page.goto((tmp_path / "deeper" / "report" / "index.html").as_uri())
    page.click("tr[data-qid='q6'] .open")
    seeked_to(page, 4.5)
    assert page.is_visible("#video") and page.inner_text("#video-note") == ""
    page.close()


def test_keyboard_alone(visit: Any) -> None:
    page = visit("alone")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("button[type=reset]")
    for _ in range(30):
        page.keyboard.press("Tab")
        if focused(page):
            break
    assert focused(page) == "q0"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid" and page.evaluate("document.activeElement.matches(':focus-visible')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "q1"
    page.keyboard.press("End")
    assert focused(page) == "q23"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.is_visible("#player")
    row = page.evaluate("JSON.parse(document.getElementById('data').textContent).rows[1]")
    seeked_to(page, row["pred"][0][0])
    page.keyboard.press("t")
    seeked_to(page, row["truth"][0][0])
    page.keyboard.press("ArrowRight")
    seeked_to(page, row["truth"][0][0] + 1)
    page.keyboard.press("Shift+ArrowLeft")
    seeked_to(page, max(row["truth"][0][0] - 4, 0))
    page.keyboard.press("p")
    seeked_to(page, row["pred"][0][0])
    page.keyboard.press(" ")
    page.wait_for_function("time => document.getElementById('video').currentTime > time + 0.05", arg=row["pred"][0][0])
    page.keyboard.press(" ")
    assert page.evaluate("document.getElementById('video').paused")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.inner_text("#player-title") == page.inner_text("tr[data-qid='q2'] .open")
    page.keyboard.press("Escape")
    assert not page.is_visible("#player")
    focus_returns_to(page, "q2")


def test_light_and_dark(visit: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    shown = "[...document.querySelectorAll('figure img')].filter(i => i.offsetWidth > 0).map(i => i.className)"
    page = visit("alone", color_scheme="light")
    assert page.evaluate(paper) == "rgb(255, 255, 255)" and set(page.evaluate(shown)) == {"light"}
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    assert page.evaluate(paper) == "rgb(13, 17, 23)" and page.evaluate(shown) == ["dark"] * 6
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"  # the choice is remembered
    assert page.get_attribute("#theme", "aria-pressed") == "false"


def contrasts(page: Page) -> list[tuple[float, str]]:
    """Contrast of every piece of text with what is behind it (WCAG 2), the lowest first."""
    return page.evaluate(
        """() => {
        const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
        const light = (c) => c.slice(0, 3).map((v) => v / 255)
          .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
          if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
        return [...document.querySelectorAll('body *')].filter((e) => e.offsetWidth && !e.disabled &&
          [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) &&
          !e.closest('.screen, .up, .down, .skip'))
          .map((e) => { const a = light(rgb(getComputedStyle(e).color)), b = light(behind(e));
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            return [ratio, e.className + ' ' + e.textContent.slice(0, 30)]; })
          .sort((x, y) => x[0] - y[0]);
      }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str, visit: Any) -> None:
    page = visit("paired", color_scheme=scheme)
    page.click("tr[data-qid='q6'] .open")
    found = contrasts(page)
    assert len(found) > 200 and found[0][0] >= 4.5, found[:3]


@pytest.mark.parametrize("width", [320, 390])
@pytest.mark.parametrize("name", ["alone", "paired"])
def test_a_phone_has_no_sideways_scroll(name: str, width: int, visit: Any) -> None:
    page = visit(name, **PHONE | {"viewport": {"width": width, "height": 700}})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.body.innerText.includes('q23')")
    page.tap("tr[data-qid='q1'] .open")
    page.wait_for_function("() => document.getElementById('video').readyState > 1")
    box = page.locator("#player").bounding_box()
    assert (box["x"], box["width"]) == (0, width)
    assert page.evaluate("document.getElementById('player').scrollWidth") <= width
    page.tap("#player-close")
    assert not page.is_visible("#player")


def test_long_names_of_runs_widen_nothing(browser: Browser, evaluation_runs: EvaluationRuns, tmp_path: Path) -> None:
    runs = [tmp_path / f"{'qwen3vl_4b_charades_lora64_lr1e-4_' * 2}{name}" for name in ("one", "two")]
    for run, source in zip(runs, (evaluation_runs.better, evaluation_runs.worse), strict=True):
        shutil.copytree(source, run)
    main(["--run", str(runs[0]), "--vs", str(runs[1]), "--output", str(tmp_path / "report")])
    for width, settings in ((320, PHONE), (1280, {})):
        page = browser.new_page(**settings | {"viewport": {"width": width, "height": 800}})
        page.goto((tmp_path / "report" / "index.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.click("tr[data-qid='q1'] .open")
        dialog = page.evaluate("[document.getElementById('player')].map(e => [e.scrollWidth, e.clientWidth])[0]")
        assert dialog[0] == dialog[1]
        page.close()


def test_times_under_the_seek_bar_never_overlap(visit: Any) -> None:
    page = visit("alone", **PHONE)
    page.tap("tr[data-qid='q6'] .open")
    page.wait_for_function("() => document.getElementById('video').readyState > 1")
    page.keyboard.press("Home")
    hidden = set()
    for _ in range(9):
        boxes = page.evaluate(
            "['seek-start', 'seek-now', 'seek-end'].map(id => document.getElementById(id))"
            ".filter(e => getComputedStyle(e).visibility === 'visible').map(e => e.getBoundingClientRect())"
            ".map(box => [box.left, box.right])"
        )
        assert all(before[1] < after[0] for before, after in zip(boxes, boxes[1:], strict=False)), boxes
        hidden.add(len(boxes))
        page.keyboard.press("ArrowRight")
    assert hidden == {2, 3}


def test_everything_has_a_name(visit: Any) -> None:
    page = visit("paired")
    page.click("tr[data-qid='q3'] .open")
    assert page.inner_text("#player-title") == EVIL and page.evaluate("window.hacked") is None
    controls = page.eval_on_selector_all(
        "button, select, input, a, [tabindex='0'], img, dialog, video",
        """all => all.filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.alt
          || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)""",
    )
    assert [html for html in controls if not html.startswith("<video")] == []
    page.keyboard.press("Escape")
    page.get_by_role("slider").wait_for(state="hidden")
    for role, name in (("searchbox", "Search"), ("combobox", "Sort by"), ("spinbutton", "Lowest IoU")):
        assert page.get_by_role(role, name=name).count() == 1, (role, name)
    words = "labelled: 1.00 – 2.00 s, 4.00 – 7.00 s; better: 4.50 – 7.00 s, 1.00 – 2.00 s"
    assert page.get_by_role("img", name=words).count() == 1
    headers = page.eval_on_selector_all("#list th", "cells => cells.map(cell => cell.textContent)")
    assert headers == ["query", "timeline", "IoU", "worse", "change", "start, s", "end, s", "length, s"]


def test_ten_thousand_queries(visit: Any) -> None:
    page = visit("many")
    assert page.inner_text("#found") == "10,000 queries" and len(qids(page)) == 50
    assert page.inner_text(".page >> nth=0") == "1 / 200"
    page.click("#list th button:text-is('IoU')")
    lowest = [float(words) for words in column(page, "IoU")]
    page.click("#list th button:text-is('IoU')")
    highest = [float(words) for words in column(page, "IoU")]
    assert max(lowest) < min(highest)
    page.fill("#f-text", "9999")
    assert qids(page) == ["m9999"]
    page.fill("#f-text", "")
    page.select_option("#f-sort", "place up")
    page.click(".next >> nth=0")
    assert qids(page)[0] == "m50"
    page.focus("tr[data-qid='m50'] .open")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "m49" and page.inner_text(".page >> nth=0") == "1 / 200"
    page.keyboard.press("End")
    assert focused(page) == "m9999" and page.inner_text(".page >> nth=0") == "200 / 200"
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('video').readyState > 1")
