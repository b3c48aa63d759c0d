#!/bin/bash
# Marathon on LEONARDO Booster: torchrun on each node starts a rank for each of the 4 A100.
#
#   slurm/leonardo.sh --account=EUHPC_XXX --nodes=16 experiment=eu24_8b          checks, says how to submit
#   sbatch --account=EUHPC_XXX --nodes=16 slurm/leonardo.sh experiment=eu24_8b   submits
#
# Options of sbatch come first, overrides of the configuration last. docs/clusters.md explains the rest.
#SBATCH --job-name=marathon
#SBATCH --partition=boost_usr_prod
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gres=gpu:4
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Why: nodes are shared unless --exclusive. --mem=0 is all of a node's. --requeue lets the job go on by itself
# where the site allows it. The log stands in the folder of submission, which exists.

cluster=leonardo
devices_per_node=4
cpu_bind=cores # with --ntasks-per-node=4 --cpus-per-task=8: one socket, so any eight cores of their own will do

# Slurm runs a copy of this file, so the checkout is found from the path that was submitted, else from the folder.
submitted=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's|^ *Command=\(.*\)/slurm/leonardo\.sh.*|\1|p')
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

# The quality of service has to follow the number of nodes, which a line of #SBATCH cannot know.
check_site() {
    local nodes=$1 qos=$2
    if [ "$nodes" -gt 256 ]; then
        case $qos in # a QOS of the project's own may allow it
        "" | normal | boost_qos_*)
            stop "--nodes=$nodes" "boost_usr_prod runs up to 256 nodes a job" \
                "fewer nodes, or --qos and --reservation from CINECA" ;;
        esac
    elif [ "$nodes" -gt 64 ]; then
        [[ $qos != "" && $qos != normal ]] || stop "--nodes=$nodes without a QOS" \
            "65 to 256 nodes need --qos=boost_qos_bprod" "add --qos=boost_qos_bprod"
    elif [ "$qos" = boost_qos_bprod ]; then
        stop "--nodes=$nodes --qos=boost_qos_bprod" "that QOS begins at 65 nodes" "leave --qos out"
    fi
}
front_door "$@"

set -a # what follows is exported; what you set yourself wins
: "${MARATHON_SCRATCH:=${SCRATCH:-/leonardo_scratch/large/userexternal/$USER}/marathon}" # files live 40 days there
: "${NCCL_SOCKET_IFNAME=ib0}"  # rendezvous over InfiniBand, not Ethernet
: "${GLOO_SOCKET_IFNAME=ib0}"  # the same
: "${NCCL_IB_TIMEOUT=22}"      # ports flap; 22 (17 s) is the largest value that NCCL documents
: "${NCCL_IB_RETRY_CNT=10}"    # the same
: "${OMP_NUM_THREADS=8}"       # 32 cores for 4 ranks
: "${PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True}" # fragmentation ends in "out of memory" with memory left
: "${CUDA_CACHE_PATH=/tmp/marathon-$SLURM_JOB_ID/cuda}" # compiles at first use, never on Lustre
set +a

[ -n "${MARATHON_CONTAINER:-}" ] || stop "no MARATHON_CONTAINER" \
    "LEONARDO has no public image that fits; a PyTorch or NeMo image of NVIDIA does" \
    "export MARATHON_CONTAINER=IMAGE.sif (docs/clusters.md), or MARATHON_CONTAINER=none for the python3 on PATH"
use_container singularity exec --nv -B /leonardo,/leonardo_work,/leonardo_scratch
run_stages "$@"
