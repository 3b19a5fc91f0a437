"""`decodax perplexity` measures how well a model predicts a text."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

import decodax
from decodax.cli import session
from decodax.cli.prompts import read_text
from decodax.decoding import scoring
from decodax.decoding.continuations import encode_text


def perplexity(
    text: Annotated[str, typer.Option(metavar="FILE", help="The text, in UTF-8; - is stdin.")],
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    mesh: session.MeshName = None,
    adapter: session.Adapters = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens of a window. Default: the model's context, at most {scoring.MOST_CONTEXT_TOKENS:,}.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens from one window to the next, less than the context; with 1, each token is scored after as "
            "many others as fit. Default: half the context.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows that run at a time.")] = 8,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Measure how well a model predicts a text: its perplexity.

    The text is scored in windows that overlap, and each token once. The first one is not, unless the tokenizer puts a
    start token before it.

    Example: decodax perplexity --model ./my-model --text notes.txt --stride 256
    """
    with session.reported_errors(debug):
        given = read_text(text, "a text to score")
        lm = decodax.load(model, dtype=dtype, mesh=mesh, adapter=adapter)
        try:
            context, stride = scoring.window_sizes(lm, context, stride)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        tokens = encode_text(lm, "the text", given)
        with session.progress_of("scoring", len(tokens)) as show:
            found = scoring.perplexity(lm, tokens, context, stride, batch_size=batch, on_tokens=show)
        if as_json:
            numbers = asdict(found) | {"perplexity": found.perplexity}
            print(json.dumps(numbers | {"model": session.describe(lm), "versions": session.versions()}))
        else:
            print(f"tokens                   {found.num_tokens}")
            print(f"negative log-likelihood  {found.negative_log_likelihood:.6f} nats per token")
            print(f"perplexity               {found.perplexity:.4f}")
