"""What other parts of torch must know about our ops, loaded when somebody uses them together."""
