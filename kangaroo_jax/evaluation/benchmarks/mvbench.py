"""MVBench: 20 tasks of 200 questions about short videos (arXiv:2311.17005)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses

# task -> (folders in which its videos are cut already, folders of whole ones); lmms-eval's layout, and the dataset's
_CHARADES = (("star/Charades_segment",), ("star/Charades_v1_480",))
_CLEVRER = (("clevrer/video_validation",), ())
_PERCEPTION = (("perception/videos",), ())
TASKS = {
    "action_sequence": _CHARADES,
    "action_prediction": _CHARADES,
    "action_antonym": (("ssv2_video_mp4", "ssv2_video"), ()),
    "fine_grained_action": (("Moments_in_Time_Raw/videos",), ()),
    "unexpected_action": (("FunQA_test/test",), ()),
    "object_existence": _CLEVRER,
    "object_interaction": _CHARADES,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": (("sta/sta_video_segment",), ("sta/sta_video",)),
    "scene_transition": (("scene_qa/video",), ()),
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": (("nturgbd_convert", "nturgbd"), ()),
    "character_order": _PERCEPTION,
    "egocentric_navigation": (("vlnqa",), ()),
    "episodic_reasoning": (("tvqa/video_fps3_hq_segment",), ("tvqa/frames_fps3_hq",)),
    "counterfactual_inference": _CLEVRER,
}
_BASES = ("video", "", "video/data0613", "data0613")
_FRAMES_A_SECOND = 3.0  # of the folders of frames of TVQA


def read(folder: Path) -> Iterator[Question]:
    """The questions of `json/TASK.json`."""
    for task, (cut, whole) in TASKS.items():
        path = files.found(folder, f"json/{task}.json", f"{task}.json")
        for number, (where, row) in enumerate(files.rows(path, ("video", "question", "candidates", "answer"))):
            options = files.texts(where, row, "candidates")
            letter, fault = files.letter_of(str(row["answer"]), options)
            media = _medium(folder, str(row["video"]), row.get("start"), row.get("end"), cut, whole)
            yield Question(
                f"{task}-{number}",
                (media,),
                str(row["question"]),
                options,
                letter,
                groups={"task": (task,)},
                fault=fault and f"{where}: {fault}",
            )


def _medium(folder: Path, name: str, start: Any, end: Any, cut: tuple, whole: tuple) -> Media:
    found = files.video(folder, [f"{base}/{sub}/{name}" for sub in (*cut, *whole) for base in _BASES])
    bounded = all(isinstance(second, int | float) for second in (start, end))
    if bounded and any(f"/{sub}/" in found for sub in whole):
        rate = _FRAMES_A_SECOND if Path(found).is_dir() else None
        return Media("video", found, start=start, end=end, sample_fps=rate)
    return Media("video", found, sample_fps=_FRAMES_A_SECOND if Path(found).is_dir() else None)


MVBENCH = Benchmark(
    name="mvbench",
    title="MVBench",
    read=read,
    fetch="huggingface.co/datasets/OpenGVLab/MVBench: json/, and video/*.zip unpacked in video/ (lmms-eval's revision "
    "'video' with cut clips is read too)",
    licence="MIT for the questions; each source's own for the videos (NTU RGB+D asks for a signature)",
    size="20 tasks of 200 clips",
    questions=4000,
    wordings=WORDINGS["mvbench"],
    readings={
        "official": {"choice": Reading(harnesses.official_mvbench, several=True)},
        "lmms-eval": {"choice": Reading(harnesses.lmms_mvbench, leaves_out="empty")},
        "vlmevalkit": {"choice": Reading(harnesses.vlmevalkit_mvbench, several=True)},
    },
    average="task",
    published={"score": 61.1},
    note="frames of the published row are not public",
)
