"""Two checkpoints, module by module: what a reader gets of each, however it is stored."""
