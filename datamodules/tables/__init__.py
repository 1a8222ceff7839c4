"""Tables of competitions: reading, the meaning of columns, pictures of rows, folds."""
