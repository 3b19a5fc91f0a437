"""Many calls of different shapes and options in one process: compiled programs and memory level off."""

import json
import subprocess
import sys

import pytest

NUM_CALLS = 200

# In a process of its own, with the compiler flags of users.
SCRIPT = f"""
import gc, json, warnings
import jax, numpy as np
import decodax
from decodax.decoding import programs

warnings.simplefilter("ignore")
lm = decodax.load()
rng = np.random.default_rng(0)

def resident_bytes():
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024

def number_of_maps():
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)

for call in range({NUM_CALLS}):
    rows = [rng.integers(3, 512, rng.integers(2, 300)) for _ in range(rng.integers(1, 4))]
    options = {{"max_new_tokens": int(rng.integers(1, 40)), "strategy": (None, "prompt_lookup")[call % 2]}}
    drawn = {{"temperature": 0.8, "top_k": 20, "presence_penalty": 0.3, "stop": "return", "min_new_tokens": 1}}
    options |= {{name: value for name, value in drawn.items() if rng.random() < 0.25}}
    decodax.generate(lm, rows, **options)
    if call % 10 == 9:
        gc.collect()
        live = len(jax.devices()[0].client.live_executables())
        print(json.dumps([call + 1, programs.num_programs(), live, number_of_maps(), resident_bytes()]), flush=True)
"""


@pytest.mark.slow
def test_memory_and_programs_level_off():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print("calls, programs kept, programs alive, memory maps, resident bytes", *rows, sep="\n")
    assert len(rows) == NUM_CALLS // 10
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for column in (1, 2, 3, 4):  # the most of the second half is near that of the first, when all bounds were reached
        most = [max(row[column] for row in half) for half in (first, second)]
        assert most[1] <= 1.15 * most[0], f"column {column} grows: {most}"
