"""An array's metadata gives the names of its chunks (`test_orbax_arrays.py` tests damaged metadata)."""

import math

import pytest

from decodax.models.checkpoints.zarr_metadata import read_v2


@pytest.mark.parametrize("separator", [".", "/"])
def test_names_of_chunks(separator):
    metadata = {"zarr_format": 2, "order": "C", "filters": None, "compressor": None, "fill_value": None}
    metadata |= {"dtype": "<f4", "dimension_separator": separator}
    form = read_v2(metadata | {"shape": [13, 5, 7], "chunks": [2, 5, 3]})
    assert form.grid == (7, 1, 3) and form.chunk_bytes == 120 and math.prod(form.grid) == 21
    for index in ((0, 0, 0), (6, 0, 2)):
        name = separator.join(map(str, index))
        assert form.chunk_name(index) == name and form.chunk_index(name) == index
    for name in ("0", "7.0.0", "0.1.0", "00.0.0", "-1.0.0", "0.0.0.0", ".zarray", "0.0.0.__lock", "٣.0.0"):
        assert form.chunk_index(name.replace(".", separator)) is None
    assert read_v2(metadata | {"shape": [], "chunks": []}).chunk_index("0") == ()
