"""The command line: knobs, checks, recipes, names, lists, errors. No module here imports torch at its top."""
