"""What is typed: flags checked, recipes, names, lists, errors. No module here imports torch at its top."""
