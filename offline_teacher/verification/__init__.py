"""Is a store what it says it is: by its digests, its own hidden states, the live teacher; and for the eye."""
