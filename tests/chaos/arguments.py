"""The command-line parser of the programs in this folder; ``--help`` prints a module's docstring."""

from __future__ import annotations

import argparse


def described(text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
