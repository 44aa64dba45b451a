#!/bin/bash
# Install or upgrade blendmaskd as a systemd service of this host; --help explains. docs/systemd.md has the rest.
set -euo pipefail
umask 022

PREFIX=/opt/blendmaskd # the unit names these places, so they are not options
SETTINGS=/etc/blendmaskd/daemon.yaml
ASCEND_ENV=/etc/blendmaskd/ascend.env
MEMORY=$PREFIX/install.env # how it was installed, for an upgrade
UNITS=/etc/systemd/system
USER_NAME=blendmaskd
HTTP_USER=blendmaskd-http
SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<END
Usage: [PYTHON=python3.11] scripts/install_service.sh [OPTION]...

Installs blendmaskd as a systemd service, as root. Run it again to upgrade: settings are kept, the rest is replaced.
An upgrade that names neither PYTHON nor an environment (--environment, --system-site-packages, --constraints, --extras)
takes what was named before; --constraints constraints.txt goes back to the default.

  $PREFIX/venv        the program, with the packages that constraints.txt pins
  $PREFIX/configs     the networks' configurations; $PREFIX/weights: checkpoints
  $SETTINGS   the settings; written once, yours from then on
  $UNITS/blendmaskd.service and blendmaskd.service.d/ for drop-ins
  the system user and group $USER_NAME; members of the group may submit jobs
  $UNITS/blendmaskd-http.service and its user $HTTP_USER, where the environment has the extra http

Options:
  --devices LIST          devices of new settings, such as cpu:0,cpu:1 (default: those of configs/daemon.yaml)
  --weights FILE          copy this checkpoint (and a categories.json beside it), and name it in new settings
  --settings FILE         begin with a copy of this file instead of configs/daemon.yaml
  --constraints FILE      other pins than constraints.txt, such as the torch and torch_npu that your CANN needs
  --extras LIST           optional parts to install: npu (torch_npu), http (the HTTP front, blendmaskd-http.service)
  --system-site-packages  use what PYTHON has (torch, torch_npu, numpy), add only what is missing, and pin nothing;
                          PYTHON is that interpreter itself, not one of a virtual environment
  --environment DIR       run from this virtual or conda environment, which has blendmaskd and all that it needs;
                          nothing is installed into it
  --cann FILE             CANN's set_env.sh (default: looked for below /usr/local/Ascend)
  --now                   enable the service and start it, or start it anew
  --help

PYTHON is the interpreter to use, 3.11 or newer, where the service can read it: not below /root, /home or /tmp. pip's own
variables hold, such as PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS. Examples:

  scripts/install_service.sh --devices cpu:0,cpu:1 --weights R_50_1x.pth --now
  PYTHON=/usr/local/python3.11/bin/python3 scripts/install_service.sh --system-site-packages --weights R_50_1x.pth
END
}

say() { printf '%s\n' "$*"; }
note() { printf 'note: %s\n' "$*" >&2; }
fail() {
    printf 'install_service.sh: %s\n' "$*" >&2
    exit 1
}

parse() {
    devices='' weights='' first_settings=$SOURCE/configs/daemon.yaml constraints='' extras='' environment='' cann=''
    system_site='' now=''
    while [ $# -gt 0 ]; do
        case $1 in
            --devices | --weights | --settings | --constraints | --extras | --environment | --cann)
                [ $# -gt 1 ] || fail "$1 needs a value; see --help"
                take "$1" "$2"
                shift
                ;;
            --system-site-packages) system_site=--system-site-packages ;;
            --now) now=yes ;;
            -h | --help) usage && exit ;;
            *) fail "$1: unknown option; see --help" ;;
        esac
        shift
    done
    if [ -n "$environment" ] && [ -n "$system_site$constraints$extras" ]; then
        fail "--environment installs no packages: leave out --system-site-packages, --constraints and --extras"
    fi
}

take() {
    case $1 in
        --devices) devices=$2 ;;
        --weights) weights=$(file "$2") ;;
        --settings) first_settings=$(file "$2") ;;
        --constraints) constraints=$(file "$2") ;;
        --extras) extras=$2 ;;
        --environment) environment=$(realpath -e "$2") ;;
        --cann) cann=$(file "$2") ;;
    esac
}

file() {
    [ -f "$1" ] || fail "$1: no such file"
    realpath "$1"
}

# An upgrade must not bring another torch than the one that was chosen for this host's CANN.
recall() {
    if [ -z "${PYTHON:-}$environment$system_site$constraints$extras" ] && [ -r $MEMORY ]; then
        # shellcheck source=/dev/null
        . $MEMORY
        note "as it was installed before ($MEMORY): $(tr '\n' ' ' <$MEMORY)"
    fi
    PYTHON=${PYTHON:-python3}
    [ "$constraints" != "$SOURCE/constraints.txt" ] || constraints=''
}

remember() {
    if [ -n "$chosen" ]; then
        [ "$chosen" = $PREFIX/constraints.txt ] || install -m 0644 "$chosen" $PREFIX/constraints.txt
        chosen=$PREFIX/constraints.txt
    fi
    printf '%s=%q\n' PYTHON "$(command -v "$PYTHON")" environment "$environment" system_site "$system_site" \
        constraints "$chosen" extras "$extras" >$MEMORY
}

check_host() {
    [ "$(id -u)" = 0 ] || fail "run as root: it makes a user, and writes to /opt and /etc"
    local program
    for program in systemctl useradd runuser; do
        command -v "$program" >/dev/null || fail "$program is missing on this host"
    done
}

# The service runs as a user of its own, and sees nothing below /root, /home and /tmp.
check_python() {
    local python=$1 base
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python does not run, or is older than 3.11"
    for base in "$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')" "$environment"; do
        case $base/ in
            /root/* | /home/* | /run/* | /tmp/* | /var/tmp/*)
                fail "$python belongs to $base, which the service cannot read: choose another place, or PYTHON=..." ;;
        esac
    done
    if [ -n "$system_site" ] && "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        fail "$python is of a virtual environment, whose packages another does not see: take --environment"
    fi
}

make_user() {
    getent group $USER_NAME >/dev/null || groupadd --system $USER_NAME
    if ! getent passwd $USER_NAME >/dev/null; then
        useradd --system --gid $USER_NAME --home-dir /var/lib/$USER_NAME --no-create-home \
            --shell "$(command -v nologin || echo /bin/false)" --comment 'BlendMask daemon' $USER_NAME
    fi
    if getent group HwHiAiUser >/dev/null; then # of Ascend's device files
        usermod --append --groups HwHiAiUser $USER_NAME
    fi
}

make_environment() {
    mkdir -p $PREFIX
    if [ -n "$environment" ]; then
        check_python "$environment/bin/python"
        rm -rf "${PREFIX:?}/venv"
        ln -s "$environment" $PREFIX/venv
    else
        check_python "$PYTHON"
        [ ! -L $PREFIX/venv ] || rm $PREFIX/venv # of an earlier --environment, which is not ours to install into
        "$PYTHON" -m venv $system_site $PREFIX/venv
        install_packages
    fi
    runuser -u $USER_NAME -- $PREFIX/venv/bin/python -P -c 'import blendmaskd.shell.server, blendmaskd_workers.loop' ||
        fail "the user $USER_NAME cannot load blendmaskd from $PREFIX/venv"
}

# From a copy: a build leaves files beside its sources.
install_packages() {
    local sources arguments=()
    sources=$(mktemp -d)
    (cd "$SOURCE" && cp -R daemon workers setup.cfg pyproject.toml README.md LICENSE "$sources")
    if [ -z "$constraints$system_site" ]; then
        constraints=$SOURCE/constraints.txt
    fi
    [ -z "$constraints" ] || arguments=(--constraint "$constraints")
    $PREFIX/venv/bin/python -m pip install "${arguments[@]}" "${sources}[serve${extras:+,$extras}]" ||
        { rm -rf "$sources" && fail "pip could not install blendmaskd"; }
    rm -rf "$sources"
}

install_files() {
    mkdir -p $PREFIX/configs $PREFIX/docs $PREFIX/weights
    rm -rf "${PREFIX:?}/configs/BlendMask"
    cp -R "$SOURCE/configs/BlendMask" $PREFIX/configs/
    install -m 0644 "$SOURCE"/docs/*.md $PREFIX/docs/
    if [ -n "$weights" ]; then
        install -m 0644 "$weights" $PREFIX/weights/
        local beside
        beside=$(dirname "$weights")/categories.json
        [ ! -f "$beside" ] || install -m 0644 "$beside" $PREFIX/weights/
    fi
}

install_settings() {
    local wanted_weights=''
    [ -z "$weights" ] || wanted_weights=weights/$(basename "$weights")
    mkdir -p "$(dirname $SETTINGS)"
    if [ ! -e $SETTINGS ]; then
        install -m 0644 "$first_settings" $SETTINGS.new
        [ -z "$devices" ] || sed -i "s|^devices:.*|devices: [$devices]|" $SETTINGS.new
        [ -z "$weights" ] || sed -i -E "s|^  (# *)?weights:.*|  weights: $wanted_weights|" $SETTINGS.new
        setting $SETTINGS.new devices >/dev/null || { rm $SETTINGS.new && fail "the new settings do not hold"; }
        mv $SETTINGS.new $SETTINGS
    fi
    expect devices "${devices//,/ }"
    expect model.weights "$wanted_weights"
    if [ "$(setting $SETTINGS engine)" = native ] && [ "$(setting $SETTINGS model.weights)" = None ]; then
        note "$SETTINGS names no model.weights: workers cannot start without"
    fi
}

# Settings are the administrator's: where they differ from what was asked for, say so.
expect() {
    local is
    is=$(setting $SETTINGS "$1") || fail "$SETTINGS does not hold"
    [ -z "$2" ] || [ "$is" = "$2" ] || note "$SETTINGS has $1: $is, not $2; it is yours to edit"
}

setting() {
    $PREFIX/venv/bin/python -P - "$1" "$2" <<'END'
import functools
import sys

from blendmaskd import settings

try:
    value = functools.reduce(getattr, sys.argv[2].split("."), settings.load(sys.argv[1]))
except settings.SettingsError as error:
    sys.exit(str(error))
print(*value) if isinstance(value, list) else print(value)
END
}

# A unit cannot source CANN's set_env.sh: what it exports goes into a file that the unit reads.
install_ascend_environment() {
    local root=/usr/local/Ascend candidate
    for candidate in $root/ascend-toolkit/set_env.sh $root/cann/set_env.sh $root/nnae/set_env.sh $root/nnrt/set_env.sh; do
        [ -n "$cann" ] || [ ! -r "$candidate" ] || cann=$candidate
    done
    [ -n "$cann" ] || return 0
    {
        say "# What $cann exports; install_service.sh writes this file anew each time."
        env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/var/lib/$USER_NAME \
            bash -c ". '$cann' >/dev/null; env -0" |
            sed -z -E '/^[A-Za-z_][A-Za-z0-9_]*=/!d; /^(HOME|PWD|OLDPWD|SHLVL|_)=/d; /\n/d' |
            sed -z -E 's/(["\\$`])/\\\1/g; s/:$//; s/^([^=]*)=(.*)$/\1="\2"/' | tr '\0' '\n'
    } >$ASCEND_ENV
    say "CANN: $ASCEND_ENV from $cann"
}

install_units() {
    local drop_ins=$UNITS/blendmaskd.service.d
    install -m 0644 "$SOURCE/configs/blendmaskd.service" $UNITS/
    mkdir -p $drop_ins
    case $(setting $SETTINGS devices) in
        *cuda:*) install -m 0644 "$SOURCE/configs/blendmaskd-cuda.conf" $drop_ins/cuda.conf ;;
        *) rm -f $drop_ins/cuda.conf ;;
    esac
    install_http
    systemctl daemon-reload
}

# The HTTP front, where the environment has what it needs.
install_http() {
    if ! $PREFIX/venv/bin/python -P -c 'import blendmaskd.http.program' 2>/dev/null; then
        rm -f $UNITS/blendmaskd-http.service
        return 0
    fi
    if ! getent passwd $HTTP_USER >/dev/null; then
        useradd --system --gid $USER_NAME --home-dir / --no-create-home \
            --shell "$(command -v nologin || echo /bin/false)" --comment 'BlendMask over HTTP' $HTTP_USER
    fi
    install -m 0644 "$SOURCE/configs/blendmaskd-http.service" $UNITS/
}

finish() {
    say "installed: $PREFIX, $SETTINGS, $UNITS/blendmaskd.service"
    if [ -n "$now" ]; then
        say "starting; this lasts until the workers are warm"
        systemctl enable blendmaskd
        systemctl restart blendmaskd
        systemctl try-restart blendmaskd-http 2>/dev/null || true # if it runs
        say "running; to watch it: systemctl status blendmaskd"
    elif systemctl is-active --quiet blendmaskd; then
        say "the old version still runs; next: systemctl restart blendmaskd"
    else
        say "next: systemctl enable --now blendmaskd"
    fi
    [ ! -e $UNITS/blendmaskd-http.service ] || say "for HTTP on loopback: systemctl enable --now blendmaskd-http"
    say "to let someone submit jobs: usermod --append --groups $USER_NAME NAME"
}

main() {
    parse "$@"
    check_host
    recall
    local chosen=$constraints
    make_user
    make_environment
    install_files
    install_settings
    install_ascend_environment
    install_units
    remember
    finish
}

main "$@"
