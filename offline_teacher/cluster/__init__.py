"""Work on Ray: who does what, who is to blame when it fails, and what one worker does."""
