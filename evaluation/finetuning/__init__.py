"""Fine-tuning: from a model and a task to predictions, with labels and with a teacher's outputs."""
