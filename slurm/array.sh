# shellcheck shell=bash disable=SC2034,SC2154
# source slurm/array.sh PYTHON: what a job of an array needs before it does its share of preparing a corpus.
#
# datatrove's script sources it and calls launch_pickled_pipeline, which here runs in the image of MARATHON_CONTAINER,
# or without one with the PYTHON that submitted.

MARATHON_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/launch.sh
source "$MARATHON_HOME/slurm/launch.sh"
: "${MARATHON_CONTAINER:=none}" "${MARATHON_SCRATCH:=$HOME}"
[ "$MARATHON_CONTAINER" != none ] || : "${MARATHON_PYTHON:=$1}"
places=() # sources may stand on any file system of the site
for place in /pfs /scratch /project /projappl /flash /leonardo /leonardo_work /leonardo_scratch; do
    [ ! -d "$place" ] || places+=(-B "$place")
done
use_container singularity exec "${places[@]}"
export PYTHONPATH=$MARATHON_HOME PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1                      # the cores of a job
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # as data/engine.py: warm_up
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # compute nodes have no internet
say "job $SLURM_JOB_ID, task ${SLURM_ARRAY_TASK_ID:-0}, $(date -Is)"

launch_pickled_pipeline() { "${python[@]}" -m datatrove.tools.launch_pickled_pipeline "$1"; }
