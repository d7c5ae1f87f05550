"""An exported folder, loaded by torch and transformers from its own files, is the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.conventions import UserError
from kangaroo_jax.conversion import verify as verification
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.verify import compare_chats, verify
from kangaroo_jax.inference.chat import Kangaroo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHANGES = {
    "plain": {},
    "llama31": {"llm__rope_scaling__factor": 8.0, "llm__rope_scaling__original_length": 64},
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

    from kangaroo_jax.data.video import load_video

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
    from kangaroo_jax.inference.chat import conversation

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
    from kangaroo_jax.training import checkpoint as checkpoints

    model, tokenizer = theirs
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    convert([tmp_path / "saved"], tmp_path / "back", preset="tiny", tell=lambda line: None)
    config, expected = (checkpoints.load_config(folder) for folder in (tmp_path / "back", checkpoint))
    assert config.model.llm.to_dict() == expected.model.llm.to_dict()
    assert config.data.max_frames == expected.data.max_frames == 24
    binding = checkpoints.abstract_model(config.model)
    params, wanted = (checkpoints.load_params(folder, binding) for folder in (tmp_path / "back", checkpoint))
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
    from kangaroo_jax import cli

    arguments = ["convert", f"--from={checkpoint}", f"--to={tmp_path / 'hf'}", "--verify", f"--video={video}"]
    assert cli.main(arguments) == 0
    assert "32 of 32 greedy tokens agree" in capsys.readouterr().out
