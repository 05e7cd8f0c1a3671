#!/usr/bin/env bash
# The JAX engine on a TPU slice of several VMs, started from your own machine through gcloud (docs/clusters.md):
#
#   export TPU_NAME=my-slice ZONE=us-west4-a
#   scripts/tpu_vm.sh setup                                   # this checkout onto every VM of the slice
#   scripts/tpu_vm.sh run RECIPE OUTPUT [key=value ...]       # start, or go on from the newest checkpoint
#   scripts/tpu_vm.sh log                                     # what process 0 prints, from then on
#   scripts/tpu_vm.sh stop                                    # end what runs there
#
# RECIPE and OUTPUT are paths on the VMs. OUTPUT must lie on a file system that all of them have mounted, such as a
# Filestore share; a bucket mounted through gcsfuse is none (it cannot rename a folder in one step).
set -euo pipefail

: "${TPU_NAME:?set TPU_NAME to the name of the slice}" "${ZONE:?set ZONE to its zone}"
usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }

on() { gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

setup() {
  local wheels
  wheels=$(mktemp -d)
  python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$(dirname "$0")/.."
  gcloud compute tpus tpu-vm scp "$wheels"/diptych-*.whl "$TPU_NAME": --zone="$ZONE" --worker=all
  # shellcheck disable=SC2016  # expanded on the VMs
  on all 'python3 -m venv ~/diptych-venv &&
    ~/diptych-venv/bin/pip install --quiet --upgrade "$(ls -t ~/diptych-*.whl | head -n 1)[jax]" "jax[tpu]"'
  rm -r "$wheels"
}

run() {
  [ $# -ge 2 ] || usage
  local recipe=$1 output=$2 settings="" cache
  shift 2
  [ $# -eq 0 ] || settings=$(printf ' %q' "$@")
  # JAX finds the other VMs of the slice by itself. Process 0 alone writes compiled programs: one folder for all. The
  # run outlives the connection.
  cache=$(printf %q "$(dirname "$output")/.jax-cache") recipe=$(printf %q "$recipe") output=$(printf %q "$output")
  on all "export PATH=\$HOME/diptych-venv/bin:\$PATH JAX_COMPILATION_CACHE_DIR=$cache
    nohup \
    diptych run $recipe --engine jax --output $output --distributed --resume$settings \
    > ~/diptych.log 2>&1 < /dev/null &
    echo \$! > ~/diptych.pid"
}

case "${1:-}" in
  setup) setup ;;
  run) shift; run "$@" ;;
  log) on 0 'tail -n 50 -f ~/diptych.log' ;;
  stop) on all "kill \$(cat ~/diptych.pid)" ;;
  *) usage ;;
esac
