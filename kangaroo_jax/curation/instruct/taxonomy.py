"""The question types that the instruction set is spread over."""

import dataclasses

TASKS = ("short_caption", "detailed_caption", "mcq", "open", "single", "multi")
CAPTION_TASKS = TASKS[:2]


@dataclasses.dataclass(frozen=True)
class QuestionType:
    """A question type, and its description for a model in each language."""

    key: str
    en: str
    zh: str

    def told(self, language: str) -> str:
        """The description in a language."""
        return self.zh if language == "zh" else self.en


_TYPES = (
    QuestionType("action", "what somebody or something does", "某人或某物在做什么"),
    QuestionType("order", "which of several events comes first, next or last", "几件事的先后顺序"),
    QuestionType("object", "which thing or animal is to be seen", "出现了什么物体或动物"),
    QuestionType("attribute", "a colour, size, shape or material", "颜色、大小、形状或材质"),
    QuestionType("count", "how many of something there are", "某种事物的数量"),
    QuestionType("place", "where it takes place", "事情发生的地点"),
    QuestionType("position", "where things are in relation to each other", "事物之间的位置关系"),
    QuestionType("motion", "the direction or manner of a movement", "运动的方向或方式"),
    QuestionType("moment", "what is to be seen at a certain time of the video", "视频中某一时刻看到了什么"),
    QuestionType("change", "what something becomes, or how a state changes", "某物变成了什么，或状态如何变化"),
    QuestionType("duration", "how long something takes", "某件事持续多久"),
    QuestionType("person", "the look or clothing of a person", "人物的外貌或衣着"),
    QuestionType("text", "text or signs that can be read", "可以辨认的文字或标志"),
    QuestionType("cause", "why something happens, as the video shows it", "视频中表现出的原因"),
    QuestionType("purpose", "what something is done or used for", "某个动作或物品的目的或用途"),
    QuestionType("comparison", "how two people, things or moments differ", "两个人、物或时刻的不同之处"),
    QuestionType("summary", "what the video as a whole is about", "整个视频的主题"),
)
TYPES = {one.key: one for one in _TYPES}
