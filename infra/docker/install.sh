#!/bin/sh
# What both images install, and any bare Debian or Ubuntu machine: as root, from the repository's root.
#   TORCH_OPTIONS   more options of pip for torch, for example another index
set -eu
apt-get update
# g++ and the headers: DeepSpeed and torch.compile build small extensions at the first start.
apt-get install -y --no-install-recommends g++ python3-dev python3-venv wget
rm -rf /var/lib/apt/lists/*
"${PYTHON:-python3}" -m venv /opt/venv
# Unquoted: several options.
# shellcheck disable=SC2086
/opt/venv/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_OPTIONS:-} torch
/opt/venv/bin/pip install --no-cache-dir -c constraints.txt setuptools wheel
/opt/venv/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[s3]'
