"""Computes rejection rules for one row in NumPy float64 with loops, without JAX.

A chosen child is one drawn from a distribution that has all its probability on it; with that the three rules of trees
are one.
"""

import itertools

import numpy as np


def normalised(weight):
    return weight / weight.sum()


def ordered_children(q, count, kind):
    """All draws of `count` children from q, as (tokens, probability); fewer children where q has no more tokens.

    kind: "independent", "without replacement", or "chosen" for the most probable, with one outcome.
    """
    if kind == "chosen":
        return [(tuple(int(token) for token in np.argsort(-q, kind="stable")[:count]), 1.0)]
    ways = []
    count = min(count, int((q > 0).sum())) if kind == "without replacement" else count
    for tokens in itertools.product(np.flatnonzero(q > 0).tolist(), repeat=count):
        left, probability = q.copy(), 1.0
        for token in tokens:
            probability *= left[token] / left.sum()
            if kind == "without replacement":
                left[token] = 0.0
            if probability == 0:
                break
        if probability > 0:
            ways.append((tokens, probability))
    return ways


def walk(parent, token, is_candidate, p, q, uniform, kind):
    """Where the walk ends and the distribution of the token after it; p[C, V], q[C, V] and uniform[C] are per node.

    Also the smallest margin of its decisions, and the smallest sum that a distribution was divided by: rounding
    matters more where these are small.
    """
    node, margin, smallest = 0, np.inf, 1.0
    while True:
        wanted, drafted = p[node].copy(), q[node].copy()
        for child in range(1, len(parent)):
            if parent[child] != node or not is_candidate[child]:
                continue
            if kind == "chosen":
                drafted = np.eye(len(wanted))[token[child]]
            threshold = min(1.0, wanted[token[child]] / drafted[token[child]])
            margin = min(margin, abs(uniform[child] - threshold))
            if uniform[child] < threshold:
                node = child
                break
            wanted = np.maximum(wanted - drafted, 0)
            smallest = min(smallest, smallest * wanted.sum())
            wanted = normalised(wanted)
            if kind == "without replacement":
                drafted[token[child]] = 0.0
                drafted = normalised(drafted) if drafted.sum() else drafted
        else:
            return node, wanted, margin, smallest


def typical_node(parent, token, is_candidate, p, epsilon, delta):
    """The end of the longest path of typical tokens, the most probable of equally long ones; and the margin."""
    best, margin = (0, 0.0, 0), np.inf
    paths = {0: (0, 0.0)}
    for node in range(1, len(parent)):
        above = p[parent[node]]
        positive = above[above > 0]
        entropy = -(positive * np.log(positive)).sum()
        threshold = min(epsilon, delta * np.exp(-entropy))
        probability = above[token[node]]
        margin = min(margin, abs(probability - threshold))
        if parent[node] not in paths or not is_candidate[node] or not probability > threshold:
            continue
        depth, score = paths[parent[node]]
        paths[node] = (depth + 1, score + np.log(probability))
        best = max(best, (*paths[node], -node))
    return -best[2], margin
