"""Every grammar of the answer parser on written examples, its promises as properties, and the IoU on both."""

import doctest
import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import spans as spans_module
from utils.config import PromptConfig
from utils.prompts import format_answer
from utils.spans import Span, parse_spans, temporal_iou

W = [(3.2, 7.9)]
TWO = [(3.2, 7.9), (12.0, 15.5)]
CLOCK = [(12.0, 65.0)]

PLAIN = {
    "3.2 to 7.9": W,
    "From 3.2 to 7.9": W,
    "from 3.2 to 7.9.": W,
    "3.2 - 7.9": W,
    "3.2-7.9": W,
    "3.2 -7.9": W,
    "3.2- 7.9": W,
    "3.2 -- 7.9": W,
    "3.2--7.9": W,
    "3.2 -> 7.9": W,
    "3.2 => 7.9": W,
    "3.2 .. 7.9": W,
    "3.2~7.9": W,
    "3.2 until 7.9": W,
    "3.2 till 7.9": W,
    "3.2 through 7.9": W,
    "3.2 up to 7.9": W,
    "[3.2, 7.9]": W,
    "[3.2,7.9]": W,
    "(3.2, 7.9)": W,
    "( 3.2 , 7.9 )": W,
    "[[3.2, 7.9]]": W,
    "[(3.2, 7.9)]": W,
    "[3.2 - 7.9]": W,
    "[3.2 to 7.9]": W,
    "[3.2] - [7.9]": W,
    "['3.2', '7.9']": W,
    '["3.2", "7.9"]': W,
    '"3.2" to "7.9"': W,
    "<3.2> to <7.9>": W,
    "between 3.2 and 7.9": W,
    "between about 3.2 and around 7.9": W,
    "The event happens between 3.2 and 7.9.": W,
    "The event happens at [3.2, 7.9].": W,
    "The answer is 3.2 to 7.9.": W,
    "I'd say 3.2 to 7.9.": W,
    "The clip between 3.2 and 7.9 shows it.": W,
    "Answer: 3.2 to 7.9": W,
    "answer = [3.2, 7.9]": W,
    "timestamps: [3.2, 7.9]": W,
    "3.2 to 7.9: a man opens the door": W,
    "3.2 - 7.9, a man opens the door": W,
    "3.2 - 7.9 A man opens the door": W,
    "A man opens the door: 3.2 - 7.9": W,
    "From 3.2 to 7.9 the man opens the door.": W,
    "From 3.2\nto 7.9": W,
    "From: 3.2, To: 7.9": W,
    "\\boxed{3.2 - 7.9}": W,
    "**3.2** to **7.9**": W,
    "*3.2*-*7.9*": W,
    "`3.2 to 7.9`": W,
    "approximately 3.2 to approximately 7.9": W,
    "t=3.2 to t=7.9": W,
    "+3.2 to +7.9": W,
    ".5 to 1.5": [(0.5, 1.5)],
    "Well...3.2..7.9": W,
    "3e0 to 7.9e1": [(3.0, 79.0)],
    "[100,200]": [(100.0, 200.0)],
    "1,200 to 1,300.5": [(1200.0, 1300.5)],
    "(1,200 to 1,300)": [(1200.0, 1300.0)],
    "[1,200, 1,300]": [(1200.0, 1300.0)],
}

UNITS = {
    "From 3.2 to 7.9 seconds.": W,
    "3.2s - 7.9s": W,
    "3.2s-7.9s": W,
    "3.2s -7.9s": W,
    "3.2 s to 7.9 s": W,
    "3.2 sec - 7.9 sec": W,
    "3.2secs~7.9secs": W,
    "3.2 SECONDS TO 7.9 SECONDS": W,
    "3.2 to 7.9s": W,
    "3.2s to 7.9": W,
    "From 3.2 to 7.9 (seconds)": W,
    "[3.2, 7.9] seconds": W,
    "3.2 sec. to 7.9 sec.": W,
    "The man enters the frame from 3.2 to 7.9 seconds.": W,
    "The event happens in [3.2, 7.9]s.": W,
    "<3.2 seconds> to <7.9 seconds>": W,
    "<3.2 seconds>-<7.9 seconds>": W,
    "<3.2> to <7.9> seconds": W,
    "from <3.0 seconds> to <7.0 seconds>": [(3.0, 7.0)],
    "from second 3.2 to second 7.9": W,
    "between 3.2s and 7.9s": W,
    "between the 3.2 second and the 7.9 second mark": W,
    "the 3.2 to 7.9 second mark": W,
    "3.2-7.9 second segment": W,
    "the 3.2-7.9 second video segment": W,
    "The event happens in 3.2 - 7.9 seconds.": W,
    "The event 'person turn a light on' happens in the 3.2 - 7.9 seconds": W,
    "3200 ms - 7900 ms": W,
    "3200ms to 7900ms": W,
    "3200 to 7900 milliseconds": W,
    "3,200 ms to 7,900 ms": W,
    "2 min to 2.5 min": [(120.0, 150.0)],
    "2 to 2.5 min": [(120.0, 150.0)],
    "2m - 2.5m": [(120.0, 150.0)],
    "[2, 2.5] minutes": [(120.0, 150.0)],
    "0.5 to 1.5 (minutes)": [(30.0, 90.0)],
    "30 s to 1.5 minutes": [(30.0, 90.0)],
    "0 to 2 min": [(0.0, 120.0)],
    "1 h to 1.5 h": [(3600.0, 5400.0)],
    "1 to 1.5 hours": [(3600.0, 5400.0)],
    "1 min 5 s to 1 min 12.5 s": [(65.0, 72.5)],
    "1m5s - 1m12s": [(65.0, 72.0)],
    "00m03s-00m07s": [(3.0, 7.0)],
    "1 minute and 5 seconds to 2 minutes": [(65.0, 120.0)],
    "1h 2m 3s to 1h 2m 10s": [(3723.0, 3730.0)],
    "1 hour, 2 minutes to 1 hour, 3 minutes": [(3720.0, 3780.0)],
    "1,200 to 1,300 seconds": [(1200.0, 1300.0)],
}

CLOCKS = {
    "0:12 - 1:05": CLOCK,
    "0:12-1:05": CLOCK,
    "00:12 to 01:05": CLOCK,
    "00:00:12 - 00:01:05": CLOCK,
    "00:00:12.0 to 00:01:05.0": CLOCK,
    "**00:12 – 01:05**": CLOCK,
    "(0:12 to 1:05)": CLOCK,
    "[0:12] to [1:05]": CLOCK,
    "(0:12)-(1:05)": CLOCK,
    "[0:12, 1:05]": CLOCK,
    '["0:12", "1:05"]': CLOCK,
    "between 0:12 and 1:05": CLOCK,
    "0:12 -1:05": CLOCK,
    "0:12 - 1:05: a man opens the door": CLOCK,
    "0:12 to 1:05 minutes": CLOCK,
    "0:12 to 65 s": CLOCK,
    "0 - 1:05": [(0.0, 65.0)],
    "0:00:12,000 --> 0:01:05,000": CLOCK,
    "1:05.25 - 1:12.5": [(65.25, 72.5)],
    "75:30 - 80:00": [(4530.0, 4800.0)],
    "1:00:00 to 1:01:01": [(3600.0, 3661.0)],
    "The man sits from 0:12 to 1:05 (a range of 40-50 seconds).": CLOCK,
    "1. 0:12 - 1:05": CLOCK,
    "Scene 2 - 0:12 to 1:05": CLOCK,
    "- 0:12 - 1:05": CLOCK,
}

LABELLED = {
    "Start: 3.2, End: 7.9": W,
    "start: 3.2s\nend: 7.9s": W,
    "Start time: 3.2 seconds; end time: 7.9 seconds": W,
    "start_time=3.2 end_time=7.9": W,
    "startTime: 3.2, endTime: 7.9": W,
    "Start Time: 00:12, End Time: 01:05": CLOCK,
    "**Start:** 0:12\n**End:** 1:05": CLOCK,
    "It begins at 3.2 s and ends at 7.9 s.": W,
    "starts at around 3.2 and finishes at about 7.9": W,
    "started at 3.2 and stopped at 7.9": W,
    "starting at 3.2 seconds and ending at 7.9 seconds": W,
    "beginning at the 3.2 second mark, ending at the 7.9 second mark": W,
    "The start is 3.2 and the end is 7.9": W,
    "Start - 3.2, End - 7.9": W,
    "Start (s): 3.2, End (s): 7.9": W,
    "Start: 2, End: 2.5 min": [(120.0, 150.0)],
    "<start>3.2</start><end>7.9</end>": W,
    "{'start': 3.2, 'end': 7.9}": W,
    '{"start_time": 3.2, "end_time": 7.9': W,
    '{"start": 0:12, "end": 1:05}': CLOCK,
    "Start: 3.2, End: 7.9; Start: 12, End: 15.5": TWO,
    "The video starts at 0 s. The event starts at 3.2 s and ends at 7.9 s. The video ends at 60 s.": W,
    "start: -3.2, end: 7.9": [(-3.2, 7.9)],
    "It starts at 3.2 s and goes on until 7.9 s.": W,
}

JSON = {
    '{"start_time": 3.2, "end_time": 7.9}': W,
    '{"start": 3.2, "end": 7.9}': W,
    '{"end": 7.9, "start": 3.2}': W,
    '{"startTime": 3.2, "endTime": 7.9}': W,
    '{"Start Time": 3.2, "End Time": 7.9}': W,
    '{"start": "3.2s", "end": "7.9 seconds"}': W,
    '{"start": "0:12", "end": "1:05"}': CLOCK,
    '{"start_ms": 3200, "end_ms": 7900}': W,
    '{"start_seconds": 3.2, "end_seconds": 7.9}': W,
    '{"start": 3200, "end": 7900, "unit": "ms"}': W,
    '{"time": [3.2, 7.9]}': W,
    '{"time": "3.2 - 7.9"}': W,
    '{"time_range": [3.2, 7.9]}': W,
    '{"start": 3.2, "end": 7.9, "unit": "seconds"}': W,
    '{"timestamp": "From 3.2 to 7.9 seconds."}': W,
    '{"timestamps": ["0:12", "1:05"]}': CLOCK,
    '{"timestamp": "0:12 - 1:05", "event": "2 to 3 dogs"}': CLOCK,
    '{"segments": [[3.2, 7.9], [12, 15.5]]}': TWO,
    '{"segments": [{"start": 3.2, "end": 7.9}, {"start": 12, "end": 15.5}]}': TWO,
    '{"segments": ["3.2-7.9", "12 - 15.5"]}': TWO,
    '{"answer": "3.2 to 7.9"}': W,
    '{"answer": "The event does not happen in the video."}': [],
    '{"segments": []}': [],
    '{"events": [{"label": "a man sits", "time": [3.2, 7.9]}]}': W,
    '{"result": {"start": 3.2, "end": 7.9}, "score": [0, 1]}': W,
    '[{"start": 3.2, "end": 7.9}, {"start": 12.0, "end": 15.5}]': TWO,
    '{"start": 3.2, "end": 7.9}\n{"start": 12.0, "end": 15.5}': TWO,
    '```json\n[\n  {"start": 3.2, "end": 7.9, "label": "the “red” car — 2 to 3"}\n]\n```': W,
    'The answer is {"start": 3.2, "end": 7.9}, not 1 to 2.': W,
    '{not json} {"start": 3.2, "end": 7.9}': W,
    '{"start": "a", "end": "b"} 3.2 to 7.9': W,
    '{"start": -3.0, "end": 9}': [(-3.0, 9.0)],
    # read by key alone
    '{"bbox": [10, 20]}': None,
    '{"bbox_2d": [10, 20, 30, 40]}': None,
    '{"confidence": [0.2, 0.7]}': None,
    '{"label": "steps from 3 to 7"}': None,
    '{"frames": [30, 70]}': None,
    '{"frames": [30, 70], "x": ': None,
    '{"start_frame": 30, "end_frame": 70}': None,
    '{"frames": {"start": 30, "end": 70}}': None,
    '{"start": 30, "end": 70, "unit": "frames"}': None,
    '{"start": 3.2}': None,
    '{"start": 3.2, "end": null}': None,
    '{"start": null, "end": null}': None,
    '{"start": true, "end": false}': None,
    '{"start": NaN, "end": Infinity}': None,
    '{"start": 1e999, "end": 2e999}': None,
    '{"time": 3.2}': None,
    '{"timestamps": [3, 7, 9, 12]}': None,
    "{}": None,
}

TAGS = {
    "<answer>3.2 to 7.9</answer>": W,
    "<think>The man sits at 1 s to 2 s.</think>\n<answer>3.2 to 7.9</answer>": W,
    "<think>from 1 to 2</think><answer>From 3.2 to 7.9 seconds.</answer>": W,
    "<answer>1 to 2</answer> no: <answer>3.2 to 7.9</answer>": W,
    "<answer>3.2 to 7.9</answer> or <answer>1 to 2": W,
    "<answer>3.2 to 7.9</answer> and 1 to 2 </answer>": W,
    "1 to 2 </answer> 12 to 15.5 <answer>": [(1.0, 2.0), (12.0, 15.5)],
    "<answer><answer>3.2 to 7.9</answer></answer>": W,
    "<ANSWER>\n3.2 to 7.9\n</Answer>": W,
    "<answer>3.2 to 7.9": W,
    "<answer></answer>": None,
    "1 to 2 <answer></answer>": None,
    "<think>1 to 2</think><answer> </answer>": None,
    "<answer>A</answer> 1 to 2": None,
    "<think>1 to 2 seconds</think>": None,
    "<think>1 to 2 s</think> 3.2 to 7.9 s": W,
    "<think>1 to 2 s</think> 2 to 3 s <think>?</think> 3.2 to 7.9 s": W,
    "1 to 2 s</think>3.2 to 7.9 s": W,
    '<think>1 to 2</think><answer>{"start": 3.2, "end": 7.9}</answer>': W,
    "<think>hm</think><answer>The event does not happen in the video.</answer>": [],
    "<think>It does not happen in the video.</think><answer>3.2 to 7.9</answer>": W,
    "From 3.2 to 7.9 seconds.<|im_end|>": W,
}

SEVERAL = {
    "From 3.2 to 7.9 seconds and from 12.0 to 15.5 seconds.": TWO,
    "From 3.2 to 7.9 and from 12.0 to 15.5 seconds.": TWO,
    "From 3.2 to 7.9 seconds and 12.0 to 15.5": TWO,
    "[[3.2, 7.9], [12.0, 15.5]]": TWO,
    "[(3.2, 7.9), (12.0, 15.5)]": TWO,
    "[3.2, 7.9] and [12.0, 15.5]": TWO,
    "[3.2, 7.9] - [12.0, 15.5]": TWO,
    "3.2-7.9, 12.0-15.5": TWO,
    "3.2-7.9,12.0-15.5": TWO,
    "3.2s-7.9s,12s-15.5s": TWO,
    "3.2 - 7.9; 12 - 15.5": TWO,
    "3.2 to 7.9\n12.0 to 15.5": TWO,
    "- 3.2 to 7.9 s\n- 12.0 to 15.5 s": TWO,
    "* 3.2 - 7.9\n* 12.0 - 15.5": TWO,
    "1. 3.2 - 7.9 seconds\n2. 12.0 - 15.5 seconds": TWO,
    "1. 3.2 - 7.9 seconds\n2. 12.0 - 15.5": TWO,
    "1) 3.2 to 7.9\n2) 12.0 to 15.5": TWO,
    "Event 1: 3.2 - 7.9, event 2: 12.0 - 15.5": TWO,
    "12.0 to 15.5 s, then 3.2 to 7.9 s": [(12.0, 15.5), (3.2, 7.9)],
    "1 to 2, 3 to 4 and 5 to 6 minutes": [(60.0, 120.0), (180.0, 240.0), (300.0, 360.0)],
    "1000 to 2000 and 3000 to 4000 ms": [(1.0, 2.0), (3.0, 4.0)],
    "0:12 - 1:05, 1:10 - 1:20": [(12.0, 65.0), (70.0, 80.0)],
    "0:12-1:05,1:10-1:20": [(12.0, 65.0), (70.0, 80.0)],
    "3.2 to 7.9 and 3.2 to 7.9": [(3.2, 7.9), (3.2, 7.9)],
    "From 3.2 to 7.9 seconds (0:03 to 0:07)": [(3.0, 7.0)],  # the clock comes first in the contract's order
}

AS_WRITTEN = {
    "From 7.9 to 3.2 seconds.": [(7.9, 3.2)],
    "1:05 - 0:12": [(65.0, 12.0)],
    "3 to 3": [(3.0, 3.0)],
    "0.123456789 to 99999.5 s": [(0.123456789, 99999.5)],
    "-3.0 to 9.0": [(-3.0, 9.0)],
    "\u22123.0 to 9.0": [(-3.0, 9.0)],
    "From -3.0 to -1.5 seconds.": [(-3.0, -1.5)],
    "[-3.0, 9.0]": [(-3.0, 9.0)],
    "3.0 - -9.0": [(3.0, -9.0)],
    "-3s - 9s": [(-3.0, 9.0)],
    "-0:03 to 0:09": [(-3.0, 9.0)],
    "- 3.0 to 9.0": [(3.0, 9.0)],
    "t=-3 to 9": [(-3.0, 9.0)],
    "The event \u20143 to 9": [(3.0, 9.0)],  # an em dash is no sign
    "The event: \u20143 to 9 s": [(3.0, 9.0)],
    "[-3.0 -1.0]": None,  # a pair of signed numbers or a range: cannot be told
}

WRITING = {
    **{f"3.2{dash}7.9": W for dash in "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"},
    **{f"3.2s {dash} 7.9s": W for dash in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"},
    "3.2\u301c7.9": W,
    "3.2 \u2192 7.9": W,
    "3.2\u20267.9": W,
    "\uff13.\uff12 to \uff17.\uff19 seconds": W,
    "\uff13\uff0e\uff12\uff5e\uff17\uff0e\uff19": W,
    "\uff10\uff1a\uff11\uff12 - \uff11\uff1a\uff10\uff15": CLOCK,
    "\uff3b3.2\uff0c 7.9\uff3d": W,
    "3.2\u00a0s to 7.9\u202fs": W,
    "3.2   to \t 7.9": W,
    "\u200b3.2 to\ufeff 7.9": W,
    "\u0663.\u0662 to \u0667.\u0669": W,
    "\u201c3.2\u201d to \u201c7.9\u201d": W,
}

ABSENT = [
    "The event does not happen in the video.",
    "The event does not happen in the video",
    "the event doesn't happen in this video.",
    "The event doesn\u2019t happen in the video.",
    "The event does not occur.",
    "The event does not occur in the given video clip.",
    "This event never happens.",
    "The described action does not take place at any point in the video.",
    "The event is not present in the video.",
    "It isn't shown in this clip.",
    "The event is not in the video.",
    "The event cannot be found in the video.",
    "The event was not found.",
    "Not found.",
    "not present",
    "The event is absent.",
    "The event is absent from the video.",
    "None",
    "none.",
    "N/A",
    "absent",
    "[]",
    "```json\n[]\n```",
    "No such event.",
    "There isn't any such event.",
    "The query does not match any moment in the video.",
    "Event not present in video.",
    "There is no such event in the video.",
    "There is no event that matches the description.",
    "No matching segment was found.",
    "There is no dog in the video.",
    "The video does not show this event.",
    "The video doesn't contain a man opening the door.",
    "I could not find the event in the video.",
    "I am unable to find the event.",
    "The two men do not appear in the video.",
    "The event 'person takes 2 cups' does not happen in the video.",
    "The event does not happen in the 60-second video.",
    "The event does not happen in the 60 second video.",
    "No, the event does not happen, because the man leaves.",
    "<think>He may sit at 3 s.</think>The event does not happen in the video.",
]

NOT_ABSENT = [
    "",
    " \n ",
    "I cannot determine the time.",
    "I cannot see the video.",
    "I cannot find the exact timestamps.",
    "It is not clear when it happens in the video.",
    "I am not sure when the event occurs.",
    "It is not clear whether the event occurs in the video.",
    "If the event does not happen in the video, say so.",
    "It might not happen in the video.",
    "The man does not appear until the dog leaves.",
    "The event does not happen at the beginning of the video but at the end.",
    "The event does not happen before the man sits.",
    "The event does not happen in the first half.",
    "The event does not happen at 3 s.",
    "The event does not happen between 3 and 7 seconds.",
    "The event does not happen from 0:12 to 1:05.",
    "It is not at the start; the event appears at 12.5 s.",
    'The event "the dog does not appear in the video" happens at the end.',
    "No doubt it happens.",
    "No other event is like this.",
    "There are no scene cuts.",
    "The video does not show when he sits.",
    "The video does not show the exact time.",
    "There is no clear start.",
    "Nothing is known.",
    "The event happens in the video.",
    "Yes.",
    "No.",
    "A",
]

NOTHING = [
    # one time alone, or two that nothing joins
    "at 3.2 seconds",
    "3.2",
    "0:12",
    "3.2 7.9",
    "3.2, 7.9",
    "3.2 and 7.9",
    "3.2s, 7.9s",
    "at 3.2 s and at 7.9 s",
    "3.2 or 7.9",
    "The man jumps at 3 s, the dog at 7 s.",
    "from 3.2 s to the end",
    "until 7.9 s",
    "The event starts at 3.2.",
    "ends at 7.9",
    "End: 7.9, Start: 3.2",
    "End: 7, Start: 3, End: 12, Start: 10",
    "The video ends at 60 s. The event starts at 3 s.",
    "from to seconds",
    "NaN to inf",
    "From nan to nan seconds.",
    "1e999 to 2e999 s",
    "start: 1e308, end: 1e308 min",
    # counts and other things than time
    "2 to 3 people",
    "There are 2 to 3 people.",
    "from 2 to 3 people",
    "in 2 to 3 days",
    "between 2 and 3 dogs",
    "[3, 7] apples",
    "steps 1 to 3",
    "Steps: 1 - 3",
    "Score: 3-7",
    "They won 3-7.",
    "The score was 2 to 1.",
    "ages 5-7",
    "page 3 - 7",
    "bbox [10, 20]",
    "bbox: [10, 20]",
    '{"bbox": [10, 20], "x": ',
    "at position (100, 200)",
    "[10, 20, 30, 40]",
    "5 to 7 meters",
    "$5 to $7",
    "5\u00b0 to 7\u00b0",
    "16:9 to 4:3",
    "COVID-19 to 20",
    "1.5 to 2 times",
    "The dog jumps [1, 2].",
    # frames
    "frames 30 to 70",
    "Frames: 30-70",
    "frame 30 - frame 70",
    "from frame 30 to frame 70",
    "frames from 30 to 70",
    "The frames are 30 to 70.",
    "Frame range: 30 - 70",
    "2.3 s (frame 70) to 4.0 s (frame 120)",
    "frame 3 (0.1 s) to frame 70 (2.3 s)",
    "Frame index [30, 70]",
    "30 to 70 frames",
    "[30, 70] Frames",
    "frame_start: 30, frame_end: 70",
    "start_frame: 30, end_frame: 70",
    "Start: 30 frames, End: 70 frames",
    "30th to 70th frame",
    # dates, times of day, versions, sums, broken numbers
    "2021-03-04",
    "2021-03-04 to 2021-04-05",
    "10/12/2021 - 10/13/2021",
    "2024-01-01 00:00:03 to 2024-01-01 00:00:07",
    "3:12 PM - 3:20 PM",
    "3:12-3:20 pm",
    "1:05 to 1:10 hours",
    "00:00:12:15 - 00:00:14:10",
    "1:75 - 2:80",
    "1:2 - 1:3",
    "1.2.3 - 1.2.4",
    "3-7-9",
    "3 to 7 to 9",
    "7.9 - 3.2 = 4.7",
    "7.9 - 3.2 = 4.7 seconds",
    "2*3 to 4",
    "3,2 to 7,9",
    "3,2 to 7,9 seconds",
    "3,25 - 7,90",
    "Start: 3,2 End: 7,9",
    "0,5 s to 1,5 s",
    "3\u00bd to 4\u00bd",
    "3\u00b2 to 4\u00b2",
    "2'30\" to 2'45\"",
    "3x to 4x",
    "3.2abc to 7.9def",
    "1:12 to 20",
    # lengths
    "lasts 3 to 7 seconds",
    "It takes about 5 to 10 seconds.",
    "for 3 to 7 seconds",
    "a 5-10 second clip",
    "5 to 10 seconds long",
    "The first 5 to 10 seconds",
    "10 to 5 seconds before the end",
    # denied
    "The event does not happen from 3 to 7 s.",
    "There is no event from 3 to 7 seconds.",
    "not between 3 and 7 s",
    "It isn't from 0:12 to 1:05.",
    "The event doesn't occur; it is not seen between 3 and 7.",
    # percent and fractions without the duration
    "25% to 75%",
    "25 to 75%",
    "0% to 0%",
    "from 25 percent to 75 percent",
    "0.25 to 0.75 of the video",
    "[0.25, 0.75] (normalized)",
    "normalized: [0.25, 0.75]",
    "normalized [250, 750]",
    '{"start": "25%", "end": "75%"}',
    # others
    "minutes 2 to 3",
    "3.2\u79d2\u52307.9\u79d2",
    "three to seven seconds",
    "Sure!",
    "From {start} to {end} seconds.",
]

DENIAL = {
    "The event happens from 3.2 to 7.9 seconds, not from 9 to 12 seconds.": W,
    "It does not happen from 1 to 2 s but from 3.2 to 7.9 s.": W,
    "It is not 1 to 2 s; it is 3.2 to 7.9 s.": W,
    "I am not sure, but it happens from 3.2 to 7.9 s.": W,
    "No doubt: 3.2 to 7.9 s.": W,
    "The man who has no hat sits down from 3.2 to 7.9 s.": W,
    "The man does not move from 3.2 to 7.9 s.": W,
    'The event "the dog does not appear" happens from 3.2 to 7.9 s.': W,
    "The dog, which is not visible before, appears from 3.2 to 7.9 s.": W,
    "The event does not happen in the video. The closest is from 3.2 to 7.9 seconds.": W,  # it names a window
    "It does not start at 1 s; it starts at 3.2 s and ends at 7.9 s.": W,
}

FRACTIONS = {
    "25% to 75%": [(10.0, 30.0)],
    "25 to 75%": [(10.0, 30.0)],
    "25%-75% of the video": [(10.0, 30.0)],
    "between 25 percent and 75 per cent": [(10.0, 30.0)],
    "10 to 20 and 50 to 60%": [(4.0, 8.0), (20.0, 24.0)],
    "Start: 25%, End: 75%": [(10.0, 30.0)],
    '{"start": "25%", "end": "75%"}': [(10.0, 30.0)],
    "0.25 to 0.75 of the video": [(10.0, 30.0)],
    "From 0.25 to 0.75 of its total duration": [(10.0, 30.0)],
    "[0.25, 0.75] (normalized)": [(10.0, 30.0)],
    "normalized: [0.25, 0.75]": [(10.0, 30.0)],
    "0.1 to 0.2 and 0.5 to 0.6 of the video": [(4.0, 8.0), (20.0, 24.0)],
    "normalized [250, 750]": None,
    "0.25 to 0.75": [(0.25, 0.75)],
    "0.2 to 0.9 seconds of the video": [(0.2, 0.9)],
    "3 to 7 of the video": [(3.0, 7.0)],
    "3.2 to 7.9 s": W,
    "90% to 95% confidence": None,
    "3.2 to 7.9 seconds (90% to 95% confident)": W,
    "confidence: 90% to 95%": None,
}

READ = {
    **PLAIN, **UNITS, **CLOCKS, **LABELLED, **JSON, **TAGS, **SEVERAL, **AS_WRITTEN, **WRITING, **DENIAL,
    **dict.fromkeys(ABSENT, []), **dict.fromkeys([*NOT_ABSENT, *NOTHING], None),
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_reads_as_a_careful_reader_would(text):
    assert parse_spans(text) == READ[text]


@pytest.mark.parametrize("text", FRACTIONS)
def test_fractions_of_a_known_duration(text):
    assert parse_spans(text, duration=40) == FRACTIONS[text]


NEEDS_DURATION = ("%", "ormali", "percent", "of the video")


@pytest.mark.parametrize("text", [text for text in READ if not any(word in text for word in NEEDS_DURATION)])
def test_the_duration_changes_nothing_else(text):
    assert parse_spans(text, duration=40.0) == parse_spans(text)


@pytest.mark.parametrize("duration", [0, -1, math.nan, math.inf, "x", None, [40], 1j, {}, 10**400])
def test_percent_is_not_read_without_a_real_duration(duration):
    assert parse_spans("25% to 75%", duration) is None
    assert parse_spans("3.2 to 7.9", duration) == W


def test_windows_are_spans_of_floats():
    (window,) = parse_spans("From 3 to 7 seconds.") or []
    assert isinstance(window, Span) and [type(bound) for bound in window] == [float, float]


@pytest.mark.parametrize("value", [None, 3.2, b"3 to 7", ["3 to 7"], {"start": 3, "end": 7}, object()])
def test_what_is_no_text_gives_none(value):
    assert parse_spans(value) is None


def test_the_doctests():
    result = doctest.testmod(spans_module)
    assert result.attempted >= 6 and result.failed == 0


# ---------------------------------------------------------------------------------------------- properties of parsing
PIECES = [
    "3.2", "7.9", "-3", "0:12", "1:05", "00:01:12,500", "1,200", "25%", "1e999", "\u0663", "\u00b2", "1234567890123456",
    " ", "\n", "to", " to ", "-", " - ", "\u2013", "\u2014", "~", "->", ",", ".", ":", "=", "s", " s", "ms", "min", "h",
    "[", "]", "(", ")", "<", ">", "{", "}", '"', "'", "*", "`", "/", "and ", "between ", "from ", "start: ", "end: ",
    " seconds", "frames ", "of the video", "not ", "does not happen ", "no event ", "in the video", "unable to find ",
    "<answer>", "</answer>", "<think>", "</think>", '{"start": ', '"end": ', '"segments": [', '{"time": "', "null",
]  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(), st.decimals(),
    st.lists(st.floats(), max_size=3), st.tuples(st.floats(), st.floats()), st.sets(st.integers(), max_size=3),
    st.dictionaries(st.text(), st.floats(), max_size=2), st.just(object()), st.just(10**400),
)  # fmt: skip
TENTHS = st.integers(-10_000_000, 10_000_000).map(lambda tenths: tenths / 10)
TENTH_WINDOWS = st.lists(st.builds(Span, TENTHS, TENTHS), min_size=1, max_size=5)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def is_answer(value):
    """None, or a list of windows of finite floats."""
    if value is None:
        return True
    return type(value) is list and all(
        type(window) is Span and all(type(bound) is float and math.isfinite(bound) for bound in window)
        for window in value
    )


@settings(max_examples=500, deadline=None)
@given(TEXTS, ANYTHING)
def test_any_text_gives_finite_windows_or_none(text, duration):
    assert is_answer(parse_spans(text, duration))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a":' * 30_000, None),
        ("[" * 30_000 + "3, 7" + "]" * 30_000, [(3.0, 7.0)]),
        ('{"time": ' + "[" * 900 + "3, 7" + "]" * 900 + "}", None),
        ('{"start": ' + "9" * 4000 + ', "end": ' + "9" * 4000 + "}", None),
        ('{"start": ' + "9" * 5000 + ', "end": ' + "9" * 5000 + "}", None),
        ("9" * 400 + " to " + "9" * 500 + " s", None),
        ("\ud800 3 to 7 \udfff", [(3.0, 7.0)]),
        ("3 to 7\x00", [(3.0, 7.0)]),
    ],
    ids=range(8),
)
def test_extreme_texts(text, expected):
    assert parse_spans(text) == expected


@given(ANYTHING, ANYTHING)
def test_any_object_gives_finite_windows_or_none(value, duration):
    assert is_answer(parse_spans(value, duration))


@given(TEXTS, st.text(" \n\t\r\u00a0\u3000", max_size=6), st.text(" \n\t\r\u00a0\u3000", max_size=6))
def test_surrounding_whitespace_does_not_matter(text, before, after):
    assert parse_spans(before + text + after) == parse_spans(text)


@given(TENTH_WINDOWS, st.booleans())
def test_the_default_answer_comes_back(windows, thinking):
    answer = format_answer(PromptConfig(thinking=thinking), windows, thought="It starts at 1.0 and ends at 2.0.")
    assert parse_spans(answer) == windows


@given(
    st.sampled_from(
        ["{0:.1f} to {1:.1f}", "[{0:.1f}, {1:.1f}]", "{0:.1f}s - {1:.1f}s", "start: {0:.1f}, end: {1:.1f}"]
    ),
    TENTHS,
    TENTHS,
)
def test_other_formats_come_back(form, start, end):
    assert parse_spans(form.format(start, end)) == [(start, end)]


@given(st.lists(st.builds(Span, FINITE, FINITE), max_size=4))
def test_json_comes_back(windows):
    records = [{"start_time": window.start, "end_time": window.end} for window in windows]
    assert parse_spans(json.dumps({"segments": records})) == windows
    assert parse_spans(json.dumps({"segments": windows})) == windows
    assert parse_spans(json.dumps(records, indent=1)) == windows  # an empty list says absent


@given(
    st.lists(st.tuples(st.integers(0, 35_999), st.integers(0, 35_999)), min_size=1, max_size=4),
    st.sampled_from(["-", " - ", " to "]),
)
def test_clock_times_come_back(windows, join):
    def short(seconds):
        return f"{seconds // 60}:{seconds % 60:02d}"

    def long(seconds):
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    for clock in (short, long):
        assert parse_spans(", ".join(f"{clock(start)}{join}{clock(end)}" for start, end in windows)) == windows


@given(st.integers(0, 999_999), st.integers(0, 999_999))
def test_thousands_and_milliseconds_come_back(start, end):
    assert parse_spans(f"{start:,} to {end:,} seconds") == [(start, end)]
    assert parse_spans(f"{start} ms - {end} ms") == [(start / 1000, end / 1000)]


REPEATED = [
    " ", "\n", "3 to ", "3 - ", "3s - 7s and ", "[3, ", "3, ", "1:", "0:12-", "1.", ".1", "9", ",000", "1e", "1h ",
    "- ", "1 min ", "-3", "*", "1*", '"', "'", "(", "{", "{}", '{"a":', '{"start": 3, "end": 7} ', "<answer>",
    "</answer>", "<think>", "</think>", "<answer ", "start: 3 ", "start", "secs", "end: 7 ", "frames ", "about ", "a",
    "between ", "not ", "does not ", "no event ", "there is no ", "video ", "in the video ", "not show ", "_", "\uff13",
    "\u2014", "25% to ", "\U0001f600",
]  # fmt: skip


def test_repetitive_texts_take_linear_time():
    clock = time.perf_counter()
    for piece in REPEATED:
        assert is_answer(parse_spans("1" + piece * (20_000 // len(piece)) + " 3.2", 40.0)), piece
    for piece in ("3 to ", ",000", " ", "not ", "secs"):
        assert is_answer(parse_spans("start 1" + piece * (200_000 // len(piece)) + "x", 40.0)), piece
    # Some seconds where the work is linear; minutes to hours where it is quadratic.
    assert time.perf_counter() - clock < 30


def test_a_window_is_found_at_the_end_of_a_long_text():
    assert parse_spans("The man sits. " * 15_000 + "From 3.2 to 7.9 seconds.") == W
    assert parse_spans("<think>" + "at 3 s, " * 20_000 + "</think>From 3.2 to 7.9 seconds.") == W
    assert len(parse_spans("3 to 7 s, " * 10_000) or []) == 10_000


# ---------------------------------------------------------------------------------------------- IoU
BOUNDS = st.floats(-1e6, 1e6)
WINDOWS = st.tuples(BOUNDS, BOUNDS).filter(lambda window: window[0] < window[1])


@pytest.mark.parametrize(
    ("pred", "gt", "expected"),
    [
        ((0, 4), (2, 6), 1 / 3),
        ((0, 10), (0, 5), 0.5),
        ((2, 4), (0, 8), 0.25),
        ((0, 1), (1, 2), 0.0),
        ((0, 1), (5, 6), 0.0),
        ((-4, 4), (-4, 0), 0.5),
        ([0.0, 4.0], Span(2.0, 6.0), 1 / 3),
        ((-1.7e308, 1.7e308), (-1.7e308, 1.7e308), 1.0),
        ((-1.6e308, 1.6e308), (-1.6e308, 0), 0.5),
        ((0, 5e-324), (0, 5e-324), 1.0),
    ],
)
def test_iou_by_hand(pred, gt, expected):
    assert temporal_iou(pred, gt) == expected and temporal_iou(gt, pred) == expected


NO_WINDOWS = [
    (4, 4), (6, 2), (0, math.inf), (-math.inf, 4), (math.nan, 4), (0, math.nan), (0, 10**400), None, 4, 4.0, True, "04",
    ("0", "4"), ("", ""), b"\x00\x04", bytearray(b"\x00\x04"), {0, 4}, {0: 1, 4: 1}, (), (4,), (0, 4, 8), [[0, 4]],
    [(0, 1), (2, 3)], (None, 4), (0, 4j), object(), range(3), iter(()),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_WINDOWS, ids=lambda value: repr(value).split(" at 0x")[0])
def test_iou_is_zero_for_what_is_no_window(value):
    assert temporal_iou(value, (0, 4)) == 0.0
    assert temporal_iou((0, 4), value) == 0.0
    assert temporal_iou(value, value) == 0.0


def test_iou_takes_arrays_and_gives_a_float():
    np = pytest.importorskip("numpy")
    value = temporal_iou(np.array([0, 4], dtype=np.float32), np.array([2, 6]))
    assert type(value) is float and value == 1 / 3
    assert temporal_iou(np.zeros((2, 2)), (0, 4)) == 0.0
    assert temporal_iou(np.array(["0", "4"]), (0, 4)) == 0.0


@given(ANYTHING, ANYTHING)
def test_iou_of_anything_is_between_zero_and_one(pred, gt):
    assert 0.0 <= temporal_iou(pred, gt) <= 1.0


@given(st.tuples(FINITE, FINITE), st.tuples(FINITE, FINITE))
def test_iou_is_symmetric_and_bounded(a, b):
    assert temporal_iou(a, b) == temporal_iou(b, a)
    assert 0.0 <= temporal_iou(a, b) <= 1.0
    assert temporal_iou(a, a) == (1.0 if a[0] < a[1] else 0.0)


@given(WINDOWS, st.lists(st.floats(0, 2e6), min_size=2, max_size=2).map(sorted))
def test_iou_falls_as_a_window_slides_off(window, offsets):
    near, far = (temporal_iou(window, (window[0] + offset, window[1] + offset)) for offset in offsets)
    assert far <= near + 1e-9


@given(*[st.integers(-(2**20), 2**20)] * 5)
def test_iou_does_not_depend_on_the_origin(a, b, c, d, offset):
    shifted = temporal_iou((a + offset, b + offset), (c + offset, d + offset))
    assert shifted == temporal_iou((a, b), (c, d))


@given(WINDOWS, WINDOWS, BOUNDS)
def test_iou_moves_little_with_the_origin(a, b, offset):
    moved = temporal_iou((a[0] + offset, a[1] + offset), (b[0] + offset, b[1] + offset))
    shortest = min(a[1] - a[0], b[1] - b[0])
    assert moved == pytest.approx(temporal_iou(a, b), abs=min(1.0, 1e-8 / shortest))


@given(WINDOWS, WINDOWS)
def test_iou_is_intersection_over_union(a, b):
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - intersection
    assert temporal_iou(a, b) == pytest.approx(intersection / union if intersection else 0.0, rel=1e-6, abs=1e-9)
