"""From a store to the batches of one rank: which samples, in which order, read ahead of the step."""
