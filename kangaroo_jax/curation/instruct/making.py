"""Makes a conversation: a generated question, checks of its wording, and its answers without and with the caption."""

import asyncio
import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate.files import absolute
from kangaroo_jax.curation.instruct.checks import flaw_of_options, flaw_of_question, says_the_same
from kangaroo_jax.curation.instruct.plan import PlannedConversation
from kangaroo_jax.curation.instruct.taxonomy import CAPTION_TASKS, TYPES
from kangaroo_jax.llm_client.prompts import Prompt, load_prompt, prompt_folder
from kangaroo_jax.llm_client.requests import Reply, Request
from kangaroo_jax.llm_client.schemas import object_schema
from kangaroo_jax.llm_client.team import Clients
from kangaroo_jax.llm_client.text import LANGUAGES

LETTERS = "ABCDEFGH"
_NAMES = ("mcq", "open", "single", "multi", "choose", "verify", "recall", "ask_short", "ask_detailed", "ask_letter")
_TEXT = {"type": "string", "maxLength": 2000}


@dataclasses.dataclass(frozen=True)
class MakingResult:
    """The result of a slot: (question, answer) rounds and the wrong options of multiple choice, or a reason for none.

    `checks` are the results of its tests. `transient` marks an error that another run may not have.
    """

    slot: PlannedConversation
    rounds: tuple[tuple[str, str], ...] = ()
    distractors: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""
    transient: bool = False
    prompt: str = ""
    checks: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Maker:
    """Makes conversations with a team of models."""

    def __init__(self, config: ConfigDict, folder: Path, team: Clients | None = None) -> None:
        """`config` is `config.instruct_config`; media in the rows are relative to `folder`. Raises UserError."""
        self.config, self.team, self._folder = config, team, folder
        prompts = prompt_folder(__file__, config.prompts)
        self._prompts = {(n, language): load_prompt(prompts, n, language) for n in _NAMES for language in LANGUAGES}

    def prompt(self, name: str, language: str) -> Prompt:
        """The prompt with a name."""
        return self._prompts[name, language]

    @property
    def versions(self) -> list[str]:
        """The versions of all prompts."""
        return sorted(prompt.version for prompt in self._prompts.values())

    async def make(self, slot: PlannedConversation) -> MakingResult:
        """Make one conversation."""
        if slot.task in CAPTION_TASKS:
            return self._caption(slot)
        assert self.team is not None
        request = self.question_request(slot)
        reply = await self.team[self.config.generator].ask(request)
        if reply.outcome != "ok":
            return MakingResult(
                slot, reason=f"generator {reply.outcome}", detail=reply.reason, transient=reply.transient
            )
        if not reply.data["fits"]:
            return MakingResult(slot, reason="type does not fit", detail=" ".join(slot.types))
        made = self._checked(slot, reply, request.prompt)
        if made.reason:
            return made
        if slot.task != "mcq":
            return await self._open_blind(made) if self.config.blind and self.config.blind_open else made
        made = await self._blind(made) if self.config.blind else made
        return await self._verified(made) if self.config.verifier and not made.reason else made

    def _caption(self, slot: PlannedConversation) -> MakingResult:
        """A request in one of the usual wordings, answered by the caption itself."""
        name = "ask_short" if slot.task == "short_caption" else "ask_detailed"
        prompt = self.prompt(name, slot.language)
        asked = random.Random(slot.seed).choice(prompt.text.splitlines())
        answer = slot.row["short" if slot.task == "short_caption" else "caption"]
        if not answer.strip():
            return MakingResult(slot, reason="empty")
        return MakingResult(slot, ((asked, answer),), prompt=prompt.version)

    def question_request(self, slot: PlannedConversation) -> Request:
        """The request to the generator."""
        prompt = self.prompt(slot.task, slot.language)
        kinds = ("；" if slot.language == "zh" else "; ").join(TYPES[key].told(slot.language) for key in slot.types)
        values: dict[str, Any] = {"caption": slot.row["caption"], "kinds": kinds}
        if slot.task == "mcq":
            values["wrong"] = self.config.options - 1
        if slot.task == "multi":
            values["rounds"] = len(slot.types)
        system, text = prompt.fill(**values)
        shape = {"mcq": "mcq", "multi": "rounds"}.get(slot.task, "open")
        task = self._task(slot, "question") | {"types": slot.types, "shape": shape, "seed": slot.seed}
        return Request(prompt.version, text, system, (), self._schema(slot.task), self.config.answer_tokens, task)

    def _task(self, slot: PlannedConversation, name: str) -> dict[str, Any]:
        row = slot.row
        media = absolute(row["media"], self._folder)
        times = {"start": row.get("start"), "end": row.get("end")}
        return {"name": name, "media": media, "language": slot.language} | times

    def _schema(self, task: str) -> dict[str, Any]:
        fits = {"type": "boolean"}
        if task == "multi":
            one = object_schema(question=_TEXT, answer=_TEXT)
            return object_schema(fits=fits, rounds={"type": "array", "items": one, "minItems": 2, "maxItems": 8})
        if task == "mcq":
            wrong = self.config.options - 1
            options = {"type": "array", "items": _TEXT, "minItems": wrong, "maxItems": wrong}
            return object_schema(fits=fits, question=_TEXT, answer=_TEXT, distractors=options)
        return object_schema(fits=fits, question=_TEXT, answer=_TEXT)

    def _checked(self, slot: PlannedConversation, reply: Reply, prompt: str) -> MakingResult:
        """The generator's answer as a result, with a reason if its wording has a flaw."""
        data = reply.data
        rounds = data["rounds"] if slot.task == "multi" else [data]
        pairs = tuple((one["question"].strip(), one["answer"].strip()) for one in rounds)
        distractors = tuple(" ".join(option.split()) for option in data.get("distractors", ()))
        made = MakingResult(slot, pairs, distractors, prompt=prompt)
        for question, answer in pairs:
            if flaw := flaw_of_question(question, answer, slot.language):
                return dataclasses.replace(made, reason=flaw, detail=question)
        if len({question for question, _ in pairs}) < len(pairs) or len(pairs) > self.config.max_rounds:
            return dataclasses.replace(made, reason="rounds alike or too many")
        if slot.task == "mcq" and (flaw := flaw_of_options(*pairs[0], distractors)):
            return dataclasses.replace(made, reason=flaw, detail=f"{pairs[0][0]} {pairs[0][1]} / {distractors}")
        return made

    # ------------------------------------------------------------------------------- asked again

    def choice_requests(self, made: MakingResult) -> list[Request]:
        """The question without the video, its options rotated so that the answer takes each position once."""
        slot, (question, answer) = made.slot, made.rounds[0]
        options = [answer, *made.distractors]
        random.Random(slot.seed).shuffle(options)
        turns = (options[i % len(options) :] + options[: i % len(options)] for i in range(self.config.blind_rotations))
        return [self._choice("choose", slot, question, turn) for turn in turns]

    def _choice(
        self, name: str, slot: PlannedConversation, question: str, options: Sequence[str], truth: str | None = None
    ) -> Request:
        prompt = self.prompt(name, slot.language)
        values = {"question": question, "options": option_lines(options, slot.language)}
        if truth is not None:
            values["caption"] = slot.row["caption"]
        system, text = prompt.fill(**values)
        schema = object_schema(answer={"type": "string", "enum": list(LETTERS[: len(options)])})
        task = self._task(slot, "choose") | {"question": question, "options": list(options), "truth": truth}
        return Request(prompt.version, text, system, (), schema, 32, task)

    async def _blind(self, made: MakingResult) -> MakingResult:
        """Drop a question that is answered rightly without the video more often than config.blind_max_right."""
        assert self.team is not None
        client = self.team[self.config.blind]
        requests = self.choice_requests(made)
        replies = await asyncio.gather(*(client.ask(request) for request in requests))
        if (failed := _failed(made, replies, "blind")) is not None:
            return failed
        truth = made.rounds[0][1]
        right = sum(_picked(request, reply) == truth for request, reply in zip(requests, replies, strict=True))
        checks = {**made.checks, "blind_asked": len(replies), "blind_right": right}
        reason = "answered blind" if right > self.config.blind_max_right else ""
        return dataclasses.replace(made, reason=reason, detail=made.rounds[0][0] if reason else "", checks=checks)

    async def _verified(self, made: MakingResult) -> MakingResult:
        """Drop a question whose answer does not follow from the caption that it was made of."""
        assert self.team is not None
        question, answer = made.rounds[0]
        options = [answer, *made.distractors]
        random.Random(made.slot.seed + 1).shuffle(options)
        request = self._choice("verify", made.slot, question, options, truth=answer)
        reply = await self.team[self.config.verifier].ask(request)
        if (failed := _failed(made, [reply], "verifier")) is not None:
            return failed
        checks = {**made.checks, "verified": _picked(request, reply) == answer}
        reason = "" if checks["verified"] else "caption says otherwise"
        return dataclasses.replace(made, reason=reason, detail=question if reason else "", checks=checks)

    async def _open_blind(self, made: MakingResult) -> MakingResult:
        """Drop rounds that are answered rightly without the video; a conversation with too few left is dropped."""
        assert self.team is not None
        client, slot = self.team[self.config.blind], made.slot
        prompt = self.prompt("recall", slot.language)
        requests = []
        for question, _ in made.rounds:
            system, text = prompt.fill(question=question)
            task = self._task(slot, "recall") | {"question": question}
            requests.append(Request(prompt.version, text, system, (), object_schema(answer=_TEXT), 256, task))
        replies = await asyncio.gather(*(client.ask(request) for request in requests))
        if (failed := _failed(made, replies, "blind")) is not None:
            return failed
        iou = self.config.blind_iou
        pairs = zip(made.rounds, replies, strict=True)
        kept = tuple(one for one, reply in pairs if not says_the_same(reply.data["answer"], one[1], iou))
        checks = {**made.checks, "blind_asked": len(replies), "blind_right": len(replies) - len(kept)}
        enough = self.config.min_rounds if slot.task == "multi" else 1
        reason = "answered blind" if len(kept) < enough else ""
        detail = made.rounds[0][0] if reason else ""
        return dataclasses.replace(made, rounds=kept or made.rounds, reason=reason, detail=detail, checks=checks)


def option_lines(options: Sequence[str], language: str) -> str:
    """Options with letters, one a line."""
    dot = "、" if language == "zh" else ". "
    return "\n".join(f"{letter}{dot}{option}" for letter, option in zip(LETTERS, options, strict=False))


def _picked(request: Request, reply: Reply) -> str:
    return request.task["options"][LETTERS.index(reply.data["answer"])]


def _failed(made: MakingResult, replies: Sequence[Reply], who: str) -> MakingResult | None:
    """The dropped sample if a check could not be made, else None."""
    bad = next((reply for reply in replies if reply.outcome != "ok"), None)
    if bad is None:
        return None
    transient = any(reply.transient for reply in replies)
    return dataclasses.replace(made, reason=f"{who} {bad.outcome}", detail=bad.reason, transient=transient)
