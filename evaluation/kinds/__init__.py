"""Kinds of task: how examples of one form are encoded, trained on, decided and scored (see ``base``)."""
