"""What several test files use; no test is here, and no fixture."""
