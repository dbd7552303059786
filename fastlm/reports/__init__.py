"""Pictures and tables from what runs left on disk."""
