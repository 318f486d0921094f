"""Documents out of text, JSON lines, Parquet and data sets of the hub, and what is wrong with them."""
