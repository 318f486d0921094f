"""Work on Ray: assigning items to workers, handling their failures, and the work of one worker."""
