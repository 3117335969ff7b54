"""What array libraries do in their own way; one file per library, each with a `LIBRARY`."""
