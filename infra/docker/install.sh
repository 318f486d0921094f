#!/bin/sh
# What both images install, and any bare Debian or Ubuntu machine: as root, from the repository's root.
#   PYTHON          a Python 3.11, 3.12 or 3.13 with its headers; without it the system's own is installed
#   TORCH_OPTIONS   more options of pip for torch, for example another index
set -eu
# g++ and the headers: our C++ and torch.compile's are built at the first start.
# wget: KubeRay's probes call it.
packages="g++ wget"
[ -n "${PYTHON:-}" ] || packages="$packages python3-dev python3-venv"
apt-get update
# Unquoted, here and below: several words.
# shellcheck disable=SC2086
apt-get install -y --no-install-recommends $packages
rm -rf /var/lib/apt/lists/*
"${PYTHON:-python3}" -m venv /opt/venv
# shellcheck disable=SC2086
/opt/venv/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_OPTIONS:-} torch
/opt/venv/bin/pip install --no-cache-dir -c constraints.txt setuptools wheel
/opt/venv/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[s3]'
