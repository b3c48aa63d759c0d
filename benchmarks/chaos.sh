#!/bin/bash
# A cluster of small nodes for benchmarks/chaos.py: the job scripts' common part with one process a node.
#SBATCH --job-name=chaos
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

cluster=local
devices_per_node=1
cpu_bind=none # the nodes are one machine
source "$MARATHON_HOME/slurm/launch.sh"
front_door "$@"
use_container
run_stages "$@"
