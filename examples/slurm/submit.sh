#!/usr/bin/env bash
# Submits the stages of a chain, each when the one before it has ended well, and prints their jobs.
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
if command -v megashear >/dev/null; then  # here, and not in a container alone
  megashear shear "$chain" --print >/dev/null
fi
[[ -n ${EVALUATE[*]:-} ]] || EVALUATE=("${TRAIN[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1)
mkdir -p logs
after=()
for stage in "${stages[@]}"; do
  [[ $# == 0 || " $* " == *" $stage "* ]] || continue
  case $stage in
    prune | continue) resources=("${TRAIN[@]}") ;;
    evaluate) resources=("${EVALUATE[@]}") ;;
    *) resources=("${LIGHT[@]}") ;;
  esac
  job=$(sbatch --parsable --output="logs/%x-%j.log" --kill-on-invalid-dep=yes "${ALL[@]}" \
    "${resources[@]}" "${after[@]}" "$here/$stage.sbatch" "$chain")
  job=${job%%;*}  # behind it, the cluster's name
  echo "$stage $job"
  after=("--dependency=afterok:$job")
done
