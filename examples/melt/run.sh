#!/bin/bash
# Limit from the validation frames, MD until it is met, analysis of the trajectory.
#   bash examples/melt/run.sh [MODEL [lmp options, such as -var cells 2]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$here/../../runs/quickstart/hl.pt}
shift || true
out=${OUT:-runs/melt}
mkdir -p "$out"
export OMP_NUM_THREADS=1

# the largest force_std of an atom in the validation frames: beyond it, nothing was ever checked
lmp-hl evaluate "$model" "$here/../silicon/valid.xyz" --csv "$out/valid.csv" > "$out/valid.txt"
limit=$(awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "force_std") column = i }
                 NR > 1 && $column > largest { largest = $column } END { print largest }' \
        "$out/valid.csv")
echo "limit: force_std $limit eV/A"

mpirun -np "${RANKS:-2}" lmp -in "$here/in.melt" -log "$out/log.lammps" \
  -var model "$model" -var limit "$limit" -var out "$out" "$@"

lmp-hl analyze "$out/melt.h5md" --out "$out/analysis" --threshold force_std="$limit"
