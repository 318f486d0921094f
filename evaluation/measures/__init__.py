"""Computes scores and their confidence intervals from predictions."""
