"""Runs in each of the two processes of test_two_processes.py: the same calls, with results as lines of JSON.

python -m tests.sharding.one_of_two PORT PROCESS FOLDER MESH CASE...
"""

import json
import os
import signal
import sys
from typing import Any

import jax
import numpy as np

import decodax
from decodax.sharding import distributed
from decodax.sharding.host import from_first, to_host

PROMPTS = ["def fib(n):\n    return", "import numpy"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafts": {"strategy": "prompt_lookup"},
    "draws": {"temperature": 0.9, "top_k": 50, "seed": [3, 5]},
    "stops": {"stop": "NEVER", "block_tokens": 5},
}
NEW_TOKENS = 11


def run(lm: decodax.LanguageModel, case: str) -> dict[str, Any]:
    """One generation as plain data."""
    pieces: list[tuple[int, str]] = []
    options = OPTIONS[case]
    if case == "stops":
        options = options | {"on_text": lambda row, piece: pieces.append((row, piece))}
    out = decodax.generate(lm, PROMPTS, max_new_tokens=NEW_TOKENS, **options)
    streamed = ["".join(piece for row, piece in pieces if row == place) for place in range(len(PROMPTS))]
    return {
        "tokens": [row.tolist() for row in out.tokens],
        "logprobs": [row.tolist() for row in out.logprobs],
        "reasons": out.finish_reasons,
        "text": out.text,
        "streamed": streamed if pieces else None,
        "accepted": out.stats.accepted_lengths,
    }


def differ(lm: decodax.LanguageModel, process: int) -> list[str]:
    """The errors of runs whose options differ between processes; every process must raise them."""
    errors = []
    for options in (
        {"prompts": PROMPTS[process]},
        {"max_new_tokens": 3 + process},
        {"seed": process},
        {"on_text": (lambda row, piece: None) if process else None},
        {"stop": ["a", "b"][process], "temperature": process / 2},
    ):
        try:
            decodax.generate(lm, options.pop("prompts", PROMPTS), **options)
        except ValueError as error:
            errors.append(str(error))
    return errors


def main(port: str, process: int, folder: str, mesh: str, cases: list[str]) -> None:
    distributed.start(f"127.0.0.1:{port}", num_processes=2, process_id=process, timeout_seconds=60)
    distributed.start(f"127.0.0.1:{port}", num_processes=2, process_id=process)  # a second call changes nothing
    lm = decodax.load(folder, mesh=mesh)
    for case in cases:
        if case == "differ":
            result: Any = differ(lm, process)
        elif case == "settle":
            result = from_first(lm.model.execution.mesh, [process + 0.1, -process])
        elif case == "logits":
            logits = decodax.logits(lm, np.arange(14).reshape(2, 7))
            result = to_host(logits).tolist()
        elif case == "dies" and process == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        elif case == "fails" and process == 1:
            raise ArithmeticError("planted")
        else:
            result = run(lm, case if case in OPTIONS else "plain")
        print("RESULT", json.dumps({"case": case, "devices": len(jax.devices()), "result": result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
