"""Charades-STA: sentences about indoor videos of about 30 s, one window each.

`charades_sta_train.txt`, `charades_sta_test.txt`: one query a line, video id, start and end in seconds, sentence:

    AB1CD 24.3 30.4##a person turns on the light.

The lengths of the videos stand in Charades' own `Charades_v1_train.csv` and `Charades_v1_test.csv` (`id`, ...,
`length`), which belong beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.converters.base import Converter, SourceRow, names_of, number, read_csv, read_text


class CharadesSTA(Converter):
    """Reads `charades_sta_<split>.txt` and, where it lies beside it, `Charades_v1_<split>.csv`."""

    name = "charades_sta"
    files = {"train": ("charades_sta_train.txt",), "test": ("charades_sta_test.txt",)}
    published = (
        "Time-R1 and VideoMind score all 3720 test rows against the windows as released, ends past the video "
        "included. Older feature-based work (2D-TAN and what follows it) clips the ends and drops what is empty then: "
        "--policy end_past_duration=clip start_ge_end=drop."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        lengths = self._lengths(path.with_name(f"Charades_v1_{split}.csv"))
        for line_number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            head, sentence = line.removesuffix("\r").split("##", maxsplit=1)
            video, start, end = head.split()
            yield SourceRow(
                videos=names_of(video),
                sentence=sentence,
                timestamp=((number(start), number(end)),),
                split=split,
                qid=f"charades_sta-{split}-{line_number}",
                duration=lengths.get(video),
                kwargs={"vid": video},
            )

    @staticmethod
    def _lengths(path: Path) -> dict[str, float]:
        """Seconds by video id; empty without the file, and the videos are asked then."""
        return {row["id"]: number(row["length"]) for row in read_csv(path)} if path.is_file() else {}
