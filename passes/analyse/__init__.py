"""What is found in a captured program: its loss and head, its layers, what belongs to a row."""
