#!/usr/bin/env bash
# Submits the stages of a chain, each when the one before it has ended well, and prints their jobs.
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  echo "usage: submit.sh CHAIN.yaml [CLUSTER.env [STAGE ...]]"
  echo
  echo "CHAIN.yaml is that of megashear shear. CLUSTER.env (default: cluster.env in this directory)"
  echo "is a copy of examples/slurm/cluster.env; where there is none, jobs get what Slurm gives."
  echo "Stages: tokenize convert prune extract continue export evaluate (default: all of them)."
  echo "Logs are in logs/ of this directory, which all paths in CHAIN.yaml are relative to."
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
chain=$1
MEGASHEAR_SLURM=$(dirname "$(realpath "$0")")
cluster=${2:-cluster.env}
[[ $# -gt 1 || -f $cluster ]] || cluster=$MEGASHEAR_SLURM/cluster.env
MEGASHEAR_CLUSTER=$(realpath -e "$cluster")
export MEGASHEAR_CLUSTER MEGASHEAR_SLURM
stages=("${@:3}")
((${#stages[@]})) || stages=(tokenize convert prune extract continue export evaluate)

source "$MEGASHEAR_CLUSTER"
if command -v megashear >/dev/null; then  # here, and not in a container alone
  megashear shear "$chain" --print >/dev/null
fi
mkdir -p logs
after=()
for stage in "${stages[@]}"; do
  case $stage in
    prune | continue) resources=("${TRAIN[@]}") ;;
    *) resources=("${LIGHT[@]}") ;;
  esac
  job=$(sbatch --parsable --output="logs/%x-%j.log" --kill-on-invalid-dep=yes "${ALL[@]}" \
    "${resources[@]}" "${after[@]}" "$MEGASHEAR_SLURM/$stage.sbatch" "$chain")
  job=${job%%;*}  # behind it, the cluster's name
  echo "$stage $job"
  after=("--dependency=afterok:$job")
done
