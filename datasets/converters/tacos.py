"""TACoS: cooking videos of some minutes, sentences by several people, so that many rows stand twice.

`train.json`, `val.json`, `test.json`: one object by video, windows in frames:

    {"s00-d01.avi": {"timestamps": [[141, 354], [361, 732]], "sentences": ["She took out a knife", "She cut it"],
                     "fps": 29.4, "num_frames": 7346}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.converters.base import Converter, SourceRow, names_of, number, read_json, renamed, windows


class TACoS(Converter):
    """Reads one split; frames become seconds by the `fps` of the file, the frames stay in `kwargs.frames`."""

    name = "tacos"
    files = {split: (f"{split}.json", f"tacos_{split}.json") for split in ("train", "val", "test")}
    published = (
        "Published numbers count all 4001 test rows, exact duplicates included. For training, duplicates can go: "
        "--policy duplicate_row=drop."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        for video, item in read_json(path).items():
            fps, stem = number(item["fps"]), video.rpartition(".")[0] or video
            videos = (*renamed(video), *names_of(f"{stem}-cam-002"))
            pairs = zip(windows(item["timestamps"]), item["sentences"], strict=True)
            for index, ((first, last), sentence) in enumerate(pairs):
                yield SourceRow(
                    videos=videos,
                    sentence=sentence,
                    timestamp=((first / fps, last / fps),),
                    split=split,
                    qid=f"tacos-{split}-{stem}-{index}",
                    duration=number(item["num_frames"]) / fps,
                    kwargs={"vid": stem, "frames": item["timestamps"][index], "fps": fps},
                )
