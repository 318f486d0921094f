"""The page that runs exported models in a browser: its folder, its build, and what it is compared with."""
