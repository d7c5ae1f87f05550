"""The exact strings of protocols: how each benchmark's script, lmms-eval and VLMEvalKit put a question.

Keys are benchmark, style, kind of question ("" for all). The medium stands before the text.
"""

from collections.abc import Mapping

from kangaroo_jax.evaluation.benchmarks.question import Wording

_LETTER = "Answer with the option's letter from the given choices directly."
_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video{}. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_ON_VIDEO, _ON_BOTH = _SELECT.format(""), _SELECT.format(" and the subtitles")
_WATCH_CAUSES = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)
_WATCH = "Carefully watch this video and pay attention to every detail. "
_WATCH_OPTIONS = _WATCH + "Based on your observations, select the best option that accurately addresses the question."
_WATCH_OPEN = _WATCH + "Based on your observations, answer the given questions."
_BRACKETS = "({letter}) {text}"
_BEST = "Question: {question}\nOptions:\n{options}\nOnly give the best option."
_FRAMES = "These are the frames of a video. "
_LISTED = "This video's subtitles are listed below:"

_MOMENT = "For a moment the video shows one large coloured shape on a plain dark ground. "

_LETTERS_DIRECTLY = Wording("{question}\n{options}\n" + _LETTER)
_LIKELIHOOD = Wording("{question}", likelihood=True)
_AS_IT_STANDS = Wording("{question}")

WORDINGS: Mapping[str, Mapping[str, Mapping[str, Wording]]] = {
    "mvbench": {
        "official": {"": Wording(_BEST, _BRACKETS, _WATCH_CAUSES, "Best option:(")},
        "vlmevalkit": {"": Wording(_BEST, _BRACKETS, _WATCH_CAUSES, "Best option:(")},
        "lmms-eval": {"": Wording("Question:{question}\nOption:\n{options}\nOnly give the best option.\n", _BRACKETS)},
    },
    "video-mme": {
        "official": {"": Wording(_ON_VIDEO + "\n{question}\n{options}\nThe best answer is:")},
        "lmms-eval": {"": Wording(_ON_BOTH + "\n{question}\n{options}\n\n" + _LETTER)},
        "vlmevalkit": {"": Wording(_FRAMES + _ON_VIDEO + "\nQuestion: {question}\n{options}\nAnswer: ")},
    },
    "video-mme-subtitles": {
        "official": {
            "": Wording(
                _LISTED + "\n{subtitles}\n" + _ON_BOTH + "\n{question}\n{options}\nThe best answer is:",
            )
        },
        "lmms-eval": {
            "": Wording(
                _LISTED + " \n{subtitles}\n" + _ON_BOTH + "\n{question}\n{options}\nThe best answer is:",
            )
        },
        "vlmevalkit": {
            "": Wording(
                _FRAMES + _LISTED + "\n{subtitles}\n" + _ON_VIDEO + "\nQuestion: {question}\n{options}\nAnswer: ",
            )
        },
    },
    "mlvu": {
        "official": {
            "": Wording(_BEST, _BRACKETS, _WATCH_OPTIONS, "Best Option: ("),
            "open": Wording("{question}", system=_WATCH_OPEN),
        },
        "vlmevalkit": {
            "": Wording(_BEST, _BRACKETS, _WATCH_OPTIONS),
            "open": Wording("{question}", system=_WATCH_OPEN),
        },
        "lmms-eval": {
            "": Wording("{question}\n{options}\nOnly give the best option.\nBest option: (", _BRACKETS),
            "open": _AS_IT_STANDS,
        },
    },
    "mlvu-test": {
        "official": {"": Wording(_BEST, _BRACKETS, _WATCH_OPTIONS, "Best Option: (")},
        "lmms-eval": {"": Wording("{question}\n{options}", _BRACKETS)},
    },
    "lvbench": {
        "lmms-eval": {"": Wording("{question}\n{options}\nAnswer the question with the option letter", _BRACKETS)}
    },
    "seed-bench-1": {"official": {"": _LIKELIHOOD}, "lmms-eval": {"": _LETTERS_DIRECTLY}},
    "seed-bench-2": {"official": {"": _LIKELIHOOD}, "lmms-eval": {"": _LETTERS_DIRECTLY}},
    "egoschema": {"lmms-eval": {"": _LETTERS_DIRECTLY}, "likelihood": {"": _LIKELIHOOD}},
    "longvideobench": {
        "official": {"": Wording("Question: {question}\n{options}\n" + _LETTER, interleaved=True)},
        "before": {"": Wording("{subtitles}\nQuestion: {question}\n{options}\n" + _LETTER)},
        "lmms-eval": {"": Wording("{question}\n{options}\n" + _LETTER + "\n")},
        "vlmevalkit": {"": Wording("{question}\n{options}\n" + _LETTER)},
    },
    "tempcompass": {
        "official": {
            "choice": Wording("{question}\n{options}\nPlease directly give the best option:"),
            "yes_no": Wording("{question}\nPlease answer yes or no:"),
            "matching": Wording("{question}\n{options}\nPlease directly give the best option:", "{text}"),
            "open": _AS_IT_STANDS,
        },
    },
    "mmbench-video": {"official": {"": _AS_IT_STANDS}},
    "videovista": {
        "official": {"": Wording("{question}\nOptions:\n{options}\n" + _LETTER, _BRACKETS)},
    },
    "videovista-culturallingo": {"official": {"": _LETTERS_DIRECTLY}},
    "vnbench": {"official": {"": _LETTERS_DIRECTLY}},
    "needle": {
        "plain": {"": Wording(_MOMENT + "Which colour does it have?\n{options}\n" + _LETTER)},
        "quickstart": {"": Wording("What colour is it?\n{options}")},
    },
    "needle-time": {"plain": {"": Wording(_MOMENT + "At which second does it appear?\n{options}\n" + _LETTER)}},
    "quickstart": {"official": {"": _AS_IT_STANDS}},
}
