"""Documents from text, JSON lines, Parquet and hub datasets, and the problems found in them."""
