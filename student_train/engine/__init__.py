"""DeepSpeed behind one narrow interface, the schedule, and checkpoints."""
