"""Continues a file of prompts with one model over all devices of several hosts. Copy it and change it.

The same command runs in every process, one per host; process 0 writes. How the processes find each other:

    python -m decodax.scripts.generate_pod --distributed auto ...    # under srun, in a JobSet, on a TPU slice
    python -m decodax.scripts.generate_pod --distributed host0:8482 --num-processes 2 --process-id 0 ...    # by hand

`pods/slurm_gpu.sbatch` starts it on two hosts with eight GPUs each, `pods/jobset_tpu.yaml` on a TPU slice of four.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import decodax
from decodax.sharding import distributed


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.distributed is not None:
        # Before any other call of JAX: its devices are those of all processes from then on.
        distributed.start(
            options.distributed,
            num_processes=options.num_processes,
            process_id=options.process_id,
            timeout_seconds=options.join_timeout,
        )
    prompts = [line for line in options.prompts.read_text("utf-8").splitlines() if line]
    lm = decodax.load(options.model, mesh=options.mesh or f"tensor={jax.device_count()}")
    for begin in range(0, len(prompts), options.batch):
        # Every process must make the same calls; only the first one writes.
        batch = prompts[begin : begin + options.batch]
        out = decodax.generate(lm, batch, max_new_tokens=options.max_new_tokens, strategy=options.strategy)
        if distributed.is_first():
            with options.output.open("a" if begin else "w", encoding="utf-8") as file:
                for prompt, text, reason in zip(batch, out.text or (), out.finish_reasons, strict=True):
                    file.write(json.dumps({"prompt": prompt, "text": text, "finish_reason": reason}) + "\n")
            speed = f"{out.stats.tokens_per_second:.0f} tokens/s, compiling {out.stats.compile_seconds:.1f} s"
            print(f"{begin + len(batch)} of {len(prompts)} prompts; {speed}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a model folder or hub id; by default the small model inside decodax")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt per line")
    parser.add_argument("--output", type=Path, required=True, help="where process 0 writes lines of JSON")
    parser.add_argument("--mesh", help="devices, like tensor=8,data=2; by default tensor over all of them")
    parser.add_argument("--batch", type=int, default=8, help="prompts run together")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--strategy", help="how to decode: `decodax methods` lists the names")
    parser.add_argument("--distributed", metavar="auto|HOST:PORT", help="run over several processes")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--join-timeout", type=float, default=distributed.JOIN_TIMEOUT_SECONDS, metavar="SECONDS")
    return parser


if __name__ == "__main__":
    main()
