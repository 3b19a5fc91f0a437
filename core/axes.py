"""Declares the logical axes: the letters that name array axes in shapes, einsums and comments everywhere in decodax.

| logical axis | axis                            | logical axis | axis                                  |
|--------|---------------------------------|--------|---------------------------------------|
| B      | rows of a batch                 | F      | feed-forward width                    |
| T      | query tokens of one forward     | V      | vocabulary                            |
| S      | cached tokens (capacity)        | E      | experts                               |
| N      | query heads                     | X      | experts per token                     |
| K      | key-value heads                 | C      | draft tokens                          |
| G      | query heads per key-value head  | L      | layers                                |
| H      | head size                       | D      | model width                           |
| R      | rank of a latent                | W      | taps of a short convolution           |

Weight descriptions use only letters of `AXES`; sharding rules map them to mesh axes.
"""

AXES = frozenset("BTSNKGHDFVEXCLRW")
