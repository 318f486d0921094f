"""The student: its shape, where its weights start, and the finished model directory."""
