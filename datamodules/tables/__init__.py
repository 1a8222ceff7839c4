"""Tables of competitions: reading, the meaning of columns, images of rows, folds."""
