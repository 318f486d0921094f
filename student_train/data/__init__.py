"""From a store to the batches of one rank: which samples, in which order, read and collated ahead of the step."""
