"""The lock with hashes pins what the constraints pin, and tells nothing of the machine that wrote it."""

from __future__ import annotations

import re

from tests.conftest import ROOT

LOCK = (ROOT / "constraints.lock").read_text()


def test_it_pins_what_the_constraints_pin() -> None:
    locked = re.findall(r"^([\w.-]+==[^\s;]+)", LOCK, re.MULTILINE)
    constraints = (ROOT / "constraints.txt").read_text().split()
    assert sorted(locked) == sorted(pin.lower().replace("_", "-") for pin in constraints)


def test_every_pin_has_a_hash_and_no_address() -> None:
    pins = re.split(r"^(?=[\w.-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
