"""Labelled tasks for finetune, prune and evaluate alike: reading and metrics."""
