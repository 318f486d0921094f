"""The report: tables and plots."""
