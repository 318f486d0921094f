#!/bin/sh
# Makes the environment of an image or of a cluster node. It is called from the repository's root:
#   infra/deploy/install/install.sh system               Debian's or Ubuntu's packages; needs root
#   infra/deploy/install/install.sh dependencies VENV    the interpreter and every package, but not this repository
#   infra/deploy/install/install.sh project VENV         this repository, after "dependencies"
#   infra/deploy/install/install.sh server VENV          only an MLflow server
#
# python-version names the interpreter, whichever the machine has, because a Ray node cannot join a cluster with
# another Python version, even another patch release. constraints.txt has the versions of the packages.
#   EXTRAS              extras of pyproject.toml, for example EXTRAS="s3 gs"
#   UV_TORCH_BACKEND    cpu: torch without CUDA
set -eu
UV_VERSION=0.13.9
step=${1:?usage: install.sh system|dependencies|project|server [VENV]}
here=$(dirname "$0")

system() {
  # g++: our kernels and those of torch.compile are built on the machine. wget: KubeRay's probes call it.
  # A machine that has just started may still be installing its own updates, so wait for the lock.
  apt-get -o DPkg::Lock::Timeout=300 update -qq
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends \
    ca-certificates g++ python3-venv wget
  rm -rf /var/lib/apt/lists/*
}

# Creates $venv with the interpreter of python-version, which is downloaded if the machine has another one.
environment() {
  python3 -m venv "$venv.uv"
  "$venv.uv/bin/pip" install --quiet "uv==$UV_VERSION"
  "$venv.uv/bin/uv" venv --quiet --allow-existing --python "$(cat "$here/python-version")" "$venv"
}

add() {
  "$venv.uv/bin/uv" pip install --quiet --python "$venv/bin/python" --constraints constraints.txt "$@"
}

dependencies() {
  environment
  add torch setuptools wheel
  extras=
  for extra in ${EXTRAS:-}; do extras="$extras --extra $extra"; done
  # DeepSpeed's build imports torch, so torch is installed first. $extras may be several words.
  # shellcheck disable=SC2086
  add --no-build-isolation-package deepspeed --requirements pyproject.toml $extras
}

project() {
  add --no-deps --no-build-isolation --reinstall .
}

server() {
  environment
  add mlflow boto3 psycopg2-binary
}

case $step in
  system) system ;;
  dependencies | project | server)
    venv=${2:?usage: install.sh $step VENV}
    exec 9>"$venv.lock" && flock 9 # hosts that share a home directory take turns
    "$step"
    ;;
  *) echo "error: install.sh: no step $step; it is system, dependencies, project or server" >&2; exit 2 ;;
esac
