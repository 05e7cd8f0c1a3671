#!/usr/bin/env bash
# The GPU benchmarks on one NVIDIA device (H100, H200): both engines, all phases, bfloat16.
#
#   scripts/h200_bench.sh [OUTPUT]        default: benchmarks/results
#
# Workloads: OPT-1.3B's shape (256+256 tokens) and Llama-3.2-1B's (512+512), 64 rows. Both engines share the card, so
# they run one after the other, each with the whole of it. Wants pip install 'diptych[all]' and jax's CUDA wheel
# (pip install "jax[cuda12]").
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-benchmarks/results}
# Two frameworks in turn on one card: neither may take all of its memory at once.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
for workload in opt-1.3b llama-3.2-1b; do
    diptych bench "$workload" --engine jax --threads 0 --rounds 5 --output "$output"/jax
    diptych bench "$workload" --engine torch --threads 0 --rounds 5 --output "$output"/torch
done
diptych bench --from "$output"/*/*allt.json --html "$output"/gpu.html
