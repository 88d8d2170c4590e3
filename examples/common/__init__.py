"""What the examples with other libraries share: the command line, the memory of a process, a stock trainer."""
