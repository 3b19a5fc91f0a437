"""Makes small tokenizers of every kind: bytes in the vocabulary, words with marks, whole words."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
_WORDS = ["▁", "▁a", "▁word", "s", "ing", "o", "<", "!", "한", "é"]


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """As Llama 1 and 2 and Mistral (Gemma: without `strip`): a mark for spaces, bytes for what the vocabulary lacks."""
    words = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256)), *_WORDS]
    backend = Tokenizer(models.BPE(_ids(words), [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    first = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]  # pyright: ignore[reportArgumentType]
    )
    return _with_special(backend)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: one token per byte, and some of two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("í", "ķ"), ("Ċ", "Ċ"), ("Ġ", "a"), ("ð", "Ł")]
    backend = Tokenizer(models.BPE(_ids([*SPECIAL, *alphabet, *(a + b for a, b in merges)]), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special(backend)


def metaspace() -> Tokenizer:
    """As T5: marks for spaces, the first of which is dropped."""
    backend = Tokenizer(models.WordLevel(_ids([*SPECIAL, *_WORDS]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _with_special(backend)


def word_pieces() -> Tokenizer:
    """As BERT: pieces joined by ##, spaces before punctuation cleaned up."""
    words = [*SPECIAL, "a", "word", "##s", "##ing", ".", "!", "n't", "'s", "do", "not"]
    backend = Tokenizer(models.WordPiece(_ids(words), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return _with_special(backend)


def suffixes() -> Tokenizer:
    """As the first GPT: a mark ends words, which is a space where another follows."""
    words = [*SPECIAL, "a</w>", "wor", "d</w>", "ing</w>", "é"]
    backend = Tokenizer(models.BPE(_ids(words), [], unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder()
    return _with_special(backend)


def whole_words() -> Tokenizer:
    """Words between spaces, and no decoder."""
    backend = Tokenizer(models.WordLevel(_ids([*SPECIAL, *(f"w{index}" for index in range(30))]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_special(backend)


KINDS = {
    "byte_fallback": byte_fallback,
    "byte_fallback_gemma": lambda: byte_fallback(strip=False),
    "byte_level": byte_level,
    "metaspace": metaspace,
    "word_pieces": word_pieces,
    "suffixes": suffixes,
    "whole_words": whole_words,
}


def _ids(words: list[str]) -> dict[str, int]:
    return {word: index for index, word in enumerate(words)}


def _with_special(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return backend
