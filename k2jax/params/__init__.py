"""Parameters: a declaration gives shape, layout, optimizer group and published name."""
