"""What other parts of torch must know about our ops. Each module is imported when both are used together."""
