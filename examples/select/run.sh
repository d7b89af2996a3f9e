#!/bin/bash
# MD that writes its uncertain frames, then a few of them that are worth a label.
#   bash examples/select/run.sh [MODEL [lmp options, such as -var cells 2]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$here/../../runs/quickstart/hl.pt}
shift || true
out=${OUT:-runs/select}
mkdir -p "$out"
export OMP_NUM_THREADS=1

mpirun -np "${RANKS:-2}" lmp -in "$here/in.select" -log "$out/log.lammps" \
  -var model "$model" -var out "$out" "$@"
python "$here/candidates.py" "$out/uncertain_frames.dump" "$out/candidates.xyz" --apart "${APART:-0.5}"
