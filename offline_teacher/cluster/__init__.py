"""Runs the pass on Ray: assigns work to workers, handles failures, and does the work of one worker."""
