"""Computes mixtures of experts in NumPy float64, one token and one expert at a time."""

import numpy as np


def activate(activation, gate, up):
    if isinstance(activation, str):
        assert activation == "silu"
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    return (up + 1) * gate / (1 + np.exp(-activation.alpha * gate))


def mixture(tokens, expert, gate, weights, activation="silu"):
    """The weighted sum of each token's experts; weights of the experts in their order."""
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    result = np.zeros(tokens.shape)
    for index, token in enumerate(np.asarray(tokens, np.float64)):
        for e, share in zip(expert[index], gate[index], strict=True):
            if e < 0:
                continue
            own = {name: weight[e] for name, weight in weights.items()}
            hidden = activate(
                activation,
                own["gate"] @ token + own.get("gate_bias", 0),
                own["up"] @ token + own.get("up_bias", 0),
            )
            result[index] += share * (own["down"] @ hidden + own.get("down_bias", 0))
    return result


def route(logits, per_token, *, score, renormalise, scale=1.0, selection_bias=0.0, groups=None, kept=None, by="max"):
    """The experts of each token, best first, and their gates."""
    if score == "softmax":
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    experts, gates = [], []
    for row in scores:
        wanted = row + selection_bias
        if groups is not None:
            members = np.arange(len(row)).reshape(groups, -1)
            value = [max(wanted[m]) if by == "max" else sum(sorted(wanted[m])[-2:]) for m in members]
            best = sorted(range(groups), key=lambda g: (-value[g], g))[:kept]
            allowed = {e for g in best for e in members[g]}
        else:
            allowed = set(range(len(row)))
        chosen = sorted(allowed, key=lambda e: (-wanted[e], e))[:per_token]
        share = row[chosen]
        experts.append(chosen)
        gates.append(scale * share / (share.sum() if renormalise else 1))
    return np.array(experts), np.array(gates)
