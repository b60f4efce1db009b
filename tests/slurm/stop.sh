#!/usr/bin/env bash
# Ends what start.sh started in the folder given, by process id, jobs first.
state=$1
scancel --full --quiet --user=root 2> /dev/null
munged=$(cat "$state/munged" 2> /dev/null)
for file in "$state"/slurmd.cpu1.pid "$state"/slurmd.gpu1.pid "$state"/slurmctld.pid $munged; do
  [ -f "$file" ] || continue
  process=$(cat "$file")
  kill "$process" 2> /dev/null
  for _ in $(seq 100); do
    [ -d "/proc/$process" ] || break
    sleep 0.1
  done
done
rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf /dev/lpovod_gpu0 /dev/lpovod_gpu1
