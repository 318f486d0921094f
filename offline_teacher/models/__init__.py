"""Loads models of any family, splits them below their top layers, replays these, and derives students.

A teacher is split below its top n layers (``store.replay_layers: n``). The teacher pass runs the lower part
and stores its output; training runs the frozen top layers on the stored output.

Axes: B batch, L length, D hidden size, V vocabulary, n replayed layers. ``token_count`` is int [B], the
number of tokens at the start of each row that are not padding. If it is None, or a CPU tensor whose values
are all L, no row is padded and no attention mask is built. Building a mask never synchronises with the
device. ``config`` is a teacher's configuration: a transformers object or the mapping in its ``config.json``.
"""
