"""The embedded demonstration: a generated language, a small teacher, and the three stages on them."""
