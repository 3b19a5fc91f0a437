"""Builds a tokenizer of the `tokenizers` library that encodes as sentencepiece does.

A control piece in a text (`<s>`, `[INST]`) is that piece, as chat templates need it; sentencepiece itself would spell
it out. Three rare differences stay, which every `tokenizer.json` made of such a vocabulary has: of two places where the
same pair can be merged (BPE), or of two cuts of the same score (unigram), another may be chosen; and the library's
`Precompiled` drops a combining mark after a character that it replaces (vocabularies with a charsmap, as T5's).
"""

import re
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from decodax.models.tokenizers.sentencepiece_file import Algorithm, Piece, PieceKind, SentencepieceModel
from decodax.models.tokenizers.vocabulary import merges_by_rank, refuse_repeated

SPACE = "\u2581"  # how pieces write a space
_NEVER = -1e9  # the score of pieces that no text is cut into (unigram)


def build_backend(model: SentencepieceModel, *, prefix_every_chunk: bool = True) -> tokenizers.Tokenizer:
    """A tokenizer of the library with this vocabulary; it adds no start token.

    model: the vocabulary.
    prefix_every_chunk: put the space of `add_dummy_prefix` before each text between special tokens, as sentencepiece
        does if it is given these texts one by one; otherwise before the first, if it does not begin with one (the
        `"legacy": false` of transformers).
    Raises ValueError for a vocabulary in which two pieces have the same text, or that has no unknown piece.
    """
    refuse_repeated([piece.text for piece in model.pieces])
    backend = tokenizers.Tokenizer(_unigram(model) if model.algorithm is Algorithm.UNIGRAM else _bpe(model))
    _add_normalisation(backend, model, prefix_every_chunk=prefix_every_chunk)
    backend.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=True)
            for piece in model.pieces
            if piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
        ]
    )
    return backend


def _unknown(model: SentencepieceModel) -> tuple[int, Piece]:
    found = [(index, piece) for index, piece in enumerate(model.pieces) if piece.kind is PieceKind.UNKNOWN]
    if len(found) != 1:
        raise ValueError(f"the vocabulary must have one unknown piece, got {len(found)}")
    return found[0]


def _unigram(model: SentencepieceModel) -> models.Unigram:
    own_score = {PieceKind.NORMAL: None, PieceKind.USER_DEFINED: 0.0}
    scores = [(piece.text, piece.score, own_score.get(piece.kind, _NEVER)) for piece in model.pieces]
    vocabulary = [(text, score if own is None else own) for text, score, own in scores]
    return models.Unigram(vocabulary, _unknown(model)[0], model.byte_fallback)


def _bpe(model: SentencepieceModel) -> models.BPE:
    normal = [(index, piece) for index, piece in enumerate(model.pieces) if piece.kind is PieceKind.NORMAL]
    ranked = [piece.text for index, piece in sorted(normal, key=lambda entry: (-entry[1].score, entry[0]))]
    return models.BPE(
        {piece.text: index for index, piece in enumerate(model.pieces)},
        merges_by_rank(ranked),
        unk_token=_unknown(model)[1].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # User-defined pieces are cut out of the text and looked up whole: no merge makes them.
        ignore_merges=any(piece.kind is PieceKind.USER_DEFINED for piece in model.pieces),
    )


def _add_normalisation(backend: tokenizers.Tokenizer, model: SentencepieceModel, *, prefix_every_chunk: bool) -> None:
    """Sets the normaliser, the pre-tokenizer and the decoder, in sentencepiece's order.

    backend: the tokenizer to set them in.
    model: the rules.
    prefix_every_chunk: as for `build_backend`.
    """
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix and prefix_every_chunk:
        steps.append(normalizers.Prepend(SPACE if model.escape_whitespaces else " "))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    cuts: list[Any] = []
    if model.add_dummy_prefix and not prefix_every_chunk:
        cuts.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    user_defined = [piece.text for piece in model.pieces if piece.kind is PieceKind.USER_DEFINED]
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    ends = [decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else [])]
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if model.byte_fallback else []), *ends]
    )
