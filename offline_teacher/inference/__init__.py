"""Runs batches of text through the teacher and makes the columns of a store."""
