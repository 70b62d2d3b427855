"""The report: its numbers are those of the evaluation, nothing in it runs or loads but its own parts, and bad input is
refused by name."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

import inference.report
from inference.report import main
from inference.report_compare import compare
from inference.report_data import Judged, judge, read_evaluation
from inference.report_figures import grouped, pictures, recalls
from inference.report_page import percent, signed
from inference.report_rows import group_keys
from tests.inference.conftest import EVIL, EvaluationRuns
from utils.common import UserError
from utils.metrics import METRICS, bootstrap_interval, evaluate, sample_scores
from utils.palette import DARK, LIGHT
from utils.protocols import PROTOCOLS
from utils.rows import read_rows, write_rows


class Page(HTMLParser):
    """What the tests look at: cells of tables by id, attributes that load something, scripts."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.text = folder, (folder / "index.html").read_text(encoding="utf-8")
        self.tables: dict[str, list[list[str]]] = {}
        self.captioned: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self._table: list[list[str]] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._open.append(tag)
        self.links += [
            str(found[name]) for name in ("src", "href", "srcset", "action", "poster", "data") if name in found
        ]
        if tag == "table":
            self._table = self.tables.setdefault(str(found.get("id", len(self.tables))), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open and self._open[-1] == "caption":
            self.captioned[data.strip()] = self._table
        elif self._table and self._table[-1] and {"td", "th"} & set(self._open[-3:]):
            self._table[-1][-1] += data.strip()
        else:
            self.words += data

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        return json.loads(self.scripts[0])

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The queries by qid."""
        return {row["qid"]: row for row in self.data["rows"]}


@pytest.fixture(scope="module")
def alone(evaluation_runs: EvaluationRuns, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of one evaluation."""
    folder = tmp_path_factory.mktemp("alone") / "report"
    main(["--run", str(evaluation_runs.better), "--output", str(folder)])
    return Page(folder)


@pytest.fixture(scope="module")
def paired(evaluation_runs: EvaluationRuns, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of one evaluation against another."""
    folder = tmp_path_factory.mktemp("paired") / "report"
    main(["--run", str(evaluation_runs.better), "--vs", str(evaluation_runs.worse), "--output", str(folder)])
    return Page(folder)


@pytest.fixture
def run(evaluation_runs: EvaluationRuns, tmp_path: Path) -> Path:
    """A copy of an evaluation, to be broken."""
    return shutil.copytree(evaluation_runs.better, tmp_path / "run")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has nothing to do with them: they take most of the time."""
    monkeypatch.setattr(inference.report, "pictures", lambda *_: [])


def stored(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return {record["qid"]: record for record in map(json.loads, lines)}


def change_records(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    changed = [line for record in records(folder).values() if (line := change(record)) is not None]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))


# ---- numbers


def test_headline_is_that_of_metrics_json(alone: Page, evaluation_runs: EvaluationRuns) -> None:
    metrics = stored(evaluation_runs.better)
    rows = {cells[0]: cells for cells in alone.tables["headline"][1:]}
    names = {"set IoU": "set_IoU", "absence recognised": "absent_accuracy", "unparsable answers": "parse_failure_rate"}
    assert [names.get(label, label) for label in rows] == list(METRICS)
    for label, cells in rows.items():
        name = names.get(label, label)
        low, high = metrics["intervals"][name]
        constants = [metrics["baselines"][key][name] for key in ("whole_video", "centre", "best_constant")]
        shown = [f"{metrics['averages'][name]:.1f}", f"{low:.1f} to {high:.1f}", "", *(f"{v:.1f}" for v in constants)]
        assert cells[1:] == shown, label
    assert metrics["averages"]["mIoU"] > 60 and metrics["averages"]["absent_accuracy"] == 50.0


def test_breakdowns_are_those_of_metrics_json(alone: Page, evaluation_runs: EvaluationRuns) -> None:
    parts = {way: groups for way, groups in stored(evaluation_runs.better)["breakdowns"].items() if len(groups) > 1}
    titles = {
        "window_length": "Length of the labelled windows",
        "position": "Position of the first labelled window",
        "kwargs.source": "source",
    }
    assert set(parts) == {"window_length", "position", "kwargs.source"} and set(alone.captioned) >= {"source"}
    for way, groups in parts.items():
        shown = alone.captioned[titles[way]][1:]
        assert [cells[:3] for cells in shown] == [
            [group, str(row["num_samples"]), f"{row['mIoU']:.1f}"] for group, row in groups.items()
        ]
        names = ("R1@0.3", "R1@0.5", "R1@0.7", "mAP")
        assert [cells[5:] for cells in shown] == [[f"{row[name]:.1f}" for name in names] for row in groups.values()]


@pytest.mark.usefixtures("without_figures")
def test_what_was_not_measured_is_a_dash(evaluation_runs: EvaluationRuns, run: Path, tmp_path: Path) -> None:
    from inference.evaluate import main as evaluate_main

    flags = ["--predictions", str(evaluation_runs.folder / "better.jsonl"), "--protocol", "time_r1"]
    evaluate_main([*flags, "--annotations", str(evaluation_runs.annotations), "--output_dir", str(run)])
    main(["--run", str(run)])
    page = Page(run / "report")
    assert [cells[0] for cells in page.tables["headline"][1:]] == [
        "mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "absence recognised", "unparsable answers",
    ]  # fmt: skip
    assert page.captioned["Length of the labelled windows"][1][-1] == "–"
    scores = {qid: sample_scores(record_of(row), "time_r1") for qid, row in records(run).items()}
    assert {qid: row["score"] for qid, row in page.rows.items()} == pytest.approx(
        {qid: found.get("mIoU", found.get("absent_accuracy")) for qid, found in scores.items()}
    )
    assert page.rows["q6"]["counted"] == 0  # the one with the highest score


def record_of(line: dict[str, Any]) -> dict[str, Any]:
    """A stored line as a sample: NaN is null on disk."""
    if not line["pred"]:
        return line
    return line | {"pred": [[math.nan if t is None else t for t in window] for window in line["pred"]]}


def test_only_rows_labelled_absent(evaluation_runs: EvaluationRuns, tmp_path: Path) -> None:
    from inference.evaluate import main as evaluate_main

    rows = [row for row in read_rows(evaluation_runs.annotations)[0] if row.timestamp == ()]
    write_rows(tmp_path / "absent.jsonl", rows)
    flags = ["--predictions", str(tmp_path / "p.jsonl"), "--annotations", str(tmp_path / "absent.jsonl")]
    (tmp_path / "p.jsonl").write_text('{"qid": "q4", "pred": []}\n{"qid": "q5", "pred": [[1, 2]]}\n')
    evaluate_main([*flags, "--output_dir", str(tmp_path / "run")])
    main(["--run", str(tmp_path / "run"), "--vs", str(tmp_path / "run")])
    page = Page(tmp_path / "run" / "report-vs-run")
    assert [cells[:3] for cells in page.tables["headline"][1:]] == [
        ["absence recognised", "50.0", "0.0 to 100.0"],
        ["unparsable answers", "0.0", "0.0 to 0.0"],
    ]
    assert [row["score"] for row in page.rows.values()] == [1.0, 0.0] and "<figure>" not in page.text


def test_rows_of_the_page(alone: Page, evaluation_runs: EvaluationRuns) -> None:
    rows, lines = alone.rows, records(evaluation_runs.better)
    assert list(rows) == list(lines) == [f"q{i}" for i in range(24) if i != 11]
    for qid, row in rows.items():
        scores = sample_scores(record_of(lines[qid]))
        assert row["score"] == pytest.approx(scores.get("mIoU", scores.get("absent_accuracy"))), qid
        assert row["truth"] == lines[qid]["gt_segments"] and row["sentence"] == lines[qid]["sentence"]
    grounded = [row["score"] for row in rows.values() if row["truth"]]
    assert 100 * sum(grounded) / len(grounded) == pytest.approx(stored(evaluation_runs.better)["averages"]["mIoU"])
    assert (rows["q4"]["truth"], rows["q4"]["pred"], rows["q4"]["score"]) == ([], [], 1.0)
    assert (rows["q5"]["truth"], rows["q5"]["pred"], rows["q5"]["score"]) == ([], [[2.0, 5.0]], 0.0)
    assert (rows["q6"]["counted"], rows["q6"]["pred"][0]) == (0, [4.5, 7.0, 0.8])
    assert rows["q6"]["ious"] == pytest.approx([2.5 / 3, 1.0]) and rows["q6"]["offsets"] == [0.5, 0.0]
    assert (rows["q9"]["pred"], rows["q9"]["counted"], rows["q9"]["offsets"]) == (None, None, None)
    assert rows["q10"]["pred"] == [] and rows["q12"]["pred"] == [[None, 3.0]] and rows["q12"]["offsets"] is None
    assert rows["q1"]["groups"] == {"source": "home & more"}


def test_times_of_a_trimmed_row_are_on_the_files_clock(alone: Page) -> None:
    row = alone.rows["q7"]
    assert (row["clip"], row["trimmed"], row["truth"]) == ([2.0, 8.0], True, [[3.0, 5.0]])
    assert row["pred"][0] == pytest.approx([3.1, 5.1]) and row["offsets"] == pytest.approx([0.1, 0.1])
    assert (alone.rows["q1"]["clip"], alone.rows["q1"]["trimmed"]) == ([0.0, 8.0], False)


@pytest.mark.usefixtures("without_figures")
def test_an_answer_of_a_model(run: Path) -> None:
    """Text and faults, which predictions from a file do not have; a very long text is cut."""
    long, fault = "x" * 5000, "videos/a.mp4: cannot be opened"
    texts = {"q1": {"text": long, "fault": None}, "q9": {"text": "", "fault": fault}}
    change_records(run, lambda record: record | texts.get(record["qid"], {}))
    main(["--run", str(run)])
    rows = Page(run / "report").rows
    assert rows["q9"]["fault"] == fault and rows["q1"]["fault"] is None
    assert rows["q1"]["text"].startswith("x" * 2000 + " … (3000 more characters")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_window_that_counts(protocol: str) -> None:
    line = {"qid": "a", "gt": [[0, 4], [10, 20]], "pred": [[1, 4], [10.4, 19.6], [30, 40]], "duration": 60}
    row = judge(line, protocol)
    place, offsets = (2, (20, 20)) if protocol == "time_r1" else (0, (1, 0))
    assert (row.counted, row.offsets_s) == (place, offsets)
    assert row.score == pytest.approx(0.0 if protocol == "time_r1" else 0.75)
    rounded = judge(line | {"pred": [[0.6, 3.6]]}, protocol)
    assert rounded.offsets_s == pytest.approx((1.0, 0.0) if protocol == "timelens" else (0.6, -0.4))


# ---- what it may hold


def test_markup_stays_text(alone: Page) -> None:
    assert alone.rows["q3"]["sentence"] == EVIL
    assert len(alone.scripts) == 2 == alone.text.count("<script") == alone.text.count("</script>")
    assert EVIL not in alone.text and "<b>stop" not in alone.text
    body = alone.scripts[1]
    policy = next(str(tag["content"]) for name, tag in alone.tags if tag.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not any(name.startswith("on") for _, tag in alone.tags for name in tag)
    assert "innerHTML" not in body and "insertAdjacentHTML" not in body and "eval(" not in body


@pytest.mark.usefixtures("without_figures")
def test_names_of_folders_and_groups_are_escaped(run: Path, tmp_path: Path) -> None:
    evil = run.rename(tmp_path / "a<img src=x>$b_1$&")
    change_records(evil, lambda r: r | {"kwargs": {"<i>key": f"<u>{int(r['qid'][1:]) % 2}"}})
    main(["--run", str(evil), "--output", str(tmp_path / "out")])
    page = Page(tmp_path / "out")
    assert "<img src=x>" not in page.text and "<i>key" not in page.text and "<u>0" not in page.text
    values = [tag["data-value"] for name, tag in page.tags if name == "option" and "data-value" in tag]
    assert values == ["<u>0", "<u>1"] and page.data["name"] == evil.name


def test_nothing_is_loaded_from_elsewhere(paired: Page, evaluation_runs: EvaluationRuns) -> None:
    assert not re.search(r"""(src|href|url|import|fetch)\W{0,4}(https?:)?//""", paired.text)
    files = [link for link in paired.links if not link.startswith("#")]
    assert len(files) == 12 and all((paired.folder / link).stat().st_size > 1000 for link in files)
    assert {link.rsplit("-", 1)[1] for link in files} == {"light.svg", "dark.svg"}
    assert {path.name for path in paired.folder.iterdir()} == {"index.html", "figures"}
    assert 'type="module"' not in paired.text and "fetch(" not in paired.text
    for name in files:
        assert not re.search(r"""(href|url\()\W{0,2}https?:""", (paired.folder / name).read_text()), name


def test_figures_have_the_colours_of_their_paper(alone: Page) -> None:
    for palette, other, theme in ((LIGHT, DARK, "light"), (DARK, LIGHT, "dark")):
        for path in sorted((alone.folder / "figures").glob(f"*-{theme}.svg")):
            text = path.read_text()
            assert palette.paper in text and palette.muted in text and palette.faint in text, path
            assert not any(colour in text for colour in (other.paper, other.muted, other.ink, other.faint)), path


# ---- figures


def test_recalls() -> None:
    curve = recalls([0.0, 0.5, 0.7, 1.0])
    assert (curve[0], curve[1], curve[50], curve[51], curve[70], curve[100]) == (100, 75, 75, 50, 50, 25)


def test_groups_of_neighbours() -> None:
    places = np.arange(40.0)
    centres, medians, low, high = grouped(places, 2 * places)
    assert centres.tolist() == [2.0, 7.0, 12.0, 17.0, 22.0, 27.0, 32.0, 37.0]
    assert medians.tolist() == (2 * centres).tolist() and (high - low).tolist() == [4.0] * 8
    alike = grouped(np.full(30, 8.0), np.arange(30.0))
    assert [part.tolist() for part in alike] == [[8.0], [14.5], [7.25], [21.75]]
    assert [part.tolist() for part in grouped(np.array([3.0]), np.array([1.0]))] == [[3.0], [1.0], [1.0], [1.0]]


def test_figures_say_what_they_show(evaluation_runs: EvaluationRuns) -> None:
    found = {picture.name: picture for picture in pictures(read_evaluation(evaluation_runs.better, "--run"), None)}
    assert list(found) == ["recall", "iou", "offsets", "lengths", "duration", "position"]
    ious = [row.score for row in read_evaluation(evaluation_runs.better, "--run").grounded]
    zero = 100 * sum(iou == 0 for iou in ious) / len(ious)
    assert found["iou"].caption.startswith(f"{zero:.1f} % have IoU 0") and zero > 0
    assert f"{100 * sum(iou >= 0.5 for iou in ious) / len(ious):.1f} % at 0.5" in found["recall"].summary
    assert "median start offset +0.10 s, median end offset +0.10 s" in found["offsets"].summary
    bars = found["iou"].figure(LIGHT).axes[0].patches[:20]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)  # type: ignore[attr-defined]


def evaluated(annotations: Path, folder: Path, windows: Callable[[float, float], Any], *flags: str) -> Path:
    """The folder of an evaluation of answers made from the labels by `windows(start, end)`."""
    from inference.evaluate import main as evaluate_main

    answers = folder / "answers.jsonl"
    rows = read_rows(annotations)[0]
    made = ({"qid": r.kwargs["qid"], "pred": [windows(*window) for window in r.timestamp or ()]} for r in rows)
    answers.write_text("".join(json.dumps(answer) + "\n" for answer in made))
    run = folder / "run"
    asked = ["--predictions", str(answers), "--annotations", str(annotations), "--output_dir", str(run)]
    evaluate_main([*asked, "--trust_units", *flags])
    return run


@pytest.mark.parametrize(
    ("windows", "names"),
    [
        (lambda s, e: [s, s], ["recall", "iou", "offsets", "duration", "position"]),  # a model that has collapsed
        (lambda s, e: [1e300, 1.7e308], ["recall", "iou", "offsets", "lengths", "duration", "position"]),
    ],
)
def test_figures_of_windows_that_are_none(
    windows: Any, names: list[str], evaluation_runs: EvaluationRuns, tmp_path: Path
) -> None:
    run = evaluated(evaluation_runs.annotations, tmp_path, windows)
    main(["--run", str(run)])
    drawn = {path.name for path in (run / "report" / "figures").iterdir()}
    assert drawn == {f"{name}-{theme}.svg" for name in names for theme in ("light", "dark")}


def words_of(axis: Any) -> list[str]:
    """The labels of a drawn axis, which are apart from each other."""
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = sorted((tick for tick in ticks if low <= tick.get_loc() <= high), key=lambda tick: tick.get_loc())
    words = [tick.label1 for tick in shown if tick.label1.get_text()]
    boxes = [label.get_window_extent() for label in words]
    assert all(before.x1 < after.x0 for before, after in zip(boxes, boxes[1:], strict=False))
    return [label.get_text() for label in words]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("duration", (20, 45, 200, 700), ["20", "50", "100", "200", "500"]),
        ("duration", (2, 45, 200, 3600), ["10", "100", "1000"]),
        ("lengths", (2, 3, 10, 60), ["2", "5", "10", "20", "50"]),
        ("lengths", (0.0002, 3, 10, 60), ["0.001", "0.01", "0.1", "1", "10"]),
    ],
)
def test_labels_of_logarithmic_axes_are_apart(
    name: str, values: Any, words: list[str], evaluation_runs: EvaluationRuns
) -> None:
    evaluation = read_evaluation(evaluation_runs.better, "--run")
    row = evaluation.rows["q0"]
    rows = {
        str(value): replace(row, record={**row.record, "duration": value}, lengths_s=(value, 3.0)) for value in values
    }
    found = {picture.name: picture for picture in pictures(replace(evaluation, rows=rows), None)}
    figure = found[name].figure(LIGHT)
    figure.canvas.draw()
    assert words_of(figure.axes[0].xaxis) == words


def test_lengths_are_those_of_the_protocol(evaluation_runs: EvaluationRuns, tmp_path: Path) -> None:
    """TimeLens rounds what is predicted, never a label."""
    flags = ("--protocol", "timelens")
    run = evaluated(evaluation_runs.annotations, tmp_path, lambda s, e: [s + 0.4, e + 0.6], *flags)
    judged = read_evaluation(run, "--run").rows["q0"]
    start, end = judged.record["gt"][0]
    rounded = round(end + 0.6) - round(start + 0.4)
    assert judged.lengths_s == (rounded, end - start) and rounded != pytest.approx(end - start + 0.2)


# ---- two evaluations


def test_paired_differences(paired: Page, evaluation_runs: EvaluationRuns) -> None:
    ours, theirs = records(evaluation_runs.better), records(evaluation_runs.worse)
    scores = {
        qid: (sample_scores(record_of(ours[qid])), sample_scores(record_of(theirs[qid])))
        for qid in ours
        if qid in theirs
    }
    cells = {row[0]: row[1:] for row in paired.tables["differences"][1:]}
    for name in ("mIoU", "R1@0.7", "mAP"):
        pairs = [100 * (a[name] - b[name]) for a, b in scores.values() if name in a]
        low, high = bootstrap_interval(pairs)
        mean = math.fsum(pairs) / len(pairs)
        verdict = "better" if low > 0 else "not clear"
        shown = [str(len(pairs)), signed(mean), f"{signed(low)} to {signed(high)}", verdict]
        assert [cells[name][place] for place in (0, 3, 4, 6)] == shown, name
        assert mean > 0
    averages = [evaluate(map(record_of, run.values()))["mIoU"] for run in (ours, theirs)]
    assert cells["mIoU"][1:3] == [percent(value) for value in averages]
    assert cells["absence recognised"][3] == "0.0" and cells["absence recognised"][6] == "not clear"


def test_changes_of_the_rows(paired: Page, evaluation_runs: EvaluationRuns) -> None:
    for qid, row in paired.rows.items():
        assert row["change"] == pytest.approx(row["score"] - row["vs"]["score"]), qid
    changes = [row["change"] for row in paired.rows.values()]
    wins, losses = sum(change > 1e-9 for change in changes), sum(change < -1e-9 for change in changes)
    assert (wins, losses) != (losses, wins) and losses >= 1
    assert f"{wins} better" in paired.words and f"{losses} worse" in paired.words
    assert f"{len(changes) - wins - losses} the same" in paired.words
    assert paired.data["vs"] == "worse" and paired.rows["q6"]["vs"]["counted"] == 1  # the other window ranks first


@pytest.mark.usefixtures("without_figures")
def test_fewer_queries_on_one_side(evaluation_runs: EvaluationRuns, tmp_path: Path) -> None:
    from inference.evaluate import main as evaluate_main

    flags = ["--predictions", str(evaluation_runs.folder / "worse.jsonl"), "--max_samples", "6"]
    some = tmp_path / "some"
    evaluate_main([*flags, "--annotations", str(evaluation_runs.annotations), "--output_dir", str(some)])
    ours, theirs = (read_evaluation(folder, "--run") for folder in (evaluation_runs.better, some))
    found = compare(ours, theirs)
    assert (len(found.changes), found.only_ours, found.only_theirs) == (6, 17, 0)
    assert found.metrics["parse_failure_rate"].num_pairs == 6
    main(["--run", str(some), "--vs", str(evaluation_runs.better)])
    page = Page(some / "report-vs-better")
    assert "6 queries are in both; 17 only in better" in " ".join(page.words.split())
    main(["--run", str(evaluation_runs.better), "--vs", str(some), "--output", str(tmp_path / "report")])
    lone = [row for row in Page(tmp_path / "report").rows.values() if "vs" not in row]
    assert len(lone) == 17 and not any("change" in row for row in lone)


def test_the_other_is_scored_by_the_same_protocol(evaluation_runs: EvaluationRuns) -> None:
    theirs = read_evaluation(evaluation_runs.worse, "--vs", "timelens")
    found = theirs.rows["q0"].scores
    assert "mAP" not in found and found == sample_scores(theirs.rows["q0"].record, "timelens")
    assert found["mIoU"] != sample_scores(theirs.rows["q0"].record)["mIoU"]


# ---- videos


def test_videos_are_linked(alone: Page) -> None:
    videos = alone.data["videos"]
    assert len(videos) == 13 and len({video["name"] for video in videos}) == 13
    for video in videos:
        if video["name"].endswith("gone.mp4"):
            assert video["src"] is None and video["note"].endswith("gone.mp4 was not there when this report was made.")
        else:
            linked = (alone.folder / unquote(video["src"])).resolve()
            assert linked == Path(video["name"]).resolve() and not video["src"].startswith("/")


@pytest.mark.usefixtures("without_figures")
def test_copied_videos(evaluation_runs: EvaluationRuns, tmp_path: Path) -> None:
    main(["--run", str(evaluation_runs.better), "--output", str(tmp_path / "report"), "--copy_videos"])
    page = Page((tmp_path / "report").rename(tmp_path / "moved"))
    videos = [video for video in page.data["videos"] if video["src"]]
    assert len(videos) == 12 == len(list((page.folder / "videos").iterdir()))
    for video in videos:
        assert (page.folder / unquote(video["src"])).read_bytes() == Path(video["name"]).read_bytes()


@pytest.mark.usefixtures("without_figures")
def test_odd_names_and_moved_videos(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links are quoted; videos that have moved are found under --videos_root, and nothing outside it is."""
    root = tmp_path / "new place"
    (root / "sub").mkdir(parents=True)
    names = {"q0": "sub/a #1 50%.mp4", "q1": "../outside.mp4"}
    for name in names.values():
        (root / name).write_bytes(b"x")
    change_records(run, lambda r: r | {"video": names.get(r["qid"], r["video"]), "video_path": "/gone.mp4"})
    main(["--run", str(run), "--videos_root", str(root)])
    page = Page(run / "report")
    videos = {qid: page.data["videos"][row["video"]] for qid, row in page.rows.items()}
    assert (run / "report" / unquote(videos["q0"]["src"])).resolve() == root / names["q0"]
    assert "#" not in videos["q0"]["src"] and videos["q1"]["src"] is None
    assert "lies outside data.videos_root" in videos["q1"]["note"]
    assert "13 of 14 videos cannot be shown" in capsys.readouterr().err
    main(["--run", str(run)])
    assert Page(run / "report").data["videos"][0]["note"] == "/gone.mp4 was not there when this report was made."


def test_the_evaluator_says_where_a_video_is(evaluation_runs: EvaluationRuns) -> None:
    lines = records(evaluation_runs.better)
    assert lines["q0"]["video_path"] == str(Path(lines["q0"]["video"]).absolute())


def test_groups_to_filter_by() -> None:
    kwargs = [{"qid": f"q{i}", "n": i % 3 + 9, "many": i, "one": 1, "list": [i % 2], "half": "x"} for i in range(60)]
    kwargs[0].pop("half")
    found = group_keys([Judged({"kwargs": row}, {}, None, None) for row in kwargs])
    assert found == {"n": ["9", "10", "11"], "half": ["(none)", "x"]}


# ---- the folder


@pytest.mark.usefixtures("without_figures")
def test_default_folders_and_the_path_that_is_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--run", str(run)])
    first = (run / "report" / "index.html").read_bytes()
    assert capsys.readouterr().out == f"{run}/report/index.html\n"
    main(["--run", str(run)])  # an earlier report is replaced, by the same bytes
    assert (run / "report" / "index.html").read_bytes() == first
    main(["--run", str(run), "--vs", str(run)])
    assert (run / "report-vs-run" / "index.html").is_file()


def test_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--run", str(run)])
    before = {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}
    calls: Iterator[int] = iter(range(100))
    save = inference.report.save_figure

    def fails_later(*args: Any) -> Path:
        if next(calls) == 5:
            raise OSError(28, "No space left on device", str(args[1]))
        return save(*args)

    monkeypatch.setattr(inference.report, "save_figure", fails_later)
    for flags in ([], ["--output", str(run.parent / "new" / "report")]):
        calls = iter(range(100))
        with pytest.raises(OSError, match="No space"):
            main(["--run", str(run), *flags])
    assert {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()} == before
    assert not [path for path in run.parent.rglob(".*unfinished*")] and not (run.parent / "new" / "report").exists()


# ---- bad input


@pytest.mark.usefixtures("without_figures")
def test_folders_that_are_no_evaluation(run: Path, tmp_path: Path) -> None:
    def refused(message: str, *flags: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            main(["--run", str(run), *flags])
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused("--vs .*none: no such folder", "--vs", str(tmp_path / "none"))
    refused("--vs .*empty holds no run.json, so it is no evaluation", "--vs", str(tmp_path / "empty"))
    (tmp_path / "empty" / "mine.txt").write_text("keep")
    refused("--output .*empty is not empty and holds no report", "--output", str(tmp_path / "empty"))
    refused("--output .*mine.txt is a file", "--output", str(tmp_path / "empty" / "mine.txt"))
    refused(f"--output {run} is not empty", "--output", str(run))
    metrics = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text("{")
    refused("metrics.json cannot be read")
    (run / "metrics.json").write_text('{"protocol": "default"}')
    refused("metrics.json is not what inference/evaluate.py writes")
    (run / "metrics.json").unlink()
    (run / "predictions.rank0.jsonl").write_text("{}\n{}\n")
    refused(r"is not finished \(2 answers stored, no metrics.json\); give its inference/evaluate.py command again")
    (run / "metrics.json").write_text(metrics)
    main(["--run", str(run)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "predictions.jsonl holds no answer, so there is nothing to show"),
        ("{", "predictions.jsonl:1 is not JSON"),
        ('{"qid": "q0"}', "predictions.jsonl:1 has no 'gt'"),
        ("[1]", "predictions.jsonl:1 has no 'qid'"),
        ("twice", "predictions.jsonl:24: qid 'q0' comes twice"),
        ("fewer", "metrics.json is not about the answers in predictions.jsonl: mIoU is .* of all 22 answers"),
    ],
)
def test_answers_that_do_not_fit(lines: str, message: str, run: Path) -> None:
    path = run / "predictions.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    known = {"twice": "".join([*whole, whole[0]]), "fewer": "".join(whole[1:])}
    path.write_text(known.get(lines, lines))
    with pytest.raises(UserError, match=message):
        main(["--run", str(run)])
    assert not (run / "report").exists()


def test_evaluations_that_cannot_be_paired(run: Path, evaluation_runs: EvaluationRuns) -> None:
    flags = ["--run", str(evaluation_runs.worse), "--vs", str(run)]
    made_of = stored(run, "run.json")
    other = made_of | {"annotations": {"name": "other.jsonl", "sha256": "f" * 64}}
    (run / "run.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"is an evaluation of other.jsonl \(f{8}\), .*worse one of queries.jsonl"):
        main(flags)
    (run / "run.json").write_text(json.dumps(made_of | {"data.trim": "absolute"}))
    change_records(run, lambda r: r | ({"gt": [[1.0, 3.0 + 1e-3]], "pred": r["pred"]} if r["qid"] == "q7" else {}))
    averages = evaluate(map(record_of, records(run).values()))
    metrics = stored(run)
    metrics["averages"] = {name: averages[name] for name in METRICS}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"1 of 23 queries have other labels there \('q7'; data.trim is absolute, here"):
        main(flags)
    (run / "run.json").write_text(json.dumps(made_of))
    change_records(run, lambda r: r | {"qid": f"other-{r['qid']}"})
    with pytest.raises(
        UserError, match=r"none of its 23 queries is among the 23 of .* \(the first there: 'other-q0'\)"
    ):
        main(flags)
