"""Estimates the cost and the accuracy of a teacher pass from a sample of the text, before the pass runs."""
