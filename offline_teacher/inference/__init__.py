"""Runs batches of text through the teacher and computes the columns of a store."""
