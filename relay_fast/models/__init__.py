"""nn.Modules: the looped block, the models around it, their layer stacks and losses."""
