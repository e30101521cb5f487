"""Independent models that the library is checked against; nothing here imports microscale."""
