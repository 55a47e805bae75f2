"""The `slurm` section of a recipe. Nothing here changes what a stage makes."""

from __future__ import annotations

from pipeline.settings import Settings, setting


class JobSettings(Settings):
    """What one job asks of the cluster. A key left out is not asked for."""

    partition: str | None = setting(None, "Partition (queue).", result=False)
    account: str | None = setting(None, "Account to charge.", result=False)
    qos: str | None = setting(None, "Quality of service.", result=False)
    time: str | None = setting(None, "Time limit, as Slurm writes it (`2-00:00:00`, `04:00:00`).", result=False)
    nodes: int | None = setting(None, "Nodes.", ge=1, result=False)
    tasks_per_node: int | None = setting(None, "Ranks on a node; default: its GPUs, or 1.", ge=1, result=False)
    gpus_per_node: int | None = setting(None, "GPUs on a node.", ge=0, result=False)
    cpus_per_task: int | None = setting(None, "CPU cores a rank.", ge=1, result=False)
    memory: str | None = setting(None, "Memory a node (`64G`).", result=False)
    extra: tuple[str, ...] = setting((), "Further sbatch options, one a line (`--constraint=a100`).", result=False)
    setup: tuple[str, ...] = setting((), "Shell lines before the stage starts (`module load cuda`).", result=False)


class SlurmSettings(JobSettings):
    """Common to all jobs; `stages` overrides it for one stage."""

    mpi: str = setting("pmix", "How srun starts the MPI ranks of tokenize, pack and index.", result=False)
    signal_seconds: int = setting(120, "Warning before the time limit, to save and requeue.", unit="seconds", ge=10, result=False)
    stages: dict[str, JobSettings] = setting({}, "Settings of single stages, by name.", result=False)
