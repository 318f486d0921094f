"""Kinds of tasks: how the examples of a kind are encoded, trained on, predicted and scored (see ``base``)."""
