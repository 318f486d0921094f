"""A batch of text through the teacher to the columns of a store."""
