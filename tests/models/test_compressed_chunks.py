"""The size of a compressed chunk is known before it is decompressed, for all that compressors write."""

import gzip
import struct
import zlib

import numpy as np
import pytest
import tensorstore

from decodax.models.checkpoints.compressed_chunks import check_decoded_bytes


def zstd_runs(num_bytes):
    """A zstd frame of zeros, 131,072 for each four bytes, without its decompressed size."""
    frame = bytearray(struct.pack("<I", 0xFD2FB528) + bytes([0, 0x58]))
    for start in range(0, num_bytes, 2**17):
        size = min(2**17, num_bytes - start)
        frame += (size << 3 | 1 << 1 | (start + size == num_bytes)).to_bytes(3, "little") + b"\0"
    return bytes(frame)


def zstd_blocks(count):
    """A zstd frame of so many compressed blocks, which do not state their decompressed size."""
    frame = bytearray(struct.pack("<I", 0xFD2FB528) + bytes([0, 0x58]))
    for block in range(count):
        frame += (2 << 3 | 2 << 1 | (block + 1 == count)).to_bytes(3, "little") + bytes(2)
    return bytes(frame)


def frame(content, *, stated):
    """A zstd frame with one raw block, with a stated decompressed size."""
    header = struct.pack("<I", 0xFD2FB528) + bytes([0x80 | 0x20]) + struct.pack("<I", stated)
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


@pytest.mark.parametrize(
    ("compressor", "content", "problem"),
    [
        (None, bytes(7), None),
        (None, bytes(6), "it has 6 bytes, expected 7"),
        ("zstd", frame(bytes(7), stated=7), None),
        ("zstd", frame(bytes(3), stated=3) + frame(bytes(4), stated=4), None),
        ("zstd", struct.pack("<II", 0x184D2A53, 5) + bytes(5) + frame(bytes(7), stated=7), None),
        ("zstd", zstd_runs(7), None),
        ("zstd", frame(bytes(7), stated=2**31), "it decompresses to 2,147,483,648 bytes, expected 7"),
        ("zstd", frame(bytes(6), stated=7), "it decompresses to up to 6 bytes, expected 7"),
        ("zstd", frame(bytes(7), stated=7)[:-1], "it is cut off"),
        ("zstd", frame(bytes(7), stated=7) + b"\0\0", "it is cut off"),
        ("zstd", b"\0" * 9, "it is no zstd stream"),
        ("zstd", b"", "it decompresses to 0 bytes"),
        ("zstd", zstd_runs(2**30), "it decompresses to up to 1,073,741,824 bytes"),
        ("zstd", zstd_blocks(512), None),  # at most 64 MiB, which is what small chunks may need
        ("zstd", zstd_blocks(513), "it decompresses to up to 67,239,936 bytes"),
        ("zstd", zstd_runs(7)[:6] + (2**17 + 1 << 3 | 3).to_bytes(3, "little") + bytes(1), "it is no intact zstd"),
        ("zstd", bytes(2**21), "it has 2,097,152 compressed bytes, for 7"),
        ("gzip", gzip.compress(bytes(7), mtime=0), None),
        ("zlib", zlib.compress(bytes(7)), None),
        ("gzip", gzip.compress(bytes(8), mtime=0), "it decompresses to more than 7 bytes"),
        ("gzip", gzip.compress(bytes(6), mtime=0), "it decompresses to 6 bytes, expected 7"),
        ("gzip", gzip.compress(bytes(7), mtime=0) * 2, "it decompresses to"),
        ("zlib", zlib.compress(bytes(7))[:-2], "it decompresses to"),
        ("zlib", gzip.compress(bytes(7), mtime=0), "it cannot be decompressed"),
    ],
)
def test_the_decompressed_size_of_a_chunk(compressor, content, problem):
    if problem is None:
        check_decoded_bytes(compressor, memoryview(content), 7)
    else:
        with pytest.raises(ValueError, match=problem):
            check_decoded_bytes(compressor, memoryview(content), 7)


@pytest.mark.parametrize("compressor", [{"id": "zstd", "level": 1}, {"id": "gzip"}, {"id": "zlib"}])
@pytest.mark.parametrize("kind", ["zeros", "random", "changing"])
def test_output_of_compressors_is_accepted(compressor, kind):
    """Of a size at which zstd makes several blocks, also small ones where the data changes."""
    random = np.random.default_rng(0).standard_normal((700, 701)).astype(np.float32)
    content = {"zeros": 0 * random, "random": random, "changing": np.where(np.arange(700)[:, None] % 5, 1, random)}[
        kind
    ]
    metadata = {"shape": [700, 701], "chunks": [700, 701], "dtype": "<f4", "compressor": compressor}
    spec = {"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": metadata}
    store = tensorstore.open(spec, create=True, open=True).result()
    store.write(content.astype(np.float32)).result()
    chunk = memoryview(store.kvstore.read("0.0").result().value)
    check_decoded_bytes(compressor["id"], chunk, content.size * 4)


@pytest.mark.parametrize("descriptor", [0, 1, 7, 8, 9, 13, 31, 48])
def test_a_block_is_as_large_as_the_window_of_its_frame_allows(descriptor):
    """RFC 8878, section 3.1.1.1.2: eighths of a power of two from 1,024 on; a block has at most 131,072 bytes."""
    exponent, mantissa = descriptor >> 3, descriptor & 7
    window = min((1 << (10 + exponent)) + (1 << (10 + exponent)) // 8 * mantissa, 2**17)

    def one_run(num_bytes):
        header = struct.pack("<I", 0xFD2FB528) + bytes([0, descriptor])
        return memoryview(header + (num_bytes << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0")

    check_decoded_bytes("zstd", one_run(window), window)
    with pytest.raises(ValueError, match="it is no intact zstd stream"):
        check_decoded_bytes("zstd", one_run(window + 1), window + 1)
