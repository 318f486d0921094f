"""Estimates cost and accuracy of a teacher pass from a sample of the text, before the pass runs."""
