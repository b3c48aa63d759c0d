#!/usr/bin/env bash
# Installs what tests/cluster/rig.py starts: Slurm with accounting, munge, a database. Debian 12, as root.
# Nothing is started or enabled, and a second call only looks.
set -euo pipefail

packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core)
programs=(slurmctld slurmd sbatch slurmdbd munged mariadbd)
# MASTER_ADDR is a node's name, so the names of the rig's nodes must lead somewhere: here, to this machine.
node_names="nid005001 nid005002 lrdn0001 lrdn0002"

complete() {
    command -v "${programs[@]}" >/dev/null && [ "$(command -v "${programs[@]}" | wc -l)" = "${#programs[@]}" ]
}

if [ "$(id -u)" != 0 ]; then
    echo "tests/cluster/install.sh installs packages: run it as root" >&2
    exit 1
fi
if ! complete; then
    export DEBIAN_FRONTEND=noninteractive
    export RUNLEVEL=1 # keeps the packages from starting their daemons
    log=$(mktemp)
    { apt-get update && apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${packages[@]}"; } \
        >"$log" 2>&1 || { tail -20 "$log" >&2; exit 1; }
    rm "$log"
fi
grep -q "^127.0.0.1 $node_names" /etc/hosts || echo "127.0.0.1 $node_names # Marathon's tests/cluster" >>/etc/hosts
echo "$(slurmctld -V) and $(mariadbd --version | grep -o '[0-9.]*-MariaDB' | head -n 1) are installed"
