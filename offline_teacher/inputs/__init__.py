"""The teacher, tokenizer and text that a recipe names, and the teacher that a finished store holds."""
