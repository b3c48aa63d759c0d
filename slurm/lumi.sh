#!/bin/bash
# Marathon on LUMI-G, a rank for each of the 8 GCDs of a node.
#
#   slurm/lumi.sh --account=project_46XXXXXXX --nodes=16 experiment=eu24_8b          checks, says how to submit
#   sbatch --account=project_46XXXXXXX --nodes=16 slurm/lumi.sh experiment=eu24_8b   submits
#
# Options of sbatch come first, overrides of the configuration last. docs/clusters.md explains the rest.
#SBATCH --job-name=marathon
#SBATCH --partition=standard-g
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=7
#SBATCH --gpus-per-node=8
#SBATCH --mem=480G
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Why: 7 cores, because the first of each CCD is the system's and a job that asks for 64 never runs. --gpus-per-node
# without --gpu-bind or --gpus-per-task, which would hide a rank's neighbours from RCCL. 480G keeps jobs off nodes
# with leaked memory. LUMI requeues after a node failure, and append keeps the log then. The log stands in the folder
# of submission, which exists: with a folder that does not, the job fails without a word.

cluster=lumi
devices_per_node=8
# GCD i sits beside CCD 6 7 2 3 0 1 4 5; the masks are the seven usable cores of each.
cpu_bind=mask_cpu:0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000

# Slurm runs a copy of this file, so the checkout is found from the path that was submitted, else from the folder.
submitted=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's|^ *Command=\(.*\)/slurm/lumi\.sh.*|\1|p')
for home in "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" "$submitted" "${SLURM_SUBMIT_DIR:-}"; do
    [ ! -f "$home/slurm/launch.sh" ] || break
done
: "${MARATHON_HOME:=$home}"
if [ ! -f "$MARATHON_HOME/slurm/launch.sh" ]; then
    echo "error: no checkout of Marathon in '$MARATHON_HOME'
  rule:   the job needs slurm/launch.sh and what it starts
  repair: export MARATHON_HOME=<the checkout>, then submit again" >&2
    exit 1
fi
export MARATHON_HOME USER="${USER:-$(id -un)}"
source "$MARATHON_HOME/slurm/launch.sh"
front_door "$@"

set -a # what follows is exported; what you set yourself wins
: "${MARATHON_SCRATCH:=/scratch/$SLURM_JOB_ACCOUNT/$USER/marathon}" # runs and corpora
: "${MARATHON_CONTAINER:=/appl/local/laifs/containers/lumi-multitorch-latest.sif}" # torch with the fabric's plugin
: "${NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3}" # RCCL else tries an interface that it has no access to
: "${NCCL_CROSS_NIC=1}"                       # all four NICs of a node
: "${FI_CXI_DEFAULT_CQ_SIZE=131072}"          # the default ends in "Cassini Event Queue overflow"
: "${FI_MR_CACHE_MONITOR=userfaultfd}"        # the default monitor can hang on freed memory
: "${HSA_FORCE_FINE_GRAIN_PCIE=1}"            # RCCL asks for it, for access between devices
: "${OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-7}}" # the cores of a rank
: "${MIOPEN_USER_DB_PATH=/tmp/marathon-$SLURM_JOB_ID/miopen}" # SQLite on Lustre: "database is locked"
: "${MIOPEN_CUSTOM_CACHE_DIR=$MIOPEN_USER_DB_PATH}"           # the same
: "${AITER_JIT_DIR=/tmp/marathon-$SLURM_JOB_ID/aiter}"        # compiles at first use, never on Lustre
set +a
# NCCL_NET_GDR_LEVEL stays unset: right on ROCm 6.4 and older, it hangs the first collective on ROCm 7.0.

use_container singularity run # run, not exec: the image has a start-up script
if [ "$MARATHON_CONTAINER" != none ]; then
    set +u # modules read variables that need not be there
    module purge
    module use /appl/local/laifs/modules
    module load lumi-aif-singularity-bindings # the host's fabric libraries and file systems, seen inside
    set -u
fi
run_stages "$@"
