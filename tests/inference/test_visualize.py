"""The timeline picture: bars at the true times, the right words and scores, and files of every kind."""

import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from inference.timeline_rows import timeline_blocks
from inference.timeline_text import wrap
from inference.visualize import draw_timeline, format_time, visualize_temporal_grounding
from utils.common import REPO_ROOT, UserError
from utils.curves import save_figure
from utils.logging_utils import get_logger
from utils.palette import BLUE, DARK, GREEN, PURPLE
from utils.spans import Span
from utils.video import write_mp4

DURATION = 40.0


def frames(count=8, height=18, width=32):
    ramp = np.linspace(0, 255, count).astype(np.uint8)
    return np.broadcast_to(ramp[:, None, None, None], (count, height, width, 3)).copy()


def draw(predictions, ground_truths=None, duration=DURATION, pictures=None, **options):
    pictures = frames() if pictures is None else pictures
    times = np.linspace(0, duration, len(pictures))
    return draw_timeline(pictures, times, duration, predictions=predictions, ground_truths=ground_truths, **options)


def axes_of(figure, label):
    [axes] = [axes for axes in figure.axes if axes.get_label() == label]
    return axes


def bars(figure):
    """{id: (start, end)} of every bar."""
    patches = [patch for patch in axes_of(figure, "windows").patches if patch.get_gid()]
    return {patch.get_gid(): (patch.get_x(), patch.get_x() + patch.get_width()) for patch in patches}


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def answer(segments, *, parsed=True, raw_text="", query="the door opens"):
    """What `VideoTemporalInference.predict` returns, as far as pictures go."""
    start, end = segments[0] if segments else (None, None)
    return {
        "start_time": start, "end_time": end, "segments": segments, "raw_text": raw_text, "parsed": parsed,
        "query": query,
    }  # fmt: skip


def test_bars_lie_at_the_true_times_and_scores_stand_beside():
    figure = draw([(10.0, 15.0), (12.5, 17.5)], [(10.0, 15.0)])
    assert bars(figure) == {"ground-truth-1": (10, 15), "prediction-1-1": (10, 15), "prediction-2-1": (12.5, 17.5)}
    assert axes_of(figure, "windows").get_xlim() == axes_of(figure, "frames").get_xlim() == (0.0, DURATION)
    said = words(figure)
    assert [word for word in said if word in ("1.00", "0.33", "IoU")] == ["1.00", "0.33", "IoU"]
    assert "12.5 – 17.5 s" in said and "Prediction 2" in said
    [truth, first, _] = [patch for patch in axes_of(figure, "windows").patches if patch.get_gid()]
    assert truth.get_facecolor()[:3] == to_rgb(GREEN) and first.get_facecolor()[:3] == to_rgb(BLUE)


def test_every_form_of_a_prediction_draws_the_same():
    forms = [
        (3.0, 9.0), [3.0, 9.0], Span(3.0, 9.0), np.array([3.0, 9.0]), [(3.0, 9.0)], answer([[3.0, 9.0]]),
        {"start_time": 3.0, "end_time": 9.0},
    ]  # fmt: skip
    for form in forms:
        assert bars(draw([form])) == {"prediction-1-1": (3.0, 9.0)}, form


def test_iou_is_with_the_ground_truth_that_fits_best():
    [block] = timeline_blocks([[(20.0, 30.0), (0.0, 2.0)]], [(0.0, 4.0), (20.0, 25.0)])
    lanes = block.lanes
    assert lanes[1].ious == (0.5, 0.5)
    assert lanes[0].windows == (Span(0.0, 4.0), Span(20.0, 25.0)) and lanes[0].ious == ()


def test_without_ground_truth_there_is_neither_row_nor_score():
    figure = draw([(3.0, 9.0)])
    assert "Ground truth" not in words(figure) and "IoU" not in words(figure)


@pytest.mark.parametrize(
    ("prediction", "note"),
    [
        ([], "the answer says that the event does not happen"),
        (answer([]), "the answer says that the event does not happen"),
        ({"start_time": None, "end_time": None}, "the answer says that the event does not happen"),
        (None, "the answer could not be read"),
        (answer([], parsed=False, raw_text="I\n do not  know"), "the answer could not be read: “I do not know”"),
        (answer([], parsed=False), "the answer is empty"),
        ((math.nan, 9.0), "not a window in time"),
    ],
)
def test_no_window_is_said_in_words_and_scores_zero(prediction, note):
    figure = draw([prediction], [(10.0, 15.0)])
    assert note in words(figure)
    assert "0.00" in words(figure)
    assert set(bars(figure)) == {"ground-truth-1"}


def test_no_predictions_at_all():
    assert "no prediction" in words(draw([]))


def test_labelled_absent():
    figure = draw([[], (3.0, 9.0), None], [])
    said = words(figure)
    assert "the event is not in the video" in said
    assert [word for word in said if word in ("right", "wrong", "IoU")] == ["right", "wrong", "wrong"]


def test_windows_outside_the_video_are_shown_as_outside():
    figure = draw([(-3.0, 5.0), (50.0, 900.0)], [(30.0, 41.0)])
    assert bars(figure)["prediction-1-1"] == (-3.0, 5.0)
    assert bars(figure)["prediction-2-1"] == (50.0, 900.0)
    first, last = axes_of(figure, "windows").get_xlim()
    assert -0.13 * DURATION < first < -3.0 and DURATION < last < 1.13 * DURATION  # 900 s do not squeeze the video
    assert {"before\nthe video", "after\nthe video"} & set(words(figure)) == {"after\nthe video"}
    markers = [line for line in axes_of(figure, "windows").lines if line.get_marker() == ">"]
    assert len(markers) == 1 and DURATION < markers[0].get_xdata()[0] < last


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def test_a_window_shorter_than_a_pixel_is_visible():
    figure = draw([(3600.0, 3600.2)], duration=7200.0)
    blue = (np.abs(pixels(figure) - np.array(to_rgb(BLUE)) * 255) < 12).all(-1)
    columns = axes_of(figure, "windows").transData.transform([(3500, 0), (3700, 0)])[:, 0].astype(int)
    assert blue[:, columns[0] : columns[1]].any()
    assert "1:00:00.0 – 1:00:00.2" in words(figure)


def test_a_window_without_length_is_a_cross():
    figure = draw([(12.0, 12.0), (20.0, 8.0)], [(10.0, 15.0)])
    crosses = [line for line in axes_of(figure, "windows").lines if line.get_marker() == "x"]
    assert [cross.get_xdata()[0] for cross in crosses] == [12.0, 20.0]
    assert words(figure).count("0.00") == 2


@pytest.mark.parametrize("time", [0.0, 12.0, 38.0, 500.0])
def test_a_window_without_length_is_said_to_be_empty(time):
    figure = draw([(time, time), [(1.0, 2.0), (time, time)]], [(10.0, 15.0)])
    said = words(figure)
    assert said.count("an empty window: start = end") == 1  # of the row that has nothing else
    assert said.count(f"{time:.1f} s (empty)") == 2 and "1.0 – 2.0 s" in said
    axes = axes_of(figure, "windows")
    [note] = [text for text in axes.texts if text.get_gid() == "prediction-1-note"]
    frame, box = axes.get_window_extent(), note.get_window_extent()
    assert frame.x0 <= box.x0 and box.x1 <= frame.x1
    cross = axes.transData.transform((time, 0))[0]
    assert not box.x0 < cross < box.x1


def test_many_windows_are_listed_up_to_a_number():
    figure = draw([(0.0, 1.0)], [(4.0 * index, 4.0 * index + 2) for index in range(6)])
    said = words(figure)
    assert "8.0 – 10.0 s" in said and "and 3 more" in said and "12.0 – 14.0 s" not in said
    assert sum(name.startswith("ground-truth") for name in bars(figure)) == 6


@pytest.mark.parametrize("count", [1, 10, 100])
def test_rows_never_overlap(count):
    figure = draw([(index % 30, index % 30 + 5.0) for index in range(count)], [(10.0, 15.0)])
    axes = axes_of(figure, "windows")
    names = [text for text in axes.texts if text.get_text().startswith("Prediction")]
    assert len(names) == count
    boxes = sorted((text.get_window_extent().y0, text.get_window_extent().y1) for text in names)
    assert all(lower[1] < upper[0] for lower, upper in zip(boxes, boxes[1:], strict=False))


def test_nothing_leaves_the_page():
    queries = ["short", "a person in a red shirt picks up $5 and puts it on the table " * 12, "W" * 500, "é" * 500]
    for query in queries:
        figure = draw(
            [None, answer([], parsed=False, raw_text="W" * 300), (3599.0, 3600.0), (-1e9, 1e300)],
            [(10.0, 15.0)],
            duration=3700.0,
            query=query,
            labels=["a label that is much longer than the column", "W" * 60, "c", "d"],
        )
        assert len(figure.texts) <= 4
        listed = [text for text in axes_of(figure, "windows").texts if " – " in text.get_text()]
        scores = [text for text in axes_of(figure, "windows").texts if text.get_text() in ("0.00", "IoU")]
        edge = min(score.get_window_extent().x0 for score in scores)
        assert len(listed) == 3 and all(text.get_window_extent().x1 < edge for text in listed)
        pixels(figure)  # draws
        for text in [*figure.texts, *axes_of(figure, "windows").texts]:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text.get_text()
            assert box.y0 >= 0 and box.y1 <= figure.bbox.y1, text.get_text()


def test_dollar_signs_are_not_mathematics():
    figure = draw([None], query="takes $5 and $10_000")
    assert figure.texts[0].get_text() == "“takes $5 and $10_000”"
    assert not figure.texts[0].get_parse_math()


def test_the_title_is_the_query_of_the_predictions():
    assert draw([answer([[1, 2]], query="q one")] * 2).texts[0].get_text() == "“q one”"
    assert draw([(1, 2)]).texts == []


def test_several_queries_name_the_rows_and_have_no_common_truth():
    predictions = [answer([[1, 2]], query="opens door"), answer([[3, 4]], query="closes door")]
    figure = draw(predictions)
    assert {"opens door", "closes door"} <= set(words(figure)) and figure.texts == []
    with pytest.raises(
        UserError, match=r"belongs to one query, the predictions answer 2; give a mapping: ground_truths=\{query"
    ):
        draw(predictions, [(1.0, 2.0)])


@pytest.mark.parametrize("shape", [(180, 320), (320, 180), (40, 400), (100, 100)])
@pytest.mark.parametrize("given", [False, True])
def test_frames_keep_their_shape(shape, given):
    if given:  # whatever shape the decoder gave the frames
        figure = draw([(-5.0, 60.0)], pictures=frames(7, 64, 64), aspect=shape[1] / shape[0])
    else:
        figure = draw([(-5.0, 60.0)], pictures=frames(7, *shape))
    strip = axes_of(figure, "frames")
    assert len(strip.images) == 7
    for image in strip.images:
        box = image.get_window_extent()
        assert box.width / box.height == pytest.approx(shape[1] / shape[0], rel=0.02)
    boxes = [image.get_window_extent() for image in strip.images]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_frames_point_at_their_times_and_those_inside_are_marked():
    figure = draw([], [(10.0, 15.0)], pictures=frames(9))  # a frame every 5 s
    strip = axes_of(figure, "frames")
    pointers = [line for line in strip.lines if line.get_marker() == "v"]
    assert [line.get_xdata()[0] for line in pointers] == pytest.approx([5.0 * index for index in range(9)])
    marked = [index for index, line in enumerate(pointers) if to_rgb(line.get_color()) == to_rgb(GREEN)]
    assert marked == [2]  # the one at 15 s already shows what comes after the window


@pytest.mark.parametrize(
    ("duration", "unit", "labels"),
    [
        (2.0, "seconds", ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        (40.0, "seconds", ["0", "5", "10", "15", "20", "25", "30", "35", "40"]),
        (95.0, "minutes : seconds", ["0:00", "0:15", "0:30", "0:45", "1:00", "1:15", "1:30"]),
        (7200.0, "hours : minutes : seconds", [f"{15 * i // 60}:{15 * i % 60:02}:00" for i in range(9)]),
    ],
)
def test_ticks(duration, unit, labels):
    axes = axes_of(draw([(0.1, 1.0)], duration=duration), "windows")
    assert axes.get_xlabel() == unit
    assert [label.get_text() for label in axes.get_xticklabels()] == labels


def test_times_are_rounded_before_they_are_split():
    assert format_time(59.96, 90, 1) == "1:00.0"
    assert format_time(3599.7, 7200, 0) == "1:00:00"
    assert format_time(-4.0, 90, 1) == "−0:04.0"
    assert format_time(math.inf, 90, 1) == "inf"


def test_characters_without_a_font_are_said_in_one_line(tmp_path, caplog, recwarn, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", False)  # caplog also listens at the root
    get_logger().addHandler(caplog.handler)
    try:
        save_figure(draw([(1, 2)], query="\U0001308b\U0001309d"), tmp_path / "hieroglyphs.png", dpi=50)
    finally:
        get_logger().removeHandler(caplog.handler)
    assert [record.message.split(":")[0] for record in caplog.records] == [str(tmp_path / "hieroglyphs.png")]
    assert not recwarn.list


def test_wrapping():
    assert wrap("one two three", 7, 3) == ["one two", "three"]
    assert wrap("one two three four", 7, 2) == ["one two", "three…"]
    assert wrap("abcdefgh", 3, 9) == ["abc", "def", "gh"]
    assert wrap("开门开门", 4, 9) == ["开门", "开门"]
    assert wrap("", 4, 9) == []


# ---------------------------------------------------------------------------------------------- several queries

TWO = [answer([[10, 15]], query="door"), answer([[20, 22]], query="dog"), answer([[12.5, 17.5]], query="door")]


def test_each_query_has_its_truth_and_its_scores():
    figure = draw(TWO, {"dog": [(21, 22)], "door": [(10, 15)]})
    assert bars(figure) == {
        "query-1-ground-truth-1": (10, 15), "prediction-1-1": (10, 15), "prediction-3-1": (12.5, 17.5),
        "query-2-ground-truth-1": (21, 22), "prediction-2-1": (20, 22),
    }  # fmt: skip
    said = words(figure)
    order = ["door", "Ground truth", "Prediction 1", "Prediction 2", "dog", "Ground truth", "Prediction"]
    assert [word for word in said if word in order] == order
    assert [word for word in said if word in ("1.00", "0.33", "0.50")] == ["1.00", "0.33", "0.50"]
    assert said.count("IoU") == 2 and figure.texts == []


def test_rows_of_a_query_lie_below_its_name():
    axes = axes_of(draw(TWO, {"dog": [(21, 22)], "door": [(10, 15)]}), "windows")
    places = {patch.get_gid(): patch.get_y() for patch in axes.patches if patch.get_gid()}
    names = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert names["door"] < places["query-1-ground-truth-1"] < places["prediction-1-1"] < places["prediction-3-1"]
    assert places["prediction-3-1"] < names["dog"] < places["query-2-ground-truth-1"] < places["prediction-2-1"]


def test_queries_may_be_labelled_absent_or_not_at_all():
    said = words(draw([*TWO, answer([], query="sings"), (1, 2)], {"dog": None, "sings": []}))
    assert said.count("Ground truth") == 1 and "the event is not in the video" in said
    assert "right" in said and "IoU" not in said and "(no query)" in said


def test_labels_follow_their_predictions():
    said = words(draw(TWO, labels=["one", "two", "three"]))
    assert [word for word in said if word in ("one", "two", "three")] == ["one", "three", "two"]


def test_a_mapping_of_one_query_is_the_same_as_its_list():
    predictions = [answer([[1, 2]]), answer([[3, 4]])]
    assert bars(draw(predictions, {"the door opens": [(1, 3)]})) == bars(draw(predictions, [(1, 3)]))


def test_a_truth_of_a_query_that_nobody_answers_is_named():
    for given, kind in (
        ({"ground_truths": {"doog": [(1, 2)]}}, "ground_truths"),
        ({"saliency": {"doog": [1]}}, "saliency"),
    ):
        with pytest.raises(UserError, match=f"{kind} holds the query 'doog'.*did you mean 'dog'"):
            draw(TWO, **given)
    with pytest.raises(UserError, match="holds the query 'door', which no prediction carries; they carry none"):
        draw([(1, 2)], {"door": [(1, 2)]})


def test_long_queries_stay_on_the_page():
    figure = draw([answer([[1, 2]], query="W" * 300), answer([[1, 2]], query="the cat takes $5 and $6 " * 30)])
    pixels(figure)
    for text in axes_of(figure, "windows").texts:
        assert 0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= figure.bbox.x1, text.get_text()


# ---------------------------------------------------------------------------------------------- candidates


def faces(figure):
    """{id: opacity} of every bar."""
    return {
        patch.get_gid(): patch.get_facecolor()[3] for patch in axes_of(figure, "windows").patches if patch.get_gid()
    }


def test_opacity_follows_the_score_and_the_best_is_first():
    candidates = [(20.0, 30.0, 0.2), (10.0, 15.0, 1.0), (0.0, 2.0, 0.6)]
    forms = [candidates, answer([list(window[:2]) for window in candidates]) | {"scores": [0.2, 1.0, 0.6]}]
    for form in forms:
        figure = draw([form], [(10.0, 15.0)])
        assert bars(figure)["prediction-1-1"] == (10, 15) and bars(figure)["prediction-1-3"] == (20, 30)
        opacities = [faces(figure)[f"prediction-1-{number}"] for number in (1, 2, 3)]
        assert opacities == pytest.approx([1.0, 0.7, 0.4]) and faces(figure)["ground-truth-1"] == 1
        listed = [word for word in words(figure) if word in ("score", "1.00", "0.60", "0.20", "0.00")]
        assert listed == ["1.00", "1.00", "0.60", "0.00", "0.20", "0.00", "score"]  # score, then IoU
    assert bars(draw([(10.0, 15.0, 0.5)])) == {"prediction-1-1": (10, 15)}


def test_scores_beyond_0_to_1_run_from_the_lowest_to_the_highest():
    figure = draw([[(0, 1, -3.0), (1, 2, 5.0)], [(2, 3, 1.0)]])
    assert faces(figure) == pytest.approx({"prediction-1-1": 1.0, "prediction-1-2": 0.25, "prediction-2-1": 0.625})


def test_candidates_lie_on_the_lines_that_list_them():
    figure = draw([[(index, index + 5, 1 - index / 10) for index in range(9)]])
    axes = axes_of(figure, "windows")
    middles = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches if patch.get_gid()]
    lines = [text.get_position()[1] for text in axes.texts if " – " in text.get_text() or "more" in text.get_text()]
    assert len(lines) == 6 and "and 4 more" in words(figure)
    assert middles[:6] == pytest.approx(lines) and middles[6:] == pytest.approx([lines[-1]] * 3)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ((1, 2, math.nan), r"predictions\[0\] has the score nan; a score must be a finite number"),
        (answer([[1, 2]]) | {"scores": ["x"]}, "has the score 'x'"),
        (
            answer([[1, 2]]) | {"scores": [0.1, 0.2]},
            r"predictions\[0\] has 1 windows and 2 scores; give one score for each",
        ),
        ({"segments": [[1, 2, 0.5]], "scores": [0.1]}, "again under 'scores'; give them once"),
        (answer([[1, 2]]) | {"scores": 0.5}, r"\['scores'\] must be a list"),
        ((1, 2, 3, 4), r"predictions\[0\] must hold \(start, end\) pairs in seconds, or \(start, end, score\), got 1"),
    ],
)
def test_scores_are_checked(prediction, message):
    with pytest.raises(UserError, match=message):
        draw([prediction])


# ---------------------------------------------------------------------------------------------- saliency


def curves(figure):
    """{id: (times, heights from 0 to 1)} of every stretch of a curve."""
    lines = [line for line in axes_of(figure, "windows").lines if line.get_gid()]
    low = max(float(np.max(line.get_ydata())) for line in lines)
    high = min(float(np.min(line.get_ydata())) for line in lines)
    return {
        line.get_gid(): (line.get_xdata().tolist(), ((low - line.get_ydata()) / (low - high)).tolist())
        for line in lines
    }


def test_values_of_clips_lie_in_the_middle_of_their_clips():
    figure = draw([(1, 2)], saliency=[0.0, 0.5, 1.0, 0.25])
    times, heights = curves(figure)["saliency-line-1"]
    assert times == [0, 5, 15, 25, 35, 40] and heights == pytest.approx([0, 0, 0.5, 1, 0.25, 0.25])
    assert "highest 1 at 25.0 s" in words(figure) and "Saliency" in words(figure)
    [fill] = axes_of(figure, "windows").collections
    assert fill.get_gid() == "saliency-1" and fill.get_facecolor()[0][:3] == pytest.approx(to_rgb(PURPLE))


def test_missing_values_are_gaps():
    shown = curves(draw([], saliency=[math.nan, 0.0, 1.0, None, 0.5, float("nan"), 0.5, 0.5]))
    assert [times for times, _ in shown.values()] == [[5, 7.5, 12.5, 15], [20, 22.5, 25], [30, 32.5, 37.5, 40]]
    assert shown["saliency-line-2"][1] == pytest.approx([0.5] * 3)
    figure = draw([], saliency=[math.nan] * 3)
    assert "no values" in words(figure) and not axes_of(figure, "windows").collections


def test_values_at_given_times():
    shown = curves(draw([], saliency=([2, 10, 12], np.array([-1.0, 1.0, 3.0]))))
    assert shown["saliency-line-1"][0] == [2, 2, 10, 12, 12]
    assert shown["saliency-line-1"][1] == pytest.approx([0, 0, 0.5, 1, 1])  # from the lowest, which is below 0


def test_two_values_are_two_clips():
    assert curves(draw([], saliency=(1.0, 2.0)))["saliency-line-1"][0] == [0, 10, 30, 40]


def test_equal_values_draw_a_line():
    assert "highest 0 at 5.0 s" in words(draw([], saliency=[0, 0, 0, 0]))


def test_saliency_of_several_queries():
    each = draw(TWO, saliency={"door": [0, 1], "dog": [1, 0]})
    assert [name for name in curves(each) if "line" in name] == ["query-1-saliency-line-1", "query-2-saliency-line-1"]
    assert list(curves(draw(TWO, saliency=[0, 1]))) == ["saliency-line-1"]


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        ([], "at least one number"),
        ("high", "saliency must be a list of numbers"),
        (0.5, "saliency must be a list of numbers, got 0.5"),
        (["a"], "saliency must be a list of numbers"),
        ([[1, 2], [3, 4], [5, 6]], "saliency must be a list of at least one number"),
        ([0.1, math.inf], "infinite value; give NaN"),
        (([0, 1], [0.5]), "needs one time for each value, got 2 and 1"),
        (([0, 0], [0.5, 0.5]), "strictly increasing"),
        (([0, math.nan], [0.5, 0.5]), "finite and strictly increasing"),
    ],
)
def test_saliency_is_checked(saliency, message):
    with pytest.raises(UserError, match=message):
        draw([], saliency=saliency)


# ---------------------------------------------------------------------------------------------- light and dark


def test_dark_is_the_same_picture_in_other_colours():
    light, dark = (draw(TWO, {"door": [(10, 15)]}, saliency=[0, 1], theme=theme) for theme in ("light", "dark"))
    assert words(light) == words(dark) and bars(light) == bars(dark)
    assert (pixels(light)[0, 0] == 255).all()
    assert (pixels(dark)[0, 0] == np.round(np.array(to_rgb(DARK.paper)) * 255)).all()
    colours = {patch.get_facecolor()[:3] for patch in axes_of(dark, "windows").patches if patch.get_gid()}
    assert colours == {to_rgb(DARK.truth), to_rgb(DARK.prediction)}
    assert {text.get_color() for axes in dark.axes for text in axes.texts} == {
        DARK.ink, DARK.muted, DARK.truth, DARK.prediction, DARK.saliency,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four seconds at 8 frames per second that brighten steadily."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_mp4(path, frames(32, 48, 64), fps=8.0)
    return path


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_a_file_of_every_kind(video, tmp_path, suffix, start, theme):
    target = tmp_path / "new" / f"picture.{suffix}"
    written = visualize_temporal_grounding(
        video_path=video, predictions=[(1.0, 2.0)], ground_truths=[(1.0, 3.0)], output_path=str(target), query="opens",
        theme=theme,
    )  # fmt: skip
    assert written == target and target.read_bytes().startswith(start)
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    if suffix == "svg":
        text = target.read_text()
        assert 'id="prediction-1-1"' in text and 'id="ground-truth-1"' in text
        assert (DARK.paper in text) == (theme == "dark") and (DARK.ink in text) == (theme == "dark")


@pytest.mark.parametrize("num_frames", [None, 1, 5])
def test_the_frames_of_the_file_are_shown_in_order(video, num_frames, tmp_path, monkeypatch):
    seen = {}

    def spy(pictures, times_s, duration_s, **options):
        seen.update(options, pictures=pictures, times=np.asarray(times_s), duration=duration_s)
        return draw_timeline(pictures, times_s, duration_s, **options)

    monkeypatch.setattr("inference.visualize.draw_timeline", spy)
    visualize_temporal_grounding(
        video_path=video, predictions=[], output_path=tmp_path / "p.png", num_frames=num_frames
    )  # fmt: skip
    assert seen["duration"] == pytest.approx(4.0, abs=0.05)
    assert seen["aspect"] == pytest.approx(4 / 3)
    assert len(seen["pictures"]) == (num_frames or 9)
    assert (np.diff(seen["times"]) > 0).all() and 0 <= seen["times"][0] and seen["times"][-1] <= 4.0
    brightness = seen["pictures"].mean(axis=(1, 2, 3))
    expected = 255 * np.floor(seen["times"] * 8 + 0.01) / 31
    assert brightness == pytest.approx(expected, abs=14)


def no_decoding(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("decoded before the input was checked")

    monkeypatch.setattr("inference.visualize.probe_video", fail)
    monkeypatch.setattr("inference.visualize.read_clip", fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_path": "picture.jpg"}, r"\.png, \.svg or \.pdf, got 'picture.jpg'"),
        ({"output_path": "picture"}, r"\.png, \.svg or \.pdf"),
        ({"ground_truths": (10.0, 15.0)}, r"ground_truths must hold \(start, end\) pairs.*10\.0.*\[\(10\.0, 15\.0\)\]"),
        ({"ground_truths": [(1, 2, 3)]}, "pairs"),
        ({"predictions": (3.0, 9.0)}, r"predictions\[0\] must be a list, got 3\.0"),
        ({"predictions": {"segments": []}}, r"predictions=\[\.\.\.\] even for one"),
        ({"predictions": iter([(0.0, 1.0)])}, "predictions must be a list"),
        ({"predictions": [("a", "b")]}, r"predictions\[0\].*pairs"),
        ({"predictions": [{"raw_text": "x"}]}, r"predictions\[0\] has neither segments nor start_time"),
        ({"predictions": [(0, 1)] * 101}, "at most 100 predictions, got 101"),
        ({"labels": ["one", "two"]}, "1 expected, got 2"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"theme": "blue"}, "theme must be one of light, dark, got 'blue'"),
        ({"saliency": []}, "saliency must be a list of at least one number"),
    ],
)
def test_bad_input_is_refused_before_anything_is_decoded(change, message, monkeypatch, tmp_path):
    no_decoding(monkeypatch)
    monkeypatch.chdir(tmp_path)
    arguments = {"video_path": "v.mp4", "predictions": [(0.0, 1.0)], "output_path": "p.png"} | change
    with pytest.raises(UserError, match=message):
        visualize_temporal_grounding(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_video_without_length_has_no_time_axis():
    with pytest.raises(UserError, match="duration_s must be above 0"):
        draw([], duration=0.0)


def test_an_unreadable_video_is_named_and_leaves_no_picture(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for name in ("broken.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=name):
            visualize_temporal_grounding(
                video_path=tmp_path / name, predictions=[(0, 1)], output_path=tmp_path / "p.png"
            )  # fmt: skip
    assert not (tmp_path / "p.png").exists()


def test_the_package_loads_nothing_heavy():
    code = "import sys, inference; sys.exit(any(n in sys.modules for n in ('torch', 'matplotlib', 'av', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT).returncode == 0


def test_pictures_need_neither_torch_nor_pyplot():
    code = "import sys, inference.visualize; sys.exit(any(n in sys.modules for n in ('torch', 'matplotlib.pyplot')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT).returncode == 0
