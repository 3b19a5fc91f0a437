"""Computes each logits processor for one row in NumPy float64, with sorting and loops, without JAX.

`probs` runs them in order and gives the probabilities that a token must be drawn with.
"""

import numpy as np


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def entropy(probability):
    positive = probability[probability > 0]
    return -(positive * np.log(positive)).sum()


def best_set(score, probability, target):
    """Tokens in order of decreasing score until they hold `target`; ties with the last one included."""
    order = sorted(range(len(score)), key=lambda token: -score[token])
    total = 0.0
    for token in order:
        total += probability[token]
        if total >= target:
            return score >= score[token]
    return np.ones(len(score), bool)


def repetition_penalty(logits, prompt, output, value):
    changed = logits.copy()
    for token in set(prompt) | set(output):
        changed[token] = logits[token] / value if logits[token] > 0 else logits[token] * value
    return changed


def presence_penalty(logits, prompt, output, value):
    return logits - value * np.array([token in output for token in range(len(logits))])


def frequency_penalty(logits, prompt, output, value):
    return logits - value * np.array([output.count(token) for token in range(len(logits))])


def logit_bias(logits, prompt, output, value):
    changed = logits.copy()
    for token, bias in value.items():
        changed[token] += bias
    return changed


def min_new_tokens(logits, prompt, output, value, end_token_ids):
    changed = logits.copy()
    if len(output) < value:
        changed[list(end_token_ids)] = -np.inf
    return changed


def temperature(logits, prompt, output, value):
    if value == 0:
        changed = np.full(len(logits), -np.inf)
        changed[np.argmax(logits)] = 0.0
        return changed
    return logits / value


def top_k(logits, prompt, output, value):
    if value < 1:
        return logits
    return np.where(best_set(logits, np.ones(len(logits)), min(value, len(logits))), logits, -np.inf)


def top_p(logits, prompt, output, value):
    return logits if value == 1 else np.where(best_set(logits, softmax(logits), value), logits, -np.inf)


def min_p(logits, prompt, output, value):
    probability = softmax(logits)
    return np.where(probability >= value * probability.max(), logits, -np.inf)


def typical_p(logits, prompt, output, value):
    if value == 1:
        return logits
    probability = softmax(logits)
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(probability) - entropy(probability))
    return np.where(best_set(-distance, probability, value), logits, -np.inf)


ORDER = (
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    logit_bias,
    min_new_tokens,
    temperature,
    top_k,
    top_p,
    min_p,
    typical_p,
)


def probs(logits, prompt, output, *, end_token_ids=(), **options):
    """Probability of each next token for one row: logits[V], prompt and output tokens as lists, options by name."""
    logits = np.asarray(logits, np.float64)
    for method in ORDER:
        if method.__name__ in options:
            extra = {"end_token_ids": end_token_ids} if method is min_new_tokens else {}
            logits = method(logits, prompt, output, options[method.__name__], **extra)
    assert set(options) <= {method.__name__ for method in ORDER}
    return softmax(logits)
