"""One operation, one file, or a folder where it has several backends. Import an operation from its module."""
