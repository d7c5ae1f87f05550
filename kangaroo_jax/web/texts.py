"""What the page says, in English and Chinese."""

import dataclasses

LANGUAGES = {"en": "English", "zh": "中文"}


@dataclasses.dataclass(frozen=True)
class Texts:
    """The page's words in one language; braces are filled in, {s} where there are several frames."""

    tagline: str
    drop: str
    drop_hint: str
    uploading: str
    examples: str
    example_names: dict[str, str]  # by their keys in `examples.KINDS`
    nothing_shown: str
    watching: str
    watched: str
    watched_image: str
    shown_frames: str
    settings: str
    frames: str
    frames_info: str
    temperature: str
    temperature_info: str
    seed: str
    seed_info: str
    apply: str
    chat_empty: str
    placeholder: str
    suggestions: tuple[str, ...]
    stop: str
    anew: str
    stopped: str
    cut_short: str
    note: str
    note_reused: str
    note_encoded: str
    no_answer: str
    still_answering: str
    too_many_files: str
    too_large: str
    empty_file: str
    not_written: str
    no_file: str
    gone: str
    fault: str


EN = Texts(
    tagline="Show it a film, and talk about what happens",
    drop="Drop a video or images here, or click to choose",
    drop_hint="up to {limit} MB a file · it is watched at once",
    uploading="Uploading",
    examples="Or make one:",
    example_names={"order": "One after another", "count": "How many?", "move": "Moving", "long": "A long film"},
    nothing_shown="The frames that the model has seen will stand here, each with its time.",
    watching="Watching {name}",
    watched="{frames} frame{s} seen, {first} – {last}",
    watched_image="an image",
    shown_frames="{seen} of {frames} frames",
    settings="Settings",
    frames="Frames of a video",
    frames_info="0: as many as in training",
    temperature="Temperature",
    temperature_info="0: always the likeliest word",
    seed="Seed",
    seed_info="of the drawing, above temperature 0",
    apply="Look again",
    chat_empty="Ask anything about what you have shown.\nThe second question will not watch it again.",
    placeholder="Ask about the video…",
    suggestions=("Describe the video.", "What comes first?", "What comes last?"),
    stop="Stop",
    anew="New conversation",
    stopped="[stopped]",
    cut_short="[cut short: the answer had no more room]",
    note="first word after {first}",
    note_reused="{frames} frame{s} remembered, none watched again",
    note_encoded="{frames} frame{s} watched for this answer",
    no_answer="(no answer)",
    still_answering="the last answer is still coming: wait, or stop it",
    too_many_files="{name}: a conversation has at most {limit} files; begin a new one",
    too_large="{name}: larger than {limit} MB (--max-upload-mb)",
    empty_file="{name}: the file is empty",
    not_written="{name}: the file cannot be stored at the moment (the disk may be full)",
    no_file="show a video or an image first, or just ask",
    gone="this page has been away too long: load it again",
    fault="something in the page has failed; its log says what",
)

ZH = Texts(
    tagline="给它看一段视频，然后聊聊发生了什么",
    drop="把视频或图片拖到这里，或点击选择",
    drop_hint="每个文件最大 {limit} MB · 上传后立即观看",
    uploading="正在上传",
    examples="或现场生成：",
    example_names={"order": "先后出现", "count": "有几个？", "move": "移动", "long": "长视频"},
    nothing_shown="模型看过的画面会显示在这里，并标出时间。",
    watching="正在观看 {name}",
    watched="看了 {frames} 帧，{first} – {last}",
    watched_image="一张图片",
    shown_frames="{seen} / {frames} 帧",
    settings="设置",
    frames="视频的帧数",
    frames_info="0：与训练时相同",
    temperature="温度",
    temperature_info="0：总是选最可能的词",
    seed="随机种子",
    seed_info="温度大于 0 时有效",
    apply="重新观看",
    chat_empty="可以问任何关于画面的问题。\n问第二个问题时不会再看一遍。",
    placeholder="问问这段视频……",
    suggestions=("描述视频。", "最先出现什么？", "最后出现什么？"),
    stop="停止",
    anew="新的对话",
    stopped="［已停止］",
    cut_short="［已截断：没有更多空间］",
    note="{first} 后出现第一个词",
    note_reused="记得 {frames} 帧，没有重看",
    note_encoded="为这个回答看了 {frames} 帧",
    no_answer="（没有回答）",
    still_answering="上一个回答还没结束：请等待，或按停止",
    too_many_files="{name}：一次对话最多 {limit} 个文件；请开始新的对话",
    too_large="{name}：超过 {limit} MB（--max-upload-mb）",
    empty_file="{name}：文件是空的",
    not_written="{name}：文件暂时无法保存（磁盘可能已满）",
    no_file="请先给出视频或图片，或者直接提问",
    gone="页面离开太久了：请重新加载",
    fault="页面出了错；日志里有原因",
)

TEXTS = {"en": EN, "zh": ZH}


def texts(language: object) -> Texts:
    """The words of a language, English where it is unknown."""
    return TEXTS.get(language, EN) if isinstance(language, str) else EN


def preferred(accepted: str) -> str:
    """The language of an Accept-Language header that comes first among ours, English where there is none."""
    wishes = []
    for place, part in enumerate(accepted.split(",")[:20]):
        tag, _, rest = part.strip().partition(";")
        weight = rest.strip().removeprefix("q=") if rest else "1"
        try:
            wishes.append((-float(weight), place, tag.lower().partition("-")[0]))
        except ValueError:
            continue
    return next((tag for _, _, tag in sorted(wishes) if tag in LANGUAGES), "en")
