"""Trains the embedded model's tokenizer: byte-level byte-pair encoding with 4,096 tokens, made for Python source.

Text is first cut into pieces by one pattern, then each piece is merged from bytes (Sennrich et al., "Neural Machine
Translation of Rare Words with Subword Units", arXiv 1508.07909). What the pattern adds for Python: a line break and the
whole indentation after it are one piece, so every level of indentation becomes one token. There is no normaliser and
every byte is in the vocabulary, so any UTF-8 text comes back exactly.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
# In this order: line breaks with the indentation after them; a word with one sign or space before it; up to three
# digits; a run of signs with one space before it; spaces up to the last one before something; what is left.
PIECES = (
    r"[\r\n]+[ \t]*"
    r"|[^\s\p{L}\p{N}]?\p{L}+|[ \t]\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[^\S\r\n]+(?=[^\S\r\n]\S)"
    r"|\s"
)


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens whose token 0 is `<|endoftext|>`, the document separator.

    Raises ValueError when the vocabulary has no room for the 256 bytes and the separator.
    """
    if vocabulary < 257:
        raise ValueError(f"the vocabulary must hold 256 bytes and one separator: at least 257 tokens, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that Hugging Face's classes read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
