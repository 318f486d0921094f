"""Builds the report of an evaluation: report.json, tables, plots and the HTML page."""
