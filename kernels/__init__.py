"""One operation: a file, or a folder where it has several backends. Callers import from these; nothing is handed on."""
