"""How weights are laid out over a mesh of devices: logical axes to mesh axes, by one frozen set of rules."""
