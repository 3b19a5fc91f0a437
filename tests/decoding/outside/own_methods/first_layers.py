"""A layer policy: after its first new tokens a row runs only the first layers."""

from dataclasses import dataclass

from decodax.decoding.early_exit import LayerPolicy
from decodax.decoding.early_exit.layer_stack import forward_stack


@dataclass(frozen=True)
class FirstLayers(LayerPolicy):
    """The forwards that predict a row's first `full_tokens` new tokens run all layers, later ones `num_layers`. Lossy.

    Prompts run all layers. A layer once left out never runs again in its row, so no query attends to a gap.
    """

    num_layers: int
    full_tokens: int

    def check(self, model, params):
        if not 0 < self.num_layers <= model.config.num_layers:
            raise ValueError(f"num_layers must be in 1..{model.config.num_layers}, got {self.num_layers}")

    def forward(self, model, params, state, proposal, position, capture):
        after_last_token = position - (state.length[:, None] - 1)
        num_written = state.history.num_new_tokens[:, None] + after_last_token
        runs_all = (num_written < self.full_tokens) & ~state.done[:, None]

        def active(index, hidden):
            return True if index < self.num_layers else runs_all

        return forward_stack(model, params, state, proposal, position, capture, active)
