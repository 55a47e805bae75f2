# What the stage scripts share. They run on the job's first node, in the directory that the job was submitted from,
# and start ranks with srun.
#
#   TRIMLINE_RECIPE   the recipe; required
#   TRIMLINE_PYTHON   the interpreter Trimline is installed in; default: python
#   TRIMLINE_MPI      how srun starts MPI ranks (srun --mpi=list); default: pmix

set -euo pipefail
: "${TRIMLINE_RECIPE:?is not set: the path of a recipe}"
: "${TRIMLINE_PYTHON:=python}"
: "${TRIMLINE_MPI:=pmix}"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}     # srun does not take it from sbatch since Slurm 22.05
export PYTHONUNBUFFERED=1
export TRIMLINE_TOLD=$TRIMLINE_RECIPE.told-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}   # ranks that fail alike say so once

# One rank a task, meeting in torch.distributed at the first node. DeepSpeed reads no SLURM_ variable itself.
torch_ranks() {
    export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    run --mpi=none bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
        "$TRIMLINE_PYTHON" -m pipeline "$1" "$TRIMLINE_RECIPE"
}

# One MPI rank a task.
mpi_ranks() {
    if [ "${SLURM_NTASKS:-1}" -eq 1 ]; then one_process "$1"; fi
    run --mpi="$TRIMLINE_MPI" "$TRIMLINE_PYTHON" -m pipeline "$1" "$TRIMLINE_RECIPE"
}

one_process() {
    run --mpi=none --nodes=1 --ntasks=1 "$TRIMLINE_PYTHON" -m pipeline "$1" "$TRIMLINE_RECIPE"
}

# Ends the job with the highest exit code of its ranks. A rank that ends early ends the others within a minute; not at once, since
# ranks that stop on a signal do not stop in the same instant. 85: they have saved their work, and the job goes on later.
run() {
    local code=0
    srun --wait=60 "$@" || code=$?
    rm -f "$TRIMLINE_TOLD"
    if [ "$code" -eq 85 ]; then
        echo "stopped after a checkpoint; back in the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
