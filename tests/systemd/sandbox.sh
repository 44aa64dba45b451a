#!/bin/bash
# A real systemd as PID 1 of namespaces of its own, for tests on a machine whose PID 1 may be anything. As root:
#
#   sandbox.sh boot DIR [SOURCE:TARGET]...   run it in the foreground; DIR gets its pid; bind-mounts SOURCE at TARGET
#   sandbox.sh enter DIR COMMAND...          run a command inside
#   sandbox.sh remove DIR                    end it and everything in it
#
# It shares the machine's files, but what it writes to /etc, /opt, /var, /run, /tmp and /dev/shm is seen only inside
# and is gone afterwards. It has no network but a loopback, and ends with the process that started `boot`.
set -euo pipefail

boot() {
    local cgroups
    cgroups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    mkdir -p "$directory"
    echo "$cgroups/blendmaskd-test-$$" >"$directory/cgroup"
    mkdir "$(cat "$directory/cgroup")"
    echo $$ >"$(cat "$directory/cgroup")/cgroup.procs" # so that it is the root of the new cgroup namespace
    cd /
    exec setpriv --pdeathsig KILL unshare --fork --kill-child=KILL --pid --mount --uts --ipc --cgroup --net \
        /bin/bash "$self" inside "$directory" "$@" </dev/null
}

# Runs as PID 1 of the new namespaces, and becomes systemd.
inside() {
    local pid
    read -r pid _ </proc/self/stat # by the outer /proc, so the outer pid
    mount --make-rprivate /
    hold_sources "$@"
    mount -t proc proc /proc
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys # systemd would raise limits of the whole machine
    umount -R /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    own_files
    only_basic_units
    place_sources "$@"
    echo "$pid" >"$held/state/pid"
    umount "$held/state"
    hostname sandbox
    export container=sandbox
    exec /usr/lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
}

# Keep what will be covered by the mounts that follow within reach, below a folder that stays.
hold_sources() {
    held=/run/held
    mount -t tmpfs -o mode=755 tmpfs /mnt
    mkdir /mnt/held /mnt/held/state
    mount --bind "$directory" /mnt/held/state
    local number=0 pair
    for pair in "$@"; do
        number=$((number + 1))
        mkdir "/mnt/held/$number"
        mount --bind "${pair%%:*}" "/mnt/held/$number"
    done
    mount --no-mtab --move /mnt /run # no-mtab: its lock is below /run
}

place_sources() {
    local number=0 pair
    for pair in "$@"; do
        number=$((number + 1))
        mkdir -p "${pair#*:}"
        mount --move "$held/$number" "${pair#*:}"
    done
}

own_files() {
    local folder
    for folder in etc opt var; do
        mkdir -p "/run/overlay/$folder/upper" "/run/overlay/$folder/work"
        mount -t overlay overlay "/$folder" \
            -o "lowerdir=/$folder,upperdir=/run/overlay/$folder/upper,workdir=/run/overlay/$folder/work"
    done
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
}

# The machine's own services must not start a second time in here.
only_basic_units() {
    local library=/usr/lib/systemd/system unit folder
    mkdir -p /run/units/sysinit.target.wants
    for unit in sysinit basic shutdown sockets paths timers slices local-fs local-fs-pre swap network network-online \
        multi-user umount final poweroff reboot halt; do
        cp -L "$library/$unit.target" /run/units/
    done
    cp -L $library/systemd-journald.service $library/systemd-journald*.socket /run/units/
    ln -s ../systemd-journald.service /run/units/sysinit.target.wants/
    for folder in $library /etc/systemd/system /etc/init.d /usr/lib/systemd/system-generators \
        /etc/systemd/system-generators /usr/local/lib/systemd; do
        [ ! -d "$folder" ] || mount -t tmpfs -o mode=755 tmpfs "$folder"
    done
    cp -a /run/units/. $library/
}

enter() {
    exec nsenter --target "$(cat "$directory/pid")" --mount --pid --uts --ipc --net --cgroup "$@"
}

remove() {
    local cgroup pid
    cgroup=$(cat "$directory/cgroup")
    while read -r pid; do
        kill -KILL "$pid" 2>/dev/null || true
    done < <(find "$cgroup" -name cgroup.procs -exec cat {} +)
    for _ in $(seq 200); do
        find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
        [ -d "$cgroup" ] || return 0
        sleep 0.05 # the kernel still takes the processes down
    done
    echo "$cgroup: still in use" >&2
    return 1
}

self=$(realpath "$0")
verb=$1
directory=$(realpath -m "$2")
shift 2
"$verb" "$@"
