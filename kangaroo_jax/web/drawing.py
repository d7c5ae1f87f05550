"""Pieces of the page as HTML. What users and files are called is escaped."""

import html
from collections.abc import Sequence

from kangaroo_jax.serving.limits import MIB
from kangaroo_jax.web.asking import Told
from kangaroo_jax.web.sessions import Session, Shown
from kangaroo_jax.web.texts import Texts

PATH = "/kangaroo"  # of what this package serves itself


def header(words: Texts, model: str) -> str:
    """The head of the page."""
    return (
        '<div class="k-head"><span class="k-mark">K</span><h1>Kangaroo</h1>'
        f'<span class="k-tag">{html.escape(words.tagline)}</span>'
        f'<span class="k-model">{html.escape(model)}</span></div>'
    )


def dropping(session: Session) -> str:
    """Where files are dropped; the page's script finds the upload's address in it."""
    words, limit = session.texts, session.limit // MIB
    large = html.escape(words.too_large.format(name="{name}", limit=limit))
    return (
        f'<label class="k-drop" data-upload="{PATH}/upload/{session.token}" data-busy="{html.escape(words.uploading)}"'
        f' data-limit="{session.limit}" data-large="{large}">'
        f'<input type="file" multiple accept="video/*,image/*,.mkv,.ts,.flv" aria-label="{html.escape(words.drop)}">'
        f"<b>{html.escape(words.drop)}</b><small>{html.escape(words.drop_hint.format(limit=limit))}</small>"
        '<i class="k-bar"><i></i></i></label>'
    )


def stage(session: Session) -> str:
    """All media of the conversation, each with its strip of frames."""
    with session.lock:
        cards = [_card(session, shown) for shown in session.shown]
    return "".join(cards) or f'<p class="k-empty">{html.escape(session.texts.nothing_shown)}</p>'


def _card(session: Session, shown: Shown) -> str:
    medium, words = shown.medium, session.texts
    address = f"{PATH}/media/{session.token}/{shown.number}"
    if medium.kind == "video":
        player = f'<video controls preload="metadata" src="{address}"></video>'
        seen, times = "…", shown.seconds
        if times:
            seen = words.watched.format(**_frames(len(times)), first=clock(times[0]), last=clock(times[-1]))
    else:
        player, seen = f'<img src="{address}" alt="">', words.watched_image
    name = html.escape(medium.name)
    return (
        f'<section class="k-card"><header><b title="{name}">{name}</b><span>{html.escape(seen)}</span></header>'
        f"{player}{_strip(shown)}</section>"
    )


def _strip(shown: Shown) -> str:
    if shown.medium.kind == "image":
        return ""
    figures = [
        f'<figure data-time="{second:.3f}"><img src="{picture}" alt="">'
        f"<figcaption>{clock(second)}</figcaption></figure>"
        for second, picture in zip(shown.seconds, shown.thumbnails, strict=False)
    ]
    return f'<div class="k-strip" data-number="{shown.number}">{"".join(figures)}</div>' if figures else ""


def watching(session: Session, shown: Sequence[Shown], seen: Sequence[float] | None) -> str:
    """How far media are looked at, of which the first unseen one is named; frames to come are pale in their strips."""
    words = session.texts
    place = next((i for i, share in enumerate(seen or ()) if share < 1), len(shown) - 1)
    told = html.escape(words.watching.format(name=shown[place].medium.name))
    if not seen:
        return f'<div class="k-watch">{told}<i class="k-bar k-unknown"><i></i></i></div>'
    pale = "".join(
        f'.k-strip[data-number="{one.number}"] figure:nth-child(n+{int(share * len(one.seconds)) + 1}){{opacity:.3}}'
        for one, share in zip(shown, seen, strict=False)
    )
    share, count = seen[place], len(shown[place].seconds)
    counted = html.escape(words.shown_frames.format(seen=int(share * count), frames=count)) if count else ""
    bar = f'<i class="k-bar"><i style="width:{100 * share:.0f}%"></i></i>'
    return f'<div class="k-watch">{told}<span>{counted}</span>{bar}<style>{pale}</style></div>'


def _frames(count: int) -> dict[str, str]:
    return {"frames": str(count), "s": "" if count == 1 else "s"}


def note(words: Texts, told: Told) -> str:
    """What an answer took, small."""
    parts = [words.note.format(first=seconds(told.first_token))]
    if told.frames_encoded:
        parts.append(words.note_encoded.format(**_frames(told.frames_encoded)))
    elif told.frames_reused:
        parts.append(words.note_reused.format(**_frames(told.frames_reused)))
    return f'<p class="k-note">{html.escape(" · ".join(parts))}</p>'


def alert(text: str) -> str:
    """A mistake, in one line."""
    return f'<p class="k-alert" role="alert">{html.escape(text)}</p>' if text else ""


def clock(second: float) -> str:
    """A time in a film: 0:07, 0:07.5, 1:02:03."""
    tenths = round(second * 10)
    whole, tenth = divmod(tenths, 10)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{text}.{tenth}" if tenth else text


def seconds(value: float) -> str:
    """A time that something took."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
