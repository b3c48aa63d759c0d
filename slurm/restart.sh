# shellcheck shell=bash disable=SC2154
# How a run goes on when its job ends.
#
# A run has one live job. A job that crashed or has saved requeues itself. Beside it waits a successor, held until the
# job has failed and the last of its processes is gone: for ends at which the script has nothing left to say (its own
# SIGKILL, the time limit, a node lost where sites do not requeue), and for a requeue that is refused. A job that is
# requeued has not failed, so its successor keeps waiting; when it completes, Slurm cancels the successor. What ends a
# run on purpose, a stage that refuses or `scancel`, removes the successor here.

ending= # set once Slurm ends this job

read_facts() { facts=$(SLURM_TIME_FORMAT=%s scontrol show job --oneliner "$SLURM_JOB_ID"); }

# fact NAME: what Slurm says of this job, times in seconds since the epoch.
fact() { [[ $facts =~ \ $1=([^ ]+) && ${BASH_REMATCH[1]} != @("(null)"|Unknown) ]] && echo "${BASH_REMATCH[1]}"; }

# While a job ends, squeue says COMPLETING, and a few minutes later it has forgotten it; accounting knows how it ended.
state_of() {
    local state
    state=$(squeue -h -t all -j "$1" -o %T 2>/dev/null || true)
    case $state in "" | COMPLETING) state=$(sacct -nXP -j "$1" -o State 2>/dev/null || true) ;; esac
    echo "${state%% *}" # of "CANCELLED by 1000"
}

end_if_predecessor_was_cancelled() {
    local before=${MARATHON_PREDECESSOR:-}
    [ -n "$before" ] && [ "$(state_of "$before")" = CANCELLED ] || return 0
    say "job $SLURM_JOB_ID was to go on for job $before, which was cancelled: nothing to do"
    exit 0
}

# RUN/logs/jobs has a line for each start: job, restart, time, nodes. Two jobs at one run, as when its line is submitted
# again, would write into each other's files.
claim_run() {
    local starts="$RUN/logs/jobs" last
    mkdir -p "$RUN/logs"
    touch "$starts"
    last=$(tail -n 1 "$starts" | cut -d ' ' -f 1)
    if [ "${last:-$SLURM_JOB_ID}" != "$SLURM_JOB_ID" ] &&
        [ -n "$(squeue -h --me -j "$last" -t RUNNING -o %A 2>/dev/null || true)" ]; then
        remove_successor
        stop "job $last is at $RUN" "a run has one job at a time, which goes on by itself" \
            "leave it alone; or scancel $last, then submit again"
    fi
    echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} $(date -Is) $SLURM_JOB_NODELIST" >>"$starts"
    say "start $(wc -l <"$starts") of $RUN"
}

# The same script, arguments, resources and log, in the environment of the submission.
submit_successor() {
    [ -z "$(successor)" ] || return 0
    local environment options pair value answer
    mapfile -d '' -t environment < <(grep -zv '^SLURM_' "/proc/$$/environ")
    environment+=(${SLURM_CONF:+"SLURM_CONF=$SLURM_CONF"} "MARATHON_HOME=$MARATHON_HOME")
    options=(--job-name="$SLURM_JOB_NAME" --open-mode=append --output="$(readlink "/proc/$$/fd/1")"
        --error="$(readlink "/proc/$$/fd/2")" --nodes="$SLURM_JOB_NUM_NODES"
        --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$SLURM_CPUS_PER_TASK")
    for pair in account=Account partition=Partition qos=QOS time=TimeLimit mem=MinMemoryNode exclude=ExcNodeList \
        reservation=Reservation constraint=Features; do
        ! value=$(fact "${pair#*=}") || options+=("--${pair%=*}=$value")
    done
    [ "$(fact Requeue)" = 1 ] || options+=(--no-requeue)
    if answer=$(env -i "${environment[@]}" "MARATHON_PREDECESSOR=$SLURM_JOB_ID" sbatch --parsable \
        --dependency="afternotok:$SLURM_JOB_ID" --kill-on-invalid-dep=yes "${options[@]}" "$0" "$@" 2>&1); then
        say "job $answer waits to go on for this one"
    else
        say "no job waits to go on for this one: $answer"
    fi
}

successor() {
    squeue -h --me -t PENDING -o '%A %E' 2>/dev/null |
        sed -n "s/^\([0-9]*\) .*afternotok:$SLURM_JOB_ID\b.*/\1/p" || true
}

remove_successor() {
    local next
    next=$(successor)
    [ -z "$next" ] || scancel "$next"
}

# SIGTERM: the job is cancelled, at its time limit, or loses a node. Told at once, the ranks may need all the time left.
slurm_ends_this_job() {
    ending=yes
    trap - EXIT # no step can be started any more
    [ "$(state_of "$SLURM_JOB_ID")" != CANCELLED ] || remove_successor
}

# go_on STATUS REASON: the same job again or, where that is refused, its successor.
go_on() {
    say "$2"
    [ -n "$ending" ] || clear_caches
    if [ -n "$ending" ]; then
        slurm_ends_this_job # once more: accounting may have been late
        rm -rf "$MARATHON_CACHE" # on this node at least
        say "Slurm ended this job: $(state_of "$SLURM_JOB_ID")"
        exit "$1"
    fi
    trap - TERM
    say "requeueing job $SLURM_JOB_ID"
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 300 # Slurm ends this script; leaving first would count as a failed job
    fi
    local next
    next=$(successor)
    if [ -n "$next" ]; then say "job $next goes on"; else say "submit the same line again to go on"; fi
    exit "$1"
}
