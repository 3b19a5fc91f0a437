"""Lists the pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`: where a text is cut before bytes are merged.

A file names what the model's `tokenizer.json` does; llama.cpp's `src/llama-vocab.cpp` has the names. The patterns here
are those of the models' own files, so ids are those the models were trained with.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedPreTokenizer:
    """How a text is cut, and what else the name implies.

    patterns: regular expressions, one after the other; each cuts what the earlier ones left into its matches and the
        text between them.
    nfc: characters are composed first (Unicode's normal form C).
    whole_words: a cut piece that is in the vocabulary is one token, whatever the merges say.
    add_bos: whether a text begins with the start token where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_APOSTROPHES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_BREAKS_AND_SPACES}"
_QWEN2 = rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_BREAKS_AND_SPACES}"
_QWEN35 = (
    rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BREAKS_AND_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SYMBOLS_AND_SLASHES}|{_BREAKS_AND_SPACES}"
_GPT_4O = (
    rf"{_CASED[0]}{_APOSTROPHES}?|{_CASED[1]}{_APOSTROPHES}?|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SLASHES}|{_BREAKS_AND_SPACES}"
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with upper and lower case in an older version of Unicode.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CHINESE,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)

_LLAMA3_CUTS = NamedPreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_GPT2_CUTS = NamedPreTokenizer((_GPT2,))
_DIGITS_APART = NamedPreTokenizer((_DIGIT, _GPT2))
_GPT_4O_CUTS = NamedPreTokenizer((_GPT_4O,))

PRE_TOKENIZERS = {
    "default": NamedPreTokenizer(_DEFAULT),
    "llama3": _LLAMA3_CUTS,
    "llama-v3": _LLAMA3_CUTS,
    "llama-bpe": _LLAMA3_CUTS,
    "falcon3": _LLAMA3_CUTS,
    "lfm2": _LLAMA3_CUTS,
    "dbrx": NamedPreTokenizer((_LLAMA3,)),
    "smaug-bpe": NamedPreTokenizer((_LLAMA3,)),
    "gpt-2": _GPT2_CUTS,
    "phi-2": _GPT2_CUTS,
    "olmo": NamedPreTokenizer((_GPT2,), nfc=True),
    "mpt": NamedPreTokenizer((_GPT2,), nfc=True),
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "codeshell": _DIGITS_APART,
    "command-r": NamedPreTokenizer((_DIGIT, _GPT2), nfc=True),
    "qwen2": NamedPreTokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": NamedPreTokenizer((_QWEN2,)),
    "qwen35": NamedPreTokenizer((_QWEN35,), nfc=True),
    "deepseek-llm": NamedPreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": NamedPreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3": NamedPreTokenizer(_DEEPSEEK_V3),
    "falcon": NamedPreTokenizer(_FALCON),
    "tekken": NamedPreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": _GPT_4O_CUTS,
    "llama4": _GPT_4O_CUTS,
}
