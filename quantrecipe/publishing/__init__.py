"""From a converted checkpoint to a repository that stands on its own, and onto the Hub."""
