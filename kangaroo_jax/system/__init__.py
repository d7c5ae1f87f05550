"""Files, memory, processes and terminals: what no library gives."""
