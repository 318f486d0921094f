"""From a model and a task to predictions: fine-tuning runs, and what they learn from."""
