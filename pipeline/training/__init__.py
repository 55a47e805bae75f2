"""The loop, the DeepSpeed engine, checkpoints, signals and telemetry. Trains any module that returns named losses."""
