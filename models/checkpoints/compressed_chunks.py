"""Checks how many bytes a compressed chunk decodes to, without decompressing it into memory.

A file of some kilobytes can decode to gigabytes, and a decompressor notices only after the fact. So the size is
computed before: a zstd frame states it block by block, and a zlib or gzip stream is decompressed piece by piece and
dropped.

zstd: RFC 8878 (Zstandard Compression and the 'application/zstd' Media Type). A compressed block does not state its
decoded size, only that this is at most 128 KiB; compressors also make smaller ones where the data changes. Hence the
tolerance of `check_decoded_bytes`.
"""

import zlib

_FRAME, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_BLOCK_BYTES = 2**17
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_RAW, _RUN, _COMPRESSED = 0, 1, 2  # types of blocks
_ROOM_FACTOR, _ROOM_BYTES = 4, 2**26
_PIECE_BYTES = 2**20
_ZLIB_WINDOWS = {"zlib": 15, "gzip": 31}


def check_decoded_bytes(compressor: str | None, content: memoryview, num_bytes: int) -> None:
    """Raises ValueError if these bytes do not decode to `num_bytes` bytes, or might decode to far more."""
    if compressor is None:
        if len(content) != num_bytes:
            raise ValueError(f"it has {len(content):,} bytes, expected {num_bytes:,}")
        return
    if len(content) > 2 * num_bytes + _PIECE_BYTES:
        raise ValueError(f"it has {len(content):,} compressed bytes, for {num_bytes:,}")
    if compressor == "zstd":
        stated, most = _zstd_bytes(content)
        if stated not in (None, num_bytes):
            raise ValueError(f"it decompresses to {stated:,} bytes, expected {num_bytes:,}")
        if not num_bytes <= most <= _ROOM_FACTOR * num_bytes + _ROOM_BYTES:
            raise ValueError(f"it decompresses to up to {most:,} bytes, expected {num_bytes:,}")
    else:
        _check_zlib(content, _ZLIB_WINDOWS[compressor], num_bytes)


def _check_zlib(content: memoryview, window: int, num_bytes: int) -> None:
    stream, total, rest = zlib.decompressobj(window), 0, content
    try:
        while not stream.eof and total <= num_bytes:
            piece = stream.decompress(rest, _PIECE_BYTES)
            if not piece and not stream.eof:
                break
            total, rest = total + len(piece), stream.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error
    if total != num_bytes or not stream.eof or stream.unused_data:
        more = "more than " if total > num_bytes else ""
        raise ValueError(f"it decompresses to {more}{min(total, num_bytes):,} bytes, expected {num_bytes:,}")


def _zstd_bytes(content: memoryview) -> tuple[int | None, int]:
    """The decoded bytes that a zstd stream's frames state (None: not all do), and the most that their blocks allow."""
    stated: int | None = 0
    most = place = 0
    while place < len(content):
        magic = _number(content, place, 4)
        if magic & ~0xF == _SKIPPABLE:
            place += 8 + _number(content, place + 4, 4)
            continue
        if magic != _FRAME:
            raise ValueError("it is no zstd stream")
        place, frame_stated, block_bytes, has_checksum = _frame_header(content, place + 4)
        stated = None if stated is None or frame_stated is None else stated + frame_stated
        is_last = False
        while not is_last:
            header = _number(content, place, 3)
            is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            if kind > _COMPRESSED or size > block_bytes:
                raise ValueError("it is no intact zstd stream")
            most += block_bytes if kind == _COMPRESSED else size
            place += 3 + (1 if kind == _RUN else size)
        place += 4 * has_checksum
    if place != len(content):
        raise ValueError(f"it is cut off: it has {len(content):,} bytes, expected {place:,}")
    return stated, most


def _frame_header(content: memoryview, place: int) -> tuple[int, int | None, int, bool]:
    """The blocks' offset, their decoded bytes in all if stated, the most per block, and whether a checksum follows."""
    descriptor = _number(content, place, 1)
    place += 1
    is_single, has_checksum, window = bool(descriptor & 32), bool(descriptor & 4), 0
    if not is_single:
        exponent, eighths = divmod(_number(content, place, 1), 8)
        window = (8 + eighths) << (7 + exponent)
        place += 1
    place += _DICTIONARY_ID_BYTES[descriptor & 3]
    size_bytes = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    stated = _number(content, place, size_bytes) + (256 if size_bytes == 2 else 0) if size_bytes else None
    return place + size_bytes, stated, min(window or stated or 0, _BLOCK_BYTES), has_checksum


def _number(content: memoryview, place: int, size: int) -> int:
    taken = content[place : place + size]
    if len(taken) < size:
        raise ValueError(f"it is cut off: it has {len(content):,} bytes")
    return int.from_bytes(taken, "little")
