"""What is done with a model of any family: it is loaded, cut below its top layers, replayed, and shrunk.

A teacher is cut below its top n layers (``store.replay_layers: n``). The teacher pass runs the lower part and
stores its output; training runs the frozen top on it.

Axes: B batch, L length, D hidden size, V vocabulary, n replayed layers. ``token_count`` is int [B], the
number of real tokens of each row, which come first. If it is None, or a CPU tensor that is L everywhere, no
row is padded and no attention mask is built. Building a mask never synchronises with the device. ``config``
is a teacher's configuration, as a transformers object or as the mapping in its ``config.json``.

Everything a user can put right is raised as `infra.errors.UserError`.
"""
