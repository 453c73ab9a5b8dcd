# Functions that all scripts here source. Site settings are in cluster.env, not here.
# shellcheck shell=bash
set -euo pipefail

SRUN=(srun --wait=180)  # seconds that tasks have once one has ended
INSIDE=()               # prefix of a command that runs it in a container
PRINT=()                # the same, where srun starts the container
MAX_RETRIES=3           # requeues in a row after a lost process, or without a training step
SHORT_START=600         # seconds; a longer start counts as progress, whatever its log says

# An array's last task has the array's own number: requeued by that, all its tasks would start again.
job_id=${SLURM_JOB_ID:-}
[[ -z $job_id || $job_id != "${SLURM_ARRAY_JOB_ID:-}" ]] || job_id+=_$SLURM_ARRAY_TASK_ID

refuse() {  # WHY
  echo "error: $1" >&2
  exit 2
}

# Reads the site's settings as a login shell would: a line may fail, or use an unset variable.
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

# Runs stages of CHAIN.yaml, each as one job step; ends the job if one fails.
run_stages() {  # CHAIN.yaml STAGE...
  local chain=$1 stage command status
  shift
  [[ -f $chain ]] || refuse "'$chain' is no file. Usage: sbatch [OPTIONS] $1.sbatch CHAIN.yaml"
  # Those of a step that the job may have been submitted from: this script is no step.
  unset "${!SLURM_STEP_@}"
  export PYTHONUNBUFFERED=1
  # srun does not inherit it from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  trap : TERM  # outlive the step, to see its exit status
  for stage in "$@"; do
    command=$("${PRINT[@]}" "${INSIDE[@]}" megashear shear "$chain" --stage "$stage" --print)
    if [[ -z $command ]]; then
      echo "$stage: nothing to do for $chain"
      continue
    fi
    echo "$(date -u +%FT%TZ) job $job_id, start $((${SLURM_RESTART_COUNT:-0} + 1)): $command"
    status=0 SECONDS=0
    "${SRUN[@]}" "${INSIDE[@]}" bash -c "exec $command" || status=$?
    [[ $status == 0 ]] || finish "$status"
  done
  rm -f ".retries-$job_id"
}

# Ends the job with the status of its run, or requeues it. Not if a user or Slurm has ended it
# (scancel, its time limit, preemption without grace): Slurm itself requeues what it wants to.
finish() {  # STATUS
  local job retries=.retries-$job_id  # a line for each
  job=$(scontrol show job "$job_id") || true
  if [[ $job == *JobState=RUNNING* ]]; then
    case $1 in
      138)  # SIGUSR1: the time limit or preemption comes
        if has_progressed || [[ $job =~ PreemptTime=[0-9] ]]; then
          rm -f "$retries"
          requeue "saved before its time ends"
        else
          retry "saved before its time ends" "no start makes a step before Slurm's warning signal \
comes. Give more --time, or a --signal=USR1@SECONDS closer to its end"
        fi ;;
      143)  # SIGTERM: preemption has come, and the grace time runs
        if [[ $job =~ PreemptTime=[0-9] ]]; then requeue "preempted"; fi ;;
      75 | 134 | 137)  # another process is lost; a process was aborted (by NCCL) or killed
        retry "a process was lost" "a process is lost again and again" ;;
    esac
  fi
  echo "job $job_id ends with status $1"
  exit "$1"
}

# Whether this start was long, or ended at a later step than the one before, by the job's log.
has_progressed() {
  local log=/proc/$$/fd/1 steps=(0 0)
  [[ ! -f $log ]] ||
    mapfile -t -O 2 steps < <(sed -n 's/.*stopped by SIG[A-Z0-9]* at step \([0-9]*\).*/\1/p' "$log")
  ((SECONDS > SHORT_START || steps[-1] > steps[-2]))
}

retry() {  # WHY WHAT_IS_WRONG
  echo "$(date -u +%FT%TZ) $1" >>"$retries"
  if (($(wc -l <"$retries") <= MAX_RETRIES)); then requeue "$1"; fi
  echo "error: requeued $MAX_RETRIES times in a row: $2" >&2
}

requeue() {  # WHY
  echo "job $job_id is requeued: $1"
  if scontrol requeue "$job_id"; then
    trap - TERM
    sleep 600  # Slurm ends this script; a job whose script ends by itself counts as completed
  fi
}
