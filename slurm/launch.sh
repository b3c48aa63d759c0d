# shellcheck shell=bash disable=SC2154,SC2016
# What the clusters share: the front door, the checks, the stages of a job; restart.sh has what follows when one ends.
#
# A cluster's script sets cluster, devices_per_node and cpu_bind, sources this file, may define check_site, calls
# `front_door`, sets its environment, calls `use_container` and `run_stages`. The number of tasks a node decides
# how ranks start: as many as devices, and each task is a rank; one, and torchrun starts the ranks of its node.

set -euo pipefail
# shellcheck source=slurm/restart.sh
source "$MARATHON_HOME/slurm/restart.sh"

# What was found, the rule it breaks, the repair: the form of every message that a user is meant to read.
stop() {
    printf 'error: %s\n  rule:   %s\n  repair: %s\n' "$@" >&2
    exit 1
}

say() { printf '== marathon: %s\n' "$*"; }

check_site() { :; } # check_site NODES QOS: a cluster's own rules

# --- before the job -----------------------------------------------------------------------------------------

# Outside a job, explains how to submit after asking Slurm whether it would accept the job; inside, checks.
front_door() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        read_facts
        end_if_predecessor_was_cancelled
        check_job "$@"
        return
    fi
    local script="$MARATHON_HOME/slurm/$cluster.sh" options=() answer
    while [ $# -gt 0 ] && { [[ $1 == -* ]] || [[ $1 != *=* ]]; }; do
        options+=("$1")
        shift
    done
    check_experiment "$@"
    check_account "${options[@]}"
    command -v sbatch >/dev/null || stop "no sbatch here" "jobs are submitted on a login node of $cluster" \
        "log in there, or use \`marathon run\` on this machine"
    check_site "$(asked_for '-N|--nodes' 1 "${options[@]}")" "$(asked_for '-q|--qos' '' "${options[@]}")"
    if ! answer=$(sbatch --test-only "${options[@]}" "$script" "$@" 2>&1); then
        explain_refusal "$answer"
    fi
    printf 'Slurm would accept it (%s). Submit it with\n\n  sbatch' "${answer#sbatch: }"
    printf ' %q' "${options[@]}" "$script" "$@"
    printf '\n\nThe run goes on by itself after a crash or the time limit.\n'
    exit 0
}

check_experiment() {
    local override found=
    for override in "$@"; do
        case $override in
        experiment=*)
            found=${override#experiment=}
            [ -f "$MARATHON_HOME/configs/experiment/$found.yaml" ] || stop "$override" \
                "an experiment is a file configs/experiment/NAME.yaml" "experiment= one of $(experiments)" ;;
        cluster="$cluster") ;;
        cluster=*) stop "$override in slurm/$cluster.sh" "each cluster has its own script" \
            "leave it out, or submit slurm/${override#cluster=}.sh" ;;
        -*) stop "$override behind a setting" "options of sbatch stand before the settings of the run" \
            "slurm/$cluster.sh $override … experiment=…" ;;
        esac
    done
    [ -z "$found" ] || return 0
    stop "no experiment among the arguments: ${*:-none}" "a run is described by an experiment" \
        "slurm/$cluster.sh --account=PROJECT experiment= one of $(experiments)"
}

experiments() {
    (cd "$MARATHON_HOME/configs/experiment" && set -- *.yaml && echo "${@%.yaml}")
}

check_account() {
    [ -z "$(asked_for '-A|--account' "${SBATCH_ACCOUNT:-}" "$@")" ] || return 0
    stop "no --account" "$cluster accepts only jobs that name the project to be billed" \
        "slurm/$cluster.sh --account= one of $(my_accounts), or export SBATCH_ACCOUNT"
}

my_accounts() {
    local found
    found=$(sacctmgr -nP show assoc user="$USER" format=account 2>/dev/null | sort -u | paste -sd ' ' || true)
    echo "${found:-your projects (\`sacctmgr show assoc user=$USER\`)}"
}

# asked_for '-A|--account' DEFAULT OPTION…: the value of an option of sbatch, in any of its spellings.
asked_for() {
    local names=$1 value=$2 long
    long=${names#*|}
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        "$long"=*) value=${1#*=} ;;
        "$long" | "${names%|*}") value=${2:-} ;;
        "${names%|*}"*) value=${1#"${names%|*}"} ;;
        esac
        shift
    done
    echo "$value"
}

explain_refusal() {
    local answer=$1
    case $answer in
    *"Invalid account"* | *AssocMaxSubmitJobLimit* | *AssocGrpSubmitJobsLimit*)
        stop "$answer" "the account must be a project of yours that may use this partition" \
            "--account= one of $(my_accounts)" ;;
    *"time limit"*)
        stop "$answer" "each partition has its longest time: $(sinfo -h -o '%R %l' | sort -u | paste -sd ',')" \
            "a shorter --time, the run goes on in the next job; or another --partition" ;;
    *"Node count"* | *"node configuration"*)
        stop "$answer" "a node has $devices_per_node devices, and partitions cap the nodes of a job" \
            "leave tasks, cores and devices as slurm/$cluster.sh has them; fewer --nodes, or another --partition" ;;
    *)
        stop "$answer" "Slurm has to accept the job" "docs/clusters.md lists refusals and what to do about them" ;;
    esac
}

check_job() {
    # Sites without enforced accounts start such a job, and who pays for it shows later.
    [ -n "${SLURM_JOB_ACCOUNT:-}" ] || stop "job $SLURM_JOB_ID has no account" \
        "$cluster bills every job to a project" "sbatch --account=PROJECT slurm/$cluster.sh $*"
    check_experiment "$@"
    check_site "$SLURM_JOB_NUM_NODES" "${SLURM_JOB_QOS:-}"
    case ${SLURM_NTASKS_PER_NODE:-} in
    1 | "$devices_per_node") ;;
    *) stop "--ntasks-per-node=${SLURM_NTASKS_PER_NODE:-none}" \
        "a rank is a task of its own ($devices_per_node a node), or torchrun starts them (1 a node)" \
        "leave out --ntasks and --ntasks-per-node: slurm/$cluster.sh sets them" ;;
    esac
}

# use_container COMMAND…: the program that runs an image here. MARATHON_CONTAINER=none runs this machine's Python;
# MARATHON_SQSH is an environment of slurm/build_env.sh that lies over the image.
use_container() {
    python=("${MARATHON_PYTHON:-python3}")
    mkdir -p "$MARATHON_SCRATCH"
    [ "$MARATHON_CONTAINER" != none ] || return 0
    [ -e "$MARATHON_CONTAINER" ] || stop "MARATHON_CONTAINER=$MARATHON_CONTAINER is not there" \
        "Python runs in a container image; thousands of small files on Lustre take minutes to import" \
        "export MARATHON_CONTAINER=IMAGE.sif, or MARATHON_CONTAINER=none for the python3 on PATH"
    MARATHON_IMAGE=$(readlink -f "$MARATHON_CONTAINER") # what `latest` means today; the ledger records it
    export MARATHON_IMAGE
    local overlay=()
    if [ -n "${MARATHON_SQSH:-}" ]; then
        [ -e "$MARATHON_SQSH" ] || stop "MARATHON_SQSH=$MARATHON_SQSH is not there" \
            "it names an environment to lay over the image" "slurm/build_env.sh IMAGE.sif $MARATHON_SQSH"
        overlay=(-B "$(readlink -f "$MARATHON_SQSH"):/user-software:image-src=/")
        export SINGULARITYENV_PREPEND_PATH=/user-software/bin
    fi
    python=("$@" -B "$MARATHON_HOME,$MARATHON_SCRATCH" "${overlay[@]}" "$MARATHON_IMAGE" "${python[@]}")
}

# --- the job ------------------------------------------------------------------------------------------------

# Freezes the config once, then runs the stages; each skips itself when it is complete.
run_stages() {
    trap slurm_ends_this_job TERM
    set_rendezvous
    set -a
    : "${PYTHONPATH:=}"
    PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$MARATHON_HOME # the code that runs is the checkout that was submitted
    : "${PYTHONSAFEPATH=1}"       # nothing is imported from the folder of submission by accident
    : "${PYTHONNOUSERSITE=1}"     # nor from ~/.local, which would shadow the container
    : "${PYTHONUNBUFFERED=1}"     # the log shows a line when it is printed
    : "${HF_HUB_OFFLINE=1}"       # compute nodes have no internet; asking a hub only waits for its timeout
    : "${HF_DATASETS_OFFLINE=1}"  # the same
    : "${TRANSFORMERS_OFFLINE=1}" # the same
    # Node-local memory: compilers' caches on Lustre wait for each other's locks, or crash on missing ones.
    MARATHON_CACHE=/tmp/marathon-$SLURM_JOB_ID
    : "${TRITON_CACHE_DIR=$MARATHON_CACHE/triton}"
    : "${TORCHINDUCTOR_CACHE_DIR=$MARATHON_CACHE/inductor}"
    : "${TORCH_EXTENSIONS_DIR=$MARATHON_CACHE/extensions}"
    set +a
    export MARATHON_JOB_ENDS_AT
    MARATHON_JOB_ENDS_AT=$(fact EndTime || true) # by which training has saved
    say "job $SLURM_JOB_ID on $cluster, restart ${SLURM_RESTART_COUNT:-0}, $(date -Is)"
    say "$SLURM_JOB_NUM_NODES nodes $SLURM_JOB_NODELIST; rendezvous $MASTER_ADDR:$MASTER_PORT"
    say "checkout $MARATHON_HOME; container ${MARATHON_IMAGE:-none}; scratch $MARATHON_SCRATCH"
    trap clear_caches EXIT
    freeze "$@"
    claim_run
    submit_successor "$@"
    run_stage data one_task
    run_stage train all_ranks
    tell_network
    run_stage eval all_ranks
    run_stage release one_task
    remove_successor
    say "complete: $RUN"
}

set_rendezvous() {
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1 | tr -d '[:space:]')}
    MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 10000))} # jobs that share a node must not share a port
    export MASTER_ADDR MASTER_PORT
}

# Only here is a config composed; ranks read the frozen file. What the user gives wins over what Slurm says.
freeze() {
    local ours=(cluster="$cluster" cluster.nodes="$SLURM_JOB_NUM_NODES") overrides=() override
    for override in "${ours[@]}"; do
        [[ " $* " == *" ${override%%=*}="* ]] || overrides+=("$override")
    done
    local answer
    answer=$("${python[@]}" -m marathon.cli freeze "${overrides[@]}" "$@")
    echo "$answer"
    export RUN=${answer##*$'\n'}
    [ -d "$RUN" ] || stop "marathon freeze named no folder but: $RUN" "its last line is the run's folder" \
        "run it by hand: marathon freeze ${overrides[*]} $*"
}

# run_stage STAGE one_task|all_ranks
run_stage() {
    local code=0
    outcome="$RUN/logs/outcome-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    mkdir -p "$RUN/logs"
    say "$1, $(date -Is)"
    "$2" "$1" || code=$?
    if [ -s "$outcome" ]; then
        code=$(<"$outcome")
        rm "$outcome"
    fi
    case $code in
    0) ;;
    75) go_on "$code" "$1 saved before the end" ;;
    78) # a mistake or a refusal: starting again would not help
        remove_successor
        say "$1 stopped the run: mend the error above, then submit the same line again"
        exit "$code"
        ;;
    *) go_on "$code" "$1 ended with $code: the first error above tells why" ;;
    esac
}

one_task() {
    step --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        bash -c "$as_task" task "$outcome" "${python[@]}" -m marathon.stage "$1" "$RUN"
}

all_ranks() {
    local stage=(-m marathon.stage "$1" "$RUN")
    if [ "$SLURM_NTASKS_PER_NODE" -lt "$devices_per_node" ]; then
        step --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=none \
            bash -c "$as_node$note_network$as_task" task "$outcome" "${python[@]}" "$MARATHON_HOME/slurm/torchrun.py" \
            --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$devices_per_node" \
            --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "${stage[@]}"
    else
        step --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind="$cpu_bind" \
            bash -c "$as_rank$note_network$as_task" task "$outcome" "${python[@]}" "${stage[@]}"
    fi
}

# srun does not inherit --cpus-per-task since Slurm 22.05. A rank that fails ends the step at once, not at the
# timeout of a collective; one that ends while others hang does so after a minute. In the background, so that
# bash hears of SIGTERM at once and not when the ranks have saved, or were killed with it.
step() {
    local code=0
    srun --distribution=block --kill-on-bad-exit=1 --wait=60 "$@" &
    wait $! || code=$?
    if [ -n "$ending" ]; then # SIGTERM ended the wait, not the step
        code=0
        wait $! || code=$?
    fi
    return "$code"
}

# The variables of a rank, inside its task: in the batch script they would be those of the batch script.
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
'
as_node='export PET_NODE_RANK=$SLURM_NODEID # torchrun reads its --node-rank from here
'
# The first node notes which network the collectives found: TCP instead of the fabric halves the speed, silently.
note_network='if [ "$SLURM_NODEID" = 0 ]; then
    export NCCL_DEBUG=${NCCL_DEBUG-INFO} NCCL_DEBUG_SUBSYS=${NCCL_DEBUG_SUBSYS-INIT,NET}
    export NCCL_DEBUG_FILE=${NCCL_DEBUG_FILE-$RUN/logs/nccl-$SLURM_JOB_ID-%h-%p.log}
fi
'
# `scancel --signal=USR1 JOB` asks for a checkpoint and reaches every process of the step: those who do not handle it,
# such as loaders and torchrun, inherit that it is ignored. SIGTERM is waited out, so that the rank can save.
# The status that counts is the first, or a refusal: srun ends the other tasks for it and would report how they died.
# A rank ends with 75 when the run has saved and wants to go on; for srun that is no failure, or it would kill the rest.
as_task='trap "" USR1
trap : TERM
exec 3>&2 2>/dev/null # bash has something to say about each task that is ended
outcome=$1
shift
mkdir -p "$MARATHON_CACHE"
"$@" 2>&3 3>&-
code=$?
[ "$code" = 0 ] || ([ "$code" = 78 ] || set -o noclobber; echo "$code" >"$outcome")
[ "$code" = 75 ] || exit "$code"'

tell_network() {
    local used
    used=$(grep -hoE 'Using network .*|Selected provider is .*' "$RUN/logs/nccl-$SLURM_JOB_ID"-* 2>/dev/null |
        sort -u || true)
    [ -z "$used" ] || say "collectives: ${used//$'\n'/; }"
}

# For a minute at most: on a node in trouble a step may never start.
clear_caches() {
    trap - EXIT
    timeout 60 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 rm -rf "$MARATHON_CACHE" || true
}
