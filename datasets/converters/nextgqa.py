"""NExT-GQA: questions about everyday videos, with the windows that show the answer.

`val.csv`, `test.csv` hold the questions (`video_id`, `qid`, `question`, `answer`, options `a0`..`a4`, `type`, ...):

    1234567890,719,320,240,what did the boy do after falling,stand up,8,TN,run,stand up,cry,sit,wave

`gsub_val.json`, `gsub_test.json` beside them hold the windows by video and question:

    {"1234567890": {"duration": 35, "location": {"8": [[0.5, 12.6]]}, "fps": 29.97}}

and `map_vid_vidorID.json` the folders of NExT-QA's videos (`{"1234567890": "0101/1234567890"}`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.converters.base import Converter, SourceRow, names_of, number, read_csv, read_json, windows


class NExTGQA(Converter):
    """Reads `<split>.csv` with `gsub_<split>.json`. The sentence is the question; answer and options are in kwargs."""

    name = "nextgqa"
    files = {split: (f"{split}.csv", f"gsub_{split}.json") for split in ("val", "test")}
    published = (
        "NExT-GQA's evaluation takes the best of a question's windows as released (36 test rows start before 0) and "
        "asks the question as it stands."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        places = read_json(path.with_name(f"gsub_{split}.json"))
        folders_file = path.with_name("map_vid_vidorID.json")
        folders = read_json(folders_file) if folders_file.is_file() else {}
        for record in read_csv(path):
            video, question = record["video_id"], record["qid"]
            place = places.get(video, {"location": {}})
            options = {key: value for key, value in record.items() if key not in ("video_id", "qid", "question")}
            yield SourceRow(
                videos=(*names_of(video), *names_of(folders.get(video, video))),
                sentence=record["question"],
                timestamp=windows(place["location"].get(question, ())) or None,
                split=split,
                qid=f"nextgqa-{split}-{video}-{question}",
                duration=number(place["duration"]) if "duration" in place else None,
                kwargs={"vid": video, **options},
            )
