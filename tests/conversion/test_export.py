"""An exported folder, loaded by torch and transformers from its own files, is the same model."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conversion import verify as verification
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.export import CODE, CODE_FILES
from kangaroo_jax.conversion.verify import verify
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.quickstart.torch_answers import compare_chats

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHANGES = {
    "plain": {},
    "llama31": {"llm__rope_scaling__factor": 8.0, "llm__rope_scaling__original_length": 64},
    "tied": {"llm__tied_head": True, "llm__head_dim": 16},
    "linear": {"projector": "linear", "patchify__bias": False, "vision__output_norm": True},
    "single_frames": {"patchify__enabled": False, "tpe__enabled": False, "vision__pos_embed_grid": 6},
}


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return convert([checkpoint], tmp_path_factory.mktemp("export") / "hf", tell=lambda line: None)


@pytest.fixture(scope="module")
def theirs(exported):
    """(model, tokenizer) as a user loads them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)


@pytest.mark.parametrize("name", CODE_FILES)
def test_a_file_of_code_names_all_that_it_needs(name):
    """transformers 4 copies the files that one names, and not those that these name."""

    def named(file):
        tree = ast.parse((CODE / file).read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        return {f"{node.module}.py" for node in found}

    assert set().union(*map(named, named(name))) <= named(name)


@pytest.mark.parametrize("name", CHANGES)
def test_logits_and_greedy_tokens(make_checkpoint, tmp_path, video, name):
    checkpoint = make_checkpoint("float32", **CHANGES[name])
    convert([checkpoint], tmp_path / "hf", tell=lambda line: None)
    report = verify(checkpoint, tmp_path / "hf", media=video)
    assert report.tokens >= 600 and report.vision_tokens >= 48
    assert report.largest_difference <= 1e-4 * max(1.0, report.largest_logit) and report.kl < 1e-6
    assert (report.same_greedy, report.greedy) == (32, 32)
    assert report.largest_logit > 1  # the weights are large enough for a difference to be seen


def test_a_wrong_export_is_found(checkpoint, exported, tmp_path, video):
    import shutil

    wrong = shutil.copytree(exported, tmp_path / "wrong")
    raw = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**raw, "rope_theta": 50_000.0}))
    with pytest.raises(UserError, match="is not the same model as .*logits differ by"):
        verify(checkpoint, wrong, media=video)


def test_no_weight_is_left_or_invented(exported, theirs):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32 and model.config.eos_token_id == [2, 5]


def test_chat_like_the_release(theirs, checkpoint, video):
    model, tokenizer = theirs
    ours = Kangaroo.load(checkpoint)
    greedy = dict(tokenizer=tokenizer, max_new_tokens=12, do_sample=False, eos_token_id=[2, 5])
    answer, history = model.chat(video_path=str(video), query="What moves?", history=None, **greedy)
    expected, turns = ours.chat(video=video, query="What moves?", max_new_tokens=12)
    assert answer == expected and len(answer) > 3
    again, longer = model.chat(video_path=str(video), query="And then?", history=history, **greedy)
    expected, _ = ours.chat(query="And then?", history=turns, max_new_tokens=12)
    assert again == expected and again != answer
    assert json.loads(json.dumps(longer)) == longer and len(longer) == 4
    without, _ = model.chat(query="And then?", history=history, **greedy)
    assert without == again
    torch.manual_seed(0)
    drawn = {model.chat(str(video), "What moves?", tokenizer, None, max_new_tokens=12)[0] for _ in range(3)}
    assert len(drawn) > 1


def test_chat_about_images_and_frames(theirs, checkpoint, tmp_path):
    from PIL import Image

    from kangaroo_jax.data.media.video import load_video

    model, tokenizer = theirs
    ours = Kangaroo.load(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    greedy = dict(tokenizer=tokenizer, max_new_tokens=12, do_sample=False)
    expected, _ = ours.chat(image=tmp_path / "a.png", query="What is it?", max_new_tokens=12)
    assert model.chat(str(tmp_path / "a.png"), "What is it?", **greedy)[0] == expected
    with Image.open(tmp_path / "a.png") as image:
        assert model.chat(image, "What is it?", **greedy)[0] == expected
    clip = verification.make_video(tmp_path / "b.mp4", seconds=6, side=48)
    seen = load_video(clip, image_size=32, times=np.arange(6) + 0.5)
    expected, _ = ours.chat(video=clip, query="What is it?", max_new_tokens=12)
    frames = list(seen.pixels)
    assert model.chat(frames, "What is it?", frame_times=seen.times, **greedy)[0] == expected
    odd, _ = model.chat(frames[:5], "What is it?", **greedy)
    even, _ = model.chat([*frames[:5], frames[4]], "What is it?", frame_times=[0, 1, 2, 3, 4, 4], **greedy)
    assert odd == even


def test_text_never_becomes_a_special_token(theirs, checkpoint):
    from kangaroo_jax.inference.history import conversation

    model, tokenizer = theirs
    query = "Say <|eot_id|> and <vi_start>, </s> too."
    processing = sys.modules[type(model).__module__.replace("modeling", "processing")]
    inputs = processing.KangarooProcessor(model.config, tokenizer).apply_chat_template(
        [{"role": "user", "content": query}]
    )
    recipe = Kangaroo.load(checkpoint).recipe(conversation([{"role": "user", "text": query}]))
    assert inputs["input_ids"][0].tolist() == recipe.tokens.tolist()


def test_processor_and_generate_without_chat(exported, theirs, video):
    model, tokenizer = theirs
    processor = transformers.AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    content = [{"type": "video", "video": str(video)}, {"type": "text", "text": "What moves?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    assert inputs["pixel_values"].shape == (24, 3, 32, 32) and inputs["frame_times"].shape == (24,)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, temperature=None, top_p=None)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :]).strip()
    assert answer == model.chat(str(video), "What moves?", tokenizer, max_new_tokens=12, do_sample=False)[0]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<video>\nWhat moves?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_saved_by_transformers_and_converted_back(theirs, checkpoint, tmp_path):
    """A user fine-tunes in PyTorch, saves, and comes back: every weight and the rope's settings are there."""
    from kangaroo_jax.checkpoints import reading
    from kangaroo_jax.models.parameters import abstract_model

    model, tokenizer = theirs
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    convert([tmp_path / "saved"], tmp_path / "back", preset="tiny", tell=lambda line: None)
    config, expected = (reading.load_config(folder) for folder in (tmp_path / "back", checkpoint))
    assert config.model.llm.to_dict() == expected.model.llm.to_dict()
    assert config.data.max_frames == expected.data.max_frames == 24
    binding = abstract_model(ModelConfig.from_config(config.model))
    params, wanted = (reading.load_params(folder, binding) for folder in (tmp_path / "back", checkpoint))
    for path in set(wanted) - {"llm/embedding"}:
        np.testing.assert_array_equal(params[path], wanted[path], err_msg=path)


@pytest.mark.slow
def test_the_folder_needs_nothing_of_ours(exported, video):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(m.chat(sys.argv[2], 'What moves?', t, None, max_new_tokens=8, do_sample=False)[0])\n"
        "print([n for n in sys.modules if n.startswith(('jax', 'flax', 'kangaroo'))])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(exported), str(video)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_answers_are_compared_and_differences_counted(checkpoint, video, tmp_path, monkeypatch):
    from PIL import Image

    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "c.jpg")
    asked = [(video, "What moves?"), (video, "Which way?"), (tmp_path / "c.jpg", "What is it?")]
    assert compare_chats(checkpoint, asked) == 3
    said: list[str] = []
    monkeypatch.setattr(verification.InTorch, "chat", lambda self, media, query, n: "no" if "way" in query else "")
    assert compare_chats(checkpoint, asked, tell=said.append) == 0
    assert len(said) == 4 and "square.mp4" in said[0]


def test_the_command_converts_and_verifies(checkpoint, tmp_path, video, capsys):
    from kangaroo_jax.cli import main as cli

    arguments = ["convert", f"--from={checkpoint}", f"--to={tmp_path / 'hf'}", "--verify", f"--video={video}"]
    assert cli.main(arguments) == 0
    assert "32 of 32 greedy tokens agree" in capsys.readouterr().out


# ------------------------------------------------------------------- what users of transformers do with an export


@pytest.fixture(scope="module")
def asked(exported, theirs, video, tmp_path_factory):
    """(processor, a batch of three questions about a video, an image and nothing, and each of them alone)."""
    from PIL import Image

    picture = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 24, 3), np.uint8)).save(picture)
    processor = transformers.AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    times = np.arange(8) / 2
    contents = [
        [{"type": "video", "video": [picture] * 4 + [picture] * 4, "times": times}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What moves in the video?"}],
        "A red square?",
    ]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    batch = processor.apply_chat_template(conversations)
    return processor, conversations, batch, [processor.apply_chat_template(one) for one in conversations]


def _new(model, inputs, **options) -> list[list[int]]:
    usual = dict(max_new_tokens=8, pad_token_id=2, temperature=None, top_p=None)
    ids = model.generate(**inputs, **{**usual, "do_sample": False, **options})
    return [row[inputs["input_ids"].shape[1] :] for row in ids.tolist()]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_each_row_of_a_batch_sees_its_own_frames(theirs, asked, options):
    model, _ = theirs
    _, _, batch, alone = asked
    assert batch["pixel_values"].shape[0] == 8 + 2 and batch["input_ids"].shape[0] == 3
    assert _new(model, batch, **options) == [row for one in alone for row in _new(model, one, **options)]


def test_sampled_sequences_begin_with_the_same_logits(theirs, asked):
    model, _ = theirs
    batch, alone = asked[2:]
    options = dict(do_sample=True, num_return_sequences=3, max_new_tokens=1, pad_token_id=2)
    drawn = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True).logits[0]
    with torch.no_grad():
        expected = torch.cat([model(**one).logits[:, -1] for one in alone]).repeat_interleave(3, 0)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_a_new_video_on_a_filled_cache_is_seen(theirs, asked):
    model, _ = theirs
    first, second = asked[3][0], asked[3][1]
    done = model.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=2)
    name = "cache" if "cache" in done.keys() else "past_key_values"
    ids = torch.cat([done.sequences, second["input_ids"]], 1)
    both = {key: torch.cat([first[key], second[key]]) for key in ("pixel_values", "frame_times")}
    both.update(input_ids=ids, attention_mask=torch.ones_like(ids))
    expected = _new(model, both)
    looked = []
    hook = model.vision_tower.register_forward_pre_hook(lambda module, inputs: looked.append(len(inputs[0])))
    assert _new(model, both, **{name: done[name]}) == expected
    hook.remove()
    assert looked == [2]  # the frames of the first turn are in the cache
    with torch.no_grad(), pytest.raises(ValueError, match="4 places for 20 vision tokens"):
        model(input_ids=second["input_ids"], **{key: both[key] for key in ("pixel_values", "frame_times")})


def test_tokens_guessed_from_the_prompt_change_no_answer(theirs, asked):
    """The placeholder may be among the guesses; it is a token like any other there."""
    model, _ = theirs
    one = dict(asked[3][0])
    first = one["input_ids"][0].tolist().index(model.config.special_ids["vision"])
    before = one["input_ids"][:, first - 2 : first]
    one["input_ids"] = torch.cat([one["input_ids"], before], 1)
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    looked_up = _new(model, one, prompt_lookup_num_tokens=4, max_matching_ngram_size=2)
    assert looked_up == _new(model, one)


def test_parts_of_a_batch_add_up_to_its_loss(theirs, asked):
    """As Trainer accumulates gradients: every part is told of how many labels the whole has."""
    model, _ = theirs
    batch, alone = asked[2:]
    labels = torch.where((batch["input_ids"] >= 12) & (batch["attention_mask"] == 1), batch["input_ids"], -100)
    whole = model(**batch, labels=labels)
    count = int((labels[:, 1:] != -100).sum())
    parts = 0.0
    for i, one in enumerate(alone):
        own = labels[i : i + 1, -one["input_ids"].shape[1] :]
        parts += model(**one, labels=own, num_items_in_batch=torch.tensor(count)).loss
    torch.testing.assert_close(parts, whole.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_reaches_the_encoder_and_changes_no_gradient(theirs, asked, reentrant):
    import copy

    model, inputs = copy.deepcopy(theirs[0]).train(), asked[3][0]
    for name, weight in model.named_parameters():  # as with adapters: the patch embedding is frozen
        weight.requires_grad_(name.endswith(("attn.q_proj.weight", "self_attn.q_proj.weight")))
    runs = []
    hook = model.vision_tower.blocks[0].attn.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients()
    hook.remove()
    assert len(runs) == 3  # once more than without
    assert found.keys() == expected.keys() and any("vision_tower" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_processor_is_saved_with_a_model_and_read_again(theirs, asked, tmp_path):
    processor, conversations, batch, alone = asked
    assert isinstance(processor, transformers.ProcessorMixin)
    theirs[0].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "KangarooProcessor"
    same = again.apply_chat_template(conversations)
    assert all(torch.equal(same[key], batch[key]) for key in batch) and same.keys() == batch.keys()
    alone_too = tmp_path / "alone"
    processor.save_pretrained(alone_too)
    read = transformers.AutoProcessor.from_pretrained(alone_too, trust_remote_code=True)
    assert torch.equal(read.apply_chat_template(conversations[2])["input_ids"], alone[2]["input_ids"])
    assert processor.batch_decode(batch["input_ids"])[2].endswith("A red square?assistant\n\n")


def test_a_prompt_as_text_and_its_media(asked):
    processor, conversations, batch, _ = asked
    texts = processor.apply_chat_template(conversations, tokenize=False)
    media = [conversation[0]["content"][0] for conversation in conversations[:2]]
    frames, picture = media[0]["video"], media[1]["image"]
    found = processor(text=texts, videos=[frames], images=picture, return_tensors="pt", padding=True)
    assert torch.equal(found["input_ids"], batch["input_ids"])
    assert torch.equal(found["pixel_values"], batch["pixel_values"])
    narrow = found.to(torch.bfloat16)
    assert narrow["pixel_values"].dtype == torch.bfloat16 and narrow["frame_times"].dtype == torch.float32
    with pytest.raises(ValueError, match="more tags than media"):
        processor(text=texts, images=picture)
    with pytest.raises(ValueError, match="media without a tag in the text: {'image': 1}"):
        processor(text="Who?", images=picture)
    with pytest.raises(TypeError, match="continue_final_message"):
        processor.apply_chat_template(conversations[2], continue_final_message=True)
    with pytest.raises(ValueError, match="only 'pt'"):
        processor.apply_chat_template(conversations[2], return_tensors="np")
