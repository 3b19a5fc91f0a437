"""Trains small vocabularies, and writes what sentencepiece and transformers encode with them (tests/golden/tokenizers).

    python scripts/make_golden_tokenizers.py

Run it where sentencepiece, transformers and tokenizers are installed. Texts come from `tests/many_scripts.py`; of the
ids of each a checksum is kept, and those of a few as they are.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden" / "tokenizers"
SHOWN = 7  # texts whose ids are kept as they are
# Of a normaliser, as code points: full-width letters, a ligature, a composed letter, spaces, one that vanishes.
_RULES = "FF21\t41\nFF46\t66\nFB01\t66 69\n65 301\tE9\nA0\t20\n9\t20\n3000\t20\n200B\t\n2460\t31\n"
_USER_DEFINED = ["<user>", "▁▁", "▁▁▁▁", "XY", "x[i]"]
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "bpe_bytes": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "bpe_own_pieces": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "user_defined_symbols": _USER_DEFINED,
    },
    "bpe_normalised": {"model_type": "bpe", "rules": True, "remove_extra_whitespaces": True},
    "unigram_normalised": {
        "model_type": "unigram",
        "rules": True,
        "remove_extra_whitespaces": True,
        "user_defined_symbols": _USER_DEFINED,
    },
    "unigram_bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": False,  # runs of spaces can be cut in several ways of the same score
    },
}
PRE_TOKENIZERS = ("gpt-2", "qwen2", "qwen35", "command-r", "mpt", "llama-bpe", "tekken", "gpt-4o", "deepseek-r1-qwen")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.many_scripts import texts

    FOLDER.mkdir(exist_ok=True, parents=True)
    corpus, test = texts(3_001, seed=11, look_alikes=False), texts()
    plain = texts(look_alikes=False)
    expected: dict[str, Any] = {}
    for name, settings in SENTENCEPIECE.items():
        model = _train_sentencepiece(FOLDER / f"{name}.model", corpus, dict(settings))
        decoded = _checksums(model.decode(model.encode(plain)))
        expected[name] = _summary(plain, model.encode) | {"decoded": decoded}
    for is_legacy in (True, False):
        tokenizer = _transformers_tokenizer(FOLDER / "bpe_bytes.model", is_legacy)
        encode = lambda text, tokenizer=tokenizer: tokenizer(text, add_special_tokens=False)["input_ids"]
        expected[f"bpe_bytes/legacy={is_legacy}"] = _summary(test, encode)
    vocabulary, merges = _train_byte_level(corpus)
    (FOLDER / "byte_level.json").write_text(json.dumps({"tokens": vocabulary, "merges": merges}) + "\n", "utf-8")
    for name in PRE_TOKENIZERS:
        backend = _byte_level(name, vocabulary, merges)
        expected[f"pre/{name}"] = _summary(test, lambda text, backend=backend: backend.encode(text).ids)
    (FOLDER / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n", "utf-8")


def _summary(texts: list[str], encode: Callable[[str], list[int]]) -> dict[str, Any]:
    ids = [encode(text) for text in texts]
    return {"ids": ids[:SHOWN], "checksums": _checksums(ids)}


def _checksums(entries: list[Any]) -> str:
    """Four digits for each."""
    return "".join(f"{zlib.crc32(str(entry).encode()) % 2**16:04x}" for entry in entries)


def _train_sentencepiece(path: Path, corpus: list[str], settings: dict[str, Any]) -> Any:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the names stand in the file
        if settings.pop("rules", False):
            Path("rules.tsv").write_text(_RULES, "utf-8")
            settings["normalization_rule_tsv"] = "rules.tsv"
        usual = {
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "vocab_size": 1_201,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in corpus for line in text.split("\n")]),
            model_prefix="model",
            hard_vocab_limit=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentencepiece_length=12,
            character_coverage=0.98,
            minloglevel=2,
            num_threads=1,
            **usual | settings,
        )
        shutil.copy("model.model", path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _transformers_tokenizer(model: Path, is_legacy: bool) -> Any:
    """As transformers reads a folder with a `tokenizer.model`; of the class that follows what `legacy` says."""
    from transformers import AutoTokenizer

    settings: dict[str, Any] = {"legacy": is_legacy, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if not is_legacy:
        settings["tokenizer_class"] = "LlamaTokenizer"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, f"{folder}/tokenizer.model")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return AutoTokenizer.from_pretrained(folder)


def _train_byte_level(corpus: list[str]) -> tuple[list[str], list[str]]:
    """Merges across words, so that every cut matters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=811, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>", "</s>", "<|im_end|>"]
    )
    backend.train_from_iterator(corpus, trainer)
    described = json.loads(backend.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in described["merges"]]


def _byte_level(name: str, vocabulary: list[str], merges: list[str]) -> Any:
    """The tokenizer that transformers makes of a vocabulary for the models that have this pre-tokenizer."""
    from tokenizers import AddedToken
    from transformers import CohereTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    classes = {"gpt-2": GPT2Tokenizer, "qwen2": Qwen2Tokenizer, "qwen35": Qwen3_5Tokenizer, "mpt": GPTNeoXTokenizer}
    classes["command-r"] = CohereTokenizer
    ids, pairs = {token: index for index, token in enumerate(vocabulary)}, [tuple(pair.split(" ")) for pair in merges]
    if name in classes:
        backend = classes[name](vocab=ids, merges=pairs).backend_tokenizer
    else:
        facts = {"tokenizer_type": "gpt2", "pre_tokenizer_type": name, "tokens": vocabulary, "merges": merges}
        backend, _ = convert_gguf_tokenizer("llama", facts)
        # The models' own files say so, and transformers does not read it from a GGUF file.
        backend.model.ignore_merges = name in ("llama-bpe", "tekken")
    backend.post_processor = None
    special = [AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>", "<|im_end|>")]
    backend.add_tokens(special)
    # Some of the classes add tokens of their own, none of which is in the texts.
    assert [backend.token_to_id(token.content) for token in special] == [0, 1, 2]
    return backend


if __name__ == "__main__":
    main()
