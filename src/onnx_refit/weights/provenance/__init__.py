"""Where each weight of a model comes from in a checkpoint: expressions, and the exact search for them."""
