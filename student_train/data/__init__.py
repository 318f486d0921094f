"""Reads a store into the batches of one rank: the order of samples, prefetching and collation."""
