"""What a model is trained for: one file an objective, each an `nn.Module` that returns named losses."""
