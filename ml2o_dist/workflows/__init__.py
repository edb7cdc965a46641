"""What a command does, from settings to results: the rooms joined."""
