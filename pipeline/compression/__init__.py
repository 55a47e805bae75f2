"""CoFi pruning: hard-concrete masks, the Lagrangian, distillation, surgery."""
