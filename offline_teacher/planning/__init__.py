"""What a teacher pass would cost and keep, measured on a few places of the text before it is paid for."""
