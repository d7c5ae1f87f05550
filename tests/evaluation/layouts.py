"""The official file layout of each benchmark, with a handful of rows by hand and videos made on the spot."""

import csv
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.media import numbered_frame, write_video

COLOURS = ["red", "blue", "green", "white"]


class Maker:
    """Writes files of a benchmark below a folder; every video is a copy of one."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder, self._template = folder, template

    def video(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._template, path)
        with path.open("ab") as file:  # behind the end of an MP4, so that no two have the same bytes
            file.write(b"\x00\x00\x00\x20free" + name.encode()[-24:].rjust(24, b"."))

    def write(self, name: str, value: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path


def make_template(folder: Path) -> Path:
    """The video that all are copies of: 3 s, numbered frames."""
    return write_video(folder / "template.mp4", 12, 4, size=(32, 32))


def mvbench(to: Maker) -> None:
    from kangaroo_jax.evaluation.benchmarks.mvbench import TASKS

    for task, (cut, whole) in TASKS.items():
        # Half of the tasks lie in lmms-eval's folders, cut; those that have other ones lie there, whole.
        folder = (whole or cut)[0]
        bounds = {"start": 1.0, "end": 2.5} if whole else {}
        if task == "episodic_reasoning":
            for number in range(9):
                path = to.folder / "video" / folder / "a" / f"{number:05d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(numbered_frame(number, 32, 32)).save(path)
            name = "a"
        else:
            name = "a.mp4"
            to.video(f"video/{folder}/a.mp4")
        rows = [
            {"video": name, "question": "Which?", "candidates": COLOURS, "answer": answer} for answer in COLOURS[:2]
        ]
        to.write(f"json/{task}.json", [{**row, **bounds} for row in rows])


def video_mme(to: Maker) -> None:
    rows = []
    for number, duration in enumerate(("short", "medium", "long")):
        name = f"id{number}"
        to.video(f"data/{name}.{('mp4', 'MP4', 'mkv')[number]}")
        for asked in range(2):
            row = {"video_id": f"{number:03d}", "videoID": name, "question_id": f"{number:03d}-{asked}"}
            row |= {"duration": duration, "domain": "Knowledge", "sub_category": "Law", "task_type": "Counting Problem"}
            options = [f"{letter}. {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True)]
            rows.append(row | {"question": f"Which {asked}?", "options": options, "answer": "BD"[asked]})
    (to.folder / "videomme").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), to.folder / "videomme" / "test-00000-of-00001.parquet")
    said = ['1\n00:00:00,000 --> 00:00:01,000\n<font color="white" size=".72c">the first</font>\n']
    said.append("2\n00:00:02,900 --> 00:00:02,950\nnever on display\n")
    to.write("subtitle/id0.srt", "\n".join(said))


def mlvu(to: Maker) -> None:
    from kangaroo_jax.evaluation.benchmarks.mlvu import TASKS

    for number, task in enumerate(TASKS, start=1):
        to.video(f"MLVU/video/{number}_{task}/v.mp4")
        row = {"video": "v.mp4", "duration": 3.0, "question": "Which?", "question_type": task}
        if number > 7:
            rows = [row | {"answer": "A ring moves.", "scoring_points": "ring"}]
        else:
            rows = [row | {"candidates": COLOURS, "answer": "red"}]
        if task == "count":
            rows.append(row | {"candidates": COLOURS, "answer": "black"})
            rows.append(row | {"candidates": ["red", "red", "blue"], "answer": "red"})
        to.write(f"MLVU/json/{number}_{task}.json", rows)


def mlvu_test(to: Maker) -> None:
    to.video("video/test_AR-0.mp4")
    row = {"question_id": "AR_0", "question_type": "anomaly_reco", "video": "test_AR-0.mp4", "question": "Which?"}
    to.write("test_question.json", [row | {"candidates": [*COLOURS, "black", "grey"]}])


def lvbench(to: Maker) -> None:
    text = "What comes first?\n" + "\n".join(f"({x}) {c}" for x, c in zip("ABCD", COLOURS, strict=True))
    lines = []
    for name in ("Cm73ma6Ibcs", "TiQBTesZUJQ"):
        to.video(f"videos/{name}.mp4")
        asked = [
            {
                "uid": f"{name}{n}",
                "question": text,
                "answer": "ABC"[n],
                "question_type": ["entity recognition", "reasoning"][: n + 1],
            }
            for n in range(3)
        ]
        lines.append(json.dumps({"key": name, "type": "cartoon", "qa": asked}))
    to.write("video_info.meta.jsonl", "\n".join(lines) + "\n")


def videovista(to: Maker) -> None:
    rows = []
    for number, kind in enumerate(("Action Count", "Logical Reasoning")):
        name = f"Travel.1.{number}.mp4"
        to.video(f"merged/Travel/1/{name}")
        row = {"question_id": number, "video_name": name, "category": "Travel", "time": 150 * number, "Type": kind}
        rows.append(row | {"Question": "Which?", "Answer_Choices": COLOURS, "Answer": number})
    to.write("VideoVista.json", rows)


def _seed_rows(ids: Iterable[tuple[int, Any]]) -> list[dict[str, Any]]:
    choices = {f"choice_{letter}": colour for letter, colour in zip("abcd", COLOURS, strict=True)}
    return [
        {
            "question": "Which?",
            "question_id": f"{kind}_{n}",
            "question_type_id": kind,
            "data_id": data,
            "answer": "C",
            **choices,
        }
        for n, (kind, data) in enumerate(ids)
    ]


def seed_bench_2(to: Maker) -> None:
    stills = [f"task19/Charades_test_frame/WRQ95/{number}.png" for number in range(1, 9)]
    for number, still in enumerate(stills):
        path = to.folder / "seed_bench_image_v2" / still
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered_frame(number, 32, 32)).save(path)
    rows = _seed_rows([(19, stills), (20, stills), (21, stills), (22, stills), (1, ["image.png"])])
    to.write("SEED-Bench_v2_level1_2_3.json", {"questions": rows, "question_type": {}})


def seed_bench_1(to: Maker) -> None:
    rows = _seed_rows([(10, "94328.webm"), (11, "P03/P03_24.MP4"), (12, "cereals.avi"), (3, "image")])
    for row, segment in zip(rows, (None, [0.5, 2.0], [15, 30], None), strict=True):
        row["segment"] = segment
    for row in rows[:3]:
        to.video(f"video/{row['data_id']}")
    to.write("SEED-Bench.json", {"questions": rows})


def egoschema(to: Maker) -> None:
    rows = []
    for number in range(3):
        to.video(f"videos/uid{number}.mp4")
        options = {f"option {i}": option for i, option in enumerate([*COLOURS, "black"])}
        rows.append({"q_uid": f"uid{number}", "google_drive_id": "x", "question": "Which?", **options})
    to.write("questions.json", rows)
    to.write("subset_answers.json", {"uid0": 4, "uid2": 0})


def longvideobench(to: Maker) -> None:
    rows = []
    for number, group in enumerate((15, 3600)):
        to.video(f"videos/v{number}.mp4")
        row = {"id": f"v{number}_0", "video_id": f"v{number}", "video_path": f"v{number}.mp4", "question": "Which?"}
        row |= {
            "candidates": COLOURS[: 3 + number],
            "duration": 3.0,
            "duration_group": group,
            "question_category": "S2E",
        }
        rows.append(row | {"subtitle_path": f"v{number}_en.json", "starting_timestamp_for_subtitles": 10.0 * number})
    to.write("lvb_test_wo_gt.json", rows)
    to.write("lvb_val.json", [row | {"correct_choice": 1} for row in rows])
    to.write("subtitles/v0_en.json", [{"start": "00:00:00.500", "end": "00:00:02.000", "line": "in the middle"}])
    lines = [{"timestamp": [10.2, None], "text": "to the end"}, {"timestamp": [99.0, 100.0], "text": "later"}]
    to.write("subtitles/v1_en.json", lines)


def tempcompass(to: Maker) -> None:
    to.video("videos/1001.mp4")
    choice = {"question": "Which?\nA. red\nB. blue", "answer": "B. blue"}
    match = {
        "question": "Which caption?\nCaption A: It grows.\nCaption B: It shrinks.",
        "answer": "Caption B: It shrinks.",
    }
    caption = {
        "question": "Describe it.",
        "answer": "It shrinks.",
        "mc_question": "What?\nA. x\nB. y",
        "mc_answer": "B. y",
    }
    asked = {"multi-choice": choice, "yes_no": {"question": "Does it grow?", "answer": "no"}}
    for form, row in (asked | {"caption_matching": match, "captioning": caption}).items():
        to.write(f"questions/{form}.json", {"1001": {"action": [row], "order": [row, row]}})


def mmbench_video(to: Maker) -> None:
    to.video("video/abc.mp4")
    with (to.folder / "MMBench-Video.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "video", "video_path", "question", "answer", "dimensions"])
        table.writerow([0, "abc", "./video/abc.mp4", "What\nhappens?", "A ring moves.", "['OCR', 'Counting']"])
        table.writerow([1, "abc", "./video/abc.mp4", "Who?", "Nobody.", "['OCR']"])


def culturallingo(to: Maker) -> None:
    rows = []
    for number, (asked, lines) in enumerate((("Which?", "Options:"), ("哪个?", "选项:"))):
        to.video(f"videos/{number}.mp4")
        options = "\n".join(f"{letter}. {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True))
        row = {"question_id": f"q{number}", "video_name": f"{number}.mp4", "category": "Culture", "subcategory": "Food"}
        rows.append(row | {"processed_question": f"{asked}\n{lines}\n{options}\nAnswer:", "answer": "AB"[number]})
    to.write("VideoVista-CulturalLingo.json", rows)


def vnbench(to: Maker) -> None:
    rows = []
    for kind in ("ret_insert1", "ord_edit", "cnt_insert"):
        to.video(f"videos/{kind}.mp4")
        for turn in range(4):
            options = COLOURS[turn:] + COLOURS[:turn]
            row = {"video": f"videos/{kind}.mp4", "question": "Which?", "options": options, "try": turn, "type": kind}
            rows.append(row | {"question_id": f"7_{kind}_{turn}", "gt": options.index("red")})
    to.write("VNBench-main-4try.json", rows)


def quickstart(to: Maker) -> None:
    to.video("corpus/media/a.mp4")
    rows = []
    for number, (language, options) in enumerate((("en", COLOURS), ("zh", COLOURS), ("en", []))):
        said = [{"from": "human", "value": "<video>\nWhich colour?"}, {"from": "gpt", "value": "B. blue"}]
        row = {"id": f"q{number}", "video": "media/a.mp4", "conversations": said, "question_kind": "colour"}
        row |= {"language": language, "options": options, "format": "mcq" if options else "open"}
        rows.append(row | {"answer": "B" if options else "blue"})
    to.write("corpus/eval_short.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def needle(to: Maker) -> None:
    pass  # it is drawn


# benchmark -> (what makes its files, number of questions)
LAYOUTS = {
    "mvbench": (mvbench, 40),
    "video-mme": (video_mme, 6),
    "video-mme-subtitles": (video_mme, 6),
    "mlvu": (mlvu, 11),
    "mlvu-test": (mlvu_test, 1),
    "lvbench": (lvbench, 6),
    "videovista": (videovista, 2),
    "seed-bench-2": (seed_bench_2, 4),
    "seed-bench-1": (seed_bench_1, 3),
    "egoschema": (egoschema, 3),
    "egoschema-subset": (egoschema, 2),
    "longvideobench": (longvideobench, 2),
    "longvideobench-test": (longvideobench, 2),
    "tempcompass": (tempcompass, 12),
    "mmbench-video": (mmbench_video, 2),
    "videovista-culturallingo": (culturallingo, 2),
    "vnbench": (vnbench, 12),
    "needle": (needle, 312),
    "needle-time": (needle, 312),
    "quickstart": (quickstart, 3),
}
