"""Chat templates beside a tokenizer: as transformers writes them, what is learnt of them, and what misbehaves."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data import chat_format
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.batches.sample import make_recipe, render_parts, render_prompt
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from kangaroo_jax.errors import UserError
from tests.data.test_tokenizer import train_json

SMOL = (  # with a system turn of its own
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # the system's turn in the first of the user's, spaces beside the contents
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% else %}{% set d = '26' %}"
    "{% endif %}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ d }}\n\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HEADS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# template, special tokens, bos, eos
KINDS = {
    "smol": (SMOL, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>"),
    "llama2": (LLAMA2, ["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "zephyr": (ZEPHYR, ["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "llama31": (LLAMA31, [*HEADS, *(f"<|reserved_special_token_{i}|>" for i in range(12))], *HEADS[:2]),
}
WORDS = [
    *(
        "What is the capital of France?",
        "Paris.",
        "  two  spaces, and\n\nlines\n",
        "袋鼠是什么动物?",
        "它是一种有袋类动物。",
    ),
    *(
        "👩‍👩‍👧‍👦 🙂🎥",
        "def f(x):\n    return {'a': [1, 2, 3]}  # noqa",
        "3.14159 = π, 12345",
        "<b>bold</b> & 'quotes'",
    ),
    *("déjà vu — ñandú", "a\tb\r\nc", "Yes", "The red circle moves to the left.", "- one\n- two", "1"),
]


def make(folder: Path, kind: str, **changes) -> Path:
    """A tokenizer of Hugging Face with a template beside it."""
    template, specials, bos, eos = KINDS[kind]
    path = train_json(folder / "tokenizer.json", specials)
    settings = {
        "chat_template": template,
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos},
        **changes,
    }
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, tuple[Path, Tokenizer]]:
    paths = {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    return {kind: (path, load_tokenizer(path)) for kind, path in paths.items()}


def conversations(count: int, seed: int) -> list[list[tuple[str, str]]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        rounds = rng.randint(1, 4)
        turns = [(role, rng.choice(WORDS)) for _ in range(rounds) for role in ("user", "assistant")]
        system = [("system", rng.choice(WORDS))] if rng.random() < 0.5 else []
        made.append([*system, *turns[: len(turns) - rng.randint(0, 1)]])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_transformers(tokenizers, kind):
    transformers = pytest.importorskip("transformers")
    path, ours = tokenizers[kind]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path.parent)
    template = KINDS[kind][0].replace("strftime_now is defined", "false")  # no clock here
    for turns in conversations(120, seed=1):
        ask = turns[-1][0] == "user"
        messages = [{"role": role, "content": text.strip()} for role, text in turns]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, chat_template=template)
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        found = render_parts([(role, [text]) for role, text in turns], ours, 1, 1, ask=ask)
        assert found.tokens.tolist() == expected, messages


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_is_the_answers_and_what_ends_them(tokenizers, kind):
    """By a mark of our own in each answer: its tokens, found in the text that transformers' template makes."""
    _, ours = tokenizers[kind]
    for number, turns in enumerate(conversations(40, seed=2)):
        if not any(role == "assistant" for role, _ in turns):
            continue
        recipe = make_recipe(Conversation("s", tuple(Turn(*turn) for turn in turns)), ours, DataConfig(), 1, 1)
        answers = [text.strip() for role, text in turns if role == "assistant"]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], recipe.weights > 0, [0]])))
        spans = [recipe.tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]
        assert [ours.decode(span).strip() for span in spans] == answers, number
        assert all(span[-1] == ours.eot and ours.name(span[-2]) is None for span in spans)
        assert recipe.tokens[-1] == ours.eot


def test_a_hand_made_span(tokenizers):
    _, t = tokenizers["smol"]
    start, end = 401, 402
    assert (t.name(start), t.name(end)) == ("<|im_start|>", "<|im_end|>")
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Yes", 0.5), Turn("user", "?"))
    recipe = make_recipe(Conversation("s", (*turns, Turn("assistant", "No"))), t, DataConfig(), 1, 1)
    parts = [
        ([start, *t.encode("system\nBe brief."), end, *t.encode("\n")], 0),
        ([start, *t.encode("user\nHi"), end, *t.encode("\n")], 0),
        ([start, *t.encode("assistant\n")], 0),
        ([*t.encode("Yes"), end], 0.5),
        ([*t.encode("\n"), start, *t.encode("user\n?"), end, *t.encode("\n"), start, *t.encode("assistant\n")], 0),
        ([*t.encode("No"), end], 1),
    ]
    assert recipe.tokens.tolist() == [i for ids, _ in parts for i in ids]
    assert recipe.weights.tolist() == [w for ids, w in parts for _ in ids]


def test_a_round_that_does_not_fit_is_left_out(tokenizers):
    _, t = tokenizers["smol"]
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes"), Turn("user", "Hm " * 50), Turn("assistant", "No")]
    short = make_recipe(Conversation("s", tuple(turns[:2])), t, DataConfig(), 1, 1)
    cut = make_recipe(Conversation("s", tuple(turns)), t, DataConfig(max_sample_tokens=len(short.tokens) + 9), 1, 1)
    assert cut.tokens.tolist() == short.tokens.tolist() and cut.weights.tolist() == short.weights.tolist()


def test_media_and_marks(tokenizers, tmp_path):
    """The marks are new ids after the others, or reserved tokens; words like special tokens stay words."""
    _, t = tokenizers["smol"]
    marks = [t.vi_start, t.eof, t.eov, t.vi_end, t.vision]
    assert marks == list(range(403, 408)) and t.vocab_size == 408 and t.name(403) == "<vi_start>"
    other = tokenizers["llama31"][1]
    base = other.bos
    assert [other.vi_start - base, other.vision - base] == [2, 11] and other.settings is not None
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    turn = Turn("user", "<image>\nWhat is <|im_end|>?")
    prompt = render_prompt(Conversation("s", (turn,), (Media("image", str(picture)),)), t, DataConfig(), 1, 2)
    block = [t.vi_start, t.vision, t.vision, t.eov, t.vi_end]
    ids = prompt.tokens.tolist()
    place = ids.index(t.vi_start)
    assert ids[place : place + 5] == block and prompt.is_vision.sum() == 2
    words = ids[place + 5 : -1 - len(t.encode("\nassistant\n"))]
    assert t.decode(words[: words.index(402)]) == "\nWhat is <|im_end|>?"
    assert ids.count(402) == 2  # of the system's turn and the user's


def test_an_answer_that_goes_on(tokenizers):
    _, t = tokenizers["smol"]
    turns = [("user", ["Hi"]), ("assistant", ["The answer is"])]
    asked = render_parts(turns[:1], t, 1, 1).tokens.tolist()
    assert render_parts(turns, t, 1, 1, leave_open=True).tokens.tolist() == asked + t.encode("The answer is")


def test_stop_ids_are_those_of_the_generation_settings_and_of_the_template(tokenizers, tmp_path):
    path = make(tmp_path, "smol", eos_token="<|endoftext|>")
    assert load_tokenizer(path).stop_ids == (400, 402)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [402, 400]}')
    assert load_tokenizer(path).stop_ids == (402, 400)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(UserError, match="9999.* that end an answer are not all of this tokenizer"):
        load_tokenizer(path)


def test_chatml_needs_no_template(tmp_path):
    path = train_json(tmp_path / "tokenizer.json", KINDS["smol"][1])
    t = load_tokenizer(path)
    assert render_parts([("user", ["Hi"])], t, 1, 1).tokens.tolist() == [
        401, *t.encode("user\nHi"), 402, *t.encode("\n"), 401, *t.encode("assistant\n")
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["{{bos_token}}", chat_format.LLAMA3], ids=["plain", "ours"])
def test_a_template_that_writes_llama_3_is_llama_3(tmp_path, template):
    """And has no settings: everything stays as without a template."""
    path = make(tmp_path, "llama31")
    if template != chat_format.LLAMA3:
        template += (
            "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
            "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        )
    (tmp_path / "chat_template.jinja").write_text(template)
    t = load_tokenizer(path)
    assert t.settings is None and t.kind == "llama3_json" and t.stop_ids == (t.eos, t.eot)
    assert list(tokenizer_files(path)) == ["tokenizer.json"]


def test_the_files_that_are_kept_give_the_same_tokenizer(tokenizers, tmp_path):
    path, t = tokenizers["zephyr"]
    for name, data in tokenizer_files(path).items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(tmp_path)
    assert again.settings == t.settings and again.stop_ids == t.stop_ids
    turns = [("system", ["Be brief."]), ("user", ["Hi"])]
    assert render_parts(turns, again, 1, 1).tokens.tolist() == render_parts(turns, t, 1, 1).tokens.tolist()


FOREVER = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% for m in %}", "line 1"),
        ("{{ raise_exception('only for tools') }}", "only for tools"),
        ("{{ nothing.at_all }}", "undefined"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}<|im_end|>", "one after another, each once"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends the assistant's turn by no special token"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}", "does not ask for an answer"),
        ("{{ 'x' * 5000000 }}", "more than 4194304 characters"),
        ("{{ 'x' * 9000000000 }}", "memory"),
        ("x" * 300_000, "are no chat template"),
        (FOREVER, "took more than 1 s"),
    ],
)
def test_templates_that_misbehave_end_with_one_line(tmp_path, monkeypatch, template, words):
    monkeypatch.setattr(chat_format, "SECONDS", 1.0)
    path = make(tmp_path, "smol", chat_template=template)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_conversation_that_a_template_refuses_is_one_line(tokenizers):
    _, t = tokenizers["llama2"]
    with pytest.raises(UserError, match="cannot be used for a conversation of user, user: roles must alternate"):
        render_parts([("user", ["a"]), ("user", ["b"])], t, 1, 1)
