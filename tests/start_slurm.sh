#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests: start_slurm.sh start|stop FOLDER
# Needs root and Debian's slurmctld, slurmd, slurm-client and munge (22.05). Jobs are started without
# the variables of SLURM, so its configuration has to be where it is looked for, /etc/slurm.
set -euo pipefail
action=$1 folder=$2
if [ "$action" = stop ]; then
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
    [ "$(readlink /etc/slurm/slurm.conf)" = "$folder/slurm.conf" ] && rm /etc/slurm/slurm.conf
    exit 0
fi
if [ -e /etc/slurm/slurm.conf ]; then
    echo "this machine has a SLURM of its own" >&2
    exit 2
fi
mkdir -p "$folder"/{state,spool,log,munge}
chmod 755 "$folder"
host=$(hostname -s)
socket=$folder/munge/munge.socket
head -c 1024 /dev/urandom > "$folder/munge/munge.key"
chmod 600 "$folder/munge/munge.key"
munged --force --socket="$socket" --key-file="$folder/munge/munge.key" --num-threads=2 \
    --pid-file="$folder/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
cat > "$folder/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmctldPort=6817
SlurmdPort=6818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ReturnToService=2
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512)) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p /etc/slurm
ln -sf "$folder/slurm.conf" /etc/slurm/slurm.conf
slurmctld
slurmd
for _ in $(seq 60); do
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit 0
    sleep 0.5
done
echo "SLURM did not come up; see $folder/log" >&2
exit 1
