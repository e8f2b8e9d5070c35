#!/usr/bin/env bash
# What a team's CI runs, whatever its forge: infra/ci/steps.sh check | test | versions RESOLUTION | images | compare
set -euo pipefail
cd "$(dirname "$0")/../.."

check() { # style, types, layers, secrets, known vulnerabilities
    make check
    make audit
}

tests() { # the fast ones; for the night: make test-slow and make test-long
    make test
}

versions() { # the fast tests without the lock: highest or lowest-direct of what pyproject.toml allows
    python3 -m venv .venv
    .venv/bin/pip install --quiet 'uv>=0.9'
    .venv/bin/uv pip install --quiet --python .venv/bin/python --resolution "${1:?highest or lowest-direct}" --editable '.[dev]'
    touch .venv/.ready
    make test
}

images() { # needs Docker; BASE with its digest is the team's to fill in
    for accelerator in cpu cuda; do
        docker build --file infra/docker/Dockerfile --build-arg "ACCELERATOR=$accelerator" \
            --build-arg "BASE=${BASE:?name the base image with its digest: python:3.12-slim-bookworm@sha256:…}" \
            --tag "${IMAGE:-darkroom}:${VERSION:-dev}-$accelerator" .
    done
}

compare() { # a small training under this params.yaml, and its figures beside the champion's, in comparison.md
    local name
    make install
    name=$(.venv/bin/python -c 'from pathlib import Path; from flows.config import load_params
print(load_params(Path("params.yaml"), []).training.dataset)')
    # On the data of the champion, so that it is the configuration that differs.
    .venv/bin/darkroom data checkout "$(.venv/bin/python infra/ci/compare.py data "${MODEL:-$name}")" --dataset "$name"
    .venv/bin/darkroom train --local --restart-if-different --set "training.minutes=${MINUTES:-10}"
    .venv/bin/darkroom evaluate --local --set "training.minutes=${MINUTES:-10}"
    .venv/bin/python infra/ci/compare.py figures "${MODEL:-$name}" "reports/$name" >comparison.md
}

case "${1:-}" in
check) check ;;
test) tests ;;
versions) versions "${2:-}" ;;
images) images ;;
compare) compare ;;
*)
    echo "usage: infra/ci/steps.sh check | test | versions RESOLUTION | images | compare" >&2
    exit 2
    ;;
esac
