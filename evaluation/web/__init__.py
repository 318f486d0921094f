"""Writes the page that runs exported models in a browser: its build, its folder, its expected outputs."""
