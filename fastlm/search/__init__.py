"""Looking for models: shapes and compressions under a budget."""
