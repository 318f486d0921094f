"""Where tasks come from: the built-in table, and a user's own definitions; loading their examples."""
