"""This process and this machine: files, memory, signals, versions, chips."""
