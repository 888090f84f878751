#!/usr/bin/env bash
# Makes .venv in the repository and installs iomm into it with what the tests need. A second call is instant: the environment
# is stamped with a checksum of pyproject.toml and setup.py.
#
#   tools/bootstrap.sh                  find a Python >= 3.12, make .venv, install
#   PYTHON=/path/python tools/bootstrap.sh   use this one
#   tools/bootstrap.sh --find           only print the Python that would be used
#
# IOMM_PYTHON_ROOTS: folders holding Python installations (ROOT/bin/python3 or ROOT/*/bin/python3) to look through after PATH.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/.iomm-stamp"
roots=${IOMM_PYTHON_ROOTS-"${HOME:-}/.pyenv/versions ${HOME:-}/.local/share/uv/python ${CONDA_PREFIX:-} ${HOME:-}/miniconda3
    ${HOME:-}/miniforge3 ${HOME:-}/anaconda3 /opt /opt/conda /usr/local"}
seen=""

say() { printf '%s\n' "$*" >&2; }
fail() { printf 'bootstrap: %s\n' "$*" >&2; exit 1; }

# Prints "VERSION EXECUTABLE" when $1 runs at all and can make environments; a pyenv shim without a version behind it does not.
describe() {
    "$1" -c 'import sys, venv, ensurepip; print("%d.%d.%d" % sys.version_info[:3], sys.executable)' 2>/dev/null
}

# Is version $1 new enough?
new_enough() {
    local major=${1%%.*} rest=${1#*.}
    [ "$major" -gt 3 ] || { [ "$major" -eq 3 ] && [ "${rest%%.*}" -ge 12 ]; }
}

# 3.12 first: it is the version the tests run on.
candidates() {
    local name folder
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name" 2>/dev/null || true
    done
    for folder in $roots; do
        for name in "$folder"/bin/python3 "$folder"/3.1[2-9]*/bin/python3 "$folder"/*/bin/python3; do
            if [ -x "$name" ]; then printf '%s\n' "$name"; fi
        done
    done
    if command -v uv >/dev/null 2>&1; then uv python find '>=3.12' 2>/dev/null || true; fi
}

find_python() {
    local found candidate
    if [ -n "${PYTHON:-}" ]; then
        found=$(describe "$PYTHON") || fail "PYTHON=$PYTHON does not run, or lacks the modules venv and ensurepip." \
            "Name a complete Python >= 3.12."
        new_enough "${found%% *}" || fail "PYTHON=$PYTHON is Python ${found%% *}, but iomm needs 3.12 or newer." \
            "Name a newer one, or leave PYTHON unset to have one looked for."
        printf '%s\n' "${found#* }"
        return
    fi
    while IFS= read -r candidate; do
        found=$(describe "$candidate") || continue
        if new_enough "${found%% *}"; then
            printf '%s\n' "${found#* }"
            return
        fi
        case "$seen" in *"${found#* } "*) ;; *) seen="$seen${found#* } (${found%% *}) " ;; esac
    done < <(candidates)
    fail "no Python >= 3.12 with venv was found on PATH, under pyenv, conda, uv or /opt. Seen: ${seen:-none}." \
        "Install one (for example 'apt-get install python3.12 python3.12-venv', 'pyenv install 3.12', 'uv python install 3.12'" \
        "or 'conda create -n py312 python=3.12'), or name one: PYTHON=/path/to/python3.12 make setup"
}

checksum() { cat "$root/pyproject.toml" "$root/setup.py" | cksum; }

main() {
    local python version free_kib
    if [ "${1:-}" = "--find" ]; then
        find_python
        return
    fi
    [ $# -eq 0 ] || fail "unknown argument '$1'. Run it without arguments, or with --find."
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(checksum)" ]; then return; fi

    if [ ! -e "$venv" ]; then
        python=$(find_python)
        say "[1/2] making .venv with $python (seconds)"
        "$python" -m venv "$venv" || { rm -rf "$venv"; fail "$python could not make $venv. Name another: PYTHON=..."; }
    fi
    version=$(describe "$venv/bin/python") || fail "$venv does not hold a working Python. Remove that folder and run this again."
    new_enough "${version%% *}" || fail "$venv holds Python ${version%% *}, but iomm needs 3.12 or newer." \
        "Remove that folder and run this again."

    free_kib=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
    if [ "$free_kib" -lt 8000000 ]; then
        say "bootstrap: only $((free_kib / 1048576)) GiB free here; the CUDA build of torch and its libraries take about 6 GB."
    fi
    say "[2/2] installing iomm with its test tools (about 3 minutes and 6 GB of disk on a first call; torch is most of it)"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable "$root[test]" ||
        fail "the installation failed; pip's message is above. Free disk or set pip's index as your site needs, then run this again:" \
            "it goes on where it stopped."
    checksum >"$stamp"
    say "ready: $venv/bin/iomm --help"
}

main "$@"
