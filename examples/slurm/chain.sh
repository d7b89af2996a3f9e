# One link of a chain of jobs, sourced by cpu.slurm and gpu.slurm: runs LAMMPS, passes SLURM's warning
# on to it, and submits the next link if this one was interrupted.
mkdir -p "$OUT"
rm -f "$OUT/stop" "$OUT/status"
newest=$(ls -t "$OUT"/*.restart 2>/dev/null | head -n 1 || true)

# SLURM sends USR1 before the time is up (--signal); in.production then ends and writes a restart file
trap 'touch "$OUT/stop"' USR1

# mpirun of the Python environment finds the nodes of the job by itself. A site's own
#   LAUNCH="srun --mpi=pmi2"
# starts faster on many nodes, if it speaks the PMI of this MPI; if not, in.production refuses to run.
${LAUNCH:-mpirun -np $SLURM_NTASKS} lmp -in in.production -log "$OUT/log.${SLURM_JOB_ID:-0}" \
  -var ranks "$SLURM_NTASKS" -var model "$MODEL" -var device "$DEVICE" \
  -var out "$OUT" ${newest:+-var restart "$newest"} ${LMP_OPTIONS:-} &
lammps=$!

# a signal ends `wait` before LAMMPS has ended
code=0
wait $lammps || code=$?
while [ $code -gt 128 ] && kill -0 $lammps 2>/dev/null; do
  code=0
  wait $lammps || code=$?
done

if [ $code -ne 0 ] || [ ! -s "$OUT/status" ]; then
  echo "chain: LAMMPS ended with code $code; not submitted again"
  exit 1
fi
case $(cat "$OUT/status") in
  interrupted*) sbatch "$SCRIPT" ;;
  uncertain*) echo "chain: $(cat "$OUT/status"); look at $OUT/production.h5md before going on" ;;
  *) echo "chain: $(cat "$OUT/status")" ;;
esac
