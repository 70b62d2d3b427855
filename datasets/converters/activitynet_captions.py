"""ActivityNet Captions: paragraphs about YouTube videos of about 2 minutes, a window for every sentence.

`train.json`, `val_1.json`, `val_2.json`: one object, seconds by video id:

    {"v_abcdefghijk": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]],
                       "sentences": ["A woman stands in a room.", " She dances around."]}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.converters.base import Converter, SourceRow, names_of, number, read_json, windows


class ActivityNetCaptions(Converter):
    """Reads `train.json`, `val_1.json` or `val_2.json`."""

    name = "activitynet_captions"
    files = {
        "train": ("train.json", "activitynet_train.json"),
        "val_1": ("val_1.json",),
        "val_2": ("val_2.json", "anet_test.json"),
    }
    published = (
        "Grounding work validates on val_1 and reports val_2 as its test set of 17031 rows, windows as released. "
        "Time-R1 strips the sentences, which our prompts do by themselves."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        for video, item in read_json(path).items():
            pairs = zip(windows(item["timestamps"]), item["sentences"], strict=True)
            for index, (window, sentence) in enumerate(pairs):
                yield SourceRow(
                    videos=names_of(video, video.removeprefix("v_")),
                    sentence=sentence,
                    timestamp=(window,),
                    split=split,
                    qid=f"activitynet_captions-{split}-{video}-{index}",
                    duration=number(item["duration"]),
                    kwargs={"vid": video},
                )
