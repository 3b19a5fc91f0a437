"""Makes texts of many scripts, with white space, control characters and look-alikes of special tokens, from a seed."""

# ruff: noqa: RUF001 (letters of other scripts that look like Latin ones)

import random

_LETTERS = {
    "Latin": ("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéèñüßøåçœÆŁğıŞ"),
    "Cyrillic": ("абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЕЁЇєґ"),
    "Greek": ("αβγδεζηθικλμνξοπρστυφχψωάέήίόύώΑΒΓΔ"),
    "Arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأؤإئىة\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652٠١٢٣"),
    "Hebrew": ("אבגדהוזחטיכלמנסעפצקרשת\u05b0\u05b1\u05b2\u05b3\u05b4\u05b5"),
    "Devanagari": (
        "अआइईउऊएऐओऔकखगघचछजझटठडढतथदधनपफबभमयरलवशषसह\u093e\u093f\u0940\u0941\u0942\u0943\u0947\u0948"
        "\u094b\u094c\u0902\u094d\u093c०१२"
    ),
    "Thai": (
        "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศษสหอฮะ\u0e31าำ\u0e34\u0e35\u0e36\u0e37\u0e38\u0e39เแโใไ\u0e47"
        "\u0e48\u0e49\u0e4a\u0e4b\u0e4c๑๒"
    ),
    "Chinese and Japanese": (
        "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能对着事其里所去行过家十用发天如然作方成者多日都三小军二无同么经法当起与好看学进"
        "种将还分此心前面又定见只主没公从知全ぁあいうえおかきくけこさしすせそたちつてとアイウエオカキクケコー\u3001\u3002\uff01\uff1f\uff08\uff09"
    ),
    "Hangul": ("가나다라마바사아자차카타파하한국어안녕하세요는을이를에서도로고ㄱㄴㄷㅏㅓ각갂"),
    "digits": ("0123456789"),
}
_PIECES = {
    "emoji": [
        "\U0001f600",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f468\U0001f3fd\u200d\U0001f4bb",
        "\U0001f1e9\U0001f1ea",
        "\u2764\ufe0f",
        "\U0001f3f3\ufe0f\u200d\U0001f308",
        "\u2728",
        "\U0001f937\U0001f3ff\u200d\u2640\ufe0f",
        "1\ufe0f\u20e3",
    ],
    "combining marks": [
        "e\u0301",
        "a\u0308",
        "o\u0302\u0301",
        "n\u0303",
        "c\u0327",
        "\u0301",
        "s\u0323\u0307",
        "ｆｕｌｌ",
        "ﬁ",
        "①",
        "½",
        "Å",
        "Å",
        "각",
    ],
    "symbols": [
        "!",
        '"',
        "#",
        "$",
        "%",
        "&",
        "'",
        "(",
        ")",
        "*",
        "+",
        ",",
        "-",
        ".",
        "/",
        ":",
        ";",
        "<",
        "=",
        ">",
        "?",
        "@",
        "[",
        "\\",
        "]",
        "^",
        "_",
        "`",
        "{",
        "|",
        "}",
        "~",
        "\xab",
        "\xbb",
        "\u201c",
        "\u201d",
        "\u2018",
        "\u2019",
        "\u2014",
        "\u2013",
        "\u2026",
        "\u20ac",
        "\xa3",
        "\xa5",
        "\xa7",
        "\xa9",
        "\xae",
        "\u2122",
        "\xb0",
        "\xb1",
        "\xd7",
        "\xf7",
        "\u2260",
        "\u2264",
        "\u221e",
        "\u221a",
        "\u2211",
        "\u222b",
    ],
    "white space": [
        " ",
        "  ",
        "   ",
        "    ",
        "        ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\r\n",
        "\n \n",
        "\xa0",
        "\u3000",
        "\u2003",
        "\u2009",
        "\u200b",
        "\u2028",
        "\x0b",
        "\x0c",
        "\x85",
    ],
    "control characters": [
        "\x00",
        "\x01",
        "\x07",
        "\x08",
        "\x1b",
        "\x7f",
        "\u200e",
        "\u200f",
        "\ufeff",
        "\ufffd",
        "\u2060",
        "\xad",
        "\U000e0041",
        "\ue000",
        "\U0001f9ff",
        "\U0010ffff",
    ],
    "code": [
        "def f(x):\n    return x + 1\n",
        "for (int i=0;i<n;i++){\n\tx[i] += 2;\n}",
        "#include <stdio.h>",
        "https://a.b/c?d=e&f=%20",
        "x = {'a': [1, 2.5e-3]}",
        "</div>",
        "SELECT * FROM t WHERE a='b';",
        "if x != y:\r\n\tpass",
        "\\frac{a}{b}",
        "don't I'LL we've It'S you're",
    ],
    "special tokens' look-alikes": [
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<|end|>",
        "[INST]",
        "[/INST]",
        "<0x41>",
        "<0x0A>",
        "<bos>",
        "\u2581",
        "\u2581\u2581",
        "\u2581a",
        "<|eot_id|>",
        "[TOOL_CALLS]",
        "<think>",
        "</think>",
        "Ġ",
        "Ċ",
    ],
    "words": [
        "hello",
        "world",
        "the",
        "and",
        "of",
        "New York",
        "København",
        "straße",
        "naïve",
        "Москва",
        "Ελλάδα",
        "12345",
        "3.14159",
        "2024-01-01",
        "1,000,000",
        "CamelCaseWord",
        "snake_case_word",
        "ALLCAPS",
        "tion",
        "ing",
        "日本語",
        "中国",
        "한국어",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "שלום",
        "السلام",
    ],
}
LOOK_ALIKES = "special tokens' look-alikes"


def texts(number: int = 1_000, seed: int = 7, *, look_alikes: bool = True) -> list[str]:
    """As many texts, each with letters and pieces of one kind or of several.

    look_alikes: put texts of special tokens among them.
    """
    draw = random.Random(seed)
    kinds = [kind for kind in (*_LETTERS, *_PIECES) if look_alikes or kind != LOOK_ALIKES]
    found = []
    for index in range(number):
        chosen = [draw.choice(kinds)] if index % 5 == 0 else draw.sample(kinds, draw.randint(2, 5))
        parts = []
        for _ in range(draw.randint(1, 14)):
            kind = draw.choice(chosen)
            letters = _LETTERS.get(kind)
            parts.append(
                draw.choice(_PIECES[kind])
                if letters is None
                else "".join(draw.choice(letters) for _ in range(draw.randint(1, 9)))
            )
            parts.append(" " * (draw.random() < 0.35))
        found.append("".join(parts))
    return found
