"""Helpers without knowledge of models: files, settings, processes, ragged arrays, numbers."""
