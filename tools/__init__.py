"""What developers and users of varl run beside it."""
