#!/usr/bin/env bash
# torch 2.13.0, Python 3.11.
#
# torchrun hands everything behind the script's name to the script, its own options too
# (`torchrun train.py --role r`). But an option of the script that is the beginning of several of
# torchrun's own is refused as ambiguous, behind the script's name as well: --run, --log, --node,
# --start, --max, --local and others. A script whose option is --run works under python and dies
# under torchrun. `--` before the script's name helps.
#
# Seen: train.py --role r        script got ['--role', 'r']
#       train.py --run r         error: ambiguous option: --run could match --run-path, --run_path
#       -- train.py --run r      script got ['--run', 'r']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
echo 'import sys; print("script got", sys.argv[1:])' > train.py
export OMP_NUM_THREADS=1
launch() { venv/bin/torchrun --nproc-per-node 1 "$@" 2>&1 | grep -E "script got|ambiguous" || true; }
expect() {
    local words=$1 got
    shift
    got=$(launch "$@")
    echo "torchrun $*: $got"
    [[ $got == *"$words"* ]]
}
expect "script got ['--role', 'r']" train.py --role r
for option in --run --log --node --start; do
    expect "ambiguous option: $option" train.py "$option" r
    expect "script got ['$option', 'r']" -- train.py "$option" r
done
echo "seen again"
