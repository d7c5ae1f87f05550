"""Captions of made-up clips."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

_EN = "man woman dog cat ball table door street kitchen tree car bus cup hat bag book lamp chair boat bird".split()
_ZH = "男人 女人 小狗 小猫 皮球 桌子 房门 街道 厨房 大树 汽车 公交 杯子 帽子 书包 书本 台灯 椅子 小船 小鸟".split()


@pytest.fixture
def make_captions() -> Callable[..., Path]:
    """Writes captions.jsonl: one caption a clip and language, of words that a seed draws."""

    def make(folder: Path, clips: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(clips):
            a, b, c, d = random.Random(i).sample(range(20), 4)
            told = {
                "en": (
                    f"A {_EN[a]} near a {_EN[b]}.",
                    f"A {_EN[a]} is near a {_EN[b]}. Then a {_EN[c]} passes {_EN[d]}.",
                ),
                "zh": (f"{_ZH[a]}在{_ZH[b]}旁边。", f"{_ZH[a]}在{_ZH[b]}旁边。然后{_ZH[c]}经过{_ZH[d]}。"),
            }
            for language, (short, detailed) in told.items():
                row = {"id": f"c{i:05d}-{language}", "clip": f"c{i:05d}", "language": language, "outcome": "ok"}
                row |= {"reason": "", "media": f"media/{i:05d}.mp4", "start": 0.0, "end": 4.0, "category": "ab"[i % 2]}
                row |= {"short": short, "caption": detailed, "scores": {"score": 0.5}, "source": "t", "licence": "l"}
                rows.append(row | {"models": {"writer": "w"}, "prompts": {"video_caption": "v@1:x"}})
        path = folder / "captions.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return make
