"""What tests share: inputs, rules and other users."""
