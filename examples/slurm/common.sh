# What the job scripts share: they source it. Site settings are in cluster.env, not here.
# shellcheck shell=bash
set -euo pipefail

# Of a step that the job was perhaps submitted from: this script is none.
unset "${!SLURM_STEP_@}"
export PYTHONUNBUFFERED=1
# srun does not take it over from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

SRUN=(srun --wait=180)  # seconds that tasks have once one has ended
INSIDE=()               # what a command is put behind, to run in a container
PRINT=()                # the same, where srun starts the container
LOST_AT_MOST=3          # times in a row that a job is requeued because a node or process was lost
MEGASHEAR_CLUSTER=${MEGASHEAR_CLUSTER:-${SLURM_SUBMIT_DIR:-.}/cluster.env}
# shellcheck source=/dev/null
[[ ! -f $MEGASHEAR_CLUSTER ]] || source "$MEGASHEAR_CLUSTER"

# Runs stages of CHAIN.yaml, each as one job step; ends the job where one fails.
run_stages() {  # CHAIN.yaml STAGE...
  local chain=$1 stage command status
  shift
  trap : TERM  # outlive the step, to tell preemption from scancel
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
}

# Ends the job with the status of its run, or makes Slurm start it again.
finish() {  # STATUS
  local lost=.lost-$SLURM_JOB_ID  # a line for each time
  case $1 in
    138)  # SIGUSR1: saved before the time limit, or before preemption
      rm -f "$lost"
      requeue "saved" ;;
    143)  # SIGTERM: of scancel it is meant, of preemption not
      if preempted; then requeue "preempted"; fi ;;
    75 | 137)  # another process is lost; a process was killed
      date -u +%FT%TZ >>"$lost"
      if (($(wc -l <"$lost") <= LOST_AT_MOST)); then requeue "a node or process was lost"; fi ;;
  esac
  echo "job $SLURM_JOB_ID ends with status $1"
  exit "$1"
}

# Whether Slurm lets the job run on for its grace time. Without one it requeues the job itself.
preempted() {
  local job
  job=$(scontrol show job "$SLURM_JOB_ID")
  [[ $job == *JobState=RUNNING* && $job =~ PreemptTime=[0-9] ]]
}

requeue() {  # WHY
  echo "job $SLURM_JOB_ID is requeued: $1"
  if scontrol requeue "$SLURM_JOB_ID"; then
    trap - TERM
    sleep 600  # Slurm ends this script; one that ends itself counts as completed
  fi
}
