"""Gives the option of every logits processor for three rows, each with another value."""

import numpy as np


def repetition_penalty():
    return [1.3, 0.5, 4.0]


def presence_penalty():
    return [0.5, -1.5, 2.0]


def frequency_penalty():
    return [0.25, 1.5, -2.0]


def logit_bias():
    return [{0: -1.5, 5: 3.0}, {2: -np.inf, 5: 3.0}, {11: 100.0, 4: -100.0}]


def min_new_tokens():
    return [4, 1, 7]


def temperature():
    return [0.7, 3.0, 0.1]


def top_k():
    return [1, 4, 12]


def top_p():
    return [0.9, 0.3, 0.999]


def min_p():
    return [0.1, 0.9, 0.02]


def typical_p():
    return [0.9, 0.2, 0.6]


def last_token_penalty():
    return [0.5, -1.5, 4.0]
