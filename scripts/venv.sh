# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment in .venv, with the versions of constraints.txt.

venv_install() { # EXTRAS, such as serve or dev,ray
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv 2>/dev/null || {
      echo "cannot make a virtual environment with ${PYTHON:-python3}: Python 3.11 or later and its venv module are" \
        "needed (Debian: apt-get install python3-venv; or name another one: PYTHON=python3.12 $0)" >&2
      rm -rf .venv
      exit 1
    }
  fi
  # Installing again is needed only when what is to be installed has changed; each of these lines is there already.
  local versions
  versions=$(cat setup.cfg constraints.txt | sha256sum)
  if ! grep -qsxF "$1 $versions" .venv/installed; then
    echo "Installing into .venv (torch alone is 200 MB to download, once) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
    { grep -sF " $versions" .venv/installed || true; echo "$1 $versions"; } >.venv/installed.new
    mv .venv/installed.new .venv/installed
  fi
}
