"""Where a stage runs: this machine's ranks (`local`) or a chain of Slurm jobs (`slurm`)."""
