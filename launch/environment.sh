# Sourced by the scripts beside it: `enter_environment EXTRAS [PACKAGE...]` puts a Python with this package,
# editable, and its extras first on PATH. It makes .venv where no virtual environment is active, and installs
# only if setup.py or pyproject.toml or what is asked for has changed since the last time.

enter_environment() {
  local extras="$1" stamp digest
  shift
  export PATH # bash has a default of its own, which in an empty environment Python would not see
  if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    export VIRTUAL_ENV="$PWD/.venv"
    if [[ ! -x "$VIRTUAL_ENV/bin/pip" ]]; then # what venv installs last
      local python="${PYTHON:-python3}"
      if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "kangaroo: $("$python" --version 2>&1) is too old: install Python 3.11 or newer, or name one in PYTHON" >&2
        return 2
      fi
      echo "Making the virtual environment $VIRTUAL_ENV"
      "$python" -m venv "$VIRTUAL_ENV"
    fi
  fi
  export PATH="$VIRTUAL_ENV/bin:$PATH"
  stamp="$VIRTUAL_ENV/.kangaroo-$extras"
  digest="$(cat setup.py pyproject.toml <(echo "$PWD" "$@") | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$digest" ]]; then
    echo "Installing kangaroo-jax[$extras]${*:+ $*} (minutes, the first time)"
    python -m pip install --quiet --disable-pip-version-check -e ".[$extras]" "$@"
    echo "$digest" >"$stamp"
  fi
}
