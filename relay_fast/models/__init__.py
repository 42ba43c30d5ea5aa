"""Modules: the looped block, models built around it, layer stacks and losses."""
