"""The last token alone is proposed, and nothing may be accepted."""

import numpy as np

from decodax.decoding.drafters import NoDraft
from tests.speculation import PARAMS, start


def test_it_proposes_the_last_token_alone():
    drafter, state = NoDraft(), start()
    proposal, _ = drafter.propose(PARAMS, None, state)
    assert (drafter.num_nodes, drafter.max_depth, proposal.tree.num_nodes) == (1, 0, 1)
    np.testing.assert_array_equal(proposal.token, np.asarray(state.last_token())[:, None])
    assert not np.any(proposal.is_candidate) and int(proposal.num_draft_forwards) == 0
