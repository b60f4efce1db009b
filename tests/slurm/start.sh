#!/usr/bin/env bash
# Starts a SLURM of two nodes on this machine, below the folder given. Needs root, slurm-wlm, munge.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
state=$1
host=$(hostname -s)
grep -qw "$host" /etc/hosts || echo "127.0.0.1 $host" >> /etc/hosts

# Job steps see no SLURM_CONF, so the configuration must stand at its usual place.
[ ! -e /etc/slurm/slurm.conf ] || grep -q '^ClusterName=lpovod$' /etc/slurm/slurm.conf \
  || { echo "/etc/slurm/slurm.conf belongs to another cluster" >&2; exit 1; }
install -d /etc/slurm
sed "s|@HOST@|$host|g; s|@STATE@|$state|g" "$here/slurm.conf" > /etc/slurm/slurm.conf
echo 'NodeName=gpu1 Name=gpu File=/dev/lpovod_gpu[0-1]' > /etc/slurm/gres.conf
for i in 0 1; do
  [ -c /dev/lpovod_gpu$i ] || mknod /dev/lpovod_gpu$i c 1 3  # /dev/null by another name
done

install -d -o slurm -g slurm "$state" "$state/slurmctld"
mkdir -p "$state/slurmd.cpu1" "$state/slurmd.gpu1"
if ! munge -n 2> /dev/null | unmunge > /dev/null 2>&1; then
  install -d -o munge -g munge -m 0755 /run/munge
  runuser -u munge -- /usr/sbin/munged --pid-file /run/munge/munged.pid
  echo /run/munge/munged.pid > "$state/munged"
fi
runuser -u slurm -- /usr/sbin/slurmctld
/usr/sbin/slurmd -N cpu1
/usr/sbin/slurmd -N gpu1
for _ in $(seq 150); do
  [ "$(sinfo -h -o %t | sort -u)" = idle ] && exit 0
  sleep 0.2
done
sinfo -N -l >&2
exit 1
