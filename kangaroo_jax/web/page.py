"""The page itself, of Gradio's parts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from kangaroo_jax.web import drawing
from kangaroo_jax.web.asking import HIGHEST_TEMPERATURE
from kangaroo_jax.web.examples import KINDS
from kangaroo_jax.web.sessions import Session
from kangaroo_jax.web.talk import Talk, View
from kangaroo_jax.web.texts import LANGUAGES, Texts, preferred, texts

_HERE = Path(__file__).parent
_AT_A_TIME = 16  # answers, and as many looks at films
_MOST_WAITING = 128  # actions
_FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Noto Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "sans-serif",
)  # of the reader's own machine


class Page:
    """Gradio's parts, and what each does."""

    def __init__(self, talk: Talk) -> None:
        """`talk` has the actions."""
        self._talk = talk
        words = texts("en")
        with gr.Blocks(title="Kangaroo", analytics_enabled=False) as self.blocks:
            with gr.Row(elem_classes="k-top"):
                self._header = gr.HTML(drawing.header(words, talk.model.name), js_on_load=None)
                self._language = gr.Radio(
                    [(name, key) for key, name in LANGUAGES.items()],
                    value="en",
                    show_label=False,
                    container=False,
                    elem_classes="k-language",
                )
            with gr.Row():
                with gr.Column(scale=5, min_width=340):
                    self._show(words)
                with gr.Column(scale=6, min_width=380):
                    self._converse(words)
            self._wire()
        self.blocks.queue(max_size=_MOST_WAITING, default_concurrency_limit=_AT_A_TIME)

    def _show(self, words: Texts) -> None:
        """The left side: what is shown to the model, and what it saw."""
        self._drop = gr.HTML("", js_on_load=_script("drop"), elem_id="k-drop")
        with gr.Row(elem_classes="k-examples"):
            self._examples = gr.HTML(f"<p>{words.examples}</p>", js_on_load=None)
            self._kinds = [
                gr.Button(words.example_names[kind], size="sm", elem_classes="k-chip", elem_id=f"k-example-{kind}")
                for kind in KINDS
            ]
        self._progress = gr.HTML("", js_on_load=None, elem_id="k-progress")
        self._stage = gr.HTML(f'<p class="k-empty">{words.nothing_shown}</p>', js_on_load=_script("stage"))
        with gr.Accordion(words.settings, open=False) as self._settings:
            most = self._talk.model.most_frames
            self._frames = gr.Slider(0, most, 0, step=1, label=words.frames, info=words.frames_info)
            self._temperature = gr.Slider(
                0, HIGHEST_TEMPERATURE, 0, step=0.05, label=words.temperature, info=words.temperature_info
            )
            self._seed = gr.Number(0, precision=0, label=words.seed, info=words.seed_info)

    def _converse(self, words: Texts) -> None:
        """The right side: the conversation."""
        self._chat = gr.Chatbot(
            [],
            show_label=False,
            height="calc(100vh - 262px)",
            min_height=420,
            placeholder=words.chat_empty,
            render_markdown=False,
            buttons=[],
            feedback_options=None,
            elem_classes="k-chat",
            elem_id="k-chat",
        )
        with gr.Row(elem_classes="k-examples"):
            self._suggestions = [gr.Button(text, size="sm", elem_classes="k-chip") for text in words.suggestions]
        self._question = gr.Textbox(
            show_label=False, placeholder=words.placeholder, submit_btn=True, autofocus=True, elem_id="k-question"
        )
        self._alert = gr.HTML("", js_on_load=None, elem_id="k-alert")
        with gr.Row(elem_classes="k-foot"):
            self._note = gr.HTML("", js_on_load=None, elem_id="k-note")
            self._anew = gr.Button(words.anew, size="sm", elem_classes="k-chip", elem_id="k-anew")

    # ------------------------------------------------------------------------------- what is done

    def _wire(self) -> None:
        talk, given = self._talk, [self._frames, self._temperature, self._seed]
        changes = [self._chat, self._stage, self._progress, self._note, self._alert, self._question]
        quiet: dict[str, Any] = dict(show_progress="hidden", outputs=changes)

        def acts(action: Callable[..., Iterator[View]]) -> Callable[..., Iterator[list[Any]]]:
            def act(request: gr.Request, *args: Any) -> Iterator[list[Any]]:
                session = talk.sessions.of(request.session_hash)
                for view in action(session, *args):
                    yield _updates(view)

            return act

        ask = acts(talk.ask)
        gr.on([self._question.submit], ask, [self._question, *given], api_name="ask", **quiet)
        for button in self._suggestions:
            button.click(ask, [button, *given], api_name=False, **quiet)
        self._drop.upload(acts(talk.watch), given, api_name="watch", **quiet)
        gr.on([self._frames.release], acts(talk.watch), given, api_name=False, **quiet)
        for kind, button in zip(KINDS, self._kinds, strict=True):
            made = acts(lambda session, *args, kind=kind: talk.example(session, kind, *args))
            button.click(made, given, api_name=f"example_{kind}", **quiet)
        self._question.stop(self._stop, api_name="stop", concurrency_limit=None, show_progress="hidden")
        self._anew.click(acts(talk.forget), api_name="forget", concurrency_limit=None, **quiet)
        spoken = [*self._localized(), *changes]
        self.blocks.load(self._open, outputs=[self._language, *spoken], api_name="open", show_progress="hidden")
        self._language.input(self._speak, [self._language], spoken, api_name="speak", show_progress="hidden")
        self.blocks.unload(self._leave)

    def _open(self, request: gr.Request) -> list[Any]:
        language = preferred(request.headers.get("accept-language", ""))
        return [gr.Radio(value=language), *self._speak(request, language)]

    def _speak(self, request: gr.Request, language: str) -> list[Any]:
        session = self._talk.sessions.of(request.session_hash)
        view = self._talk.speak(session, language)
        chat = gr.Chatbot(view.chat, placeholder=session.texts.chat_empty)
        question = gr.Textbox(placeholder=session.texts.placeholder)
        return [*self._words(session), chat, *_updates(view)[1:-1], question]

    def _stop(self, request: gr.Request) -> None:
        self._talk.stop(self._talk.sessions.of(request.session_hash))

    def _leave(self, request: gr.Request) -> None:
        self._talk.sessions.leave(request.session_hash)

    def _localized(self) -> list[Any]:
        """The parts with words in them, in the order of `_words`."""
        settings = [self._settings, self._frames, self._temperature, self._seed]
        shown = [self._header, self._drop, self._examples, *self._kinds]
        return [*shown, *settings, *self._suggestions, self._anew]

    def _words(self, session: Session) -> list[Any]:
        words = session.texts
        return [
            drawing.header(words, self._talk.model.name),
            drawing.dropping(session),
            f"<p>{words.examples}</p>",
            *(gr.Button(words.example_names[kind]) for kind in KINDS),
            gr.Accordion(words.settings),
            gr.Slider(label=words.frames, info=words.frames_info),
            gr.Slider(label=words.temperature, info=words.temperature_info),
            gr.Number(label=words.seed, info=words.seed_info),
            *(gr.Button(text) for text in words.suggestions),
            gr.Button(words.anew),
        ]


def mounted(app: Any, talk: Talk) -> Any:
    """`app`, a FastAPI, with the page at its root."""
    mono = ("ui-monospace", "monospace")
    theme = gr.themes.Soft(primary_hue="amber", neutral_hue="slate", font=_FONTS, font_mono=mono)
    page = Page(talk)
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        allowed_paths=[],
        blocked_paths=["/"],
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
    )


def _updates(view: View) -> list[Any]:
    """A view as Gradio's updates of chat, stage, progress, note, alert and question."""
    question: dict[str, Any] = {} if view.question is None else {"value": view.question}
    if view.busy is not None:
        question |= {"submit_btn": not view.busy, "stop_btn": view.busy}
    pieces = (view.chat, view.stage, view.progress, view.note, view.alert)
    shown = [gr.skip() if piece is None else piece for piece in pieces]
    return [*shown, gr.Textbox(**question) if question else gr.skip()]


def _script(name: str) -> str:
    return (_HERE / f"{name}.js").read_text(encoding="utf-8")
