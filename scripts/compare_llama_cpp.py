"""Compares decodax with llama.cpp on a GGUF file: the same prompt, greedy, until the first token that differs.

    pip install "gguf>=0.17" "llama-cpp-python>=0.3.9"
    python -m decodax.scripts.compare_llama_cpp MODEL.gguf "What is the capital of France?" [--float32]

llama.cpp rounds activations to 8 bits where weights are quantised, so its logits differ by what that rounding changes.
With --float32 it gets the same weights in float32, dequantised by the package `gguf` into a temporary file, and the
logits should agree to rounding. The prompt is taken as it is, without a chat template.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import decodax

TOKENS = 48


def as_float32(source: Path, target: Path) -> None:
    """Writes a file with the same key-values, and its tensors in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, numbers.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(path: Path, prompt: list[int]) -> Iterator[np.ndarray]:
    """The logits [V] after the prompt, then after each token with the largest one; the cache is float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=len(prompt) + TOKENS, logits_all=True, type_k=0, type_v=0, verbose=False
    )  # 0 is float32
    model.eval(prompt)
    while True:
        logits = np.array(model.scores[model.n_tokens - 1])
        yield logits
        model.eval([int(logits.argmax())])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--float32", action="store_true", help="give llama.cpp the weights in float32")
    options = parser.parse_args()
    lm = decodax.load(options.model, dtype="float32")
    assert lm.tokenizer is not None
    tokens = lm.tokenizer.encode(options.prompt)
    ours = [int(token) for token in decodax.generate(lm, [tokens], max_new_tokens=TOKENS).tokens[0]]
    logits = np.asarray(decodax.logits(lm, [[*tokens, *ours]]))[0, len(tokens) - 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if options.float32:
            path = Path(folder) / "float32.gguf"
            as_float32(options.model, path)
        for place, (token, theirs) in enumerate(zip(ours, llama_cpp_logits(path, tokens), strict=False)):
            difference = float(np.abs(theirs - logits[place]).max())
            if int(theirs.argmax()) != token:
                gap = float(logits[place, token] - logits[place, theirs.argmax()])
                print(
                    f"token {place}: {token} here, {int(theirs.argmax())} in llama.cpp; here {gap:.4f} apart, and "
                    f"logits differ by up to {difference:.4f}"
                )
                return
    print(f"all {len(ours)} tokens are the same; at the last, logits differ by up to {difference:.2e}")


if __name__ == "__main__":
    main()
