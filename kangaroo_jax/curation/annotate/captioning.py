"""From one clip to its captions: key frames -> frame captions -> a caption of the video -> refinement."""

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate import refine
from kangaroo_jax.curation.annotate.files import ClipRecord, relative
from kangaroo_jax.llm_client.prompts import load_prompt, prompt_folder
from kangaroo_jax.llm_client.requests import Reply, Request
from kangaroo_jax.llm_client.schemas import object_schema, text_schema
from kangaroo_jax.llm_client.team import Clients
from kangaroo_jax.llm_client.text import joined, language_share, sentences

CAPTION_SCHEMA = object_schema(short=text_schema(400), detailed=text_schema())


@dataclasses.dataclass(frozen=True)
class FrameCaptions:
    """A moment (seconds from the start of the clip) and the captioners' replies about it, in the config's order."""

    time: float
    replies: tuple[Reply, ...]

    @property
    def texts(self) -> list[str]:
        """The usable texts: answers that are ok, and truncated ones up to their last whole sentence."""
        return [text for reply in self.replies if (text := usable(reply))]


def usable(reply: Reply) -> str:
    """The usable text of a frame caption, "" if there is none."""
    if reply.outcome == "ok":
        return reply.text
    if reply.outcome != "truncated":
        return ""
    whole = sentences(reply.text)[:-1]
    return joined(whole, "zh" if language_share(reply.text, "zh") > 0.5 else "en")


class Captioner:
    """Captions clips with a team of models."""

    def __init__(self, config: ConfigDict, team: Clients | None = None) -> None:
        """`config` is `config.annotation_config`. Without a team it can only make requests. Raises UserError."""
        self.config, self.team = config, team
        folder = prompt_folder(__file__, config.prompts)
        self._frame = load_prompt(folder, "frame_caption", config.frame_language)
        self._video = {language: load_prompt(folder, "video_caption", language) for language in config.languages}
        self._hint = {language: load_prompt(folder, "hint", language) for language in config.languages}

    @property
    def prompts(self) -> dict[str, str]:
        """The version of each prompt, by its use."""
        made = {"frame_caption": self._frame.version}
        for language in self.config.languages:
            made[f"video_caption_{language}"] = self._video[language].version
            made[f"hint_{language}"] = self._hint[language].version
        return made

    def frame_requests(self, clip: ClipRecord) -> list[Request]:
        """One request for each key frame."""
        requests = []
        for frame in clip.keyframes:
            seconds = frame.time - (clip.start or 0.0)
            system, text = self._frame.fill(time=f"{seconds:.1f}")
            task = _task(clip, "frame_caption", self.config.frame_language) | {"time": seconds}
            tokens = self.config.frame_tokens
            requests.append(Request(self._frame.version, text, system, (frame.path,), None, tokens, task))
        return requests

    def video_request(self, clip: ClipRecord, frames: Sequence[FrameCaptions], language: str) -> Request:
        """The request to write one caption from the captions of the frames."""
        lines = []
        for frame in frames:
            lines.append(f"[{frame.time:.1f} s]" if language == "en" else f"[第 {frame.time:.1f} 秒]")
            lines += [f"- {' '.join(text.split())}" for text in frame.texts]
        hint = ""
        if clip.caption and self.config.source_caption:
            hint = "\n" + self._hint[language].fill(caption=" ".join(clip.caption.split()))[1] + "\n"
        system, text = self._video[language].fill(seconds=f"{clip.seconds:.1f}", notes="\n".join(lines), hint=hint)
        task = _task(clip, "video_caption", language)
        version = self._video[language].version
        return Request(version, text, system, (), CAPTION_SCHEMA, self.config.caption_tokens, task)

    async def annotate(self, clip: ClipRecord, folder: Path) -> list[dict[str, Any]]:
        """The objects of captions.jsonl for a clip, one for each language; their paths are relative to `folder`."""
        frames = await self._frames(clip)
        described = sum(1 for frame in frames if frame.texts)
        replies: list[Reply]
        if described < max(self.config.refine.min_frames * len(frames), 1):
            causes = [reply for frame in frames for reply in frame.replies if reply.outcome != "ok"]
            reason = f"frames: {described} of {len(frames)} were described; {causes[0].outcome}: {causes[0].reason}"
            transient = any(reply.transient for reply in causes)
            replies = [Reply("error", reason=reason, transient=transient)] * len(self.config.languages)
        else:
            assert self.team is not None
            writer = self.team[self.config.writer]
            requests = [self.video_request(clip, frames, language) for language in self.config.languages]
            replies = list(await asyncio.gather(*(writer.ask(request) for request in requests)))
        return self._rows(clip, frames, replies, folder)

    async def _frames(self, clip: ClipRecord) -> list[FrameCaptions]:
        assert self.team is not None
        requests = self.frame_requests(clip)
        clients = [self.team[name] for name in self.config.captioners]
        asked = [client.ask(request) for request in requests for client in clients]
        replies, each = await asyncio.gather(*asked), len(clients)
        return [
            FrameCaptions(frame.time - (clip.start or 0.0), tuple(replies[i * each : (i + 1) * each]))
            for i, frame in enumerate(clip.keyframes)
        ]

    def _rows(
        self, clip: ClipRecord, frames: Sequence[FrameCaptions], replies: Sequence[Reply], folder: Path
    ) -> list[dict[str, Any]]:
        """Refine and score the captions. A caption in a language without frame captions gets its sibling's support."""
        rules, texts = self.config.refine, [frame.texts for frame in frames]
        agreed = refine.consensus(texts)
        refined, supports = {}, dict[str, float]()
        for language, reply in zip(self.config.languages, replies, strict=True):
            if reply.outcome != "ok":
                continue
            same = language == self.config.frame_language
            refined[language] = refine.refine(reply.data["detailed"], language, texts if same else None, rules)
            if same:
                supports[language] = refine.support(refined[language].text, texts)
        rows = []
        for language, reply in zip(self.config.languages, replies, strict=True):
            row = self._head(clip, language, folder) | _outcome(reply)
            if language in refined:
                found = refined[language]
                supported = supports.get(language, supports.get(self.config.frame_language))
                row |= {"caption": found.text, "short": _short(reply.data["short"], found.text, language, rules)}
                row["scores"] = refine.score(found.text, supported, agreed, rules)
                row["dropped"] = [{"sentence": sentence, "rule": rule} for sentence, rule in found.dropped]
                if found.reason:
                    refused = found.reason.startswith("refusal")
                    row |= {"outcome": "refused" if refused else "error", "reason": found.reason}
            rows.append(row | self._trace(clip, frames, reply, language, folder))
        return rows

    def _head(self, clip: ClipRecord, language: str, folder: Path) -> dict[str, Any]:
        return {
            "id": f"{clip.id}-{language}",
            "clip": clip.id,
            "language": language,
            "media": relative(clip.media, folder),
            "start": clip.start,
            "end": clip.end,
            "category": clip.category,
            "source": clip.source,
            "licence": clip.licence,
            "source_caption": clip.caption,
        }

    def _trace(
        self, clip: ClipRecord, frames: Sequence[FrameCaptions], reply: Reply, language: str, folder: Path
    ) -> dict[str, Any]:
        """Where a caption comes from: frame captions, models, prompts, tokens of the answers."""
        assert self.team is not None
        described = []
        for keyframe, frame in zip(clip.keyframes, frames, strict=True):
            captions = [
                {"captioner": name} | _outcome(one) | {"text": one.text}
                for name, one in zip(self.config.captioners, frame.replies, strict=True)
            ]
            path = relative(keyframe.path, folder)
            described.append({"path": path, "time": round(frame.time, 3), "captions": captions})
        every = [reply, *(one for frame in frames for one in frame.replies)]
        names = (*self.config.captioners, self.config.writer)
        return {
            "frames": described,
            "models": {name: self.team[name].backend.model for name in names},
            "writer": self.config.writer,
            "prompts": {"frame_caption": self._frame.version, "video_caption": self._video[language].version},
            "tokens": {
                "prompt": sum(one.prompt_tokens for one in every),
                "completion": sum(one.completion_tokens for one in every),
            },
        }


def _task(clip: ClipRecord, name: str, language: str) -> dict[str, Any]:
    return {"name": name, "media": clip.media, "start": clip.start, "end": clip.end, "language": language}


def _outcome(reply: Reply) -> dict[str, Any]:
    """Outcome and reason, and for errors whether another run may succeed."""
    found: dict[str, Any] = {"outcome": reply.outcome, "reason": reply.reason}
    return found | {"transient": True} if reply.outcome == "error" and reply.transient else found


def _short(text: str, detailed: str, language: str, rules: ConfigDict) -> str:
    """The short caption if it is usable, else the first sentence of the detailed one."""
    cleaned = refine.refine(text, language, None, rules)
    if cleaned.text:
        return cleaned.text
    first = sentences(detailed)[:1]
    return first[0] if first else ""
