"""The letters that name array axes, everywhere in decodax: in shapes, einsums and comments.

| letter | axis                            | letter | axis                                  |
|--------|---------------------------------|--------|---------------------------------------|
| B      | batch rows                      | F      | feed-forward width                    |
| T      | query tokens of one forward     | V      | vocabulary                            |
| S      | cached tokens (capacity)        | E      | experts                               |
| N      | query heads                     | X      | experts per token                     |
| K      | key-value heads                 | C      | draft tokens                          |
| G      | query heads per key-value head  | L      | layers                                |
| H      | head size                       | D      | model width                           |
| R      | rank of a latent                | W      | taps of a short convolution           |

`AXES` is what a weight's description may use, and what sharding rules map to mesh axes.
"""

AXES = frozenset("BTSNKGHDFVEXCLRW")
