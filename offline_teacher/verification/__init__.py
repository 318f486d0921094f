"""Checks of a store by digests, by its own hidden states, and with the live teacher; repair; a view of a
sample."""
