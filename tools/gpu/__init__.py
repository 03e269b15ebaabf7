"""What proves varl on a GPU machine, in one command."""
