"""The demo: text in a generated language and a small teacher, on which the three stages run."""
