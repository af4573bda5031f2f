# shellcheck shell=bash
# What the batch scripts share; they source it from the repository's root. Not for the command line.

set +u                              # module and activate scripts use variables that may be unset
# shellcheck source=/dev/null
[ ! -f slurm/site.env ] || . slurm/site.env
set -u

export PYTHONUNBUFFERED=1           # log lines appear when they are written
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false # its threads would fork into the data loader's processes

# srun does not take over the job's own --cpus-per-task (since Slurm 22.05).
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# How a command gets into the container: options of srun (pyxis), a prefix (Apptainer), or nothing.
in_srun=() prefix=()
case ${CONTAINER_IMAGE:-} in
    '') ;;
    *.sif) prefix=(apptainer exec --nv --bind "$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --pwd "$PWD" "$CONTAINER_IMAGE") ;;
    *) in_srun=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
        --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}") ;;
esac

# python on the batch host alone. pyxis knows srun only; elsewhere a step would be a detour.
python_here() {
    if [ ${#in_srun[@]} -gt 0 ]; then
        srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --gpus=0 "${in_srun[@]}" python "$@"
    else
        "${prefix[@]}" python "$@"
    fi
}

# Run a command to its end while signals wait for nobody: bash answers one only between commands or
# in `wait`. USR1 and TERM are handed on to srun, which gives them to every task.
signalled='' child=''
on_signal() {
    # shellcheck disable=SC2034     # the sourcing script looks at it
    signalled=$1
    echo "$(date '+%F %T') job $SLURM_JOB_ID got SIG$1"
    [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || true
}
attend() {
    local code=0
    "$@" &
    child=$!
    # Until the fork has become the command, bash swallows what is sent to it.
    for _ in {1..50}; do [ "/proc/$child/exe" -ef "/proc/$$/exe" ] || break; sleep 0.1; done
    [ -z "$signalled" ] || kill -USR1 "$child" 2>/dev/null || true  # it came before the command did
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done
    wait "$child" && code=0 || code=$?  # the end's own code, had a signal cut the first wait short
    child=''
    return "$code"
}

# Slurm's answer, asked for again while the controller is too busy to give one.
ask() {
    local try
    for try in 1 2 3 4 5; do
        "$@" && return
        sleep $((2 * try))
    done
    return 1
}

# Back into the queue under the same job id, away from the nodes named: CODE [NODES]. When Slurm is
# already ending the job (scancel, a limit, a requeue from outside) the decision is Slurm's, and the
# code says that the run is not finished. No answer is not an end.
requeue() {
    local state avoid
    state=$(ask squeue --noheader --job="$SLURM_JOB_ID" --format=%T) || state=''
    case $state in '' | RUNNING) ;; *) exit $(($1 > 0 ? $1 : 1)) ;; esac
    avoid=$(ask scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p') || avoid=''
    avoid=${avoid#(null)}
    trap '' TERM                        # requeueing ends this script; one more command must fit
    ask scontrol requeue "$SLURM_JOB_ID"
    [ -z "$2" ] || ask scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${avoid:+$avoid,}$2"
    exit 0
}

# Names, in `bad`, the nodes that cannot be worked on: those that did not answer "ok".
check_nodes() {
    local answers node number=0
    answers=$(mktemp -d "slurm/logs/health-$SLURM_JOB_ID.XXXXXX")
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --gpu-bind=none \
        --time=10 --kill-on-bad-exit=0 "${in_srun[@]}" --output="$answers/%n" \
        "${prefix[@]}" python -m megatron_ext.jobs health "$@" || true
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        if ! grep -qsx ok "$answers/$number"; then
            echo "node $node is not well: $(tail -n 1 "$answers/$number" 2>/dev/null || echo 'it did not answer')"
            bad=${bad:+$bad,}$node
        fi
        number=$((number + 1))
    done
    rm -r "$answers"
}
