# What the scripts here share: they source it. Site settings are in cluster.env, not here.
# shellcheck shell=bash
set -euo pipefail

SRUN=(srun --wait=180)  # seconds that tasks have once one has ended
INSIDE=()               # what a command is put behind, to run in a container
PRINT=()                # the same, where srun starts the container
LOST_AT_MOST=3          # times in a row that a job is requeued because a node or process was lost

refuse() {  # WHY
  echo "error: $1" >&2
  exit 2
}

# Reads the site's settings as a login shell would: a line may fail, or name what is not set.
read_cluster() {  # FILE
  bash -n "$1" || refuse "$1 cannot be read"
  trap 'refuse "$cluster ends the script that reads it"' EXIT
  set +eu +o pipefail
  # shellcheck source=/dev/null
  source "$1"
  set -euo pipefail
  trap - EXIT
}
cluster=${MEGASHEAR_CLUSTER:-${SLURM_SUBMIT_DIR:-.}/cluster.env}
[[ -z ${MEGASHEAR_CLUSTER:-} && ! -f $cluster ]] || read_cluster "$cluster"

# Runs stages of CHAIN.yaml, each as one job step; ends the job where one fails.
run_stages() {  # CHAIN.yaml STAGE...
  local chain=$1 stage command status
  shift
  [[ -f $chain ]] || refuse "'$chain' is no file. Usage: sbatch [OPTIONS] $1.sbatch CHAIN.yaml"
  # Of a step that the job was perhaps submitted from: this script is none.
  unset "${!SLURM_STEP_@}"
  export PYTHONUNBUFFERED=1
  # srun does not take it over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  trap : TERM  # outlive the step, and see what it ended with
  for stage in "$@"; do
    command=$("${PRINT[@]}" "${INSIDE[@]}" megashear shear "$chain" --stage "$stage" --print)
    if [[ -z $command ]]; then
      echo "$stage: nothing to do for $chain"
      continue
    fi
    echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $command"
    status=0
    "${SRUN[@]}" "${INSIDE[@]}" bash -c "exec $command" || status=$?
    [[ $status == 0 ]] || finish "$status"
  done
  rm -f ".lost-$SLURM_JOB_ID"
}

# Ends the job with the status of its run, or makes Slurm start it again. Not where somebody or
# Slurm has ended it (scancel, its time, preemption without grace): Slurm requeues what it wants to.
finish() {  # STATUS
  local job lost=.lost-$SLURM_JOB_ID  # a line for each time
  job=$(scontrol show job "$SLURM_JOB_ID") || true
  if [[ $job == *JobState=RUNNING* ]]; then
    case $1 in
      138)  # SIGUSR1: the time limit or preemption comes
        rm -f "$lost"
        requeue "saved before its time ends" ;;
      143)  # SIGTERM: preemption has come, and the grace time runs
        if [[ $job =~ PreemptTime=[0-9] ]]; then requeue "preempted"; fi ;;
      75 | 137)  # another process is lost; a process was killed
        date -u +%FT%TZ >>"$lost"
        if (($(wc -l <"$lost") <= LOST_AT_MOST)); then requeue "a process was lost"; fi ;;
    esac
  fi
  echo "job $SLURM_JOB_ID ends with status $1"
  exit "$1"
}

requeue() {  # WHY
  echo "job $SLURM_JOB_ID is requeued: $1"
  if scontrol requeue "$SLURM_JOB_ID"; then
    trap - TERM
    sleep 600  # Slurm ends this script; one that ends itself counts as completed
  fi
}
