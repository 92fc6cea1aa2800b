"""What a run will take, before it is paid for: memory and traffic of its own step code, without weights and GPUs."""
