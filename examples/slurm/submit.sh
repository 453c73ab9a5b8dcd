#!/usr/bin/env bash
# Submits the stages of a chain, each to start after the one before has succeeded; prints their jobs.
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  echo "usage: submit.sh CHAIN.yaml [CLUSTER.env] [STAGE ...]"
  echo
  echo "CHAIN.yaml is that of megashear shear. CLUSTER.env (default: cluster.env in this directory)"
  echo "is a copy of examples/slurm/cluster.env; where there is none, jobs get what Slurm gives."
  echo "Stages, always in this order: tokenize convert prune extract continue export evaluate."
  echo "Logs are in logs/ of this directory, which all paths in CHAIN.yaml are relative to."
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
here=$(dirname "$(realpath "$0")")
stages=(tokenize convert prune extract continue export evaluate)
is_stage() { [[ $1 != *' '* && " ${stages[*]} " == *" $1 "* ]]; }

chain=$1 cluster=cluster.env
shift
[[ -f $cluster ]] || cluster=$here/cluster.env
if (($#)) && ! is_stage "$1"; then
  cluster=$1
  shift
  [[ -f $cluster ]] || { echo "error: $cluster is neither a file nor a stage" >&2; exit 2; }
fi
[[ -f $chain ]] || { echo "error: $chain is no file" >&2; exit 2; }
for stage in "$@"; do
  is_stage "$stage" || { echo "error: $stage is no stage (${stages[*]})" >&2; exit 2; }
done

export MEGASHEAR_SLURM=$here MEGASHEAR_CLUSTER
MEGASHEAR_CLUSTER=$(realpath "$cluster")
source "$here/common.sh"
if command -v megashear >/dev/null; then  # not in a container only
  megashear shear "$chain" --print >/dev/null
fi
[[ -n ${EVALUATE[*]:-} ]] || EVALUATE=("${TRAIN[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1)

# Seconds of a time limit as sbatch reads it: [D-]H[:M[:S]], M[:S]; nothing if it is no such time.
seconds() {  # TIME
  local days=0 parts=()
  [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 0
  IFS=: read -ra parts <<<"${1#*-}"
  if [[ $1 == *-* ]]; then days=${1%%-*}; elif ((${#parts[@]} < 3)); then parts=(0 "${parts[@]}"); fi
  echo $(((10#$days * 24 + 10#${parts[0]}) * 3600 + 10#${parts[1]:-0} * 60 + 10#${parts[2]:-0}))
}

# Warns of a time limit that leaves no time before the signal by which a stage saves.
check_time() {  # STAGE OPTIONS...
  local stage=$1 limit='' lead
  lead=$(sed -n 's/^#SBATCH --signal=USR1@//p' "$here/$stage.sbatch")
  while shift && (($#)); do
    case $1 in
      --time=* | --signal=*@*) [[ $1 == --time* ]] && limit=${1#*=} || lead=${1##*@} ;;
      --time | -t) limit=${2:-} ;;
      -t*) limit=${1#-t} ;;
    esac
  done
  limit=$(seconds "$limit")
  if [[ -n $limit && -n $lead ]] && ((limit < lead + 60)); then
    echo "warning: $stage ends after $limit s, and Slurm warns it $lead s before that: it is stopped" \
      "before it makes a step. Give more --time, or a shorter --signal=USR1@SECONDS" >&2
  fi
}

mkdir -p logs
after=()
for stage in "${stages[@]}"; do
  [[ $# == 0 || " $* " == *" $stage "* ]] || continue
  case $stage in
    prune | continue) resources=("${TRAIN[@]}") ;;
    evaluate) resources=("${EVALUATE[@]}") ;;
    *) resources=("${LIGHT[@]}") ;;
  esac
  check_time "$stage" "${ALL[@]}" "${resources[@]}"
  job=$(sbatch --parsable --output="logs/%x-%j.log" --kill-on-invalid-dep=yes "${ALL[@]}" \
    "${resources[@]}" "${after[@]}" "$here/$stage.sbatch" "$chain")
  job=${job%%;*}  # the cluster's name may follow
  echo "$stage $job"
  after=("--dependency=afterok:$job")
done
